"""Stopping on request: SIGINT and SIGTERM end a run after the step under way, with a checkpoint."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


class Stopped(Exception):
    """SIGINT or SIGTERM arrived, and the checkpoint is written."""

    def __init__(self, signal_number: int, checkpoint: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.exit_code = 128 + signal_number
        self.checkpoint = checkpoint


@contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Collect SIGINT and SIGTERM instead of dying of them; yields a function that returns the one received, or 0."""
    received = 0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = number

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
