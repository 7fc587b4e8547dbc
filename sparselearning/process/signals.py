"""Stopping on request: a signal ends a run after the step under way, with a checkpoint."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
"""What asks a run to stop: Ctrl-C, ``kill`` and schedulers, and a terminal or connection that closes."""
SECONDS_TO_STOP = 30
"""How long a process may take to stop by itself, as torchrun allows its own."""


class Stopped(Exception):
    """A signal arrived, and the checkpoint is written."""

    def __init__(self, signal_number: int, checkpoint: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.exit_code = 128 + signal_number
        self.checkpoint = checkpoint


@contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Record stop signals, which then do not end the process; yields a function that returns the one received, or 0."""
    received = 0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = number

    numbers = STOP_SIGNALS[:2] if hangups_are_ignored() else STOP_SIGNALS
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield lambda: received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def hangups_are_ignored() -> bool:
    """Whether ``nohup`` started this process, which is to outlive its terminal."""
    return hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def stop_with_parent() -> None:
    """From now on, stop this process when the one that started it is gone, however it ended.

    It gets a SIGTERM, and if it is still there after :data:`SECONDS_TO_STOP`, it ends at once.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(SECONDS_TO_STOP)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
