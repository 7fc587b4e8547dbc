"""Sweeps: which runs, with which flags, in which order; skipped, resumed, stopped, failed. A stub does the training."""

import itertools
import json
import os
import shlex
import signal
import threading
import time
from pathlib import Path

import main_suptickets
import pytest
import sweep

from sparselearning.process.errors import FaultError, UsageError
from sparselearning.reporting import runs
from sparselearning.training import kept_flags

SHARED = shlex.split(
    "--data digits --model cifar_resnet_8_4 --epochs 2 --cycle 1 --cycle_rate 0.5 --final-density 0.1 --workers 1 "
    "--pre_train --cyclic_train --sparse --re_explore --no_maskupdates --final-prune-epoch 1 --no-cuda"
)

STUB = """
import json, os, signal, sys, time
from pathlib import Path

words = sys.argv[1:]
save = Path(words[words.index("--save") + 1])
save.mkdir(parents=True, exist_ok=True)
row = {"words": words, "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "from": time.time()}
with open(save.parent.parent / "journal", "a") as journal:
    print(json.dumps(row), file=journal)
print("training")
if (save.parent / "fail").exists():
    sys.exit(1)
if (save.parent / "wait").exists():
    def stop(number, frame):
        (save / "checkpoint.pth").write_text("here")
        sys.exit(128 + number)
    signal.signal(signal.SIGINT, stop)
    (save / "waiting").touch()
    time.sleep(30)
    sys.exit(3)
time.sleep(0.05)
(save / "summary.json").write_text("{}")
"""


@pytest.fixture
def out(tmp_path, monkeypatch):
    """Folder of a sweep whose runs are stubs, and whose report only notes its arguments."""
    script = tmp_path / "stub.py"
    script.write_text(STUB)
    monkeypatch.setattr(sweep, "SCRIPT", script)
    monkeypatch.setattr(sweep, "SECONDS_BETWEEN_LOOKS", 0.02)
    monkeypatch.setattr(sweep.report, "main", lambda argv: (tmp_path / "reported").write_text(json.dumps(argv)))
    out = tmp_path / "out"
    out.mkdir()
    return out


def run_sweep(out, *words, shared=SHARED):
    sweep.main([*map(str, words), "--out", str(out), "--", *shared])


def journal(out):
    path = out / "journal"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def saved(out):
    return [str(Path(value(row["words"], "--save")).relative_to(out)) for row in journal(out)]


def value(words, flag):
    """What argparse makes of a flag that may stand there twice."""
    return [after for before, after in itertools.pairwise(words) if before == flag][-1]


def parsed(method, control=False, out=Path("out"), shared=SHARED):
    words = sweep.planned(method, 41, shared, out, control).flags
    return main_suptickets.parse(words)


# ------------------------------------------------------------------------------------------------- which flags


MEANING = {
    "dense": {"sparse": False, "re_explore": False, "no_maskupdates": False},
    "static": {"method": "DST", "fix": True, "init_density": 0.1, "re_explore": False},
    "set": {"method": "DST", "growth": "random", "init_density": 0.1},
    "rigl": {"method": "DST", "growth": "gradient", "init_density": 0.1},
    "set-itop": {"growth": "random", "init_density": 0.1, "update_frequency": 1500},
    "rigl-itop": {"growth": "gradient", "init_density": 0.1, "update_frequency": 4000},
    "granet": {"method": "GraNet", "init_density": 0.5, "final_density": 0.1},
    "granet-from-dense": {"method": "GraNet", "init_density": 1.0, "final_density": 0.1},
    "gmp": {"method": "GMP", "sparse_init": "GMP", "init_density": 1.0},
    "snip": {"sparse_init": "snip", "fix": True, "init_density": 0.1, "re_explore": False},
}


@pytest.mark.parametrize(("method", "expected"), MEANING.items())
def test_a_method_wins_over_what_all_runs_share(method, expected):
    shared = [*SHARED, "--method", "GraNet_uniform", "--growth", "momentum", "--init-density", "0.7", "--fix"]
    args = vars(parsed(method, shared=shared))
    sparse = {"sparse": True, "fix": False, "re_explore": True, "no_maskupdates": True} if args["sparse"] else {}
    expected = {**sparse, "epochs": 2, "cyclic_train": True, "seed": 41, "indicate_method": method, **expected}
    assert {name: args[name] for name in expected} == expected
    assert args["save"] == Path("out") / method / "seed41"


def config_of(path, *flags_of_run):
    """A file as a run with these flags leaves it."""
    path.write_text(json.dumps(kept_flags.values(main_suptickets.parse([*SHARED, *flags_of_run]))))
    return ["--config", str(path)]


def test_a_method_wins_over_the_flags_of_an_earlier_run(tmp_path):
    shared = config_of(tmp_path / "config.json", "--method", "GMP", "--lr", "0.3", "--seed", "5", "--save", "there")
    assert vars(parsed("rigl", shared=shared)) | {"config": None} == vars(
        parsed("rigl", shared=[*SHARED, "--lr", "0.3"])
    )
    assert parsed("rigl", shared=[*shared, "--lr", "0.2"]).lr == 0.2


def test_every_run_gets_its_own_seed():
    shared = [*SHARED, "--resume", "before/seed{seed}/checkpoint.pth"]
    assert parsed("granet", shared=shared).resume == Path("before/seed41/checkpoint.pth")


def test_every_method_is_tested():
    assert MEANING.keys() == sweep.METHODS.keys()


@pytest.mark.parametrize("method", sweep.METHODS)
def test_a_control_is_the_same_training_without_tickets(method):
    run, control = parsed(method), parsed(method, control=True)
    assert control.save == Path("out") / f"{method}-control" / "seed41"
    differing = {name for name, there in vars(control).items() if there != getattr(run, name)}
    assert differing == {"save", "cyclic_train", "cycle_rate"}
    assert (control.pre_train, control.cyclic_train, control.cycle_rate) == (True, False, 0)


# --------------------------------------------------------------------------------------------- one after another


def test_all_methods_of_a_seed_come_before_the_next_seed(out):
    run_sweep(out, "--seeds", 7, 8, 7, "--methods", "rigl", "set", "--control")
    of_a_seed = ["rigl/seed{}", "rigl-control/seed{}", "set/seed{}", "set-control/seed{}"]
    assert saved(out) == [folder.format(seed) for seed in (7, 8) for folder in of_a_seed]
    starts = [row["from"] for row in journal(out)]
    assert all(later - earlier > 0.05 for earlier, later in itertools.pairwise(starts))
    reported = json.loads((out.parent / "reported").read_text())
    assert reported[:8] == [str(out / folder) for folder in saved(out)]
    assert reported[8:10] == ["--out", str(out / "report")]


def test_finished_runs_are_skipped_and_unfinished_ones_resumed(out):
    (out / "rigl" / "seed7").mkdir(parents=True)
    (out / "rigl" / "seed7" / "summary.json").write_text("{}")
    (out / "rigl" / "seed8").mkdir()
    (out / "rigl" / "seed8" / "checkpoint.pth").touch()
    run_sweep(out, "--seeds", 7, 8, 9, "--methods", "rigl")
    resumed, fresh = journal(out)
    assert value(resumed["words"], "--resume") == str(out / "rigl" / "seed8" / "checkpoint.pth")
    assert "--resume" not in fresh["words"]
    assert saved(out) == ["rigl/seed8", "rigl/seed9"]
    run_sweep(out, "--seeds", 7, 8, 9, "--methods", "rigl")
    assert len(journal(out)) == 2


def test_a_dry_run_prints_commands_and_runs_nothing(out, capsys):
    (out / "set" / "seed7").mkdir(parents=True)
    (out / "set" / "seed7" / "summary.json").write_text("{}")
    run_sweep(out, "--seeds", 7, "--methods", "rigl", "set", "--dry-run")
    first, second = capsys.readouterr().out.splitlines()
    assert "stub.py --data digits" in first
    assert first.endswith(f"--seed 7 --save {out}/rigl/seed7")
    assert second == "# finished: set seed 7"
    assert not journal(out)


def test_a_failed_run_is_reported_at_the_end(out, capfd):
    (out / "rigl").mkdir()
    (out / "rigl" / "fail").touch()
    with pytest.raises(FaultError, match=r"runs failed: 1 of 2 \(rigl seed 7\)") as error:
        run_sweep(out, "--seeds", 7, "--methods", "rigl", "set")
    assert error.value.exit_code == 1
    assert saved(out) == ["rigl/seed7", "set/seed7"]
    assert json.loads((out.parent / "reported").read_text())[0] == str(out / "set" / "seed7")
    assert "rigl seed 7: exit code 1" in capfd.readouterr().out


def test_an_interrupt_goes_to_the_run_and_stops_the_sweep(out, capsys):
    (out / "rigl").mkdir()
    (out / "rigl" / "wait").touch()
    interrupt_once_there(out / "rigl" / "seed7" / "waiting")
    with pytest.raises(SystemExit) as exit_:
        run_sweep(out, "--seeds", 7, "--methods", "rigl", "set")
    assert exit_.value.code == 130
    assert "the same command resumes where it stopped" in capsys.readouterr().err
    assert saved(out) == ["rigl/seed7"]
    assert not (out.parent / "reported").exists()

    (out / "rigl" / "wait").unlink()
    run_sweep(out, "--seeds", 7, "--methods", "rigl", "set")
    assert saved(out) == ["rigl/seed7", "rigl/seed7", "set/seed7"]
    assert "--resume" in journal(out)[1]["words"]


def interrupt_once_there(path):
    def interrupt():
        give_up = time.monotonic() + 20
        while time.monotonic() < give_up:
            if path.exists():
                os.kill(os.getpid(), signal.SIGINT)
                return
            time.sleep(0.02)

    threading.Thread(target=interrupt, daemon=True).start()


# ---------------------------------------------------------------------------------------------------- one per GPU


def test_each_gpu_has_one_run_at_a_time(out, capfd):
    run_sweep(out, "--seeds", 1, 2, 3, 4, "--methods", "rigl", "--gpus", "3", "5")
    rows = journal(out)
    by_gpu = {gpu: [row["from"] for row in rows if row["gpu"] == gpu] for gpu in ("3", "5")}
    assert sorted(map(len, by_gpu.values())) == [2, 2]
    assert all(later - earlier > 0.05 for earlier, later in by_gpu.values())
    command, *printed = (out / "rigl" / "seed1.log").read_text().splitlines()
    assert "stub.py --pre_train" in command or "stub.py --data" in command
    assert printed == ["training"]
    assert "training" not in capfd.readouterr().out


# --------------------------------------------------------------------------------------------------------- misuse


@pytest.mark.parametrize("name", ["rigl/seed1.log", "report/runs.csv"])
def test_no_other_file_is_replaced_or_added_to(out, name):
    (out / name).parent.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(UsageError, match="exists, and is no earlier output"):
        run_sweep(out, "--seeds", 1, "--methods", "rigl", "--gpus", "0")
    assert (out / name).read_text() == "mine"
    assert not journal(out)


def test_each_run_has_a_folder_of_events_of_its_own(out):
    shared = [*SHARED, "--tensorboard", "events"]
    args = [main_suptickets.parse(sweep.planned("rigl", 7, shared, out, control).flags) for control in (False, True)]
    assert [str(one.tensorboard) for one in args] == ["events/rigl/seed7", "events/rigl-control/seed7"]


def test_a_folder_with_a_run_of_other_flags_is_left_alone(out):
    words = sweep.planned("rigl", 7, SHARED, out, control=False).flags
    config = kept_flags.values(main_suptickets.parse(words))
    folder = out / "rigl" / "seed7"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    sweep.planned("rigl", 7, [*SHARED, "--log-interval", "5", "--amp", "auto"], out, control=False)  # the same run
    of_earlier_version = {name: value for name, value in config.items() if name not in ("ema", "execution")}
    (folder / "config.json").write_text(json.dumps(of_earlier_version))
    sweep.planned("rigl", 7, [*SHARED, "--execution", "masked"], out, control=False)  # the same run, too
    with pytest.raises(UsageError, match=r"other flags, ema \(None there, 0.9 here\), execution \(masked there, auto"):
        sweep.planned("rigl", 7, [*SHARED, "--ema", "0.9"], out, control=False)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"seed7 holds a run with other flags, epochs \(2 there, 9 here\)"):
        run_sweep(out, "--seeds", 6, 7, "--methods", "rigl", shared=[*SHARED, "--epochs", "9"])
    (folder / "config.json").write_text("{")
    with pytest.raises(FaultError, match=r"config\.json is damaged"):
        run_sweep(out, "--seeds", 7, "--methods", "rigl")
    assert not journal(out)


@pytest.mark.parametrize(
    ("method", "shared", "message"),
    [
        ("rigl", [], "nothing to do"),
        ("rigl", [*SHARED, "--iters", "2"], "give --seeds alone"),
        ("granet", [*SHARED, "--final-density", "0.6"], "which is above it"),
        ("dense", ["--demo"], "dense cannot be combined with --demo"),
        (
            "dense",
            ["--recipe", "tuned", "--update-frequency", "9"],
            "dense cannot be combined .*--recipe .*--sparse",
        ),
        ("rigl", [*SHARED, "--model", "ResNet51"], "unknown model 'ResNet51'"),
        ("rigl", [*SHARED, "--data", "nowhere.npz"], "nowhere.npz"),
        ("rigl", [*SHARED, "--save", "here"], "--save after -- .* --out"),
        ("rigl", [*SHARED, "--seed=3"], "--seed after -- .* --seeds"),
        ("rigl", [*SHARED, "--dry-run"], "--dry-run after -- would train nothing: .* give --dry-run before it"),
        ("rigl", [*SHARED, "--show-layers"], "--show-layers after -- would train nothing"),
    ],
)
def test_flags_that_contradict_stop_it_before_anything_runs(out, method, shared, message):
    with pytest.raises(UsageError, match=message):
        run_sweep(out, "--seeds", 7, "--methods", "set", method, shared=shared)
    assert not journal(out)


@pytest.mark.parametrize(("of", "method"), [("--sparse", "dense"), ("--fix", "rigl")])
def test_a_switch_of_an_earlier_run_that_contradicts_the_method_is_told(out, tmp_path, of, method):
    shared = config_of(tmp_path / "config.json", *(["--fix", "--method", "DST"] if of == "--fix" else []))
    with pytest.raises(UsageError, match=f"{method} cannot be combined with .*{of}"):
        run_sweep(out, "--seeds", 7, "--methods", method, shared=shared)
    assert not journal(out)


@pytest.mark.parametrize(
    "words", [["--seeds", "7"], ["--seeds", "7", "--methods", "adam"], ["--seeds", "-1", "--methods", "set"]]
)
def test_misspelt_calls_exit_2(out, words):
    with pytest.raises(SystemExit) as exit_:
        run_sweep(out, *words)
    assert exit_.value.code == 2


# ------------------------------------------------------------------------------------------------------ for real


def test_a_real_sweep_ends_with_a_table_that_knows_the_control(tmp_path, data, capfd):
    small = [*SHARED, "--data", str(data), "--execution", "masked"]  # few images, no kernels to compile
    main_suptickets.main(sweep.planned("rigl", 7, small, tmp_path, control=False).flags)  # leaves one of two to run
    run_sweep(tmp_path, "--seeds", 7, "--methods", "rigl", "--control", "--gpus", 0, 1, shared=small)
    out = capfd.readouterr().out
    groups, left_out = runs.group_runs(runs.read_run(path) for path in runs.find_runs([tmp_path]))
    assert not left_out
    assert [(group.name, bool(group.ticket_flags)) for group in groups] == [("rigl", True), ("rigl", False)]
    assert groups[0].control is groups[1]
    assert "over plain training" in out
    assert (tmp_path / "report" / "results.md").is_file()
