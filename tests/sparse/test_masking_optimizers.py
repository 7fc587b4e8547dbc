"""Masking under loops and optimizers that know nothing of it: float16 scalers, bare steps, every optimizer."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from helpers.comparing import assert_identical
from helpers.masked_networks import (
    GROW_4,
    OVERFLOW,
    SmallNet,
    active,
    assert_zero_off_the_masks,
    backward,
    eight,
    grad_scaler,
    random_gradients,
    sgd,
    step,
)
from sparselearning import Masking
from sparselearning.process.errors import UsageError
from sparselearning.sparse.optimizer_state import take_step
from sparselearning.sparse.topology import GROWTH

# --------------------------------------------------------------------------------------- float16 training


@pytest.fixture
def garbage():
    """Memory that nothing was written to reads as NaN, not as what an earlier test left there."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("garbage")
@pytest.mark.parametrize("fused", [True, False])
def test_momentum_is_zero_after_a_first_step_that_overflows(fused):
    weight = nn.Parameter(torch.ones(2, 4))
    optimizer, scaler = torch.optim.SGD([weight], lr=1.0, momentum=0.5, fused=fused), grad_scaler()
    for gradient, momentum in ((math.inf, 0.0), (1.0, 1.0), (1.0, 1.5)):
        optimizer.zero_grad()
        scaler.scale((weight * gradient).sum()).backward()
        take_step(optimizer, scaler)
        assert optimizer.state[weight].get("momentum_buffer", torch.zeros(1)).eq(momentum).all()
    assert weight.eq(1 - 1.0 - 1.5).all()


def test_an_update_that_meets_overflow_waits_for_the_next_good_step():
    model, masking = eight([1.0, 2, 3, 4, 0, 0, 0, 0], growth="gradient", prune_rate=0.25)
    masking.update_frequency = 3
    scaler, found = grad_scaler(), []
    for gradient in (GROW_4, GROW_4, OVERFLOW, OVERFLOW, GROW_4, GROW_4, GROW_4):
        step(model, masking, gradient, scaler=scaler)
        found.append(active(masking))
    # Due at 3, done at 5 (1 goes, 4 grows); due again at 6: 4, still zero, goes and comes back.
    assert found == [[0, 1, 2, 3]] * 4 + [[1, 2, 3, 4]] * 3
    assert masking.steps == 7
    assert torch.equal(model.weight.flatten(), torch.tensor([0.0, 2, 3, 4, 0, 0, 0, 0]))


def test_a_scaled_run_equals_an_unscaled_one():
    runs = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=256.0), torch.amp.GradScaler("cpu", enabled=False)):
        model, masking = eight([1.0, 2, 3, 4, 0, 0, 0, 0], lr=0.5, momentum=0.5, growth="momentum", prune_rate=0.5)
        for number in range(8):
            gradient = torch.randn(8, generator=torch.Generator().manual_seed(number))
            step(model, masking, gradient.tolist(), scaler=scaler)
        runs.append((active(masking), model.weight.tolist()))
    assert runs[0] == runs[1] == runs[2]


def test_an_update_waits_when_only_a_bias_overflowed():
    # The scaler skips the whole step, so there is no step for the update to follow.
    model, masking = eight([1.0, 2, 3, 4, 0, 0, 0, 0], growth="gradient", prune_rate=0.25)
    scaler = grad_scaler()
    step(model, masking, GROW_4, bias_gradient=math.inf, scaler=scaler)
    assert active(masking) == [0, 1, 2, 3]
    step(model, masking, GROW_4, scaler=scaler)
    assert active(masking) == [1, 2, 3, 4]


def test_a_skipped_step_ages_no_momentum():
    # Steps with 8 at position 4, then overflow, then 3 at position 5: two steps were made, so 8 · ½ = 4 beats 3.
    model, masking = eight([1.0, 2, 3, 4, 0, 0, 0, 0], momentum=0.5, growth="momentum", prune_rate=0.25)
    masking.update_frequency = 3
    scaler = grad_scaler()
    for gradient in ([0.0, 0, 0, 0, 8, 0, 0, 0], OVERFLOW, [0.0, 0, 0, 0, 0, 3, 0, 0]):
        step(model, masking, gradient, scaler=scaler)
    assert active(masking) == [1, 2, 3, 4]


# ------------------------------------------------------- loops that know nothing of masks, and faults in them


def run_of(advance, steps=10, **options):
    """All that training leaves, with ``advance(masking, number)`` in place of each ``masking.step()``."""
    model = SmallNet()
    masking = Masking(sgd(model), init_density=0.3, update_frequency=3, **options)
    masking.add_module(model)
    for number in range(steps):
        backward(model, number)
        advance(masking, number)
        assert_zero_off_the_masks(model, masking)
    return {"model": model.state_dict(), "optimizer": masking.optimizer.state_dict(), "masking": masking.state_dict()}


def with_closure(masking, number):
    masking.optimizer.step(lambda: torch.zeros(()))


def with_scaler(masking, number):
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.zeros(()))
    scaler.step(masking.optimizer)


@pytest.mark.parametrize("growth", GROWTH)
@pytest.mark.parametrize("advance", [lambda masking, number: masking.optimizer.step(), with_closure, with_scaler])
def test_a_step_of_the_optimizer_alone_is_a_whole_step(advance, growth):
    expected = run_of(lambda masking, number: masking.step(), growth=growth)
    assert expected["masking"]["steps"] == 10
    assert_identical(expected, run_of(advance, growth=growth))


def test_steps_with_and_without_masking_can_be_mixed():
    mixed = run_of(
        lambda masking, number: masking.step(keep_gradients=False) if number % 2 else masking.optimizer.step()
    )
    assert_identical(run_of(lambda masking, number: masking.step()), mixed)


def test_the_masks_hold_as_long_as_the_masking_is_kept():
    model = SmallNet()
    optimizer = sgd(model)
    masking = Masking(optimizer, init_density=0.3)
    masking.add_module(model)
    mask = masking.masks["hidden.weight"]
    backward(model, 0)
    optimizer.step()
    assert not model.hidden.weight[~mask].any()
    del masking
    optimizer.step()
    assert model.hidden.weight[~mask].all()


def test_a_later_masking_takes_the_optimizer_over():
    model = SmallNet()
    optimizer = sgd(model)
    earlier, later = (Masking(optimizer, init_density=0.3, growth="random", seed=seed) for seed in (1, 2))
    earlier.add_module(model)
    later.add_module(model)
    backward(model, 0)
    later.step()
    assert later.density() == 0.3
    assert_zero_off_the_masks(model, later)
    assert earlier.steps == 0
    with pytest.raises(UsageError, match="taken the optimizer over"):
        earlier.step()
    del later
    earlier_mask = earlier.masks["hidden.weight"]
    optimizer.step()
    assert model.hidden.weight[~earlier_mask].any(), "an earlier Masking does not come back"


def test_a_copy_masks_its_own_model():
    model = SmallNet()
    masking = Masking(sgd(model), init_density=0.3, update_frequency=2)
    masking.add_module(model)
    twin, twins = copy.deepcopy((model, masking))
    for number in range(4):
        for network, its in ((model, masking), (twin, twins)):
            backward(network, number)
            its.step()
            assert_zero_off_the_masks(network, its)
    assert_identical(masking.state_dict(), twins.state_dict())
    assert_identical(dict(model.state_dict()), dict(twin.state_dict()))


def replace_a_layer(model):
    model.hidden = nn.Linear(16, 12)


def replace_a_parameter(model):
    model.hidden.weight = nn.Parameter(torch.ones(12, 16))


def remove_a_layer(model):
    del model.hidden


@pytest.mark.parametrize("replace", [replace_a_layer, replace_a_parameter, remove_a_layer])
@pytest.mark.parametrize(
    "use",
    [Masking.step, Masking.density, lambda masking: masking.optimizer.step()],
    ids=["step", "density", "optimizer"],
)
def test_a_replaced_layer_is_noticed(replace, use):
    model = SmallNet()
    masking = Masking(sgd(model), init_density=0.3)
    masking.add_module(torch.compile(model, backend="eager"))
    model.norm = nn.Identity()  # nothing that has a mask
    backward(model, 0)
    use(masking)
    replace(model)
    with pytest.raises(UsageError, match=r"'(hidden|weight)' was replaced after add_module"):
        use(masking)


def test_density_refuses_to_speak_for_weights_that_something_else_has_written():
    model = SmallNet()
    dense = copy.deepcopy(model.state_dict())
    masking = Masking(sgd(model), init_density=0.1, growth="random")
    masking.add_module(model)
    for keep_gradients in (True, False):
        backward(model, 0)
        masking.step(keep_gradients=keep_gradients)
        assert masking.density() == 0.1
        model.load_state_dict(dense)
        with pytest.raises(UsageError, match=r"conv\.weight has \d+ weights where its mask has none"):
            masking.density()
        backward(model, 0)
        masking.step(keep_gradients=keep_gradients)
        assert masking.density() == 0.1
        assert_zero_off_the_masks(model, masking)


@pytest.mark.parametrize("fused", [False, True])
def test_density_notices_the_steps_of_another_optimizer(fused):
    model = SmallNet()
    masking = Masking(sgd(model), init_density=0.1)
    masking.add_module(model)
    backward(model, 0)
    masking.step()
    torch.optim.SGD(model.parameters(), lr=0.05, fused=fused).step()
    with pytest.raises(UsageError, match="something other than this optimizer's steps"):
        masking.density()


def add_noise(optimizer, *_):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad += 1.0


def hook_of_its_own(optimizer):
    return optimizer.register_step_pre_hook(add_noise)


def hook_of_all(optimizer):
    return register_optimizer_step_pre_hook(add_noise)


@pytest.mark.parametrize("register", [hook_of_its_own, hook_of_all])
def test_a_hook_that_changes_gradients_before_the_step_leaves_inactive_weights_at_zero(register):
    model = SmallNet()
    masking = Masking(sgd(model), init_density=0.3)
    masking.add_module(model)
    backward(model, 0)
    masking.step(keep_gradients=False)
    hook = register(masking.optimizer)
    try:
        backward(model, 1)
        masking.step(keep_gradients=False)
    finally:
        hook.remove()
    assert_zero_off_the_masks(model, masking)


def load_dense_momentum(masking, versions):
    state = masking.optimizer.state_dict()
    for kept in state["state"].values():
        kept["momentum_buffer"] = torch.ones_like(kept["momentum_buffer"])
    masking.optimizer.load_state_dict(state)


def write_until_the_versions_are_those_of_the_original(masking, versions):
    for weight, version in zip(masking.parameters.values(), versions, strict=True):
        with torch.no_grad():
            while weight._version < version:
                weight.add_(1.0)


@pytest.mark.parametrize(
    ("is_copy", "write"),
    [
        (False, load_dense_momentum),
        (True, load_dense_momentum),
        (True, write_until_the_versions_are_those_of_the_original),
    ],
)
def test_what_was_written_since_the_last_step_is_masked_again(is_copy, write):
    model = SmallNet()
    masking = Masking(sgd(model), init_density=0.3)
    masking.add_module(model)
    for number in range(3):
        backward(model, number)
        masking.step(keep_gradients=False)
    versions = [weight._version for weight in masking.parameters.values()]
    if is_copy:
        model, masking = copy.deepcopy((model, masking))
    write(masking, versions)
    backward(model, 3)
    masking.step(keep_gradients=False)
    assert_zero_off_the_masks(model, masking)


class Adan(torch.optim.Optimizer):
    """The shape of Adan (Xie et al. 2022): three betas, and three averages of each weight."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.01, "betas": (0.9, 0.8, 0.7)})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                for name, beta in zip(("exp_avg", "exp_avg_diff", "exp_avg_sq"), group["betas"], strict=True):
                    self.state[p].setdefault(name, torch.zeros_like(p)).lerp_(p.grad, 1 - beta)
                p.sub_(self.state[p]["exp_avg"], alpha=group["lr"])


def test_an_optimizer_of_three_betas_is_masked_but_its_momentum_is_unknown():
    model = SmallNet()
    masking = Masking(Adan(model.parameters()), init_density=0.3, update_frequency=2)
    masking.add_module(model)
    for number in range(4):
        backward(model, number)
        masking.step()
        assert assert_zero_off_the_masks(model, masking) == 9
    masking.load_state_dict(masking.state_dict())
    with pytest.raises(UsageError, match="two betas"):
        Masking(Adan(model.parameters()), growth="momentum")


MATRICES_ONLY = {"Muon"}
NO_MASKING = {"LBFGS", "SparseAdam"}  # one is refused; the other takes sparse gradients alone
ALL_OPTIMIZERS = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
)


@pytest.mark.parametrize("optimizer", sorted(set(ALL_OPTIMIZERS) - NO_MASKING))
def test_every_optimizer_keeps_inactive_weights_at_zero(optimizer):
    torch.manual_seed(0)
    bias = optimizer not in MATRICES_ONLY
    model = nn.Sequential(nn.Linear(9, 8, bias=bias), nn.Tanh(), nn.Linear(8, 4, bias=bias))
    masking = Masking(
        getattr(torch.optim, optimizer)(model.parameters(), lr=0.01), init_density=0.3, update_frequency=4
    )
    masking.add_module(model)
    before = copy.deepcopy(model.state_dict())
    for number in range(7):
        random_gradients(model, number)
        masking.step(keep_gradients=False)
        assert masking.density() == round(0.3 * 104) / 104
        assert_zero_off_the_masks(model, masking)
    assert any(not torch.equal(before[name], entry) for name, entry in model.state_dict().items())
