"""What runs in place of the functions that a model calls: :data:`REPLACEMENTS`, while it is watched.

Replaced are functions that read a masked weight, and those that would lose the layout of activations. A BatchNorm's
output is not written until something reads it: what follows at once may be done in the same pass.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Generic

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from sparselearning.execution import layout
from sparselearning.execution.active_weights import Made, Shape
from sparselearning.execution.functions import AddToNorm, BatchNorm, Gate, Norm, Relu, ReluOfNorm, SparseConvolution
from sparselearning.execution.layout import POOLINGS, plane_wise
from sparselearning.execution.lists import Grid
from sparselearning.execution.supported import convolution_shape, has_kernel, is_readable

if TYPE_CHECKING:
    from sparselearning.execution.network import SparseNetwork


def state_of(entries: Tensor) -> Any:
    """A value that differs after every change; inference tensors have no version, and may always have changed."""
    return entries.data_ptr(), object() if entries.is_inference() else entries._version


class _Notes(Generic[Made]):
    """What is known of tensors, as long as they stay what they are."""

    def __init__(self) -> None:
        self._notes: dict[int, tuple[Tensor, Any, Made]] = {}  # by identity; a tensor that is held keeps its own

    def take(self, tensor: Tensor, note: Made) -> None:
        """Take note of something."""
        self._notes[id(tensor)] = tensor, self._seen(tensor), note

    def of(self, tensor: Tensor) -> Made | None:
        """What is known of a tensor, if anything."""
        held, state, note = self._notes.get(id(tensor), (None, None, None))
        return note if held is tensor and state == self._seen(tensor) else None

    @staticmethod
    def _seen(tensor: Tensor) -> Any:
        return state_of(tensor), tensor.grad_fn


class Watch(TorchFunctionMode):
    """Replaces functions while a model runs."""

    def __init__(self, network: "SparseNetwork") -> None:
        super().__init__()
        self.network = network
        self.masks_hold = network.masks_hold
        self.wants_dense = network.wants_dense_gradients
        # Outputs of BatchNorm that are still to be written, by identity; those that a ReLU has taken over, and that may
        # be gone, are held weakly.
        self.unwritten: dict[int, tuple[Callable[[], Tensor | None], Norm]] = {}
        self.gates: _Notes[Gate] = _Notes()  # of outputs of ReLU
        self.shared = WeakIdKeyDictionary()  # of activations, all tensors that share their memory
        self.passed_on: _Notes[Tensor] = _Notes()  # of what a convolution has read: the same, as it passed it on

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if "input" in kwargs:
            args = (kwargs.pop("input"), *args)
        replacement = None if _is_checkpointed() else REPLACEMENTS.get(func)
        if self.unwritten and func not in READ_NO_NUMBERS:
            arguments = list(_tensors([args, list(kwargs.values())]))
            self.write_before_a_change(arguments)
            if replacement is None or func not in LEAVE_UNWRITTEN:
                self.write(arguments)
        result = NotImplemented if replacement is None else replacement(self, *args, **kwargs)
        if result is not NotImplemented:  # other replacements than view's give new memory, or what they have read
            return result
        result = func(*args, **kwargs)
        if args and isinstance(args[0], Tensor):
            self.note_shared(args[0], _tensors([result]))
        return result

    def note_shared(self, activations: Tensor, results: Iterable[Tensor]) -> None:
        """Note which results of a function share the memory of what it has read, where these are activations."""
        if activations not in self.shared and not layout.lies_image_last(activations):
            return
        memory = activations.untyped_storage().data_ptr()
        for result in results:
            if result is activations or result.layout != torch.strided or result.untyped_storage().data_ptr() != memory:
                continue
            sharing = self.shared.setdefault(activations, [weakref.ref(activations)])
            sharing.append(weakref.ref(result))
            self.shared[result] = sharing

    def is_shared(self, activations: Tensor) -> bool:
        """Whether another tensor that shares the memory of this one is still held."""
        sharing = (one() for one in self.shared.get(activations, ()))
        return any(one is not None and one is not activations for one in sharing)

    def __exit__(self, *exception: Any) -> None:
        self.write([held() for held, _ in list(self.unwritten.values())])
        super().__exit__(*exception)

    def write(self, arguments: Iterable[Any]) -> None:
        """Write all BatchNorm outputs among these arguments that were put off, now that they may be read."""
        for argument in arguments:
            if (norm := self.take_over(argument)) is not None:
                norm.sequel.relu = False
                norm.write(argument, relu=False)

    def write_before_a_change(self, arguments: Iterable[Tensor]) -> None:
        """Write what was put off and is still to read the memory of these arguments, which may now be written to."""
        written = {argument.untyped_storage().data_ptr() for argument in arguments} - {0}
        reading = [held for held, norm in list(self.unwritten.values()) if not written.isdisjoint(norm.memory())]
        self.write([held() for held in reading])

    def put_off(self, outputs: Tensor, norm: Norm) -> Tensor:
        """Leave a BatchNorm's output unwritten until it is read."""
        self.unwritten[id(outputs)] = (lambda: outputs), norm
        return outputs

    def leave_unwritten(self, outputs: Tensor, norm: Norm) -> None:
        """Leave it unwritten for good, unless something else reads it; once nothing can, forget it."""
        key = id(outputs)

        def forget(gone: Any) -> None:
            if self.unwritten.get(key, (None,))[0] is gone:
                del self.unwritten[key]

        self.unwritten[key] = weakref.ref(outputs, forget), norm

    def take_over(self, outputs: Any) -> Norm | None:
        """What is still to be written to this tensor, if anything; from now on that is the caller's task."""
        held, norm = self.unwritten.get(id(outputs), (None, None))
        if held is None or held() is not outputs:
            return None
        del self.unwritten[id(outputs)]
        return norm

    def added_to(self, inputs: Tensor, other: Tensor) -> Tensor:
        """What to add in place of ``other``: what the convolution passed on that read it and leads to ``inputs``.

        Only then do gradients of the sum come to that convolution by both ways, or by none.
        """
        passed_on = self.passed_on.of(other)
        return other if passed_on is None or not _leads_to(passed_on.grad_fn, inputs.grad_fn) else passed_on


def _is_checkpointed() -> bool:
    """Whether ``torch.utils.checkpoint`` is to run this again in the backward pass, unwatched, and expects the same."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and getattr(hooks[0], "__module__", None) == "torch.utils.checkpoint"


def _leads_to(first: Any, last: Any) -> bool:
    """Whether the first inputs of operations lead from one to another, within a residual block."""
    for _ in range(LONGEST_BLOCK):
        if last is first or last is None or not last.next_functions:
            break
        last = last.next_functions[0][0]
    return last is first


LONGEST_BLOCK = 32
"""Operations of a residual block, at most."""


def _tensors(arguments: Any) -> Iterator[Tensor]:
    """All tensors in nested lists and tuples."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, list | tuple):
            yield from _tensors(argument)


# ------------------------------------------------------------------------------------------- replacements
# Each takes the arguments of the function that it replaces, and returns NotImplemented where that one is to run.


def _conv2d(
    watch: Watch, inputs: Tensor, weight: Tensor, bias: Tensor | None = None,
    stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> Any:  # fmt: skip
    network = watch.network
    if not network.has(weight):
        return NotImplemented
    shape = convolution_shape(weight.shape, stride, padding, dilation, groups)
    if shape is None or inputs.dim() != 4 or not _fit(inputs, weight, bias):
        return F.conv2d(
            inputs, network.with_active_gradient(weight, watch.wants_dense), bias, stride, padding, dilation, groups
        )
    target = shape.target(Grid(inputs.shape[2], inputs.shape[3], inputs.shape[0]))
    if min(target.rows, target.columns) < 1:
        return NotImplemented  # PyTorch says that the kernel is larger than the image
    active, gate = network.active(weight, shape, watch.masks_hold), watch.gates.of(inputs)
    network.note_gradient(weight, watch.wants_dense)
    outputs, passed_on = SparseConvolution.apply(inputs, weight, bias, active, watch.wants_dense, gate)
    if torch.is_grad_enabled() and passed_on is not None:
        watch.passed_on.take(inputs, passed_on)
        if gate is not None:
            gate.readers += 1
    return outputs


def _fit(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether kernels, which read addresses and nothing else, can compute with these; if not, PyTorch is called."""
    return (
        inputs.numel() > 0
        and inputs.shape[1] == weight.shape[1]
        and (bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous()))
        and is_readable(inputs, weight, bias)
    )


def _linear(watch: Watch, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    network = watch.network
    if not network.has(weight):
        return NotImplemented
    if inputs.dim() != 2 or not has_kernel(weight) or not _fit(inputs, weight, bias):
        return F.linear(inputs, network.with_active_gradient(weight, watch.wants_dense), bias)
    active = network.active(weight, Shape(weight.shape[0], weight.shape[1], (1, 1)), watch.masks_hold)
    planes = inputs.unsqueeze(-1).unsqueeze(-1)
    network.note_gradient(weight, watch.wants_dense)
    outputs, _ = SparseConvolution.apply(planes, weight, bias, active, watch.wants_dense, None)
    return layout.Rearranged.apply(outputs, lambda one: one.flatten(1), lambda one: one.unsqueeze(-1).unsqueeze(-1))


def _batch_norm(
    watch: Watch, inputs: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    weight: Tensor | None = None, bias: Tensor | None = None, training: bool = False, momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:  # fmt: skip
    numbers = inputs.numel() // max(inputs.shape[1], 1)
    by_channel = (running_mean, running_var, weight, bias)
    if inputs.dim() != 4 or numbers < 2 or not is_readable(inputs, *by_channel):
        return NotImplemented
    if any(entry is not None and entry.shape != inputs.shape[1:2] for entry in by_channel):
        return NotImplemented
    norms: list[Any] = []
    known = (None, None) if training else (running_mean, running_var)
    outputs = BatchNorm.apply(inputs, weight, bias, *known, eps, lambda *norm: norms.extend(norm))
    norm, mean, variance = norms
    if training and running_mean is not None and running_var is not None:
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(variance * (numbers / (numbers - 1)), momentum)
    return watch.put_off(outputs, norm)


def _relu(watch: Watch, inputs: Tensor, inplace: bool = False) -> Any:
    norm, gate = watch.take_over(inputs), Gate()
    if norm is not None:
        outputs = ReluOfNorm.apply(inputs, norm, inplace, gate)
        if not inplace:
            watch.leave_unwritten(inputs, norm)
    elif inplace or inputs.dim() != 4:
        return NotImplemented
    else:
        outputs = Relu.apply(inputs, gate)
    is_part_of_norm = norm is not None and norm.sequel.relu
    if outputs.requires_grad and not is_part_of_norm:
        watch.gates.take(outputs, gate)
    return outputs


def _add_in_place(watch: Watch, inputs: Tensor, other: Any, *, alpha: float = 1) -> Any:
    watch.write(_tensors([other]))
    norm = watch.take_over(inputs)
    if norm is None:
        return NotImplemented
    fits = isinstance(other, Tensor) and other.shape == inputs.shape and is_readable(other)
    if norm.added is not None or alpha != 1 or not fits:
        norm.write(inputs, relu=False)
        return NotImplemented
    return watch.put_off(AddToNorm.apply(inputs, watch.added_to(inputs, other), norm), norm)


def _view(watch: Watch, inputs: Tensor, *shape: Any, **kwargs: Any) -> Any:
    if watch.is_shared(inputs):  # what others share cannot be moved: PyTorch then says to use reshape
        return NotImplemented
    outputs = layout.view(inputs, *shape, **kwargs)
    watch.note_shared(inputs, [outputs])
    return outputs


def _by_channel(function: Callable[..., Any]) -> Callable[..., Any]:
    replacement = plane_wise(function)
    return lambda watch, *args, **kwargs: replacement(*args, **kwargs)


REPLACEMENTS: Mapping[Any, Callable[..., Any]] = {
    F.conv2d: _conv2d,
    torch.conv2d: _conv2d,
    F.linear: _linear,
    F.batch_norm: _batch_norm,
    F.relu: _relu,
    Tensor.__iadd__: _add_in_place,
    Tensor.add_: _add_in_place,
    Tensor.view: _view,
    **{function: _by_channel(function) for function in POOLINGS},
}
"""Function to its replacement."""

READ_NO_NUMBERS: set[Any] = {Tensor.dim, Tensor.numel, Tensor.size, Tensor.stride}
"""Functions that read and write no numbers of a tensor."""
LEAVE_UNWRITTEN: set[Any] = {F.relu, Tensor.__iadd__, Tensor.add_}
"""Functions whose replacements handle a BatchNorm's output that is still to be written."""
