"""The two LeNets of the pruning literature (Han et al., arXiv 1506.02626, section 4.1).

All first weights are PyTorch's default.
"""

from torch import nn

from sparselearning.process.errors import UsageError


def lenet_300_100(*, num_classes: int, in_channels: int, image_size: int) -> nn.Sequential:
    """Two hidden linear layers, of 300 and 100, on the flattened image."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(in_channels * image_size**2, 300),
        nn.ReLU(inplace=True),
        nn.Linear(300, 100),
        nn.ReLU(inplace=True),
        nn.Linear(100, num_classes),
    )


def lenet5(*, num_classes: int, in_channels: int, image_size: int) -> nn.Sequential:
    """Two 5x5 convolutions of 20 and 50 channels, each max-pooled, then a hidden layer of 500 (Caffe's form).

    Raises:
        UsageError: nothing of the image would be left after the second pooling.
    """
    pooled_size = ((image_size - 4) // 2 - 4) // 2
    if pooled_size < 1:
        raise UsageError(f"lenet5 needs images of at least 16 x 16 pixels, not {image_size} x {image_size}.")
    return nn.Sequential(
        nn.Conv2d(in_channels, 20, 5),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(50 * pooled_size**2, 500),
        nn.ReLU(inplace=True),
        nn.Linear(500, num_classes),
    )
