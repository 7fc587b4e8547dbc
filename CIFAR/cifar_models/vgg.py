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
    """Five stages of conv-BN-ReLU that each end in a 2x2 pooling, global average pooling, ``classifier``.

    ``last_pooling`` is the fifth one; the others are maxima. Together they leave 512 values per image for
    ``classifier``; on 32 x 32 images the global pooling has nothing left to average.
    """

    def __init__(
        self,
        stage_depths: tuple[int, ...],
        in_channels: int,
        classifier: nn.Module,
        conv_bias: bool,
        last_pooling: type[nn.MaxPool2d | nn.AvgPool2d],
    ) -> None:
        super().__init__()
        self.features = nn.Sequential()
        poolings = (*[nn.MaxPool2d] * 4, last_pooling)
        for depth, channels, pooling in zip(stage_depths, (64, 128, 256, 512, 512), poolings, strict=True):
            for _ in range(depth):
                self.features.append(nn.Conv2d(in_channels, channels, 3, padding=1, bias=conv_bias))
                self.features.append(nn.BatchNorm2d(channels))
                self.features.append(nn.ReLU(inplace=True))
                in_channels = channels
            # Rounding up lets images under 32 pixels, such as MNIST's 28, through all five.
            self.features.append(pooling(2, ceil_mode=True))
        self.classifier = classifier

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images B x C x H x W to logits B x num_classes."""
        return self.classifier(self.features(images).mean(dim=(2, 3)))


def vgg(depth: int, *, num_classes: int, in_channels: int, image_size: int) -> VGG:
    """vgg11 … vgg19: convolutions without bias, an average as the last pooling, one linear classifier.

    Convolutions start Kaiming normal by fan_out, the classifier normal with deviation 0.01 and its bias at zero.
    ``depth`` is a key of ``VGGS``; ``image_size`` is free, for the pooling is global.
    """
    classifier = nn.Linear(512, num_classes)
    nn.init.normal_(classifier.weight, std=0.01)
    nn.init.zeros_(classifier.bias)
    model = VGG(VGGS[depth], in_channels, classifier, conv_bias=False, last_pooling=nn.AvgPool2d)
    for module in model.features:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def vgg_like(*, num_classes: int, in_channels: int, image_size: int) -> VGG:
    """VGG-16's convolutions, with biases, and a hidden layer of 512 with BatchNorm in the head; no dropout.

    All first weights are PyTorch's default. ``image_size`` is free, for the pooling is global.
    """
    head = nn.Sequential(
        nn.Linear(512, 512),
        nn.ReLU(inplace=True),
        nn.BatchNorm1d(512),
        nn.Linear(512, num_classes),
    )
    return VGG(VGGS[16], in_channels, head, conv_bias=True, last_pooling=nn.MaxPool2d)
