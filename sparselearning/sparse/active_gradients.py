"""Notes of which gradients are those of active weights alone: from them, growth would choose weights just removed."""

import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


class ActiveGradients:
    """Gradients that may be those of active weights alone, by the names of their weights.

    Dense ones that were added since the note are known by their non-zeros, and those that took their place are other
    tensors.
    """

    def __init__(self) -> None:
        self._noted: dict[str, weakref.ref[Tensor] | None] = {}  # None: not tied to a tensor yet

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: copies of weights are without their gradients."""
        return {"_noted": {}}

    def note_coming(self, name: str) -> None:
        """Take note that the coming backward pass computes this one for active weights alone."""
        self._noted[name] = None

    def note(self, gradients: Mapping[str, Tensor]) -> None:
        """Take note of gradients at hand."""
        self._noted |= {name: weakref.ref(gradient) for name, gradient in gradients.items()}

    def identify(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Tie the notes that were taken before backward passes to the tensors that these have left, if any."""
        for name in [name for name, noted in self._noted.items() if noted is None]:
            gradient = weights[name].grad
            if gradient is None:
                del self._noted[name]
            else:
                self._noted[name] = weakref.ref(gradient)

    def are_active(self, weights: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> bool:
        """Whether the gradients of which note was taken are those of active weights alone, and not all zero.

        None may have another: a single layer's may well be zero there, as those behind a dead ReLU are.
        """
        is_any_nonzero = False
        for name, noted in self._noted.items():
            gradient, mask = weights[name].grad, masks[name]
            if gradient is None or (noted is not None and noted() is not gradient) or mask.all():
                continue
            if gradient.masked_fill(mask, 0).any():
                return False
            is_any_nonzero = is_any_nonzero or bool(gradient.any())
        return is_any_nonzero
