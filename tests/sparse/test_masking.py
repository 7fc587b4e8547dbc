"""Masking: what holds after every step, against eight weights by hand and against a plain reference."""

import copy
import io
import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from sparselearning import Masking, gradual_density
from sparselearning.process.errors import UsageError
from sparselearning.process.seeding import derive_seed
from sparselearning.sparse.distributions import erk_densities, layer_counts
from sparselearning.sparse.optimizer_state import take_step
from sparselearning.sparse.selection import select_largest
from sparselearning.sparse.topology import GROWTH, METHODS, PRUNE, REDISTRIBUTION, Mode

GRADUAL = [name for name in METHODS if name != "DST"]


class EightWeights(nn.Module):
    """One layer of eight weights, whose gradient is whatever a test says, and a bias."""

    def __init__(self, weights):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weights).view(2, 4))
        self.bias = nn.Parameter(torch.zeros(2))

    def loss(self, gradient, bias_gradient=0.0):
        return (self.weight * torch.tensor(gradient).view(2, 4)).sum() + (self.bias * bias_gradient).sum()


def eight(weights, lr=0.0, momentum=0.0, **options):
    """A network of eight weights whose non-zeros are its mask; lr 0 leaves the weights where they are."""
    model = EightWeights(weights)
    masking = Masking(torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum), update_frequency=1, **options)
    masking.add_module(model, "resume")
    return model, masking


def step(model, masking, gradient, bias_gradient=0.0, scaler=None):
    masking.optimizer.zero_grad()
    loss = model.loss(gradient, bias_gradient)
    (scaler.scale(loss) if scaler else loss).backward()
    masking.step(scaler) if scaler else masking.step()


def active(masking, name="weight"):
    return masking.masks[name].flatten().nonzero().squeeze(1).tolist()


class SmallNet(nn.Module):
    """A convolution, a hidden layer and a classifier; smooth, so that no gradient is exactly zero."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.hidden = nn.Linear(16, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.hidden(torch.tanh(self.norm(self.conv(x))).flatten(1))))


NAMES = ["conv.weight", "hidden.weight", "head.weight"]
SIZES = {"conv.weight": 72, "hidden.weight": 192, "head.weight": 36}
SIZE = 300


def batch(number, dtype=torch.float32, samples=8):
    generator = torch.Generator().manual_seed(1000 + number)
    images = torch.randn(samples, 2, 4, 4, generator=generator, dtype=dtype)
    return images, torch.randint(3, (samples,), generator=generator)


def backward(model, number, dtype=torch.float32):
    model.zero_grad()
    images, labels = batch(number, dtype)
    nn.functional.cross_entropy(model(images), labels).backward()


def random_gradients(model, number):
    """Stand-in for a backward pass: different random gradients for every number."""
    generator = torch.Generator().manual_seed(number)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def sgd(model, momentum=0.9, lr=0.05):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)


def counts(masking):
    return {name: int(mask.sum()) for name, mask in masking.masks.items()}


def snapshot(masking):
    return {name: mask.clone() for name, mask in masking.masks.items()}


def same(masks, others):
    return masks.keys() == others.keys() and all(torch.equal(masks[name], others[name]) for name in masks)


def assert_zero_off_the_masks(model, masking):
    parameters = dict(model.named_parameters())
    seen = 0
    for name, mask in masking.masks.items():
        assert not parameters[name][~mask].any()
        for state in masking.optimizer.state[parameters[name]].values():
            if torch.is_tensor(state) and state.shape == mask.shape:
                assert not state[~mask].any()
                seen += 1
    return seen


# --------------------------------------------------------------------------------------- eight weights


def test_one_rigl_update_by_hand():
    # ceil(0.5 · 4) = 2 go: 1 and -2. The largest |gradient| among 0 1 4 5 6 7: 9 at 0, which keeps its value and its
    # momentum, and 7 at 5, which starts at zero without momentum, though the gradient put 7 into it.
    model, masking = eight([1.0, -2, 3, -4, 0, 0, 0, 0], momentum=0.9, growth="gradient", prune_rate=0.5)
    step(model, masking, [9.0, 1, 20, 30, -5, -7, 6, 0])
    assert active(masking) == [0, 2, 3, 5]
    assert model.weight.flatten().tolist() == [1, 0, 3, -4, 0, 0, 0, 0]
    buffer = masking.optimizer.state[model.weight]["momentum_buffer"]
    assert buffer.flatten().tolist() == [9, 0, 20, 30, 0, 0, 0, 0]


def test_the_update_reads_weights_after_the_step():
    # lr 1 turns (1, 2, 3, 4) into (11, 12, 3, 4): 3 and 4 go, not 1 and 2.
    model, masking = eight([1.0, 2, 3, 4, 0, 0, 0, 0], lr=1.0, growth="gradient", prune_rate=0.5)
    step(model, masking, [-10.0, -10, 0, 0, 1, 2, 3, 4])
    assert active(masking) == [0, 1, 6, 7]
    assert model.weight.flatten().tolist() == [11, 12, 0, 0, 0, 0, 0, 0]


def test_momentum_growth_ranks_what_dense_training_would_hold():
    # Position 4 had 8 once: 8 · 0.5 · 0.5 = 2. Position 5 has 1 in every step: 1 + 0.5 + 0.25 = 1.75. The last
    # gradient alone would choose 6, and off-mask buffers that are forgotten at every step would, too.
    model, masking = eight([1.0, 2, 3, 4, 0, 0, 0, 0], momentum=0.5, growth="momentum", prune_rate=0.25)
    masking.updates_enabled = False
    step(model, masking, [0.0, 0, 0, 0, 8, 1, 0, 0])
    step(model, masking, [0.0, 0, 0, 0, 0, 1, 0, 0])
    masking.updates_enabled = True
    step(model, masking, [0.0, 0, 0, 0, 0, 1, -1.5, 0])
    assert active(masking) == [1, 2, 3, 4]
    assert not masking.optimizer.state[model.weight]["momentum_buffer"].any(), "a new weight has no momentum"
    # It starts anew: after another step, its momentum is that step's gradient.
    step(model, masking, [0.0, 0, 0, 0, 3, 0, 0, 0])
    assert masking.optimizer.state[model.weight]["momentum_buffer"].flatten()[4] == 3


def test_a_removed_weight_takes_its_momentum_along():
    # 1 goes with momentum 9 and comes back with it: 9 is the largest off the mask.
    model, masking = eight([1.0, 2, 3, 4, 0, 0, 0, 0], momentum=0.5, growth="momentum", prune_rate=0.25)
    step(model, masking, [9.0, 0, 0, 0, 8, 0, 0, 0])
    assert active(masking) == [0, 1, 2, 3]
    assert model.weight.flatten().tolist() == [1, 2, 3, 4, 0, 0, 0, 0]


def test_adam_momentum_is_divided_by_its_root_mean_square():
    # After gradients g1, g2 with betas ½, ½: m = g1/4 + g2/2, v = g1²/4 + g2²/2. Position 4: 100, 0: 25/50 = 0.5.
    # Position 5: 1, 1: 0.75/0.866 = 0.87. Position 6: 0, 1: 0.5/0.707 = 0.71. The plain m would choose 4.
    model = EightWeights([1.0, 2, 3, 4, 0, 0, 0, 0])
    adam = torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.5, 0.5))
    masking = Masking(adam, growth="momentum", prune_rate=0.25, update_frequency=2)
    masking.add_module(model, "resume")
    step(model, masking, [0.0, 0, 0, 0, 100, 1, 0, 0])
    step(model, masking, [0.0, 0, 0, 0, 0, 1, 1, 0])
    assert active(masking) == [1, 2, 3, 5]


def test_gradual_pruning_by_hand():
    # 8 -> 2 weights over steps 1 to 3: density 0.25 + 0.75 · (1, 1/8, 0) = 1, 0.34375 (2.75 -> 3), 0.25.
    model, masking = eight(
        [1.0, -2, 3, -4, 5, -6, 7, -8],
        method="GMP",
        init_density=1.0,
        final_density=0.25,
        prune_start_step=1,
        prune_end_step=3,
    )
    found = []
    for _ in range(5):
        step(model, masking, [9.0] * 8)
        found.append(active(masking))
    assert found == [[0, 1, 2, 3, 4, 5, 6, 7], [5, 6, 7], [6, 7], [6, 7], [6, 7]]
    assert model.weight.flatten().tolist() == [0, 0, 0, 0, 0, 0, 7, -8]


def test_granet_prunes_then_regrows_by_hand():
    # Density 0.5 at once: 1 to 4 go. Then ceil(0.5 · 4) = 2 of 5 6 7 8 go, and two of the six grow by gradient:
    # 9 at 1, gone in the first half, and 8 at 5, gone in the second. Both keep their values.
    model, masking = eight(
        [1.0, -2, 3, -4, 5, -6, 7, -8], method="GraNet", init_density=1.0, final_density=0.5, prune_end_step=0
    )
    step(model, masking, [1.0, 9, 1, 1, 1, 8, 1, 1])
    assert active(masking) == [1, 5, 6, 7]
    assert model.weight.flatten().tolist() == [0, -2, 0, 0, 0, -6, 7, -8]


# -------------------------------------------------------------------------- what holds after every step

OPTIMIZERS = {
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=5e-4),
    "SGD Nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=1e-2),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.1),
}


@pytest.mark.parametrize("growth", GROWTH)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_masked_weights_and_their_state_are_exactly_zero(optimizer, growth):
    model = SmallNet()
    arguments = {"growth": growth, "init_density": 0.3, "update_frequency": 3, "prune_rate": 0.5}
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    if growth.startswith("momentum") and isinstance(optimizer, torch.optim.Adagrad):
        with pytest.raises(UsageError, match="momentum"):
            Masking(optimizer, **arguments)
        return
    masking = Masking(optimizer, **arguments)
    masking.add_module(model, "ERK")
    for number in range(10):
        before = snapshot(masking)
        backward(model, number)
        masking.step()
        assert assert_zero_off_the_masks(model, masking) >= len(NAMES)
        assert sum(counts(masking).values()) == 90
        assert same(before, masking.masks) == ((number + 1) % 3 != 0)
        for name, mask in masking.masks.items():
            weight = model.get_parameter(name)
            new = mask & ~before[name]
            assert not weight[new].any(), "a new weight starts at zero"
            for state in masking.optimizer.state[weight].values():
                assert not torch.is_tensor(state) or state.shape != weight.shape or not state[new].any()
    masking.truncate_weights(0.8)
    assert_zero_off_the_masks(model, masking)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("optimizer", "growth"),
    [*((name, "gradient") for name in OPTIMIZERS), ("Adam", "momentum"), ("SGD momentum", "momentum")],
)
def test_masked_gradients_train_as_masked_weights_do(optimizer, growth):
    def train(keep_gradients):
        model = SmallNet()
        masking = Masking(
            OPTIMIZERS[optimizer](model.parameters()), growth=growth, init_density=0.3, update_frequency=3
        )
        masking.add_module(model)
        for number in range(10):
            backward(model, number)
            given = {name: p.grad.clone() for name, p in model.named_parameters()}
            masking.step(keep_gradients=keep_gradients)
            assert assert_zero_off_the_masks(model, masking) >= len(NAMES)
            for name, mask in masking.masks.items():
                kept, masked = given[name], given[name] * mask
                if keep_gradients or masking.steps in (1, 3, 6, 9) or growth == "momentum":
                    assert torch.equal(model.get_parameter(name).grad, kept)
                else:
                    assert torch.equal(model.get_parameter(name).grad, masked)
        return {"model": model.state_dict(), "optimizer": masking.optimizer.state_dict(), "masks": masking.state_dict()}

    assert_identical(train(keep_gradients=True), train(keep_gradients=False))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, -0.0])
def test_masking_leaves_plus_zero_whatever_stood_there(value):
    model, masking = eight([1.0, 2, 3, 4, 0, 0, 0, 0], lr=1.0, momentum=0.9, growth="random")
    masking.updates_enabled = False
    step(model, masking, [0.0, 0, 0, 0, value, value, 0, 0])
    buffer = masking.optimizer.state[model.weight]["momentum_buffer"]
    for tensor in (model.weight, buffer):
        assert tensor.flatten()[4:].tolist() == [0.0] * 4
        assert not tensor.flatten()[4:].signbit().any()
    assert model.weight.flatten()[:4].tolist() == [1, 2, 3, 4]


def scheduled(method, steps, frequency, window, init, final):
    """Density after ``steps`` steps, by the description: what the last update left."""
    last = steps // frequency * frequency
    if method == "DST" or last < max(window[0], 1):
        return init
    return gradual_density(last, *window, init, final)


@pytest.mark.parametrize("growth", GROWTH)
@pytest.mark.parametrize("prune", PRUNE)
@pytest.mark.parametrize("method", METHODS)
def test_density_is_exact_after_every_step(method, prune, growth):
    for redistribution in REDISTRIBUTION if METHODS[method].grows else ["none"]:
        model = SmallNet()
        masking = Masking(
            sgd(model),
            method=method,
            prune=prune,
            growth=growth,
            redistribution=redistribution,
            prune_rate=0.37,
            update_frequency=2,
            init_density=0.61,
            final_density=0.13,
            prune_start_step=3,
            prune_end_step=9,
        )
        masking.add_module(model, "ERK")
        previous = snapshot(masking)
        for number in range(1, 13):
            random_gradients(model, number)
            masking.step()
            density = scheduled(method, number, 2, (3, 9), 0.61, 0.13)
            assert sum(counts(masking).values()) == round(SIZE * density)
            assert masking.density() == round(SIZE * density) / SIZE
            quiet = number % 2 == 1 or (method != "DST" and number < 3)
            assert not quiet or same(previous, masking.masks)
            if not METHODS[method].grows:
                assert not any((masking.masks[name] & ~previous[name]).any() for name in NAMES)
            previous = snapshot(masking)
        masking.truncate_weights(0.7)
        assert masking.density() == round(SIZE * density) / SIZE
        assert masking.active_counts() == counts(masking)
        assert_zero_off_the_masks(model, masking)


@pytest.mark.parametrize("prune", PRUNE)
@pytest.mark.parametrize("weights", ["zero", "equal"])
@pytest.mark.parametrize("method", ["DST", "GraNet", "GraNet_uniform"])
def test_density_is_exact_where_everything_ties(method, weights, prune):
    for growth in GROWTH:
        model = SmallNet()
        for p in model.parameters():
            p.data.fill_(0.0 if weights == "zero" else 0.25)
            p.grad = torch.zeros_like(p)
        masking = Masking(
            sgd(model), method=method, prune=prune, growth=growth, update_frequency=1,
            init_density=0.5, final_density=0.07, prune_end_step=3,
        )  # fmt: skip
        masking.add_module(model, "uniform")
        for number in range(1, 6):
            masking.step()
            density = scheduled(method, number, 1, (0, 3), 0.5, 0.07)
            assert sum(counts(masking).values()) == round(SIZE * density)


@pytest.mark.parametrize("method", GRADUAL)
@pytest.mark.parametrize("frequency", [1, 3, 5])
@pytest.mark.parametrize("window", [(0, 7), (4, 7), (7, 7), (5, 11), (40, 50)])
def test_gradual_methods_keep_to_their_window(method, frequency, window):
    model = SmallNet()
    masking = Masking(
        sgd(model), method=method, update_frequency=frequency, init_density=0.5, final_density=1 / 7,
        prune_start_step=window[0], prune_end_step=window[1],
    )  # fmt: skip
    masking.add_module(model, "uniform")
    first = snapshot(masking)
    final_count = round(SIZE / 7)
    for number in range(1, 21):
        random_gradients(model, number)
        masking.step()
        if number < window[0]:
            assert same(first, masking.masks), "nothing before the first pruning step"
        if number // frequency * frequency >= window[1]:
            assert sum(counts(masking).values()) == final_count, "from the first update after the last step, for ever"
        else:
            assert sum(counts(masking).values()) >= final_count


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].grows])
def test_methods_that_grow_go_on_after_the_window(method):
    model = SmallNet()
    masking = Masking(
        sgd(model), method=method, update_frequency=1, init_density=0.2, final_density=0.2, prune_end_step=1
    )
    masking.add_module(model, "uniform")
    for number in range(1, 6):
        before = snapshot(masking)
        random_gradients(model, number)
        masking.step()
        assert not same(before, masking.masks)


@pytest.mark.parametrize("method", ["GraNet_uniform", "GMP_uniform"])
def test_uniform_methods_hold_every_layer_at_the_density(method):
    model = SmallNet()
    masking = Masking(
        sgd(model), method=method, update_frequency=1, init_density=0.8, final_density=0.05, prune_end_step=12
    )
    masking.add_module(model, "uniform")
    for number in range(1, 15):
        random_gradients(model, number)
        masking.step()
        density, found = gradual_density(number, 0, 12, 0.8, 0.05), counts(masking)
        total = round(SIZE * density)
        assert sum(found.values()) == total
        if density < 0.2:
            assert found["head.weight"] == round(0.2 * 36)
            density = (total - found["head.weight"]) / (SIZE - 36)
        assert all(abs(n - density * SIZES[name]) < 1 for name, n in found.items() if name != "head.weight")
        if density >= 0.2:
            assert abs(found["head.weight"] - density * 36) < 1


def test_updates_come_at_multiples_of_the_frequency_and_can_be_stopped():
    model = SmallNet()
    masking = Masking(sgd(model), update_frequency=4, init_density=0.3)
    masking.add_module(model)
    changed = []
    for number in range(1, 17):
        masking.updates_enabled = not 6 <= number <= 12
        before = snapshot(masking)
        random_gradients(model, number)
        masking.step()
        if not same(before, masking.masks):
            changed.append(number)
    assert changed == [4, 16]
    assert masking.steps == 16


@pytest.mark.parametrize(("end", "changed"), [(None, [4, 8, 12, 16]), (11, [4, 8]), (8, [4, 8]), (0, [])])
def test_prune_and_grow_ends_at_the_final_update_step(end, changed):
    model = SmallNet()
    masking = Masking(sgd(model), update_frequency=4, init_density=0.3, final_update_step=end)
    masking.add_module(model)
    needed, priced = [], []
    for number in range(1, 17):
        before = snapshot(masking)
        needed += [number] * masking.needs_dense_gradients
        priced += [number] * (masking.sparse_steps is not None)
        assert masking.update_due == masking.needs_dense_gradients
        random_gradients(model, number)
        masking.step()
        assert same(before, masking.masks) == (number not in changed)
    assert needed == changed
    assert priced == list(range(1, 1 + (16 if end is None else end)))
    before = snapshot(masking)
    random_gradients(model, 17)
    masking.truncate_weights(0.3)
    assert not same(before, masking.masks), "exploring goes on"


def test_gradual_pruning_goes_on_after_the_final_update_step():
    model = SmallNet()
    masking = Masking(
        sgd(model), method="GraNet", update_frequency=1, init_density=0.8, final_density=0.2, prune_start_step=2,
        prune_end_step=9, final_update_step=4,
    )  # fmt: skip
    masking.add_module(model)
    for number in range(1, 12):
        before = snapshot(masking)
        assert (masking.update_due, masking.needs_dense_gradients) == (number >= 2, 2 <= number <= 4)
        random_gradients(model, number)
        masking.step()
        grown = any((masking.masks[name] & ~mask).any() for name, mask in before.items())
        assert grown == (2 <= number <= 4)
        assert sum(counts(masking).values()) == round(SIZE * gradual_density(number, 2, 9, 0.8, 0.2))


def test_add_module_draws_erk_by_default():
    model = SmallNet()
    masking = Masking(sgd(model), init_density=0.3)
    masking.add_module(model)
    shapes = {name: tuple(model.get_parameter(name).shape) for name in NAMES}
    assert counts(masking) == layer_counts(shapes, erk_densities(shapes, 0.3), 0.3)


# -------------------------------------------------------------------- against a reference written plainly


class Reference:
    """The same training, spelled out with full sorts: a twin model, its own masks, its own dense momentum."""

    def __init__(self, model, optimizer, masks, growth, rate):
        self.model, self.optimizer = copy.deepcopy(model), None
        self.optimizer = optimizer(self.model.parameters())
        self.masks = {name: mask.clone() for name, mask in masks.items()}
        self.growth, self.rate = growth, rate
        self.first = {name: torch.zeros(mask.shape, dtype=torch.float64) for name, mask in masks.items()}
        self.second = {name: value.clone() for name, value in self.first.items()}

    def apply(self):
        for name, mask in self.masks.items():
            weight = self.model.get_parameter(name)
            weight.data *= mask
            for state in self.optimizer.state[weight].values():
                if torch.is_tensor(state) and state.shape == mask.shape:
                    state *= mask

    def step(self, number, update, density=None):
        backward(self.model, number, torch.float64)
        for name in self.masks:
            gradient = self.model.get_parameter(name).grad
            if isinstance(self.optimizer, torch.optim.SGD):
                self.first[name] = 0.9 * self.first[name] + gradient
            else:
                self.first[name] = 0.9 * self.first[name] + 0.1 * gradient
                self.second[name] = 0.999 * self.second[name] + 0.001 * gradient**2
        self.optimizer.step()
        self.apply()
        if update:
            before = {name: mask.clone() for name, mask in self.masks.items()}
            if density is not None:
                self.prune(density)
            self.prune_and_grow()
            for name, mask in self.masks.items():
                self.first[name][mask & ~before[name]] = 0
                self.second[name][mask & ~before[name]] = 0
            self.apply()

    def prune(self, density):
        magnitudes = [
            (abs(self.model.get_parameter(name).flatten()[i].item()), name, i)
            for name, mask in self.masks.items()
            for i in mask.flatten().nonzero().flatten().tolist()
        ]
        for _, name, i in sorted(magnitudes)[: len(magnitudes) - round(SIZE * density)]:
            self.masks[name].view(-1)[i] = False

    def prune_and_grow(self):
        for name, mask in self.masks.items():
            flat, weight = mask.view(-1), self.model.get_parameter(name)
            magnitude = weight.detach().flatten().abs()
            smallest = sorted(flat.nonzero().flatten().tolist(), key=lambda i: magnitude[i].item())
            removed = smallest[: math.ceil(self.rate * len(smallest))]
            flat[removed] = False
            score = self.score(name, weight).flatten().abs()
            largest = sorted((~flat).nonzero().flatten().tolist(), key=lambda i: -score[i].item())
            flat[largest[: len(removed)]] = True

    def score(self, name, weight):
        if self.growth == "gradient":
            return weight.grad
        if isinstance(self.optimizer, torch.optim.SGD):
            return self.first[name]
        return self.first[name] / (self.second[name].sqrt() + 1e-8)


REFERENCE_OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
}


@pytest.mark.parametrize("method", ["DST", "GraNet"])
@pytest.mark.parametrize("growth", ["gradient", "momentum"])
@pytest.mark.parametrize("optimizer", REFERENCE_OPTIMIZERS)
def test_training_equals_the_reference(optimizer, growth, method):
    model = SmallNet().double()
    make = REFERENCE_OPTIMIZERS[optimizer]
    masking = Masking(
        make(model.parameters()), method=method, growth=growth, prune_rate=0.4, update_frequency=2,
        init_density=0.5, final_density=0.2, prune_end_step=8,
    )  # fmt: skip
    masking.add_module(model, "ERK")
    reference = Reference(model, make, masking.masks, growth, 0.4)
    for number in range(1, 15):
        backward(model, number, torch.float64)
        masking.step()
        density = gradual_density(number, 0, 8, 0.5, 0.2) if method == "GraNet" else None
        reference.step(number, number % 2 == 0, density)
        assert same(reference.masks, masking.masks)
        for (name, found), expected in zip(model.named_parameters(), reference.model.parameters(), strict=True):
            assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12), name
            for key, state in reference.optimizer.state[expected].items():
                assert torch.allclose(masking.optimizer.state[found][key], state, rtol=1e-9, atol=1e-12), (name, key)


def test_momentum_neuron_growth_takes_the_top_of_each_neuron():
    model = SmallNet().double()
    masking = Masking(sgd(model), growth="momentum_neuron", prune_rate=0.5, update_frequency=3, init_density=0.4)
    masking.add_module(model, "uniform")
    dense = {name: torch.zeros_like(model.get_parameter(name)) for name in NAMES}
    for number in range(1, 4):
        before = snapshot(masking)
        backward(model, number, torch.float64)
        for name in NAMES:
            dense[name] = 0.9 * dense[name] + model.get_parameter(name).grad
        masking.step()
    for name in NAMES:
        new, off = masking.masks[name] & ~before[name], ~masking.masks[name]
        for momentum, grown, left in zip(dense[name].abs().flatten(1), new.flatten(1), off.flatten(1), strict=True):
            assert not grown.any() or not left.any() or momentum[grown].min() >= momentum[left].max()


# ----------------------------------------------------------------------------------- growth at random


def test_random_growth_does_not_look_at_the_gradient():
    def trajectory(gradient_seed, scale):
        model = SmallNet()
        masking = Masking(sgd(model, lr=0.0), growth="random", update_frequency=1, init_density=0.3, seed=5)
        masking.add_module(model, "ERK")
        masks = [snapshot(masking)]
        for number in range(6):
            random_gradients(model, gradient_seed + number)
            for p in model.parameters():
                p.grad *= scale
            masking.step()
            masks.append(snapshot(masking))
        return masks

    first = trajectory(0, 1.0)
    assert not any(same(before, after) for before, after in itertools.pairwise(first))
    for other in (trajectory(500, 1.0), trajectory(0, 0.0), trajectory(0, -1e6)):
        assert all(same(a, b) for a, b in zip(first, other, strict=True))


def test_random_growth_is_uniform_over_seeds_and_updates():
    # 1 is removed; one of 0 4 5 6 7 grows. The gradient shouts for 4.
    hits, draws = Counter(), 0
    for seed in range(300):
        model, masking = eight([1.0, 2, 3, 4, 0, 0, 0, 0], growth="random", prune_rate=0.25, seed=seed)
        for _ in range(3):
            masking.masks["weight"].copy_(torch.tensor([1, 1, 1, 1, 0, 0, 0, 0]).view(2, 4))
            model.weight.data = torch.tensor([[1.0, 2, 3, 4], [0, 0, 0, 0]])
            step(model, masking, [0.0, 0, 0, 0, 1000, 0, 0, 0])
            (grown,) = set(active(masking)) - {1, 2, 3}
            hits[grown] += 1
            draws += 1
    assert set(hits) == {0, 4, 5, 6, 7}
    assert all(abs(n - draws / 5) < 4 * math.sqrt(draws * 0.2 * 0.8) for n in hits.values())


def test_layers_and_updates_draw_from_different_places():
    model = nn.Sequential(nn.Linear(20, 20, bias=False), nn.Linear(20, 20, bias=False))
    start = torch.zeros(20, 20)
    start[:5] = torch.arange(1, 101).view(5, 20)
    for p in model.parameters():
        p.data.copy_(start)
    masking = Masking(sgd(model, lr=0.0), growth="random", prune_rate=0.5, seed=1)
    masking.add_module(model, "resume")
    grown = []
    for _ in range(2):
        for p, mask in zip(model.parameters(), masking.masks.values(), strict=True):
            p.data.copy_(start)
            mask.copy_(start != 0)
        masking.truncate_weights()
        grown += [mask & (start == 0) for mask in masking.masks.values()]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(grown, 2))


@pytest.mark.parametrize("growth", GROWTH)
def test_masking_leaves_the_global_random_state_alone(growth):
    model = SmallNet()
    masking = Masking(sgd(model), growth=growth, update_frequency=1, init_density=0.3)
    random_gradients(model, 0)
    state = torch.get_rng_state()
    masking.add_module(model)
    masking.step()
    masking.truncate_weights(0.5)
    assert torch.equal(state, torch.get_rng_state())


def test_derived_seeds_are_reproducible_distinct_and_in_range():
    assert derive_seed(17, "growth", 3) == derive_seed(17, "growth", 3)
    seeds = {derive_seed(seed, use, n) for seed in range(20) for use in ("growth", "masks") for n in range(20)}
    assert len(seeds) == 800
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert derive_seed("1") != derive_seed(1)


def test_numpys_integers_are_seeds_as_pythons_are():
    assert derive_seed(np.int64(3), "growth") == derive_seed(3, "growth")
    model, file = SmallNet(), io.BytesIO()
    masking = Masking(sgd(model), seed=np.int64(3))
    masking.add_module(model)
    torch.save(masking.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["seed"] == 3


# ------------------------------------------------------------------------------------ exploring by call


def test_truncate_weights_explores_now_and_counts_nothing():
    model = SmallNet()
    masking = Masking(sgd(model, lr=0.0), method="GraNet", init_density=0.5, final_density=0.1, prune_end_step=100)
    masking.add_module(model, "ERK")
    masking.updates_enabled = False
    random_gradients(model, 0)
    masking.step()
    before, found = snapshot(masking), counts(masking)
    weights = {name: model.get_parameter(name).detach().clone() for name in NAMES}
    masking.truncate_weights(prune_rate=0.8)
    assert masking.steps == 1
    assert counts(masking) == found
    for name, mask in masking.masks.items():
        k = math.ceil(0.8 * found[name])
        kept = weights[name][before[name]].abs().sort().values[k:]
        candidates = ~before[name] | (weights[name].abs() < kept.min() if len(kept) else True)
        top = model.get_parameter(name).grad[candidates].abs().sort(descending=True).values[:k]
        grown = mask & candidates
        assert int(grown.sum()) == k
        assert model.get_parameter(name).grad[grown].abs().min() == top[-1]
        assert torch.equal(model.get_parameter(name), weights[name] * mask)


@pytest.mark.parametrize("decay_schedule", ["constant", "cosine", "linear"])
def test_the_prune_rate_follows_its_schedule(decay_schedule):
    model = SmallNet()
    masking = Masking(sgd(model), prune_rate=0.4, decay_schedule=decay_schedule, total_steps=4, init_density=0.3)
    masking.add_module(model)
    rates = [masking.current_prune_rate()]
    for number in range(5):
        random_gradients(model, number)
        masking.step()
        rates.append(masking.current_prune_rate())
    expected = {
        "constant": [0.4] * 6,
        "cosine": [0.005 + 0.395 * (1 + math.cos(math.pi * n / 4)) / 2 for n in (0, 1, 2, 3, 4, 4)],
        "linear": [0.4, 0.3, 0.2, 0.1, 0.0, 0.0],
    }
    assert rates == pytest.approx(expected[decay_schedule])


def removed_shares(updates, weights_of, prune_rate=0.3):
    """Share of active weights that each update of threshold pruning removes, with fresh weights for every one."""
    model = nn.Linear(100, 60, bias=False)
    masking = Masking(
        sgd(model, lr=0.0), prune="threshold", prune_rate=prune_rate, init_density=0.5, update_frequency=1
    )
    masking.add_module(model, "uniform")
    model.weight.grad = torch.zeros_like(model.weight)
    shares = []
    for number in range(updates):
        before = masking.masks["weight"].clone()
        generator = torch.Generator().manual_seed(number)
        model.weight.data = before * weights_of(number, torch.randn(60, 100, generator=generator))
        # Growth takes what it lost from where the gradient is not: what was removed stays away.
        model.weight.grad = torch.where(before, 0.0, 1.0)
        masking.step()
        shares.append(1 - (masking.masks["weight"] & before).sum().item() / before.sum().item())
    return shares


def test_threshold_pruning_tracks_the_prune_rate():
    assert removed_shares(12, lambda n, w: w) == pytest.approx([0.3] * 12, abs=0.06)


@pytest.mark.parametrize("scale", [20.0, 0.05])
def test_threshold_pruning_follows_weights_that_change_their_scale(scale):
    shares = removed_shares(20, lambda n, w: w * (scale if n >= 5 else 1.0))
    assert shares[5] == pytest.approx(0.0 if scale > 1 else 1.0, abs=0.05)
    assert shares[-5:] == pytest.approx([0.3] * 5, abs=0.06)


def test_threshold_pruning_recovers_from_a_first_update_among_zeros():
    # Most weights are exactly zero at first, so that the threshold starts at zero; it must not stay there.
    shares = removed_shares(40, lambda n, w: w * (w > 1) if n == 0 else w)
    assert shares[-5:] == pytest.approx([0.3] * 5, abs=0.06)


# --------------------------------------------------------------------------------------- float16 training


def grad_scaler():
    return torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)


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


GROW_4 = [0.0, 0, 0, 0, 9, 1, 1, 1]
OVERFLOW = [0.0, 0, 0, 0, 1, 1, 1, math.inf]


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


def test_a_postponed_update_survives_a_restart():
    model, masking = eight([1.0, 2, 3, 4, 0, 0, 0, 0], growth="gradient", prune_rate=0.25)
    masking.update_frequency = 2
    scaler = grad_scaler()
    for gradient in (GROW_4, OVERFLOW):
        step(model, masking, gradient, scaler=scaler)
    resumed_model, resumed = eight([1.0, 2, 3, 4, 0, 0, 0, 0], growth="gradient", prune_rate=0.25)
    resumed.update_frequency = 2
    resumed.load_state_dict(through_a_file(masking.state_dict()))
    step(resumed_model, resumed, GROW_4)
    assert active(resumed) == [1, 2, 3, 4]


def test_a_state_in_memory_stays_what_it_was():
    model, masking = eight([1.0, 2, 3, 4, 0, 0, 0, 0], momentum=0.5, growth="momentum", prune_rate=0.25)
    (name,) = masking.masks
    step(model, masking, GROW_4)
    before, copy = masking.state_dict(), through_a_file(masking.state_dict())
    for _ in range(3):
        step(model, masking, [0.0, 0, 0, 0, 1, 9, 9, 9])
    assert masking.explored() > copy["ever_active"][name].float().mean()
    for part in ("masks", "ever_active"):
        assert torch.equal(before[part][name], copy[part][name])
    [(key, kept)] = before["off_mask_momentum"][name].items()
    assert torch.equal(kept, copy["off_mask_momentum"][name][key])


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


# -------------------------------------------------------------------------------------- stop and go on


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


RESUMED = [
    ("SGD momentum", {"growth": "gradient"}),
    ("SGD momentum", {"growth": "random", "prune": "SET"}),
    ("SGD Nesterov", {"growth": "momentum_neuron", "prune": "global_magnitude", "redistribution": "momentum"}),
    ("SGD momentum", {"growth": "momentum", "method": "GraNet", "decay_schedule": "cosine"}),
    ("Adam", {"growth": "momentum", "prune": "threshold", "redistribution": "magnitude"}),
    ("AdamW", {"growth": "random", "prune": "threshold", "method": "GraNet_uniform", "decay_schedule": "linear"}),
    ("RMSprop", {"growth": "gradient", "redistribution": "nonzeros"}),
    ("SGD momentum", {"method": "GMP"}),
]


@pytest.mark.parametrize(("optimizer", "options"), RESUMED)
def test_a_resumed_run_is_bit_identical(optimizer, options):
    def begin(seed):
        model = SmallNet(seed)
        masking = Masking(
            OPTIMIZERS[optimizer](model.parameters()), update_frequency=3, init_density=0.5, final_density=0.2,
            prune_start_step=2, prune_end_step=14, total_steps=20, seed=seed, **options,
        )  # fmt: skip
        masking.add_module(model, "ERK")
        return model, masking

    def train(model, masking, numbers):
        for number in numbers:
            backward(model, number)
            masking.step()
        masking.truncate_weights(0.4)

    def state_of(model, masking):
        return {"model": model.state_dict(), "optimizer": masking.optimizer.state_dict(), "masks": masking.state_dict()}

    model, masking = begin(seed=3)
    train(model, masking, range(8))
    saved = through_a_file(state_of(model, masking))
    train(model, masking, range(8, 20))

    resumed_model, resumed = begin(seed=4)
    resumed_model.load_state_dict(saved["model"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["masks"])
    assert resumed.steps == 8
    train(resumed_model, resumed, range(8, 20))

    assert_identical(state_of(model, masking), state_of(resumed_model, resumed))
    assert masking.explored() == resumed.explored()


def assert_identical(first, second):
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_identical(first[key], second[key])
    elif isinstance(first, list | tuple):
        for a, b in zip(first, second, strict=True):
            assert_identical(a, b)
    elif torch.is_tensor(first):
        assert torch.equal(first, second)
    else:
        assert first == second


def test_the_state_of_another_model_is_refused():
    _, masking = eight([1.0, 2, 3, 4, 0, 0, 0, 0])
    other = SmallNet()
    others = Masking(sgd(other))
    with pytest.raises(UsageError, match="add_module"):
        others.load_state_dict(masking.state_dict())
    others.add_module(other)
    with pytest.raises(UsageError, match="another model"):
        others.load_state_dict(masking.state_dict())


def test_explored_is_the_share_that_was_ever_active():
    model = SmallNet()
    masking = Masking(sgd(model), growth="random", update_frequency=2, init_density=0.2)
    masking.add_module(model)
    assert masking.explored() == masking.density() == 0.2
    seen = snapshot(masking)
    for number in range(12):
        random_gradients(model, number)
        masking.step()
        seen = {name: mask | seen[name] for name, mask in masking.masks.items()}
        assert masking.explored() == sum(int(mask.sum()) for mask in seen.values()) / SIZE
    assert masking.explored() > 0.4


def test_explored_of_static_training_is_its_density():
    model = SmallNet()
    masking = Masking(sgd(model), update_frequency=1, init_density=0.2)
    masking.add_module(model)
    masking.updates_enabled = False
    for number in range(4):
        random_gradients(model, number)
        masking.step()
    assert masking.explored() == 0.2


# ---------------------------------------------------------------------------- names and memory layouts


def wrappers(model):
    return {
        "plain": model,
        "DataParallel": nn.DataParallel(model),
        "compiled": torch.compile(model, backend="eager"),
        "compiled DataParallel": torch.compile(nn.DataParallel(model), backend="eager"),
        "DataParallel of compiled": nn.DataParallel(torch.compile(model, backend="eager")),
    }


@pytest.mark.parametrize("wrapper", wrappers(nn.Identity()))
def test_masks_have_the_names_of_the_users_own_model(wrapper):
    model = SmallNet()
    masking = Masking(sgd(model), init_density=0.3)
    masking.add_module(wrappers(model)[wrapper])
    assert list(masking.masks) == NAMES


def test_masks_have_the_same_names_where_only_a_part_is_compiled():
    model = SmallNet()
    model.hidden = torch.compile(model.hidden, backend="eager")
    masking = Masking(sgd(model), init_density=0.3)
    masking.add_module(model)
    assert list(masking.masks) == NAMES


@pytest.mark.parametrize("wrapper", ["compiled", "DataParallel"])
def test_a_wrapped_model_trains_as_a_plain_one(wrapper):
    results = []
    for wrap in ("plain", wrapper):
        model = SmallNet()
        masking = Masking(sgd(model), method="GraNet", update_frequency=2, init_density=0.5, prune_end_step=4)
        wrapped = wrappers(model)[wrap]
        masking.add_module(wrapped)
        for number in range(6):
            backward(wrapped, number)
            masking.step()
        results.append({"masks": snapshot(masking), "weights": [p.detach() for p in model.parameters()]})
        assert_zero_off_the_masks(model, masking)
    assert_identical(*results)


class Layouts(nn.Module):
    """Convolutions whose channels-last layout differs, or does not, from the plain one, and a classifier."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(1, 6, 3)
        self.second = nn.Conv2d(6, 8, 3)
        self.pointwise = nn.Conv2d(8, 5, 1)
        self.head = nn.Linear(20, 4)


def layout_run(convert, growth="gradient", prune="magnitude", method="DST"):
    """A run on the same gradients in any layout, and what was ever active; ``convert`` may change the layout."""
    model = Layouts()
    convert(model, "before")
    masking = Masking(
        sgd(model), method=method, growth=growth, prune=prune, update_frequency=1, init_density=0.4, final_density=0.2,
        prune_end_step=4,
    )  # fmt: skip
    masking.add_module(model, "ERK")
    convert(model, "after")
    seen = snapshot(masking)
    size = sum(mask.numel() for mask in masking.masks.values())
    for number in range(1, 6):
        generator = torch.Generator().manual_seed(number)
        for p in model.parameters():
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
        masking.step()
        density = scheduled(method, number, 1, (0, 4), 0.4, 0.2)
        assert sum(counts(masking).values()) == round(size * density)
        assert_zero_off_the_masks(model, masking)
        seen = {name: seen[name] | mask for name, mask in masking.masks.items()}
    return masking, seen


def keep(model, stage):
    pass


def channels_last(when):
    def convert(model, stage):
        if stage == when:
            model.to(memory_format=torch.channels_last)

    return convert


def back_to_contiguous(model, stage):
    model.to(memory_format=torch.channels_last if stage == "before" else torch.contiguous_format)


CONVERSIONS = {
    "from the start": channels_last("before"),
    "after add_module": channels_last("after"),
    "and back": back_to_contiguous,
}


@pytest.mark.parametrize("growth", GROWTH)
@pytest.mark.parametrize("method", ["DST", "GraNet", "GMP_uniform"])
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_channels_last_models_are_masked_exactly(conversion, method, growth):
    for prune in PRUNE:
        masking, _ = layout_run(CONVERSIONS[conversion], growth, prune, method)
        plain, _ = layout_run(keep, growth, prune, method)
        if growth in ("gradient", "momentum"):  # neither chance nor the rounding of neurons' means decides
            assert all(torch.equal(mask, plain.masks[name]) for name, mask in masking.masks.items())


def share(masks):
    return sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_explored_counts_alike_in_any_memory_layout(conversion):
    masking, seen = layout_run(CONVERSIONS[conversion], "random")
    assert masking.explored() == share(seen)


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_a_state_moves_between_memory_layouts(conversion):
    saved, seen = layout_run(keep, "random")
    model = Layouts()
    CONVERSIONS[conversion](model, "before")
    masking = Masking(sgd(model), growth="random", init_density=0.4)
    masking.add_module(model)
    CONVERSIONS[conversion](model, "after")
    masking.load_state_dict(through_a_file(saved.state_dict()))
    assert same(masking.masks, saved.masks)
    assert masking.explored() == share(seen)
    for _ in range(3):
        masking.truncate_weights(0.5)
        seen = {name: seen[name] | mask for name, mask in masking.masks.items()}
    assert masking.explored() == share(seen)


UNUSUAL = {
    "transposed matrix": lambda: torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).t(),
    "permuted kernel": lambda: torch.randn(3, 3, 4, 2, generator=torch.Generator().manual_seed(0)).permute(3, 2, 0, 1),
}


@pytest.mark.parametrize("layout", UNUSUAL)
@pytest.mark.parametrize("method", ["DST", "GraNet", "GMP"])
def test_weights_of_any_memory_layout_are_masked_alike(layout, method):
    def run(arrange):
        model = nn.Module()
        model.weight = nn.Parameter(arrange(UNUSUAL[layout]()))
        masking = Masking(
            sgd(model, lr=0.01),
            method=method,
            update_frequency=1,
            init_density=0.5,
            final_density=0.25,
            prune_end_step=2,
        )
        masking.add_module(model, "uniform")
        for number in range(3):
            random_gradients(model, number)
            masking.step()
        assert masking.density() == (0.5 if method == "DST" else 0.25)
        assert_zero_off_the_masks(model, masking)
        return masking.masks["weight"]

    assert torch.equal(run(lambda w: w), run(torch.Tensor.contiguous))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_counts_are_exact_in_any_precision(dtype):
    for prune, growth in itertools.product(PRUNE, GROWTH):
        model = SmallNet().to(dtype)
        masking = Masking(
            sgd(model), method="GraNet", prune=prune, growth=growth, update_frequency=1,
            init_density=0.5, final_density=0.1, prune_end_step=3,
        )  # fmt: skip
        masking.add_module(model)
        for number in range(1, 5):
            random_gradients(model, number)
            masking.step()
            density = gradual_density(number, 0, 3, 0.5, 0.1)
            assert sum(counts(masking).values()) == round(SIZE * density)


def test_a_layer_without_active_weights_does_no_harm():
    model = SmallNet()
    masking = Masking(sgd(model), update_frequency=1, init_density=1 / SIZE)
    masking.add_module(model, "uniform")
    for number in range(3):
        random_gradients(model, number)
        masking.step()
        masking.truncate_weights(0.5)
    assert counts(masking) == {"conv.weight": 0, "hidden.weight": 1, "head.weight": 0}
    assert not model.conv.weight.any()


def test_a_dense_model_stays_dense():
    model = SmallNet()
    masking = Masking(sgd(model), update_frequency=1, init_density=1.0)
    masking.add_module(model)
    backward(model, 0)
    masking.step()
    assert masking.density() == 1.0
    assert all(model.get_parameter(name).all() for name in NAMES), "what is removed grows back with its value"


# ------------------------------------------------------------------------------------------ wrong calls

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
        ("final_density 1e-06", {"method": "GraNet", "init_density": 0.5, "final_density": 1e-6, "prune_end_step": 9}),
    ],
)
def test_a_budget_that_rounds_to_no_weight_is_refused(message, options):
    model = SmallNet()
    masking = Masking(sgd(model), **options)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError, match=f"{message}.*none of 300 weights|none of 300 weights.*{message}"):
        masking.add_module(model)
    assert_identical(before, dict(model.state_dict()))


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
