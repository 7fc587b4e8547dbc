"""What goes to TensorBoard and to Weights & Biases: curves, tickets, flags, the summary."""

import dataclasses
import json
import os
import signal
import sys
import types
from pathlib import Path

import pytest

from helpers.cifar import run_cifar, stop_in
from helpers.commands import one_sentence
from helpers.processes import wait_until
from sparselearning.process.errors import FaultError, UsageError
from sparselearning.training.progress import Progress
from sparselearning.training.records import EpochRow, Results, Summary, TicketRow
from sparselearning.training.trackers import TensorBoard, WeightsAndBiases

pytestmark = pytest.mark.usefixtures("workplace")

CONFIG = {"command": "python /home/x/main.py", "indicate_method": "rigl", "seed": 3, "data": "/home/x/c.npz", "lr": 0.1}
EPOCH = EpochRow(
    phase="cycle", epoch=7, ticket=2, lr=0.1, train_loss=1.5, train_acc=0.25, eval_loss=1.25, eval_acc=0.5,
    density=0.1, images_per_second=1000.0,
)  # fmt: skip
TICKET = TicketRow(ticket=2, ticket_acc=0.5, superposed_acc=0.75, factor=0.5, union_density=0.15, density=0.1)
SUMMARY = Summary(
    pretrain_acc=0.5, ticket_acc=[0.5], superposed_acc=[0.75], final_acc=0.75, density=0.1, gain=25.0,
    gain_over_ticket=25.0, total_seconds=60.0,
)  # fmt: skip
NOTHING = Results(pretrain_acc=None)
RUN = (
    "--data digits --model lenet-300-100 --batch-size 1200 --seed 3 --pre_train --cyclic_train --epochs 3 --cycle 1 "
    "--cycle_rate 0.34 --sparse --method DST --init-density 0.05 --no-cuda --execution masked --save run"
)


def script(*words):
    return run_cifar(" ".join([RUN, *words]))


class Service:
    """Stands in for the package ``wandb``: remembers what it is given."""

    class Error(Exception):
        pass

    def __init__(self):
        self.runs = []
        self.lost = False

    def module(self):
        module = types.ModuleType("wandb")
        module.Error, module.Settings, module.init = self.Error, self.settings, self.init
        return module

    def settings(self, **options):
        if "/" in options.get("project", ""):
            raise self.Error("Invalid project name\nmore of it")
        return options

    def init(self, **options):
        if self.lost:
            raise self.Error("No API key configured.")
        run = types.SimpleNamespace(
            options=options, logged=[], summary={}, url="https://there", offline=False, exit_codes=[],
            define_metric=lambda name, step_metric: None,
        )  # fmt: skip
        run.log = run.logged.append
        run.finish = lambda exit_code: run.exit_codes.append(exit_code)
        self.runs.append(run)
        return run


@pytest.fixture
def service(monkeypatch):
    found = Service()
    monkeypatch.setitem(sys.modules, "wandb", found.module())
    return found


# ------------------------------------------------------------------------------------------------- Weights & Biases


def test_what_weights_and_biases_gets(service):
    tracker = WeightsAndBiases("sparse nets", Path("run/id"), CONFIG)
    assert os.listdir() == []
    tracker.start(NOTHING)
    tracker.epoch(EPOCH)
    tracker.ticket(TICKET)
    tracker.finished(SUMMARY)
    tracker.close()
    (run,) = service.runs
    assert run.options["project"] == "sparse nets"
    assert (run.options["name"], run.options["group"]) == ("rigl-seed3", "rigl")
    assert run.options["config"] == {"indicate_method": "rigl", "seed": 3, "data": "c.npz", "lr": 0.1}
    assert [set(figures) for figures in run.logged] == [
        {
            "epoch", "ticket", "lr", "train_loss", "train_acc", "eval_loss", "eval_acc", "density",
            "images_per_second",
        },
        {
            "ticket/ticket", "ticket/ticket_acc", "ticket/superposed_acc", "ticket/factor", "ticket/union_density",
            "ticket/density",
        },
    ]  # fmt: skip
    assert (run.logged[0]["eval_acc"], run.logged[1]["ticket/superposed_acc"]) == (0.5, 0.75)
    assert run.summary == SUMMARY.as_dict()
    assert run.exit_codes == [0]


def test_a_resumed_run_goes_on_in_the_same_run_there_and_a_new_one_does_not(service):
    for folder in ("run", "run", "other"):
        tracker = WeightsAndBiases("p", Path(folder, "id"), CONFIG)
        tracker.start(NOTHING)
        tracker.close()
    first, again, other = (run.options["id"] for run in service.runs)
    assert first == again != other
    assert all(run.options["resume"] == "allow" for run in service.runs)
    assert service.runs[0].exit_codes == [1]  # it had not ended


@pytest.mark.parametrize(("project", "message"), [("a/b", "Invalid project name"), ("", "name of a project")])
def test_a_project_that_cannot_be_called_so(service, project, message):
    with pytest.raises(UsageError, match=message):
        WeightsAndBiases(project, Path("id"), CONFIG)


def test_no_account(service):
    service.lost = True
    with pytest.raises(FaultError, match=r"No API key configured.*WANDB_MODE=offline"):
        WeightsAndBiases("p", Path("id"), CONFIG).start(NOTHING)


@pytest.mark.parametrize(
    ("module", "what"),
    [
        ("torch.utils.tensorboard", "tensorboard"),
        ("wandb", "wandb"),
        ("wandb", "folder"),  # of that name, left by an earlier run, which Python takes for a package
    ],
)
def test_a_missing_package_is_told_before_anything_is_trained(monkeypatch, capsys, module, what):
    monkeypatch.setitem(sys.modules, module, types.ModuleType(module) if what == "folder" else None)
    flag = "wandb" if what == "folder" else what
    assert script(f"--{flag}", "there") == 2
    assert f"--{flag} needs another package: pip install {flag}" in one_sentence(capsys.readouterr().err)
    assert os.listdir() == []


def test_only_the_first_process_tells(service, monkeypatch):
    monkeypatch.setattr("sparselearning.process.distributed.is_main", lambda: False)
    progress = Progress([WeightsAndBiases("p", Path("id"), CONFIG)])
    progress.start(0, 1, NOTHING)
    progress.epoch(EPOCH)
    progress.close()
    assert not service.runs


def test_a_run_outlives_its_tracker(service, capsys):
    def lost(figures):
        raise ConnectionResetError("Connection lost")

    progress = Progress([WeightsAndBiases("p", Path("id"), CONFIG), TensorBoard(Path("events"))])
    progress.start(0, 1, NOTHING)
    service.runs[0].log = lost
    for _ in range(2):
        progress.epoch(EPOCH)
    progress.finished(SUMMARY)
    progress.close()
    assert capsys.readouterr().err.splitlines() == [
        "note: WeightsAndBiases has failed (Connection lost): the run continues without it"
    ]
    assert len(scalars("events")["eval_acc"]) == 2


def test_a_run_offline(monkeypatch):
    """With the package itself, without account and network: bit for bit the run that it would be alone."""
    pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "HOME": os.getcwd(), "WANDB_DIR": os.getcwd()}.items():
        monkeypatch.setenv(name, value)
    assert script() == 0
    Path("run").rename("alone")
    with monkeypatch.context() as context:
        stop_in(context, 2, signal.SIGTERM)
        assert script("--wandb", "tickets") == 143
    assert script("--wandb", "tickets", "--resume", "run") == 0
    assert Path("run/model_previous.pth").read_bytes() == Path("alone/model_previous.pth").read_bytes()
    name = Path("run/wandb_id.txt").read_text()
    files = sorted(Path("wandb").glob(f"offline-run-*/run-{name}.wandb"))
    whole = [{b"lenet-300-100", b"Results-seed3", b"eval_acc"}, {b"ticket/superposed_acc", b"final_acc", b"eval_acc"}]
    assert len(files) == len(whole)
    for file, words in zip(files, whole, strict=True):  # which W&B's own process may still be writing
        wait_until(lambda file=file, words=words: all(word in file.read_bytes() for word in words), 60)
    assert b"final_acc" not in files[0].read_bytes()


# ------------------------------------------------------------------------------------------------------ TensorBoard


def scalars(folder):
    """Tag → steps and values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_what_tensorboard_gets():
    pytest.importorskip("tensorboard")
    tracker = TensorBoard(Path("events"))
    assert os.listdir() == []
    tracker.start(NOTHING)
    tracker.epoch(EPOCH)
    tracker.ticket(TICKET)
    tracker.finished(SUMMARY)
    tracker.close()
    found = scalars("events")
    assert found["eval_acc"] == [(7, 0.5)]
    assert found["ticket/superposed_acc"] == [(2, 0.75)]
    assert found["summary/final_acc"] == [(0, 0.75)]


def test_a_resumed_run_has_every_point_once():
    """Points after its checkpoint, which it writes again, and those that a killed run had not flushed yet."""
    pytest.importorskip("tensorboard")
    epochs = [dataclasses.replace(EPOCH, epoch=epoch, eval_acc=epoch / 8) for epoch in range(4)]
    tickets = [dataclasses.replace(TICKET, ticket=ticket, superposed_acc=ticket / 8) for ticket in (1, 2)]

    def run(so_far, new_epochs, new_tickets):
        tracker = TensorBoard(Path("events"))
        tracker.start(so_far)
        for row in new_epochs:
            tracker.epoch(row)
        for row in new_tickets:
            tracker.ticket(row)
        tracker.close()

    run(NOTHING, [epochs[0], epochs[2]], tickets)
    run(Results(pretrain_acc=0.5, metrics=epochs[:2], tickets=tickets[:1]), epochs[2:], tickets[1:])
    found = scalars("events")
    assert found["eval_acc"] == [(0, 0.0), (1, 0.125), (2, 0.25), (3, 0.375)]
    assert found["ticket/superposed_acc"] == [(1, 0.125), (2, 0.25)]


def test_both_at_once_from_the_command_line(service):
    pytest.importorskip("tensorboard")
    assert script("--wandb", "p", "--tensorboard", "events") == 0
    (run,) = service.runs
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    accuracies = [figures["eval_acc"] for figures in run.logged if "eval_acc" in figures]
    assert accuracies == [row["eval_acc"] for row in rows]
    assert [step for step, _ in scalars("events")["eval_acc"]] == [0, 1, 2]
    assert run.summary == json.loads(Path("run/summary.json").read_text())
    assert run.options["config"]["model"] == "lenet-300-100"
    assert not any(str(Path.cwd()) in str(value) for value in run.options["config"].values())
