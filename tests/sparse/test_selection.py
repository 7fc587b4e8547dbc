"""The k largest: exactly those of a full sort, on what a CPU runs and on what a GPU runs."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.tensors import VALUES, generator, positions
from sparselearning.sparse import selection
from sparselearning.sparse.selection import SAMPLE_SIZE, select_largest

# What a GPU runs, on this machine's CPU.
SELECTS = {"CPU": select_largest, "GPU": selection._select_at_once}


@pytest.fixture(params=SELECTS)
def select(request):
    return SELECTS[request.param]


def assert_selects_the_largest(select, tensors, k, eligible=None):
    """The chosen values are those of a full sort, every position once, ties to the earlier layer and position."""
    chosen = select(torch.positive, [(t,) for t in tensors] if eligible is None else zip_up(tensors, eligible), k)
    everything = torch.cat(tensors)
    if eligible is not None:
        everything = everything.masked_fill(~torch.cat(eligible), -torch.inf)
    expected = torch.zeros_like(everything, dtype=torch.bool)
    expected[everything.sort(descending=True, stable=True).indices[:k]] = True
    for found, wanted in zip(chosen, expected.split([t.numel() for t in tensors]), strict=True):
        assert torch.equal(found, wanted)


def zip_up(*columns):
    return list(zip(*columns, strict=True))


@given(data=st.data(), sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(sum))
def test_select_largest_equals_a_full_sort(data, sizes):
    source = generator(data.draw(st.integers(0, 2**32)))
    tensors = [VALUES[torch.randint(len(VALUES), (n,), generator=source)] for n in sizes]
    eligible = [torch.rand(n, generator=source) < 0.7 for n in sizes]
    for select in SELECTS.values():
        if k := data.draw(st.integers(0, sum(sizes))):
            assert_selects_the_largest(select, tensors, k)
        if k := data.draw(st.integers(0, int(torch.cat(eligible).sum()))):
            assert_selects_the_largest(select, tensors, k, eligible)


def test_select_largest_of_none_is_none():
    assert positions(select_largest(torch.positive, [(torch.ones(3),), (torch.ones(0),)], 0)) == [[], []]


BIG = 2 * SAMPLE_SIZE + 17
MISLEADING = {
    "peaks where every second looks": lambda i: (i % 2 == 0) * 1.0,
    "peaks where every third looks": lambda i: (i % 3 == 0) * 1.0,
    "troughs where every third looks": lambda i: (i % 3 != 0) * 1.0,
    "distinct peaks where every third looks": lambda i: torch.where(i % 3 == 0, 1 + i / BIG, -i / BIG),
    "distinct troughs where every third looks": lambda i: torch.where(i % 3 == 0, -1 - i / BIG, i / BIG),
    "all equal": lambda i: torch.zeros(len(i)),
    "rising": lambda i: i.float(),
    "falling": lambda i: -i.float(),
    "few distinct": lambda i: (i * 7919 % 5).float(),
    "one peak": lambda i: (i == 1).float(),
}


@pytest.mark.parametrize("pattern", MISLEADING)
@pytest.mark.parametrize("share", [0.001, 0.3, 1 / 3, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("marked_out", [False, True])
def test_select_largest_is_exact_where_the_sample_misleads(select, pattern, share, marked_out):
    values = MISLEADING[pattern](torch.arange(BIG))
    eligible = torch.arange(BIG) % 5 != 0
    k = math.ceil(share * (int(eligible.sum()) if marked_out else BIG))
    parts = [100, 1, BIG - 101]
    assert_selects_the_largest(select, values.split(parts), k, eligible.split(parts) if marked_out else None)


def test_select_largest_looks_past_small_layers_of_large_scores(select):
    # Hundreds of one-weight layers weigh far more in a sample than in the whole.
    tiny = [torch.full((1,), 9.0) for _ in range(400)]
    assert_selects_the_largest(select, [*tiny, torch.randn(BIG, generator=generator())], 2000)


@pytest.mark.parametrize("non_zeros", [2999, 3000, 3001])
def test_select_largest_around_the_zeros_of_a_sparse_network(select, non_zeros):
    values = torch.zeros(BIG)
    values[torch.randperm(BIG, generator=generator())[:non_zeros]] = 1 + torch.rand(non_zeros, generator=generator())
    assert_selects_the_largest(select, [values[:1000], values[1000:]], 3000)


@pytest.mark.parametrize("size", [8, BIG])
def test_select_largest_never_takes_what_is_marked_out(select, size):
    scores = torch.full((size,), -torch.inf)
    scores[[1, 4, 6]] = torch.tensor([0.0, -3e38, 2.0])
    assert positions(select(torch.positive, [(scores,)], 3)) == [[1, 4, 6]]
    with pytest.raises(ValueError, match="cannot choose"):
        select(torch.positive, [(scores,)], 4)


def test_select_largest_never_takes_what_a_sample_sees_everywhere(select):
    scores = torch.arange(BIG, dtype=torch.float32)
    scores[::5] = -torch.inf
    assert_selects_the_largest(select, [scores], int(scores.isfinite().sum()))
    with pytest.raises(ValueError, match="cannot choose"):
        select(torch.positive, [(scores,)], BIG)


def test_select_largest_over_many_blocks(select, monkeypatch):
    monkeypatch.setattr(selection, "BLOCK_SIZE", 1000)
    scores = torch.randn(BIG, generator=generator()).round(decimals=2)
    eligible = torch.rand(BIG, generator=generator(1)) < 0.6
    for k in (1, 500, 20_000, int(eligible.sum())):
        assert_selects_the_largest(select, scores.split([12_345, BIG - 12_345]), k)
        assert_selects_the_largest(select, [scores], k, [eligible])


@pytest.mark.parametrize("size", [8, BIG])
def test_select_largest_never_takes_nan(select, size):
    scores = torch.full((size,), -torch.inf)
    scores[[1, 4, 6]] = torch.tensor([0.0, torch.nan, 2.0])
    assert positions(select(torch.positive, [(scores,)], 2)) == [[1, 6]]
    with pytest.raises(ValueError, match="only 2 have a score"):
        select(torch.positive, [(scores,)], 3)


@pytest.mark.parametrize("size", [8, BIG])
@pytest.mark.parametrize("k", [1, 3, 5, 8])
def test_select_largest_takes_infinite_scores_first(select, size, k):
    scores = torch.zeros(size)
    scores[[1, 2, 4, 6]] = torch.inf
    assert_selects_the_largest(select, [scores[:3], scores[3:]], k)
