"""Residual networks for small images (He et al., arXiv 1512.03385)."""

import torch
from torch import nn

from .blocks import BasicBlock, Bottleneck, conv1x1, conv3x3

# Depth: (block, number of blocks in each stage).
RESNETS: dict[int, tuple[type[BasicBlock | Bottleneck], tuple[int, ...]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
}


class ResNet(nn.Module):
    """A 3x3 stem, stages that double the width and halve the image, global average pooling, one linear layer.

    ``width`` is the number of channels of the stem and of the first stage's 3x3 convolutions. A block that
    changes the shape has a 1x1 convolution with BatchNorm as its shortcut, any other the identity.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        stage_depths: tuple[int, ...],
        width: int,
        num_classes: int,
        in_channels: int,
        classifier_bias: bool = True,
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.stages = nn.Sequential()
        channels = width
        for index, depth in enumerate(stage_depths):
            stage_width = width * 2**index
            self.stages.append(_stage(block, depth, channels, stage_width, stride=2 if index else 1))
            channels = stage_width * block.expansion
        self.fc = nn.Linear(channels, num_classes, bias=classifier_bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images B x C x H x W to logits B x num_classes."""
        x = self.stages(self.relu(self.bn1(self.conv1(images))))
        return self.fc(x.mean(dim=(2, 3)))


def _stage(
    block: type[BasicBlock | Bottleneck], depth: int, in_channels: int, width: int, stride: int
) -> nn.Sequential:
    channels = width * block.expansion
    shortcut = None
    if stride != 1 or in_channels != channels:
        shortcut = nn.Sequential(conv1x1(in_channels, channels, stride), nn.BatchNorm2d(channels))
    first = block(in_channels, width, stride, shortcut)
    return nn.Sequential(first, *(block(channels, width) for _ in range(depth - 1)))


def resnet(depth: int, *, num_classes: int, in_channels: int, image_size: int) -> ResNet:
    """ResNet18 … ResNet101 for small images: widths 64-128-256-512, no max-pool, a classifier without bias.

    All first weights are PyTorch's default. ``depth`` is a key of ``RESNETS``; ``image_size`` is free, for the pooling
    is global.
    """
    block, stage_depths = RESNETS[depth]
    return ResNet(block, stage_depths, 64, num_classes, in_channels, classifier_bias=False)
