"""Corruptions of pictures: by hand, then that they are the same in every call."""

import math

import pytest
import torch

from sparselearning.reporting.corruptions import CORRUPTIONS, blur, contrast, corrupted, noise
from sparselearning.training.data import Batch

MEAN, STD = [51.0, 102.0, 255.0], [25.5, 51.0, 255.0]


class Stored:
    """Normalised images in stored order, ``size`` at a time."""

    def __init__(self, pixels, size):
        mean, std = (torch.tensor(values).view(-1, 1, 1) / 255 for values in (MEAN, STD))
        images = ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)
        self.batches = [Batch(part, torch.zeros(len(part)).long()) for part in images.split(size)]

    def epoch(self, epoch, start=0):
        return iter(self.batches[start:])


def pictures(count=5):
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def pixels_of(batches):
    mean, std = (torch.tensor(values).view(-1, 1, 1) / 255 for values in (MEAN, STD))
    return torch.cat([batch.images for batch in batches]) * std + mean


def test_contrast_by_hand():
    image = torch.tensor([0.0, 0.2, 0.6, 0.8]).view(1, 1, 2, 2)  # mean 0.4
    expected = torch.tensor([0.24, 0.32, 0.48, 0.56]).view(1, 1, 2, 2)
    torch.testing.assert_close(contrast(image, 0), expected)


def test_blur_by_hand():
    point = torch.zeros(1, 2, 9, 9)
    point[0, 1, 4, 4] = 1
    bell = [math.exp(-(distance**2) / 2) for distance in (-3, -2, -1, 0, 1, 2, 3)]
    blurred = blur(point, 0)
    assert not blurred[0, 0].any()
    assert blurred[0, 1, 4, 4] == pytest.approx(1 / sum(bell) ** 2, rel=1e-5)
    assert blurred[0, 1, 2, 5] == pytest.approx(math.exp(-2) * math.exp(-1 / 2) / sum(bell) ** 2, rel=1e-5)
    assert blurred[0, 1, :, 0].tolist() == [0] * 9, "three pixels away at most"
    assert blurred.sum().item() == pytest.approx(1, rel=1e-5)


def test_blur_leaves_an_even_picture():
    torch.testing.assert_close(blur(torch.full((1, 3, 2, 5), 0.3), 0), torch.full((1, 3, 2, 5), 0.3))


def test_noise_is_gaussian_of_the_stated_deviation():
    added = noise(torch.full((50, 3, 16, 16), 0.5), 0) - 0.5
    assert added.mean().item() == pytest.approx(0, abs=0.002)
    assert added.std().item() == pytest.approx(0.1, rel=0.02)
    assert not torch.equal(added[0], added[1])


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corrupted_pictures_are_the_same_in_every_call_and_batch(name):
    pixels, state = pictures(), torch.get_rng_state()
    whole = list(corrupted(Stored(pixels, 5), name, MEAN, STD))
    parts = list(corrupted(Stored(pixels, 2), name, MEAN, STD))
    torch.testing.assert_close(pixels_of(whole), pixels_of(parts), rtol=0, atol=1e-6)
    again = list(corrupted(Stored(pixels, 5), name, MEAN, STD))
    assert torch.equal(whole[0].images, again[0].images)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corrupted_pictures_have_their_shape_and_pixels_between_black_and_white(name):
    pixels = pictures()
    (batch,) = corrupted(Stored(pixels, 5), name, MEAN, STD)
    assert batch.images.shape == pixels.shape
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    found = pixels_of([batch])
    assert found.min() > -1e-6
    assert found.max() < 1 + 1e-6
    torch.testing.assert_close(found, CORRUPTIONS[name](pixels, 0).clamp(0, 1))
    assert (found - pixels).abs().max() > 0.1
