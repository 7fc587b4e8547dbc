"""How activations lie in memory: as [channel, row, column, image], whatever the order of a tensor's dimensions."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
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

    Left as they are: what was ``given`` to the network, in nested arguments; parameters, and views of those. Of other
    views, copies take their place: autograd has noted where in the memory of another tensor they lie.
    """
    own = {id(one) for one in tree_leaves(given)}

    def moved(one: Tensor) -> Tensor:
        root = one if one._base is None else one._base
        if id(one) in own or isinstance(root, nn.Parameter) or not lies_image_last(one):
            return one
        return one.contiguous() if one._is_view() else _moved(one)

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

    def call(input: Tensor, *args: Any, **kwargs: Any) -> Any:
        if input.dim() != 4 or input.stride(0) != 1:
            return function(input, *args, **kwargs)
        outputs = function(input.transpose(0, 1), *args, **kwargs)
        if isinstance(outputs, tuple):  # with places, which are those in one plane
            return tuple(_with_images_first(each) for each in outputs)
        return _with_images_first(outputs)

    return call


def _with_images_first(planes: Tensor) -> Tensor:
    """Planes [channel, image, row, column] as activations; single numbers, which are few, are moved at once."""
    if planes.shape[2:].numel() == 1:
        return planes.transpose(0, 1).contiguous()
    return Rearranged.apply(planes, lambda one: one.transpose(0, 1), lambda one: one.transpose(0, 1))


class Rearranged(torch.autograd.Function):
    """New memory seen with other dimensions, which is no view to autograd, so that it may be moved.

    Args:
        rearrange: returns a view.
        restore: the reverse, of gradients.
    """

    @staticmethod
    def forward(
        context: Any, new: Tensor, rearrange: Callable[[Tensor], Tensor], restore: Callable[[Tensor], Tensor]
    ) -> Tensor:
        context.restore = restore
        view, lines = rearrange(new.detach()), new.detach().as_strided((new.numel(),), (1,))
        return torch.ops.aten.set_.source_Tensor_storage_offset(lines.new_empty(0), lines, 0, view.shape, view.stride())

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> Any:
        return context.restore(gradient), None, None
