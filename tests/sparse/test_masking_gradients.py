"""Gradients under masks: clipped by those of active weights, refused by growth where there are no others."""

import copy
import math
import pickle
import weakref

import pytest
import torch

from helpers.comparing import assert_identical
from helpers.masked_networks import GROW_4, SmallNet, active, backward, eight, same, sgd, snapshot, step
from sparselearning import Masking
from sparselearning.process.errors import UsageError

# ----------------------------------------------------------------------------------------------- clipping


@pytest.mark.parametrize(("norm_type", "norm"), [(2.0, 4), (1.0, 8), (math.inf, 2)])
def test_clipping_by_hand(norm_type, norm):
    # Active: 2, 2, 0, 0; biases: 2, 2. The inactive 100 does not count, and is scaled along.
    model, masking = eight([1.0, 2, 3, 4, 0, 0, 0, 0])
    model.loss([2.0, -2, 0, 0, 100, 0, 0, 0], bias_gradient=2.0).backward()
    assert float(masking.clip_grad_norm_(norm / 2, norm_type)) == pytest.approx(norm)
    assert model.weight.grad.flatten().tolist() == pytest.approx([1, -1, 0, 0, 50, 0, 0, 0], rel=1e-5)
    assert model.bias.grad.tolist() == pytest.approx([1, 1], rel=1e-5)


def test_clipping_does_not_see_overflow_at_inactive_weights():
    model, masking = eight([1.0, 2, 3, 4, 0, 0, 0, 0])
    model.loss([3.0, 4, 0, 0, math.inf, 0, 0, math.nan]).backward()
    assert float(masking.clip_grad_norm_(10)) == 5
    assert model.weight.grad.flatten()[:5].tolist() == [3, 4, 0, 0, math.inf]


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("max_norm", [0.01, 1e6])
def test_clipping_is_pytorchs_where_all_weights_are_active(max_norm, norm_type):
    model = SmallNet()
    masking = Masking(sgd(model), init_density=1.0)
    masking.add_module(model)
    backward(model, 0)
    twin = copy.deepcopy(model)
    for p, original in zip(twin.parameters(), model.parameters(), strict=True):
        p.grad = original.grad.clone()
    expected = torch.nn.utils.clip_grad_norm_(twin.parameters(), max_norm, norm_type)
    assert torch.equal(masking.clip_grad_norm_(max_norm, norm_type), expected)
    assert_identical([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])


def test_clipping_holds_one_masked_copy_at_a_time(monkeypatch):
    where, copies, held = torch.where, [], []

    def watched(*args):
        held.append(sum(copy() is not None for copy in copies))
        copies.append(weakref.ref(made := where(*args)))
        return made

    model = SmallNet()
    masking = Masking(sgd(model), init_density=0.5)
    masking.add_module(model)
    backward(model, 0)
    monkeypatch.setattr(torch, "where", watched)
    masking.clip_grad_norm_(1.0)
    assert held == [0] * len(masking.masks)


def test_clipping_without_gradients():
    _, masking = eight([1.0, 2, 3, 4, 0, 0, 0, 0])
    assert float(masking.clip_grad_norm_(1.0)) == 0


def test_clipping_leaves_growth_its_gradients():
    model, masking = eight([1.0, 2, 3, 4, 0, 0, 0, 0], growth="gradient", prune_rate=0.25)
    model.loss([3.0, 4, 0, 0, 9, 0, 0, 0]).backward()
    masking.clip_grad_norm_(1.0)
    masking.step()
    assert active(masking) == [1, 2, 3, 4]


# ------------------------------------------------------------------------------------------------- growth


def mask_the_gradients(model, masking):
    backward_of_eight(model, masking)
    masking.mask_gradients()
    for p in model.parameters():  # as clipping does
        p.grad.mul_(0.5)


def step_without_keeping_them(model, masking):
    step(model, masking, GROW_4)  # the first step masks weights and state, and then what is zero stays zero
    backward_of_eight(model, masking)
    masking.step(keep_gradients=False)


def backward_of_eight(model, masking, set_to_none=True):
    masking.optimizer.zero_grad(set_to_none)
    model.loss([1.0, 1, 1, 1, 9, 1, 1, 1]).backward()


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("begin", [mask_the_gradients, step_without_keeping_them])
def test_growth_refuses_gradients_that_were_masked(begin, set_to_none):
    """Among weights without a gradient it would choose those that were just removed."""
    model, masking = eight([1.0, 2, 3, 4, 0, 0, 0, 0], growth="gradient")
    masking.update_frequency = 100
    begin(model, masking)
    before = snapshot(masking)
    with pytest.raises(UsageError, match=r"those of active weights alone.*dense_gradients.*keep_gradients"):
        masking.truncate_weights(0.25)
    assert same(before, masking.masks)
    backward_of_eight(model, masking, set_to_none)
    masking.truncate_weights(0.25)
    assert active(masking) == [1, 2, 3, 4]


def load_its_own_state(masking):
    masking.load_state_dict(masking.state_dict())


@pytest.mark.parametrize("then", [Masking.step, load_its_own_state])
def test_gradients_that_were_masked_stay_known_while_they_are_kept(then):
    model, masking = eight([1.0, 2, 3, 4, 0, 0, 0, 0], growth="gradient")
    masking.update_frequency = 100
    mask_the_gradients(model, masking)
    masking.step()
    then(masking)
    with pytest.raises(UsageError, match="those of active weights alone"):
        masking.truncate_weights(0.25)
    model.zero_grad()
    model.loss([1.0, 1, 1, 1, 0, 0, 0, 0]).backward()  # others, whose zeros are what they are
    masking.truncate_weights(0.25)


def test_a_network_without_any_gradient_is_not_refused():
    model, masking = eight([1.0, 2, 3, 4, 0, 0, 0, 0], growth="gradient")
    masking.update_frequency = 100
    mask_the_gradients(model, masking)
    model.zero_grad(set_to_none=False)
    model.loss([0.0] * 8).backward()
    masking.truncate_weights(0.25)
    assert masking.density() == 0.5


def test_copies_have_no_gradients_that_were_masked():
    model, masking = eight([1.0, 2, 3, 4, 0, 0, 0, 0], growth="gradient")
    mask_the_gradients(model, masking)
    twin, masking = pickle.loads(pickle.dumps((model, masking)))
    twin.zero_grad()
    twin.loss([1.0, 1, 1, 1, 0, 0, 0, 0]).backward()
    masking.truncate_weights(0.25)


def test_an_update_refuses_gradients_that_were_masked():
    model, masking = eight([1.0, 2, 3, 4, 0, 0, 0, 0], growth="gradient", prune_rate=0.25)
    backward_of_eight(model, masking)
    masking.mask_gradients()
    with pytest.raises(UsageError, match="those of active weights alone"):
        masking.step()
    assert active(masking) == [0, 1, 2, 3]


def test_masked_gradients_of_an_earlier_step_do_not_count():
    # All zero: the first weights that may grow do, among them the one just removed.
    model, masking = eight([1.0, 2, 3, 4, 0, 0, 0, 0], growth="gradient", prune_rate=0.25)
    masking.update_frequency = 3
    step_without_keeping_them(model, masking)
    step(model, masking, [0.0] * 8)
    assert active(masking) == [0, 1, 2, 3]


def test_gradients_stay_masked_when_pruning_removes_more():
    model, masking = eight(
        [1.0, 2, 3, 4, 5, 6, 0, 0], method="GMP", init_density=1.0, final_density=0.5, prune_end_step=0
    )
    backward_of_eight(model, masking)
    masking.mask_gradients()
    masking.step()
    assert active(masking) == [2, 3, 4, 5]
    with pytest.raises(UsageError, match="those of active weights alone"):
        masking.truncate_weights(0.25)


def test_gradients_of_a_dense_network_are_whole_though_masked():
    model, masking = eight(
        [1.0, 2, 3, 4, 5, 6, 7, 8], method="GraNet", init_density=1.0, final_density=0.5, prune_end_step=0
    )
    backward_of_eight(model, masking)
    masking.mask_gradients()
    masking.step()  # to 4 5 6 7; then 4 and 5 go; of 0 to 5, 4 has the largest gradient, and 0 comes first
    assert active(masking) == [0, 4, 6, 7]


def test_random_growth_reads_no_gradients():
    model, masking = eight([1.0, 2, 3, 4, 0, 0, 0, 0], growth="random", prune_rate=0.25)
    backward_of_eight(model, masking)
    masking.mask_gradients()
    masking.step()
    masking.truncate_weights(0.5)
    assert masking.density() == 0.5
