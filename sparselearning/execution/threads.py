"""Kernels run on PyTorch's own threads.

PyTorch's operations on a CPU run on the threads of an OpenMP library that it brings along. Were kernels to bring
threads of their own, the two pools would wait for work by spinning on each other's cores. So a kernel is handed to the
very library that PyTorch uses; where that one cannot be found, plain threads take its place.
"""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

Start = Callable[[int, int, int], None]


def run(kernel: int, task: int, shares: int) -> None:
    """Call the C function at address ``kernel`` with ``task`` on as many threads as there are shares, and wait."""
    if shares == 1:
        _call(kernel, task)
    else:
        _starter()(kernel, task, shares)


def _call(kernel: int, task: int) -> None:
    _FUNCTION(kernel)(task)


_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_int64)


@cache
def _starter() -> Start:
    """The function that starts threads on this machine."""
    return _openmp() or _threads


def _openmp() -> Start | None:
    """The entry of PyTorch's OpenMP library that GCC's code calls, if it has that one.

    It is looked up from where PyTorch calls it: other packages may have brought OpenMP libraries of their own.
    """
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"), mode=os.RTLD_NOLOAD)
        parallel = library.GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    parallel.restype = None
    return lambda kernel, task, shares: parallel(kernel, task, shares, 0)


def _threads(kernel: int, task: int, shares: int) -> None:
    others = [_pool(os.getpid(), shares - 1).submit(_call, kernel, task) for _ in range(shares - 1)]
    _call(kernel, task)
    for other in others:
        other.result()


@cache
def _pool(process: int, size: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(size, thread_name_prefix="kernel")
