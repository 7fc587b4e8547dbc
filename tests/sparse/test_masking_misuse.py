"""Wrong calls of Masking are refused in a sentence; what looks odd and is right works."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

from helpers.comparing import assert_identical
from helpers.masked_networks import (
    GRADUAL,
    SmallNet,
    active,
    backward,
    counts,
    eight,
    random_gradients,
    same,
    sgd,
    snapshot,
    step,
)
from sparselearning import Masking
from sparselearning.process.errors import UsageError
from sparselearning.sparse.selection import select_largest
from sparselearning.sparse.topology import GROWTH, METHODS, PRUNE, REDISTRIBUTION, Mode

WRONG = [
    ("method", {"method": "RigL"}),
    ("prune", {"prune": "Magnitude"}),
    ("growth", {"growth": ""}),
    ("redistribution", {"redistribution": "zeros"}),
    ("decay_schedule", {"decay_schedule": "exponential"}),
    ("init_density", {"init_density": 0.0}),
    ("init_density", {"init_density": 1.01}),
    ("init_density", {"init_density": math.nan}),
    ("final_density", {"final_density": -0.5}),
    ("final_density", {"final_density": 2.0}),
    ("prune_rate", {"prune_rate": -0.1}),
    ("prune_rate", {"prune_rate": 1.5}),
    ("prune_rate", {"prune_rate": math.nan}),
    ("update_frequency", {"update_frequency": 0}),
    ("update_frequency", {"update_frequency": math.nan}),
    ("update_frequency", {"update_frequency": 12.5}),
    ("update_frequency", {"update_frequency": "100"}),
    (r"update_frequency must be a whole number of at most 3.4e\+38", {"update_frequency": 10**400}),
    ("prune_start_step", {"prune_start_step": -1}),
    ("prune_start_step", {"method": "GraNet", "prune_start_step": math.nan, "prune_end_step": 9}),
    ("prune_end_step", {"method": "GraNet", "prune_end_step": math.nan}),
    ("final_update_step", {"final_update_step": -1}),
    ("prune_end_step", {"method": "GraNet", "prune_end_step": math.inf}),
    ("total_steps", {"decay_schedule": "cosine", "total_steps": 0}),
    ("total_steps", {"decay_schedule": "cosine", "total_steps": math.nan}),
    ("total_steps", {"decay_schedule": "cosine"}),
    ("total_steps", {"decay_schedule": "linear"}),
    *[(name, {"method": name, "prune_end_step": None}) for name in GRADUAL],
    *[("init_density", {"method": n, "init_density": 0.1, "final_density": 0.2, "prune_end_step": 9}) for n in GRADUAL],
    *[("before it starts", {"method": n, "prune_start_step": 5, "prune_end_step": 4}) for n in GRADUAL],
]


@pytest.mark.parametrize(("message", "options"), WRONG)
def test_wrong_options_are_refused(message, options):
    with pytest.raises(UsageError, match=message) as error:
        Masking(sgd(SmallNet()), **options)
    assert isinstance(error.value, ValueError)


def test_a_model_in_place_of_the_optimizer_is_refused():
    with pytest.raises(UsageError, match=r"takes the model's optimizer.*SmallNet"):
        Masking(SmallNet())


def test_lbfgs_is_refused():
    with pytest.raises(UsageError, match="LBFGS"):
        Masking(torch.optim.LBFGS(SmallNet().parameters()))


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("init_density 1e-06", {"init_density": 1e-6}),
        ("density of 1e-06", {"method": "GraNet", "init_density": 0.5, "final_density": 1e-6, "prune_end_step": 9}),
    ],
)
def test_a_budget_that_rounds_to_no_weight_is_refused(message, options):
    model = SmallNet()
    masking = Masking(sgd(model), **options)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError, match=f"{message}.*none of 300 weights|none of 300 weights.*{message}"):
        masking.add_module(model)
    assert_identical(before, dict(model.state_dict()))


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        (12, None),
        (11, "its window ends at step 9, and the last topology update is at step 8 (one in 4 steps, 11 in all)"),
        (3, "no topology update comes"),
        (None, None),
    ],
)
@pytest.mark.parametrize("method", GRADUAL)
def test_gradual_pruning_that_does_not_get_to_its_end_is_told(method, steps, told):
    def make(**options):
        model = SmallNet()
        window = {"update_frequency": 4, "prune_end_step": 9, "total_steps": steps}
        masking = Masking(sgd(model), method=method, final_density=0.1, **window, **options)
        masking.add_module(model)
        return masking

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        masking = make(init_density=0.5)
        make(init_density=0.1)  # has nothing to prune
    assert [str(warning.message) for warning in caught] == ([masking.unfinished_pruning(steps)] if told else [])
    assert all(told in str(warning.message) for warning in caught)
    assert all(warning.filename == __file__ for warning in caught)


@pytest.mark.parametrize("table", [METHODS, PRUNE, GROWTH, REDISTRIBUTION], ids=["method", "prune", "growth", "redis"])
def test_an_unknown_choice_is_answered_with_the_known_ones(table):
    options = {id(METHODS): "method", id(PRUNE): "prune", id(GROWTH): "growth", id(REDISTRIBUTION): "redistribution"}
    with pytest.raises(UsageError) as error:
        Masking(sgd(SmallNet()), **{options[id(table)]: "nonsense"})
    assert all(choice in str(error.value) for choice in [*table, "nonsense"])


@pytest.mark.parametrize(
    "options", [{"growth": "momentum"}, {"growth": "momentum_neuron"}, {"redistribution": "momentum"}]
)
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.0),
        lambda p: torch.optim.RMSprop(p, lr=0.1),
    ],
)
def test_momentum_modes_need_momentum(optimizer, options):
    with pytest.raises(UsageError, match="momentum"):
        Masking(optimizer(SmallNet().parameters()), **options)


def test_momentum_modes_need_a_first_step():
    model = SmallNet()
    masking = Masking(sgd(model), growth="momentum")
    masking.add_module(model)
    with pytest.raises(UsageError, match="step"):
        masking.truncate_weights(0.5)


@pytest.mark.parametrize("growth", ["momentum", "momentum_neuron"])
@pytest.mark.parametrize("optimizer", ["Adamax", "NAdam", "RAdam"])
def test_kin_of_adam_have_momentum_to_grow_by(optimizer, growth):
    model = SmallNet()
    masking = Masking(getattr(torch.optim, optimizer)(model.parameters()), growth=growth, update_frequency=1)
    masking.add_module(model)
    before, size = snapshot(masking), counts(masking)
    for number in range(3):
        backward(model, number)
        masking.step()
    assert counts(masking) == size
    assert not same(masking.masks, before)


def frozen(model):
    model.conv.requires_grad_(False)
    return sgd(model)


def not_in_the_optimizer(model):
    return torch.optim.SGD([*model.hidden.parameters(), *model.head.parameters()], lr=0.05, momentum=0.9)


@pytest.mark.parametrize("growth", ["gradient", "momentum"])
@pytest.mark.parametrize("make", [frozen, not_in_the_optimizer])
def test_weights_that_are_not_trained_are_left_alone_and_named_once(make, growth):
    model = SmallNet()
    before = model.conv.weight.detach().clone()
    masking = Masking(make(model), growth=growth, update_frequency=1, init_density=0.25)
    with pytest.warns(UserWarning, match=r"left alone.*: conv\.weight$") as warnings:
        masking.add_module(model)
    assert [warning.filename for warning in warnings] == [__file__]
    for number in range(3):
        backward(model, number)
        masking.step()
    assert list(masking.masks) == ["hidden.weight", "head.weight"]
    assert masking.density() == 57 / 228
    assert torch.equal(model.conv.weight, before)


def test_a_model_without_any_trained_weight_is_refused():
    model = SmallNet().requires_grad_(False)
    with pytest.raises(UsageError, match="frozen"):
        Masking(sgd(model)).add_module(model)


def test_an_update_refuses_to_prune_a_layer_that_was_frozen_since():
    model = SmallNet()
    masking = Masking(sgd(model), growth="random", update_frequency=2, init_density=0.3)
    masking.add_module(model)
    model.conv.requires_grad_(False)
    before = model.conv.weight.clone()
    backward(model, 0)
    masking.step()
    with pytest.raises(UsageError, match=r"conv\.weight was frozen"):
        masking.step()
    masking.updates_enabled = False
    for _ in range(2):
        masking.step()
    assert torch.equal(model.conv.weight, before)


def test_a_growth_mode_of_ones_own(monkeypatch):
    """Its table entry says what it reads, and that is all there is to do."""

    def grow_agreement(layer, k, generator):
        return select_largest(torch.positive, [(layer.gradient * layer.momentum, ~layer.mask)], k)[0]

    monkeypatch.setitem(GROWTH, "agreement", Mode(grow_agreement, reads_gradient=True, reads_momentum=True))
    with pytest.raises(UsageError, match="momentum"):
        eight([1.0] * 8, growth="agreement")
    model, masking = eight([5.0, 4.0, 3.0, 2.0, 0.0, 0.0, 0.0, 0.0], momentum=0.5, growth="agreement", prune_rate=0.5)
    masking.updates_enabled = False
    step(model, masking, [0, 0, 0, 0, 1.0, -3.0, 2.0, -1.0])
    masking.updates_enabled = True
    # Momentum is now half of that plus the gradient: 1, -2.5, -1, 0.5; the products are 0.5, 2.5, 2, 0.5.
    step(model, masking, [0, 0, 0, 0, 0.5, -1.0, -2.0, 1.0])
    assert active(masking) == [0, 1, 5, 6]


def test_gradient_growth_needs_gradients():
    model = SmallNet()
    masking = Masking(sgd(model), growth="gradient", init_density=0.3)
    masking.add_module(model)
    before = snapshot(masking)
    with pytest.raises(UsageError, match="backward"):
        masking.truncate_weights(0.5)
    assert same(before, masking.masks)


def test_dst_needs_no_window_and_no_final_density():
    Masking(sgd(SmallNet()), method="DST", init_density=0.1, final_density=0.9)


@pytest.mark.parametrize("prune_rate", [-0.1, 1.1, math.nan])
def test_exploration_refuses_rates_outside_0_to_1(prune_rate):
    model = SmallNet()
    masking = Masking(sgd(model))
    masking.add_module(model)
    random_gradients(model, 0)
    with pytest.raises(UsageError, match="prune_rate"):
        masking.truncate_weights(prune_rate)


def test_one_masking_masks_one_model_with_something_to_mask():
    model = SmallNet()
    masking = Masking(sgd(model))
    with pytest.raises(UsageError, match="mask"):
        masking.add_module(nn.BatchNorm2d(3))
    masking.add_module(model)
    with pytest.raises(UsageError, match="one Masking per model"):
        masking.add_module(SmallNet())


@pytest.mark.parametrize(
    "use",
    [
        Masking.step, Masking.density, Masking.active_counts, Masking.explored, Masking.truncate_weights,
        lambda masking: masking.load_state_dict({"masks": {}}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("growth", ["gradient", "random"])
def test_a_masking_without_a_model_says_so(growth, use):
    masking = Masking(torch.optim.SGD(SmallNet().parameters(), lr=0.1), growth=growth)
    with pytest.raises(UsageError, match="add_module"):
        use(masking)


def test_the_optimizer_of_another_model_is_refused():
    masking = Masking(torch.optim.SGD(SmallNet().parameters(), lr=0.1))
    with pytest.raises(UsageError, match="optimizer"):
        masking.add_module(SmallNet())


def test_options_are_given_by_keyword():
    with pytest.raises(TypeError):
        Masking(sgd(SmallNet()), "DST")


@pytest.mark.parametrize("state", [{}, {"masks": {}}, {"masks": 3}])
def test_what_is_no_state_is_refused_in_a_sentence(state):
    model = nn.Linear(4, 4)
    masking = Masking(torch.optim.SGD(model.parameters(), lr=0.1))
    masking.add_module(model)
    before = masking.masks["weight"].clone()
    with pytest.raises(UsageError, match="masks"):
        masking.load_state_dict(state)
    assert torch.equal(masking.masks["weight"], before)
