"""Memory for activations, kept from pass to pass.

PyTorch returns the memory of large tensors to the system at once, and the system clears new memory page by page when it
is first written to: a fifth of the time of a ResNet50 step. Kernels read a little of every channel, each in a page of
its own; with large pages, where the system has them, the processor finds them faster.
"""

import contextlib
import math
import mmap
import weakref
from collections.abc import Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor

FLOAT: Any = {"dtype": torch.float32, "device": "cpu"}
"""What kernels compute with, whatever PyTorch's default is."""
LEAST = 1 << 18
"""Numbers of the smallest tensor whose memory is kept here; smaller blocks ``malloc`` keeps."""
HUGE = 1 << 20
"""Numbers of the smallest block in large pages, which are of 2 MiB."""
LARGEST_WASTE = 2
"""How many times too large a block may be, such as that of a whole batch for an epoch's last one."""

_free: dict[int, list[tuple[int, Tensor]]] = {}  # by size: in which pass a block was given back, and the block
_taking = Lock()
_pass = 0


def begin_pass() -> None:
    """Count a pass through a network: blocks that were given back before may make room for other sizes."""
    global _pass
    _pass += 1


def empty(shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    """Uninitialised float32 numbers, dense in memory; the memory is reused once no tensor holds it."""
    numbers = math.prod(shape)
    if numbers < LEAST:
        return torch.empty_strided(tuple(shape), tuple(strides), **FLOAT)
    block = _take(numbers)
    if block is None:
        _make_room(numbers)
        block = _new(numbers)
    lent = block.numpy()
    weakref.finalize(lent, _give_back, block).atexit = False
    # Without a Python storage object: while one exists, autograd does not sum up gradients in place.
    return torch.ops.aten.set_.source_Tensor_storage_offset(
        torch.empty(0, **FLOAT), torch.from_numpy(lent), 0, list(shape), list(strides)
    )


def address(tensor: Tensor | None, number: int = 0) -> int:
    """Where one of a float32 tensor's numbers lies; 0 if there is no tensor."""
    return 0 if tensor is None else tensor.data_ptr() + 4 * number


def _new(numbers: int) -> Tensor:
    if numbers < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):  # which only Linux has
        return torch.empty(numbers, **FLOAT)
    try:
        area = mmap.mmap(-1, 4 * numbers, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"there is no memory for {numbers:,} numbers") from error
    with contextlib.suppress(OSError):  # a system without large pages
        area.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(area, dtype=torch.float32)


def _give_back(block: Tensor) -> None:
    # Without the lock: this may interrupt the thread that holds it.
    _free.setdefault(block.numel(), []).append((_pass, block))


def _take(numbers: int) -> Tensor | None:
    """The smallest free block that is large enough; of equal ones the last given back, which a cache may still hold."""
    with _taking:
        for size in (numbers, *sorted(_free)):
            if numbers <= size <= LARGEST_WASTE * numbers and _free.get(size):
                return _free[size].pop()[1]
    return None


def _make_room(numbers: int) -> None:
    """Drop as much as a new block is to take of the free blocks of earlier passes, those first that wait longest."""
    with _taking:
        waiting = sorted((when, size) for size, blocks in _free.items() for when, _ in blocks if when < _pass)
        for _, size in waiting:
            if numbers > 0:
                _free[size].pop(0)  # of one size, the first has waited longest
                numbers -= size
