"""A network that computes with active weights alone, in place of the masked one, on CPUs.

The user's model runs as it is. While it does, the functions that it calls are watched: those that read a masked weight,
and those that would lose the layout of activations, are replaced (:data:`REPLACEMENTS`); all others are unchanged.
"""

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparselearning.execution import memory
from sparselearning.execution.active_weights import ActiveWeights, Made, Shape
from sparselearning.execution.functions import (
    ActiveGradient,
    AddToNorm,
    BatchNorm,
    Gate,
    Norm,
    Relu,
    ReluOfNorm,
    SparseConvolution,
)
from sparselearning.execution.lists import Grid
from sparselearning.process.errors import UsageError
from sparselearning.sparse.costs import inference_flops, layer_densities
from sparselearning.sparse.masking import Masking

LARGEST_SHARE = 0.45
"""Share of the dense FLOPs up to which sparse computation is faster, on all networks and processors measured."""


def eager(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward pass that runs as it is inside ``torch.compile``, and cannot be traced: kernels read addresses."""

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.jit.is_tracing():
            raise UsageError(
                "torch.jit cannot trace a network that computes with active weights alone: trace the model"
            )
        if torch.compiler.is_compiling():
            return torch.compiler.disable(forward)(*args, **kwargs)
        return forward(*args, **kwargs)

    return call


class SparseNetwork(nn.Module):
    """Call it in place of ``model``: the same results, but for rounding, without the arithmetic of inactive weights.

    Parameters and gradients are the model's own; take state dicts from the model, for in those of this network every
    name begins with ``model.``. Gradients of inactive weights of two-dimensional convolutions and linear layers are
    zero, but where ``dense_gradients`` or the Masking asks for them; those of other layers (attention, transposed and
    one-dimensional convolutions, …) are what the model computes. Layers without a kernel (grouped, dilated, …), and
    blocks that ``torch.utils.checkpoint`` runs again in the backward pass, run masked.

    What weights there are is computed with, also where something else than the optimizer has written them. In training
    mode, writes through ``.data`` that make inactive weights other than zero go unnoticed, as they do to the Masking.

    Tensor hooks, ``retain_grad`` and modules' full backward hooks see the gradients that the model's own would be; what
    else watches the gradient of a ReLU's output, such as ``torch.autograd.grad`` with respect to it, may find zeros
    where that output is zero.

    Args:
        model: on the CPU, float32.
        weights: those of the model's that may be computed with sparsely, by name.
        masking: of this very model; None: it is not trained.
        layer_flops: dense forward FLOPs of each layer; None: compute sparsely whatever it costs.
        is_private: nothing but this network has the model, whose weights change no more.

    Attributes:
        dense_gradients: compute the gradients of inactive weights, too, in the passes that follow.

    Raises:
        UsageError: if there are no masks yet, or a weight is not float32 on the CPU.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, nn.Parameter],
        masking: Masking | None = None,
        layer_flops: Mapping[str, float] | None = None,
        is_private: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.masking = masking
        self.dense_gradients = False
        if not weights:
            raise UsageError("there are no masks yet: call add_module first")
        if any(_is_closed(module) for module in model.modules()):
            raise UsageError(
                "sparse execution cannot watch what scripted or compiled modules (torch.jit, torch.compile) call: use "
                "the plain ones"
            )
        for name, weight in weights.items():
            if weight.device.type != "cpu" or weight.dtype != torch.float32:
                raise UsageError(
                    f"sparse execution is for float32 on CPUs; {name} is {weight.dtype} on {weight.device}"
                )
        self._names: dict[Tensor, str] = {weight: name for name, weight in weights.items() if weight.dim() in (2, 4)}
        self._layer_flops = layer_flops
        self._is_private = is_private
        # With gradients and without; the latter is found again after training: PyTorch's fused optimizers do not raise
        # a weight's version when they write to it.
        self._pays: dict[bool, _Latest[bool]] = {}
        self._lists: dict[bool, dict[str, _Latest[ActiveWeights]]] = {True: {}, False: {}}  # of masks, and of weights

    @eager
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever the model returns."""
        memory.begin_pass()
        if torch.is_grad_enabled():
            self._pays.pop(False, None)
        if not self.is_sparse:
            return self.model(*args, **kwargs)
        if self.masking is not None and torch.is_grad_enabled() and not self.wants_dense_gradients:
            self.masking.note_active_gradients()
        with _Watch(self):
            outputs = self.model(*args, **kwargs)
        return memory.image_first(outputs)

    def __getstate__(self) -> dict[str, Any]:
        """All but the lists, which hold addresses of this very network's memory: a copy makes its own."""
        return self.__dict__ | {"_pays": {}, "_lists": {True: {}, False: {}}}

    @property
    def is_sparse(self) -> bool:
        """Whether a forward pass that begins now computes with active weights alone."""
        if self._layer_flops is None:
            return True
        if torch.is_grad_enabled() and self.wants_dense_gradients:
            return False  # dense gradients take a dense step's time anyway, and are faster in PyTorch's layout
        active, layer_flops = self._active_entries(), self._layer_flops

        def pays() -> bool:
            dense = sum(layer_flops.values())
            saving = layer_densities({name: entries for name, entries in active.items() if has_kernel(entries)})
            return dense > 0 and inference_flops(layer_flops, saving) / dense <= LARGEST_SHARE

        state = [_state(entries) for entries in active.values()]
        return self._pays.setdefault(torch.is_grad_enabled(), _Latest()).of(state, pays)

    def _active_entries(self) -> Mapping[str, Tensor]:
        """By name, what is not zero where a weight is active: its mask in training, and else the weight itself.

        Without gradients the model may hold other weights than those that the masks are for, such as a superposition's.
        """
        if self.masking is not None and torch.is_grad_enabled():
            return self.masking.masks
        return {name: weight for weight, name in self._names.items()}

    @property
    def wants_dense_gradients(self) -> bool:
        """Whether the weight gradients of a pass that begins now are to be those of all weights."""
        return self.dense_gradients or (self.masking is not None and self.masking.needs_dense_gradients)

    def has(self, weight: Any) -> bool:
        """Whether a weight is one of those that may be computed with sparsely."""
        return isinstance(weight, Tensor) and weight in self._names

    @property
    def masks_hold(self) -> bool:
        """Whether weights are zero off their masks, as nothing has written to them since they were masked.

        Not in evaluation, where other weights, such as an average, may have been swapped in through ``.data``, of which
        PyTorch keeps no count: what is zero is then found in the weights themselves.
        """
        masking = self.masking
        if masking is None or not (self.model.training and torch.is_grad_enabled()):
            return False
        return masking._held.are_masked

    def active(self, weight: Tensor, shape: Shape, masks_hold: bool) -> ActiveWeights:
        """Active weights of a layer, sorted again only when they have changed.

        Args:
            weight: of the layer.
            shape: of the layer.
            masks_hold: as at the beginning of the pass.
        """
        name, strides = self._names[weight], weight.stride()
        mask = None if self.masking is None else self.masking.masks[name]
        entries, state = weight, None
        if mask is not None and masks_hold:
            entries, state = mask, _state(mask)
        elif not self._is_private:
            is_there = weight.detach().numpy() != 0  # three times as fast as PyTorch's
            if mask is not None and torch.is_grad_enabled():
                is_there |= mask.numpy()  # active weights have gradients where they are zero, too
            entries = torch.from_numpy(is_there)
            state = entries.as_strided((entries.numel(),), (1,)).numpy().tobytes()

        def make() -> ActiveWeights:
            dense = torch.empty_like(weight, device="meta").stride()  # the weight's own, unless it has gaps in memory
            return ActiveWeights(shape, entries.detach() != 0, dense, keeps_values=self._is_private)

        return self._lists[masks_hold].setdefault(name, _Latest()).of((state, strides, shape), make)

    def with_active_gradient(self, weight: Tensor) -> Tensor:
        """The weight, for a layer that runs masked."""
        if self.masking is None or not torch.is_grad_enabled() or self.wants_dense_gradients:
            return weight
        return ActiveGradient.apply(weight, self.masking.masks[self._names[weight]])


def _is_closed(module: nn.Module) -> bool:
    """Whether PyTorch runs something else than a module's own code."""
    is_compiled = hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
    return is_compiled or isinstance(module, torch.jit.ScriptModule)


class _Latest(Generic[Made]):
    """Something that is made again once what it was made from has changed."""

    def __init__(self) -> None:
        self._state: Any = None
        self._made: Made | None = None

    def of(self, state: Any, make: Callable[[], Made]) -> Made:
        """What was made of this state, which differs whenever there may be something else to make."""
        if self._made is None or self._state != state:
            self._state, self._made = state, make()
        return self._made


def _state(entries: Tensor) -> Any:
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
        return _state(tensor), tensor.grad_fn


class _Watch(TorchFunctionMode):
    """Replaces functions while a model runs."""

    def __init__(self, network: SparseNetwork) -> None:
        super().__init__()
        self.network = network
        self.masks_hold = network.masks_hold
        # Outputs of BatchNorm that are still to be written, by identity; those that a ReLU has taken over, and that may
        # be gone, are held weakly.
        self.unwritten: dict[int, tuple[Callable[[], Tensor | None], Norm]] = {}
        self.gates: _Notes[Gate] = _Notes()  # of outputs of ReLU
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
        return func(*args, **kwargs) if result is NotImplemented else result

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
    watch: _Watch, inputs: Tensor, weight: Tensor, bias: Tensor | None = None,
    stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> Any:  # fmt: skip
    network = watch.network
    if not network.has(weight):
        return NotImplemented
    shape = convolution_shape(weight.shape, stride, padding, dilation, groups)
    if shape is None or inputs.dim() != 4 or not _fit(inputs, weight, bias):
        return F.conv2d(inputs, network.with_active_gradient(weight), bias, stride, padding, dilation, groups)
    target = shape.target(Grid(inputs.shape[2], inputs.shape[3], inputs.shape[0]))
    if min(target.rows, target.columns) < 1:
        return NotImplemented  # PyTorch says that the kernel is larger than the image
    active, gate = network.active(weight, shape, watch.masks_hold), watch.gates.of(inputs)
    outputs, passed_on = SparseConvolution.apply(inputs, weight, bias, active, network.wants_dense_gradients, gate)
    if torch.is_grad_enabled() and passed_on is not None:
        watch.passed_on.take(inputs, passed_on)
        if gate is not None:
            gate.readers += 1
    return outputs


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


def _fit(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether kernels, which read addresses and nothing else, can compute with these; if not, PyTorch is called."""
    return (
        inputs.numel() > 0
        and inputs.shape[1] == weight.shape[1]
        and (bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous()))
        and is_readable(inputs, weight, bias)
    )


def is_readable(*tensors: Tensor | None) -> bool:
    """Whether all of these, but for None, are float32 on the CPU, as kernels read."""
    return all(one is None or (one.dtype == torch.float32 and one.device.type == "cpu") for one in tensors)


def _linear(watch: _Watch, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    network = watch.network
    if not network.has(weight):
        return NotImplemented
    if inputs.dim() != 2 or not has_kernel(weight) or not _fit(inputs, weight, bias):
        return F.linear(inputs, network.with_active_gradient(weight), bias)
    active = network.active(weight, Shape(weight.shape[0], weight.shape[1], (1, 1)), watch.masks_hold)
    planes = inputs.unsqueeze(-1).unsqueeze(-1)
    return SparseConvolution.apply(planes, weight, bias, active, network.wants_dense_gradients, None)[0].flatten(1)


LEAST_LINEAR = 1 << 18
"""Weights of the smallest linear layer for which changing the layout pays."""


def _batch_norm(
    watch: _Watch, inputs: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
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


def _relu(watch: _Watch, inputs: Tensor, inplace: bool = False) -> Any:
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


def _add_in_place(watch: _Watch, inputs: Tensor, other: Any, *, alpha: float = 1) -> Any:
    watch.write(_tensors([other]))
    norm = watch.take_over(inputs)
    if norm is None:
        return NotImplemented
    fits = isinstance(other, Tensor) and other.shape == inputs.shape and is_readable(other)
    if norm.added is not None or alpha != 1 or not fits:
        norm.write(inputs, relu=False)
        return NotImplemented
    return watch.put_off(AddToNorm.apply(inputs, watch.added_to(inputs, other), norm), norm)


def _view(watch: _Watch, inputs: Tensor, *shape: Any, **kwargs: Any) -> Tensor:
    return memory.view(inputs, *shape, **kwargs)


def plane_wise(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of each plane by itself: to PyTorch, images innermost of channels look like channels of images."""

    def call(inputs: Tensor, *args: Any, **kwargs: Any) -> Any:
        if inputs.dim() != 4 or inputs.stride(0) != 1:
            return function(inputs, *args, **kwargs)
        outputs = function(inputs.transpose(0, 1), *args, **kwargs)
        if isinstance(outputs, tuple):  # with places, which are those in one plane
            return tuple(each.transpose(0, 1) for each in outputs)
        return outputs.transpose(0, 1)

    return call


def _by_channel(function: Callable[..., Any]) -> Callable[..., Any]:
    replacement = plane_wise(function)
    return lambda watch, *args, **kwargs: replacement(*args, **kwargs)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


POOLINGS = (F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d)
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
