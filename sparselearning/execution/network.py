"""A network that computes with active weights alone, in place of the masked one, on CPUs.

The user's model runs as it is. While it does, the functions that it calls are watched (:class:`Watch`), and replaced
where they read a masked weight.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic

import numpy as np
import torch
from torch import Tensor, nn

from sparselearning.execution import memory
from sparselearning.execution.active_weights import ActiveWeights, Made, Shape
from sparselearning.execution.functions import ActiveGradient
from sparselearning.execution.layout import image_first
from sparselearning.execution.supported import has_kernel
from sparselearning.execution.watch import Watch, state_of
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
    zero, but where ``dense_gradients`` or the Masking asks for them, also in layers without a kernel (grouped, dilated,
    …), which run masked. Other layers (attention, transposed and one-dimensional convolutions, …), and blocks that
    ``torch.utils.checkpoint`` runs again in the backward pass, are computed as in the model itself.

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
        UsageError: if there are no masks yet, a weight is not float32 on the CPU, or a module is scripted or compiled.
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
        with Watch(self):
            outputs = self.model(*args, **kwargs)
        return image_first(outputs, (args, kwargs))

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

        state = [state_of(entries) for entries in active.values()]
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
        return masking.weights_are_masked

    def active(self, weight: Tensor, shape: Shape, masks_hold: bool) -> ActiveWeights:
        """Active weights of a layer, sorted again only when they have changed.

        Args:
            weight: of the layer.
            shape: of the layer.
            masks_hold: as at the beginning of the pass.
        """
        name, strides = self._names[weight], weight.stride()
        dense = _dense_strides(weight.shape, strides)
        entries, state = self._entries(weight, dense, masks_hold)

        def make() -> ActiveWeights:
            keeps_values = self._is_private or not torch.is_grad_enabled()
            return ActiveWeights(shape, entries.detach() != 0, dense, keeps_values)

        return self._lists[masks_hold].setdefault(name, _Latest()).of((state, strides, shape), make)

    def _entries(self, weight: Tensor, dense: Sequence[int], masks_hold: bool) -> tuple[Tensor, Any]:
        """What is not zero where a weight is active, and a value that differs once other weights may be.

        Without gradients it differs once any weight has another value. ``dense`` are the strides of a dense copy.
        """
        mask = None if self.masking is None else self.masking.masks[self._names[weight]]
        if self._is_private:
            return weight, None
        if mask is not None and masks_hold:
            return mask, state_of(mask)
        if not torch.is_grad_enabled():
            return weight, (state_of(weight), _checksum(weight, dense))
        is_there = weight.detach().numpy() != 0  # three times as fast as PyTorch's
        if mask is not None:
            is_there |= mask.numpy()  # active weights have gradients where they are zero, too
        entries = torch.from_numpy(is_there)
        return entries, entries.as_strided((entries.numel(),), (1,)).numpy().tobytes()

    def note_gradient(self, weight: Tensor, is_dense: bool) -> None:
        """Let the Masking take note of a coming gradient of a layer's weight that is not that of all its weights."""
        if self.masking is not None and torch.is_grad_enabled() and not is_dense:
            self.masking.note_active_gradient(self._names[weight])

    def with_active_gradient(self, weight: Tensor, is_dense: bool) -> Tensor:
        """The weight, for a layer that runs masked; unless ``is_dense``, inactive weights will have no gradient."""
        self.note_gradient(weight, is_dense)
        if self.masking is None or not torch.is_grad_enabled() or is_dense:
            return weight
        return ActiveGradient.apply(weight, self.masking.masks[self._names[weight]])


@functools.cache
def _dense_strides(shape: torch.Size, strides: tuple[int, ...]) -> tuple[int, ...]:
    """Those of a tensor's dense copy: its own, unless it has gaps in memory."""
    tensor = torch.empty_strided(shape, strides, device="cpu")  # of a meta tensor, dimensions of 1 get other strides
    return torch.empty_like(tensor, device="meta").stride()


PROBE = torch.arange(1, 1025, dtype=torch.float32).sin()
"""What runs of weights are multiplied with for a checksum: no two numbers are alike."""


def _checksum(weight: Tensor, dense: Sequence[int]) -> Any:
    """A value that differs once a weight has changed by more than rounding, or is not finite; reads at memory's speed.

    PyTorch counts no writes through ``.data``. ``dense`` are the strides of the weight's dense copy.
    """
    weight = weight.detach()
    numbers = weight.as_strided((weight.numel(),), (1,)) if weight.stride() == dense else weight.reshape(-1)
    whole, rest = numbers.tensor_split([len(numbers) - len(numbers) % len(PROBE)])
    sums = torch.cat([whole.view(-1, len(PROBE)).mv(PROBE), rest.dot(PROBE[: len(rest)]).view(1)]).numpy()
    return sums.tobytes() if np.isfinite(sums).all() else object()


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
