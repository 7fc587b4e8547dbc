"""The weights that masks are for: are they still the model's own, and as they were masked?"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from sparselearning.process.errors import UsageError
from sparselearning.sparse.layers import EMBEDDINGS


class HeldWeights:
    """The masked weights of a model, which other code may replace, or write to, at any time.

    Args:
        model: that has them, neither data-parallel nor compiled as a whole.
        weights: by name.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, nn.Parameter]) -> None:
        self._weights = weights
        self._links = _links(model, weights)
        self._versions: list[int] | None = None  # when they and all their state were last masked

    def __getstate__(self) -> dict[str, Any]:
        """A copy's weights count their changes anew."""
        return self.__dict__ | {"_versions": None}

    def check(self) -> None:
        """Refuse a model whose weights were replaced, or that has sparse gradients.

        Raises:
            UsageError: naming the first one.
        """
        for holder, name, held in self._links:
            if holder.get(name) is not held:
                raise UsageError(
                    f"the masked model's {name!r} was replaced after add_module: make a new optimizer and Masking"
                )
        for name, weight in self._weights.items():
            if weight.grad is not None and weight.grad.is_sparse:
                raise UsageError(f"{name} has a sparse gradient, which masks cannot be applied to")

    def remember(self) -> None:
        """Take note that all weights and their optimizer state are masked now."""
        self._versions = self._counters()

    def forget(self) -> None:
        """Take note that something may have been written that is not masked."""
        self._versions = None

    @property
    def are_masked(self) -> bool:
        """Whether they are known to be masked still: nothing has written into them since, except through ``.data``."""
        return self._versions == self._counters()

    def _counters(self) -> list[int]:
        """PyTorch raises them whenever something writes into a tensor."""
        return [weight._version for weight in self._weights.values()]


def check_values(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> None:
    """Refuse weights of a model that masks cannot be applied to.

    Raises:
        UsageError: if one has no values yet, or is an embedding's whose gradients are sparse.
    """
    for name, weight in weights.items():
        if weight.is_meta:
            raise UsageError(
                f"{name} has no values on the meta device: move the model with to_empty() and fill it first"
            )
    masked = set(weights.values())
    for path, module in model.named_modules():
        if getattr(module, "sparse", False) and isinstance(module, EMBEDDINGS) and module.weight in masked:
            raise UsageError(
                f"{path} has sparse gradients, which masks cannot be applied to: make it with sparse=False"
            )


def _links(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> list[tuple[Mapping[str, Any], str, Any]]:
    """What leads from a model to these weights: (a module's entries, name of one, what it is)."""
    masked = set(weights.values())
    links: dict[tuple[int, str], tuple[Mapping[str, Any], str, Any]] = {}
    for path, parameter in model.named_parameters():
        if parameter in masked:
            *parents, last = path.split(".")
            module = model
            for name in parents:
                links[id(module), name] = module._modules, name, module._modules[name]
                module = module.get_submodule(name)
            links[id(module), last] = module._parameters, last, parameter
    return list(links.values())
