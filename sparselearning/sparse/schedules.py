"""Every schedule of the method, each a pure function of the step or epoch.

Nothing here has state, so a resumed run needs no replay and a test is one line.
"""

import math
from collections.abc import Sequence

MIN_COSINE_PRUNE_RATE = 0.005


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
