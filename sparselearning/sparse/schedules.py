"""Every schedule of the method, each a pure function of the step or epoch.

Nothing here has state, so a resumed run needs no replay and a test is one line.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sparselearning.process.errors import UsageError

MIN_COSINE_PRUNE_RATE = 0.005


@dataclass(frozen=True)
class UpdateSchedule:
    """Which optimizer steps, counted from 1, end with a topology update, and what it does.

    Attributes:
        every: steps from one update to the next.
        shrinks: updates prune gradually.
        grows: updates prune and grow.
        start: step before which a method that prunes gradually changes nothing.
        last_growth: last step that may prune and grow; None: all may. Gradual pruning continues after it.
    """

    every: int
    shrinks: bool = False
    grows: bool = True
    start: int = 0
    last_growth: int | None = None

    def is_due(self, step: int, overdue: bool = False) -> bool:
        """Whether this step ends with an update; one that is overdue does not wait for its turn."""
        return (overdue or step % self.every == 0) and (self.shrinks_at(step) or self.grows_at(step))

    def shrinks_at(self, step: int) -> bool:
        """Whether an update at this step prunes gradually."""
        return self.shrinks and step >= self.start

    def grows_at(self, step: int) -> bool:
        """Whether an update at this step prunes and grows."""
        waits = self.shrinks and step < self.start
        ended = self.last_growth is not None and step > self.last_growth
        return self.grows and not (waits or ended)

    def last_shrink(self, steps: int) -> int:
        """Last of the first ``steps`` steps that ends with gradual pruning; 0: none does."""
        last = steps - steps % self.every
        return last if self.shrinks_at(last) else 0


def gradual_density(step: int, start: int, end: int, initial: float, final: float) -> float:
    """Density that gradual magnitude pruning asks for at ``step`` (cubic; Zhu & Gupta 2017, eq. 1).

    ``final + (initial - final) * (1 - clip((step - start) / (end - start), 0, 1)) ** 3``: ``initial`` up to
    ``start``, exactly ``final`` at and after ``end``. Steps are optimizer steps; densities lie in (0, 1].
    """
    if step >= end:
        return final
    if step <= start:
        return initial
    remaining = 1.0 - (step - start) / (end - start)
    return final + (initial - final) * remaining**3


def check_window(start: int, end: int, unit: str = "step") -> None:
    """Refuse gradual pruning that ends before it starts; ``unit`` is what messages count in.

    Raises:
        UsageError: if it does.
    """
    if end < start:
        raise UsageError(f"pruning cannot end at {unit} {end}, before it starts at {unit} {start}")


def check_densities(
    method: str, initial: float, final: float, names: tuple[str, str] = ("init_density", "final_density")
) -> None:
    """Refuse gradual pruning to a higher density; ``names`` are what messages call the two.

    Raises:
        UsageError: if ``final`` is above ``initial``.
    """
    if final > initial:
        raise UsageError(f"{method} prunes from {names[0]} {initial} to {names[1]} {final}, which is above it")


def cyclic_lr(t: float, lr_1: float, lr_2: float) -> float:
    """Learning rate at position ``t`` in [0, 1) of a cycle: ``lr_1`` at both ends, ``lr_2`` in the middle."""
    if t < 0.5:
        return lr_1 * (1 - 2 * t) + lr_2 * 2 * t
    return lr_1 * (2 * t - 1) + lr_2 * (2 - 2 * t)


def milestone_lr(epoch: int, lr: float, milestones: Sequence[int], warmup_epochs: int = 0) -> float:
    """Step-decayed learning rate of one epoch: ten times smaller from each milestone epoch on.

    The first ``warmup_epochs`` epochs climb linearly instead: ``lr * (epoch + 1) / (warmup_epochs + 1)``.
    """
    if epoch < warmup_epochs:
        return lr * (epoch + 1) / (warmup_epochs + 1)
    return lr * 0.1 ** sum(epoch >= milestone for milestone in milestones)


def _constant(prune_rate: float, progress: float) -> float:
    return prune_rate


def _cosine(prune_rate: float, progress: float) -> float:
    floor = min(MIN_COSINE_PRUNE_RATE, prune_rate)
    return floor + (prune_rate - floor) * (1 + math.cos(math.pi * progress)) / 2


def _linear(prune_rate: float, progress: float) -> float:
    return prune_rate * (1 - progress)


DECAYS = {"constant": _constant, "cosine": _cosine, "linear": _linear}
"""How the prune rate falls from its initial value while ``progress`` goes from 0 to 1 over the run."""
