"""Folders of small images, what loaders make of them, and where the ImageNet scripts lie."""

from itertools import chain

import numpy as np
import torch
from imagenet_data import load_imagenet
from PIL import Image

from helpers.processes import ROOT

SCRIPTS = ROOT / "ImageNet"

# What the script trains on.
NUM_CLASSES, TRAIN_IMAGES, VAL_IMAGES = 4, 8, 4

# What its loaders are tested on.
CLASSES, PER_CLASS = ("ant", "bee", "cat", "dog"), 8
SIZE = 24


def write_images(folder, classes=CLASSES, per_class=PER_CLASS):
    rng = np.random.default_rng(len(classes))
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            corners = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
            corners.resize((40, 30)).save(folder / name / f"{number}.jpg")


def write_same(root, image):
    """Two classes, each with this one picture for training and evaluation."""
    for split in ("train", "val"):
        for name in ("one", "other"):
            (root / split / name).mkdir(parents=True)
            image.save(root / split / name / "0.png")


def load(root, **options):
    defaults = {
        "batch_size": 6,
        "workers": 0,
        "seed": 3,
        "device": "cpu",
        "image_size": SIZE,
        "resize": 28,
        "val_image_size": SIZE,
    }
    return load_imagenet(root, **(defaults | options))


def collect(batches):
    """All images and labels of some batches."""
    images, labels = zip(*[(batch.images, batch.labels) for batch in batches], strict=True)
    return torch.cat(images), torch.cat(labels)


def flat(lists):
    return list(chain.from_iterable(lists))


def assert_same(batches, expected):
    for tensor, other in zip(collect(batches), collect(expected), strict=True):
        assert torch.equal(tensor, other)
