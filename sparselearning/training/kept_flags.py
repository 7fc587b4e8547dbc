"""The flags of a run as its ``config.json`` keeps them: written, taken over by another run, restored, compared."""

import argparse
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sparselearning.process.arguments import Parser, marked, path
from sparselearning.process.errors import FaultError, UsageError
from sparselearning.process.files import read_json
from sparselearning.process.schema import FlagValue, read, shown
from sparselearning.training.flags import NO_EFFECT, OF_ONE_CALL
from sparselearning.training.records import flags_of
from sparselearning.training.runtime import Runtime


def values(args: argparse.Namespace) -> dict[str, Any]:
    """Every flag's value, as plain values."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def command(argv: Sequence[str] | None) -> str:
    """The command line, quoted for a shell."""
    return shlex.join(["python", sys.argv[0], *(sys.argv[1:] if argv is None else argv)])


def take_over(parser: Parser, argv: Sequence[str]) -> None:
    """Let the flags of the run that ``--config`` names, if it is there, be the parser's defaults.

    Positional arguments may then be left out, too.

    Raises:
        UsageError: if there is no such file, or it has entries that are no flags of this parser.
        FaultError: if it is damaged.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config", nargs="?")
    if not (found := finder.parse_known_args(argv)[0].config):  # the parser itself says what is wrong with none
        return
    source = path(found)
    if not source.is_file():
        raise UsageError(f"--config {source}: there is no such file")
    kept = read(dict[str, FlagValue], flags_of(read_json(source)), str(source))
    known = {action.dest for action in parser._actions}
    if unknown := [name for name in kept if name not in known]:
        raise UsageError(f"--config {source}: this script has no flags {', '.join(map(shown, unknown))}")
    own = marked(parser, OF_ONE_CALL)
    taken = {name: value for name, value in kept.items() if name not in own}
    parser.set_defaults(**restored(parser, taken, str(source)))
    for action in parser._actions:
        if not action.option_strings and action.dest in taken:
            action.nargs, action.required = "?", False


def of_run(parser: Parser, kept: Mapping[str, Any], source: str) -> argparse.Namespace:
    """All flags of a run, :func:`restored`; those that its version of the script did not have get their defaults.

    Raises:
        FaultError: naming the first flag that is missing although it has no default, or whose value no command line
            gives.
    """
    if missing := [action.dest for action in parser._actions if action.required and action.dest not in kept]:
        raise FaultError(f"{source} is damaged or no run's of this script: {missing[0]} is missing")
    known = {name: parser.get_default(name) for name in (action.dest for action in parser._actions)}
    return argparse.Namespace(**{**known, **restored(parser, kept, source)})


def restored(parser: argparse.ArgumentParser, kept: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The flags of a run as its parser would make them; what the parser does not know is left out.

    Args:
        parser: of the script that the run was made with.
        kept: name to value, as :func:`values` wrote it.
        source: where, for messages.

    Raises:
        FaultError: naming the first flag whose value no command line gives.
    """
    known = [action for action in parser._actions if action.dest in kept]
    return {action.dest: _restored(action, kept[action.dest], source) for action in known}


def _restored(action: argparse.Action, value: Any, source: str) -> Any:
    if value is None and action.default is None:
        return None
    items = value if action.nargs == "+" and isinstance(value, list) else [value]
    kind: Any = bool if action.nargs == 0 else action.type or str
    try:
        made = [bool(item) if kind is bool else kind(str(item)) for item in items]
    except argparse.ArgumentTypeError as error:
        raise FaultError(f"{source} is damaged or no run's: {action.dest} is {shown(value)} ({error})") from error
    written = [str(item) if isinstance(item, Path) else item for item in made]
    alike = all(type(there) is type(here) and there == here for there, here in zip(items, written, strict=True))
    if not alike or (action.choices and not set(made) <= set(action.choices)):
        raise FaultError(f"{source} is damaged or no run's: {action.dest} is {shown(value)}")
    return made if action.nargs == "+" else made[0]


def identity(values: Mapping[str, Any], parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The flags that a resumed run must share."""
    without_effect = marked(parser, NO_EFFECT)
    return {name: value for name, value in values.items() if name not in without_effect}


def settled(
    values: Mapping[str, Any], parser: argparse.ArgumentParser, device: torch.device | None = None
) -> dict[str, Any]:
    """A run's flags with one word for each number format, execution and data set: what means the same becomes equal.

    A data set that is a folder may move under the same name; a file may not, as many are called alike.

    Args:
        values: by name, maybe of an earlier version that had fewer: what these did is the default of those it lacked,
            but for ``--execution``.
        parser: of the script.
        device: what ``auto`` means on it takes its place; None: ``auto`` stays.
    """
    defaults = {action.dest: action.default for action in parser._actions} | {"execution": "masked"}
    all_values = {**defaults, **values}
    execution = str(all_values["execution"]) if all_values["sparse"] else "masked"
    amp = number_format(all_values["amp"], bool(all_values["fp16"]))
    runtime = Runtime(amp=amp, compile=bool(all_values["compile"]), execution=execution)
    if device is not None:
        runtime = runtime.resolved(device)
    path = os.path.normpath(str(all_values["data"]))
    same = {
        "amp": runtime.amp, "fp16": runtime.amp == "fp16", "execution": runtime.execution,
        "data": path if path.endswith(".npz") else os.path.basename(os.path.abspath(path)),
    }  # fmt: skip
    return {**all_values, **same}


def number_format(amp: str | None, fp16: bool) -> str:
    """Number format that both flags ask for, a choice of ``--amp``."""
    return "fp16" if fp16 else amp or "auto"
