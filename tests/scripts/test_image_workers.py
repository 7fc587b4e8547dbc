"""Processes that decode images: they outlive signals, end with the pass, and their faults are told."""

import contextlib
import gc
import os
import resource
import select
import signal
import subprocess
import sys

import pytest
import torch
from imagenet_data import FolderLoader, ImageFiles
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from helpers.imagenet import SIZE, assert_same, load
from helpers.processes import PATIENCE, marked_processes, on_linux, wait_until
from sparselearning.process.errors import FaultError


def test_workers_end_with_the_pass_also_when_it_is_abandoned(image_folder, children):
    batches = load(image_folder, workers=2).train.epoch(0)
    next(batches)
    assert len(children()) == 2
    batches.close()
    assert children() == []


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="this system cannot tell who sent a signal")
def test_workers_leave_signals_to_the_main_process(image_folder, children, tmp_path):
    def answer(signal_number, frame):  # the main process's; a worker must not run it
        (tmp_path / str(os.getpid())).touch()

    previous = signal.signal(signal.SIGTERM, answer)
    try:
        loader = load(image_folder, batch_size=1, workers=2).train
        batches = loader.epoch(0)
        seen = [next(batches), next(batches)]  # one from each worker: both are up
        workers = children()
        for name in ("INT", "TERM"):  # from a process that is not their parent
            subprocess.run(["sh", "-c", f"kill -{name} {workers[0].pid} {workers[1].pid}"], check=True)
        seen += batches
        assert_same(seen, load(image_folder, batch_size=1).train.epoch(0))

        batches = loader.epoch(0)
        next(batches), next(batches)
        workers = children()
        for worker in workers:
            worker.terminate()
            worker.join(10)
        assert [worker.exitcode for worker in workers] == [0, 0]
        assert list(tmp_path.iterdir()) == []
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_workers_are_not_forked_from_a_process_that_may_have_threads(image_folder, monkeypatch):
    """They would inherit the locks that gloo's or CUDA's threads hold at that moment, and wait for them forever."""
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("forked"))
    assert_same(load(image_folder, workers=2).train.epoch(0), load(image_folder).train.epoch(0))


PASS = """
import signal, sys
from helpers.imagenet import load
received = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, _: received.append(number))
loader = load(sys.argv[1], batch_size=1, workers=2).train
for epoch in range(2):
    batches = loader.epoch(epoch)
    next(batches)
    print("under way", flush=True)
    sys.stdin.readline()
    print(1 + len(list(batches)), len(received), flush=True)
"""


@pytest.fixture
def process(image_folder):
    """In a session of its own, it has taken one of 32 batches, and takes the others when told; twice."""
    command, pipe = [sys.executable, "-c", PASS, str(image_folder)], subprocess.PIPE
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "MARK": str(image_folder)}
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, start_new_session=True) as process:
        yield process
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def told(process):
    """The next line that a process writes."""
    assert select.select([process.stdout], [], [], PATIENCE)[0], f"nothing after {PATIENCE} seconds"
    return process.stdout.readline()


@on_linux
def test_a_pass_outlives_signals_to_all_of_its_processes_but_not_the_end_of_its_main_one(image_folder, process):
    assert told(process) == b"under way\n"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.killpg(process.pid, number)
    process.stdin.write(b"\n")
    process.stdin.flush()
    assert told(process) == b"32 3\n"
    assert told(process) == b"under way\n"
    assert len(marked_processes(image_folder)) > 2
    process.kill()
    process.wait()
    wait_until(lambda: not marked_processes(image_folder), 30)


def die(image):
    os.kill(os.getpid(), signal.SIGKILL)


def fill_shared_memory(image):
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # that of this worker is full
    return torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)


def raise_anything(image):
    raise RuntimeError("a mistake of one's own")


@pytest.fixture(scope="module")
def impatient():
    """PyTorch looks after its processes every second, not every five, while it waits for them, and at their end."""
    with pytest.MonkeyPatch.context() as context:
        context.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (1.0,))
        context.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 1.0)
        yield
        gc.collect()  # what faults keep alive


def loader_of(image_folder, view, device="cpu"):
    return FolderLoader(
        ImageFiles(image_folder / "train"),
        view,
        batch_size=4,
        workers=1,
        seed=0,
        device=torch.device(device),
        shuffle=True,
        padded=True,
    )


@pytest.mark.parametrize("view", [die, fill_shared_memory])
def test_a_worker_that_dies_or_has_no_room_is_a_fault(impatient, image_folder, view):
    with pytest.raises(FaultError, match="a process that decodes images died or cannot send them, as a rule because"):
        list(loader_of(image_folder, view).epoch(0))


def test_pinning_that_ends_early_is_a_fault(impatient, gpu, image_folder, monkeypatch):
    # What a worker that dies while it hands a batch over does to the thread that pins batches for a GPU.
    monkeypatch.setattr("torch.utils.data._utils.pin_memory._pin_memory_loop", lambda *arguments: None)
    with pytest.raises(FaultError, match=r"a process that decodes images died.*\(Pin memory thread exited"):
        list(loader_of(image_folder, raise_anything, "cuda").epoch(0))


def test_other_errors_of_a_worker_come_as_they_are(impatient, image_folder):
    with pytest.raises(RuntimeError, match="a mistake of one's own"):
        list(loader_of(image_folder, raise_anything).epoch(0))
