"""The active weights of a layer, and the passes over them: which kernels it takes, and the lists that they read."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from sparselearning.execution import threads
from sparselearning.execution.kernels import contraction, correlate, tile_by_tile
from sparselearning.execution.lists import Correlation, Grid, WeightList
from sparselearning.execution.memory import FLOAT, address
from sparselearning.execution.vectors import is_streamed

Made = TypeVar("Made")


@dataclass(frozen=True)
class Shape:
    """What a layer does, whatever its weights: a linear layer is a convolution of one tap on planes of one number."""

    outputs: int
    channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)

    def target(self, source: Grid) -> Grid:
        """Plane of the output for one of the input."""
        rows, columns = (
            (size + 2 * pad - kernel) // stride + 1
            for size, pad, kernel, stride in zip(
                (source.rows, source.columns), self.padding, self.kernel, self.stride, strict=True
            )
        )
        return Grid(rows, columns, source.images)

    @property
    def skips_inputs(self) -> bool:
        """Whether no tap reaches some rows or columns of the input: the gradient is zero there."""
        return any(size < stride for size, stride in zip(self.kernel, self.stride, strict=True))

    @cache  # noqa: B019  shapes are few, and kept with the networks that have them
    def forward(self, source: Grid, shares: int, active: int) -> Correlation:
        """The forward pass, whose lists also serve the gradient of the weights."""
        target = self.target(source)
        taps = tuple(
            (row - self.padding[0], column - self.padding[1])
            for row in range(self.kernel[0])
            for column in range(self.kernel[1])
        )
        if self.kernel == self.stride == (1, 1) and self.padding == (0, 0):  # planes are lines, images columns
            source = target = Grid(1, source.rows * source.columns * source.images, 1)
        size = target.rows * target.columns * target.images
        strides = (size, target.columns * target.images, target.images)
        return Correlation(self.channels, self.outputs, source, target, self.stride, taps, strides, shares, active)

    @cache  # noqa: B019
    def backward(self, source: Grid, shares: int, active: int) -> list[tuple[Correlation, np.ndarray, int]]:
        """The gradient with respect to the input, for every ``stride``-th row and column at a time.

        Returns:
            Of each phase that a tap reaches, the correlation, the taps, and where in the input it begins, in numbers.
        """
        if self.kernel == self.stride == (1, 1) and self.padding == (0, 0):
            line = Grid(1, source.rows * source.columns * source.images, 1)
            strides = (line.columns, line.columns, 1)
            whole = Correlation(self.outputs, self.channels, line, line, (1, 1), ((0, 0),), strides, shares, active)
            return [(whole, np.array([0]), 0)]
        target = self.target(source)
        phases = []
        plane = source.rows * source.columns * source.images
        for row_phase in range(min(self.stride[0], source.rows)):
            for column_phase in range(min(self.stride[1], source.columns)):
                reached: list[int] = []
                taps: list[tuple[int, int]] = []
                for tap in range(self.kernel[0] * self.kernel[1]):
                    row, row_rest = divmod(row_phase + self.padding[0] - tap // self.kernel[1], self.stride[0])
                    column, column_rest = divmod(column_phase + self.padding[1] - tap % self.kernel[1], self.stride[1])
                    if row_rest == column_rest == 0:
                        reached.append(tap)
                        taps.append((row, column))
                if not taps:
                    continue
                grid = Grid(
                    -(-(source.rows - row_phase) // self.stride[0]),
                    -(-(source.columns - column_phase) // self.stride[1]),
                    source.images,
                )
                strides = (
                    plane, self.stride[0] * source.columns * source.images, self.stride[1] * source.images,
                )  # fmt: skip
                part = active * len(taps) // (self.kernel[0] * self.kernel[1])
                correlation = Correlation(
                    self.outputs, self.channels, target, grid, (1, 1), tuple(taps), strides, shares, part
                )
                begin = (row_phase * source.columns + column_phase) * source.images
                phases.append((correlation, np.array(reached, dtype=np.int64), begin))
        return phases


class _Kernel:
    """A correlation with its list of active weights, ready to be run on any memory.

    Args:
        correlation: what it does.
        outputs, channels, taps: of the active weights, as the correlation counts them; int64 [n] each.
        places: of each in the weight's memory.
        strides: of the weight with those places.
        keeps_values: read the weights' values once for all, as they change no more.
    """

    def __init__(
        self, correlation: Correlation, outputs: np.ndarray, channels: np.ndarray, taps: np.ndarray,
        places: np.ndarray, strides: Sequence[int], keeps_values: bool,
    ) -> None:  # fmt: skip
        self.correlation = correlation
        self.strides = strides
        self.keeps_values = keeps_values
        weights = WeightList.of(correlation, outputs, channels, taps)
        self.places = torch.from_numpy(places[weights.order])  # in the weight's memory
        self._lists = weights.offsets, weights.entries, weights.entry_starts  # kept, for the task has their addresses
        self.task = correlation.task()
        for name, numbers in zip(("offsets", "entries", "entry_starts"), self._lists, strict=True):
            self.task[name] = numbers.ctypes.data
        self._values: Tensor | None = None

    def correlate(
        self, source: Tensor, target: Tensor, begin: int, weight: Tensor, bias: Tensor | None = None,
        added: Tensor | None = None, relu: bool = False, gate: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Fill ``target``, whose phase begins at its number ``begin``; ``added`` and ``gate`` lie as it does."""
        values = self._memory(weight).index_select(0, self.places) if self._values is None else self._values
        if self.keeps_values:
            self._values = values
        first = address(target, begin)
        self._run(
            correlate(*self.correlation.tile.block),
            source=source.data_ptr(),
            target=first,
            streams=self.correlation.is_aligned and is_streamed(target.numel(), first),
            values=values.data_ptr(),
            bias=address(bias),
            added=address(added, begin),
            relu=relu,
            gate=address(gate, begin),
        )

    def contract(self, source: Tensor, gradient: Tensor, for_weight: Tensor) -> None:
        """Write the gradient of every active weight to its place in the gradient of all, with the weight's strides."""
        parts = torch.zeros(self.correlation.shares, len(self.places), **FLOAT)
        self._run(
            contraction(*self.correlation.tile.block),
            source=source.data_ptr(),
            target=gradient.data_ptr(),
            results=parts.data_ptr(),
            results_bytes=4 * len(self.places),
        )
        self._memory(for_weight).index_copy_(0, self.places, parts.sum(dim=0))

    def _memory(self, weight: Tensor) -> Tensor:
        """All numbers of a weight in the order in which they lie in memory; with other strides, in that of a copy."""
        weight = weight.detach()
        if weight.stride() != self.strides:
            weight = weight.new_empty_strided(weight.shape, self.strides).copy_(weight)
        return weight.as_strided((weight.numel(),), (1,))

    def _run(self, tile_function: Any, **memory: int) -> None:
        shares, work_bytes = self.correlation.shares, int(self.task["work_bytes"][0])
        threads.run(tile_by_tile, self.task, shares, work_bytes, tile_function=tile_function.address, **memory)


MOST_SIZES = 4
"""Sizes of batches that a layer keeps its lists of active weights for."""


def recent(kept: dict[Any, Made], key: Any, make: Callable[[], Made]) -> Made:
    """What was made for a key, of which the last few are kept."""
    made = kept.pop(key, None)  # in one go, as another thread may do the same
    if made is None:
        made = make()
    while len(kept) >= MOST_SIZES:
        kept.pop(next(iter(kept)), None)
    kept[key] = made
    return made


class ActiveWeights:
    """A layer's shape and active weights, and the lists that the kernels read, made when first needed.

    Args:
        shape: of the layer.
        mask: true where a weight is active, in the weight's shape; read now, not kept.
        strides: of the weight, or of a copy that is dense in memory.
        keeps_values: read the weights' values once for all, as they change no more.
    """

    def __init__(self, shape: Shape, mask: Tensor, strides: Sequence[int], keeps_values: bool = False) -> None:
        self._set_positions(shape, mask.reshape(-1).nonzero().squeeze(1).numpy(), keeps_values)
        self.strides = tuple(strides)
        rows, columns = np.divmod(self._taps, shape.kernel[1])
        full = (self._outputs, self._channels, rows, columns)
        self._places = sum((i * stride for i, stride in zip(full, strides, strict=False)), np.zeros_like(self._taps))

    @classmethod
    def of_values(cls, shape: Shape, positions: np.ndarray) -> "ActiveWeights":
        """For weights whose values are given alone, in the order of their positions, and change no more.

        Args:
            shape: of the layer.
            positions: of the active weights in the dense weight, row by row; int64 [n].
        """
        active = cls.__new__(cls)
        active._set_positions(shape, positions, keeps_values=True)
        active._places, active.strides = np.arange(len(positions)), (1,)
        return active

    def _set_positions(self, shape: Shape, positions: np.ndarray, keeps_values: bool) -> None:
        self.shape = shape
        self._keeps_values = keeps_values
        rows, self._taps = np.divmod(positions, shape.kernel[0] * shape.kernel[1])
        self._outputs, self._channels = np.divmod(rows, shape.channels)
        self._forward: dict[Any, _Kernel] = {}
        self._backward: dict[Any, list[tuple[_Kernel, int]]] = {}
        # Roughly how many there are decides how the work is cut, so that a changed mask finds most of it cut already.
        self._roughly = 1 << round(math.log2(max(len(self._taps), 1)))

    def forward(self, source: Grid) -> _Kernel:
        """For the output, and for the gradient of the weights."""

        def make() -> _Kernel:
            shares = torch.get_num_threads()
            correlation = self.shape.forward(source, shares, self._roughly)
            weights = self._outputs, self._channels, self._taps, self._places
            return _Kernel(correlation, *weights, self.strides, self._keeps_values)

        return recent(self._forward, (source, torch.get_num_threads()), make)

    def backward(self, source: Grid) -> list[tuple[_Kernel, int]]:
        """For the gradient of the input: of each phase that a tap reaches the kernel, and where the phase begins."""

        def make() -> list[tuple[_Kernel, int]]:
            shares, kernels = torch.get_num_threads(), []
            for correlation, taps, begin in self.shape.backward(source, shares, self._roughly):
                number = np.full(self.shape.kernel[0] * self.shape.kernel[1], -1)
                number[taps] = np.arange(len(taps))
                there = number[self._taps] >= 0
                weights = self._channels[there], self._outputs[there], number[self._taps[there]], self._places[there]
                kernels.append((_Kernel(correlation, *weights, self.strides, self._keeps_values), begin))
            return kernels

        return recent(self._backward, (source, torch.get_num_threads()), make)
