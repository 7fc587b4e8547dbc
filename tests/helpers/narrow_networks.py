"""torchvision's networks with few and narrow layers of the same kinds, under their own names."""

import contextlib
import functools

import pytest
from torch import nn
from torchvision.models import MobileNetV3, ResNet, VisionTransformer
from torchvision.models._api import BUILTIN_MODELS
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.resnet import BasicBlock


def resnet18(weights=None, num_classes=1000):
    """Two of the four stages, of one block each; 6 BatchNorms."""
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes)
    model.layer3, model.layer4 = nn.Identity(), nn.Identity()
    model.fc = nn.Linear(128, num_classes)
    return model


def mobilenet_v3_small(weights=None, **arguments):
    """A block with squeeze and excitation, and one that expands; 7 BatchNorms."""
    blocks = [
        InvertedResidualConfig(16, 3, 16, 16, True, "RE", 2, 1, 1),
        InvertedResidualConfig(16, 3, 48, 24, False, "HS", 2, 1, 1),
    ]
    return MobileNetV3(blocks, last_channel=64, **arguments)


def vit_b_16(weights=None, **arguments):
    """Two narrow layers, and dropout, which torchvision's has at 0."""
    sizes = {"patch_size": 16, "num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 64, "dropout": 0.1}
    return VisionTransformer(**sizes, **arguments)


@contextlib.contextmanager
def narrow_networks():
    """Whoever asks torchvision for one of these names gets the narrow one."""
    with pytest.MonkeyPatch.context() as context:
        for build in (resnet18, mobilenet_v3_small, vit_b_16):
            as_theirs = functools.wraps(BUILTIN_MODELS[build.__name__])(functools.partial(build))  # of their module
            context.setitem(BUILTIN_MODELS, build.__name__, as_theirs)
        yield
