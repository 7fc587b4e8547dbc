"""How a density budget is shared out over layers: from shapes to densities to exact integer counts."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from sparselearning.process.errors import UsageError
from sparselearning.process.schema import Density, check_option
from sparselearning.sparse.selection import SelectionError


def nonzero_counts(tensors: Iterable[Tensor]) -> list[int]:
    """Non-zero entries of each tensor, or true ones of each mask, with one transfer to the host."""
    counts = [torch.count_nonzero(tensor) for tensor in tensors]
    return torch.stack(counts).tolist() if counts else []


def active_count(size: int, density: float) -> int:
    """The one rounding rule of the project: density ``d`` over ``n`` weights means ``round(n * d)`` active ones."""
    return round(size * density)


def check_leaves_weights(size: int, density: float) -> None:
    """Refuse a final density at which none of ``size`` weights would be active.

    Raises:
        UsageError: if it is so low.
    """
    if active_count(size, density) == 0:
        raise UsageError(f"a final density of {density} leaves none of {size:,} weights active")


def uniform_densities(shapes: Mapping[str, Sequence[int]], density: float) -> dict[str, float]:
    """Give every layer the same density, in (0, 1].

    Raises:
        UsageError: if it lies outside that range.
    """
    check_option("density", density, Density)
    return dict.fromkeys(shapes, density)


def erk_densities(shapes: Mapping[str, Sequence[int]], density: float) -> dict[str, float]:
    """Erdős-Rényi-Kernel densities, whose size-weighted mean is exactly ``density`` (RigL, sec. 3).

    A layer's density is ``ε · sum(shape) / prod(shape)``. Layers that this would push past 1 are made dense,
    all that share the largest raw value at a time, and ε is solved again over the others:
    ``ε = (Σ_sparse n·d - Σ_dense n·(1 - d)) / Σ_sparse raw·n``.

    Args:
        shapes: layer name to weight shape, e.g. ``{"conv.weight": (64, 3, 3, 3)}``.
        density: overall share of active weights, in (0, 1].

    Returns:
        Layer name to density in (0, 1].

    Raises:
        UsageError: if the density lies outside (0, 1].
    """
    check_option("density", density, Density)
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: sum(shape) / size[name] for name, shape in shapes.items()}
    sparse = set(shapes)
    epsilon = 0.0
    while sparse:
        budget = density * sum(size[name] for name in sparse)
        budget -= (1 - density) * sum(size[name] for name in shapes if name not in sparse)
        epsilon = budget / sum(raw[name] * size[name] for name in sparse)
        largest = max(raw[name] for name in sparse)
        if epsilon * largest <= 1:
            break
        sparse -= {name for name in sparse if raw[name] == largest}
    return {name: epsilon * raw[name] if name in sparse else 1.0 for name in shapes}


DENSITIES = {"ERK": erk_densities, "uniform": uniform_densities}


def apportion(total: int, shares: Sequence[float], capacity: Sequence[int]) -> list[int]:
    """Divide ``total`` units over places in proportion to ``shares``, no place above its ``capacity``.

    Places whose share would overflow are filled and the rest is shared out anew; then every place gets the
    floor of its quota and the largest remainders take the units left over (ties: the earlier place). Where all
    places that are not full have share zero, they get units in proportion to their capacity.

    Returns:
        Integer counts, ``0 <= count[i] <= capacity[i]``, that add up to exactly ``total``.

    Raises:
        ValueError: if ``total`` is negative or more than all capacities together.
        SelectionError: if a share is NaN.
    """
    if any(map(math.isnan, shares)):
        raise SelectionError("weights cannot be shared out by NaN: did weights or gradients diverge?")
    if not 0 <= total <= sum(capacity):
        raise ValueError(f"cannot place {total} weights where there is room for {sum(capacity)}")
    counts = [0] * len(capacity)
    open_places = [i for i in range(len(capacity)) if capacity[i] > 0]
    left = total
    while open_places:
        weights = _relative({i: float(shares[i]) for i in open_places})
        if sum(weights.values()) <= 0:
            weights = _relative({i: float(capacity[i]) for i in open_places})
        unit = left / sum(weights.values())
        full = [i for i in open_places if weights[i] * unit >= capacity[i]]
        if not full:
            break
        for i in full:
            counts[i] = capacity[i]
            left -= capacity[i]
        open_places = [i for i in open_places if counts[i] == 0]
    if not open_places:
        return counts
    shared_out = _largest_remainder([weights[i] * unit for i in open_places], left)
    for i, count in zip(open_places, shared_out, strict=True):
        counts[i] = count
    return counts


def _relative(shares: dict[int, float]) -> dict[int, float]:
    """Shares as multiples of the largest, so that no sum overflows; beside infinite ones, finite ones are zero."""
    largest = max(shares.values())
    if math.isinf(largest):
        return {i: float(math.isinf(share)) for i, share in shares.items()}
    return {i: share / largest for i, share in shares.items()} if largest > 0 else shares


def _largest_remainder(quotas: Sequence[float], total: int) -> list[int]:
    """Round quotas to counts that add up to ``total``: floors, and one more for the largest remainders."""
    counts = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: counts[i] - quotas[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def layer_counts(shapes: Mapping[str, Sequence[int]], densities: Mapping[str, float], density: float) -> dict[str, int]:
    """Exact number of active weights per layer, adding up to ``round(total · density)``.

    Each layer gets its density's share by largest-remainder rounding.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    quotas = [densities[name] * size for name, size in sizes.items()]
    counts = _largest_remainder(quotas, active_count(sum(sizes.values()), density))
    return dict(zip(shapes, counts, strict=True))


def shared_counts(
    shapes: Mapping[str, Sequence[int]],
    density: float,
    distribution: Callable[[Mapping[str, Sequence[int]], float], dict[str, float]],
    fixed: Mapping[str, float],
) -> dict[str, int]:
    """Exact number of active weights per layer, adding up to ``round(total · density)``, some layers' densities given.

    Args:
        shapes: layer name to weight shape.
        density: overall share of active weights, in (0, 1].
        distribution: how the layers that are not ``fixed`` share what is left of the budget.
        fixed: layer name to density in (0, 1]; such a layer gets ``round(n · d)`` of its ``n`` weights.

    Raises:
        UsageError: if the other layers would get no weight, or more than they have.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    counts = {name: active_count(sizes[name], given) for name, given in fixed.items()}
    others = {name: shape for name, shape in shapes.items() if name not in fixed}
    if fixed:
        budget, taken = active_count(sum(sizes.values()), density), sum(counts.values())
        left, room = budget - taken, sum(sizes[name] for name in others)
        if not (0 < left <= room if others else left == 0):
            raise UsageError(
                f"the given layers' densities come to {taken:,} active weights, and a density of {density} over all "
                f"layers to {budget:,}: the other layers, of {room:,} weights, cannot make up for it"
            )
        density = left / room if others else density
    if others:
        counts |= layer_counts(others, distribution(others, density), density)
    return {name: counts[name] for name in shapes}


def random_mask(shape: Sequence[int], count: int, generator: torch.Generator) -> Tensor:
    """Draw a boolean CPU mask of ``shape`` with exactly ``count`` true entries, uniformly at random."""
    size = math.prod(shape)
    mask = torch.zeros(size, dtype=torch.bool)
    mask[torch.randperm(size, generator=generator)[:count]] = True
    return mask.view(torch.Size(shape))
