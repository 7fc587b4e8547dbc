"""VGG networks (Simonyan & Zisserman, arXiv 1409.1556) with BatchNorm, for small images."""

import torch
from torch import nn

# Depth: number of 3x3 convolutions in each of the five stages of 64, 128, 256, 512 and 512 channels.
VGGS: dict[int, tuple[int, ...]] = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


class VGG(nn.Module):
    """Five stages of conv-BN-ReLU that each end in a 2x2 max-pool, global average pooling, ``classifier``.

    The pooling leaves 512 values per image for ``classifier``; on 32 x 32 images it has nothing to average.
    """

    def __init__(self, stage_depths: tuple[int, ...], in_channels: int, classifier: nn.Module) -> None:
        super().__init__()
        self.features = nn.Sequential()
        for depth, channels in zip(stage_depths, (64, 128, 256, 512, 512), strict=True):
            for _ in range(depth):
                self.features.append(nn.Conv2d(in_channels, channels, 3, padding=1, bias=False))
                self.features.append(nn.BatchNorm2d(channels))
                self.features.append(nn.ReLU(inplace=True))
                in_channels = channels
            # Rounding up lets images under 32 pixels, such as MNIST's 28, through all five.
            self.features.append(nn.MaxPool2d(2, ceil_mode=True))
        self.classifier = classifier

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images B x C x H x W to logits B x num_classes."""
        return self.classifier(self.features(images).mean(dim=(2, 3)))


def vgg(depth: int, *, num_classes: int, in_channels: int, image_size: int) -> VGG:
    """vgg11 … vgg19 with one linear classifier.

    ``depth`` is a key of ``VGGS``; ``image_size`` is free, for the pooling is global.
    """
    return VGG(VGGS[depth], in_channels, nn.Linear(512, num_classes))


def vgg_like(*, num_classes: int, in_channels: int, image_size: int) -> VGG:
    """VGG-16 with two hidden layers of 512 in its head, dropout 0.5 before each.

    ``image_size`` is free, for the pooling is global.
    """
    head = nn.Sequential(
        nn.Dropout(0.5),
        nn.Linear(512, 512),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(512, 512),
        nn.ReLU(inplace=True),
        nn.Linear(512, num_classes),
    )
    return VGG(VGGS[16], in_channels, head)
