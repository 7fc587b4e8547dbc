"""A run that is stopped anywhere and resumed ends as one that nothing stopped, to the bit."""

import dataclasses
import os
import signal

import pytest
import torch

from helpers.comparing import differing, lines
from helpers.small_runs import DENSE, MASKING, PLAN, Batches, Signals, prepare, result, set_up, sparse
from sparselearning.process.files import load_torch
from sparselearning.process.signals import Stopped, stop_signals
from sparselearning.sparse.superpose import AVERAGING
from sparselearning.training import experiment
from sparselearning.training.engine import Trainer
from sparselearning.training.experiment import Output
from sparselearning.training.plan import EpochBudget
from sparselearning.training.run_folder import RunFolder
from sparselearning.training.runtime import Runtime

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


def run_with_stops(folder, every, *, dropout=0.0, **settings):
    """One run that is stopped at every ``every``-th look for signals and resumed each time."""
    resume = None
    for _ in range(100):
        trainer = prepare(folder, signals=Signals(every), resume=resume, dropout=dropout, **settings)
        try:
            return trainer, trainer.run()
        except Stopped:
            resume = folder
    raise AssertionError("the run does not come to its end")


CONFIGURATIONS = {
    "GraNet, gradient": {},
    "adam": {"optimizer": "adam"},
    "random growth": {"masks": MASKING | {"method": "DST", "growth": "random"}},
    "momentum growth": {"masks": MASKING | {"growth": "momentum"}},
    "momentum_neuron growth, adam": {"masks": MASKING | {"growth": "momentum_neuron"}, "optimizer": "adam"},
    "threshold, redistribution": {"masks": MASKING | {"prune": "threshold", "redistribution": "momentum"}},
    "GMP": {"masks": MASKING | {"method": "GMP_uniform", "prune": "SET"}},
    "snip, fixed": {
        "masks": sparse(frozen=True, sparse_init="snip"),
        "plan": dataclasses.replace(PLAN, explore_rate=None),
    },
    "no updates in cycles": {"plan": dataclasses.replace(PLAN, updates_in_cycles=False)},
    "CAA without BN": {"plan": dataclasses.replace(PLAN, update_bn=False, averaging=AVERAGING["CAA"](0.5))},
    "bf16, channels last": {"amp": "bf16", "memory_format": torch.channels_last},
    "moving average": {"plan": dataclasses.replace(PLAN, ema_decay=0.8)},
    "growth ends at step 5": {"masks": MASKING | {"prune_start_step": 3, "final_update_step": 5}},
    "dense": {"masks": None, "plan": DENSE},
    "pre-training alone": {"plan": dataclasses.replace(PLAN, cyclic_train=False)},
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_run_with_many_stops_equals_one_without(tmp_path, name):
    settings = CONFIGURATIONS[name]
    trainer = prepare(tmp_path / "whole", **settings)
    whole = result(trainer, trainer.run())
    # From the start of an epoch to its end there are 12 looks: 3 batches, 2 + 2 of evaluation, 3 of BN. These strides
    # are longer than what has to be done in one go, and stop at different places; all but the first configuration
    # take turns with them.
    strides, number = (10, 11, 13), list(CONFIGURATIONS).index(name)
    for every in strides if number == 0 else strides[number % 3 :][:1]:
        different = differing(whole, result(*run_with_stops(tmp_path / str(every), every, **settings)))
        assert not different, f"stopped every {every}"


@pytest.mark.parametrize(("dropout", "explore_rate", "tickets"), [(0.0, None, 1), (0.4, 0.4, 2)])
def test_a_stop_at_any_point_changes_nothing(tmp_path, dropout, explore_rate, tickets):
    """Within an epoch, after its last batch, while evaluating, while re-estimating BatchNorm; in every epoch."""
    plan = dataclasses.replace(PLAN, budget=EpochBudget(1, 1, tickets), explore_rate=explore_rate)
    settings = {"plan": plan, "dropout": dropout}
    counter = Signals()
    trainer = prepare(tmp_path / "whole", signals=counter, **settings)
    whole = result(trainer, trainer.run())
    wrong = {}
    for at in range(1, counter.looks + 1):
        folder = tmp_path / str(at)
        with pytest.raises(Stopped):
            prepare(folder, signals=Signals(at), **settings).run()
        resumed = prepare(folder, resume=folder, **settings)
        place = f"look {at}, epoch {resumed.at.epoch}, batch {resumed.at.batch}, batches done: {resumed.at.trained}"
        if different := differing(whole, result(resumed, resumed.run())):
            wrong[place] = different
    assert not wrong, "\n".join(f"{place}: {what}" for place, what in wrong.items())


def test_cycles_alone_resume_as_well(tmp_path):
    first = prepare(tmp_path / "pretrained", dataclasses.replace(PLAN, cyclic_train=False), flags={"part": 1})
    first.run()
    plan = dataclasses.replace(PLAN, pre_train=False, budget=EpochBudget(2, 1, 1))
    counter = Signals()
    trainer = prepare(tmp_path / "whole", plan, signals=counter, resume=first.folder.path)
    whole = result(trainer, trainer.run())
    wrong = {}
    for at in range(1, counter.looks + 1):
        folder = tmp_path / str(at)
        with pytest.raises(Stopped):
            prepare(folder, plan, signals=Signals(at), resume=first.folder.path).run()
        resumed = prepare(folder, plan, resume=folder)
        if different := differing(whole, result(resumed, resumed.run())):
            wrong[at] = different
    assert not wrong


def test_a_stop_keeps_the_ticket_and_loses_nothing_that_was_committed(tmp_path):
    """The superposition under way when a stop comes is not half in the files."""
    counter = Signals()
    prepare(tmp_path / "whole", signals=counter).run()
    with pytest.raises(Stopped):
        prepare(tmp_path / "stopped", signals=Signals(counter.looks)).run()  # in the last superposition's evaluation
    folder = RunFolder(tmp_path / "stopped")
    assert len(lines(folder.metrics)) == 5
    assert len(lines(folder.tickets)) == 1
    assert load_torch(folder.previous)["epoch"] == 4


def test_a_finished_run_resumes_to_itself(tmp_path):
    trainer = prepare(tmp_path)
    whole = result(trainer, trainer.run())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    again = prepare(tmp_path, resume=tmp_path)
    assert again.at.epoch == again.plan.end_epoch
    different = differing(whole, result(again, again.run()))
    assert not different
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_signals_are_collected_and_the_handlers_given_back(number):
    before = signal.getsignal(number)
    with stop_signals() as received:
        assert received() == 0
        os.kill(os.getpid(), number)
        assert received() == number
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_exit_code_of_a_stop(tmp_path, number, code):
    with pytest.raises(Stopped) as stop:
        prepare(tmp_path, signals=Signals(4, number)).run()
    assert stop.value.exit_code == code
    assert stop.value.checkpoint == tmp_path / "checkpoint.pth"


@pytest.mark.parametrize("with_test_set", [False, True])
def test_a_signal_after_the_last_look_is_not_lost_and_not_a_crash(tmp_path, monkeypatch, with_test_set):
    """It comes while the last files are written: the run either ends as usual or stops, with its files complete."""
    summary_of = Trainer._summary

    def summary_under_fire(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return summary_of(self)

    monkeypatch.setattr(Trainer, "_summary", summary_under_fire)
    brought = set_up(test=Batches(7, 4, seed=2) if with_test_set else None)
    folder = RunFolder(tmp_path / "run")
    try:
        experiment.run(brought, PLAN, sparse(), Runtime(amp="off"), Output(folder, {}))
    except Stopped as stop:
        assert stop.exit_code == 143  # noqa: PT017  both outcomes are right, a crash is not
    else:
        assert folder.summary.exists()
    assert load_torch(folder.checkpoint)["epoch"] == 6


def test_a_checkpoint_has_the_entries_that_runs_of_earlier_versions_wrote(tmp_path):
    trainer = prepare(tmp_path)
    trainer.checkpoint.save()
    assert set(load_torch(trainer.folder.checkpoint)) == {
        "config", "epoch", "batch", "trained", "state_dict", "masks", "optimizer", "masking", "scaler", "gradients",
        "superposition", "superposition_masks", "pretrain_acc", "metrics", "tickets", "seconds", "total_seconds",
        "ranks",
    }  # fmt: skip


def test_no_entry_of_a_checkpoint_belongs_to_two_parts(tmp_path):
    checkpoint = prepare(tmp_path, dataclasses.replace(PLAN, ema_decay=0.8)).checkpoint
    names = [name for part in (checkpoint._at, *checkpoint._parts) for name in part.state_dict()]
    assert len(names) == len(set(names)) == 16
