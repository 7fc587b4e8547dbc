"""Prune, grow and redistribute: eight weights that can be checked with a pencil, then what must hold for any."""

import math
from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.tensors import VALUES, generator, positions
from sparselearning.sparse.topology import (
    GROWTH,
    PRUNE,
    REDISTRIBUTION,
    Layer,
    Stateful,
    ThresholdPruning,
    magnitude_quantile,
    prune_and_grow,
    removal_count,
    shrink_globally,
    shrink_uniformly,
    steer_threshold,
)

# position          0     1     2     3     4     5     6     7
SMALL_WEIGHTS = [   1.0, -4.0,  2.0, -5.0,  3.0, -6.0,  0.0,  0.0]  # fmt: skip
SMALL_ACTIVE = [    1,    1,    1,    1,    1,    1,    0,    0]  # fmt: skip
GRADIENT = [        5.0, -9.0,  1.0,  8.0, -2.0,  7.0, -6.0,  3.0]  # fmt: skip
MOMENTUM = [       -1.0,  9.0,  4.0, -9.0,  3.0,  9.0,  0.0, -5.0]  # fmt: skip
LARGE_WEIGHTS = [  10.0, -20.,  30., -40.,  2.5,  0.0,  0.0,  0.0]  # fmt: skip
LARGE_ACTIVE = [    1,    1,    1,    1,    1,    0,    0,    0]  # fmt: skip


def layer(weights, active, neurons=2, is_classifier=False, gradient=(), momentum=()):
    return Layer(
        weight=torch.tensor(weights),
        mask=torch.tensor(active, dtype=torch.bool),
        neurons=neurons,
        is_classifier=is_classifier,
        gradient=torch.tensor(gradient),
        momentum=torch.tensor(momentum),
    )


def small(**kwargs):
    return layer(SMALL_WEIGHTS, SMALL_ACTIVE, gradient=GRADIENT, momentum=MOMENTUM, **kwargs)


def large(**kwargs):
    return layer(LARGE_WEIGHTS, LARGE_ACTIVE, gradient=GRADIENT, momentum=MOMENTUM, **kwargs)


def active(layers):
    return positions(layer.mask for layer in layers)


def begun(prune, threshold=None):
    """A pruning mode, about to be called; ``threshold`` pruning where it has got to that threshold."""
    mode = PRUNE[prune].begin()
    if isinstance(mode, ThresholdPruning):
        mode.load_state_dict({"threshold": threshold})
    return mode


def update(layers, prune="magnitude", growth="gradient", redistribution="none", rate=0.5, threshold=0.0):
    """Run one prune-and-grow; return the masks before it, between its halves, and after it."""
    before = [x.mask.clone() for x in layers]
    removed = begun(prune, threshold)(layers, rate)
    assert all((mask | gone == mask).all() for mask, gone in zip(before, removed, strict=True)), "only active ones go"
    assert all(torch.equal(x.mask, mask) for x, mask in zip(layers, before, strict=True)), "choosing changes nothing"
    weights = [x.weight.clone() for x in layers]
    prune_and_grow(layers, begun(prune, threshold), growth, redistribution, rate, generator())
    assert all(torch.equal(x.weight, w) for x, w in zip(layers, weights, strict=True)), "masks change, weights do not"
    between = [mask & ~gone for mask, gone in zip(before, removed, strict=True)]
    assert all((mask & ~x.mask).sum() == 0 for x, mask in zip(layers, between, strict=True)), "growing removes nothing"
    return before, between, [x.mask.clone() for x in layers]


def sizes_of(masks):
    return [int(mask.sum()) for mask in masks]


# ------------------------------------------------------------------------------------------------- pruning
# Rate 0.6 of 6 active weights: ceil(3.6) = 4. Of 11: ceil(6.6) = 7.

PRUNED = [
    ("magnitude", 0.6, [[0, 1, 2, 4], [0, 1, 4]]),  # 1 2 3 4; of five ceil(3.0): 2.5 10 20
    ("SET", 0.6, [[0, 1, 2, 3], None]),  # +1 +2 and -4 -5, though 3 is smaller
    ("threshold", 0.6, [[0, 2, 4], [4]]),  # at or below 3
    ("global_magnitude", 0.6, [[0, 1, 2, 3, 4, 5], [4]]),  # 1 2 2.5 3 4 5 6
    ("global_magnitude", 0.35, [[0, 2, 4], [4]]),  # ceil(3.85)
]


@pytest.mark.parametrize(("mode", "rate", "removed"), PRUNED)
def test_pruning_by_hand(mode, rate, removed):
    found = positions(begun(mode, 3.0)([small(), large()], rate))
    assert found[0] == removed[0]
    assert removed[1] is None or found[1] == removed[1]


def test_every_prune_mode_has_a_table_here():
    assert {mode for mode, _, _ in PRUNED} == set(PRUNE)


@pytest.mark.parametrize(
    ("rate", "n", "removed"),
    [(0.07, 100, 7), (0.14, 50, 7), (0.55, 100, 55), (0.5, 7, 4), (0.1, 1, 1), (0.0, 9, 0), (1.0, 9, 9)],
)
def test_counts_are_not_off_by_binary_rounding(rate, n, removed):
    assert removal_count(rate, n) == removed


@pytest.mark.parametrize(
    ("weights", "rate", "removed"),
    [
        ([1.0, -1.5, 2.0, -2.5, 3.0, -3.5, 4.0, -4.5], 0.5, [1.0, 2.0, -1.5, -2.5]),
        ([5.0, -1.0, 6.0, -2.0, 7.0, -3.0, 8.0, -4.0], 0.5, [5.0, 6.0, -1.0, -2.0]),  # not the smallest |w|
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, -8.0], 0.5, [1.0, 2.0, 3.0, -8.0]),  # a side that has too few
        ([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0, 8.0], 0.5, [8.0, -1.0, -2.0, -3.0]),
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], 0.5, [1.0, 2.0, 3.0, 4.0]),
        ([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0, -8.0], 0.5, [-1.0, -2.0, -3.0, -4.0]),
    ],
)
def test_set_pruning_takes_half_from_each_side(weights, rate, removed):
    found = PRUNE["SET"]([layer(weights, [1] * 8)], rate)[0]
    assert sorted(torch.tensor(weights)[found].tolist()) == sorted(removed)


@pytest.mark.parametrize(("rate", "quantile"), [(0.0, 0.0), (1 / 11, 1.0), (0.2, 2.5), (0.5, 5.0), (1.0, 40.0)])
def test_magnitude_quantile_by_hand(rate, quantile):
    # |w| in order: 1 2 2.5 3 4 5 6 10 20 30 40; the first ceil(11 · rate) of them
    assert magnitude_quantile([small(), large()], rate) == quantile


def test_threshold_is_steered_towards_the_wanted_share():
    assert steer_threshold(1.0, 0.5, 0.5) == 1.0
    assert steer_threshold(1.0, 0.6, 0.5) < 1.0
    assert steer_threshold(1.0, 0.4, 0.5) > 1.0
    assert steer_threshold(1.0, 0.0, 0.5) > 1.0
    assert steer_threshold(1.0, 0.0, 0.0) == 1.0


def test_threshold_pruning_by_hand():
    # |w| in order: 1 2 2.5 3 4 5 6 10 20 30 40; ceil(11 · 0.2) = 3 of them lie at or below 2.5
    mode = begun("threshold")
    assert positions(mode([small(), large()], 0.2)) == [[0, 2], [4]]
    assert mode.state_dict()["threshold"] == pytest.approx(2.5 * 0.2 / (3 / 11))  # 1.83: more than 0.2 had gone
    assert positions(mode([small(), large()], 0.2)) == [[0], []]
    assert mode.state_dict()["threshold"] == pytest.approx(2 * 2.5 * 0.2 / (3 / 11))  # 1 of 11: raised, but twofold


def test_threshold_pruning_is_not_steered_from_zero():
    mode = begun("threshold")
    mode([layer([0.0] * 8, [1] * 8)], 0.5)
    assert mode.state_dict() == {"threshold": None}


def test_threshold_pruning_waits_for_active_weights():
    mode = begun("threshold", 0.5)
    mode([layer([1.0] * 8, [0] * 8)], 0.5)
    assert mode.state_dict() == {"threshold": 0.5}


@pytest.mark.parametrize("name", PRUNE)
def test_runs_share_no_state(name):
    first, second = PRUNE[name].begin(), PRUNE[name].begin()
    first([small(), large()], 0.5)
    assert not isinstance(first, Stateful) or second.state_dict() == PRUNE[name].begin().state_dict()


# ------------------------------------------------------------------------------------------------- growing
# Just removed: 0, 2 and 4, so that 1, 3, 5 are active; three are to grow among 0, 2, 4, 6, 7.

GROWN = [
    ("gradient", [0, 6, 7]),  # |gradient| there: 5 1 2 6 3
    ("momentum", [2, 4, 7]),  # |momentum| there: 1 4 3 0 5
    # Neuron 0 (positions 0-3) has mean momentum 23/4, neuron 1 has 17/4: of 3 they get 1.725 -> 2 and 1.275 -> 1.
    ("momentum_neuron", [0, 2, 7]),
]


@pytest.mark.parametrize(("mode", "grown"), GROWN)
def test_growing_by_hand(mode, grown):
    pruned = small()
    pruned.mask[[0, 2, 4]] = False
    assert positions([GROWTH[mode](pruned, 3, generator())]) == [grown]


def test_every_growth_mode_is_tested_here():
    assert {mode for mode, _ in GROWN} | {"random"} == set(GROWTH)


def test_neuron_quotas_stop_at_the_neurons_room():
    # Neuron 0 would get nearly all of 3, but has one free place.
    crowded = layer([1.0] * 8, [1, 1, 1, 0, 1, 0, 0, 0], momentum=[90.0, 90, 90, 90, 1, 3, 1, 2])
    assert positions([GROWTH["momentum_neuron"](crowded, 3, generator())]) == [[3, 5, 7]]


def test_neurons_share_by_their_mean_whatever_single_weights_have():
    # Means 9 : 1, so of 4 they get 3.6 -> 4 and 0.4 -> 0, though only one weight of neuron 0 has any momentum.
    lopsided = layer([0.0] * 8, [0] * 8, momentum=[36.0, 0, 0, 0, 1, 1, 1, 1])
    assert positions([GROWTH["momentum_neuron"](lopsided, 4, generator())]) == [[0, 1, 2, 3]]


def test_random_growth_is_uniform_over_the_inactive_weights():
    source, draws = generator(3), 3000
    hits, pairs = Counter(), Counter()
    for _ in range(draws):
        pruned = small()
        pruned.mask[[0, 2, 4]] = False
        grown = tuple(positions([GROWTH["random"](pruned, 3, source)])[0])
        hits.update(grown)
        pairs[grown] += 1
    assert set(hits) == {0, 2, 4, 6, 7}
    assert all(abs(n - draws * 0.6) < 4 * math.sqrt(draws * 0.6 * 0.4) for n in hits.values())
    assert len(pairs) == 10, "all ten sets of three out of five come up"
    assert all(abs(n - draws / 10) < 4 * math.sqrt(draws * 0.1 * 0.9) for n in pairs.values())


@pytest.mark.parametrize(("mode", "reads"), [("gradient", "gradient"), ("momentum", "momentum"), ("random", None)])
def test_growth_reads_its_own_score_and_no_other(mode, reads):
    def grow(changed):
        pruned = small()
        pruned.mask[[0, 2, 4]] = False
        if changed:
            setattr(pruned, changed, torch.tensor([0.0, 9, 8, 9, 7, 9, 1, 0]))
        return GROWTH[mode](pruned, 3, generator()).tolist()

    for changed in ("gradient", "momentum"):
        assert (grow(changed) == grow(None)) == (changed != reads)


# ------------------------------------------------------------------------------------------ redistribution
# Global magnitude at rate 0.5 of 6 + 2 active weights removes 1 2 3 4, all from the first layer.

SHARED_OUT = [
    ("none", [4, 0]),
    ("nonzeros", [3, 1]),  # 6 : 2 active
    ("magnitude", [1, 3]),  # means 3.5 : 12, so 4 · (3.5, 12) / 15.5 = 0.90, 3.10
    ("momentum", [2, 2]),  # means 1 : 1 at the active weights; 50 and 900 stand elsewhere
]


def two_layers():
    first = layer(SMALL_WEIGHTS, SMALL_ACTIVE, gradient=GRADIENT, momentum=[1.0, -1, 1, 1, -1, 1, 50, 50])
    second = layer(
        [16.0, -8, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0], gradient=GRADIENT, momentum=[1.0, 1, 900, 0, 0, 0, 0, 0]
    )
    return [first, second]


@pytest.mark.parametrize(("mode", "counts"), SHARED_OUT)
def test_redistribution_by_hand(mode, counts):
    _, between, after = update(two_layers(), "global_magnitude", redistribution=mode)
    assert positions(between) == [[3, 5], [0, 1]]
    assert sizes_of(after) == [2 + counts[0], 2 + counts[1]]


def test_every_redistribution_mode_has_a_table_here():
    assert {mode for mode, _ in SHARED_OUT} == set(REDISTRIBUTION)


def test_redistribution_fills_no_layer_above_its_size():
    # The first layer loses 1 2 3 (ceil of 6 · 0.5), the second 100 101 (of 4). By magnitude 5 · 0.033 and 5 · 0.967
    # are due; the second has room for the 2 it lost, so the first gets 3.
    layers = [small(), layer([100.0, 101, 102, 103], [1, 1, 1, 1], gradient=[1.0, 2, 3, 4])]
    _, between, after = update(layers, redistribution="magnitude")
    assert sizes_of(between) == [3, 2]
    assert sizes_of(after) == [6, 4]


# ---------------------------------------------------------------------------------------- one whole update


def test_rigl_update_by_hand():
    # ceil(6 · 0.5) = 3 removed: 1 2 3 at 0, 2, 4. Largest |gradient| among 0 2 4 6 7: 6 at 6, 5 at 0, 3 at 7.
    _, between, after = update([small()])
    assert positions(between) == [[1, 3, 5]]
    assert positions(after) == [[0, 1, 3, 5, 6, 7]]


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_the_ends_of_the_prune_rate(rate):
    before, between, after = update([small(), large()], rate=rate)
    if rate == 0.0:
        assert positions(before) == positions(between) == positions(after)
    else:  # all go, and the 6 and 5 largest of |GRADIENT| come
        assert positions(between) == [[], []]
        assert positions(after) == [[0, 1, 3, 5, 6, 7], [0, 1, 3, 5, 6]]


RATES = st.integers(0, 1000).map(lambda thousandths: thousandths / 1000)


@st.composite
def any_layers(draw):
    """One to four layers whose scores are full of ties and zeros, from empty to full masks."""
    source = generator(draw(st.integers(0, 2**32)))
    layers = []
    for index in range(draw(st.integers(1, 4))):
        neurons, fan_in, density = draw(
            st.tuples(st.integers(1, 5), st.integers(1, 6), st.sampled_from([0, 0.2, 0.6, 1]))
        )
        weight, gradient, momentum = VALUES[torch.randint(len(VALUES), (3, neurons * fan_in), generator=source)]
        mask = torch.rand(neurons * fan_in, generator=source) < density
        layers.append(Layer(weight, mask, neurons, index == 3, gradient, momentum))
    return layers


@pytest.mark.parametrize("redistribution", REDISTRIBUTION)
@pytest.mark.parametrize("growth", GROWTH)
@pytest.mark.parametrize("prune", PRUNE)
@settings(max_examples=12)
@given(layers=any_layers(), rate=RATES, threshold=st.sampled_from([0.0, 0.5, 1.0, 1e30]))
def test_an_update_keeps_every_count(prune, growth, redistribution, layers, rate, threshold):
    before, between, after = update(layers, prune, growth, redistribution, rate, threshold)
    counts = sizes_of(before)
    removed = [n - left for n, left in zip(counts, sizes_of(between), strict=True)]
    assert sum(sizes_of(after)) == sum(counts)
    if redistribution == "none":
        assert sizes_of(after) == counts
    if prune in ("magnitude", "SET"):
        assert removed == [math.ceil(Fraction(str(rate)) * n) for n in counts]
    if prune == "global_magnitude":
        assert sum(removed) == math.ceil(Fraction(str(rate)) * sum(counts))
    if prune == "threshold":
        within = [mask & (x.weight.abs() <= threshold) for x, mask in zip(layers, before, strict=True)]
        assert removed == sizes_of(within)


@pytest.mark.parametrize(
    ("growth", "redistribution"), [("gradient", "magnitude"), ("gradient", "momentum"), ("momentum_neuron", "none")]
)
def test_counts_are_kept_where_sums_overflow(growth, redistribution):
    huge = [3e38] * 8
    layers = [layer(huge, SMALL_ACTIVE, gradient=huge, momentum=huge) for _ in range(2)]
    prune_and_grow(layers, PRUNE["magnitude"], growth, redistribution, 0.5, generator())
    assert sum(int(x.mask.sum()) for x in layers) == 12


@given(layers=any_layers(), rate=st.floats(0, 1))
def test_what_is_removed_is_smallest_and_what_grows_is_largest(layers, rate):
    before, between, after = update(layers, rate=rate)
    for x, old, left, new in zip(layers, before, between, after, strict=True):
        gone, grown = old & ~left, new & ~left
        smallest = x.weight[old].abs().sort().values[: int(gone.sum())]
        assert torch.equal(x.weight[gone].abs().sort().values, smallest)
        largest = x.gradient[~left].abs().sort(descending=True).values[: int(grown.sum())]
        assert torch.equal(x.gradient[grown].abs().sort(descending=True).values, largest)


# ----------------------------------------------------------------------------------------- gradual pruning


def test_gradual_global_pruning_by_hand():
    # 6 + 5 of 16 are active; density 0.5 keeps 8, so that 1, 2 and 2.5 go; 0.25 keeps 4: 10 20 30 40.
    layers = [small(), large()]
    shrink_globally(layers, 0.5)
    assert active(layers) == [[1, 3, 4, 5], [0, 1, 2, 3]]
    shrink_globally(layers, 0.25)
    assert active(layers) == [[], [0, 1, 2, 3]]


def test_gradual_uniform_pruning_by_hand():
    layers = [small(), large()]
    shrink_uniformly(layers, 0.5)
    assert active(layers) == [[1, 3, 4, 5], [0, 1, 2, 3]]
    shrink_uniformly(layers, 0.25)
    assert active(layers) == [[3, 5], [2, 3]]


@pytest.mark.parametrize("shrink", [shrink_globally, shrink_uniformly])
def test_gradual_pruning_never_adds(shrink):
    layers = [small(), large()]
    shrink(layers, 0.9)
    assert active(layers) == active([small(), large()])


@pytest.mark.parametrize(
    ("density", "kept"),
    [
        (0.5, [50, 50, 20]),
        (0.2, [20, 20, 8]),
        (0.1, [8, 8, 8]),  # 24 of 240 in all; the classifier keeps 0.2 · 40 = 8, the others share 16
        (0.05, [2, 2, 8]),
        (0.03, [3, 3, 1]),  # 7 in all, fewer than the 8 of the classifier alone: it is not held
        (0.0375, [1, 0, 8]),  # 9 in all; the others' 1 of 200 is above a tenth of that density
    ],
)
@pytest.mark.parametrize("values", ["distinct", "all equal"])
def test_gradual_uniform_pruning_holds_the_classifier(density, kept, values):
    def dense(size, is_classifier=False):
        weights = torch.linspace(1, 2, size) if values == "distinct" else torch.ones(size)
        return Layer(weights, torch.ones(size, dtype=torch.bool), is_classifier=is_classifier)

    layers = [dense(100), dense(100), dense(40, is_classifier=True)]
    shrink_uniformly(layers, density)
    counts = [int(x.mask.sum()) for x in layers]
    assert sum(counts) == round(240 * density)
    assert counts == kept
    if values == "distinct":
        assert all(x.mask[-n:].all() for x, n in zip(layers, counts, strict=True) if n)


def test_gradual_uniform_pruning_does_not_hold_a_classifier_that_is_nearly_all_of_the_network():
    # 0.2 of the classifier are 180 of its 900. Of 190 in all that leaves the others 10 of 100; of 181 it would leave
    # 1, fewer than a tenth of 0.181 · 100; of 100 none.
    for density, kept in ((0.19, [10, 180]), (0.181, [18, 163]), (0.1, [10, 90])):
        layers = [layer([1.0] * size, range(size), 1, is_classifier=size == 900) for size in (100, 900)]
        shrink_uniformly(layers, density)
        assert [int(x.mask.sum()) for x in layers] == kept


@pytest.mark.parametrize("shrink", [shrink_globally, shrink_uniformly])
@given(layers=any_layers(), density=st.floats(0.001, 1))
def test_gradual_pruning_is_exact_and_only_removes(shrink, layers, density):
    before = [x.mask.clone() for x in layers]
    shrink(layers, density)
    size = sum(mask.numel() for mask in before)
    assert sum(int(x.mask.sum()) for x in layers) == min(round(size * density), sum(int(m.sum()) for m in before))
    assert not any((x.mask & ~mask).any() for x, mask in zip(layers, before, strict=True))
