"""Small networks to be computed with active weights alone, whose forward pass a test chooses."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.masked_networks import masked
from sparselearning.execution import sparse_execution
from sparselearning.execution.network import SparseNetwork


class Layers(nn.Module):
    """A convolution and a BatchNorm whose statistics are not the default ones, and what ``use`` makes of them."""

    def __init__(self, use: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        nn.init.normal_(self.norm.bias)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


def plainly(m: nn.Module, x: Tensor) -> Tensor:
    """Convolution, BatchNorm, ReLU."""
    return F.relu(m.norm(m.conv(x)))


def sparse(model: nn.Module, density: float = 0.4) -> SparseNetwork:
    """A network that computes a model with masks of its own."""
    _, masking = masked(model, density)
    return sparse_execution(model, masking)


def images(*shape: int) -> Tensor:
    """Noise, by default four images of 8 x 8 pixels."""
    return torch.randn(*(shape or (4, 3, 8, 8)))
