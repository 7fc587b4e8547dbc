"""Which weights to remove and which to grow: pure tensor code without state.

Everything is one question, asked with different scores: *where are the k largest?* Pruning asks it of the active
weights, growing of the inactive ones, and RigL differs from SET in the score alone. :func:`select_largest`
answers exactly, to the unit, whatever ties the scores hold.

A layer is seen through flat one-dimensional views (:class:`Layer`), so that nothing here depends on its shape.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparselearning.distributions import active_count, apportion

SAMPLE_SIZE = 1 << 15
"""More scores than these are bracketed by a sample before they are searched."""
BLOCK_SIZE = 1 << 18
"""Scores that a CPU works on at a time, so that its cache still holds what the operation before wrote."""


@dataclass
class Layer:
    """Flat views of one masked weight while its topology is being updated; all share one element order.

    Output neurons (filters) are contiguous: ``tensor.view(neurons, -1)`` has one row per neuron.
    """

    weight: Tensor
    mask: Tensor
    neurons: int = 1
    is_classifier: bool = False
    gradient: Tensor = field(default_factory=lambda: torch.empty(0))
    momentum: Tensor = field(default_factory=lambda: torch.empty(0))


# ---------------------------------------------------------------------------------------------- selection


class SelectionError(ValueError):
    """More weights are to be chosen than may be: some scores are NaN."""


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


def _select_at_once(score: Callable[[Tensor], Tensor], layers: Sequence[tuple[Tensor, ...]], k: int) -> list[Tensor]:
    """For a GPU: a few operations on everything, and one look at a result, since each look makes the GPU wait."""
    scores = torch.cat([_eligible(score(values), *flags) for values, *flags in layers])
    threshold = scores.topk(min(k, len(scores)), sorted=False).values.amin()
    if k > len(scores) or threshold == -torch.inf:
        raise _too_few(k, int(torch.count_nonzero(scores > -torch.inf)))
    chosen = scores > threshold
    ties = scores == threshold
    places = ties.cumsum(0, dtype=torch.int32)
    chosen.logical_or_(ties.logical_and_(places <= k - torch.count_nonzero(chosen)))
    return list(chosen.split([len(values) for values, *_ in layers]))


def _eligible(scores: Tensor, *flags: Tensor) -> Tensor:
    """Scores with ``-inf`` in place of NaN, and wherever one of the ``flags`` is false."""
    scores = scores.masked_fill(scores.isnan(), -torch.inf)
    for flag in flags:
        scores.masked_fill_(~flag, -torch.inf)
    return scores


def _too_few(k: int, there: int) -> SelectionError:
    return SelectionError(f"{k} weights are to be chosen where only {there} may be (NaN never is)")


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
    """``comparison(scores, bound)``, by way of numbers: PyTorch vectorises it only within one type."""
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


def _smallness(values: Tensor) -> Tensor:
    """Score of weights by smallness, for pruning."""
    return values.abs().neg_()


def smallest_active(layers: Sequence[Layer], k: int) -> list[Tensor]:
    """Flat masks of the ``k`` active weights of smallest magnitude over all ``layers`` together."""
    return select_largest(_smallness, [(layer.weight, layer.mask) for layer in layers], k)


def active_counts(layers: Sequence[Layer]) -> list[int]:
    """Active weights of each layer, with one transfer to the host."""
    return torch.stack([torch.count_nonzero(layer.mask) for layer in layers]).tolist()


# ------------------------------------------------------------------------------------------------ pruning
# Each mode: (layers, prune_rate, threshold) -> per layer a flat mask of the removed weights; only the mode `threshold`
# reads the number of that name.


def prune_magnitude(layers: Sequence[Layer], prune_rate: float, threshold: float) -> list[Tensor]:
    """Remove from every layer the ``ceil(prune_rate · n)`` of its ``n`` active weights with the smallest |w|."""
    return [
        smallest_active([layer], math.ceil(prune_rate * n))[0]
        for layer, n in zip(layers, active_counts(layers), strict=True)
    ]


def prune_set(layers: Sequence[Layer], prune_rate: float, threshold: float) -> list[Tensor]:
    """Remove half from the smallest positive weights, half from the largest negative ones (SET, alg. 2).

    Of an odd count the positive side gives one more; a side that has too few leaves the rest to the other. Weights
    that are still zero count as positive.
    """
    removed = []
    for layer, n in zip(layers, active_counts(layers), strict=True):
        k = math.ceil(prune_rate * n)
        negatives = int(torch.count_nonzero(layer.weight[layer.mask] < 0))
        from_negative = max(min(k // 2, negatives), k - (n - negatives))
        is_negative = layer.weight < 0
        sides = [(k - from_negative, layer.mask & ~is_negative), (from_negative, layer.mask & is_negative)]
        positive, negative = (select_largest(_smallness, [(layer.weight, side)], share)[0] for share, side in sides)
        removed.append(positive | negative)
    return removed


def prune_threshold(layers: Sequence[Layer], prune_rate: float, threshold: float) -> list[Tensor]:
    """Remove every active weight with |w| at or below ``threshold``, which :func:`steer_threshold` adapts."""
    return [layer.weight.abs().le(threshold).logical_and_(layer.mask) for layer in layers]


def prune_global_magnitude(layers: Sequence[Layer], prune_rate: float, threshold: float) -> list[Tensor]:
    """Remove the ``ceil(prune_rate · n)`` smallest of all ``n`` active weights, wherever they are."""
    return smallest_active(layers, math.ceil(prune_rate * sum(active_counts(layers))))


PRUNE = {
    "magnitude": prune_magnitude,
    "SET": prune_set,
    "threshold": prune_threshold,
    "global_magnitude": prune_global_magnitude,
}


def magnitude_quantile(layers: Sequence[Layer], prune_rate: float) -> float:
    """Magnitude below or at which ``ceil(prune_rate · n)`` of all ``n`` active weights lie; 0 for none."""
    removed = prune_global_magnitude(layers, prune_rate, 0.0)
    magnitudes = torch.cat([layer.weight[chosen].abs() for layer, chosen in zip(layers, removed, strict=True)])
    return float(magnitudes.max()) if len(magnitudes) else 0.0


def steer_threshold(threshold: float, removed_share: float, prune_rate: float) -> float:
    """Next threshold of ``threshold`` pruning: raised or lowered, at most twofold, by how far the share was off."""
    if removed_share == 0:
        return 2 * threshold
    return threshold * min(2.0, max(0.5, prune_rate / removed_share))


# ------------------------------------------------------------------------------------------------- growing
# Each mode: (layer, k, generator) -> flat mask of k inactive weights. Removed weights are already inactive.


def grow_random(layer: Layer, k: int, generator: torch.Generator) -> Tensor:
    """Grow uniformly at random, without replacement (SET)."""
    scores = torch.rand(layer.mask.numel(), generator=generator, device=layer.mask.device)
    return select_largest(torch.positive, [(scores, ~layer.mask)], k)[0]


def grow_gradient(layer: Layer, k: int, generator: torch.Generator) -> Tensor:
    """Grow where the dense gradient of the batch is largest in magnitude (RigL, alg. 1)."""
    return select_largest(torch.abs, [(layer.gradient, ~layer.mask)], k)[0]


def grow_momentum(layer: Layer, k: int, generator: torch.Generator) -> Tensor:
    """Grow where the momentum is largest in magnitude (sparse momentum, Dettmers & Zettlemoyer 2019)."""
    return select_largest(torch.abs, [(layer.momentum, ~layer.mask)], k)[0]


def grow_momentum_neuron(layer: Layer, k: int, generator: torch.Generator) -> Tensor:
    """Share ``k`` out over the output neurons by their mean |momentum|, then grow by momentum in each."""
    scores = layer.momentum.abs().view(layer.neurons, -1)
    inactive = ~layer.mask.view(layer.neurons, -1)
    quota = apportion(k, scores.mean(dim=1).tolist(), inactive.sum(dim=1).tolist())
    scores = scores.masked_fill(~inactive, -torch.inf)
    best = scores.topk(max(quota), dim=1).indices
    ranks = torch.arange(max(quota), device=best.device)
    wanted = ranks < torch.tensor(quota, device=best.device).unsqueeze(1)
    return torch.zeros_like(inactive).scatter_(1, best, wanted).flatten()


GROWTH = {
    "random": grow_random,
    "gradient": grow_gradient,
    "momentum": grow_momentum,
    "momentum_neuron": grow_momentum_neuron,
}


# ------------------------------------------------------------------------------------------ redistribution
# Each mode: layer -> its claim on the weights that all layers removed together, measured before pruning.


def claim_nonzeros(layer: Layer) -> float:
    """Claim by number of active weights."""
    return float(torch.count_nonzero(layer.mask))


def claim_magnitude(layer: Layer) -> float:
    """Claim by mean |active weight|."""
    return _mean_magnitude(layer.weight, layer.mask)


def claim_momentum(layer: Layer) -> float:
    """Claim by mean |momentum at active weights|."""
    return _mean_magnitude(layer.momentum, layer.mask)


def _mean_magnitude(values: Tensor, mask: Tensor) -> float:
    active = values[mask]
    return float(active.abs().mean()) if active.numel() else 0.0


REDISTRIBUTION: dict[str, Callable[[Layer], float] | None] = {
    "none": None,
    "nonzeros": claim_nonzeros,
    "magnitude": claim_magnitude,
    "momentum": claim_momentum,
}


# --------------------------------------------------------------------------------------- one whole update


def prune_and_grow(
    layers: Sequence[Layer],
    prune: str,
    growth: str,
    redistribution: str,
    prune_rate: float,
    threshold: float,
    generator: torch.Generator,
) -> int:
    """Remove active weights and grow as many inactive ones; changes the masks in place, never a weight.

    Args:
        layers: all masked layers.
        prune: name in :data:`PRUNE`. Of ``n`` active weights, ``ceil(prune_rate · n)`` go (``threshold``: those
            with |w| ≤ ``threshold``).
        growth: name in :data:`GROWTH`; weights just removed may grow back.
        redistribution: name in :data:`REDISTRIBUTION`. ``none``: a layer regrows what it lost.
        prune_rate: share of the active weights, in [0, 1].
        threshold: magnitude that ``threshold`` pruning cuts at.
        generator: source of random growth, on the layers' device.

    Returns:
        How many weights were removed, and as many grown.
    """
    claim = REDISTRIBUTION[redistribution]
    claims = [claim(layer) for layer in layers] if claim else []
    removed = PRUNE[prune](layers, prune_rate, threshold)
    for layer, chosen in zip(layers, removed, strict=True):
        layer.mask.logical_xor_(chosen)
    counts = torch.stack([torch.count_nonzero(chosen) for chosen in removed]).tolist()
    removed_total = sum(counts)
    if claim:
        room = [layer.mask.numel() - n for layer, n in zip(layers, active_counts(layers), strict=True)]
        counts = apportion(removed_total, claims, room)
    for layer, k in zip(layers, counts, strict=True):
        if k:
            layer.mask.logical_or_(GROWTH[growth](layer, k, generator))
    return removed_total


def gradual_prune(layers: Sequence[Layer], density: float, uniform: bool) -> None:
    """Remove the smallest weights until exactly ``round(size · density)`` are active; changes the masks in place.

    Global magnitude over all layers (GraNet, sec. 3.2), or ``uniform``: every layer at the same density, except that
    below a density of 0.2 the classifier stays at 0.2 and the others take up the difference. A layer that is already
    sparser than its target keeps what it has. Does nothing where the masks are at the density, or below it.
    """
    active = active_counts(layers)
    target = active_count(sum(layer.mask.numel() for layer in layers), density)
    if target >= sum(active):
        return
    if uniform:
        keep = _uniform_targets(layers, active, density, target)
        removed = [smallest_active([layer], n - kept)[0] for layer, n, kept in zip(layers, active, keep, strict=True)]
    else:
        removed = smallest_active(layers, sum(active) - target)
    for layer, chosen in zip(layers, removed, strict=True):
        layer.mask.logical_xor_(chosen)


CLASSIFIER_DENSITY = 0.2


def _uniform_targets(layers: Sequence[Layer], active: list[int], density: float, target: int) -> list[int]:
    """Active weights that each layer keeps, adding up to ``target``."""
    sizes = [layer.mask.numel() for layer in layers]
    shares = [float(size) for size in sizes]
    capacity = list(active)
    held = 0
    if density < CLASSIFIER_DENSITY:
        for i, layer in enumerate(layers):
            if layer.is_classifier:
                held = min(active_count(sizes[i], CLASSIFIER_DENSITY), active[i], target)
                capacity[i] = 0
    if target - held > sum(capacity):
        # The other layers cannot take up the difference: the classifier gives way.
        return apportion(target, shares, active)
    keep = apportion(target - held, shares, capacity)
    return [held if layer.is_classifier and held else kept for layer, kept in zip(layers, keep, strict=True)]
