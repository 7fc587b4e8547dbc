"""Parts of a run: pre-training alone, cycles alone from all kinds of starts, dense runs."""

import contextlib
import dataclasses
import json
import shutil

import pytest
import torch
from torch import nn

from helpers.comparing import lines, plain
from helpers.small_runs import (
    DENSE,
    MASKABLE,
    MASKING,
    OPTIMIZERS,
    PLAN,
    TOTAL,
    Signals,
    network,
    non_zeros,
    prepare,
    set_up,
    sparse,
)
from helpers.tensors import active
from sparselearning.process.errors import FaultError, UsageError
from sparselearning.process.files import load_torch
from sparselearning.process.signals import Stopped
from sparselearning.training import experiment
from sparselearning.training.experiment import Output
from sparselearning.training.opening import open_folder
from sparselearning.training.plan import EpochBudget
from sparselearning.training.run_folder import RunFolder
from sparselearning.training.runtime import Runtime

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


def test_pretraining_alone(tmp_path):
    trainer = prepare(tmp_path, dataclasses.replace(PLAN, cyclic_train=False))
    summary = trainer.run()
    assert [row["phase"] for row in lines(trainer.folder.metrics)] == ["pretrain"] * 2
    assert not trainer.folder.tickets.exists()
    assert summary.final_acc == summary.pretrain_acc
    assert (summary.ticket_acc, summary.gain, summary.gain_over_ticket) == ([], 0, None)
    assert plain(load_torch(trainer.folder.previous)) == plain(load_torch(trainer.folder.current))


def test_a_run_of_cycles_alone_starts_from_the_pretrained_weights(tmp_path):
    first = prepare(tmp_path / "a", dataclasses.replace(PLAN, cyclic_train=False), flags={"part": 1})
    first.run()
    plan = dataclasses.replace(PLAN, pre_train=False)
    second = prepare(tmp_path / "b", plan, resume=first.folder.checkpoint, flags={"part": 2}, keep_tickets=True)
    assert second.masking.steps == 6  # the counter runs on through the cycles
    second.run()
    start = load_torch(second.folder.ticket(0))
    assert plain(start["state_dict"]) == plain(first.model.state_dict())
    assert [row["epoch"] for row in lines(second.folder.metrics)] == [2, 3, 4, 5]
    assert len(lines(second.folder.tickets)) == 2


def test_cycles_alone_continue_pretraining_as_if_it_had_not_ended(tmp_path):
    plan = dataclasses.replace(PLAN, explore_rate=None)  # exploration alone looks at a gradient that is gone
    whole = prepare(tmp_path / "whole", plan)
    whole.run()
    first = prepare(tmp_path / "a", dataclasses.replace(plan, cyclic_train=False), flags={"part": 1})
    first.run()
    second = prepare(
        tmp_path / "b", dataclasses.replace(plan, pre_train=False), resume=first.folder.checkpoint, flags={"part": 2}
    )
    second.run()
    assert plain(whole.model.state_dict()) == plain(second.model.state_dict())
    assert plain(whole.superposition.state) == plain(second.superposition.state)


def test_saved_epoch_of_the_pretrained_network_is_the_same_in_both_ways(tmp_path):
    whole = prepare(tmp_path / "whole", keep_tickets=True)
    whole.run()
    first = prepare(tmp_path / "a", dataclasses.replace(PLAN, cyclic_train=False), flags={"part": 1})
    first.run()
    second = prepare(
        tmp_path / "b", dataclasses.replace(PLAN, pre_train=False), resume=first.folder.path, flags={"part": 2},
        keep_tickets=True,
    )  # fmt: skip
    second.run()
    epochs = [[load_torch(t.folder.ticket(n))["epoch"] for n in range(3)] for t in (whole, second)]
    assert epochs == [[2, 4, 6]] * 2


def test_cycles_from_bare_weights_keep_their_pattern(tmp_path):
    torch.manual_seed(0)
    state = network(0.0).state_dict()
    for name in MASKABLE:
        state[name] = state[name] * (torch.rand_like(state[name]) < 0.3)
    torch.save(state, tmp_path / "weights.pth")
    plan = dataclasses.replace(PLAN, pre_train=False, explore_rate=None, updates_in_cycles=False)
    trainer = prepare(tmp_path / "run", plan, resume=tmp_path / "weights.pth")
    trainer.run()
    for name in MASKABLE:
        assert torch.equal(trainer.masking.masks[name], state[name] != 0)


def test_looking_at_gradients_before_the_first_cycle_is_no_training(tmp_path, monkeypatch):
    """BatchNorm has seen no batch when the first cycle starts, although exploring took one batch's gradients."""
    torch.save(network(0.0).state_dict(), tmp_path / "weights.pth")
    trainer = prepare(tmp_path / "run", dataclasses.replace(PLAN, pre_train=False), resume=tmp_path / "weights.pth")
    counts, explored = [], []
    train_batch, truncate = trainer.train_batch, trainer.masking.truncate_weights
    monkeypatch.setattr(trainer.masking, "truncate_weights", lambda rate: explored.append(rate) or truncate(rate))

    def counted(batch):
        counts.append(int(trainer.model[1].num_batches_tracked))
        train_batch(batch)

    monkeypatch.setattr(trainer, "train_batch", counted)
    trainer.run()
    assert len(explored) == 2
    assert counts == list(range(len(counts)))


@pytest.mark.parametrize("has_norm", [True, False])
def test_re_estimating_batchnorm_costs_something_where_there_is_one(tmp_path, has_norm):
    brought = set_up()
    if not has_norm:
        brought.model[1] = nn.Identity()
    trainer = prepare(tmp_path, brought=brought)
    trainer.run()
    assert [row["bn_flops"] > 0 for row in lines(trainer.folder.tickets)] == [has_norm] * 2


def test_cycles_alone_obey_the_optimizer_flags_of_their_own_command(tmp_path):
    first = prepare(tmp_path / "a", dataclasses.replace(PLAN, cyclic_train=False), flags={"part": 1})
    first.run()
    brought = set_up()
    brought.optimizer.param_groups[0].update(momentum=0.5, weight_decay=0.01)
    second = prepare(
        tmp_path / "b", dataclasses.replace(PLAN, pre_train=False), resume=first.folder.checkpoint, flags={"part": 2},
        brought=brought,
    )  # fmt: skip
    group = second.optimizer.param_groups[0]
    assert (group["momentum"], group["weight_decay"]) == (0.5, 0.01)


@pytest.mark.parametrize("growth", ["gradient", "momentum"])
@pytest.mark.parametrize("growth_before", ["gradient", "momentum"])
def test_cycles_alone_after_another_optimizer(tmp_path, growth_before, growth):
    pretraining = dataclasses.replace(PLAN, cyclic_train=False)
    first = prepare(tmp_path / "a", pretraining, MASKING | {"growth": growth_before}, flags={"optimizer": "sgd"})
    first.run()
    plan, masks = dataclasses.replace(PLAN, pre_train=False), MASKING | {"growth": growth}
    adam = {"resume": first.folder.checkpoint, "flags": {"optimizer": "adam"}, "optimizer": "adam"}
    if growth == "momentum":  # there is none to explore by before the first step
        with pytest.raises(UsageError, match="explores by momentum, and there is none yet"):
            prepare(tmp_path / "b", plan, masks, **adam)
    else:
        second = prepare(tmp_path / "b", plan, masks, **adam)
        second.run()
        assert len(lines(second.folder.tickets)) == 2


def off_the_masks(trainer):
    """How many weights and entries of optimizer state are not zero where they are to be."""
    count = 0
    for name, mask in trainer.masking.masks.items():
        weight = trainer.model.get_parameter(name)
        states = [s for s in trainer.optimizer.state[weight].values() if s.shape == weight.shape]
        count += sum(int(tensor[~mask].count_nonzero()) for tensor in (weight.detach(), *states))
    return count


def zero_after_every_step(trainer, monkeypatch):
    train_batch, steps = trainer.train_batch, []

    def checked(batch):
        train_batch(batch)
        steps.append(off_the_masks(trainer))

    monkeypatch.setattr(trainer, "train_batch", checked)
    trainer.run()
    return len(steps) > 3 and not any(steps)


OTHERS = {"flags": "others"}
FROZEN_CYCLES = dataclasses.replace(PLAN, pre_train=False, explore_rate=None, updates_in_cycles=False)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_cycles_alone_in_another_memory_format(tmp_path, monkeypatch, optimizer, layout):
    other = {torch.contiguous_format: torch.channels_last, torch.channels_last: torch.contiguous_format}[layout]
    pretraining = dataclasses.replace(PLAN, cyclic_train=False)
    first = prepare(tmp_path / "a", pretraining, optimizer=optimizer, memory_format=layout)
    first.run()
    moved = prepare(
        tmp_path / "b",
        FROZEN_CYCLES,
        resume=first.folder.checkpoint,
        flags=OTHERS,
        optimizer=optimizer,
        memory_format=other,
    )
    for weight, state in moved.optimizer.state.items():
        for value in state.values():
            assert value.shape != weight.shape or value.stride() == weight.stride()
    assert zero_after_every_step(moved, monkeypatch)
    stayed = prepare(
        tmp_path / "c", FROZEN_CYCLES, resume=first.folder.checkpoint, flags=OTHERS, optimizer=optimizer,
        memory_format=layout,
    )  # fmt: skip
    stayed.run()
    for name, weight in stayed.model.named_parameters():
        assert torch.allclose(weight, moved.model.get_parameter(name), atol=1e-5)


def test_sparse_cycles_alone_after_dense_training(tmp_path, monkeypatch):
    """Masks are the non-zeros of the weights, of which the momentum that is taken over knows nothing."""
    first = prepare(tmp_path / "a", dataclasses.replace(DENSE, cyclic_train=False), None)
    first.run()
    saved = load_torch(first.folder.checkpoint)
    saved["state_dict"]["0.weight"][2] = 0.0
    torch.save(saved, tmp_path / "thinned.pth")
    trainer = prepare(tmp_path / "b", FROZEN_CYCLES, resume=tmp_path / "thinned.pth", flags=OTHERS)
    assert trainer.masking.active_counts()["0.weight"] <= 108 - 18
    assert zero_after_every_step(trainer, monkeypatch)


def test_a_run_names_every_code_and_machine_that_it_ran_on(tmp_path):
    def run(commit, at=None):
        here = {"config": {"commit": commit, "device": "cpu", "lr": 0.1}, "resume": tmp_path if at is None else None}
        folder = here.pop("resume")
        with pytest.raises(Stopped) if at else contextlib.nullcontext():
            output = Output(RunFolder(tmp_path), identity={"f": 1}, resume=folder, **here)
            trainer = experiment.prepare(set_up(), PLAN, sparse(), Runtime(amp="off"), output, Signals(at))
            with contextlib.ExitStack() as held:
                start = experiment.start_of(PLAN, sparse(), output)
                open_folder(output.folder, start, output.config, held)
                trainer.run()
        return json.loads((tmp_path / "config.json").read_text())

    run("one", at=9)
    assert "resumed" not in run("one")
    assert run("two")["resumed"] == [{"commit": "two", "device": "cpu"}]
    assert len(run("two")["resumed"]) == 1
    assert [there["commit"] for there in run("three")["resumed"]] == ["two", "three"]
    assert run("three")["commit"] == "one"
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FaultError, match=r"config\.json is damaged"):
        run("three")


def test_no_pretraining_epochs_at_all(tmp_path):
    """A cycle rate of 1: the first superposition is the network that the cycles start from."""
    plan = dataclasses.replace(PLAN, budget=EpochBudget(0, 2, 2))
    trainer = prepare(tmp_path, plan)
    trainer.run()
    assert len(lines(trainer.folder.tickets)) == 2


def test_dense_run_has_tickets_and_no_masks(tmp_path):
    trainer = prepare(tmp_path, DENSE, None)
    summary = trainer.run()
    assert len(summary.ticket_acc) == 2
    assert load_torch(trainer.folder.previous)["masks"] == {}
    assert all(row["density"] > 0.99 for row in lines(trainer.folder.metrics))


def test_the_last_superposition_is_what_a_longer_pruning_window_leaves(tmp_path):
    trainer = prepare(tmp_path, masks=MASKING | {"prune_end_step": 1000})
    trainer.run()
    assert active(trainer.masking.masks) > round(TOTAL * 0.2)
    assert non_zeros(load_torch(trainer.folder.previous)["state_dict"]) == round(TOTAL * 0.2)


def test_a_checkpoint_holds_the_masks_once(tmp_path):
    prepare(tmp_path).checkpoint.save()
    saved = load_torch(tmp_path / "checkpoint.pth")
    for name, mask in saved["masks"].items():
        assert mask.data_ptr() == saved["masking"]["masks"][name].data_ptr()


def test_checkpoints_of_every_epoch_can_be_kept(tmp_path):
    trainer = prepare(tmp_path, keep_checkpoints=True)
    trainer.run()
    saved = [load_torch(trainer.folder.epoch_checkpoint(epoch)) for epoch in range(1, 7)]
    assert [content["epoch"] for content in saved] == [1, 2, 3, 4, 5, 6]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run with the checkpoint of every epoch and all tickets: after epochs 2, 4 and 6."""
    trainer = prepare(tmp_path_factory.mktemp("kept") / "run", keep_checkpoints=True, keep_tickets=True)
    trainer.run()
    return trainer.folder


@pytest.mark.parametrize("place", ["run", "elsewhere"])
@pytest.mark.parametrize(("epoch", "tickets"), [(1, 0), (2, 1), (3, 1), (5, 2), (6, 3)])
def test_a_run_that_goes_back_keeps_the_tickets_until_then(tmp_path, kept, place, epoch, tickets):
    there = RunFolder(shutil.copytree(kept.path, tmp_path / "run"))
    flags = {"flags": "the same"}
    output = Output(RunFolder(tmp_path / place), {}, flags, resume=there.epoch_checkpoint(epoch))
    with contextlib.ExitStack() as held:
        open_folder(output.folder, experiment.start_of(PLAN, sparse(), output), {}, held)
    found = {path.name: path.read_bytes() for path in output.folder.path.glob("tickets/*")}
    assert found == {kept.ticket(number).name: kept.ticket(number).read_bytes() for number in range(tickets)}
