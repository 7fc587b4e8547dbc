"""Averaging tickets, pruning back to the budget, and BatchNorm statistics."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparselearning import caa_factor, prune_to_density, superpose, update_bn
from sparselearning.sparse.superpose import AVERAGING, MovingAverage, chooses

# ----------------------------------------------------------------------------------------------- averaging

PREVIOUS = [8.0, -4.0, 0.0, 2.0, 0.0, 1.0, -1.0, 16.0]
TICKET = [0.0, -8.0, 4.0, 2.0, 0.0, -1.0, -3.0, 0.0]


@pytest.mark.parametrize(
    ("factor", "expected"),
    [
        (0.5, [4.0, -6.0, 2.0, 2.0, 0.0, 0.0, -2.0, 8.0]),
        (0.25, [6.0, -5.0, 1.0, 2.0, 0.0, 0.5, -1.5, 12.0]),
        (0.0, PREVIOUS),
        (1.0, TICKET),
    ],
)
def test_superposing_by_hand(factor, expected):
    result = superpose({"w": torch.tensor(PREVIOUS)}, {"w": torch.tensor(TICKET)}, factor)
    assert result["w"].tolist() == expected


def test_factors_by_hand():
    assert [caa_factor(n) for n in (1, 2, 3, 9)] == pytest.approx([1 / 2, 1 / 3, 1 / 4, 1 / 10])
    assert [AVERAGING["CIMA"](0.3)(n) for n in (1, 2, 9)] == [(0.3,)] * 3
    assert [AVERAGING["CAA"](0.3)(n) for n in (1, 2)] == [(1 / 2,), (1 / 3,)]
    assert AVERAGING["greedy"](0.3)(2) == (0, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95)
    assert {name: chooses(name) for name in AVERAGING} == {"CIMA": False, "CAA": False, "greedy": True}


def network(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))
    model(torch.randn(5, 2, 6, 6))
    for _ in range(seed):  # batch counters that differ
        model(torch.randn(2, 2, 6, 6))
    return model.state_dict()


@pytest.mark.parametrize("factor", [0.5, 0.3])
def test_one_superposition_is_the_weighted_mean_of_all_floating_entries(factor):
    previous, ticket = network(1), network(4)
    kept = copy.deepcopy((previous, ticket))
    result = superpose(previous, ticket, factor)
    assert result.keys() == previous.keys()
    for name, value in result.items():
        if value.is_floating_point():  # running statistics included
            expected = (1 - factor) * previous[name].double() + factor * ticket[name].double()
            assert torch.allclose(value.double(), expected, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(value, ticket[name])
            assert not torch.equal(value, previous[name])
        assert value.dtype == ticket[name].dtype
        value.zero_()
    for before, now in zip(kept, (previous, ticket), strict=True):
        assert all(torch.equal(before[name], now[name]) for name in before), "inputs are not changed, nor shared"


def test_caa_of_many_tickets_is_their_plain_mean():
    states = [network(seed) for seed in range(5)]
    result = states[0]
    for n, ticket in enumerate(states[1:], start=1):
        result = superpose(result, ticket, caa_factor(n))
    for name in ("0.weight", "1.running_var", "3.bias"):
        assert torch.allclose(result[name], torch.stack([s[name] for s in states]).mean(0), atol=1e-6)


def test_cima_of_many_tickets_forgets_geometrically():
    # 1 -> 1/8 after three tickets at 0.5; the tickets weigh 1/8, 1/4, 1/2.
    result = {"w": torch.tensor([80.0])}
    for n, value in enumerate((8.0, 40.0, 20.0), start=1):
        result = superpose(result, {"w": torch.tensor([value])}, *AVERAGING["CIMA"](0.5)(n))
    assert result["w"].item() == 80 / 8 + 8 / 8 + 40 / 4 + 20 / 2


def test_a_moving_average_by_hand():
    model = nn.BatchNorm1d(1)
    average = MovingAverage(model, 0.75)
    for value in (8.0, 4.0, 0.0):
        model.weight.data.fill_(value)
        model.running_mean.fill_(2 * value)
        model.num_batches_tracked.add_(1)
        average.update()
    state = average.state()  # 8; 0.75 · 8 + 0.25 · 4 = 7; 0.75 · 7 = 5.25
    assert (state["weight"].item(), state["running_mean"].item(), state["bias"].item()) == (5.25, 10.5, 0)
    assert state["num_batches_tracked"] == 3
    assert model.weight.item() == 0


def test_tied_weights_have_one_moving_average():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    model[1].weight = model[0].weight
    average = MovingAverage(model, 0.5)
    for value in (4.0, 2.0):
        model[0].weight.data.fill_(value)
        average.update()
    assert {name: entry.item() for name, entry in average.state().items()} == {"0.weight": 3, "1.weight": 3}


def test_networks_of_other_names_do_not_superpose():
    with pytest.raises(ValueError, match="extra"):
        superpose({"w": torch.ones(2)}, {"w": torch.ones(2), "extra": torch.ones(1)}, 0.5)


def test_networks_of_other_shapes_do_not_superpose():
    with pytest.raises(ValueError, match=r"architecture.*'a'"):
        superpose({"a": torch.ones(1, 4)}, {"a": torch.zeros(3, 4)}, 0.5)


def test_tied_weights_stay_tied_and_are_pruned_together():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(50, 16)
            self.out = nn.Linear(16, 50)
            self.out.weight = self.embedding.weight

    model = Tied()
    state, masks = prune_to_density(superpose(Tied().state_dict(), model.state_dict(), 0.5), ["embedding.weight"], 0.1)
    assert list(masks) == ["embedding.weight"]
    assert state["out.weight"] is state["embedding.weight"]
    model.load_state_dict(state)
    assert torch.count_nonzero(model.embedding.weight) == 80


def test_one_tensor_under_two_names_meets_two_others():
    one = torch.ones(2)
    state = superpose({"a": torch.zeros(2), "b": torch.full((2,), 5.0)}, {"a": one, "b": one}, 0.5)
    assert (state["a"].tolist(), state["b"].tolist()) == ([0.5, 0.5], [3.0, 3.0])


def test_tied_weights_count_once():
    weight = torch.tensor([1.0, -5.0, 3.0, 2.0])
    state, masks = prune_to_density({"a": weight, "b": weight, "c": torch.tensor([4.0, 0.5])}, ["a", "b", "c"], 0.5)
    assert masks["a"].tolist() == masks["b"].tolist() == [False, True, True, False]
    assert state["c"].tolist() == [4.0, 0.0]
    assert state["b"] is state["a"]


@pytest.mark.parametrize("wrap", [torch.compile, lambda model: nn.Sequential(model)])
def test_the_state_of_a_wrapper_is_refused_in_words(wrap):
    model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="wrapper"):
        prune_to_density(wrap(model).state_dict(), ["weight"], 0.5)


# ---------------------------------------------------------------------------------------- prune to density

# |a| 1 4 2 5 3 6 0 0, |b| 10 20 30 40 2.5 0 0 0
A = [[1.0, -4.0, 2.0, -5.0], [3.0, -6.0, 0.0, 0.0]]
B = [[10.0, -20.0], [30.0, -40.0], [2.5, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("density", "kept_a", "kept_b"),
    [
        (0.25, [], [0, 1, 2, 3]),
        (0.5, [1, 3, 4, 5], [0, 1, 2, 3]),
        (0.5625, [1, 3, 4, 5], [0, 1, 2, 3, 4]),
        (0.01, [], []),  # round(0.16) = 0
    ],
)
def test_pruning_to_a_density_by_hand(density, kept_a, kept_b):
    state = {"a": torch.tensor(A), "bias": torch.tensor([0.001]), "b": torch.tensor(B)}
    before = copy.deepcopy(state)
    pruned, masks = prune_to_density(state, ["a", "b"], density)
    for name, kept in (("a", kept_a), ("b", kept_b)):
        assert masks[name].flatten().nonzero().squeeze(1).tolist() == kept
        assert torch.equal(pruned[name], state[name] * masks[name])
    assert list(pruned) == list(state)
    assert torch.equal(pruned["bias"], state["bias"])
    assert set(masks) == {"a", "b"}
    assert all(torch.equal(state[name], before[name]) for name in state), "the input is not changed"


def test_density_1_keeps_all():
    _, masks = prune_to_density({"a": torch.tensor(A)}, ["a"], 1.0)
    assert masks["a"].all()


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=5),
    density=st.floats(0.001, 1),
    levels=st.integers(0, 4),
    seed=st.integers(0, 2**32),
)
def test_ties_never_change_the_count(sizes, density, levels, seed):
    source = torch.Generator().manual_seed(seed)
    state = {f"{i}": torch.randint(-levels, levels + 1, (n, 1), generator=source).float() for i, n in enumerate(sizes)}
    pruned, masks = prune_to_density(state, state.keys(), density)
    budget = round(sum(sizes) * density)
    assert sum(int(mask.sum()) for mask in masks.values()) == budget
    everything = torch.cat([w.flatten() for w in state.values()]).abs().sort(descending=True).values
    kept = torch.cat([state[name][mask] for name, mask in masks.items()]).abs().sort(descending=True).values
    assert torch.equal(kept, everything[:budget])
    nonzero = sum(int((w != 0).sum()) for w in pruned.values())
    assert nonzero == min(budget, int((everything != 0).sum()))


@pytest.mark.parametrize("density", [0, -1, 1.01, math.nan])
def test_budgets_outside_0_to_1_are_refused(density):
    with pytest.raises(ValueError, match="density"):
        prune_to_density({"a": torch.tensor(A)}, ["a"], density)


# -------------------------------------------------------------------------------------------- BatchNorm


class Net(nn.Module):
    """Every kind of BatchNorm user: affine and not, 1-D and 2-D, frozen statistics, a custom momentum, dropout."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.ReLU(), nn.Dropout(0.2))
        self.flat = nn.BatchNorm1d(64, affine=False)
        self.untracked = nn.BatchNorm1d(64, track_running_stats=False)
        self.head = nn.Sequential(nn.Linear(64, 3), nn.BatchNorm1d(3, momentum=None))

    def forward(self, x):
        return self.head(self.untracked(self.flat(self.features(x).flatten(1))))


def bn_state(model):
    return {name: value for name, value in model.state_dict().items() if "running" in name or "batches" in name}


def batches(kind):
    generator = torch.Generator().manual_seed(5)
    images = [3 + 2 * torch.randn(n, 2, 6, 6, generator=generator) for n in (8, 8, 3)]  # a smaller last batch
    if kind == "tensors":
        return images
    return [(x, torch.zeros(len(x))) for x in images] if kind == "tuples" else [[x, torch.zeros(1)] for x in images]


@pytest.mark.parametrize("kind", ["tensors", "tuples", "lists"])
@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu")])
def test_update_bn_equals_pytorchs(kind, device):
    torch.manual_seed(0)
    ours = Net()
    ours(torch.randn(16, 2, 6, 6))  # statistics to forget
    theirs = copy.deepcopy(ours)
    torch.manual_seed(1)  # for the dropout
    update_bn(batches(kind), ours, device)
    torch.manual_seed(1)
    torch.optim.swa_utils.update_bn(batches(kind), theirs, "cpu")
    found, expected = bn_state(ours), bn_state(theirs)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert found["features.1.num_batches_tracked"] == 3


def test_update_bn_by_hand():
    # Two batches of one channel: means 1 and 5, unbiased variances 2 and 18. Their plain means: 3 and 10.
    model = nn.BatchNorm1d(1)
    model(torch.randn(64, 1) * 100)
    update_bn([torch.tensor([[0.0], [2.0]]), torch.tensor([[2.0], [8.0]])], model)
    assert model.running_mean.item() == pytest.approx(3)
    assert model.running_var.item() == pytest.approx(10)


@pytest.mark.parametrize("training", [True, False])
def test_update_bn_leaves_the_rest_of_the_model_as_it_was(training):
    model = Net().train(training)
    model.features.eval()
    nn.init.ones_(model.head[0].weight)
    modes = [module.training for module in model.modules()]
    parameters = copy.deepcopy(dict(model.named_parameters()))
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    update_bn(batches("tensors"), model)
    assert [module.training for module in model.modules()] == modes
    assert (model.features[1].momentum, model.flat.momentum, model.head[1].momentum) == (0.3, 0.1, None)
    assert all(torch.equal(p, parameters[name]) for name, p in model.named_parameters())
    assert all((p.grad == 7).all() for p in model.parameters())
    assert torch.is_grad_enabled()


def test_update_bn_restores_the_model_when_the_loader_fails():
    def failing():
        yield torch.randn(4, 2, 6, 6)
        raise OSError("disk gone")

    model = Net().eval()
    with pytest.raises(OSError, match="disk gone"):
        update_bn(failing(), model)
    assert not any(module.training for module in model.modules())
    assert model.features[1].momentum == 0.3


def test_update_bn_of_a_model_without_batchnorm_reads_nothing():
    def untouched():
        raise AssertionError("the loader was read")
        yield

    update_bn(untouched(), nn.Linear(2, 2))


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_update_bn_reaches_through_wrappers(wrap):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4))
    wrapped = copy.deepcopy(plain)
    update_bn(batches("tensors"), plain)
    update_bn(batches("tensors"), wrap(wrapped))
    assert torch.allclose(plain[1].running_var, wrapped[1].running_var)
    assert plain[1].num_batches_tracked == wrapped[1].num_batches_tracked == 3


@pytest.mark.parametrize("factor", [-0.1, 1.1, math.nan])
def test_a_factor_outside_its_range_is_refused(factor):
    with pytest.raises(ValueError, match="factor"):
        superpose({"w": torch.zeros(2)}, {"w": torch.ones(2)}, factor)


@pytest.mark.parametrize("loader", [[], iter(())])
def test_batchnorm_statistics_stay_if_there_is_nothing_to_estimate_them_on(loader):
    model = nn.Sequential(nn.BatchNorm1d(2)).eval()
    model(torch.randn(4, 2))
    model[0].running_mean.fill_(3.0)
    before = {name: entry.clone() for name, entry in model.state_dict().items()}
    with pytest.raises(ValueError, match="no batch"):
        update_bn(loader, model)
    assert all(torch.equal(entry, before[name]) for name, entry in model.state_dict().items())
    assert not model.training
    assert model[0].momentum == 0.1
