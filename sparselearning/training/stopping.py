"""How a run stops on request: all ranks at the same batch, in training and in whole passes over a set."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from sparselearning.process import distributed
from sparselearning.process.seeding import rng_state, set_rng_state
from sparselearning.training.data import Batch, BatchSource
from sparselearning.training.plan import Position


class StopRequested(Exception):
    """All ranks have seen the same stop signal at the same batch."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Stops:
    """Checks for the signal that asks a run to stop.

    Args:
        signal: returns the one that this process has received, 0 for none.
        at: the position of the run.
    """

    def __init__(self, signal: Callable[[], int], at: Position) -> None:
        self._signal = signal
        self._at = at
        self._agreed = distributed.AgreedFlag()

    def check(self) -> None:
        """Check for it; called by all ranks in lockstep.

        Raises:
            StopRequested: if one of them has received a signal.
        """
        if number := self._agreed.exchange(self._signal()):
            self._agreed.collect()
            raise StopRequested(number)

    def batches(self, source: BatchSource) -> Iterator[Batch]:
        """Batches of a whole pass, with a check before each one that all ranks have."""
        lockstep = distributed.min_over_ranks(len(source))
        for number, batch in enumerate(source.epoch(self._at.epoch)):
            if number < lockstep:
                self.check()
            yield batch


@contextmanager
def repeated_on_resume(device: torch.device) -> Iterator[None]:
    """Restore the random generators if a stop cuts this block short, which the resumed run then repeats."""
    rng = rng_state(device)
    try:
        yield
    except StopRequested:
        set_rng_state(rng, device)  # dropout draws while BatchNorm is re-estimated
        raise
