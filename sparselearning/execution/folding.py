"""BatchNorms in evaluation mode as part of the convolutions before them."""

import copy
import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sparselearning.process.errors import UsageError


def fold_batchnorms(
    network: nn.Module, fold: Callable[[nn.Conv2d, nn.BatchNorm2d], nn.Module] = fuse_conv_bn_eval
) -> fx.GraphModule:
    """Return the network in evaluation mode with every BatchNorm2d folded into the convolution before it.

    A BatchNorm after anything else, or after a convolution whose output or weights are used twice, stays, and so does
    one that hooks watch, or whose convolution they do. Zero weights stay zero. The result takes the first argument and
    those without defaults; the others have their defaults. It depends on the architecture alone in its structure and
    names: to use a packed file with folded BatchNorms, load it into ``fold_batchnorms`` of a newly built network.

    Args:
        network: not changed. Traceable by ``torch.fx``: no branches that depend on data, or on arguments it needs.
        fold: makes one layer of a convolution and its BatchNorm.

    Raises:
        UsageError: if the network cannot be traced.
    """
    twin = copied(network).eval()
    try:
        traced = fx.GraphModule(twin, _Tracer().trace(twin), type(twin).__name__)
    except Exception as error:  # tracing runs the network's own code, which may raise anything
        raise UsageError(f"BatchNorm cannot be folded: torch.fx does not follow this network ({error})") from error
    calls = plain_calls(traced)
    for node in traced.graph.nodes:
        norm = called_module(traced, node)
        if type(norm) is not nn.BatchNorm2d or norm.running_mean is None or not node.args or node.target not in calls:
            continue
        feeder = node.args[0]
        conv = called_module(traced, feeder)
        if type(conv) is not nn.Conv2d or len(feeder.users) > 1 or calls[feeder.target] != 1:
            continue
        traced.set_submodule(feeder.target, fold(conv, norm))
        node.replace_all_uses_with(feeder)
        traced.graph.erase_node(node)
    traced.recompile()
    traced.delete_all_unused_submodules()
    return traced


def called_module(traced: fx.GraphModule, node: Any) -> nn.Module | None:
    """The module that a node of the graph calls, if it calls one."""
    return traced.get_submodule(str(node.target)) if isinstance(node, fx.Node) and node.op == "call_module" else None


def plain_calls(traced: fx.GraphModule) -> Counter[str]:
    """How often the graph calls each module, of those that it does nothing else with.

    Not those that hooks watch, whose weights the graph reads, or that are part of another one that it calls.
    """
    calls = Counter(str(node.target) for node in traced.graph.nodes if node.op == "call_module")
    used = {str(node.target) for node in traced.graph.nodes if node.op == "get_attr"} | set(calls)
    for name in list(calls):
        module = traced.get_submodule(name)
        is_read = any(other.startswith(f"{name}.") for other in used)
        is_part = any(name.startswith(f"{other}.") for other in calls)
        if is_read or is_part or module._forward_hooks or module._forward_pre_hooks:
            del calls[name]
    return calls


def copied(network: nn.Module) -> nn.Module:
    """A copy of a network, also where hooks compute weights anew in every pass, as ``torch.nn.utils.prune`` does."""
    attributes = (entry for module in network.modules() for entry in vars(module).values())
    computed = {id(one): one.detach().clone() for one in attributes if isinstance(one, Tensor) and not one.is_leaf}
    return copy.deepcopy(network, computed)


class _Proxy(fx.Proxy):
    """Takes ``a += b`` for what it is, not for ``a = a + b`` as fx does: other names of ``a`` see the sum, too."""


def _in_place(function: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    return lambda proxy, other: proxy.tracer.create_proxy("call_function", function, (proxy, other), {})


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"):
    setattr(_Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    """Traces a call with the first argument and those without defaults: branches go by the defaults of the others."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> Any:
        function, arguments = super().create_args_for_root(*args, **kwargs)
        for place, argument in enumerate(arguments):
            if place > 1 and isinstance(argument, fx.Proxy) and argument.node.args:  # the default; the network is first
                (arguments[place],) = argument.node.args
                self.graph.erase_node(argument.node)
        return function, arguments
