"""How a run's network is built again: by the function that its ``config.json`` names, from the code that trained it."""

import sys
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sparselearning.process.errors import UsageError
from sparselearning.training.networks import load_weights

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])

BUILDERS: dict[str, Callable[..., nn.Module]] = {}
"""Functions that :func:`network_builder` has marked, by their :func:`builder_name`."""


def network_builder(function: Builder) -> Builder:
    """Mark a function as one that builds networks from plain arguments, given by keyword.

    Of what a ``config.json`` or a packed file names, which may come from anywhere, nothing else is called.
    The module that it names is imported, though: use what others made only beside code that you trust.
    """
    BUILDERS[builder_name(function)] = function
    return function


def builder_name(function: Callable[..., nn.Module]) -> str:
    """Name of a function as ``builder`` in ``config.json`` gives it: ``module:function``."""
    return f"{function.__module__}:{function.__qualname__}"


def build_network(record: Mapping[str, Any], state: Mapping[str, Tensor], source: Path) -> nn.Module:
    """Build a run's network again, in evaluation mode, from what its script wrote into ``config.json``.

    The module is imported from Python's search path, or else from a folder beside this package, as in a clone.

    Args:
        record: the entry ``network`` of ``config.json``: ``builder``, a :func:`builder_name`, and its ``arguments``,
            by keyword.
        state: the weights to load.
        source: where they are from, for error messages.

    Raises:
        UsageError: if the function is no :func:`network_builder`, cannot be found or called, or the weights are of
            another network.
    """
    network = _build(record, source)
    load_weights(network, state, source)
    return network.eval()


def build_empty(record: Mapping[str, Any], source: Path) -> nn.Module:
    """The same without weights, and without memory for them: all tensors are on the device ``meta``."""
    with torch.device("meta"):
        return _build(record, source).eval()


def _build(record: Mapping[str, Any], source: Path) -> nn.Module:
    name = str(record.get("builder"))
    try:
        module, _, _ = name.partition(":")
        import_as(module, find_module(module))
        if name in BUILDERS:
            return BUILDERS[name](**record["arguments"])
    except (KeyError, ImportError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(
            f"the network of {source} cannot be built by {name} as its config.json says ({error}): "
            "put the folder of the code that trained it on PYTHONPATH"
        ) from error
    raise UsageError(
        f"the network of {source} is built by {name}, which is none of the functions marked as network_builder: "
        "call fold_batchnorms, to_onnx or sparse_inference with your own network"
    )


def find_module(name: str) -> ModuleSpec | None:
    """Find a module on Python's search path, or else in a folder beside this package, as in a clone."""
    beside = sorted(str(folder) for folder in Path(__file__).parents[2].iterdir() if folder.is_dir())
    try:
        return find_spec(name) or PathFinder.find_spec(name, beside)
    except ValueError:  # no name at all, or that of a script
        return None


def import_as(name: str, spec: ModuleSpec | None) -> ModuleType:
    """Import what was found under a name, unless that is imported already.

    Raises:
        ModuleNotFoundError: if nothing was found.
    """
    if name in sys.modules:
        return sys.modules[name]
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    module = sys.modules[name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
