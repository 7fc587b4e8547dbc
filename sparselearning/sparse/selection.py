"""Where are the k largest? Exactly, to the unit, whatever ties the scores hold, without sorting."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar

import torch
from torch import Tensor

SAMPLE_SIZE = 1 << 15
"""More scores than these are bracketed by a sample before they are searched."""
BLOCK_SIZE = 1 << 18
"""Scores that a CPU works on at a time, so that what one operation writes is in its cache for the next."""


class SelectionError(ValueError):
    """Scores are NaN, so that they cannot rank weights or share them out."""


def select_largest(score: Callable[[Tensor], Tensor], layers: Sequence[tuple[Tensor, ...]], k: int) -> list[Tensor]:
    """Find the ``k`` largest scores over all layers together.

    Args:
        score: element-wise function of values; ``-inf`` and NaN are never chosen.
        layers: per layer the flat values and, unless all may be chosen, flags of those that may.
        k: how many to choose, at most the number of scores above ``-inf`` that may be.

    Returns:
        Per layer a flat boolean tensor with the chosen ones true. Ties go to the earlier layer and position.

    Raises:
        SelectionError: if fewer than ``k`` may be chosen.
    """
    if k == 0:
        return [torch.zeros_like(values, dtype=torch.bool) for values, *_ in layers]
    select = _select_by_bracket if layers[0][0].device.type == "cpu" else _select_at_once
    return select(score, layers, k)


_unchecked: ContextVar[list[tuple[int, Tensor, Tensor]] | None] = ContextVar("_unchecked", default=None)
"""Of selections on a GPU whose check waits for others: k, the k-th largest score, how many are larger."""


@contextlib.contextmanager
def checked_together() -> Iterator[None]:
    """Check at the end of this block, for all of its selections at once, that they had enough scores to choose from.

    Each check waits for the GPU. On a CPU every selection is checked immediately.

    Raises:
        SelectionError: if one had too few; what it chose is then wrong.
    """
    unchecked: list[tuple[int, Tensor, Tensor]] = []
    token = _unchecked.set(unchecked)
    try:
        yield
    finally:
        _unchecked.reset(token)
    _check(unchecked)


def _check(selections: Sequence[tuple[int, Tensor, Tensor]]) -> None:
    if not selections:
        return
    thresholds = torch.stack([threshold.float() for _, threshold, _ in selections]).tolist()
    for (k, _, larger), threshold in zip(selections, thresholds, strict=True):
        if threshold == -math.inf:
            raise _too_few(k, int(larger))


def _select_at_once(score: Callable[[Tensor], Tensor], layers: Sequence[tuple[Tensor, ...]], k: int) -> list[Tensor]:
    """For a GPU: a few operations on everything, and one check of a result, since each waits for the GPU."""
    parts = [_eligible(score(values), *flags) for values, *flags in layers]
    scores = torch.cat(parts) if len(parts) > 1 else parts[0]
    if k > len(scores):
        raise _too_few(k, int(torch.count_nonzero(scores > -torch.inf)))
    threshold = scores.topk(k, sorted=False).values.amin()
    chosen = scores > threshold
    larger = torch.count_nonzero(chosen)
    ties = scores == threshold
    places = ties.cumsum(0, dtype=torch.int32)
    chosen.logical_or_(ties.logical_and_(places <= k - larger))
    unchecked = _unchecked.get()
    if unchecked is None:
        _check([(k, threshold, larger)])
    else:
        unchecked.append((k, threshold, larger))
    return list(chosen.split([len(values) for values, *_ in layers]))


def _eligible(scores: Tensor, *flags: Tensor) -> Tensor:
    """Scores with ``-inf`` in place of NaN, and wherever one of the ``flags`` is false."""
    scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    for flag in flags:
        scores.masked_fill_(~flag, -torch.inf)
    return scores


def _too_few(k: int, there: int) -> SelectionError:
    return SelectionError(
        f"cannot choose {k} weights where only {there} have a score that is a number: did weights or gradients diverge?"
    )


def _select_by_bracket(score: Callable[[Tensor], Tensor], layers: Sequence[tuple[Tensor, ...]], k: int) -> list[Tensor]:
    """For a CPU, the SELECT of Floyd & Rivest (1975).

    A sample brackets the k-th largest score from both sides, one comparison each settles nearly all others, and only
    those inside the bracket are searched exactly. Should the sample mislead, everything is searched, so the result
    never depends on luck.
    """
    chosen = [torch.zeros_like(values, dtype=torch.bool) for values, *_ in layers]
    blocks = [block for layer, flags in zip(layers, chosen, strict=True) for block in _blocks(flags, *layer)]
    for low, high in (_bracket(score, layers, k), (None, None)):
        positions, pools = [], []
        for above, values, *eligible in blocks:
            scores = score(values)
            within = _compare(torch.gt, scores, -torch.inf if low is None else low)
            if high is None:
                above.fill_(False)
            else:
                above.copy_(_compare(torch.ge, scores, high))
            for flags in eligible:
                within.logical_and_(flags)
                above.logical_and_(flags)
            positions.append(within.logical_and_(~above).nonzero().squeeze(1))
            pools.append(scores[positions[-1]])
        missing = k - sum(int(torch.count_nonzero(above)) for above in chosen)
        pool = torch.cat(pools)
        if 0 <= missing <= len(pool):
            break
    else:
        raise _too_few(k, len(pool))
    picked = _largest_exactly(pool, missing).split([len(p) for p in positions])
    for (above, *_), candidates, part in zip(blocks, positions, picked, strict=True):
        above.index_fill_(0, candidates[part], True)
    return chosen


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors of one size into pieces that the cache holds."""
    return zip(*(tensor.split(BLOCK_SIZE) for tensor in tensors), strict=True)


def _compare(comparison: Callable[..., Tensor], scores: Tensor, bound: float) -> Tensor:
    """``comparison(scores, bound)``, by way of the scores' own type: PyTorch vectorises comparisons within one type."""
    return comparison(scores, bound, out=torch.empty_like(scores)).bool()


def _bracket(
    score: Callable[[Tensor], Tensor], layers: Sequence[tuple[Tensor, ...]], k: int
) -> tuple[float | None, float | None]:
    """Two scores between which, judging by a strided sample, the k-th largest lies; None: no bound.

    The lower one is exclusive, so that the zeros of a sparse network, should it be one of them, are not searched.
    """
    size = sum(values.numel() for values, *_ in layers)
    if size <= SAMPLE_SIZE:
        return None, None
    stride = round(size ** (1 / 3)) // 2 | 1  # odd: a power of two would see some channels of a layer alone
    sample = torch.cat([_eligible(score(values[::stride]), *(f[::stride] for f in flags)) for values, *flags in layers])
    rank = k / size * len(sample)
    slack = 4 * math.sqrt(rank * (1 - k / size)) + 4  # four standard deviations of the rank, and rounding
    low, high = math.ceil(rank + slack), math.floor(rank - slack)
    bounds = [
        float(sample.kthvalue(len(sample) - rank + 1).values) if 1 <= rank <= len(sample) else -torch.inf
        for rank in (low, high)
    ]
    lower, upper = (bound if bound > -torch.inf else None for bound in bounds)
    return lower, upper


def _largest_exactly(values: Tensor, k: int) -> Tensor:
    """Boolean mask of the ``k`` largest of one-dimensional ``values``; ties go to the earlier ones."""
    if k == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    threshold = values.kthvalue(len(values) - k + 1).values
    chosen = values > threshold
    ties = (values == threshold).nonzero().squeeze(1)
    return chosen.index_fill_(0, ties[: k - int(torch.count_nonzero(chosen))], True)
