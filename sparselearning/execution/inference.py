"""Prediction with active weights alone: BatchNorms folded, sums and ReLU fused into the layers before them.

A network becomes a graph of its layers (``torch.fx``). In it, convolutions and large linear layers are replaced by
:class:`SparseLayer`, BatchNorms that cannot be folded by :class:`ScaledPlanes`; all else stays as it is.
"""

import operator
from collections.abc import Container, Mapping, Sequence
from inspect import Signature, signature
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sparselearning.execution import memory
from sparselearning.execution.active_weights import ActiveWeights, Shape, recent
from sparselearning.execution.folding import called_module, copied, fold_batchnorms, plain_calls
from sparselearning.execution.functions import Norm
from sparselearning.execution.layout import POOLINGS, empty_activations, image_first, image_last, plane_wise, view
from sparselearning.execution.lists import Grid
from sparselearning.execution.network import SparseNetwork, eager
from sparselearning.execution.supported import convolution_shape, has_kernel, is_readable
from sparselearning.process.errors import UsageError

LARGEST_LINEAR_DENSITY = 0.5
"""Density of a linear layer up to which sparse computation is faster."""
IMAGES_AT_ONCE = 32
"""Images for each thread that go through the network together, where it treats each by itself: more are not faster, and
need more memory."""


class SparseInference(nn.Module):
    """A network for prediction alone: always in evaluation mode, without gradients.

    Args:
        network: changed, and kept.
        by_image: whether it surely treats each image by itself, so that a large batch may go through it in parts.
        arguments: what the model may be called with; None: ``network`` has a place for all.
        whole: for calls with arguments that ``network`` has no place for; None: they are refused.
    """

    def __init__(
        self,
        network: nn.Module,
        by_image: bool = False,
        arguments: Signature | None = None,
        whole: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.by_image = by_image
        self.arguments = arguments
        self.whole = whole
        self._places = frozenset(signature(network.forward).parameters)
        self.requires_grad_(False)
        self.train(False)

    @classmethod
    def of(cls, model: nn.Module) -> "SparseInference":
        """Make it from a model, which is not changed (``execution.sparse_inference``).

        Convolutions and linear layers may have an attribute ``active``, an :class:`Active`, in place of their weight.
        """
        for name, parameter in model.named_parameters():
            if parameter.device.type not in ("cpu", "meta") or parameter.dtype != torch.float32:
                raise UsageError(
                    f"sparse inference is for float32 on CPUs; {name} is {parameter.dtype} on {parameter.device}"
                )
        try:
            graph = fold_batchnorms(model, _fold)
        except UsageError:
            return cls(_unfolded(model))
        plain = plain_calls(graph)
        for name in plain:
            if (layer := _replacement(graph.get_submodule(name))) is not None:
                graph.set_submodule(name, layer)
        by_image = all(_is_by_image(graph, node, plain) for node in graph.graph.nodes)
        for node in list(graph.graph.nodes):
            if node.op == "call_function" and node.target in POOLINGS:
                node.target = plane_wise(node.target)
            elif node.op == "call_method" and node.target == "view":
                node.op, node.target = "call_function", _view
            elif isinstance(called_module(graph, node), SparseLayer | ScaledPlanes) and len(node.args) == 1:
                _fuse(graph, node, plain)
        graph.recompile()
        graph.delete_all_unused_submodules()
        arguments = signature(model.forward)
        if len(arguments.parameters) == len(signature(graph.forward).parameters):
            return cls(graph, by_image)
        has_weights = not any(parameter.is_meta for parameter in model.parameters())
        return cls(graph, by_image, arguments, _unfolded(model) if has_weights else None)

    @eager
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever the model returns in evaluation mode."""
        memory.begin_pass()
        size = IMAGES_AT_ONCE * torch.get_num_threads()
        with torch.no_grad():
            if self.by_image and not kwargs and len(args) == 1 and args[0].dim() == 4 and len(args[0]) > size:
                outputs = torch.cat([self.network(images) for images in args[0].split(size)])
            else:
                outputs = self._network_for(args, kwargs)(*args, **kwargs)
        return image_first(outputs, (args, kwargs))

    def _network_for(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> nn.Module:
        """What has a place for these arguments."""
        if self.arguments is None:
            return self.network
        others = self.arguments.bind(*args, **kwargs).arguments.keys() - self._places
        if not others:
            return self.network
        if self.whole is None:
            names = ", ".join(sorted(others))
            raise UsageError(f"a network of active weights alone takes no arguments with defaults: leave out {names}")
        return self.whole

    def train(self, mode: bool = True) -> "SparseInference":
        """Stay in evaluation mode."""
        return super().train(False)


class Active(NamedTuple):
    """Active weights of a layer, without the dense weight.

    Attributes:
        positions: in the dense weight, row by row; int64 [n].
        values: float32 [n].
    """

    positions: np.ndarray
    values: Tensor

    @classmethod
    def of(cls, layer: nn.Conv2d | nn.Linear) -> "Active":
        """What a layer has in place of a weight or, if nothing, its weights that are not zero."""
        active: Active | None = getattr(layer, "active", None)
        if active is None:
            flat = layer.weight.detach().reshape(-1)
            positions = flat.nonzero().squeeze(1)
            active = cls(positions.numpy(), flat[positions])
        return active


def kernel_shape(layer: nn.Module) -> Shape | None:
    """What a layer does; None: it has no kernel, or does not need one."""
    if type(layer) is nn.Conv2d and layer.padding_mode == "zeros":
        return convolution_shape(layer.weight.shape, layer.stride, layer.padding, layer.dilation, layer.groups)
    if type(layer) is nn.Linear and has_kernel(layer.weight):
        return Shape(layer.out_features, layer.in_features, (1, 1))
    return None


# ------------------------------------------------------------------------------------------- graph


def _unfolded(model: nn.Module) -> nn.Module:
    """A copy that computes with active weights alone, without a graph."""
    twin = copied(model).eval()
    weights = {name: weight for name, weight in twin.named_parameters() if weight.dim() in (2, 4)}
    return SparseNetwork(twin, weights, is_private=True) if weights else twin


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Module:
    """Make one layer of a convolution and its BatchNorm, also where only the active weights are known."""
    if not hasattr(conv, "active"):
        return fuse_conv_bn_eval(conv, norm)
    scale, shift = _scale_and_shift(norm)
    positions, values = Active.of(conv)
    outputs = torch.from_numpy(positions // conv.weight[0].numel())
    conv.active = Active(positions, values * scale[outputs])  # type: ignore[assignment]
    conv.bias = nn.Parameter(shift if conv.bias is None else shift + scale * conv.bias.detach())
    return conv


def _scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What a BatchNorm in evaluation mode multiplies each channel with, and what it adds."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight.detach()
    shift = -norm.running_mean * scale
    return scale, shift + norm.bias.detach() if norm.affine else shift


def _replacement(module: nn.Module) -> nn.Module | None:
    """The layer that replaces a layer; None: it stays."""
    shape = kernel_shape(module)
    if shape is not None:
        assert isinstance(module, nn.Conv2d | nn.Linear)
        active = Active.of(module)
        is_dense = len(active.values) > LARGEST_LINEAR_DENSITY * module.weight.numel()
        if isinstance(module, nn.Linear) and is_dense and not hasattr(module, "active"):
            return None
        return SparseLayer(shape, active, module.bias, isinstance(module, nn.Linear))
    if type(module) is nn.BatchNorm2d and module.running_mean is not None:
        return ScaledPlanes(*_scale_and_shift(module))
    if type(module) in POOLING_LAYERS:
        return PlaneWise(module)
    return None


def _view(activations: Tensor, *shape: Any, **kwargs: Any) -> Tensor:
    """``activations.view``, which moves no memory that other tensors share: without gradients, they alone hold it."""
    holders = torch._C._storage_Use_Count(activations.untyped_storage()._cdata)
    alone = 2 if activations._base is None else 3  # with the storage object made here, and what it is a view of
    return activations.view(*shape, **kwargs) if holders > alone else view(activations, *shape, **kwargs)


def _is_by_image(graph: fx.GraphModule, node: fx.Node, plain: Container[str]) -> bool:
    """Whether a node surely keeps images apart, along the first dimension."""
    match node.op:
        case "placeholder":
            return sum(other.op == "placeholder" for other in graph.graph.nodes) == 1
        case "output":
            return isinstance(node.args[0], fx.Node)
        case "call_module":
            module = called_module(graph, node)
            if node.target not in plain:
                return False
            if isinstance(module, nn.BatchNorm1d):
                return module.running_mean is not None
            return isinstance(module, BY_IMAGE) or (isinstance(module, nn.Flatten) and module.start_dim == 1)
        case "call_function" if node.target in POOLINGS:
            return True
    if node.target in (torch.flatten, "flatten"):
        return node.args[1:] == (1,)
    if node.target in (torch.mean, "mean"):
        return (2, 3) in (*node.args[1:], node.kwargs.get("dim"))
    return node.target in RELUS or (node.target in SUMS and all(isinstance(term, fx.Node) for term in node.args))


def _fuse(graph: fx.GraphModule, node: fx.Node, plain: Container[str]) -> None:
    """Fuse a sum and a ReLU that alone read a layer's output into the layer."""
    added, relu = None, False
    sums = _only_user(node)
    if sums is not None and sums.prev is node and _calls(sums, SUMS) and len(sums.args) == 2 and not sums.kwargs:
        first, second = sums.args
        other = second if first is node else first
        is_free = sums.target not in IN_PLACE_SUMS or first is node or _is_read_here_alone(graph, other, sums)
        if isinstance(other, fx.Node) and other is not node and is_free:
            added = other
            _take_over(graph, node, sums)
    activation = _only_user(node)
    if activation is not None and activation.args[:1] == (node,):
        is_layer = isinstance(called_module(graph, activation), nn.ReLU) and activation.target in plain
        relu = is_layer or _calls(activation, RELUS)
        if relu:
            _take_over(graph, node, activation)
    node.args = (*node.args, added, relu)


def _calls(node: fx.Node, functions: Container[Any]) -> bool:
    """Whether a node calls one of these functions and methods; a layer may have the name of one."""
    return node.op != "call_module" and node.target in functions


def _take_over(graph: fx.GraphModule, node: fx.Node, other: fx.Node) -> None:
    other.replace_all_uses_with(node)
    graph.graph.erase_node(other)


def _is_read_here_alone(graph: fx.GraphModule, node: Any, user: fx.Node) -> bool:
    """Whether nothing but this user reads the memory that a node writes, which is its own."""
    return isinstance(called_module(graph, node), SparseLayer | ScaledPlanes | nn.Conv2d) and _only_user(node) is user


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


IN_PLACE_SUMS = (operator.iadd, "add_")
SUMS = (operator.add, torch.add, "add", *IN_PLACE_SUMS)
RELUS = (F.relu, torch.relu, torch.relu_, "relu", "relu_")
POOLING_LAYERS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


# ------------------------------------------------------------------------------------------- layers


class SparseLayer(nn.Module):
    """A convolution or linear layer that computes with its active weights alone."""

    def __init__(self, shape: Shape, active: Active, bias: Tensor | None, is_linear: bool) -> None:
        super().__init__()
        self.shape, self.active, self.is_linear = shape, active, is_linear
        self.bias = None if bias is None else bias.detach().clone()
        self._kernels: dict[Any, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """All but the kernels, which hold addresses of their lists."""
        return {**self.__dict__, "_kernels": {}}

    def forward(self, input: Tensor, added: Tensor | None = None, relu: bool = False) -> Tensor:
        """Outputs of inputs [n, C, H, W] or, of a linear layer, [..., C]; plus ``added``; then ReLU."""
        _check_readable(input)
        if self.is_linear:
            lines = input.reshape(-1, input.shape[-1])
            outputs = self._outputs(lines.view(*lines.shape, 1, 1), None, False).view(len(lines), -1)
            if input.dim() != 2:  # outputs lie image-last in memory, and their first dimension is not that of images
                outputs = outputs.contiguous().view(*input.shape[:-1], -1)
            return _finish(outputs, added, relu)
        return self._outputs(input, added, relu)

    def _outputs(self, inputs: Tensor, added: Tensor | None, relu: bool) -> Tensor:
        if inputs.dim() != 4 or inputs.shape[1] != self.shape.channels:
            raise UsageError(f"a layer of {self.shape.channels} channels cannot take inputs {list(inputs.shape)}")
        source = image_last(inputs)
        grid = Grid(*source.shape[1:])
        plane = self.shape.target(grid)
        if plane.rows < 1 or plane.columns < 1:
            raise UsageError(f"inputs {list(inputs.shape)} are smaller than a convolution's window")
        outputs = empty_activations(grid.images, self.shape.outputs, plane.rows, plane.columns)
        fits = added is None or (added.shape == outputs.shape and is_readable(added))
        lines = image_last(added) if fits and added is not None else None
        self._kernel(grid).correlate(source, outputs, 0, self.active.values, self.bias, lines, relu and fits)
        return outputs if fits else _finish(outputs, added, relu)

    def _kernel(self, grid: Grid) -> Any:
        def make() -> Any:
            return ActiveWeights.of_values(self.shape, self.active.positions).forward(grid)

        return recent(self._kernels, (grid, torch.get_num_threads()), make)


class ScaledPlanes(nn.Module):
    """A BatchNorm in evaluation mode: each channel times ``scale``, plus ``shift``, float32 [channels]."""

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.scale, self.shift = scale, shift

    def forward(self, input: Tensor, added: Tensor | None = None, relu: bool = False) -> Tensor:
        """Outputs of inputs [n, C, H, W], plus ``added``, then ReLU."""
        _check_readable(input)
        if input.dim() != 4 or input.shape[1] != len(self.scale):
            raise UsageError(f"a BatchNorm of {len(self.scale)} channels cannot take inputs {list(input.shape)}")
        fits = added is None or (added.shape == input.shape and is_readable(added))
        lines = image_last(added) if fits and added is not None else None
        outputs = empty_activations(input.shape[0], *input.shape[1:])
        Norm(image_last(input), self.scale, self.shift, lines).write(outputs, relu and fits)
        return outputs if fits else _finish(outputs, added, relu)


class PlaneWise(nn.Module):
    """A layer that treats each plane by itself."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, input: Tensor) -> Any:
        """What the layer returns."""
        return plane_wise(self.layer)(input)


def _check_readable(inputs: Tensor) -> None:
    if not is_readable(inputs) or not inputs.numel():
        raise UsageError(
            f"sparse inference takes float32 on CPUs, one image at least, not {inputs.dtype} {list(inputs.shape)} on "
            f"{inputs.device}"
        )


BY_IMAGE = (SparseLayer, ScaledPlanes, PlaneWise, nn.Conv2d, nn.Linear, nn.ReLU, nn.Dropout, nn.Identity)


def _finish(outputs: Tensor, added: Tensor | None, relu: bool) -> Tensor:
    """Add, and do the ReLU, by PyTorch: where shapes or types differ, as it allows."""
    outputs = outputs if added is None else outputs + added
    return outputs.relu() if relu else outputs
