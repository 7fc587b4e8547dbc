"""What --resume names is to a run: nothing, weights to start from, or itself."""

import dataclasses
import shlex
import weakref
from pathlib import Path

import main_suptickets
import pytest
import torch

from helpers.small_runs import MASKABLE, PLAN, Batches, Signals, network, prepare, set_up, sparse
from sparselearning.process.errors import FaultError, UsageError
from sparselearning.process.signals import Stopped
from sparselearning.sparse import masking
from sparselearning.training import experiment, from_flags, start
from sparselearning.training.engine import Trainer
from sparselearning.training.experiment import Output
from sparselearning.training.run_folder import RunFolder
from sparselearning.training.runtime import Runtime
from sparselearning.training.start import Continue, Fresh, FromWeights, find_start

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

CYCLES = dataclasses.replace(PLAN, pre_train=False)
END = PLAN.end_epoch


def write(folder, epoch=None, lr=0.1):
    """A run's checkpoint after so many epochs, as far as it is looked at; of no epoch, bare weights."""
    folder.mkdir(exist_ok=True)
    head = {"config": {"lr": lr}, "epoch": epoch, "masking": None, "ranks": [{}]}
    torch.save({"state_dict": {}} | (head if epoch is not None else {}), folder / "checkpoint.pth")


@pytest.mark.parametrize(
    ("epoch", "lr", "plan", "init", "expected"),
    [
        (2, 0.1, PLAN, "ERK", Continue),
        (END, 0.1, PLAN, None, Continue),
        (3, 0.1, CYCLES, "resume", Continue),
        (END, 0.1, CYCLES, "resume", "with training"),
        (END, 0.1, PLAN, "prune_global", "weights"),
        (2, 0.5, CYCLES, "resume", "with training"),
        (2, 0.5, CYCLES, None, "with training"),
        (2, 0.5, CYCLES, "prune_global", "weights"),
        (2, 0.5, PLAN, "resume", "weights"),
        (None, 0.1, CYCLES, "resume", "weights"),
        (None, 0.1, PLAN, "prune_uniform", "weights"),
    ],
)
def test_what_a_file_is_to_a_run_in_another_folder(tmp_path, epoch, lr, plan, init, expected):
    write(tmp_path / "there", epoch, lr)
    found = find_start(tmp_path / "there", RunFolder(tmp_path / "here"), {"lr": 0.1}, plan, init)
    assert found.source == tmp_path / "there" / "checkpoint.pth"
    assert found.saved["state_dict"] == {}
    if expected is Continue:
        assert isinstance(found, Continue)
    else:
        assert isinstance(found, FromWeights)
        assert found.with_training == (expected == "with training")


def test_a_finished_run_goes_on_in_its_own_folder(tmp_path):
    write(tmp_path, END)
    assert isinstance(find_start(tmp_path, RunFolder(tmp_path), {"lr": 0.1}, CYCLES, "resume"), Continue)


@pytest.mark.parametrize(
    ("there", "here", "differs"),
    [
        ("", "--amp auto --execution auto", None),
        ("--amp auto", "", None),
        ("--amp auto", "--amp off", None),
        ("--amp off", "", None),
        ("--amp bf16", "--amp bf16 --execution masked", None),  # active weights alone are computed with in float32
        ("--fp16", "--amp fp16", None),
        ("--amp auto", "--amp bf16", r"amp \(auto there, bf16 here\)$"),
        ("--amp bf16", "", r"amp \(bf16 there, None here\)$"),
        ("", "--execution masked", r"execution \(auto there, masked here\)$"),
        ("--data ./a.npz", "--data a.npz", None),
        ("--data a.npz", "--data b/a.npz", r"data \(a\.npz there, b/a\.npz here\)$"),  # may be other images
        ("--data a.npz", "--data b.npz", r"data \(a\.npz there, b\.npz here\)$"),
    ],
)
def test_a_flag_that_means_the_same_here_is_no_other_flag(tmp_path, there, here, differs):
    resumes_or_says(differs, checkpoint_of(tmp_path, f"--sparse {there}"), f"--sparse {here}")


def output(flags_given, resume=None):
    argv = shlex.split(f"--pre_train {flags_given}")
    args = main_suptickets.parse([*argv, *(["--resume", str(resume)] if resume else [])])
    return from_flags.output(
        args, main_suptickets.make_parser(), argv, RunFolder(Path("run")), {}, torch.device("cpu"), 1
    )


def checkpoint_of(folder, flags_given, lacking=()):
    """A run's folder with as much of a checkpoint as is looked at, of a version that lacked some flags."""
    config = {name: value for name, value in output(flags_given).identity.items() if name not in lacking}
    head = {"config": config, "epoch": 2, "masking": None, "ranks": [{}], "state_dict": {}}
    torch.save(head, folder / "checkpoint.pth")
    return folder


def resumes_or_says(differs, folder, flags_given):
    if differs is None:
        assert isinstance(experiment.start_of(PLAN, sparse(), output(flags_given, folder)), Continue)
    else:
        with pytest.raises(UsageError, match=f"other flags: {differs}"):
            experiment.start_of(PLAN, sparse(), output(flags_given, folder))


@pytest.mark.parametrize(
    ("here", "differs"),
    [
        ("--execution masked", None),
        ("", r"execution \(masked there, auto here\)$"),  # computing with active weights alone rounds otherwise
        ("--execution masked --no-tf32", r"tf32 \(True there, False here\)$"),
        ("--execution masked --ema 0.9", r"ema \(None there, 0.9 here\)$"),
        ("--execution masked --dense-layers fc", r"dense_layers \(None there, \['fc'\] here\)$"),
    ],
)
def test_flags_that_an_earlier_version_lacked_have_their_defaults(tmp_path, here, differs):
    lacking = {"execution", "tf32", "ema", "dense_layers", "layer_density", "final_update_epoch", "compile"}
    resumes_or_says(differs, checkpoint_of(tmp_path, "--sparse", lacking), f"--sparse {here}")


@pytest.mark.parametrize("here", ["", "--execution masked"])
def test_dense_training_is_executed_in_one_way(tmp_path, here):
    resumes_or_says(None, checkpoint_of(tmp_path, "", lacking={"execution"}), here)


def test_without_a_file_a_run_starts_afresh(tmp_path):
    write(tmp_path, 2)
    assert find_start(None, RunFolder(tmp_path), {"lr": 0.1}, PLAN, "ERK") == Fresh()


def stopped(folder, plan=PLAN, **settings):
    with pytest.raises(Stopped):
        prepare(folder, plan, signals=Signals(14), **settings).run()


@pytest.mark.parametrize("goes_on", [True, False])
def test_masks_that_come_from_a_checkpoint_are_not_drawn_before(tmp_path, monkeypatch, goes_on):
    stopped(tmp_path / "a")
    monkeypatch.setattr(masking, "SPARSE_INITS", {"ERK": None, "resume": None})
    other = {} if goes_on else {"plan": CYCLES, "flags": {"flags": "others"}}
    trainer = prepare(tmp_path / "b", resume=tmp_path / "a", **other)
    before = torch.load(tmp_path / "a" / "checkpoint.pth")["masking"]
    assert all(torch.equal(trainer.masking.masks[name], before["masks"][name]) for name in MASKABLE)
    assert trainer.masking.steps == before["steps"]


def test_cycles_from_bare_weights_count_on_from_the_steps_of_pretraining(tmp_path):
    torch.save(network(0.0).state_dict(), tmp_path / "weights.pth")
    trainer = prepare(tmp_path / "run", CYCLES, resume=tmp_path / "weights.pth")
    assert trainer.masking.steps == 2 * 3


def test_the_file_that_a_run_went_on_from_is_not_held_in_memory(tmp_path, monkeypatch):
    class Content(dict):
        """A dictionary that can be watched."""

    stopped(tmp_path)
    read, run, watched = start.load_torch, Trainer.run, []

    def load_torch(path):
        content = Content(read(path))
        watched.append(weakref.ref(content))
        return content

    def looking(trainer):
        watched.append(watched[0]())
        return run(trainer)

    monkeypatch.setattr(start, "load_torch", load_torch)
    monkeypatch.setattr(Trainer, "run", looking)
    output = Output(RunFolder(tmp_path), {}, identity={"flags": "the same"}, resume=tmp_path)
    experiment.run(set_up(), PLAN, sparse(), Runtime(amp="off"), output)
    assert watched[1:] == [None]


# ------------------------------------------------------------------------------------- restarted by the launcher


@pytest.fixture
def attempt(tmp_path, monkeypatch):
    """Runs in ``run`` as ranks of one job do that torchrun starts again when one has failed."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")

    def run(number, resume=None, *, plan=PLAN, fails=False):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(number))
        torch.manual_seed(1)
        brought = set_up(train=Batches(20, 8, shuffled=True, poison=(4, 1) if fails else None))
        output = Output(RunFolder(tmp_path / "run"), {}, identity={"flags": "the same"}, resume=resume)
        experiment.run(brought, plan, sparse(), Runtime(amp="off"), output)

    yield run
    del store  # which listens until then


def moved_aside(folder):
    return [path.name for path in folder.iterdir() if ".old-" in path.name]


def test_a_restarted_job_leaves_the_checkpoint_of_an_earlier_run_alone(tmp_path, attempt):
    stopped(tmp_path / "run")
    attempt(1)  # the attempt before ended without having come to the folder
    assert moved_aside(tmp_path) == ["run.old-1"]


@pytest.mark.parametrize("resume", [None, "weights.pth", "other"])
def test_a_restarted_job_resumes_from_its_own_checkpoint(tmp_path, attempt, resume):
    plan = CYCLES if resume == "weights.pth" else PLAN
    torch.save(network(0.0).state_dict(), tmp_path / "weights.pth")
    stopped(tmp_path / "other")
    source = resume and tmp_path / resume
    with pytest.raises(FaultError, match="no longer finite at epoch 4"):
        attempt(0, source, plan=plan, fails=True)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    attempt(1, source, plan=plan)
    assert not moved_aside(tmp_path)
    assert (tmp_path / "run" / "metrics.jsonl").read_text().startswith(before)  # seconds and all
