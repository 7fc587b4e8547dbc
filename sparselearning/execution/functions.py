"""Convolutions and linear layers that compute with their active weights alone, as autograd functions.

Activations are ordinary tensors [image, channel, row, column] that lie in memory as [channel, row, column, image]
(:func:`image_last`); weights and their gradients are ordinary dense tensors, zero where inactive.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from threading import Lock
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparselearning.execution import memory, threads
from sparselearning.execution.kernels import contraction, correlate, tile_by_tile
from sparselearning.execution.lists import Correlation, Grid, WeightList
from sparselearning.execution.planes import CHUNK, PLANES, normalise, statistics
from sparselearning.execution.planes import backward as planes_backward
from sparselearning.execution.vectors import LANES

Made = TypeVar("Made")


def image_last(activations: Tensor) -> Tensor:
    """View of [image, channel, …] as contiguous [channel, …, image], by a copy if its memory layout is another."""
    return activations.movedim(0, -1).contiguous()


def empty_activations(images: int, channels: int, *plane: int) -> Tensor:
    """Uninitialised [image, channel, …], lying in memory as [channel, …, image]."""
    strides = [images]
    for size in reversed(plane):
        strides.insert(0, strides[0] * size)
    return memory.empty((images, channels, *plane), (1, *strides))


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


LARGE = 1 << 21
"""Numbers of the smallest tensor that kernels write past the caches, which would not hold it until it is read."""
VECTOR_BYTES = 4 * LANES
"""Of a vector register."""


class _Kernel:
    """A correlation with its list of active weights, ready to be run on any memory.

    Args:
        correlation: what it does.
        outputs, channels, taps: of the active weights, as the correlation counts them; int64 [n] each.
        places: of each in the weight's memory.
        keeps_values: read the weights' values once for all, as they change no more.
    """

    def __init__(
        self, correlation: Correlation, outputs: np.ndarray, channels: np.ndarray, taps: np.ndarray,
        places: np.ndarray, keeps_values: bool,
    ) -> None:  # fmt: skip
        self.correlation = correlation
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
        values = _memory(weight).index_select(0, self.places) if self._values is None else self._values
        if self.keeps_values:
            self._values = values
        address = target.data_ptr() + 4 * begin
        streams = target.numel() >= LARGE and self.correlation.is_aligned and address % VECTOR_BYTES == 0
        self._run(
            correlate(*self.correlation.tile.block),
            source=source.data_ptr(),
            target=address,
            streams=streams,
            values=values.data_ptr(),
            bias=_address(bias),
            added=_address(added, begin),
            relu=relu,
            gate=_address(gate, begin),
        )

    def contract(self, source: Tensor, gradient: Tensor, for_weight: Tensor) -> None:
        """Write the gradient of every active weight to its place in the gradient of all."""
        parts = torch.zeros(self.correlation.shares, len(self.places))
        self._run(
            contraction(*self.correlation.tile.block),
            source=source.data_ptr(),
            target=gradient.data_ptr(),
            results=parts.data_ptr(),
            results_bytes=4 * len(self.places),
        )
        _memory(for_weight).index_copy_(0, self.places, parts.sum(dim=0))

    def _run(self, tile_function: Any, **memory: int) -> None:
        shares, work_bytes = self.correlation.shares, int(self.task["work_bytes"][0])
        _run(tile_by_tile, self.task, shares, work_bytes, tile_function=tile_function.address, **memory)


def _address(tensor: Tensor | None, number: int = 0) -> int:
    """Address of one of a tensor's numbers; 0 if there is no tensor."""
    return 0 if tensor is None else tensor.data_ptr() + 4 * number


def _run(kernel: Any, task: np.ndarray, shares: int, work_bytes: int, **memory: int) -> None:
    """Let a kernel do a task in so many shares, each with memory of its own to work in."""
    with _one_at_a_time:
        for name, value in memory.items():
            task[name] = value
        task["shares"], task["next_share"] = shares, 0
        task["work"] = _work(shares * work_bytes)
        threads.run(kernel.address, task.ctypes.data, shares)


_one_at_a_time = Lock()  # whatever thread of Python calls: a task and the scratch memory serve one call
_scratch = torch.empty(0)


def _work(size: int) -> int:
    """Address of at least ``size`` bytes that kernels may write to; kept from call to call."""
    global _scratch
    if 4 * _scratch.numel() < size:
        _scratch = torch.empty(-(-size // 4))
    return _scratch.data_ptr()


MOST_SIZES = 4
"""Sizes of batches that a layer keeps its lists of active weights for."""


def recent(kept: dict[Any, Made], key: Any, make: Callable[[], Made]) -> Made:
    """What was made for a key, of which the last few are kept."""
    made = kept.pop(key) if key in kept else make()
    while len(kept) >= MOST_SIZES:
        del kept[next(iter(kept))]
    kept[key] = made
    return made


class ActiveWeights:
    """A layer's shape and active weights, and the lists that the kernels read, made when first needed.

    Args:
        shape: of the layer.
        mask: true where a weight is active, in the weight's shape; read now, not kept.
        strides: of the weight, which is dense in memory.
        keeps_values: read the weights' values once for all, as they change no more.
    """

    def __init__(self, shape: Shape, mask: Tensor, strides: Sequence[int], keeps_values: bool = False) -> None:
        self._set_positions(shape, mask.reshape(-1).nonzero().squeeze(1).numpy(), keeps_values)
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
        active._places = np.arange(len(positions))
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
            return _Kernel(correlation, *weights, self._keeps_values)

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
                kernels.append((_Kernel(correlation, *weights, self._keeps_values), begin))
            return kernels

        return recent(self._backward, (source, torch.get_num_threads()), make)


def _memory(tensor: Tensor) -> Tensor:
    """All numbers of a dense tensor in the order in which they lie in memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


class Gate:
    """The backward pass of a ReLU, which the convolution that reads the ReLU's output may do as it writes a gradient.

    The ReLU knows the gradient again that is zero already. If there are other readers, autograd hands it a sum.

    Attributes:
        readers: convolutions with active weights that read the output; where there are several, none does the pass.
    """

    def __init__(self) -> None:
        self.readers = 0
        self._passed: tuple[Tensor, int] | None = None

    def pass_on(self, gradient: Tensor) -> None:
        """Take note of a gradient that is zero where the output is not positive."""
        self._passed = gradient, gradient._version

    def take(self, gradient: Tensor) -> bool:
        """Whether it is this gradient that has been passed on, and nobody has changed it since; then forget it."""
        passed, self._passed = self._passed, None
        return passed is not None and passed[0] is gradient and passed[1] == gradient._version


class SparseConvolution(torch.autograd.Function):
    """Convolution [image, channel, row, column] with active weights alone.

    It returns the inputs, too, for the sum at the end of a residual block that it begins: the gradient that comes back
    this way is added where the kernel writes its own, and need not be added in a pass of its own.
    """

    @staticmethod
    def forward(
        context: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, active: ActiveWeights, dense_gradient: bool,
        gate: Gate | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        source = image_last(inputs.detach())
        grid = Grid(*source.shape[1:])
        plane = active.shape.target(grid)
        target = empty_activations(grid.images, active.shape.outputs, plane.rows, plane.columns)
        active.forward(grid).correlate(source, target, 0, weight, bias)
        is_view = source.data_ptr() == inputs.data_ptr()
        context.save_for_backward(inputs if is_view else source.movedim(-1, 0), weight)
        context.active, context.grid, context.dense_gradient = active, grid, dense_gradient
        context.gate = gate if is_view and not active.shape.skips_inputs else None
        context.set_materialize_grads(False)
        return target, inputs.view_as(inputs) if context.needs_input_grad[0] else None

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor | None, of_inputs: Tensor | None) -> Any:
        if gradient is None:
            return of_inputs, None, None, None, None, None, None
        inputs, weight = context.saved_tensors
        active, grid = context.active, context.grid
        source, gradients = image_last(inputs.detach()), image_last(gradient)
        for_inputs = for_weight = for_bias = None
        if context.needs_input_grad[0]:
            gate = context.gate
            # Whoever watches the gradient of the ReLU's output is to see all of it.
            if gate is not None and (gate.readers > 1 or inputs._backward_hooks or inputs.retains_grad):
                gate = None
            added = None if of_inputs is None else image_last(of_inputs)
            for_inputs = empty_activations(grid.images, active.shape.channels, grid.rows, grid.columns)
            if active.shape.skips_inputs:
                if of_inputs is None:
                    for_inputs.zero_()
                else:
                    for_inputs.copy_(of_inputs)
            for kernel, begin in active.backward(grid):
                kernel.correlate(
                    gradients, for_inputs, begin, weight, added=added, gate=None if gate is None else source
                )
            if gate is not None:
                gate.pass_on(for_inputs)
        if context.needs_input_grad[1]:
            if context.dense_gradient:
                for_weight = _dense_weight_gradient(active.shape, gradient, inputs.detach(), weight)
            else:
                for_weight = torch.zeros_like(weight)
                active.forward(grid).contract(source, gradients, for_weight)
        if context.needs_input_grad[2]:
            for_bias = gradients.sum(dim=(1, 2, 3))
        return for_inputs, for_weight, for_bias, None, None, None, None


def _dense_weight_gradient(shape: Shape, gradient: Tensor, inputs: Tensor, weight: Tensor) -> Tensor:
    kernels = weight.detach().reshape(shape.outputs, shape.channels, *shape.kernel)
    wanted = (False, True, False)
    return torch.ops.aten.convolution_backward(
        gradient, inputs, kernels, None, shape.stride, shape.padding, (1, 1), False, (0, 0), 1, wanted
    )[1].reshape(weight.shape)


@dataclass
class Sequel:
    """The operation after a BatchNorm, known only once it is called.

    Attributes:
        relu: whether ReLU follows at once, so that its backward pass is part of BatchNorm's.
    """

    relu: bool = False


@dataclass
class Norm:
    """A BatchNorm's operation on each channel, whose pass over the activations is put off.

    A ReLU, or a sum and a ReLU, that follow at once are then done in the same pass. Backward passes must not keep it:
    it would hold activations until all of them are done.

    Attributes:
        lines: the inputs, [channel, …, image].
        scale, shift: what they are multiplied with, and what is added; float32 [channels].
        added: another tensor to add, in the same layout; None: nothing.
        sequel: what the backward passes share.
    """

    lines: Tensor
    scale: Tensor
    shift: Tensor
    added: Tensor | None = None
    sequel: Sequel = field(default_factory=Sequel)

    def memory(self) -> set[int]:
        """Addresses of the memory that the pass reads."""
        return {read.untyped_storage().data_ptr() for read in (self.lines, self.added) if read is not None}

    def write(self, outputs: Tensor, relu: bool) -> None:
        """Do the pass, into memory of its own if this very tensor has none yet."""
        if outputs.untyped_storage().nbytes() == 0:
            outputs.data = empty_activations(*outputs.shape)
        task = _planes_task(self.lines, scale=self.scale, shift=self.shift, outputs=outputs)
        task["added"], task["relu"] = _address(self.added), relu
        _run_planes(normalise, task)


def _planes_task(lines: Tensor, **memory: Tensor) -> np.ndarray:
    task = np.zeros(1, PLANES)
    task["channels"], task["numbers"] = lines.shape[0], lines[0].numel()
    task["inputs"] = lines.data_ptr()
    for name, tensor in memory.items():
        task[name] = tensor.data_ptr()
    return task


def _run_planes(kernel: Any, task: np.ndarray) -> None:
    numbers, outputs = int(task["numbers"][0]), int(task["outputs"][0])
    is_large = int(task["channels"][0]) * numbers >= LARGE
    task["streams"] = is_large and numbers % LANES == 0 and outputs % VECTOR_BYTES == 0
    _run(kernel, task, torch.get_num_threads(), 4 * CHUNK)


class BatchNorm(torch.autograd.Function):
    """BatchNorm over all but channels, whose output is written by :meth:`Norm.write`, later."""

    @staticmethod
    def forward(
        context: Any, inputs: Tensor, weight: Tensor | None, bias: Tensor | None,
        mean: Tensor | None, variance: Tensor | None, eps: float, hand_over: Callable,
    ) -> Tensor:  # fmt: skip
        lines = image_last(inputs.detach())
        uses_batch = mean is None or variance is None
        if mean is None or variance is None:
            mean, variance = torch.empty(len(lines)), torch.empty(len(lines))
            _run_planes(statistics, _planes_task(lines, mean=mean, variance=variance))
        inverse = (variance + eps).reciprocal()
        deviation = inverse.sqrt()
        scale = deviation if weight is None else deviation * weight.detach()
        shift = -mean * scale if bias is None else bias.detach() - mean * scale
        outputs = torch.empty_strided(inputs.shape, lines.movedim(-1, 0).stride())
        outputs.untyped_storage().resize_(0)
        norm = Norm(lines, scale, shift)
        context.sequel, context.uses_batch = norm.sequel, uses_batch
        context.save_for_backward(lines, scale, shift, mean, inverse, deviation)
        hand_over(norm, mean, variance)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> Any:
        lines, scale, shift, mean, inverse, deviation = context.saved_tensors
        gradients = image_last(gradient)
        for_inputs = None
        for_scale, for_shift = torch.empty_like(mean), torch.empty_like(mean)
        task = _planes_task(
            lines, gradients=gradients, mean=mean, variance=inverse, scale=scale, shift=shift,
            gradient_scale=for_scale, gradient_shift=for_shift,
        )  # fmt: skip
        task["relu"], task["uses_batch"] = context.sequel.relu, context.uses_batch
        if context.needs_input_grad[0]:
            for_inputs = empty_activations(gradient.shape[0], *gradient.shape[1:])
            task["outputs"] = for_inputs.data_ptr()
        _run_planes(planes_backward, task)
        for_weight = for_scale.mul_(deviation) if context.needs_input_grad[1] else None
        return for_inputs, for_weight, for_shift if context.needs_input_grad[2] else None, None, None, None, None


class ReluOfNorm(torch.autograd.Function):
    """ReLU of a BatchNorm's output that nothing else reads: both are done in one pass, forward and backward."""

    @staticmethod
    def forward(context: Any, inputs: Tensor, norm: Norm, in_place: bool, gate: Gate) -> Tensor:
        outputs = inputs if in_place else empty_activations(inputs.shape[0], *inputs.shape[1:])
        norm.sequel.relu = norm.added is None
        norm.write(outputs, relu=True)
        context.sequel, context.gate = norm.sequel, gate
        if in_place:
            context.mark_dirty(inputs)
        context.save_for_backward(outputs)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> Any:
        (outputs,) = context.saved_tensors
        through = gradient if context.sequel.relu else _through_relu(gradient, outputs, context.gate)
        return through, None, None, None


class AddToNorm(torch.autograd.Function):
    """Sum, in place, of a BatchNorm's output that is still to be written and another tensor."""

    @staticmethod
    def forward(context: Any, inputs: Tensor, other: Tensor, norm: Norm) -> Tensor:
        norm.added = image_last(other.detach())
        context.mark_dirty(inputs)
        return inputs

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> Any:
        return gradient, gradient, None


class Relu(torch.autograd.Function):
    """ReLU whose backward pass keeps to the layout of its output."""

    @staticmethod
    def forward(context: Any, inputs: Tensor, gate: Gate) -> Tensor:
        outputs = inputs.clamp_min(0)
        context.gate = gate
        context.save_for_backward(outputs)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> Any:
        return _through_relu(gradient, context.saved_tensors[0], context.gate), None


def _through_relu(gradient: Tensor, outputs: Tensor, gate: Gate) -> Tensor:
    if gate.take(gradient):
        return gradient
    if gradient.stride() != outputs.stride():
        gradient = image_last(gradient).movedim(-1, 0)
    through = memory.empty(outputs.shape, outputs.stride())
    return torch.ops.aten.threshold_backward.grad_input(gradient, outputs, 0, grad_input=through)


class ActiveGradient(torch.autograd.Function):
    """A weight as it is, whose gradient is zero where it is inactive, for a layer that runs masked."""

    @staticmethod
    def forward(context: Any, weight: Tensor, mask: Tensor) -> Tensor:
        context.save_for_backward(mask)
        context.strides = weight.stride()
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> Any:
        # Where a dimension has size 1, as in depthwise layers, the view's and masked_fill's strides may be others.
        kept = gradient.new_empty_strided(gradient.shape, context.strides).copy_(gradient)
        return kept.masked_fill_(~context.saved_tensors[0], 0), None
