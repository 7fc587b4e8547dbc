"""What networks cost: layers, formulas and sums worked out by hand, published figures, then invariants."""

import json
from collections import OrderedDict

import pytest
import torch
from cifar_models import build_model as build_cifar_model
from hypothesis import given
from hypothesis import strategies as st
from imagenet_resnet import build_model as build_imagenet_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sparselearning.sparse.costs import (
    CostMeter,
    cost_summary,
    inference_flops,
    layer_densities,
    layer_flops,
    training_flops,
)
from sparselearning.sparse.distributions import erk_densities, uniform_densities
from sparselearning.sparse.layers import maskable_parameters
from sparselearning.sparse.schedules import gradual_density


def small_cnn() -> nn.Module:
    # Images 1 x 4 x 4. conv: 2 x 2 positions, 2 filters, 9 weights: 72 multiply-adds. fc: 8 x 3 = 24 multiply-adds.
    layers = {"conv": nn.Conv2d(1, 2, 3), "bn": nn.BatchNorm2d(2), "flat": nn.Flatten(), "fc": nn.Linear(8, 3)}
    return nn.Sequential(OrderedDict(layers))


SMALL_CNN_FLOPS = {"conv.weight": 144, "fc.weight": 48}


# --------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_layer_flops_by_hand(device):
    assert layer_flops(small_cnn(), (1, 4, 4), device) == SMALL_CNN_FLOPS


def test_names_are_the_users_own_when_the_model_is_compiled():
    assert layer_flops(torch.compile(small_cnn(), backend="eager"), (1, 4, 4)) == SMALL_CNN_FLOPS


def test_groups_and_strides_by_hand():
    # 4 groups of 1 channel in, 2 out; stride 2 on 5 x 5 gives 2 x 2 positions: 4 · 8 · 9 = 288 multiply-adds.
    assert layer_flops(nn.Conv2d(4, 8, 3, stride=2, groups=4), (4, 5, 5)) == {"weight": 576}


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_shared_weight_counts_at_every_use_under_its_first_name(device):
    class Tied(nn.Module):
        """Reads tokens; the head multiplies with the embedding's weight."""

        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 4)
            self.mix = nn.Linear(4, 4, bias=False)
            self.head = nn.Linear(4, 10, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens):
            return self.head(self.mix(self.mix(self.embedding(tokens))))

    # 3 tokens: mix twice 3 · 16 multiply-adds, head once 3 · 40, the look-up none.
    assert layer_flops(Tied(), (3,), device, torch.long) == {"mix.weight": 192, "embedding.weight": 240}


def test_weights_that_modules_use_without_calling_a_layer_are_found():
    # Projections of 5 positions: three in, one out, 5 · 4 · 4 multiply-adds each. Attention scores have no weight.
    layer = nn.TransformerEncoderLayer(4, 1, 8, batch_first=True)
    assert layer_flops(layer, (5, 4)) == {
        "self_attn.in_proj_weight": 480,
        "self_attn.out_proj.weight": 160,
        "linear1.weight": 320,
        "linear2.weight": 320,
    }


@pytest.mark.parametrize("name", ["ResNet18", "ResNet50", "vgg11", "vgg-like", "wrn-16-8", "cifar_resnet_20", "lenet5"])
def test_every_multiply_add_of_a_model_belongs_to_a_maskable_weight(name):
    with torch.device("meta"):
        model = build_cifar_model(name, 10).eval()
    layers = layer_flops(model, (3, 32, 32))
    assert set(layers) == set(maskable_parameters(model))
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 32, 32, device="meta"))
    assert sum(layers.values()) == counter.get_total_flops()


def test_vit_b_16_by_hand():
    with torch.device("meta"):
        flops = layer_flops(build_imagenet_model("vit_b_16", 10, image_size=32), (3, 32, 32))
    patches, tokens, width, hidden = 4, 5, 768, 3072
    layer = tokens * width * (3 * width + width + 2 * hidden)
    assert sum(flops.values()) == 2 * (patches * width * 3 * 16 * 16 + 12 * layer + 10 * width)


def test_counting_leaves_model_and_random_state_as_they_were():
    model = small_cnn()
    model(torch.randn(2, 1, 4, 4)).sum().backward()
    model.bn.eval()
    before = {name: entry.clone() for name, entry in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters()]
    random_state = torch.get_rng_state()
    for device in ("meta", "cpu"):
        layer_flops(model, (1, 4, 4), device)
    assert model.training
    assert not model.bn.training
    assert all(torch.equal(entry, before[name]) for name, entry in model.state_dict().items())
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(torch.get_rng_state(), random_state)


# ------------------------------------------------------------------------------------------------ inference


def test_inference_flops_by_hand():
    assert inference_flops(SMALL_CNN_FLOPS) == 192
    assert inference_flops(SMALL_CNN_FLOPS, {"conv.weight": 0.25}) == 36 + 48  # fc has no density: dense
    assert inference_flops(SMALL_CNN_FLOPS, {"conv.weight": 0.25, "fc.weight": 0}) == 36


def test_layer_densities_reads_weights_and_masks():
    weights = {"a": torch.tensor([[0.0, -1.0], [2.0, 0.0]]), "b": torch.tensor([[3.0, 0.0, 0.0, 0.0]])}
    assert layer_densities(weights) == {"a": 0.5, "b": 0.25}
    assert layer_densities({name: weight != 0 for name, weight in weights.items()}) == {"a": 0.5, "b": 0.25}
    assert layer_densities({}) == {}


@pytest.fixture(scope="module")
def resnet50():
    """Dense FLOPs and shapes of ImageNet's ResNet-50: 53 convolutions and the classifier."""
    with torch.device("meta"):
        model = build_imagenet_model("resnet50")
    shapes = {name: tuple(weight.shape) for name, weight in maskable_parameters(model).items()}
    return layer_flops(model, (3, 224, 224)), shapes


def test_resnet50_costs_818_gflop(resnet50):
    layers, shapes = resnet50
    assert set(layers) == set(shapes)
    assert len(layers) == 54
    assert inference_flops(layers) == pytest.approx(8.18e9, abs=0.005e9)


@pytest.mark.parametrize(
    ("density", "erk", "uniform"), [(0.2, 0.414, 0.223), (0.1, 0.242, 0.126), (0.05, 0.122, 0.077)]
)
def test_resnet50_meets_the_known_shares_of_dense(resnet50, density, erk, uniform):
    # ERK shares its budget out over all 54 layers. Uniform gives all others the density and leaves the first one
    # dense on top of that.
    layers, shapes = resnet50
    dense = inference_flops(layers)
    assert inference_flops(layers, erk_densities(shapes, density)) / dense == pytest.approx(erk, abs=0.001)
    densities = uniform_densities(shapes, density) | {"conv1.weight": 1.0}
    assert inference_flops(layers, densities) / dense == pytest.approx(uniform, abs=0.001)


# ------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    ("sparse_steps", "flops"),
    [
        (None, 3),  # static, SET, GMP: three forward passes of f_S = 1
        (0, 6),  # momentum growth: 2 f_S + f_D, f_D = 4
        (1, 4.5),  # RigL: one step of 3 and one of 6
        (3, 3.75),  # three of 3 and one of 6
    ],
)
def test_training_flops_by_hand(sparse_steps, flops):
    assert training_flops(1, 4, sparse_steps) == flops


def test_dense_training_costs_three_forward_passes_however_gradients_are_used():
    assert training_flops(4, 4) == training_flops(4, 4, 100) == training_flops(4, 4, 0) == 12


@given(density=st.floats(0, 1), sparse_steps=st.one_of(st.none(), st.integers(0, 10_000)))
def test_training_lies_between_static_and_dense(density, sparse_steps):
    flops = training_flops(100 * density, 100, sparse_steps)
    assert 300 * density * (1 - 1e-12) <= flops <= 300 * (1 + 1e-12)


@given(st.integers(0, 10_000))
def test_rarer_dense_gradients_cost_less(sparse_steps):
    assert training_flops(1, 10, sparse_steps + 1) < training_flops(1, 10, sparse_steps)


def test_gradual_pruning_is_the_sum_over_stretches_of_one_density():
    # One layer of 10 FLOPs, density 1 → 0.125 over 4 updates of 2 samples each: cubic at 0, ¼, ½, ¾, then flat.
    # (0.125 + 0.875 · (1, 27/64, 1/8, 1/64)) · 30 · 2 = 60 + 29.6484375 + 14.0625 + 8.3203125, then 4 · 7.5.
    densities = [gradual_density(step, 0, 4, 1.0, 0.125) for step in range(8)]
    spent = sum(2 * training_flops(inference_flops({"a": 10}, {"a": density}), 10) for density in densities)
    assert spent == pytest.approx(60 + 29.6484375 + 14.0625 + 8.3203125 + 4 * 7.5)


def test_a_meter_adds_up_what_each_batch_costs():
    # f_D = 10, f_S = 10 · ¼ = 2.5; static 3 · 2.5 = 7.5; RigL with ΔT = 1: (7.5 + 5 + 10) / 2 = 11.25.
    meter = CostMeter({"a": 10.0})
    meter.count(1, None)
    assert meter.flops == 30, "dense until there are masks"
    meter.train_with({"a": torch.tensor([True, False, False, False])})
    meter.count(2, None)
    meter.count(4, 1)
    assert meter.flops == 30 + 2 * 7.5 + 4 * 11.25


# -------------------------------------------------------------------------------------------------- summary


def test_cost_summary_by_hand():
    # conv 18 weights at ½, fc 24 at ¼, and 2 + 2 + 2 + 3 biases and BatchNorm entries.
    sizes = {name: p.numel() for name, p in small_cnn().named_parameters()}
    densities = {"conv.weight": 0.5, "fc.weight": 0.25}
    costs = cost_summary(SMALL_CNN_FLOPS, sizes, densities, total_training_flops=5760, training_samples=20)
    assert costs == {
        "parameters": 9 + 6 + 9,
        "inference_flops": 72 + 12,
        "training_flops": 5760,
        "parameters_of_dense": 24 / 51,
        "inference_flops_of_dense": 84 / 192,
        "training_flops_of_dense": 0.5,  # 20 · 3 · 192 = 11,520
    }
    assert json.loads(json.dumps(costs)) == costs


def test_a_dense_run_costs_one_times_dense():
    model = small_cnn()
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    layers = layer_flops(model, (1, 4, 4))
    costs = cost_summary(layers, sizes, {}, 20 * training_flops(192, 192), 20)
    assert [costs[f"{name}_of_dense"] for name in ("parameters", "inference_flops", "training_flops")] == [1, 1, 1]
