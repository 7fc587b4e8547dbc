"""Settings that all tests share: one thread, no GPU, and property tests that run the same way every time."""

import contextlib
import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("helpers")  # so that their assertions show values, too
torch.set_num_threads(1)
settings.register_profile(
    "tests",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("tests")


def pytest_addoption(parser):
    """``--gpu``: the machine's own GPU in place of the pretended one."""
    parser.addoption("--gpu", action="store_true", help="run the tests about GPUs, and only those, on a real one")


def pytest_configure(config):
    """Hide GPUs, from child processes too: bits are compared, and the other tests are about the CPU.

    Child processes compute in one thread, as this one does, and take no time from others while they wait.
    Hangups and interrupts get their default meaning back, which ``nohup`` and ``&`` take from a process and all its
    children.
    """
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if not config.getoption("--gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        raise pytest.UsageError("--gpu needs a GPU, and PyTorch sees none here")


TOGETHER = [
    ["test_imagenet_ranks", "test_cifar_ranks", "test_distributed"],  # the two ``ranks``
    ["test_image_workers", "test_imagenet_damage", "test_imagenet_data"],  # the server that image workers come from
]
"""Files of tests that share processes: these are started once for all."""
LONGEST = [
    *TOGETHER[0], *TOGETHER[1], "test_execution_network", "test_execution_kernels", "test_cifar_resuming",
    "test_analyze", "test_launch", "test_benchmarks", "test_imagenet_script", "test_models", "test_script",
    "test_resuming", "test_predict", "test_sweep", "test_package",
]  # fmt: skip
"""Files that take longest come first, so that all workers have something to do until the end."""


def pytest_collection_modifyitems(config, items):
    """Put the longest files first, and leave tests without a GPU out of ``--gpu``."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    if config.getoption("--gpu"):
        others = [item for item in items if "gpu" not in item.fixturenames]
        config.hook.pytest_deselected(others)
        items[:] = [item for item in items if item not in others]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """``-n``: tests that share processes and runs stay in one worker: those of a file, and some files."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return next((files[0] for files in TOGETHER if Path(file).stem in files), file)

    config.option.loadscopereorder = False  # or files of few tests, which start processes, would come last
    return Scheduling(config, log)


@pytest.fixture
def gpu(pytestconfig):
    """A GPU, ``cuda:0``, and the counts of its kernels: pretended, or with ``--gpu`` real."""
    from helpers.pretended_gpu import Kernels, PretendedGpu

    with Kernels() if pytestconfig.getoption("--gpu") else PretendedGpu() as kernels:
        yield kernels
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def no_waiting_for_the_disk(monkeypatch):
    """Files are written as ever, but for the wait until the disk has them."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def workplace(tmp_path, monkeypatch, no_waiting_for_the_disk):
    """A folder of its own to run in, and a disk that does not keep one waiting."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def ranks():
    """Two processes that form one group, and run what a test calls them with."""
    from helpers.ranks import Ranks

    with contextlib.closing(Ranks()) as ranks:
        yield ranks
