"""Find the script that a run was made with: it alone can set the run up again."""

import argparse
from collections.abc import Mapping
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from sparselearning.process.arguments import Parser
from sparselearning.process.errors import UsageError
from sparselearning.training.builders import find_module, import_as
from sparselearning.training.experiment import Setup
from sparselearning.training.runtime import Runtime

NAME = "main_suptickets"
"""Name of every script that trains, in the folder of the code that builds its networks."""


class Script(Protocol):
    """What the library asks of a script that trains: a module with these two functions."""

    def make_parser(self) -> Parser:
        """All flags of the script."""

    def set_up(self, args: argparse.Namespace, runtime: Runtime, device: torch.device) -> Setup:
        """Network, optimizer and data of a run with these flags, on the device, before its first step."""


def script_of(config: Mapping[str, Any], source: Path) -> Script:
    """Import the script that made a run: it is beside the module that its network is built by.

    That module is found as by ``builders.find_module``.

    Args:
        config: content of the run's ``config.json``.
        source: where it is from, for messages.

    Raises:
        UsageError: if there is none.
    """
    record = config.get("network")
    builder = str(record.get("builder")) if isinstance(record, Mapping) else ""
    module, _, _ = builder.partition(":")
    folder = _folder_of(module)
    path = folder / f"{NAME}.py" if folder else None
    if path is None or not path.is_file():
        raise UsageError(
            f"{source} does not lead to the script that made the run (its network is built by {builder or 'nothing'}): "
            f"put the folder of that {NAME}.py on PYTHONPATH"
        )
    name = f"{NAME} of {folder}"  # several folders have one
    return cast(Script, import_as(name, spec_from_file_location(name, path)))


def _folder_of(module: str) -> Path | None:
    """Folder that a top-level module or package lies in; None if there is none. Nothing is imported."""
    spec = find_module(module) if module.isidentifier() else None
    if spec is None or not spec.has_location or spec.origin is None:
        return None
    origin = Path(spec.origin)
    return origin.parent.parent if spec.submodule_search_locations else origin.parent
