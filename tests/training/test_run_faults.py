"""Checkpoints that do not fit, losses that turn NaN, full disks: one sentence, and nothing is lost."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers.comparing import differing, lines, tree
from helpers.small_runs import DENSE, MASKING, PLAN, Batches, Signals, network, prepare, result
from sparselearning.process.errors import FaultError, UsageError
from sparselearning.process.files import load_torch
from sparselearning.process.signals import Stopped
from sparselearning.training.experiment import SparseTraining
from sparselearning.training.networks import load_weights

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

# ----------------------------------------------------------------------------------------------- wrong checkpoints


def test_resuming_with_other_flags_names_them(tmp_path):
    with pytest.raises(Stopped):
        prepare(tmp_path, signals=Signals(4), flags={"lr": 0.1, "model": "lenet"}).run()
    before = tree(tmp_path)
    with pytest.raises(UsageError, match=r"lr \(0\.1 there, 0\.2 here\)") as refusal:
        prepare(tmp_path, resume=tmp_path, flags={"lr": 0.2, "model": "lenet"})
    assert "model" not in str(refusal.value).replace(str(tmp_path), "")
    assert tree(tmp_path) == before


def test_weights_of_another_model_are_refused(tmp_path):
    torch.save(nn.Linear(3, 3).state_dict(), tmp_path / "other.pth")
    plan = dataclasses.replace(PLAN, pre_train=False)
    with pytest.raises(UsageError, match="another model"):
        prepare(tmp_path / "run", plan, resume=tmp_path / "other.pth")
    assert not (tmp_path / "run").exists()


def test_weights_of_early_versions_of_pytorch_lack_counters(tmp_path):
    saved, model = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    nn.init.normal_(saved.weight)
    state = {name: entry for name, entry in saved.state_dict().items() if name != "num_batches_tracked"}
    load_weights(model, state, tmp_path / "old.pth")
    assert torch.equal(model.weight, saved.weight)
    assert model.num_batches_tracked == 0


def test_bare_weights_are_no_checkpoint_to_go_on_from(tmp_path):
    torch.save(network(0.0).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(UsageError, match="no checkpoint of a run"):
        prepare(tmp_path / "run", resume=tmp_path / "weights.pth")


def test_masks_that_do_not_fit_are_refused(tmp_path):
    """Pre-trained with all layers masked, cycles with the first one dense."""
    first = prepare(tmp_path / "a", dataclasses.replace(PLAN, cyclic_train=False), flags={"part": 1})
    first.run()
    masks = SparseTraining(masking=MASKING, keep_first_dense=True)
    with pytest.raises(UsageError):
        prepare(
            tmp_path / "b", dataclasses.replace(PLAN, pre_train=False), masks, resume=first.folder.path,
            flags={"part": 2},
        )  # fmt: skip


# --------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("masks", [MASKING, None])
@pytest.mark.parametrize("poison", [(0, 0), (1, 2), (2, 1), (3, 2)])
def test_a_loss_that_turns_nan_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, poison, masks):
    epoch, batch = poison
    plan = PLAN if masks else DENSE
    trainer = prepare(tmp_path, plan, masks, train=Batches(20, 8, shuffled=True, poison=poison))
    kept = {}
    save = trainer.checkpoint.save

    def save_checkpoint():
        save()
        kept["bytes"] = trainer.folder.checkpoint.read_bytes()

    trainer.checkpoint.save = save_checkpoint
    with pytest.raises(FaultError, match=f"epoch {epoch}, step {batch}") as fault:
        trainer.run()
    assert len(lines(trainer.folder.metrics)) == epoch
    assert len(lines(trainer.folder.tickets)) == 0
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    if epoch == 0:
        assert not list(tmp_path.iterdir())
    else:
        assert trainer.folder.checkpoint.read_bytes() == kept["bytes"]
        assert str(trainer.folder.checkpoint) in str(fault.value)


@pytest.mark.parametrize("masks", [MASKING, None])
@pytest.mark.parametrize("epoch", [1, 3])
def test_weights_that_diverge_in_the_last_step_of_an_epoch_stop_the_run(tmp_path, epoch, masks):
    """The step's own loss is finite; the evaluation that follows shows the fault, in pre-training and at a ticket."""
    trainer = prepare(tmp_path, PLAN if masks else DENSE, masks)
    step = trainer.train_batch

    def train_batch(batch):
        step(batch)
        if (trainer.at.epoch, trainer.at.batch) == (epoch, 2):
            with torch.no_grad():
                for parameter in trainer.model.parameters():
                    parameter.mul_(torch.nan)

    trainer.train_batch = train_batch
    with pytest.raises(FaultError, match=f"epoch {epoch}"):
        trainer.run()
    saved = load_torch(trainer.folder.checkpoint)
    assert all(torch.isfinite(entry).all() for entry in saved["state_dict"].values())
    assert saved["epoch"] <= epoch
    for name in ("current", "previous"):
        path = getattr(trainer.folder, name)
        if path.exists():
            assert all(torch.isfinite(entry).all() for entry in load_torch(path)["state_dict"].values())
    assert "NaN" not in trainer.folder.metrics.read_text()


FILES = ["metrics.jsonl", "tickets.jsonl", "model_current.pth", "model_previous.pth", "checkpoint.pth"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("name", FILES)
def test_a_full_disk_is_told_and_what_stood_there_stays(tmp_path, name):
    path = tmp_path / name
    path.write_text("from before")
    path.with_name(name + ".partial").symlink_to("/dev/full")
    with pytest.raises(FaultError, match=f"cannot write .*{name}: No space left on device"):
        prepare(tmp_path).run()
    assert path.read_text() == "from before"
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_stop_on_a_full_disk_keeps_the_older_checkpoint(tmp_path):
    signals = Signals(14)
    trainer = prepare(tmp_path, signals=signals)
    save = trainer.checkpoint.save

    def save_checkpoint():
        save()
        trainer.folder.checkpoint.with_name("checkpoint.pth.partial").symlink_to("/dev/full")

    trainer.checkpoint.save = save_checkpoint
    with pytest.raises(FaultError, match="No space left"):
        trainer.run()
    whole = prepare(tmp_path / "whole")
    expected = result(whole, whole.run())
    resumed = prepare(tmp_path, resume=tmp_path)
    different = differing(expected, result(resumed, resumed.run()))
    assert not different
