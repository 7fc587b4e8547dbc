"""The slim residual networks made for CIFAR (He et al., arXiv 1512.03385, section 4.2)."""

from torch import nn

from sparselearning.process.errors import UsageError

from .blocks import BasicBlock
from .resnet import ResNet


def cifar_resnet(depth: int, width: int = 16, *, num_classes: int, in_channels: int, image_size: int) -> ResNet:
    """cifar_resnet_N[_W]: N = 6n + 2 layers, three stages of n basic blocks, widths W-2W-4W.

    Where a stage changes the shape, the shortcut is a 1x1 convolution with BatchNorm (the paper's option B).
    Weights of convolutions and of the linear layer start Kaiming normal by fan_in. ``image_size`` is free, for the
    pooling is global.

    Raises:
        UsageError: no network of this family has ``depth`` layers.
    """
    blocks, rest = divmod(depth - 2, 6)
    if blocks < 1 or rest:
        raise UsageError(
            f"cifar_resnet_{depth} does not exist: N in cifar_resnet_N[_W] is 6n + 2, "
            "such as 8, 14, 20, 32, 44, 56 or 110."
        )
    model = ResNet(BasicBlock, (blocks,) * 3, width, num_classes, in_channels)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return model
