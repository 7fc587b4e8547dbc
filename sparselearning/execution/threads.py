"""Kernels run on PyTorch's own threads.

PyTorch's operations on a CPU run on the threads of an OpenMP library that it brings along. Were kernels to bring
threads of their own, the two pools would wait for work by spinning on each other's cores. So a kernel is handed to the
very library that PyTorch uses; where that one cannot be found, plain threads take its place. One kernel runs at a time,
in memory to work in that is kept from call to call.
"""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch

from sparselearning.execution.memory import FLOAT

Start = Callable[[int, int, int], None]

_one_at_a_time = Lock()  # whatever thread of Python calls: a task and the scratch memory serve one call
_scratch = torch.empty(0, **FLOAT)


def run(kernel: Any, task: np.ndarray, shares: int, work_bytes: int, **entries: int) -> None:
    """Do a task on as many threads as there are shares, each with memory of its own to work in, and wait.

    Args:
        kernel: compiled, a C function of the task's address.
        task: one record, with the entries ``shares``, ``next_share`` and ``work``, which are set here.
        shares: of the work.
        work_bytes: of each.
        entries: to be set, too.
    """
    with _one_at_a_time:
        for name, value in entries.items():
            task[name] = value
        task["shares"], task["next_share"] = shares, 0
        task["work"] = _work(shares * work_bytes)
        if shares == 1:
            _call(kernel.address, task.ctypes.data)
        else:
            _starter()(kernel.address, task.ctypes.data, shares)


def _work(size: int) -> int:
    """Address of at least ``size`` bytes that kernels may write to; kept from call to call."""
    global _scratch
    if 4 * _scratch.numel() < size:
        _scratch = torch.empty(-(-size // 4), **FLOAT)
    return _scratch.data_ptr()


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
