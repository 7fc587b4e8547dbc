"""Corrupted images, to measure robustness: three plain corruptions, each of one fixed severity.

They follow the corruptions of those names in Hendrycks & Dietterich 2019, and are the same in every call, for any
size of batch and on every device: pixels lie in [0, 1] before and after, from black to white.

- noise: of each number of each pixel, independent, Gaussian, of standard deviation 0.1
- blur: by a Gaussian of standard deviation 1 pixel, the picture continued by its outermost pixels
- contrast: distances from each channel's mean over the picture, times 0.4
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sparselearning.process.seeding import derive_seed
from sparselearning.training.data import Batch, BatchSource

NOISE_STD = 0.1
BLUR_STD = 1.0  # pixels
CONTRAST = 0.4


def noise(images: Tensor, first: int) -> Tensor:
    """Add Gaussian noise; what is added depends on an image's number alone."""
    shape = images.shape[1:]
    seeds = [derive_seed("noise", first + place) for place in range(len(images))]
    drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return images + NOISE_STD * torch.stack(drawn).to(images)


def blur(images: Tensor, first: int) -> Tensor:
    """Blur by a Gaussian, cut off at three standard deviations."""
    reach = math.ceil(3 * BLUR_STD)
    weights = torch.exp(-(torch.arange(-reach, reach + 1) ** 2) / (2 * BLUR_STD**2)).to(images)
    weights /= weights.sum()
    channels = images.shape[1]
    padded = F.pad(images, (reach, reach, reach, reach), mode="replicate")
    rows = F.conv2d(padded, weights.view(1, 1, -1, 1).repeat(channels, 1, 1, 1), groups=channels)
    return F.conv2d(rows, weights.view(1, 1, 1, -1).repeat(channels, 1, 1, 1), groups=channels)


def contrast(images: Tensor, first: int) -> Tensor:
    """Move the pixels of each channel towards their mean."""
    mean = images.mean(dim=(2, 3), keepdim=True)
    return mean + CONTRAST * (images - mean)


CORRUPTIONS: dict[str, Callable[[Tensor, int], Tensor]] = {"noise": noise, "blur": blur, "contrast": contrast}
"""Name to a function of images [N, C, H, W] with pixels in [0, 1], and of the first one's number in its set."""


def corrupted(source: BatchSource, name: str, mean: Sequence[float], std: Sequence[float]) -> Iterator[Batch]:
    """The batches of a set that is not shuffled, its images corrupted.

    Args:
        source: of normalised images.
        name: in :data:`CORRUPTIONS`.
        mean, std: that normalised each channel, in raw pixel values from 0 to 255.
    """
    first = 0
    for batch in source.epoch(0):
        shift, scale = (torch.tensor(values).view(-1, 1, 1).to(batch.images) / 255 for values in (mean, std))
        worse = CORRUPTIONS[name](batch.images * scale + shift, first).clamp(0, 1)
        yield batch._replace(images=torch.empty_like(batch.images).copy_((worse - shift) / scale))
        first += len(batch.images)
