"""Wide residual networks (Zagoruyko & Komodakis, arXiv 1605.07146)."""

import torch
from torch import nn
from torch.nn.functional import relu

from sparselearning.process.errors import UsageError

from .blocks import conv1x1, conv3x3


class PreActivationBlock(nn.Module):
    """BN-ReLU-conv twice, added to the input or, if the shape changes, to a 1x1 conv of its activation."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        same_shape = stride == 1 and in_channels == channels
        self.shortcut = None if same_shape else conv1x1(in_channels, channels, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """B x in_channels x H x W to B x channels x H/stride x W/stride."""
        activated = relu(self.bn1(x), inplace=True)
        residual = self.conv2(relu(self.bn2(self.conv1(activated)), inplace=True))
        return residual + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(nn.Module):
    """A 3x3 stem of 16 channels, three stages of blocks, BN-ReLU, global pooling, one linear layer.

    Convolutions start Kaiming normal by fan_out, the linear layer's bias at zero and its weight as PyTorch does.
    """

    def __init__(self, stage_depth: int, widening: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, 16)
        self.blocks = nn.Sequential()
        channels = 16
        for stage, width in enumerate((16 * widening, 32 * widening, 64 * widening)):
            for index in range(stage_depth):
                stride = 2 if stage > 0 and index == 0 else 1
                self.blocks.append(PreActivationBlock(channels, width, stride))
                channels = width
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images B x C x H x W to logits B x num_classes."""
        x = relu(self.bn(self.blocks(self.conv1(images))), inplace=True)
        return self.fc(x.mean(dim=(2, 3)))


def wide_resnet(depth: int, widening: int, *, num_classes: int, in_channels: int, image_size: int) -> WideResNet:
    """wrn-D-K: D = 6n + 4 layers, three stages of n blocks, widths 16K-32K-64K, no dropout.

    ``image_size`` is free, for the pooling is global.

    Raises:
        UsageError: no network of this family has ``depth`` layers.
    """
    stage_depth, rest = divmod(depth - 4, 6)
    if stage_depth < 1 or rest:
        raise UsageError(
            f"wrn-{depth}-{widening} does not exist: D in wrn-D-K is 6n + 4, such as 10, 16, 22, 28 or 40."
        )
    return WideResNet(stage_depth, widening, num_classes, in_channels)
