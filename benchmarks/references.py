"""Straightforward implementations that ``speed.py`` measures the library against.

Each does what one would write first, and what research scripts for sparse training do: float masks and out-of-place
products, sorts of whole layers, everything concatenated for a global threshold, images one by one through PIL.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import transforms

from sparselearning.sparse.superpose import State
from sparselearning.training.data import Batch


class FloatMasks:
    """Masks as float tensors, multiplied into weights and SGD momentum out of place.

    Args:
        parameters: the masked weights by name.
        masks: their first masks, boolean.
        optimizer: SGD over the weights.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor], optimizer: torch.optim.SGD
    ) -> None:
        self.parameters = parameters
        self.optimizer = optimizer
        self.masks = {name: mask.float() for name, mask in masks.items()}

    @torch.no_grad()
    def apply(self) -> None:
        """Zero inactive weights and their momentum."""
        for name, weight in self.parameters.items():
            weight.data = weight.data * self.masks[name]
            state = self.optimizer.state[weight]
            if "momentum_buffer" in state:
                state["momentum_buffer"] = state["momentum_buffer"] * self.masks[name]

    @torch.no_grad()
    def prune_and_grow(self, prune_rate: float, growth: str) -> None:
        """Per layer, sort all magnitudes and remove the smallest active weights, then sort all scores and grow.

        Args:
            prune_rate: share of each layer's active weights to remove, in [0, 1].
            growth: ``gradient`` or ``random``.
        """
        for name, weight in self.parameters.items():
            mask = self.masks[name].flatten()
            active = int(mask.sum())
            removed = math.ceil(prune_rate * active)
            order = torch.sort(weight.abs().flatten()).indices  # inactive weights are zero: they come first
            mask[order[: len(mask) - active + removed]] = 0
            assert weight.grad is not None
            score = weight.grad.abs().flatten() if growth == "gradient" else torch.rand_like(mask)
            order = torch.sort(score * (mask == 0), descending=True).indices
            mask[order[:removed]] = 1
            self.masks[name] = mask.view(weight.shape)
        self.apply()


class Training:
    """Sparse training in float32 and NCHW, op by op, with :class:`FloatMasks` after every optimizer step."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.SGD, masks: FloatMasks) -> None:
        self.model = model.train()
        self.optimizer = optimizer
        self.masks = masks

    def step(self, batch: Batch) -> None:
        """Train on one batch."""
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(batch.images), batch.labels).backward()
        self.optimizer.step()
        self.masks.apply()


def largest(magnitudes: Sequence[Tensor], count: int) -> list[Tensor]:
    """Masks of the ``count`` largest of all magnitudes: concatenate everything, then one full top-k."""
    flat = torch.cat([layer.flatten() for layer in magnitudes])
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[torch.topk(flat, count).indices] = True
    parts = chosen.split([layer.numel() for layer in magnitudes])
    return [part.view(layer.shape) for part, layer in zip(parts, magnitudes, strict=True)]


def prune_to_density(state: State, names: Sequence[str], density: float) -> State:
    """Keep the ``density`` share of the named weights that is largest in magnitude."""
    weights = [state[name] for name in names]
    keep = largest([weight.abs() for weight in weights], round(density * sum(weight.numel() for weight in weights)))
    return state | {name: weight * mask for name, weight, mask in zip(names, weights, keep, strict=True)}


def gradual_prune(weights: Sequence[Tensor], masks: Sequence[Tensor], density: float) -> list[Tensor]:
    """Masks that keep the ``density`` share of the weights, the largest active ones over all layers."""
    magnitudes = [weight.abs() * mask for weight, mask in zip(weights, masks, strict=True)]
    return largest(magnitudes, round(density * sum(weight.numel() for weight in weights)))


class PerImageData(Dataset):
    """Images that are cropped, mirrored and normalised one by one, through PIL.

    Args:
        images: uint8, [n, height, width, 3].
        labels: [n].
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images = images
        self.labels = labels
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(images.shape[1], padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(mean=[0.5] * 3, std=[0.3] * 3),
            ]
        )

    def __len__(self) -> int:
        """Images."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image, float [3, height, width], and its label."""
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])
