"""The networks for ImageNet: torchvision's, so that weights saved from those load by name."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Literal

import torchvision
from torch import nn
from torchvision.models import get_model, list_models

from sparselearning.process.errors import UsageError, first_line
from sparselearning.training.builders import network_builder

ARCHS = tuple(list_models(module=torchvision.models))
"""Every classification network of torchvision."""
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
"""Those whose first weights are drawn here, as ``INITS`` says; all others start as torchvision's do."""

# Which side of a convolution keeps its variance: the gradient's (fan_out) or the activations' (fan_in).
INITS: dict[str, Literal["fan_out", "fan_in"]] = {"classic": "fan_out", "fanin": "fan_in"}


def check_arch(arch: str) -> None:
    """Refuse a name that is none of ``ARCHS``.

    Raises:
        UsageError: with the nearest names.
    """
    if arch not in ARCHS:
        near = get_close_matches(arch, ARCHS, cutoff=0.0)
        raise UsageError(
            f"unknown architecture '{arch}': the nearest of torchvision's {len(ARCHS)} classification networks are "
            + ", ".join(near)
        )


@network_builder
def build_model(arch: str, num_classes: int = 1000, init: str = "classic", image_size: int = 224) -> nn.Module:
    """Return ``arch``, freshly drawn from torch's global generator (same seed, same weights).

    It maps images B x 3 x H x W to logits B x num_classes. Parameter names and, but for the convolutions of
    ``RESNETS``, first weights are torchvision's; heads that only training uses are left out.

    The ``RESNETS`` have a 7x7 stem, basic blocks up to resnet34 and bottlenecks with the stride in the 3x3 from
    resnet50 on, a classifier with bias. Their convolutions are Kaiming normal with the mode of ``init`` (a key of
    ``INITS``), every BatchNorm starts at 1 and 0, the classifier keeps PyTorch's default.

    Args:
        arch: one of ``ARCHS``.
        num_classes: logits per image.
        init: of the ``RESNETS``; others ignore it.
        image_size: H = W, in pixels. Only networks that are built for one size need it.

    Raises:
        UsageError: ``arch`` or ``init`` is unknown, or ``arch`` cannot be built for this size.
    """
    check_arch(arch)
    if init not in INITS:
        raise UsageError(f"unknown initialisation '{init}': choose one of {', '.join(INITS)}.")
    try:
        model = get_model(arch, weights=None, num_classes=num_classes, **_own_arguments(arch, image_size))
    except (AssertionError, ValueError) as error:
        raise UsageError(f"{arch} cannot be built for images of {image_size} pixels ({first_line(error)})") from error
    if arch in RESNETS:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode=INITS[init], nonlinearity="relu")
    return model


def _own_arguments(arch: str, image_size: int) -> Mapping[str, Any]:
    """What some networks have to be told beside the number of classes."""
    if arch.startswith("vit_"):
        return {"image_size": image_size}
    if arch.startswith("maxvit_"):
        return {"input_size": (image_size, image_size)}
    if arch in ("googlenet", "inception_v3"):
        return {"aux_logits": False, "init_weights": True}
    return {}
