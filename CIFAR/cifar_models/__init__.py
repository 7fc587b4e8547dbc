"""The networks for small images, by the names the command line knows.

A new network is a builder in one of the modules beside this one and a line in ``MODELS``, or in ``FAMILIES``
where numbers in the name set its size. Help texts, error messages and tests read the two tables.
"""

import re
from collections.abc import Callable
from functools import partial

from torch import nn

from sparselearning.process.errors import UsageError
from sparselearning.training.builders import network_builder

from .cifar_resnet import cifar_resnet
from .lenet import lenet5, lenet_300_100
from .resnet import RESNETS, resnet
from .vgg import VGGS, vgg, vgg_like
from .wide_resnet import wide_resnet

# Called with the numbers in a family's name, if any, then num_classes=, in_channels= and image_size=.
Builder = Callable[..., nn.Module]

MODELS: dict[str, Builder] = {
    **{f"ResNet{depth}": partial(resnet, depth) for depth in RESNETS},
    **{f"vgg{depth}": partial(vgg, depth) for depth in VGGS},
    "vgg-like": vgg_like,
    "lenet-300-100": lenet_300_100,
    "lenet5": lenet5,
}

_NUMBER = "([1-9][0-9]*)"
FAMILIES: dict[str, tuple[str, Builder]] = {
    "wrn-D-K": (f"wrn-{_NUMBER}-{_NUMBER}", wide_resnet),
    "cifar_resnet_N[_W]": (f"cifar_resnet_{_NUMBER}(?:_{_NUMBER})?", cifar_resnet),
}


def model_names() -> list[str]:
    """All names, as help texts and error messages show them; D, K, N and W stand for numbers."""
    return [*MODELS, *FAMILIES]


@network_builder
def build_model(name: str, num_classes: int, in_channels: int = 3, image_size: int = 32) -> nn.Module:
    """Return the network ``name``, freshly drawn from torch's global generator (same seed, same weights).

    It maps images B x in_channels x H x W to logits B x num_classes. The lenets need H = W = image_size;
    all others pool globally and take any size. First weights are those of the published scripts: each family's
    are beside its definition, and layers that it does not name keep PyTorch's default. The first parameter is the
    first layer's weight, and the last one with two dimensions is the classifier's.

    Raises:
        UsageError: the name is unknown, its depth does not exist, or the images are too small for it.
    """
    return _builder(name)(num_classes=num_classes, in_channels=in_channels, image_size=image_size)


def _builder(name: str) -> Builder:
    if name in MODELS:
        return MODELS[name]
    for pattern, builder in FAMILIES.values():
        if match := re.fullmatch(pattern, name):
            return partial(builder, *(int(number) for number in match.groups() if number))
    raise UsageError(f"unknown model '{name}': choose one of {', '.join(model_names())}.")
