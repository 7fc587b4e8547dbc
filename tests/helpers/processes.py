"""Processes that tests start, wait for, find and stop."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 180  # seconds until a test gives up on other processes


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(condition, seconds=PATIENCE):
    """Poll; return what the condition returned, or fail."""
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return result


def environment():
    """Of scripts that tests start: one thread, no GPU, this checkout."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
        "PYTHON": sys.executable,
    }


@contextlib.contextmanager
def started(command, log, cwd=None):
    """Run a command, its output in ``log``; if it has not ended by itself, it is stopped at the end."""
    options = {"cwd": cwd, "env": environment() | {"MARK": str(log)}, "start_new_session": True}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)  # a launcher passes it on to its ranks
        process.wait()


on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes in /proc")


def marked_processes(mark):
    """Process ids of all whose environment has this MARK: a command (``started``: its log) and all it started."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has just ended
            if f"MARK={mark}".encode() in environ.read_bytes().split(b"\0"):
                found.append(int(environ.parent.name))
    return found


def finished(command, log, cwd=None, seconds=PATIENCE):
    """Run a command to its end; return its exit status."""
    with started(command, log, cwd) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still not done after {seconds} s:\n{log.read_text()}")


MULTIPROC = [sys.executable, ROOT / "ImageNet" / "multiproc.py"]
