"""The study's commands make sense before hours are spent on them, and RESULTS.md says what results/ says."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from test_report import write_analysis, write_run

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import study  # noqa: E402  found once its folder is on the path
import sweep  # noqa: E402

from sparselearning import report  # noqa: E402
from sparselearning.errors import FaultError, UsageError  # noqa: E402

EXPERIMENTS = [(name, experiment) for name, one in study.STUDIES.items() for experiment in one.experiments]


@pytest.mark.parametrize(("name", "experiment"), EXPERIMENTS)
def test_every_run_can_be_started_and_every_control_pairs_with_its_runs(name, experiment, tmp_path):
    one = study.STUDIES[name]
    words = study.sweep_command(one, experiment, tmp_path / experiment)
    end = words.index("--")
    args = sweep.parse(words[2:end])
    assert (args.seeds, args.control) == ([41, 42, 43], one.experiments[experiment].control)
    for method in args.methods:
        run = sweep.main_suptickets.parse(sweep.planned(method, 41, words[end + 1 :], args.out, control=False).flags)
        assert run.cyclic_train
        assert "{" not in " ".join(words).replace("{seed}", "")
        if args.control:
            control = sweep.main_suptickets.parse(sweep.planned(method, 41, words[end + 1 :], args.out, True).flags)
            tickets = {"cyclic_train", "cycle_rate", "save"}
            assert {key for key, value in vars(run).items() if value != getattr(control, key)} == tickets


def test_one_ticket_flag_per_experiment_differs_from_the_main_one():
    main = study.STUDIES["cifar100-10k"].experiments["main"]
    assert main.flags == ""
    again = study.sweep_command(study.STUDIES["cifar100-10k"], "no-exploration", Path("work/no-exploration"))
    assert "--re_explore" not in again
    assert "work/main/granet/seed{seed}/tickets/ticket_0.pth" in again


def test_the_subset_is_balanced_whole_in_test_and_always_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    labels = np.arange(50_000) * 7 % 100
    images = np.zeros((50_000, 2, 2, 3), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 1, 0] = np.arange(50_000) % 251, np.arange(50_000) // 251
    np.savez("all.npz", x_train=images, y_train=labels, x_test=images[:300], y_test=labels[:300])
    path = study.subset("all.npz", Path("data"), per_class=100)
    assert path == Path("study/cifar100-10k.npz")
    part = np.load(path)
    assert np.bincount(part["y_train"]).tolist() == [100] * 100
    low, high = part["x_train"][:, 0, :, 0].astype(int).T
    places = 251 * high + low
    assert (np.diff(places) > 0).all()
    assert (part["y_train"] == labels[places]).all()
    assert len(part["y_test"]) == 300
    before = path.read_bytes()
    path.unlink()
    study.subset("all.npz", Path("data"), per_class=100)
    assert path.read_bytes() == before


def test_other_data_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = np.zeros((100, 2, 2, 3), np.uint8)
    np.savez("few.npz", x_train=images, y_train=np.arange(100), x_test=images, y_test=np.arange(100))
    with pytest.raises(UsageError, match="not CIFAR-100"):
        study.subset("few.npz", Path("data"), per_class=100)


def test_collecting_keeps_texts_of_finished_runs_and_no_folders(tmp_path):
    finished = write_run(tmp_path / "work/granet/seed1", network={"folder": str(tmp_path)})
    write_analysis(finished, 0.0)
    (finished / "checkpoint.pth").write_bytes(b"weights")
    write_run(tmp_path / "work/granet/seed2", seed=2, finished=False)
    study.collect(tmp_path / "work", tmp_path / "kept")
    files = sorted(str(path.relative_to(tmp_path / "kept")) for path in (tmp_path / "kept").rglob("*.json*"))
    texts = ["analysis/analysis.json", "config.json", "metrics.jsonl", "summary.json", "tickets.jsonl"]
    assert files == [f"granet/seed1/{name}" for name in texts]
    assert "network" not in json.loads((tmp_path / "kept/granet/seed1/config.json").read_text())


def test_tables_are_filled_in_and_filled_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "results/a/seed1")
    text = (
        "# Title\n<!-- report results/a results/b -->\nold\n<!-- end -->\nwords <!-- report results/c --><!-- end -->\n"
    )
    once = study.filled(text)
    assert "old" not in once
    assert "| GraNet |   1 |" in once
    assert "not run yet: results/b" in once
    assert "not run yet: results/c" in once
    assert once.startswith("# Title\n")
    assert study.filled(once) == once


def test_a_failing_command_stops_the_study():
    with pytest.raises(FaultError, match="exit code 3"):
        study.call([sys.executable, "-c", "raise SystemExit(3)"])


def test_results_say_what_the_kept_files_say(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    text = Path("RESULTS.md").read_text()
    assert study.filled(text) == text
    folders = re.search(r"<!-- report ([^>]*?) -->", text)[1].split()
    report.main([*folders, "--out", str(tmp_path), "--no-plots"])
    assert (tmp_path / "results.md").read_text() in text
