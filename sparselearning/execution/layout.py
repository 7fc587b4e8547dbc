"""How activations lie in memory: as [channel, row, column, image], whatever the order of a tensor's dimensions."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from sparselearning.execution.memory import empty

POOLINGS = (F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d)


def image_last(activations: Tensor) -> Tensor:
    """View of [image, channel, …] as contiguous [channel, …, image], by a copy if its memory layout is another."""
    return activations.movedim(0, -1).contiguous()


def empty_activations(images: int, channels: int, *plane: int) -> Tensor:
    """Uninitialised [image, channel, …], lying in memory as [channel, …, image]."""
    strides = [images]
    for size in reversed(plane):
        strides.insert(0, strides[0] * size)
    return empty((images, channels, *plane), (1, *strides))


def lies_image_last(activations: Tensor) -> bool:
    """Whether images are innermost in memory, unlike in any contiguous tensor."""
    return activations.dim() > 1 and activations.stride(0) == 1 and not activations.is_contiguous()


def image_first(outputs: Any, given: Any) -> Any:
    """The same outputs, nested or not, activations with images innermost moved: ``view`` then works as of any model.

    Left as they are: what was ``given`` to the network, in nested arguments; parameters, and views of those.
    """
    own = {id(one) for one in tree_leaves(given)}

    def moved(one: Tensor) -> Tensor:
        root = one if one._base is None else one._base
        is_activation = one.dim() == 4 and id(one) not in own and not isinstance(root, nn.Parameter)
        return _moved(one) if is_activation and lies_image_last(one) else one

    return tree_map_only(Tensor, moved, outputs)


def _moved(activations: Tensor) -> Tensor:
    """The very tensor, for gradients and others' views to come are to be of it, contiguous in new memory."""
    activations.data = activations.data.contiguous()
    return activations


def view(activations: Tensor, *shape: Any, **kwargs: Any) -> Tensor:
    """``activations.view``, also where only their layout of memory is in the way: they then get another one."""
    try:
        return activations.view(*shape, **kwargs)
    except RuntimeError:
        if not lies_image_last(activations):
            raise
    return _moved(activations).view(*shape, **kwargs)


def plane_wise(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of each plane by itself: to PyTorch, images innermost of channels look like channels of images."""

    def call(inputs: Tensor, *args: Any, **kwargs: Any) -> Any:
        if inputs.dim() != 4 or inputs.stride(0) != 1:
            return function(inputs, *args, **kwargs)
        outputs = function(inputs.transpose(0, 1), *args, **kwargs)
        if isinstance(outputs, tuple):  # with places, which are those in one plane
            return tuple(each.transpose(0, 1) for each in outputs)
        return outputs.transpose(0, 1)

    return call
