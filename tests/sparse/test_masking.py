"""Masking: eight weights by hand, then what holds after every step."""

import math

import pytest
import torch

from helpers.comparing import assert_identical
from helpers.masked_networks import (
    GRADUAL,
    NAMES,
    OPTIMIZERS,
    SIZE,
    SIZES,
    EightWeights,
    SmallNet,
    active,
    assert_zero_off_the_masks,
    backward,
    counts,
    eight,
    random_gradients,
    same,
    scheduled,
    sgd,
    snapshot,
    step,
)
from sparselearning import Masking, gradual_density
from sparselearning.process.errors import UsageError
from sparselearning.sparse.distributions import erk_densities, layer_counts
from sparselearning.sparse.topology import GROWTH, METHODS, PRUNE, REDISTRIBUTION

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


MODES = [
    (prune, growth, [*REDISTRIBUTION][(i + j) % len(REDISTRIBUTION)])
    for i, prune in enumerate(PRUNE)
    for j, growth in enumerate(GROWTH)
]
"""Any two of different kinds meet."""
assert len(REDISTRIBUTION) <= min(len(PRUNE), len(GROWTH))  # or some would not


@pytest.mark.parametrize(("prune", "growth", "redistribution"), MODES)
@pytest.mark.parametrize("method", METHODS)
def test_density_is_exact_after_every_step(method, prune, growth, redistribution):
    model = SmallNet()
    masking = Masking(
        sgd(model),
        method=method,
        prune=prune,
        growth=growth,
        redistribution=redistribution if METHODS[method].grows else "none",
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
