"""Schedules against tables that were worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparselearning import cyclic_lr, gradual_density
from sparselearning.sparse.schedules import DECAYS, UpdateSchedule, milestone_lr
from sparselearning.training.plan import EpochBudget

# d_final + (d_init - d_final) · (1 - done)³ from 0.5 to 0.1 over steps 10 to 30: 0.1 + 0.4 · (1, 27/64, 1/8, 1/64, 0)
GRADUAL = [(0, 0.5), (9, 0.5), (10, 0.5), (15, 0.26875), (20, 0.15), (25, 0.10625), (30, 0.1), (31, 0.1), (10**9, 0.1)]


@pytest.mark.parametrize(("step", "density"), GRADUAL)
def test_gradual_density_by_hand(step, density):
    assert gradual_density(step, 10, 30, 0.5, 0.1) == pytest.approx(density, abs=1e-12)


@pytest.mark.parametrize("final", [0.05, 0.1, 1 / 3, 0.7])
@pytest.mark.parametrize("end", [3, 7, 1000])
def test_gradual_density_is_exactly_final_from_the_end_on(end, final):
    assert all(gradual_density(step, 0, end, 0.9, final) == final for step in (end, end + 1, 10 * end))


@pytest.mark.parametrize(("step", "density"), [(4, 0.5), (5, 0.1), (6, 0.1)])
def test_gradual_density_of_an_empty_window_jumps(step, density):
    assert gradual_density(step, 5, 5, 0.5, 0.1) == density


# Every fourth step up to 20: (what the method does and when, steps that prune gradually, steps that prune and grow)
UPDATES = {
    "DST": ({}, [], [4, 8, 12, 16, 20]),
    "DST to step 12": ({"last_growth": 12}, [], [4, 8, 12]),
    "DST to step 11": ({"last_growth": 11}, [], [4, 8]),
    "DST knows no window": ({"start": 9}, [], [4, 8, 12, 16, 20]),
    "GraNet from step 8": ({"shrinks": True, "start": 8}, [8, 12, 16, 20], [8, 12, 16, 20]),
    "GraNet from 9 to 15": ({"shrinks": True, "start": 9, "last_growth": 15}, [12, 16, 20], [12]),
    "GMP": ({"shrinks": True, "grows": False, "start": 5, "last_growth": 0}, [8, 12, 16, 20], []),
    "nothing": ({"grows": False}, [], []),
}


@pytest.mark.parametrize(("settings", "shrinking", "growing"), UPDATES.values(), ids=UPDATES)
def test_updates_by_hand(settings, shrinking, growing):
    schedule = UpdateSchedule(4, **settings)
    steps = range(1, 21)
    due = [step for step in steps if schedule.is_due(step)]
    assert [step for step in due if schedule.shrinks_at(step)] == shrinking
    assert [step for step in due if schedule.grows_at(step)] == growing
    assert due == sorted({*shrinking, *growing})
    assert [schedule.last_shrink(end) for end in (3, 11, 20)] == [
        max([step for step in shrinking if step <= end], default=0) for end in (3, 11, 20)
    ]


def test_an_overdue_update_comes_at_the_next_step_that_has_something_to_do():
    schedule = UpdateSchedule(4, shrinks=True, start=8)
    assert [step for step in range(1, 14) if schedule.is_due(step, overdue=True)] == [8, 9, 10, 11, 12, 13]


@given(
    start=st.integers(0, 50),
    length=st.integers(1, 50),
    densities=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
)
def test_gradual_density_never_rises_nor_leaves_its_range(start, length, densities):
    final, initial = sorted(densities)
    values = [gradual_density(step, start, start + length, initial, final) for step in range(start + length + 3)]
    assert values == sorted(values, reverse=True)
    assert values[start] == initial
    assert values[-1] == final


# lr_1 · (1 - 2t) + lr_2 · 2t up to the middle, then lr_1 · (2t - 1) + lr_2 · (2 - 2t)
CYCLE = [(0.0, 0.001), (0.125, 0.002), (0.25, 0.003), (0.375, 0.004), (0.5, 0.005), (0.75, 0.003), (0.875, 0.002)]


@pytest.mark.parametrize(("t", "lr"), CYCLE)
def test_cyclic_lr_by_hand(t, lr):
    assert cyclic_lr(t, 0.001, 0.005) == pytest.approx(lr, rel=1e-12)


@given(t=st.floats(0, 1, exclude_max=True), lr_1=st.floats(1e-6, 1), lr_2=st.floats(1e-6, 1))
def test_cyclic_lr_stays_between_its_two_rates_and_is_symmetric(t, lr_1, lr_2):
    lr = cyclic_lr(t, lr_1, lr_2)
    assert min(lr_1, lr_2) * (1 - 1e-12) <= lr <= max(lr_1, lr_2) * (1 + 1e-12)
    assert cyclic_lr(1 - t, lr_1, lr_2) == pytest.approx(lr, rel=1e-9)


@pytest.mark.parametrize(
    ("epoch", "lr"),
    [(0, 0.1), (112, 0.1), (113, 0.01), (168, 0.01), (169, 0.001), (225, 0.001)],
)
def test_cifar_milestones_by_hand(epoch, lr):
    assert milestone_lr(epoch, 0.1, [226 // 2, 226 * 3 // 4]) == pytest.approx(lr, rel=1e-12)


@pytest.mark.parametrize(
    ("epoch", "lr"),
    [(0, 0.1), (1, 0.2), (4, 0.5), (5, 0.6), (29, 0.6), (30, 0.06), (60, 0.006), (84, 0.006), (85, 0.0006)],
)
def test_imagenet_warmup_and_milestones_by_hand(epoch, lr):
    assert milestone_lr(epoch, 0.6, [30, 60, 85], warmup_epochs=5) == pytest.approx(lr, rel=1e-12)


def test_milestone_lr_without_milestones_is_constant():
    assert {milestone_lr(epoch, 0.1, []) for epoch in range(100)} == {0.1}


# From 0.5: constant; 0.005 + 0.495 · (1 + cos(π·progress)) / 2; 0.5 · (1 - progress).
DECAY = [
    ("constant", [0.5, 0.5, 0.5, 0.5]),
    ("cosine", [0.5, 0.005 + 0.495 * 0.75, 0.2525, 0.005]),
    ("linear", [0.5, 0.5 * 2 / 3, 0.25, 0.0]),
]


@pytest.mark.parametrize(("name", "rates"), DECAY)
def test_prune_rate_decay_by_hand(name, rates):
    assert [DECAYS[name](0.5, progress) for progress in (0, 1 / 3, 1 / 2, 1)] == pytest.approx(rates, abs=1e-12)


def test_every_decay_has_a_table_here():
    assert set(DECAYS) == {name for name, _ in DECAY}


@pytest.mark.parametrize(
    ("epochs", "cycle_rate", "cycle", "pretrain", "tickets"),
    [
        (250, 0.1, 8, 226, 3),  # the example of the method's description
        (160, 0.2, 8, 128, 4),
        (250, 0.0, 8, 250, 0),
        (7, 0.5, 4, 7, 0),  # less than one whole cycle
        (20, 1.0, 3, 2, 6),
        (100, 0.29, 1, 71, 29),  # 0.29 · 100 is 28.999999999999996 in binary
        (10, 0.7, 7, 3, 1),
    ],
)
def test_epoch_budget_by_hand(epochs, cycle_rate, cycle, pretrain, tickets):
    budget = EpochBudget.of_share(epochs, cycle_rate, cycle)
    assert (budget.pretrain_epochs, budget.tickets) == (pretrain, tickets)
    assert budget.cyclic_epochs == tickets * cycle
    assert budget.total_epochs == epochs
