"""Convolutions and linear layers that compute with their active weights alone, as autograd functions.

Activations are ordinary tensors [image, channel, row, column] that lie in memory as [channel, row, column, image]
(:func:`image_last`); weights and their gradients are ordinary dense tensors, zero where inactive.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparselearning.execution import memory, threads
from sparselearning.execution.active_weights import ActiveWeights, Shape
from sparselearning.execution.layout import empty_activations, image_last
from sparselearning.execution.lists import Grid
from sparselearning.execution.memory import FLOAT, address
from sparselearning.execution.planes import CHUNK, PLANES, normalise, statistics
from sparselearning.execution.planes import backward as planes_backward
from sparselearning.execution.vectors import LANES, is_streamed


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
                for_weight = weight.new_empty_strided(weight.shape, active.strides).zero_()
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
        task["added"], task["relu"] = address(self.added), relu
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
    task["streams"] = numbers % LANES == 0 and is_streamed(int(task["channels"][0]) * numbers, outputs)
    threads.run(kernel, task, torch.get_num_threads(), 4 * CHUNK)


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
            mean, variance = torch.empty(len(lines), **FLOAT), torch.empty(len(lines), **FLOAT)
            _run_planes(statistics, _planes_task(lines, mean=mean, variance=variance))
        else:
            mean = mean.clone()  # the running one, which a pass in training may change before this one goes backward
        inverse = (variance + eps).reciprocal()
        deviation = inverse.sqrt()
        scale = deviation if weight is None else deviation * weight.detach()
        shift = -mean * scale if bias is None else bias.detach() - mean * scale
        outputs = torch.empty_strided(inputs.shape, lines.movedim(-1, 0).stride(), **FLOAT)
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
