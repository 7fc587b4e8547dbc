"""What there are kernels for."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparselearning.execution.active_weights import Shape

LEAST_LINEAR = 1 << 18
"""Weights of the smallest linear layer for which changing the layout pays."""


def has_kernel(weight: Tensor) -> bool:
    """Whether a layer with a weight of this shape is, as a rule, computed with active weights alone."""
    return weight.dim() == 4 or weight.numel() >= LEAST_LINEAR


def convolution_shape(
    weight: Sequence[int], stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Shape | None:
    """What ``conv2d`` does with a weight of some shape and these arguments; None: there is no kernel for it."""
    outputs, channels, *kernel = weight
    if groups != 1 or _pair(dilation) != (1, 1) or (padding == "same" and any(size % 2 == 0 for size in kernel)):
        return None
    if isinstance(padding, str):
        padding = tuple(size // 2 for size in kernel) if padding == "same" else 0
    return Shape(outputs, channels, _pair(kernel), _pair(stride), _pair(padding))


def is_readable(*tensors: Tensor | None) -> bool:
    """Whether all of these, but for None, are float32 on the CPU, as kernels read."""
    return all(one is None or (one.dtype == torch.float32 and one.device.type == "cpu") for one in tensors)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])
