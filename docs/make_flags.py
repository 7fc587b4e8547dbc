#!/usr/bin/env python3
"""Write docs/flags.md: every flag of every command, from the parsers themselves.

python docs/make_flags.py
"""

import argparse
import runpy
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sparselearning.process.arguments import Parser  # noqa: E402
from sparselearning.process.files import write_text  # noqa: E402  found once its folder is on the path
from sparselearning.process.script import run_script  # noqa: E402
from sparselearning.training.flags import (  # noqa: E402
    add_run_flags,
    add_sparse_flags,
    add_ticket_flags,
)

PAGE = ROOT / "docs" / "flags.md"
TRAINING = ("CIFAR/main_suptickets.py", "ImageNet/main.py")
TOOLS = ("CIFAR/sweep.py",)
ESCAPED = str.maketrans({"|": r"\|", "*": r"\*", "\n": " "})
HEAD = """# All flags

Made from the parsers by `python docs/make_flags.py`, in the words of `--help`. A flag without a default is off, or not
set, unless given. The scripts of `benchmarks/` and `experiments/` list theirs with `--help`.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page.

    Raises:
        FaultError: if the disk refuses.
    """
    Parser(__doc__).parse_args(argv)
    write_text(PAGE, page())


def page() -> str:
    """The page's text."""
    shared = argparse.ArgumentParser(add_help=False)
    for add_flags in (add_sparse_flags, add_ticket_flags, add_run_flags):
        add_flags(shared)
    known = {action.dest: action.default for action in shared._actions}
    sections = [_section("Both training scripts", shared)]
    sections += [_section(script, parser_of(script), shared=known) for script in TRAINING]
    sections += [_section(script, parser_of(script)) for script in TOOLS]
    for path in sorted((ROOT / "sparselearning").glob("[a-z]*.py")):
        sections.append(_section(f"python -m sparselearning.{path.stem}", parser_of(f"sparselearning/{path.name}")))
    return "\n".join([HEAD, *sections])


def parser_of(script: str) -> argparse.ArgumentParser:
    """The parser whose help a script prints.

    Args:
        script: its path, from the top of the clone.
    """
    found: list[argparse.ArgumentParser] = []
    with (
        patch.object(Parser, "print_help", lambda parser, file=None: found.append(parser)),
        patch.object(sys, "argv", [script, "--help"]),
        patch.object(sys, "path", [str((ROOT / script).parent), *sys.path]),
        suppress(SystemExit),
    ):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return found[0]


def _section(title: str, parser: argparse.ArgumentParser, shared: Mapping[str, Any] = MappingProxyType({})) -> str:
    """A heading, and a table for each group of flags; those of no group come first.

    Args:
        title: of the section.
        parser: whose flags they are.
        shared: default by name of the flags that another section has: only other defaults are shown.
    """
    groups: dict[str, list[str]] = {}
    known = {"help": argparse.SUPPRESS, **shared}
    for group in parser._action_groups:
        own = [action for action in group._group_actions if known.get(action.dest, ...) != action.default]
        heading = "" if group.title in ("positional arguments", "options") else f"**{group.title}**\n\n"
        groups.setdefault(heading, []).extend(map(_row, own))
    head = "| flag | default | meaning |\n| --- | --- | --- |\n"
    tables = [f"{heading}{head}{''.join(rows)}" for heading, rows in groups.items() if rows]
    return "\n".join([f"## {title}\n", *tables])


def _row(action: argparse.Action) -> str:
    """One flag: its names, its default, and what --help says, with its choices."""
    follows = f" {action.metavar}" if isinstance(action.metavar, str) and not action.choices else ""
    follows += " …" if action.nargs == "+" else ""
    *aliases, name = action.option_strings or [follows.lstrip() or action.dest]
    names = ", ".join(f"`{each}`" for each in (*aliases, name + follows * bool(action.option_strings)))
    about = (action.help or "").replace("%%", "%").translate(ESCAPED)
    choices = [str(choice) for choice in action.choices or ()]
    if any(choice not in about for choice in choices):
        about += f" ({', '.join(choices)})"
    return f"| {names} | {_default(action)} | {about} |\n"


def _default(action: argparse.Action) -> str:
    """A flag's default as a command line gives it; nothing for a switch that is off."""
    default = action.default
    if default is True:
        return "on"
    if default is None or default is False or default == () or default is argparse.SUPPRESS:
        return ""
    return f"`{' '.join(map(str, default)) if isinstance(default, list | tuple) else default}`"


if __name__ == "__main__":
    run_script(main)
