"""How the first masks are drawn.

A neuron, here and in growth, is a slice of a weight along its first dimension: an output channel, a unit, one gate of a
recurrent unit, of a transposed convolution an input channel.

Each mode is one function from the layers and an :class:`InitSettings` to masks, and one line in
:data:`SPARSE_INITS`. Masks are boolean, on the weights' device, in the weights' shape.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparselearning.process.errors import UsageError
from sparselearning.sparse.distributions import DENSITIES, active_count, random_mask, shared_counts
from sparselearning.sparse.selection import select_largest

Masks = dict[str, Tensor]
Draw = Callable[[Mapping[str, Tensor], "InitSettings"], Masks]


@dataclass(frozen=True)
class InitSettings:
    """What the modes draw from besides the weights.

    Attributes:
        density: overall share of active weights, in (0, 1].
        pruning_rate: share of the trained weights that the ``prune_*`` modes drop, in [0, 1].
        generator: source of random masks, on the CPU.
        layer_densities: layer name to a density in (0, 1] that the user has given.
        classifier: name of the layer that structured pruning leaves alone; None: there is none among those masked.
    """

    density: float
    pruning_rate: float
    generator: torch.Generator
    layer_densities: Mapping[str, float] = field(default_factory=dict)
    classifier: str | None = None


@dataclass(frozen=True)
class SparseInit:
    """One mode: its function, what must be there first, and whether single layers' densities can be given."""

    draw: Draw
    needs_trained_weights: bool = False
    needs_gradients: bool = False
    shares_density: bool = False


def _random(distribution: str) -> Draw:
    def draw(weights: Mapping[str, Tensor], settings: InitSettings) -> Masks:
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        counts = shared_counts(shapes, settings.density, DENSITIES[distribution], settings.layer_densities)
        return {
            name: random_mask(shapes[name], counts[name], settings.generator).to(weight.device)
            for name, weight in weights.items()
        }

    return draw


def _dense(weights: Mapping[str, Tensor], settings: InitSettings) -> Masks:
    return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}


def _snip(weights: Mapping[str, Tensor], settings: InitSettings) -> Masks:
    """One-shot saliency |g·w|, global top-k (Lee et al. 2019, eq. 4)."""
    saliency = {name: (_gradient(weights, name) * weight).abs() for name, weight in weights.items()}
    return _keep_largest(saliency, settings.density)


def _non_zero(weights: Mapping[str, Tensor], settings: InitSettings) -> Masks:
    return {name: weight != 0 for name, weight in weights.items()}


def _prune_uniform(weights: Mapping[str, Tensor], settings: InitSettings) -> Masks:
    return {name: _keep_active({name: weight}, settings.pruning_rate)[name] for name, weight in weights.items()}


def _prune_global(weights: Mapping[str, Tensor], settings: InitSettings) -> Masks:
    return _keep_active(weights, settings.pruning_rate)


def _prune_structured(weights: Mapping[str, Tensor], settings: InitSettings) -> Masks:
    """Drop whole output neurons of small L2 norm; never a layer's last one, never the classifier's."""
    masks = _non_zero(weights, settings)
    for name in _structured_layers(weights, settings):
        norms = weights[name].flatten(1).norm(dim=1)
        alive = int(torch.count_nonzero(norms))
        keep = max(1, active_count(alive, 1 - settings.pruning_rate))
        if keep < alive:
            masks[name][~select_largest(torch.positive, [(norms,)], keep)[0]] = False
    return masks


def _then_grow(prune: Draw) -> Draw:
    """After pruning, each layer regrows as many weights as it lost, by gradient magnitude."""

    def draw(weights: Mapping[str, Tensor], settings: InitSettings) -> Masks:
        masks = prune(weights, settings)
        for name, weight in weights.items():
            lost = int(torch.count_nonzero(weight)) - int(torch.count_nonzero(masks[name]))
            flat = masks[name].flatten()
            grown = select_largest(torch.abs, [(_gradient(weights, name).flatten(), ~flat)], lost)[0]
            masks[name] = (flat | grown).view(weight.shape)
        return masks

    return draw


def _prune_and_grow_structured(weights: Mapping[str, Tensor], settings: InitSettings) -> Masks:
    """Drop output neurons as ``prune_structured`` does, then regrow as many by their gradients' L2 norm."""
    masks = _prune_structured(weights, settings)
    for name in _structured_layers(weights, settings):
        weight = weights[name]
        alive = weight.flatten(1).any(dim=1)
        kept = masks[name].flatten(1).any(dim=1)
        lost = int(torch.count_nonzero(alive)) - int(torch.count_nonzero(kept))
        norms = _gradient(weights, name).flatten(1).norm(dim=1)
        masks[name][select_largest(torch.abs, [(norms, ~kept)], lost)[0]] = True
    return masks


SPARSE_INITS = {
    "ERK": SparseInit(_random("ERK"), shares_density=True),
    "uniform": SparseInit(_random("uniform"), shares_density=True),
    "GMP": SparseInit(_dense),
    "snip": SparseInit(_snip, needs_gradients=True),
    "resume": SparseInit(_non_zero, needs_trained_weights=True),
    "prune_uniform": SparseInit(_prune_uniform, needs_trained_weights=True),
    "prune_global": SparseInit(_prune_global, needs_trained_weights=True),
    "prune_structured": SparseInit(_prune_structured, needs_trained_weights=True),
    "prune_and_grow_uniform": SparseInit(_then_grow(_prune_uniform), needs_trained_weights=True, needs_gradients=True),
    "prune_and_grow_global": SparseInit(_then_grow(_prune_global), needs_trained_weights=True, needs_gradients=True),
    "prune_and_grow_structured": SparseInit(
        _prune_and_grow_structured, needs_trained_weights=True, needs_gradients=True
    ),
}


def check_shares_density(sparse_init: str | None, names: tuple[str, str] = ("layer_densities", "sparse_init")) -> None:
    """Refuse densities of single layers where the first masks do not share a density out; ``names`` are for messages.

    Raises:
        UsageError: naming the modes that do.
    """
    if sparse_init is None or not SPARSE_INITS[sparse_init].shares_density:
        sharing = ", ".join(name for name, mode in SPARSE_INITS.items() if mode.shares_density)
        raise UsageError(f"{names[0]} goes with {names[1]} {sharing}, not with {sparse_init}")


def _gradient(weights: Mapping[str, Tensor], name: str) -> Tensor:
    """Gradient of the last backward pass at a parameter.

    Raises:
        UsageError: if there was no backward pass, or it did not reach the parameter.
    """
    gradient = weights[name].grad
    if gradient is None:
        raise UsageError(f"{name} has no gradient, which this sparse_init needs: run a backward pass before")
    return gradient.detach()


def _keep_largest(scores: Mapping[str, Tensor], density: float) -> Masks:
    """Masks of the ``round(size · density)`` largest scores over all layers together."""
    total = sum(score.numel() for score in scores.values())
    return _largest(scores, active_count(total, density))


def _keep_active(weights: Mapping[str, Tensor], pruning_rate: float) -> Masks:
    """Masks of all but a ``pruning_rate`` share of the non-zero weights, the smallest over all given layers."""
    active = sum(int(torch.count_nonzero(weight)) for weight in weights.values())
    return _largest({name: weight.abs() for name, weight in weights.items()}, active_count(active, 1 - pruning_rate))


def _largest(scores: Mapping[str, Tensor], count: int) -> Masks:
    """Masks of the ``count`` largest scores over all layers together."""
    chosen = select_largest(torch.positive, [(score.flatten(),) for score in scores.values()], count)
    return {name: mask.view(scores[name].shape) for name, mask in zip(scores, chosen, strict=True)}


def _structured_layers(weights: Mapping[str, Tensor], settings: InitSettings) -> list[str]:
    """All layers but the classifier."""
    return [name for name in weights if name != settings.classifier]
