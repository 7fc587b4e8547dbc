"""Masks have the names of the user's own model, and are exact in any memory layout and precision."""

import functools
import itertools

import pytest
import torch
from torch import nn

from helpers.comparing import assert_identical
from helpers.masked_networks import (
    NAMES,
    SIZE,
    SmallNet,
    assert_zero_off_the_masks,
    backward,
    counts,
    random_gradients,
    same,
    scheduled,
    sgd,
    snapshot,
    through_a_file,
)
from sparselearning import Masking, gradual_density
from sparselearning.sparse.topology import GROWTH, PRUNE


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


@functools.cache
def masks_of_a_plain_run(growth, prune, method):
    return layout_run(keep, growth, prune, method)[0].masks


@pytest.mark.parametrize(
    ("method", "growth"), [*itertools.product(["DST", "GraNet"], GROWTH), ("GMP_uniform", "gradient")]
)
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_channels_last_models_are_masked_exactly(conversion, method, growth):
    for prune in PRUNE:
        masking, _ = layout_run(CONVERSIONS[conversion], growth, prune, method)
        if growth in ("gradient", "momentum"):  # neither chance nor the rounding of neurons' means decides
            assert same(masking.masks, masks_of_a_plain_run(growth, prune, method))


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
