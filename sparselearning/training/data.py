"""What the training engine asks of a data set: batches that are pure functions of (epoch, batch index)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Batch(NamedTuple):
    """This process's share of one global batch.

    Over the processes of a run, the mean of ``weight`` times the mean loss of a share is the mean loss of the
    global batch, whose shares need not be equal: ``weight = processes * share / global batch``, in images.
    """

    images: Tensor  # float, normalised, [n, C, H, W], on the device
    labels: Tensor  # int64, [n], on the device
    weight: float = 1.0


class BatchSource(Protocol):
    """Batches of one part of a data set (training, validation or test), epoch after epoch."""

    @property
    def num_samples(self) -> int:
        """Samples of the whole part, over all processes."""

    def __len__(self) -> int:
        """Batches per epoch, the same number on every process."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield batches ``start``, ``start + 1``, … of an epoch, the same ones whatever ``start`` is."""


@dataclass(frozen=True)
class Sources:
    """Batches for each purpose.

    Attributes:
        train: shuffled and augmented.
        train_once: the same, every sample once over all ranks; for BatchNorm statistics.
        evaluation: what epochs, tickets and superpositions are measured on.
        test: the test set, touched once, at the end; None if the evaluation set is the test set.
    """

    train: BatchSource
    train_once: BatchSource
    evaluation: BatchSource
    test: BatchSource | None = None


def class_balanced(labels: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Draw ``size`` indices into ``labels`` without replacement, as many of each class as of any other.

    The counts of two classes differ by at most one, but for classes that have no more to give.

    Args:
        labels: int64 [N], on the CPU.
        size: at most N.
        generator: of the shuffle, on the CPU.
    """
    order = torch.randperm(len(labels), generator=generator)
    shuffled = labels[order]
    # The classes take turns: turn t brings the t-th of each class, in the order of the shuffle.
    turns = torch.empty_like(shuffled)
    turns[shuffled.argsort(stable=True)] = torch.cat([torch.arange(n) for n in shuffled.bincount().tolist()])
    return order[turns.argsort(stable=True)[:size]]
