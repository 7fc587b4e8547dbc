"""What a run does, in what order, and what it writes; how the topology moves meanwhile."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from helpers.comparing import lines
from helpers.small_runs import DENSE, MASKABLE, MASKING, PLAN, TOTAL, non_zeros, prepare, record_steps, sparse
from helpers.tensors import active
from sparselearning.process.files import load_torch
from sparselearning.training.plan import EpochBudget

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

# ---------------------------------------------------------------------------------- what a run does, and in what order


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


# ----------------------------------------------------------------------------------------- topology over the run


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
