"""BatchNorms in evaluation mode as part of the convolutions before them."""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sparselearning.process.errors import UsageError


def fold_batchnorms(
    network: nn.Module, fold: Callable[[nn.Conv2d, nn.BatchNorm2d], nn.Module] = fuse_conv_bn_eval
) -> fx.GraphModule:
    """Return the network in evaluation mode with every BatchNorm2d folded into the convolution before it.

    A BatchNorm after anything else, or after a convolution whose output or weights are used twice, stays. Zero weights
    stay zero. The result depends on the architecture alone in its structure and names: to use a packed file with
    folded BatchNorms, load it into ``fold_batchnorms`` of a newly built network.

    Args:
        network: not changed. Traceable by ``torch.fx``: no branches that depend on the data.
        fold: makes one layer of a convolution and its BatchNorm.

    Raises:
        UsageError: if the network cannot be traced.
    """
    try:
        traced = fx.symbolic_trace(copy.deepcopy(network).eval())
    except Exception as error:  # tracing runs the network's own code, which may raise anything
        raise UsageError(f"BatchNorm cannot be folded: torch.fx does not follow this network ({error})") from error
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    for node in traced.graph.nodes:
        norm = called_module(traced, node)
        if type(norm) is not nn.BatchNorm2d or norm.running_mean is None or not node.args:
            continue
        feeder = node.args[0]
        conv = called_module(traced, feeder)
        if type(conv) is not nn.Conv2d or len(feeder.users) > 1 or calls[feeder.target] > 1:
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
