"""Gradients where several operations read one tensor, held against those of the masked network."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("numba")

from helpers.masked_networks import masked
from sparselearning.execution import sparse_execution


class Residual(nn.Module):
    """Two residual blocks behind a convolution; ``between`` happens to what the second one reads."""

    def __init__(self, between: Callable[[Tensor, Tensor], Tensor] = lambda x, y: x, stride: int = 1) -> None:
        super().__init__()
        self.between = between
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(6, 6, 1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(2))
        self.last = nn.Conv2d(6, 6, 1, stride)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            y = norm(conv(x))
            x = self.between(x, y)
            y += x
            x = F.relu(y)
        return self.last(x).mean(dim=(2, 3)) if self.last.stride == (1, 1) else self.last(x).mean(dim=(2, 3)) + x.mean()


def read_by_others(x: Tensor, y: Tensor) -> Tensor:
    y.add_(x.mean())
    return x


def backward_operations(run: Callable[[], None]) -> list[str]:
    with torch.autograd.profiler.profile() as profile:
        run()
    return [event.name for event in profile.function_events]


def test_the_sum_and_the_relu_that_end_a_residual_block_are_part_of_a_convolutions_backward_pass() -> None:
    torch.manual_seed(4)
    model = Residual()
    _, masking = masked(model, density=0.5)
    loss = sparse_execution(model, masking)(torch.randn(2, 3, 4, 4)).sum()
    done = backward_operations(loss.backward)
    assert not {"aten::threshold_backward", "aten::add", "aten::add_"}.intersection(done)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("between", [lambda x, y: x, lambda x, y: x + 1, read_by_others])
def test_gradients_of_residual_blocks_equal_masked_ones(between: Callable, stride: int) -> None:
    torch.manual_seed(5)
    model = Residual(between, stride)
    _, masking = masked(model, density=0.5)
    images = torch.randn(3, 3, 5, 5)
    mine, dense = [
        torch.autograd.grad(one(images).pow(2).sum(), [*model.parameters()])
        for one in (sparse_execution(model, masking), model)
    ]
    for (name, _), got, expected in zip(model.named_parameters(), mine, dense, strict=True):
        torch.testing.assert_close(got, expected * masking.masks.get(name, torch.ones(())), rtol=1e-4, atol=1e-5)


def test_whoever_watches_the_gradient_of_a_relus_output_sees_all_of_it() -> None:
    torch.manual_seed(6)
    seen: list[Tensor] = []
    kept: list[Tensor] = []

    def watch(x: Tensor, _: Tensor) -> Tensor:
        x.register_hook(seen.append)
        x.retain_grad()
        kept.append(x)
        return x

    model = Residual(watch)
    _, masking = masked(model, density=0.5)
    images = torch.randn(2, 3, 4, 4)
    found = []
    for one in (sparse_execution(model, masking), model):
        seen.clear(), kept.clear()
        one(images).sum().backward()
        found.append(([*seen], [x.grad for x in kept][-1]))
    (mine, kept_mine), (dense, kept_dense) = found
    assert bool(((kept_dense != 0) & (kept[-1] == 0)).any())  # where the ReLU lets nothing through
    torch.testing.assert_close(kept_mine, kept_dense)
    torch.testing.assert_close(mine[0], dense[0])


class TwoReaders(nn.Module):
    """A ReLU's output ``x`` that two convolutions read."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.one, self.other = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.between: Callable[[Tensor], object] = lambda x: None

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.first(images))
        one = self.one(x)
        self.between(x)
        return one, self.other(x)


def both(network: nn.Module, model: TwoReaders, images: Tensor) -> None:
    one, other = network(images)
    (one + other).pow(2).sum().backward()


def the_second_alone(network: nn.Module, model: TwoReaders, images: Tensor) -> None:
    model.one.weight.register_hook(lambda gradient: gradient * 1)  # not called, for there is none
    network(images)[1].pow(2).sum().backward()


def the_second_first(network: nn.Module, model: TwoReaders, images: Tensor) -> None:
    one, other = network(images.requires_grad_())
    model.first.requires_grad_(False)
    for outputs, layer in ((other, model.other), (one, model.one)):
        gradients = torch.autograd.grad(outputs.pow(2).sum(), [*layer.parameters()])
        for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
            parameter.grad = gradient


def without_gradients_before(network: nn.Module, model: TwoReaders, images: Tensor) -> None:
    def look(module: nn.Module, inputs: tuple[Tensor]) -> None:
        with torch.no_grad():
            F.conv2d(inputs[0], module.weight)

    for layer in (model.one, model.other):
        layer.register_forward_pre_hook(look)
    both(network, model, images)


def from_a_leaf_between(network: nn.Module, model: TwoReaders, images: Tensor) -> None:
    leaves: list[Tensor] = []
    model.one.register_forward_pre_hook(lambda _, inputs: leaves.append(inputs[0].detach_().requires_grad_()))
    both(network, model, images)
    model.first.bias.grad = leaves[0].grad.sum(dim=(0, 2, 3))


@pytest.mark.parametrize(
    "run", [both, the_second_alone, the_second_first, without_gradients_before, from_a_leaf_between]
)
def test_gradients_of_two_readers_equal_masked_ones(run: Callable[[nn.Module, TwoReaders, Tensor], None]) -> None:
    torch.manual_seed(9)
    model = TwoReaders()
    _, masking = masked(model, density=0.5)
    twin, images = copy.deepcopy(model), torch.randn(2, 3, 4, 4)
    run(sparse_execution(model, masking), model, images.clone())
    run(twin, twin, images.clone())
    for (name, mine), dense in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (mine.grad is None) == (dense.grad is None), name
        if dense.grad is not None:
            mask = masking.masks.get(name, torch.ones(()))
            expected = dense.grad * (mask if mask.shape == dense.grad.shape else 1)
            torch.testing.assert_close(mine.grad, expected, rtol=1e-4, atol=1e-5)


def test_what_is_read_may_change_before_it_is_read_again() -> None:
    torch.manual_seed(10)
    model = TwoReaders()
    _, masking = masked(model, density=0.5)
    model.between = lambda x: x.detach().mul_(2)
    images = torch.randn(2, 3, 4, 4)
    for mine, dense in zip(sparse_execution(model, masking)(images), model(images), strict=True):
        torch.testing.assert_close(mine, dense)


def test_a_graph_can_be_gone_through_again() -> None:
    torch.manual_seed(7)
    model = Residual()
    _, masking = masked(model, density=0.5)
    loss = sparse_execution(model, masking)(torch.randn(2, 3, 4, 4)).sum()
    first, second = [torch.autograd.grad(loss, [*model.parameters()], retain_graph=True) for _ in range(2)]
    assert all(map(torch.equal, first, second))
