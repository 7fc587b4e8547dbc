"""Networks that compute with active weights alone, held against the masked ones."""

import copy
import gc
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import main_suptickets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cifar_models import build_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("numba")

from numba.core.caching import Cache

from helpers.masked_networks import masked
from sparselearning import Masking, UsageError
from sparselearning.execution import kernels, sparse_execution
from sparselearning.process.signals import Stopped
from sparselearning.sparse.costs import layer_flops
from sparselearning.training import experiment

NETWORKS = ["cifar_resnet_8", "ResNet18", "vgg11", "wrn-10-1", "lenet5", "lenet-300-100"]


def gradients(network: nn.Module, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    F.cross_entropy(network(images), torch.arange(len(images)) % 10).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_gradients_equal_masked_ones(name: str) -> None:
    torch.manual_seed(1)
    size, channels = (28, 1) if name.startswith("lenet") else (32, 3)
    model = build_model(name, 10, channels, size)
    _, masking = masked(model, 0.05 if name in ("ResNet18", "vgg11") else 0.2)
    images = torch.randn(4, channels, size, size)
    reference = copy.deepcopy(model)
    network = sparse_execution(model, masking)
    model.eval(), reference.eval()  # without the kinks of BatchNorm of a few images at 1 x 1 pixels
    logits, expected = network(images), reference(images)
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    mine, dense = gradients(network, model, images), gradients(reference, reference, images)
    for parameter, gradient in mine.items():
        mask = masking.masks.get(parameter, torch.ones(()))
        assert not gradient[mask == 0].any() if mask.dim() else True
        expected = dense[parameter] * mask
        # One layer's agree within 1e-6; rounding may carry a few of many thousands of ReLUs over their kink.
        assert (gradient - expected).abs().max() <= 1e-2 * expected.abs().max() + 1e-7, parameter


def test_training_goes_as_masked_training_does() -> None:
    torch.manual_seed(2)
    model = build_model("cifar_resnet_8", 10)
    twin = copy.deepcopy(model)
    images = torch.randn(8, 3, 32, 32)
    losses = []
    for one, is_sparse in ((model, True), (twin, False)):
        _, masking = masked(one, seed=3, update_frequency=3, growth="gradient", prune_rate=0.3)
        network = sparse_execution(one, masking) if is_sparse else one
        own = []
        for _ in range(8):
            one.zero_grad()
            loss = F.cross_entropy(network(images), torch.arange(8))
            loss.backward()
            masking.step()
            own.append(loss.item())
        losses.append(own)
        assert masking.density() == pytest.approx(0.2, abs=1e-4)
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, dict(twin.named_buffers())[name], rtol=0.05, atol=0.02)


def test_dense_gradients_come_where_growth_reads_them() -> None:
    torch.manual_seed(0)
    model = build_model("cifar_resnet_8", 10)
    _, masking = masked(model, update_frequency=2)
    network = sparse_execution(model, masking)
    images = torch.randn(4, 3, 32, 32)
    name = "stages.2.0.conv2.weight"
    mask = masking.masks[name]
    assert not gradients(network, model, images)[name][~mask].any()
    masking.step()
    assert gradients(network, model, images)[name][~mask].any()  # the next step updates the topology
    masking.step()
    assert not gradients(network, model, images)[name][~masking.masks[name]].any()
    with pytest.raises(UsageError, match=r"those of active weights alone.*dense_gradients"):
        masking.truncate_weights(0.5)
    network.dense_gradients = True
    assert gradients(network, model, images)[name][~masking.masks[name]].any()
    before = masking.masks[name].clone()
    masking.truncate_weights(0.5)
    assert (masking.masks[name] & ~before).any()


class PartlyDense(nn.Module):
    """A block that runs as it is, with gradients of all weights, between layers that run with active weights alone."""

    def __init__(self, block: nn.Module, is_checkpointed: bool) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Conv2d(3, 16, 3, padding=1), block, nn.Linear(8, 10)
        self.is_checkpointed = is_checkpointed

    def forward(self, images: Tensor) -> Tensor:
        features = self.first(images)
        if self.is_checkpointed:
            features = checkpoint(self.block, features, use_reentrant=False)
        else:
            features = self.block(features)
        return self.last(features.mean((2, 3)))


@pytest.mark.parametrize(
    "model", [PartlyDense(nn.ConvTranspose2d(16, 8, 3), False), PartlyDense(nn.Conv2d(16, 8, 3), True)]
)
def test_growth_refuses_gradients_of_which_only_some_are_dense(model: nn.Module) -> None:
    _, masking = masked(model, growth="gradient")
    network = sparse_execution(model, masking)
    images = torch.randn(4, 3, 6, 6)
    found = gradients(network, model, images)
    dense = {name for name, mask in masking.masks.items() if found[name][~mask].any()}
    assert dense == {"block.weight"}
    with pytest.raises(UsageError, match="those of active weights alone"):
        masking.truncate_weights(0.5)
    masking.step()
    masking.step()
    with pytest.raises(UsageError, match="those of active weights alone"):
        masking.truncate_weights(0.5)
    network.dense_gradients = True
    gradients(network, model, images)
    masking.truncate_weights(0.5)


def test_clipping_is_the_same_in_both_executions() -> None:
    torch.manual_seed(0)
    model = build_model("cifar_resnet_8", 10)
    model.eval()  # without the kinks of BatchNorm of a few images
    _, masking = masked(model)
    network = sparse_execution(model, masking)
    images = torch.randn(4, 3, 32, 32)
    norms = []
    for one, dense in ((network, False), (network, True), (model, True)):
        network.dense_gradients = dense
        gradients(one, model, images)
        norms.append(float(masking.clip_grad_norm_(0.1)))
        assert float(masking.clip_grad_norm_(math.inf)) == pytest.approx(0.1, rel=1e-4)
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-3)
    whole = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert float(whole) > 0.12  # with those of inactive weights, which are there


def test_dense_gradients_of_every_layer_equal_masked_ones() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(392, 700), nn.Linear(700, 10)
    )
    _, masking = masked(model)
    reference = copy.deepcopy(model)
    network = sparse_execution(model, masking)
    network.dense_gradients = True
    images = torch.randn(6, 3, 16, 16)
    mine, dense = gradients(network, model, images), gradients(reference, reference, images)
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, dense[name], rtol=1e-3, atol=1e-6)


def test_lists_follow_masks_and_weights() -> None:
    torch.manual_seed(0)
    model = build_model("cifar_resnet_8", 10)
    _, masking = masked(model, update_frequency=1)
    network = sparse_execution(model, masking)
    images = torch.randn(4, 3, 32, 32)
    for _ in range(3):
        gradients(network, model, images)
        masking.step()
        model.eval()
        with torch.no_grad():
            torch.testing.assert_close(network(images), model(images), rtol=1e-4, atol=1e-4)
        model.train()
    own = copy.deepcopy(model.state_dict())
    model.load_state_dict(build_model("cifar_resnet_8", 10).state_dict())  # dense: off the masks
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(network(images), model(images), rtol=1e-4, atol=1e-4)
    model.load_state_dict(own)
    with torch.no_grad():
        torch.testing.assert_close(network(images), model(images), rtol=1e-4, atol=1e-4)


class Odd(nn.Module):
    """What a user's own network may do with activations."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding="same")
        self.grouped = nn.Conv2d(8, 8, 3, groups=2, padding=1)
        self.dilated = nn.Conv2d(8, 8, 3, dilation=2, padding=2)
        self.norm, self.other = nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False, track_running_stats=False)
        self.rect = nn.Conv2d(16, 8, (1, 3), stride=(2, 1))
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        a = self.norm(self.first(x))
        kept = a
        b = F.relu(a)
        c = self.other(self.grouped(b))
        c += b
        c = torch.cat([c, kept.sigmoid()], dim=1)
        c = F.dropout(F.avg_pool2d(F.max_pool2d(c, 2), 2), 0.0)
        c = self.rect(c) * 2
        return self.head(self.dilated(c).relu().flatten(2).amax(dim=2))


def test_a_network_of_ones_own_works() -> None:
    torch.manual_seed(0)
    model = Odd()
    _, masking = masked(model, 0.4)
    images = torch.randn(4, 3, 16, 16)
    reference = copy.deepcopy(model)
    network = sparse_execution(model, masking)
    torch.testing.assert_close(network(images), reference(images), rtol=1e-4, atol=1e-5)
    mine, dense = gradients(network, model, images), gradients(reference, reference, images)
    for name, gradient in mine.items():
        expected = dense[name] * masking.masks[name] if name in masking.masks else dense[name]
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_norms_output_that_is_read_twice_counts_twice(in_place: bool) -> None:
    torch.manual_seed(0)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            before = self.norm(self.conv(x))
            after = F.relu(before, inplace=in_place)
            return (after * 2 + before).mean(dim=(2, 3))

    model = Twice()
    _, masking = masked(model, 0.5)
    images = torch.randn(4, 3, 6, 6)
    reference = copy.deepcopy(model)
    results = []
    for one, network in ((model, sparse_execution(model, masking)), (reference, reference)):
        outputs = network(images)
        outputs.square().sum().backward()
        results.append([outputs.detach(), *(p.grad for p in one.parameters())])
    mask = masking.masks["conv.weight"]
    results[1][1] = results[1][1] * mask
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_lie_in_memory_as_their_weights_do(layout: torch.memory_format) -> None:
    """Or data-parallel averaging copies them, and warns; masked layers, here the depthwise one, are no exception."""
    torch.manual_seed(8)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1)).to(memory_format=layout)
    _, masking = masked(model, density=0.5)
    network = sparse_execution(model, masking)
    for network.dense_gradients in (False, True):
        outputs = network(torch.randn(2, 3, 6, 6).to(memory_format=layout))
        gradients = torch.autograd.grad(outputs.sum(), [*model.parameters()])
        assert [gradient.stride() for gradient in gradients] == [weight.stride() for weight in model.parameters()]


@pytest.mark.parametrize("in_place", [True, False])
def test_activations_are_let_go_as_the_backward_pass_is_done_with_them(in_place: bool) -> None:
    layers = [nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(in_place), nn.Conv2d(5, 5, 3), nn.BatchNorm2d(5)]
    model = nn.Sequential(*layers)
    _, masking = masked(model)
    loss = sparse_execution(model, masking)(torch.randn(7, 3, 9, 9)).sum()
    loss.backward()  # the loss still holds the graph
    activations = ((7, 5, 7, 7), (7, 5, 5, 5), (5, 7, 7, 7), (5, 5, 5, 7))
    assert not [held for held in gc.get_objects() if type(held) is Tensor and held.shape in activations]


def test_auto_computes_sparsely_from_where_it_pays() -> None:
    model = build_model("cifar_resnet_8", 10)
    flops = layer_flops(model, (3, 32, 32))
    for density, pays in ((0.05, True), (0.9, False)):
        one = copy.deepcopy(model)
        _, masking = masked(one, density)
        assert sparse_execution(one, masking, flops).is_sparse is pays
        assert sparse_execution(one, masking).is_sparse
    small = build_model("lenet-300-100", 10, 1, 28)  # layers too small for kernels of their own
    _, masking = masked(small, 0.05)
    assert not sparse_execution(small, masking, layer_flops(small, (1, 28, 28))).is_sparse


def test_networks_that_it_is_not_for_are_refused() -> None:
    model = nn.Linear(4, 4)
    masking = Masking(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(UsageError, match="add_module"):
        sparse_execution(model, masking)
    scripted = nn.Sequential(nn.Conv2d(3, 30, 3), torch.jit.script(nn.ReLU()))
    _, masking = masked(scripted)
    with pytest.raises(UsageError, match="scripted"):
        sparse_execution(scripted, masking)
    double = nn.Linear(40, 40).double()
    _, masking = masked(double)
    with pytest.raises(UsageError, match="float32"):
        sparse_execution(double, masking)


FLAGS = [
    "--pre_train", "--cyclic_train", "--sparse", "--re_explore", "--cyc_lr", "--update_bn", "--model", "cifar_resnet_8",
    "--epochs", "3", "--cycle", "1", "--cycle_rate", "0.7", "--batch-size", "20", "--update-frequency", "2",
    "--final-prune-epoch", "1", "--init-density", "0.5", "--final-density", "0.1", "--execution", "sparse",
]  # fmt: skip


@pytest.mark.parametrize("method", [["--growth", "random"], ["--optimizer", "adam"], ["--growth", "momentum"]])
def test_runs_repeat_and_resume_bit_by_bit(method: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (100, 8, 8, 3), dtype=np.uint8), np.arange(100) % 4
    data = tmp_path / "data.npz"
    np.savez(data, x_train=images[:80], y_train=labels[:80], x_test=images[80:], y_test=labels[80:])
    flags = [*FLAGS, *method, "--data", str(data)]
    main_suptickets.main([*flags, "--save", str(tmp_path / "whole")])

    class Signals:
        """Ask the run to stop at the seventh look."""

        looks = 0

        def __enter__(self) -> Callable[[], int]:
            return self.look

        def __exit__(self, *_: object) -> None: ...

        def look(self) -> int:
            self.looks += 1
            return 15 if self.looks == 7 else 0

    with monkeypatch.context() as patched:
        patched.setattr(experiment, "stop_signals", Signals)
        with pytest.raises(Stopped):
            main_suptickets.main([*flags, "--save", str(tmp_path / "parts")])
    main_suptickets.main([*flags, "--save", str(tmp_path / "parts"), "--resume", str(tmp_path / "parts")])
    whole, parts = (torch.load(tmp_path / run / "model_previous.pth")["state_dict"] for run in ("whole", "parts"))
    assert all(torch.equal(parts[name], entry) for name, entry in whole.items())


COMPUTE = """
import torch
from torch import nn
from sparselearning.execution import sparse_network
torch.manual_seed(0)
torch.set_num_threads(1)
model = nn.Sequential(nn.Conv2d(5, 9, 3), nn.BatchNorm2d(9), nn.ReLU(), nn.Conv2d(9, 4, 3), nn.BatchNorm2d(4))
images = torch.randn(70, 5, 6, 6, requires_grad=True)
outputs = sparse_network(model, dict(model.named_parameters()))(images)
outputs.square().sum().backward()
results = [outputs.detach(), images.grad, *(p.grad for p in model.parameters()), *model.buffers()]
"""
IN_A_NEW_PROCESS = f"""
import sys
from sparselearning.execution import active_weights, kernels, planes
used = [kernels.tile_by_tile, planes.statistics, planes.normalise, planes.backward]
def noted(make):
    return lambda *shape: used.append(make(*shape)) or used[-1]
active_weights.correlate, active_weights.contraction = noted(kernels.correlate), noted(kernels.contraction)
{COMPUTE}
torch.save((results, [kernel.cache_hits for kernel in used]), sys.argv[1])
"""


def test_kernels_from_the_cache_compute_what_they_did_when_they_were_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels of shapes are compiled anew every time, the four others only in a new checkout."""
    here: dict[str, list[Tensor]] = {}
    kernels.correlate.cache_clear(), kernels.contraction.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(Cache, "load_overload", lambda *_: None)  # of what is there
        exec(COMPUTE, here)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    file = tmp_path / "there.pth"
    subprocess.run([sys.executable, "-c", IN_A_NEW_PROCESS, str(file)], env=environment, check=True, timeout=300)
    results, hits = torch.load(file)
    assert len(hits) > 4
    assert set(hits) == {1}
    for compiled, cached in zip(here["results"], results, strict=True):
        assert torch.equal(compiled, cached)
