"""The run itself: plan, tickets, superposition, stopping at any point, faults. A network of a few hundred weights."""

import contextlib
import copy
import dataclasses
import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparselearning.process.errors import FaultError, UsageError
from sparselearning.process.files import load_torch
from sparselearning.process.signals import Stopped, stop_signals
from sparselearning.sparse.superpose import AVERAGING
from sparselearning.training import experiment
from sparselearning.training.data import Batch
from sparselearning.training.engine import Sources, Trainer
from sparselearning.training.experiment import Output, Recipe, SparseTraining
from sparselearning.training.plan import EpochBudget, Plan
from sparselearning.training.progress import run_table
from sparselearning.training.run_folder import RunFolder
from sparselearning.training.runtime import Runtime


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# ------------------------------------------------------------------------------- a network and data to run it on


class Batches:
    """Batches that depend on (epoch, batch) alone; the last one is smaller. Counts the passes made over it."""

    def __init__(self, samples, batch_size, *, shuffled=False, seed=0, poison=None):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(samples) % 3
        self.images = torch.randn(samples, 2, 5, 5, generator=generator) + self.labels.view(-1, 1, 1, 1) * 0.5
        self.num_samples, self.batch_size, self.shuffled, self.poison = samples, batch_size, shuffled, poison
        self.passes = 0

    def __len__(self):
        return math.ceil(self.num_samples / self.batch_size)

    def epoch(self, epoch, start=0):
        self.passes += 1
        order = torch.arange(self.num_samples)
        if self.shuffled:
            order = torch.randperm(self.num_samples, generator=torch.Generator().manual_seed(epoch))
        for batch in range(start, len(self)):
            mine = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            images = self.images[mine]
            if self.poison == (epoch, batch):
                images = images * torch.nan
            yield Batch(images, self.labels[mine])


def network(dropout):
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(54, 10),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(10, 3),
    )


MASKABLE = {"0.weight": 108, "5.weight": 540, "8.weight": 30}
TOTAL = sum(MASKABLE.values())

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4, fused=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, fused=True),
}

# Pre-training of 2 epochs, then 2 cycles of 2, all of the method switched on.
PLAN = Plan(
    budget=EpochBudget(pretrain_epochs=2, cycle_epochs=2, tickets=2),
    pretrain_lr=lambda epoch: 0.05,
    averaging=AVERAGING["CIMA"](0.5),
    cycle_lr=(0.01, 0.1),
    explore_rate=0.4,
    update_bn=True,
    final_density=0.2,
)
DENSE = dataclasses.replace(PLAN, explore_rate=None, final_density=None)

MASKING = {
    "method": "GraNet",
    "growth": "gradient",
    "prune_rate": 0.3,
    "decay_schedule": "cosine",
    "update_frequency": 2,
    "init_density": 0.5,
    "final_density": 0.2,
    "prune_start_step": 0,
    "prune_end_step": 6,
    "total_steps": 18,
    "seed": 3,
}


def sparse(frozen=False, sparse_init="ERK", **changes):
    return SparseTraining(masking=MASKING | changes, frozen=frozen, sparse_init=sparse_init)


class Signals:
    """Asks for a stop at one of the points where the trainer looks for signals, and counts them."""

    def __init__(self, at=None, number=signal.SIGTERM):
        self.looks, self.at, self.number = 0, at, number

    def __call__(self):
        self.looks += 1
        return int(self.number) if self.looks == self.at else 0


def recipe(dropout=0.0, optimizer="sgd", train=None, test=None, memory_format=torch.contiguous_format):
    model = network(dropout).to(memory_format=memory_format)
    train = train or Batches(20, 8, shuffled=True)
    return Recipe(
        model=model,
        optimizer=OPTIMIZERS[optimizer](model.parameters()),
        sources=Sources(train=train, train_once=train, evaluation=Batches(13, 8, seed=1), test=test),
        sample_shape=(2, 5, 5),
        class_balanced_batch=lambda: next(Batches(9, 9).epoch(0)),
    )


def prepare(
    folder, plan=PLAN, masks=MASKING, signals=None, *, resume=None, flags=None, brought=None, amp="off", **options
):
    """A trainer in ``folder``; ``masks`` are the arguments of a Masking, a SparseTraining, or None for dense."""
    torch.manual_seed(1 if resume is None else 999)  # what resuming does not bring back would show
    masks = sparse(**masks) if isinstance(masks, dict) else masks
    output = Output(RunFolder(folder), config={}, identity=flags or {"flags": "the same"}, resume=resume)
    output = dataclasses.replace(output, **{k: options.pop(k) for k in list(options) if hasattr(output, k)})
    signals = signals or Signals()
    return experiment.prepare(brought or recipe(**options), plan, masks, Runtime(amp=amp), output, signals)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else None


def without_times(row):
    return {k: v for k, v in row.items() if k not in ("seconds", "images_per_second", "total_seconds")}


def plain(value):
    """Nested containers with tensors as (dtype, values), so that == compares to the bit (and NaN to nothing)."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.tolist()
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def result(trainer, summary):
    """All that a run ends with, in memory and on disk, but for the times."""
    folder = trainer.folder
    return {
        "weights": plain(trainer.model.state_dict()),
        "optimizer": plain(trainer.optimizer.state_dict()["state"]),
        "masking": plain(trainer.masking.state_dict()) if trainer.masking else None,
        "superposition": plain(trainer.superposition),
        "superposition masks": plain(trainer.superposition_masks),
        "metrics": [without_times(row) for row in lines(folder.metrics)],
        "tickets": [without_times(row) for row in lines(folder.tickets) or []],
        "summary": without_times(summary.as_dict()),
        "current": plain(load_torch(folder.current)),
        "previous": plain(load_torch(folder.previous)),
    }


def differing(one, other):
    return [name for name in one if one[name] != other[name]]


# --------------------------------------------------------------------------------------------------- the plan


def test_plan_by_hand():
    plan = Plan(EpochBudget(3, 2, 2), lambda epoch: 1.0 / (epoch + 1), lambda n: 0.5, cycle_lr=(1.0, 3.0))
    epochs = range(plan.first_epoch, plan.end_epoch)
    assert list(epochs) == [0, 1, 2, 3, 4, 5, 6]
    assert [plan.is_cycle(e) for e in epochs] == [False] * 3 + [True] * 4
    assert [plan.ticket(e) for e in epochs] == [None, None, None, 1, 1, 2, 2]
    assert [e for e in epochs if plan.starts_cycle(e)] == [3, 5]
    assert [e for e in epochs if plan.ends_cycle(e)] == [4, 6]
    assert not plan.starts_cycle(7)  # nothing is opened after the last ticket
    assert [plan.lr(e, 1, 4) for e in (0, 1, 2)] == [1, 1 / 2, 1 / 3]
    # 2 epochs of 4 batches: t = 0, 1/8, … 7/8; lr_1 at both ends, lr_2 in the middle
    rates = [plan.lr(e, b, 4) for e in (3, 4) for b in range(4)]
    assert rates == pytest.approx([1, 1.5, 2, 2.5, 3, 2.5, 2, 1.5])
    assert [plan.lr(e, b, 4) for e in (5, 6) for b in range(4)] == rates


def test_plan_without_cyclic_rate_keeps_the_last_rate_of_pretraining():
    plan = Plan(EpochBudget(3, 2, 2), lambda epoch: 1.0 / (epoch + 1), lambda n: 0.5)
    assert {plan.lr(e, b, 4) for e in (3, 4, 5, 6) for b in range(4)} == {1 / 3}


@pytest.mark.parametrize(("parts", "epochs"), [((1, 1), (0, 7)), ((1, 0), (0, 3)), ((0, 1), (3, 7))])
def test_plan_of_one_part(parts, epochs):
    plan = Plan(EpochBudget(3, 2, 2), lambda e: 0.1, lambda n: 0.5, pre_train=parts[0], cyclic_train=parts[1])
    assert (plan.first_epoch, plan.end_epoch) == epochs


# ---------------------------------------------------------------------------------- what a run does, and in what order


def record_steps(trainer):
    """Before each step: the rate. After each step: its number, the weights, the active counts."""
    seen = []
    step = trainer.train_batch

    def train_batch(batch):
        before = copy.deepcopy(trainer.model.state_dict())
        rate = trainer.optimizer.param_groups[0]["lr"]
        position = trainer.epoch, trainer.batch
        step(batch)
        masks = {k: m.clone() for k, m in trainer.masking.masks.items()} if trainer.masking else {}
        seen.append((position, rate, before, copy.deepcopy(trainer.model.state_dict()), masks))

    trainer.train_batch = train_batch
    return seen


def test_learning_rate_of_every_batch_and_in_the_metrics(tmp_path):
    trainer = prepare(tmp_path)
    seen = record_steps(trainer)
    trainer.run()
    assert [position for position, *_ in seen] == [(e, b) for e in range(6) for b in range(3)]
    cycle = [0.01, 0.04, 0.07, 0.1, 0.07, 0.04]  # t = 0, 1/6, … 5/6
    assert [rate for _, rate, *_ in seen] == pytest.approx([0.05] * 6 + cycle * 2)
    assert [row["lr"] for row in lines(trainer.folder.metrics)] == pytest.approx(
        [0.05, 0.05] + [0.07, 0.04] * 2  # of the epoch's last batch
    )


def test_files_and_their_fields(tmp_path):
    trainer = prepare(tmp_path)
    summary = trainer.run()
    assert {path.name for path in tmp_path.iterdir()} == {
        "metrics.jsonl", "tickets.jsonl", "checkpoint.pth", "model_current.pth", "model_previous.pth",
    }  # fmt: skip
    rows, tickets = lines(trainer.folder.metrics), lines(trainer.folder.tickets)
    assert [row["epoch"] for row in rows] == list(range(6))
    assert [row["phase"] for row in rows] == ["pretrain"] * 2 + ["cycle"] * 4
    assert [row["ticket"] for row in rows] == [None, None, 1, 1, 2, 2]
    assert {
        "phase", "epoch", "ticket", "lr", "train_loss", "train_acc", "eval_loss", "eval_acc", "density", "seconds",
        "images_per_second",
    } <= rows[0].keys()  # fmt: skip
    assert {
        "ticket", "ticket_acc", "superposed_acc", "factor", "union_density", "density", "seconds",
    } <= tickets[0].keys()  # fmt: skip
    assert [row["ticket"] for row in tickets] == [1, 2]
    assert [row["ticket_acc"] for row in tickets] == [rows[3]["eval_acc"], rows[5]["eval_acc"]]
    assert {
        "pretrain_acc", "ticket_acc", "superposed_acc", "final_acc", "density", "gain", "gain_over_ticket",
        "images_per_second", "total_seconds",
    } <= summary.as_dict().keys()  # fmt: skip
    assert summary.pretrain_acc == rows[1]["eval_acc"]
    assert summary.ticket_acc == [row["ticket_acc"] for row in tickets]
    assert summary.superposed_acc == [row["superposed_acc"] for row in tickets]
    assert summary.final_acc == tickets[1]["superposed_acc"]
    assert summary.gain == pytest.approx(100 * (summary.final_acc - summary.pretrain_acc))
    assert summary.gain_over_ticket == pytest.approx(100 * (summary.final_acc - tickets[1]["ticket_acc"]))
    assert all(set(load_torch(path)) == {"state_dict", "masks", "epoch"} for path in tmp_path.glob("model_*.pth"))


def test_losses_and_accuracies_are_means_over_samples(tmp_path):
    # With a learning rate of zero the network stays as it is, so that all figures can be had at once.
    plan = dataclasses.replace(DENSE, pretrain_lr=lambda e: 0.0, budget=EpochBudget(1, 1, 0))
    trainer = prepare(tmp_path, plan, None)
    trainer.run()
    (row,) = lines(trainer.folder.metrics)
    evaluation = trainer.sources.evaluation  # batches of 8 and 5
    with torch.no_grad():
        logits = trainer.model.eval()(evaluation.images)
        assert row["eval_loss"] == pytest.approx(F.cross_entropy(logits, evaluation.labels).item(), rel=1e-6)
        assert row["eval_acc"] == pytest.approx((logits.argmax(1) == evaluation.labels).float().mean().item())
        trainer.model.train()
        outs = [(trainer.model(b.images), b.labels) for b in trainer.sources.train.epoch(0)]  # 8, 8 and 4
    losses = torch.cat([F.cross_entropy(x, y, reduction="none") for x, y in outs])
    hits = torch.cat([x.argmax(1) == y for x, y in outs])
    assert row["train_loss"] == pytest.approx(losses.mean().item(), rel=1e-6)
    assert row["train_acc"] == pytest.approx(hits.float().mean().item())


def non_zeros(state):
    return sum(int(torch.count_nonzero(state[name])) for name in MASKABLE)


def test_densities_are_exact_shares_of_non_zeros(tmp_path):
    trainer = prepare(tmp_path, keep_tickets=True)
    seen = record_steps(trainer)
    summary = trainer.run()
    ends = [after for (_, batch), _, _, after, _ in seen if batch == 2]
    assert [row["density"] for row in lines(trainer.folder.metrics)] == [non_zeros(end) / TOTAL for end in ends]
    budget = round(TOTAL * 0.2)
    assert budget == 136
    for row in lines(trainer.folder.tickets):
        assert row["density"] == budget / TOTAL
        assert row["union_density"] > row["density"]
    saved = load_torch(trainer.folder.previous)
    assert non_zeros(saved["state_dict"]) == budget == sum(int(m.sum()) for m in saved["masks"].values())
    assert summary.density == budget / TOTAL


# ------------------------------------------------------------------------------------- tickets and superpositions


def prune_by_sorting(state, budget):
    """The budget's largest weights over all maskable ones, by one plain sort."""
    flat = torch.cat([state[name].flatten() for name in MASKABLE])
    kept = torch.zeros_like(flat)
    best = flat.abs().argsort(descending=True)[:budget]
    kept[best] = flat[best]
    parts = kept.split(list(MASKABLE.values()))
    return state | {name: part.view_as(state[name]) for name, part in zip(MASKABLE, parts, strict=True)}


def mixed(previous, ticket, factor):
    return {
        name: ((1 - factor) * previous[name].double() + factor * t.double()).float() if t.is_floating_point() else t
        for name, t in ticket.items()
    }


def ticket_states(folder, count):
    return [load_torch(folder.ticket(number))["state_dict"] for number in range(count + 1)]


@pytest.mark.parametrize("update_bn", [False, True])
@pytest.mark.parametrize(("method", "factors"), [("CIMA", [0.3, 0.3]), ("CAA", [1 / 2, 1 / 3])])
def test_superpositions_follow_the_rule(tmp_path, method, factors, update_bn):
    plan = dataclasses.replace(PLAN, averaging=AVERAGING[method](0.3), update_bn=update_bn)
    trainer = prepare(tmp_path, plan, keep_tickets=True)
    trainer.run()
    assert [row["factor"] for row in lines(trainer.folder.tickets)] == pytest.approx(factors)
    state, *tickets = ticket_states(trainer.folder, 2)
    model = network(0.0)
    for number, (ticket, factor) in enumerate(zip(tickets, factors, strict=True), start=1):
        union = mixed(state, ticket, factor)
        assert lines(trainer.folder.tickets)[number - 1]["union_density"] == non_zeros(union) / TOTAL
        state = prune_by_sorting(union, round(TOTAL * 0.2))
        if update_bn:
            model.load_state_dict(state)
            batches = [b.images for b in trainer.sources.train.epoch(2 * number + 1)]  # the cycle's last epoch
            torch.optim.swa_utils.update_bn(batches, model)
            state = copy.deepcopy(model.state_dict())
    final = load_torch(trainer.folder.previous)
    for name, expected in state.items():
        torch.testing.assert_close(final["state_dict"][name], expected, rtol=1e-6, atol=1e-7, msg=name)
    for name, mask in final["masks"].items():
        assert torch.equal(mask, state[name] != 0)


GREEDY = dataclasses.replace(PLAN, averaging=AVERAGING["greedy"](0.5))


@pytest.mark.parametrize("update_bn", [False, True])
def test_a_greedy_superposition_is_the_best_of_all_factors(tmp_path, update_bn):
    trainer = prepare(tmp_path, dataclasses.replace(GREEDY, update_bn=update_bn), keep_tickets=True)
    trainer.run()
    state, *tickets = ticket_states(trainer.folder, 2)
    evaluation, model, chosen = trainer.sources.evaluation, network(0.0), []
    for number, ticket in enumerate(tickets, start=1):
        tried = []
        for factor in (0, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95):
            model.load_state_dict(prune_by_sorting(mixed(state, ticket, factor), round(TOTAL * 0.2)))
            if update_bn:
                batches = [b.images for b in trainer.sources.train.epoch(2 * number + 1)]
                torch.optim.swa_utils.update_bn(batches, model)
            with torch.no_grad():
                hits = (model.eval()(evaluation.images).argmax(1) == evaluation.labels).sum().item()
            tried.append((hits / len(evaluation.labels), -factor, copy.deepcopy(model.state_dict())))
        accuracy, minus_factor, state = max(tried, key=lambda made: made[:2])
        chosen.append(-minus_factor)
        row = lines(trainer.folder.tickets)[number - 1]
        assert (row["factor"], row["superposed_acc"]) == (-minus_factor, accuracy)
        assert row["density"] <= round(TOTAL * 0.2) / TOTAL
    assert any(chosen), "a case in which leaving all tickets out is not the best"
    final = load_torch(trainer.folder.previous)
    for name, mask in final["masks"].items():
        assert torch.equal(mask, state[name] != 0)
        torch.testing.assert_close(final["state_dict"][name], state[name], rtol=1e-6, atol=1e-7, msg=name)


def test_a_greedy_superposition_leaves_a_ticket_out_that_changes_nothing(tmp_path):
    plan = dataclasses.replace(GREEDY, pretrain_lr=lambda epoch: 0.0, cycle_lr=None, explore_rate=None)
    trainer = prepare(tmp_path, plan, None)
    trainer.run()
    assert [row["factor"] for row in lines(trainer.folder.tickets)] == [0, 0]


def test_every_factor_that_a_greedy_superposition_tries_costs_a_bn_pass(tmp_path):
    spent = []
    for plan in (PLAN, GREEDY):
        trainer = prepare(tmp_path / str(len(spent)), dataclasses.replace(plan, final_density=None))
        trainer.run()
        spent.append(lines(trainer.folder.tickets)[0]["bn_flops"])
    # Without pruning all unions are as dense as the one with CIMA, but for that without the ticket, S itself.
    assert 7 * spent[0] < spent[1] < 8 * spent[0]


def test_a_greedy_run_stopped_among_its_factors_equals_one_without_stops(tmp_path):
    plan = dataclasses.replace(GREEDY, budget=EpochBudget(1, 1, 1))
    counter = Signals()
    trainer = prepare(tmp_path / "whole", plan, signals=counter, dropout=0.4)
    whole = result(trainer, trainer.run())
    for at in (counter.looks - 30, counter.looks - 3):
        folder = tmp_path / str(at)
        with pytest.raises(Stopped):
            prepare(folder, plan, signals=Signals(at), dropout=0.4).run()
        resumed = prepare(folder, plan, resume=folder, dropout=0.4)
        assert resumed.trained
        assert not differing(whole, result(resumed, resumed.run()))


@pytest.mark.parametrize("method", ["CIMA", "CAA"])
def test_one_cycle_without_pruning_is_the_plain_mixture(tmp_path, method):
    plan = dataclasses.replace(DENSE, budget=EpochBudget(1, 2, 1), averaging=AVERAGING[method](0.5), update_bn=False)
    trainer = prepare(tmp_path, plan, None, keep_tickets=True)
    trainer.run()
    pretrained, ticket = ticket_states(trainer.folder, 1)
    for name, entry in load_torch(trainer.folder.previous)["state_dict"].items():
        expected = (pretrained[name] + ticket[name]) / 2 if entry.is_floating_point() else ticket[name]
        torch.testing.assert_close(entry, expected, rtol=1e-6, atol=1e-8, msg=name)


def test_caa_without_pruning_is_the_mean_of_all_members(tmp_path):
    plan = dataclasses.replace(DENSE, budget=EpochBudget(1, 1, 3), averaging=AVERAGING["CAA"](0.9), update_bn=False)
    trainer = prepare(tmp_path, plan, None, keep_tickets=True)
    trainer.run()
    members = ticket_states(trainer.folder, 3)
    for name, entry in load_torch(trainer.folder.previous)["state_dict"].items():
        if entry.is_floating_point():
            expected = torch.stack([member[name].double() for member in members]).mean(0).float()
            torch.testing.assert_close(entry, expected, rtol=1e-5, atol=1e-7, msg=name)


def test_reported_accuracies_are_those_of_the_saved_networks(tmp_path):
    trainer = prepare(tmp_path, keep_tickets=True)
    summary = trainer.run()
    evaluation = trainer.sources.evaluation

    def accuracy(state):
        model = network(0.0).eval()
        model.load_state_dict(state)
        with torch.no_grad():
            return (model(evaluation.images).argmax(1) == evaluation.labels).double().mean().item()

    pretrained, *tickets = ticket_states(trainer.folder, 2)
    assert summary.pretrain_acc == accuracy(pretrained)
    assert summary.ticket_acc == [accuracy(ticket) for ticket in tickets]
    assert summary.final_acc == accuracy(load_torch(trainer.folder.previous)["state_dict"])
    assert trainer.evaluate_superposition(evaluation)[1] == summary.final_acc


@pytest.mark.parametrize("explore_rate", [None, 0.4])
def test_training_goes_on_from_the_ticket(tmp_path, explore_rate):
    trainer = prepare(tmp_path, dataclasses.replace(PLAN, explore_rate=explore_rate), keep_tickets=True)
    parameters = list(trainer.model.parameters())
    seen = record_steps(trainer)
    trainer.run()
    held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert all(a is b for a, b in zip(parameters, trainer.model.parameters(), strict=True))
    assert all(a is b for a, b in zip(parameters, held, strict=True))
    before_cycle_2 = next(before for position, _, before, _, _ in seen if position == (4, 0))
    after_first_step = next(after for position, _, _, after, _ in seen if position == (4, 0))
    ticket = ticket_states(trainer.folder, 2)[1]
    for name, entry in ticket.items():
        if name in MASKABLE and explore_rate is not None:
            kept = before_cycle_2[name] != 0
            assert torch.equal(before_cycle_2[name][kept], entry[kept])  # exploration moves masks, not values
        else:
            assert torch.equal(before_cycle_2[name], entry), name
    assert any(not torch.equal(after_first_step[name], before_cycle_2[name]) for name in MASKABLE)
    assert plain(load_torch(trainer.folder.current)["state_dict"]) == plain(trainer.model.state_dict())


def test_masked_weights_and_momentum_are_zero_after_every_step(tmp_path):
    for optimizer in OPTIMIZERS:
        trainer = prepare(tmp_path / optimizer, optimizer=optimizer, masks=MASKING | {"growth": "random"})
        step = trainer.train_batch

        def train_batch(batch, trainer=trainer, step=step):
            step(batch)
            for name, weight in trainer.model.named_parameters():
                if name in MASKABLE:
                    for state in [weight, *trainer.optimizer.state[weight].values()]:
                        if state.shape == weight.shape:
                            assert not state[~trainer.masking.masks[name]].any()

        trainer.train_batch = train_batch
        trainer.run()


# ----------------------------------------------------------------------------------------- topology over the run


def active(masks):
    return sum(int(mask.sum()) for mask in masks.values())


def test_exploration_opens_every_cycle_and_only_cycles(tmp_path, monkeypatch):
    trainer = prepare(tmp_path, masks=MASKING | {"method": "DST", "update_frequency": 1000})
    seen = record_steps(trainer)
    trainer.run()
    masks = [m for *_, m in seen]
    moved = [i for i in range(1, len(masks)) if any(not torch.equal(masks[i][k], masks[i - 1][k]) for k in MASKABLE)]
    assert moved == [6, 12]  # first steps of the cycles
    for i in moved:
        last, ticket = masks[i - 1], seen[i - 1][3]
        for name in MASKABLE:
            n = int(last[name].sum())
            assert int(masks[i][name].sum()) == n
            magnitudes = ticket[name][last[name]].abs().sort().values
            removed = math.ceil(0.4 * n)
            kept = last[name] & (ticket[name].abs() > magnitudes[removed - 1])
            assert (masks[i][name] | ~kept).all()  # all but the smallest 40 % stay


@pytest.mark.parametrize("updates", [False, True])
def test_no_mask_updates_in_cycles(tmp_path, updates):
    plan = dataclasses.replace(PLAN, explore_rate=None, updates_in_cycles=updates)
    trainer = prepare(tmp_path, plan, MASKING | {"method": "DST"})
    seen = record_steps(trainer)
    trainer.run()
    masks = [m for *_, m in seen]
    moved = [i for i in range(1, 18) if any(not torch.equal(masks[i][k], masks[i - 1][k]) for k in MASKABLE)]
    # steps 2, 4, 6, … have indices 1, 3, 5, …; the cycles start at index 6
    assert set(moved) <= {1, 3, 5, 7, 9, 11, 13, 15, 17}
    assert {1, 3} <= set(moved)
    assert any(i >= 6 for i in moved) == updates


def test_dense_gradients_are_charged_until_prune_and_grow_ends(tmp_path):
    spent = []
    for end in (None, 3, 0):  # an epoch has three steps
        masks = MASKING | {"method": "DST", "growth": "gradient", "prune_end_step": None, "final_update_step": end}
        trainer = prepare(tmp_path / str(end), masks=masks)
        trainer.run()
        spent.append([row["training_flops"] for row in lines(trainer.folder.metrics)[:2]])
    without_end, one_epoch, never = spent
    assert one_epoch[0] == without_end[0] > never[0]
    assert one_epoch[1] < without_end[1]
    assert never[0] == never[1], "as static training"


def test_fixed_topology_stays(tmp_path):
    plan = dataclasses.replace(PLAN, explore_rate=None)
    trainer = prepare(tmp_path, plan, sparse(frozen=True, init_density=0.3))
    first = {name: mask.clone() for name, mask in trainer.masking.masks.items()}
    trainer.run()
    assert active(first) == round(TOTAL * 0.3)
    assert all(torch.equal(first[name], mask) for name, mask in trainer.masking.masks.items())
    assert trainer.masking.explored() == trainer.masking.density()


def test_granet_follows_its_schedule_to_the_unit(tmp_path):
    trainer = prepare(tmp_path, masks=MASKING | {"prune_end_step": 10})
    seen = record_steps(trainer)
    trainer.run()
    for i, (*_, masks) in enumerate(seen):
        updated = i // 2 * 2 + (i % 2) + 1 if i % 2 else i  # the last step at which an update took place
        share = min(1, updated / 10)
        density = 0.2 + 0.3 * (1 - share) ** 3 if updated < 10 else 0.2
        assert active(masks) == round(TOTAL * (density if updated else 0.5)), i


# --------------------------------------------------------------------------------------------- parts of the method


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
    assert plain(whole.superposition) == plain(second.superposition)


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
    brought = recipe()
    if not has_norm:
        brought.model[1] = nn.Identity()
    trainer = prepare(tmp_path, brought=brought)
    trainer.run()
    assert [row["bn_flops"] > 0 for row in lines(trainer.folder.tickets)] == [has_norm] * 2


def test_cycles_alone_obey_the_optimizer_flags_of_their_own_command(tmp_path):
    first = prepare(tmp_path / "a", dataclasses.replace(PLAN, cyclic_train=False), flags={"part": 1})
    first.run()
    brought = recipe()
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
    second = prepare(
        tmp_path / "b", plan, masks, resume=first.folder.checkpoint, flags={"optimizer": "adam"}, optimizer="adam"
    )
    if growth == "momentum":  # there is none to explore by before the first step
        with pytest.raises(UsageError, match="before the first optimizer step"):
            second.run()
    else:
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
            trainer = experiment.prepare(recipe(), PLAN, sparse(), Runtime(amp="off"), output, Signals(at))
            with contextlib.ExitStack() as held:
                experiment._open_folder(output, trainer, held)
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
    prepare(tmp_path).save_checkpoint()
    saved = load_torch(tmp_path / "checkpoint.pth")
    for name, mask in saved["masks"].items():
        assert mask.data_ptr() == saved["masking"]["masks"][name].data_ptr()


def test_checkpoints_of_every_epoch_can_be_kept(tmp_path):
    trainer = prepare(tmp_path, keep_checkpoints=True)
    trainer.run()
    saved = [load_torch(trainer.folder.epoch_checkpoint(epoch)) for epoch in range(1, 7)]
    assert [content["epoch"] for content in saved] == [1, 2, 3, 4, 5, 6]


# --------------------------------------------------------------------------------------------- the test set


def test_the_test_set_is_touched_once_at_the_end(tmp_path, capsys):
    test = Batches(7, 4, seed=2)
    brought = recipe(test=test)
    folder = RunFolder(tmp_path / "run")
    touched_before = []
    evaluate = Trainer.evaluate_superposition
    try:
        Trainer.evaluate_superposition = lambda self, source: (
            touched_before.append((test.passes, len(self.tickets))) or evaluate(self, source)
        )
        summary = experiment.run(brought, PLAN, sparse(), Runtime(amp="off"), Output(folder, {}))
    finally:
        Trainer.evaluate_superposition = evaluate
    assert test.passes == 1
    assert touched_before == [(0, 2)]
    model = network(0.0).eval()
    model.load_state_dict(load_torch(folder.previous)["state_dict"])
    with torch.no_grad():
        expected = (model(test.images).argmax(1) == test.labels).double().mean().item()
    assert summary.test_acc == expected == json.loads(folder.summary.read_text())["test_acc"]
    assert "on the test set" in capsys.readouterr().out


@pytest.mark.parametrize(("plan", "masks"), [(PLAN, MASKING), (DENSE, None)], ids=["sparse", "dense"])
def test_the_moving_average_is_pruned_and_measured_as_the_result_is(tmp_path, plan, masks, capsys):
    decay, test, kept = 0.8, Batches(17, 8, seed=2), []
    trainer = prepare(tmp_path / "run", dataclasses.replace(plan, ema_decay=decay), masks, test=test)
    train_batch = trainer.train_batch

    def keep_weights(batch):
        train_batch(batch)
        kept.append({name: entry.double().clone() for name, entry in trainer.model.state_dict().items()})

    trainer.train_batch = keep_weights
    summary = trainer.run()
    average = kept[0]
    for state in kept[1:]:
        average = {name: decay * average[name] + (1 - decay) * entry for name, entry in state.items()}
    average = {name: entry.float() for name, entry in average.items()}
    model = network(0.0)
    model.load_state_dict(prune_by_sorting(average, round(TOTAL * 0.2)) if masks else average)
    torch.optim.swa_utils.update_bn([b.images for b in trainer.sources.train.epoch(6)], model)
    for found, images in ((summary.ema_acc, trainer.sources.evaluation), (summary.ema_test_acc, test)):
        with torch.no_grad():
            hits = (model.eval()(images.images).argmax(1) == images.labels).sum().item()
        assert found == hits / len(images.labels)
    for name, entry in trainer.average.average.items():
        if "running" not in name:
            torch.testing.assert_close(entry, average[name], rtol=1e-5, atol=1e-6)
    print(run_table(summary, tmp_path))
    assert f"moving average{summary.ema_acc:18.2%}" in capsys.readouterr().out


def test_training_with_a_moving_average_is_training_without_it(tmp_path):
    results = []
    for decay in (None, 0.9):
        trainer = prepare(tmp_path / str(decay), dataclasses.replace(PLAN, ema_decay=decay), dropout=0.4)
        results.append(result(trainer, trainer.run()))
    results[1]["summary"].pop("ema_acc")
    assert not differing(*results)


def test_a_stop_while_the_moving_average_is_measured_changes_nothing(tmp_path):
    plan = dataclasses.replace(PLAN, budget=EpochBudget(1, 1, 0), ema_decay=0.8)
    counter = Signals()
    trainer = prepare(tmp_path / "whole", plan, signals=counter, dropout=0.4)
    whole = result(trainer, trainer.run())
    for at in range(counter.looks - 4, counter.looks + 1):
        folder = tmp_path / str(at)
        with pytest.raises(Stopped):
            prepare(folder, plan, signals=Signals(at), dropout=0.4).run()
        resumed = prepare(folder, plan, resume=folder, dropout=0.4)
        assert resumed.epoch == 1
        assert not differing(whole, result(resumed, resumed.run()))


# ------------------------------------------------------------------------------------------- stopping and resuming


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
    # are longer than what has to be done in one go, and stop at different places.
    for every in (10, 11, 13):
        different = differing(whole, result(*run_with_stops(tmp_path / str(every), every, **settings)))
        assert not different, f"stopped every {every}"


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("explore_rate", [None, 0.4])
def test_a_stop_at_any_point_changes_nothing(tmp_path, dropout, explore_rate):
    """Within an epoch, after its last batch, while evaluating, while re-estimating BatchNorm; in every epoch."""
    plan = dataclasses.replace(PLAN, budget=EpochBudget(1, 1, 2), explore_rate=explore_rate)
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
        place = f"look {at}, epoch {resumed.epoch}, batch {resumed.batch}, batches done: {resumed.trained}"
        if different := differing(whole, result(resumed, resumed.run())):
            wrong[place] = different
    assert not wrong, "\n".join(f"{place}: {what}" for place, what in wrong.items())


def test_cycles_alone_resume_as_well(tmp_path):
    first = prepare(tmp_path / "pretrained", dataclasses.replace(PLAN, cyclic_train=False), flags={"part": 1})
    first.run()
    plan = dataclasses.replace(PLAN, pre_train=False, budget=EpochBudget(2, 1, 2))
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
    assert again.epoch == again.plan.end_epoch
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
    brought = recipe(test=Batches(7, 4, seed=2) if with_test_set else None)
    folder = RunFolder(tmp_path / "run")
    try:
        experiment.run(brought, PLAN, sparse(), Runtime(amp="off"), Output(folder, {}))
    except Stopped as stop:
        assert stop.exit_code == 143  # noqa: PT017  both outcomes are right, a crash is not
    else:
        assert folder.summary.exists()
    assert load_torch(folder.checkpoint)["epoch"] == 6


# ----------------------------------------------------------------------------------------------- wrong checkpoints


def tree(folder):
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


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
    save = trainer.save_checkpoint

    def save_checkpoint():
        save()
        kept["bytes"] = trainer.folder.checkpoint.read_bytes()

    trainer.save_checkpoint = save_checkpoint
    with pytest.raises(FaultError, match=f"epoch {epoch}, step {batch}") as fault:
        trainer.run()
    assert len(lines(trainer.folder.metrics) or []) == epoch
    assert len(lines(trainer.folder.tickets) or []) == 0
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
        if (trainer.epoch, trainer.batch) == (epoch, 2):
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
    save = trainer.save_checkpoint

    def save_checkpoint():
        save()
        trainer.folder.checkpoint.with_name("checkpoint.pth.partial").symlink_to("/dev/full")

    trainer.save_checkpoint = save_checkpoint
    with pytest.raises(FaultError, match="No space left"):
        trainer.run()
    whole = prepare(tmp_path / "whole")
    expected = result(whole, whole.run())
    resumed = prepare(tmp_path, resume=tmp_path)
    different = differing(expected, result(resumed, resumed.run()))
    assert not different
