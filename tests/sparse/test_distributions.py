"""How a budget becomes densities and exact counts: hand-solved cases, then invariants."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from sparselearning import erk_densities
from sparselearning.sparse.distributions import DENSITIES, apportion, layer_counts, random_mask, uniform_densities
from sparselearning.sparse.selection import SelectionError

SHAPE = st.one_of(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 5), st.integers(1, 5)),
)
SHAPES = st.lists(SHAPE, min_size=1, max_size=8).map(lambda shapes: {f"layer{i}": s for i, s in enumerate(shapes)})
DENSITY = st.floats(0.001, 1)


# ----------------------------------------------------------------------------------------------------- ERK


def test_erk_by_hand_when_no_layer_fills_up():
    # n: 8, 16; sums: 6, 8; budget 12 = ε · 14, so ε = 6/7 and density = ε · (6/8, 8/16).
    assert erk_densities({"a": (2, 4), "b": (2, 2, 2, 2)}, 0.5) == pytest.approx({"a": 9 / 14, "b": 3 / 7})


def test_erk_by_hand_when_layers_fill_up_one_after_the_other():
    # n 2, 4, 32; raw 3/2, 1, 3/8; budget 19. ε = 19/19 = 1: a passes 1. ε = (18 - 1)/16 = 17/16: b passes 1.
    # ε = (16 - 1 - 2)/12 = 13/12, density of c = 13/12 · 3/8 = 13/32: 2 + 4 + 13 = 19 weights.
    assert erk_densities({"a": (1, 2), "b": (2, 2), "c": (4, 8)}, 0.5) == pytest.approx({"a": 1, "b": 1, "c": 13 / 32})


def test_erk_makes_all_layers_that_share_the_largest_raw_value_dense_together():
    # n 4, 4, 32; raw 1, 1, 3/8; ε = 20/20 = 1 does not pass 1 at 0.5; at 0.55 ε = 22/20 does, for both, and the
    # large layer gets the other 14 of 22.
    shapes = {"a": (2, 2), "b": (2, 2), "c": (4, 8)}
    assert erk_densities(shapes, 0.5) == pytest.approx({"a": 1, "b": 1, "c": 12 / 32})
    assert erk_densities(shapes, 0.55) == pytest.approx({"a": 1, "b": 1, "c": 14 / 32})


def test_erk_of_a_convolution_counts_its_kernel():
    densities = erk_densities({"conv": (64, 32, 3, 5), "fc": (10, 64)}, 0.01)
    assert densities["conv"] / densities["fc"] == pytest.approx((104 / 30720) / (74 / 640))


@given(shapes=SHAPES, density=DENSITY)
def test_erk_total_is_exact_and_sparse_layers_share_one_epsilon(shapes, density):
    densities = erk_densities(shapes, density)
    assert list(densities) == list(shapes)
    assert all(0 < d <= 1 for d in densities.values())
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    total = sum(sizes.values())
    assert sum(d * sizes[name] for name, d in densities.items()) == pytest.approx(density * total, rel=1e-9)
    raw = {name: sum(shape) / sizes[name] for name, shape in shapes.items()}
    epsilons = [densities[name] / raw[name] for name in shapes if densities[name] < 1]
    assert epsilons == pytest.approx([epsilons[0]] * len(epsilons) if epsilons else [], rel=1e-9)
    if epsilons:  # only layers that ε would push to 1 are dense
        dense = [raw[name] * epsilons[0] for name in shapes if densities[name] == 1]
        assert all(value >= 1 - 1e-9 for value in dense)


@given(shapes=SHAPES)
def test_density_1_leaves_every_weight(shapes):
    for distribution in DENSITIES.values():
        densities = distribution(shapes, 1.0)
        assert list(densities.values()) == pytest.approx([1.0] * len(shapes))
        assert layer_counts(shapes, densities, 1.0) == {name: math.prod(shape) for name, shape in shapes.items()}


def test_uniform_is_the_same_everywhere():
    assert uniform_densities({"a": (2, 4), "b": (3, 3, 3, 3)}, 0.3) == {"a": 0.3, "b": 0.3}


@pytest.mark.parametrize("distribution", DENSITIES.values(), ids=DENSITIES)
@pytest.mark.parametrize("density", [0, -0.1, 1.0001, math.nan, math.inf])
def test_densities_outside_0_to_1_are_refused(distribution, density):
    with pytest.raises(ValueError, match="density"):
        distribution({"a": (2, 4)}, density)


# -------------------------------------------------------------------------------------------- exact counts


@pytest.mark.parametrize(
    ("sizes", "densities", "density", "counts"),
    [
        ((8, 8), (0.5, 0.5), 0.5, [4, 4]),
        ((10, 30), (0.25, 0.25), 0.25, [3, 7]),  # quotas 2.5 and 7.5: one of the two gets the odd weight
        ((10, 20, 10), (0.13, 0.26, 0.48), 0.2825, [1, 5, 5]),  # quotas 1.3, 5.2, 4.8: 10 and one to the .8
        ((8, 8), (0.01, 0.01), 0.01, [0, 0]),
        ((8, 8), (1.0, 1.0), 1.0, [8, 8]),
    ],
)
def test_layer_counts_by_hand(sizes, densities, density, counts):
    names = [f"layer{i}" for i in range(len(sizes))]
    shapes = {name: (1, n) for name, n in zip(names, sizes, strict=True)}
    found = layer_counts(shapes, dict(zip(names, densities, strict=True)), density)
    assert list(found.values()) == counts


def test_layers_that_erk_makes_dense_lose_no_weight_to_rounding():
    # Quotas 1000, 200.83 three times: 1602.49 in all, so 1602 weights. The whole parts hold 1600, and the two odd
    # ones go to the remainders of .83. The full layer has no remainder to lose.
    shapes = {"tall": (1000, 1), "b": (100, 100), "c": (100, 100), "d": (100, 100)}
    density = 1602.49 / 31000
    densities = erk_densities(shapes, density)
    assert densities == pytest.approx({"tall": 1, "b": 0.020083, "c": 0.020083, "d": 0.020083})
    counts = layer_counts(shapes, densities, density)
    assert sum(counts.values()) == 1602
    assert counts["tall"] == 1000
    assert sorted(counts.values()) == [200, 201, 201, 1000]


@given(shapes=SHAPES, density=DENSITY, distribution=st.sampled_from(sorted(DENSITIES)))
def test_layer_counts_are_the_largest_remainder_rounding(shapes, density, distribution):
    densities = DENSITIES[distribution](shapes, density)
    counts = layer_counts(shapes, densities, density)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    assert list(counts) == list(shapes)
    assert sum(counts.values()) == round(sum(sizes.values()) * density)
    quotas = {name: densities[name] * sizes[name] for name in shapes}
    rounded_up = {name: counts[name] - quotas[name] for name in shapes}
    for name in shapes:
        assert 0 <= counts[name] <= sizes[name]
        assert -1 - 1e-6 < rounded_up[name] < 1 + 1e-6, "a count is its quota's floor or ceiling"
        assert densities[name] < 1 or counts[name] == sizes[name], "a dense layer stays dense"


@given(shapes=SHAPES, density=DENSITY)
def test_random_masks_have_their_exact_counts(shapes, density):
    generator = torch.Generator().manual_seed(0)
    counts = layer_counts(shapes, erk_densities(shapes, density), density)
    for name, shape in shapes.items():
        mask = random_mask(shape, counts[name], generator)
        assert mask.dtype == torch.bool
        assert mask.shape == torch.Size(shape)
        assert int(mask.sum()) == counts[name]


def test_random_masks_are_uniform():
    generator = torch.Generator().manual_seed(1)
    draws = 4000
    hits = sum(random_mask((2, 4), 3, generator).int() for _ in range(draws)).flatten()
    expected, deviation = draws * 3 / 8, math.sqrt(draws * 3 / 8 * 5 / 8)
    assert (hits - expected).abs().max() < 4 * deviation


# ----------------------------------------------------------------------------------------------- apportion


@pytest.mark.parametrize(
    ("total", "shares", "capacity", "counts"),
    [
        (8, [1, 2, 1], [9, 9, 9], [2, 4, 2]),
        (9, [1, 2, 1], [9, 9, 9], [2, 5, 2]),  # quotas 2.25, 4.5, 2.25
        (10, [3, 6, 1], [9, 2, 9], [6, 2, 2]),  # quota 6 passes 2; the other 8 go 3:1
        (10, [4, 5, 1], [3, 4, 9], [3, 4, 3]),
        (11, [1, 4, 5], [20, 5, 5], [1, 5, 5]),  # quotas 1.1, 4.4, 5.5: full third, then 1.2, 4.8
        (6, [0, 1], [5, 3], [3, 3]),  # zero shares get what does not fit elsewhere
        (4, [0, 0], [2, 6], [1, 3]),  # all zero: by room
        (0, [1, 2], [3, 3], [0, 0]),
        (6, [1, 2], [3, 3], [3, 3]),
        (2, [1, 1, 1], [0, 4, 4], [0, 1, 1]),
        (0, [], [], []),
    ],
)
def test_apportion_by_hand(total, shares, capacity, counts):
    assert apportion(total, shares, capacity) == counts


ORDINARY_SHARE = st.one_of(st.just(0.0), st.floats(1e-30, 1e30), st.integers(1, 5).map(float))


@st.composite
def apportionments(draw, share):
    places = draw(st.lists(st.tuples(share, st.integers(0, 60)), min_size=1, max_size=10))
    shares, capacity = zip(*places, strict=True)
    return draw(st.integers(0, sum(capacity))), list(shares), list(capacity)


@given(case=apportionments(ORDINARY_SHARE))
def test_apportion_keeps_total_and_capacity_and_is_fair(case):
    total, shares, capacity = case
    counts = apportion(total, shares, capacity)
    assert sum(counts) == total
    assert all(0 <= count <= room for count, room in zip(counts, capacity, strict=True))
    quotas = _water_filling(total, shares, capacity)
    assert all(abs(count - quota) < 1 + Fraction(1, 10**6) for count, quota in zip(counts, quotas, strict=True))


@given(case=apportionments(st.floats(0, 1e300)))
@example(case=(1, [5e-324, 5e-324], [3, 3]))
def test_apportion_survives_extreme_shares(case):
    total, shares, capacity = case
    counts = apportion(total, shares, capacity)
    assert sum(counts) == total
    assert all(0 <= count <= room for count, room in zip(counts, capacity, strict=True))


@pytest.mark.parametrize("total", [-1, 7])
def test_apportion_refuses_what_does_not_fit(total):
    with pytest.raises(ValueError, match="room"):
        apportion(total, [1, 1], [3, 3])


@pytest.mark.parametrize("capacity", [[3, 3], [3, 0]])
def test_apportion_refuses_shares_that_are_no_numbers(capacity):
    with pytest.raises(SelectionError, match="diverge"):
        apportion(2, [1.0, math.nan], capacity)


def _water_filling(total, shares, capacity):
    """Exact real-valued quotas: proportional to the shares, none above its capacity."""
    quotas = [Fraction(0)] * len(shares)
    left, unfilled = Fraction(total), [i for i, room in enumerate(capacity) if room]
    while unfilled:
        weights = {i: Fraction(shares[i]) for i in unfilled}
        if not any(weights.values()):
            weights = {i: Fraction(capacity[i]) for i in unfilled}
        unit = left / sum(weights.values())
        full = [i for i in unfilled if weights[i] * unit >= capacity[i]]
        for i in full or unfilled:
            quotas[i] = Fraction(capacity[i]) if full else weights[i] * unit
        if not full:
            break
        left -= sum(capacity[i] for i in full)
        unfilled = [i for i in unfilled if i not in full]
    return quotas
