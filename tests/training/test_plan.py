"""The plan of a run: which epoch does what, at which learning rate."""

import pytest

from sparselearning.training.plan import EpochBudget, Plan


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


@pytest.mark.parametrize(("in_cycles", "cyclic_train", "end"), [(True, True, 7), (True, False, 3), (False, True, 3)])
def test_where_topology_updates_end(in_cycles, cyclic_train, end):
    budget = EpochBudget(3, 2, 2)
    plan = Plan(budget, lambda e: 0.1, lambda n: 0.5, cyclic_train=cyclic_train, updates_in_cycles=in_cycles)
    assert plan.updates_end_epoch == end
