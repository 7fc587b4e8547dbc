"""Set what masks leave out to exactly zero."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of as many bytes as a number."""


class Zeroing:
    """Zeroes tensors in place where masks are false, by multiplying their bit patterns by 0 or 1.

    Whatever stands there, infinities and NaN included, becomes +0. On a CPU this takes half the time of ``where`` or
    ``masked_fill``. On a GPU one kernel does it for dozens of tensors, if their factors have the width of the numbers:
    they are kept until the mask changes, and take as much memory as the masked weights.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], tuple[Tensor, int, Tensor]] = {}  # mask, its version, its factors

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: a copy has masks of its own, which count their changes anew."""
        return {"_kept": {}}

    def __call__(self, tensors: Iterable[tuple[str, Sequence[Tensor]]], masks: Mapping[str, Tensor]) -> None:
        """Zero ``tensors``: the name of a mask, and tensors of its shape and device."""
        lists: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        for name, masked in tensors:
            mask = masks[name]
            made: dict[torch.dtype, Tensor] = {}
            for tensor in masked:
                width = BITS[tensor.element_size()]
                if tensor.device.type == "cpu":
                    if width not in made:
                        made[width] = mask.to(width)
                    tensor.view(width).mul_(made[width])
                else:
                    patterns, factors = lists.setdefault((tensor.device, width), ([], []))
                    patterns.append(tensor.view(width))
                    factors.append(self._factors(name, mask, width))
        for patterns, factors in lists.values():
            torch._foreach_mul_(patterns, factors)

    def _factors(self, name: str, mask: Tensor, width: torch.dtype) -> Tensor:
        if mask.is_inference():  # it counts no changes
            return mask.to(width)
        kept = self._kept.get((name, width))
        if kept is None or kept[0] is not mask or kept[1] != mask._version:
            kept = self._kept[name, width] = mask, mask._version, mask.to(width)
        return kept[2]
