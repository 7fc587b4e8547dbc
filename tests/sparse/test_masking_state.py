"""The state of a Masking: stopped, saved, restored, continued."""

import pytest
import torch

from helpers.comparing import assert_identical
from helpers.masked_networks import (
    GROW_4,
    OPTIMIZERS,
    OVERFLOW,
    SIZE,
    SmallNet,
    active,
    backward,
    eight,
    grad_scaler,
    random_gradients,
    sgd,
    snapshot,
    step,
    through_a_file,
)
from sparselearning import Masking
from sparselearning.process.errors import UsageError

# --------------------------------------------------------------------------------------- float16 training


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


# -------------------------------------------------------------------------------------- stop and go on


def test_without_first_masks_all_weights_are_active_until_a_state_brings_theirs():
    model, masking = eight([1.0, 2, 3, 4, 0, 0, 0, 0], growth="gradient", prune_rate=0.25)
    step(model, masking, GROW_4)
    state = through_a_file(masking.state_dict())
    weights = model.state_dict()
    other, _ = eight([1.0] * 8)
    resumed = Masking(sgd(other), growth="gradient", prune_rate=0.25, steps=7)
    resumed.add_module(other, None)
    assert resumed.density() == 1
    assert resumed.steps == 7
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    assert active(resumed) == active(masking)
    assert resumed.steps == masking.steps == 1
    assert resumed.explored() == masking.explored()


def test_densities_of_layers_that_nothing_draws_are_refused():
    model, _ = eight([1.0] * 8)
    with pytest.raises(UsageError, match="layer_densities goes with sparse_init"):
        Masking(sgd(model)).add_module(model, None, layer_densities={"*": 0.5})


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


@pytest.mark.parametrize("prune", ["threshold", "magnitude"])
def test_states_of_earlier_versions_go_on(prune):
    """They had a threshold, whatever the mode, where a mode's own state is now."""
    _, masking = eight([1.0, 2, 3, 4, 0, 0, 0, 0], prune=prune)
    state = masking.state_dict()
    del state["prune_state"]
    masking.load_state_dict({**state, "threshold": 0.75 if prune == "threshold" else None})
    assert masking.state_dict()["prune_state"] == ({"threshold": 0.75} if prune == "threshold" else None)


@pytest.mark.parametrize(("from_prune", "to_prune"), [("magnitude", "threshold"), ("threshold", "magnitude")])
def test_a_mode_starts_anew_in_the_state_of_a_run_with_another(from_prune, to_prune):
    _, one = eight([1.0, 2, 3, 4, 0, 0, 0, 0], prune=from_prune)
    _, other = eight([1.0, 2, 3, 4, 0, 0, 0, 0], prune=to_prune)
    before = other.state_dict()["prune_state"]
    other.load_state_dict(one.state_dict())
    assert other.state_dict()["prune_state"] == before


def test_exploring_by_call_leaves_the_threshold_alone():
    model, masking = eight([1.0, 2, 3, 4, 0, 0, 0, 0], prune="threshold", growth="gradient")
    step(model, masking, GROW_4)
    state = masking.state_dict()["prune_state"]
    assert state["threshold"] > 0
    masking.truncate_weights(0.75)
    assert masking.state_dict()["prune_state"] == state
    masking.truncate_weights()
    assert masking.state_dict()["prune_state"] != state


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
