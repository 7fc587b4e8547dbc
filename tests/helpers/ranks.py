"""Ranks that run what tests ask of them."""

import contextlib
import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor, wait

import numpy as np
import pytest
import torch

from helpers.processes import PATIENCE, free_port
from sparselearning.process import distributed

CPU = torch.device("cpu")


class Ranks:
    """Two processes, or more, in one gloo group. A call runs a function in all and returns the results in rank order.

    Ranks that had to be killed are followed by others.
    """

    def __init__(self, world_size=2):
        self._world_size = world_size
        self._start()

    def _start(self):
        port, context = free_port(), multiprocessing.get_context("spawn")
        self._pools = [
            ProcessPoolExecutor(1, context, join_group, (rank, self._world_size, port))
            for rank in range(self._world_size)
        ]
        self._processes = [future.result(PATIENCE) for future in [pool.submit(os.getpid) for pool in self._pools]]

    def __call__(self, function, *args):
        futures = [pool.submit(function, *args) for pool in self._pools]
        if wait(futures, timeout=PATIENCE).not_done:
            self.close()
            self._start()
            pytest.fail(f"the ranks wait for each other in {function.__name__}")
        return [future.result() for future in futures]

    def kill(self):
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def close(self):
        self.kill()
        for pool in self._pools:
            pool.shutdown()


def join_group(rank, world_size, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.fsync = lambda descriptor: None  # files are written as ever, but for the wait until the disk has them
    torch.set_num_threads(1)
    assert distributed.start(use_cuda=False) == CPU


def as_numpy(tensors):
    return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}


def assert_same_arrays(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
