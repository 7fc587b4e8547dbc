"""Which weights to remove and which to grow: pure tensor code, without state but for a mode that keeps its own.

Everything is one question, asked with different scores: *where are the k largest?* Pruning asks it of the active
weights, growing of the inactive ones, and RigL differs from SET in the score alone. ``select_largest`` answers it.

A layer is seen through flat one-dimensional views (:class:`Layer`), so that nothing here depends on its shape. The
choices are in four tables: :data:`PRUNE`, :data:`GROWTH`, :data:`REDISTRIBUTION` and :data:`METHODS`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from sparselearning.process.errors import UsageError
from sparselearning.process.schema import Amount
from sparselearning.process.tensor_schema import Check, record
from sparselearning.sparse.distributions import active_count, apportion, nonzero_counts
from sparselearning.sparse.selection import checked_together, select_largest


@dataclass
class Layer:
    """Flat views of one masked weight while its topology is being updated; all share one element order.

    Output neurons (filters) are contiguous: ``tensor.view(neurons, -1)`` has one row per neuron. ``gradient`` and
    ``momentum``, what dense training would have there, are filled in for modes that say they read them.
    """

    weight: Tensor
    mask: Tensor
    neurons: int = 1
    is_classifier: bool = False
    gradient: Tensor = field(default_factory=lambda: torch.empty(0))
    momentum: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(frozen=True)
class Mode:
    """One entry of a table: a function, and what it reads of a :class:`Layer` besides weight and mask.

    Attributes:
        function: or, for a pruning mode that keeps a state from update to update, a class of :class:`Stateful` objects
            that are called like such a function.
        draws: at random, so that in a data-parallel run rank 0's masks count.
    """

    function: Callable[..., Any]
    reads_gradient: bool = False
    reads_momentum: bool = False
    draws: bool = False

    def __call__(self, *args: Any) -> Any:
        """Call the function."""
        return self.function(*args)

    def begin(self) -> Callable[..., Any]:
        """What one run calls: the function, or a new object of the class, with a state of its own."""
        return self.function() if isinstance(self.function, type) else self.function


@runtime_checkable
class Stateful(Protocol):
    """What changes from update to update."""

    def schema(self) -> Check:
        """What a :meth:`state_dict` has to hold."""

    def state_dict(self) -> dict[str, Any]:
        """A copy of what changes."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a :meth:`state_dict`."""


def removal_count(prune_rate: float, active: int) -> int:
    """``ceil(prune_rate · active)`` of the rate as it is written: 0.07 · 100 is 7, though above 7 in binary."""
    return math.ceil(prune_rate * active - 1e-9)


def _smallness(values: Tensor) -> Tensor:
    """Score of weights by smallness, for pruning."""
    return values.abs().neg_()


def smallest_active(layers: Sequence[Layer], k: int) -> list[Tensor]:
    """Flat masks of the ``k`` active weights of smallest magnitude over all ``layers`` together."""
    return select_largest(_smallness, [(layer.weight, layer.mask) for layer in layers], k)


def active_counts(layers: Sequence[Layer]) -> list[int]:
    """Active weights of each layer."""
    return nonzero_counts(layer.mask for layer in layers)


# ------------------------------------------------------------------------------------------------ pruning
# Each mode: (layers, prune_rate) -> per layer a flat mask of the removed weights.


def prune_magnitude(layers: Sequence[Layer], prune_rate: float) -> list[Tensor]:
    """Remove from every layer the ``ceil(prune_rate · n)`` of its ``n`` active weights with the smallest |w|."""
    return [
        smallest_active([layer], removal_count(prune_rate, n))[0]
        for layer, n in zip(layers, active_counts(layers), strict=True)
    ]


def prune_set(layers: Sequence[Layer], prune_rate: float) -> list[Tensor]:
    """Remove half from the smallest positive weights, half from the largest negative ones (SET, alg. 2).

    Of an odd count the positive side gives one more; a side that has too few leaves the rest to the other. Weights
    that are still zero count as positive.
    """
    removed = []
    for layer, n in zip(layers, active_counts(layers), strict=True):
        k = removal_count(prune_rate, n)
        negatives = int(torch.count_nonzero(layer.weight[layer.mask] < 0))
        from_negative = max(min(k // 2, negatives), k - (n - negatives))
        is_negative = layer.weight < 0
        sides = [(k - from_negative, layer.mask & ~is_negative), (from_negative, layer.mask & is_negative)]
        positive, negative = (select_largest(_smallness, [(layer.weight, side)], share)[0] for share, side in sides)
        removed.append(positive | negative)
    return removed


def prune_global_magnitude(layers: Sequence[Layer], prune_rate: float) -> list[Tensor]:
    """Remove the ``ceil(prune_rate · n)`` smallest of all ``n`` active weights, wherever they are."""
    return smallest_active(layers, removal_count(prune_rate, sum(active_counts(layers))))


class ThresholdPruning:
    """Remove every active weight with |w| at or below a threshold, steered so that their share tracks ``prune_rate``.

    Attributes:
        threshold: of the next update; None: the magnitude below which ``prune_rate`` of the weights lie.
    """

    def __init__(self) -> None:
        self.threshold: float | None = None

    def __call__(self, layers: Sequence[Layer], prune_rate: float) -> list[Tensor]:
        """Choose the weights, and steer."""
        threshold = magnitude_quantile(layers, prune_rate) if self.threshold is None else self.threshold
        removed = [layer.weight.abs().le(threshold).logical_and_(layer.mask) for layer in layers]
        if active := sum(active_counts(layers)):
            # A threshold of zero cannot be scaled: find one among the weights again next time.
            self.threshold = steer_threshold(threshold, sum(nonzero_counts(removed)) / active, prune_rate) or None
        return removed

    def schema(self) -> Check:
        """What a :meth:`state_dict` has to hold."""
        return record({"threshold": Amount | None})

    def state_dict(self) -> dict[str, Any]:
        """The threshold."""
        return {"threshold": self.threshold}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a :meth:`state_dict`."""
        self.threshold = state["threshold"]


def magnitude_quantile(layers: Sequence[Layer], prune_rate: float) -> float:
    """Magnitude at or below which ``ceil(prune_rate · n)`` of all ``n`` active weights lie; 0 for none."""
    removed = prune_global_magnitude(layers, prune_rate)
    largest = [
        layer.weight.abs().masked_fill_(~chosen, 0).amax() for layer, chosen in zip(layers, removed, strict=True)
    ]
    return float(torch.stack(largest).amax())


def steer_threshold(threshold: float, removed_share: float, prune_rate: float) -> float:
    """Next threshold of :class:`ThresholdPruning`: raised or lowered, at most twofold, by how far the share was off."""
    if removed_share == 0:
        return threshold if prune_rate == 0 else 2 * threshold
    return threshold * min(2.0, max(0.5, prune_rate / removed_share))


PRUNE = {
    "magnitude": Mode(prune_magnitude),
    "SET": Mode(prune_set),
    "threshold": Mode(ThresholdPruning),
    "global_magnitude": Mode(prune_global_magnitude),
}


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
    "random": Mode(grow_random, draws=True),
    "gradient": Mode(grow_gradient, reads_gradient=True),
    "momentum": Mode(grow_momentum, reads_momentum=True),
    "momentum_neuron": Mode(grow_momentum_neuron, reads_momentum=True),
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


REDISTRIBUTION: dict[str, Mode | None] = {
    "none": None,
    "nonzeros": Mode(claim_nonzeros),
    "magnitude": Mode(claim_magnitude),
    "momentum": Mode(claim_momentum, reads_momentum=True),
}


def chosen_modes(prune: str, growth: str, redistribution: str) -> list[Mode]:
    """The modes of these names; redistribution ``none`` is not one."""
    return [mode for mode in (PRUNE[prune], GROWTH[growth], REDISTRIBUTION[redistribution]) if mode]


def check_momentum(
    modes: Sequence[Mode], is_kept: bool, needed: str = "an optimizer with momentum above 0, or two betas"
) -> None:
    """Refuse modes that read momentum where the optimizer keeps none; ``needed`` is what messages ask for.

    Raises:
        UsageError: if there are such modes.
    """
    if not is_kept and any(mode.reads_momentum for mode in modes):
        raise UsageError(f"the chosen modes of growth or redistribution read momentum, and need {needed}")


# --------------------------------------------------------------------------------------- one whole update


def prune_and_grow(
    layers: Sequence[Layer],
    prune: Callable[[Sequence[Layer], float], list[Tensor]],
    growth: str,
    redistribution: str,
    prune_rate: float,
    generator: torch.Generator,
) -> None:
    """Remove active weights and grow as many inactive ones; changes the masks in place, never a weight.

    Args:
        layers: all masked layers.
        prune: a mode of :data:`PRUNE`, begun. Of ``n`` active weights, ``ceil(prune_rate · n)`` go (``threshold``:
            about as many).
        growth: name in :data:`GROWTH`; weights just removed may grow back.
        redistribution: name in :data:`REDISTRIBUTION`. ``none``: a layer regrows what it lost.
        prune_rate: share of the active weights, in [0, 1].
        generator: source of random growth, on the layers' device.
    """
    claim = REDISTRIBUTION[redistribution]
    claims = [claim(layer) for layer in layers] if claim else []
    with checked_together():
        removed = prune(layers, prune_rate)
    _remove(layers, removed)
    counts = nonzero_counts(removed)
    if claim:
        room = [layer.mask.numel() - n for layer, n in zip(layers, active_counts(layers), strict=True)]
        counts = apportion(sum(counts), claims, room)
    with checked_together():
        for layer, k in zip(layers, counts, strict=True):
            if k:
                layer.mask.logical_or_(GROWTH[growth](layer, k, generator))


# ----------------------------------------------------------------------------------------- gradual pruning
# Each way: (layers, density); prunes until exactly round(size · density) weights are active, in place. Does nothing
# where the masks are at the density, or below it.


def shrink_globally(layers: Sequence[Layer], density: float) -> None:
    """Remove the smallest weights over all layers together (GraNet, sec. 3.2)."""
    active = sum(active_counts(layers))
    target = _target(layers, density)
    if target < active:
        _remove(layers, smallest_active(layers, active - target))


def shrink_uniformly(layers: Sequence[Layer], density: float) -> None:
    """Remove the smallest weights of each layer, so that all have the same density.

    Except that below a density of 0.2 the classifier stays at 0.2 and the others take up the difference, unless that
    would leave them less than a tenth of the density. A layer that is already sparser than its target keeps what it
    has.
    """
    active = active_counts(layers)
    target = _target(layers, density)
    if target < sum(active):
        keep = _uniform_targets(layers, active, density, target)
        with checked_together():
            removed = [
                smallest_active([layer], n - kept)[0] for layer, n, kept in zip(layers, active, keep, strict=True)
            ]
        _remove(layers, removed)


def _target(layers: Sequence[Layer], density: float) -> int:
    return active_count(sum(layer.mask.numel() for layer in layers), density)


def _remove(layers: Sequence[Layer], chosen: Sequence[Tensor]) -> None:
    for layer, removed in zip(layers, chosen, strict=True):
        layer.mask.logical_xor_(removed)


CLASSIFIER_DENSITY = 0.2
LEAST_OF_OTHERS = 0.1
"""Share of the scheduled density that holding the classifier leaves the other layers together, at least."""


def _uniform_targets(layers: Sequence[Layer], active: list[int], density: float, target: int) -> list[int]:
    """Active weights that each layer keeps, adding up to ``target``."""
    sizes = [layer.mask.numel() for layer in layers]
    shares = [float(size) for size in sizes]
    head = next((i for i, layer in enumerate(layers) if layer.is_classifier), None)
    if head is not None and density < CLASSIFIER_DENSITY:
        held = min(active_count(sizes[head], CLASSIFIER_DENSITY), active[head])
        least = LEAST_OF_OTHERS * density * (sum(sizes) - sizes[head])
        others = [0 if i == head else n for i, n in enumerate(active)]
        if least <= target - held <= sum(others):
            keep = apportion(target - held, shares, others)
            keep[head] = held
            return keep
    return apportion(target, shares, active)


# ------------------------------------------------------------------------------------------------ methods


@dataclass(frozen=True)
class Method:
    """What one training method does at a topology update.

    Attributes:
        about: the same in a phrase, for help texts.
        shrink: first, prune gradually to the scheduled density; None: the density is constant.
        grows: then, prune and grow.
    """

    about: str
    shrink: Callable[[Sequence[Layer], float], None] | None = None
    grows: bool = True


METHODS = {
    "DST": Method("dynamic sparse training, prune and grow at one density (RigL, SET)"),
    "GraNet": Method("prune gradually, over all layers together, then prune and grow", shrink_globally),
    "GraNet_uniform": Method("the same, gradually in each layer by itself", shrink_uniformly),
    "GMP": Method("gradual magnitude pruning over all layers together, no growing", shrink_globally, grows=False),
    "GMP_uniform": Method("the same in each layer by itself", shrink_uniformly, grows=False),
}
