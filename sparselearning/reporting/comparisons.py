"""How alike masks and predictions are, and how good predictions: pure functions of tensors."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparselearning.reporting.analysis import LayerRow

CALIBRATION_BINS = 15


def pairwise(compare: Callable[[Any, Any], float], items: Sequence[Any]) -> list[list[float]]:
    """Matrix of ``compare(row, column)``."""
    return [[compare(a, b) for b in items] for a in items]


def compare_layer(name: str, masks: Sequence[Tensor]) -> LayerRow:
    """Overlap of one layer's masks between all tickets; its mean over pairs, and that of random masks as dense.

    Random masks of densities d and e overlap in about d·e / (d + e - d·e).
    """
    densities = [int(mask.sum()) / mask.numel() for mask in masks]
    pairs = list(itertools.combinations(range(len(masks)), 2))
    overlap = pairwise(lambda a, b: jaccard([a], [b]), masks)
    chance = [d * e / (d + e - d * e) if d or e else 1.0 for d, e in itertools.combinations(densities, 2)]
    return LayerRow(
        name=name,
        weights=masks[0].numel(),
        densities=densities,
        overlap=overlap,
        mean_overlap=sum(overlap[i][j] for i, j in pairs) / len(pairs),
        chance=sum(chance) / len(chance),
    )


def jaccard(a: Iterable[Tensor], b: Iterable[Tensor]) -> float:
    """Weights active in both over weights active in either, over all the masks together; 1 if there are none."""
    shared = united = 0
    for one, other in zip(a, b, strict=True):
        shared += int((one & other).sum())
        united += int((one | other).sum())
    return shared / united if united else 1.0


def disagreement(a: Tensor, b: Tensor) -> float:
    """Share of the samples that two networks, by their logits [N, classes], put into different classes."""
    return int((a.argmax(dim=1) != b.argmax(dim=1)).sum()) / len(a)


def kl_divergence(a: Tensor, b: Tensor) -> float:
    """KL(a ‖ b) of the predicted distributions of two networks, by their logits [N, classes]; mean, in nats."""
    log_a, log_b = a.double().log_softmax(dim=1), b.double().log_softmax(dim=1)
    return F.kl_div(log_b, log_a, reduction="batchmean", log_target=True).item()


def barrier(shares: Sequence[float], values: Sequence[float]) -> float:
    """Largest rise of ``values`` above the straight line from the first to the last; at least 0."""
    first, last = values[0], values[-1]
    return max(0.0, *(value - (1 - share) * first - share * last for share, value in zip(shares, values, strict=True)))


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of the samples whose label [N] has the largest of their logits [N, classes]."""
    return int((logits.argmax(dim=1) == labels).sum()) / len(labels)


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Expected calibration error, in [0, 1] (Guo et al. 2017, eq. 3): Σ_b n_b / N · |accuracy_b - confidence_b|.

    A sample's confidence is its largest probability, by the logits [N, classes]. Bin b = 1 … 15 holds the n_b of the N
    samples with a confidence in ((b - 1) / 15, b / 15]; accuracy_b and confidence_b are the means over them.
    """
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    bins = (confidence * CALIBRATION_BINS).ceil().long().clamp(1, CALIBRATION_BINS) - 1
    gaps = torch.zeros(CALIBRATION_BINS, dtype=torch.float64, device=logits.device)
    gaps.index_add_(0, bins, (predicted == labels).double() - confidence)  # n_b times the difference of the means
    return gaps.abs().sum().item() / len(labels)
