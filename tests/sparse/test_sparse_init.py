"""Every way to draw the first masks, on two layers of eight weights."""

import pytest
import torch
from torch import nn

from sparselearning import Masking
from sparselearning.process.errors import UsageError
from sparselearning.sparse.sparse_init import SPARSE_INITS

HIDDEN = [[0.5, -1.0, 2.0, -3.0], [4.0, -5.0, 6.0, 0.0]]  # 7 non-zero
HEAD = [[10.0, -20.0], [0.0, 0.0], [-30.0, 40.0], [1.5, 0.0]]  # 5 non-zero
HIDDEN_GRADIENT = [[9.0, 1.0, -8.0, 2.0], [0.5, 0.0, -0.5, 7.0]]
HEAD_GRADIENT = [[0.1, 0.2], [-6.0, 5.0], [0.3, 0.0], [4.0, 3.0]]


def eight_weight_layers(gradients=True):
    model = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(HIDDEN))
        model[1].weight.copy_(torch.tensor(HEAD))
    if gradients:
        model[0].weight.grad = torch.tensor(HIDDEN_GRADIENT)
        model[1].weight.grad = torch.tensor(HEAD_GRADIENT)
    return model


def initialized(model, sparse_init, density=0.5, seed=0, **options):
    masking = Masking(torch.optim.SGD(model.parameters(), lr=0.1), init_density=density, seed=seed)
    masking.add_module(model, sparse_init, **options)
    return masking


def active(masking):
    return [mask.flatten().nonzero().squeeze(1).tolist() for mask in masking.masks.values()]


# In row-major order: hidden 0-3 first row, 4-7 second; head 0-1, 2-3, 4-5, 6-7 its four rows.
# Pruning rate 0.4 keeps round(7 · 0.6) = 4 and round(5 · 0.6) = 3 of a layer, or round(12 · 0.6) = 7 of all.
BY_HAND = [
    ("GMP", {}, [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7]]),
    ("resume", {}, [[0, 1, 2, 3, 4, 5, 6], [0, 1, 4, 5, 6]]),
    # |g·w|: hidden 4.5 1 16 6 2 0 3 0, head 1 4 0 0 9 0 6 0; the largest 5 of 16 are 16 9 6 6 4.5
    ("snip", {"density": 0.3}, [[0, 2, 3], [4, 6]]),
    ("prune_uniform", {"pruning_rate": 0.4}, [[3, 4, 5, 6], [1, 4, 5]]),  # 3 4 5 6; 20 30 40
    ("prune_global", {"pruning_rate": 0.4}, [[4, 5, 6], [0, 1, 4, 5]]),  # 0.5 1 1.5 2 3 go
    # hidden regrows 3 by |gradient| among 0 1 2 7: 9 8 7; head 2 among 0 2 3 6 7: 6 5
    ("prune_and_grow_uniform", {"pruning_rate": 0.4}, [[0, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5]]),
    # hidden regrows 4 of 0 1 2 3 7: 9 8 7 2; head the one of 2 3 6 7 with gradient 6
    ("prune_and_grow_global", {"pruning_rate": 0.4}, [[0, 2, 3, 4, 5, 6, 7], [0, 1, 2, 4, 5]]),
]


@pytest.mark.parametrize(("sparse_init", "options", "expected"), BY_HAND, ids=[case[0] for case in BY_HAND])
def test_masks_by_hand(sparse_init, options, expected):
    masking = initialized(eight_weight_layers(), sparse_init, **options)
    assert active(masking) == expected
    counts = [len(positions) for positions in expected]
    assert list(masking.active_counts().values()) == counts
    assert masking.density() == sum(counts) / 16


def filters(masking, name):
    """Active weights of each output filter."""
    return masking.masks[name].flatten(1).sum(dim=1).tolist()


def convolutional():
    """Four filters of norms 5, 1, 3, 2 (the second has a zero weight), a hidden matrix, and a classifier."""
    model = nn.Sequential()
    model.add_module("conv", nn.Conv2d(2, 4, 1, bias=False))
    model.add_module("hidden", nn.Linear(4, 2, bias=False))
    model.add_module("head", nn.Linear(2, 4, bias=False))
    with torch.no_grad():
        model.conv.weight.copy_(torch.tensor([[3.0, 4], [0, 1], [-3, 0.1], [2, 0.1]]).view(4, 2, 1, 1))
        model.hidden.weight.copy_(torch.tensor([[1.0, 1, 1, 1], [9, 9, 9, 9]]))
        model.head.weight.copy_(torch.tensor(HEAD))
    model.conv.weight.grad = torch.tensor([[0.0, 1], [3, 4], [9, 9], [-6, 0]]).view(4, 2, 1, 1)
    model.hidden.weight.grad = torch.ones(2, 4)
    model.head.weight.grad = torch.tensor(HEAD_GRADIENT)
    return model


def test_structured_pruning_by_hand():
    # Half of four filters go, norms 1 and 2; half of two neurons; the classifier keeps its five non-zeros.
    masking = initialized(convolutional(), "prune_structured", pruning_rate=0.5)
    assert filters(masking, "conv.weight") == [2, 0, 2, 0]
    assert filters(masking, "hidden.weight") == [0, 4]
    assert filters(masking, "head.weight") == [2, 0, 2, 1]


def test_structured_pruning_and_growing_by_hand():
    # Removed filters 1 and 3 have gradient norms 5 and 6; filter 2 would have more, but was never removed.
    masking = initialized(convolutional(), "prune_and_grow_structured", pruning_rate=0.5)
    assert filters(masking, "conv.weight") == [2, 2, 2, 2]
    assert filters(masking, "hidden.weight") == [4, 4]
    assert filters(masking, "head.weight") == [2, 0, 2, 1]


def test_structured_growth_takes_the_filter_of_the_largest_gradient():
    model = convolutional()
    with torch.no_grad():
        model.conv.weight[2] = 0  # an empty filter, with the largest gradient: it may grow as well
    # Three filters live, norms 5 1 2; rate 0.3 keeps round(2.1) = 2, so that 1 goes and one grows: number 2.
    masking = initialized(model, "prune_and_grow_structured", pruning_rate=0.3)
    assert filters(masking, "conv.weight") == [2, 0, 2, 2]


@pytest.mark.parametrize("pruning_rate", [0.0, 0.3, 0.6, 1.0])
def test_structured_pruning_keeps_whole_filters_and_the_last_one(pruning_rate):
    model = convolutional()
    nn.init.normal_(model.conv.weight)
    masking = initialized(model, "prune_structured", pruning_rate=pruning_rate)
    kept = filters(masking, "conv.weight")
    assert set(kept) <= {0, 2}
    assert sum(n > 0 for n in kept) == max(1, round(4 * (1 - pruning_rate)))
    strongest = model.conv.weight.flatten(1).norm(dim=1).argmax()
    assert kept[strongest] == 2
    assert sum(n > 0 for n in filters(masking, "hidden.weight")) == max(1, round(2 * (1 - pruning_rate)))


def test_erk_and_uniform_by_hand():
    # 18 of 36 weights. ERK: ε = 18/(4 + 12) fills the 2-by-2 layer up, and the other gets 14.
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(4, 8, bias=False))
    assert list(initialized(model, "ERK").active_counts().values()) == [4, 14]
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(4, 8, bias=False))
    assert list(initialized(model, "uniform").active_counts().values()) == [2, 16]


def test_every_mode_has_a_table_here():
    random, structured = {"ERK", "uniform"}, {"prune_structured", "prune_and_grow_structured"}
    assert {case[0] for case in BY_HAND} | random | structured == set(SPARSE_INITS)


@pytest.mark.parametrize("sparse_init", SPARSE_INITS)
def test_masks_fit_their_weights_and_are_applied(sparse_init):
    model = convolutional()
    nn.init.normal_(model.conv.weight)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masking = initialized(model, sparse_init)
    assert list(masking.masks) == ["conv.weight", "hidden.weight", "head.weight"]
    for name, weight in model.named_parameters():
        mask = masking.masks[name]
        assert mask.dtype == torch.bool
        assert mask.shape == weight.shape
        assert torch.equal(weight, before[name] * mask), "active weights are kept, the others are zero"


@pytest.mark.parametrize("sparse_init", ["ERK", "uniform", "snip"])
@pytest.mark.parametrize("density", [1e-3, 0.05, 0.1, 1 / 3, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("gradient", ["random", "zero"])
def test_the_total_is_exact(sparse_init, density, gradient):
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 7, 1), nn.Linear(63, 11), nn.Linear(11, 3))
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if gradient == "zero" else torch.randn_like(p)
    masking = initialized(model, sparse_init, density)
    size = 135 + 35 + 693 + 33
    assert sum(masking.active_counts().values()) == round(size * density)
    assert masking.density() == round(size * density) / size


@pytest.mark.parametrize("pruning_rate", [0.0, 0.13, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("values", ["distinct", "tied"])
@pytest.mark.parametrize("sparse_init", [name for name in SPARSE_INITS if name.startswith("prune")])
def test_pruning_inits_count_exactly_whatever_ties(sparse_init, pruning_rate, values):
    model = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.Linear(63, 11, bias=False), nn.Linear(11, 3, bias=False))
    generator = torch.Generator().manual_seed(2)
    for p in model.parameters():
        drawn = torch.randn(p.shape, generator=generator)
        drawn[torch.rand(p.shape, generator=generator) < 0.4] = 0
        p.data.copy_(drawn if values == "distinct" else drawn.sign())
        p.grad = torch.randn(p.shape, generator=generator) if values == "distinct" else torch.zeros_like(p)
    alive = [int((p != 0).sum()) for p in model.parameters()]
    if pruning_rate == 1 and sparse_init in ("prune_uniform", "prune_global"):
        with pytest.raises(UsageError, match="none of 861 weights active"):
            initialized(model, sparse_init, pruning_rate=pruning_rate)
        return
    counts = list(initialized(model, sparse_init, pruning_rate=pruning_rate).active_counts().values())
    if sparse_init in ("prune_and_grow_uniform", "prune_and_grow_global"):
        assert counts == alive
    if sparse_init == "prune_uniform":
        assert counts == [round(n * (1 - pruning_rate)) for n in alive]
    if sparse_init == "prune_global":
        assert sum(counts) == round(sum(alive) * (1 - pruning_rate))
    if "structured" in sparse_init:
        assert counts[-1] == alive[-1]


@pytest.mark.parametrize("sparse_init", ["ERK", "uniform"])
def test_random_masks_follow_the_seed_alone(sparse_init):
    def drawn(seed, torch_seed):
        torch.manual_seed(torch_seed)
        model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
        return initialized(model, sparse_init, seed=seed).masks

    first, again, other = drawn(3, 0), drawn(3, 1), drawn(4, 0)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    assert not torch.equal(first["0.weight"], first["1.weight"])


def test_a_regrown_weight_of_the_checkpoint_keeps_its_value():
    model = eight_weight_layers()
    initialized(model, "prune_and_grow_uniform", pruning_rate=0.4)
    # 0 and 2 were pruned and grew back; 7 was zero before; 1 is gone.
    assert model[0].weight.flatten().tolist() == [0.5, 0.0, 2.0, -3.0, 4.0, -5.0, 6.0, 0.0]


def test_the_first_layer_can_stay_dense():
    model = eight_weight_layers()
    masking = initialized(model, "uniform", 0.5, keep_first_dense=True)
    assert list(masking.masks) == ["1.weight"]
    assert masking.density() == 0.5
    assert torch.equal(model[0].weight, torch.tensor(HIDDEN))


@pytest.mark.parametrize("sparse_init", [name for name, init in SPARSE_INITS.items() if init.needs_gradients])
def test_modes_that_read_gradients_say_so(sparse_init):
    with pytest.raises(UsageError, match="backward"):
        initialized(eight_weight_layers(gradients=False), sparse_init)


def test_the_modes_that_need_gradients_are_those_of_the_table():
    growing = {"prune_and_grow_uniform", "prune_and_grow_global", "prune_and_grow_structured"}
    assert {name for name, init in SPARSE_INITS.items() if init.needs_gradients} == {"snip", *growing}
    trained = {"resume", "prune_uniform", "prune_global", "prune_structured"} | growing
    assert {name for name, init in SPARSE_INITS.items() if init.needs_trained_weights} == trained


@pytest.mark.parametrize("pruning_rate", [-0.1, 1.1, float("nan")])
def test_pruning_rates_outside_0_to_1_are_refused(pruning_rate):
    with pytest.raises(UsageError, match="pruning_rate"):
        initialized(eight_weight_layers(), "prune_uniform", pruning_rate=pruning_rate)


def test_unknown_modes_are_refused_with_the_choices():
    with pytest.raises(UsageError, match="prune_and_grow_global"):
        initialized(eight_weight_layers(), "erk")
