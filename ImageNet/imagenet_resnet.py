"""ImageNet's residual networks: torchvision's, so that weights saved from those load by name."""

from typing import Literal

from torch import nn
from torchvision.models import get_model

from sparselearning.errors import UsageError

ARCHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")

# Which side of a convolution keeps its variance: the gradient's (fan_out) or the activations' (fan_in).
INITS: dict[str, Literal["fan_out", "fan_in"]] = {"classic": "fan_out", "fanin": "fan_in"}


def build_model(arch: str, num_classes: int = 1000, init: str = "classic") -> nn.Module:
    """Return ``arch``, freshly drawn from torch's global generator (same seed, same weights).

    It maps images B x 3 x H x W, as a rule 224 x 224, to logits B x num_classes: a 7x7 stem, basic blocks up
    to resnet34 and bottlenecks with the stride in the 3x3 from resnet50 on, a classifier with bias.
    Convolutions are Kaiming normal with the mode of ``init`` (a key of ``INITS``), every BatchNorm starts at
    1 and 0, the classifier keeps PyTorch's default. Parameter names are torchvision's.

    Raises:
        UsageError: ``arch`` or ``init`` is unknown.
    """
    if arch not in ARCHS:
        raise UsageError(f"unknown architecture '{arch}': choose one of {', '.join(ARCHS)}.")
    if init not in INITS:
        raise UsageError(f"unknown initialisation '{init}': choose one of {', '.join(INITS)}.")
    model = get_model(arch, weights=None, num_classes=num_classes)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=INITS[init], nonlinearity="relu")
    return model
