"""A GPU for machines without one: it computes on the CPU, refuses what CUDA refuses, and counts what costs a GPU time.

Every tensor stays an ordinary CPU tensor; which of them lie "on the GPU" is noted at their storages, so that views and
parameters' ``data`` follow. Two modes of PyTorch do the rest:

* :class:`PretendedGpu`, a function mode, sees every call from Python: it answers ``tensor.device``, sends what is made
  for or moved to ``cuda`` there, and refuses NumPy and generators of the other device.
* :class:`Kernels`, a dispatch mode, sees every operation, those of the backward pass too: it refuses operands on two
  devices, lets results lie where operands do, and counts kernels and waits.

What it cannot show: numerics and speed of CUDA, races between streams, NCCL, compiled code.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
aten = torch.ops.aten

WAITING = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2, aten.bincount}
"""Operations whose result the host has to wait for: its value, or its size."""
COPIES = {aten.copy_, aten._to_copy}
"""Operations whose operands and result may lie on two devices."""
TENSORS_PER_KERNEL = (110, 64, 48, 36, 30)
BLOCKS_PER_KERNEL, NUMBERS_PER_BLOCK = 320, 65536
"""What one kernel of a ``_foreach_`` or ``_fused_`` operation takes, by the number of its lists (PyTorch's
MultiTensorApply.cuh)."""


def _tensors(*values: Any) -> list[Tensor]:
    """The tensors among some values and in their lists, tuples and dicts."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(*value)
        elif isinstance(value, dict):
            found += _tensors(*value.values())
    return found


@dataclass(frozen=True)
class Counts:
    """Kernels (copies among them) by operation, and how often the host waited for one."""

    launches: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)


class Kernels(TorchDispatchMode):
    """Counts what operations cost a GPU, a real one if not told otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    @contextlib.contextmanager
    def counting(self) -> Iterator[Counts]:
        """The counts of one block."""
        before, self.counts = self.counts, Counts()
        try:
            yield self.counts
        finally:
            self.counts = before

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is on the GPU."""
        return tensor.is_cuda

    def operate(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Carry an operation out."""
        return func(*args, **kwargs)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = self.operate(func, args, kwargs)
        operands, results = _tensors(args, kwargs), _tensors(result)
        sides = {self.holds(tensor) for tensor in operands + results}
        if True in sides and _computes(func, operands, results):
            kind = func.overloadpacket
            self.counts.launches[kind.__name__] += _kernels(kind.__name__, args, results)
            non_blocking = kwargs.get("non_blocking") or (kind is aten.copy_ and args[2:] == (True,))
            copies_between = kind in COPIES and len(sides) == 2 and not non_blocking
            if kind in WAITING or copies_between or _looks_for_true_ones(kind, args):
                self.counts.waits[kind.__name__] += 1
        return result


def _computes(func: Any, operands: list[Tensor], results: list[Tensor]) -> bool:
    """Whether an operation needs a kernel, and is no view or allocation."""
    known = {tensor.untyped_storage().data_ptr() for tensor in operands}
    makes = not results or any(tensor.untyped_storage().data_ptr() not in known for tensor in results)
    return (makes or func._schema.is_mutable) and "empty" not in func.overloadpacket.__name__


def _kernels(name: str, args: tuple, results: list[Tensor]) -> int:
    lists = [arg for arg in args if isinstance(arg, list | tuple) and arg and isinstance(arg[0], Tensor)]
    if ("_foreach_" not in name and "_fused_" not in name) or not lists:
        return 1
    depth = min(len(lists) + bool(results), len(TENSORS_PER_KERNEL))
    blocks = sum(math.ceil(tensor.numel() / NUMBERS_PER_BLOCK) for tensor in lists[0])
    return max(math.ceil(len(lists[0]) / TENSORS_PER_KERNEL[depth - 1]), math.ceil(blocks / BLOCKS_PER_KERNEL))


def _looks_for_true_ones(kind: Any, args: tuple) -> bool:
    """Whether an operation indexes by a mask: the GPU counts its true entries, and the host waits for the number."""
    if kind not in (aten.index, aten.index_put_):
        return False
    is_fill = kind is aten.index_put_ and args[2].numel() == 1
    return not is_fill and any(index is not None and index.dtype == torch.bool for index in args[1])


class _PretendedKernels(Kernels):
    """Kernels of a GPU whose tensors lie in main memory."""

    makes_here = False  # what is made from nothing is made on the GPU

    def holds(self, tensor: Tensor) -> bool:
        return getattr(tensor.untyped_storage(), "on_gpu", False)

    def place(self, tensor: Tensor, on_gpu: bool = True) -> Tensor:
        """Note where a tensor lies."""
        tensor.untyped_storage().on_gpu = on_gpu
        return tensor

    def operate(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        operands = _tensors(args, kwargs)
        sides = {self.holds(tensor) for tensor in operands if tensor.dim()}  # CUDA takes single numbers of the CPU
        if len(sides) == 2 and func.overloadpacket not in COPIES:
            raise RuntimeError(f"Expected all tensors to be on the same device, cuda:0 and cpu in {func}")
        result = func(*args, **kwargs)
        if func.overloadpacket is not aten.copy_ and (
            any(map(self.holds, operands)) or (self.makes_here and not operands)
        ):
            for tensor in _tensors(result):
                self.place(tensor)
        return result


class _Generator(torch.Generator):
    """A generator that knows where it is."""

    def __new__(cls, device: Any = CPU) -> "_Generator":
        made = super().__new__(cls)
        made.on_gpu = torch.device(device).type == "cuda"
        return made

    @property
    def device(self) -> torch.device:
        """Where it draws."""
        return CUDA if self.on_gpu else CPU


class _Autocast(torch.autocast):
    """The CPU's autocast; float16, which takes minutes there, is bfloat16."""

    def __init__(self, device_type: str, dtype: torch.dtype) -> None:
        super().__init__("cpu", torch.bfloat16 if dtype == torch.float16 else dtype)


class _Stream(contextlib.nullcontext):
    """A stream, in which everything happens at once."""

    device = CUDA

    def wait_stream(self, other: "_Stream") -> None:
        """Nothing is under way."""


def _pin(tensor: Tensor, device: Any = None) -> Tensor:
    tensor.untyped_storage().pinned = True
    return tensor


ANSWERS: dict[str, Any] = {
    "torch.cuda.is_available": lambda: True,
    "torch.cuda.device_count": lambda: 1,
    "torch.cuda.current_device": lambda: 0,
    "torch.cuda.set_device": lambda device: None,
    "torch.cuda.synchronize": lambda device=None: None,
    "torch.cuda.get_device_name": lambda device=None: "pretended GPU",
    "torch.cuda.is_bf16_supported": lambda including_emulation=True: True,
    "torch.cuda.get_rng_state": lambda device=None: torch.get_rng_state(),
    "torch.cuda.set_rng_state": lambda state, device=None: torch.set_rng_state(state),
    "torch.cuda.Stream": lambda device=None: _Stream(),
    "torch.cuda.stream": lambda stream: stream,
    "torch.cuda.current_stream": lambda device=None: _Stream(),
    "torch.accelerator.current_device_index": lambda: 0,
    "torch.accelerator.set_device_index": lambda device: None,
    "torch.Generator": _Generator,
    "torch.autocast": _Autocast,
    # What a loader's own thread calls, in which the modes are not, and what wants a real stream.
    "torch.Tensor.pin_memory": _pin,
    "torch.Tensor.is_pinned": lambda tensor: hasattr(tensor.untyped_storage(), "pinned"),
    "torch.Tensor.record_stream": lambda tensor, stream: None,
    "torch.optim.Optimizer._accelerator_graph_capture_health_check": lambda optimizer: None,  # asks CUDA itself
}
"""What stands in the place of PyTorch's own functions while the GPU is there."""


class PretendedGpu(TorchFunctionMode):
    """One GPU, ``cuda:0``, in this thread, for as long as it is entered: ``with PretendedGpu() as kernels``."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = _PretendedKernels()
        self._exits = contextlib.ExitStack()
        self._calls: dict[Any, Callable] = {
            Tensor.device.__get__: lambda func, t: CUDA if self.kernels.holds(t) else CPU,
            Tensor.is_cuda.__get__: lambda func, t: self.kernels.holds(t),
            Tensor.numpy: self._numpy,
            Tensor.tolist: self._tolist,
            Tensor.to: self._to,
            Tensor.cpu: lambda func, t: self._to(Tensor.to, t, CPU),
            Tensor.__deepcopy__: lambda func, t, memo: self.kernels.place(func(t, memo), self.kernels.holds(t)),
            torch.tensor: self._from_host,
            torch.as_tensor: self._from_host,
        }

    def __enter__(self) -> Kernels:
        group = torch._C._group_tensors_by_device_and_dtype

        def group_for_optimizers(lists: Any, *args: Any) -> dict:  # reads devices where no mode sees it
            device = CUDA if self.kernels.holds(lists[0][0]) else CPU
            return {(device, dtype): content for (_, dtype), content in group(lists, *args).items()}

        for name, answer in [*ANSWERS.items(), (f"torch._C.{group.__name__}", group_for_optimizers)]:
            self._exits.enter_context(mock.patch(name, answer))
        self._exits.enter_context(self.kernels)
        super().__enter__()
        return self.kernels

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._exits.close()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self._calls:
            return self._calls[func](func, *args, **kwargs)
        here = any(map(self.kernels.holds, _tensors(args)))
        if kwargs.get("device") is not None:
            here = torch.device(kwargs["device"]).type == "cuda"
            kwargs["device"] = CPU
        generator = kwargs.get("generator")
        if generator is not None and generator.device != (CUDA if here else CPU):
            raise RuntimeError(f"Expected a {'cuda' if here else 'cpu'} device type for generator of {func}")
        self.kernels.makes_here = here
        try:
            return func(*args, **kwargs)
        finally:
            self.kernels.makes_here = False

    def _numpy(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.kernels.holds(tensor):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        return func(tensor, *args, **kwargs)

    def _tolist(self, func: Any, tensor: Tensor) -> Any:
        if self.kernels.holds(tensor):
            self.kernels.counts.waits["tolist"] += 1
        return func(tensor)

    def _to(self, func: Any, tensor: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        if args and isinstance(args[0], Tensor):
            device = args[0].device if not self.kernels.holds(args[0]) else CUDA
        here = self.kernels.holds(tensor)
        there = here if device is None else device.type == "cuda"
        layout = {"memory_format": memory_format} if memory_format is not None else {}
        moved = func(tensor, dtype or tensor.dtype, copy=copy or here != there, **layout)
        if here != there:
            self.kernels.place(moved, there)
            if there:  # the other way it has counted as an operation
                self.kernels.counts.launches["_to_copy"] += 1
            if not non_blocking:
                self.kernels.counts.waits["_to_copy"] += 1
        return moved

    def _from_host(self, func: Any, data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        made = func(data, *args, **kwargs)
        return made if device is None else self._to(Tensor.to, made, torch.device(device))
