"""What every command's parser needs: help that fits terminals, wrong calls in one sentence, marks, types of values."""

import argparse
import os
import re
import shutil
import textwrap
from collections.abc import Callable, Sequence
from copy import copy
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args

from sparselearning.process.schema import (
    Amount,
    BelowOne,
    Between,
    Count,
    Density,
    Ordinal,
    Seed,
    Share,
    in_range,
    rule,
)

WIDEST = 100
"""Columns that ``--help`` takes of a wider terminal."""
WIDEST_CHOICES = 60


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Fits terminals: long lists of choices go into the help text, and commands break where a shell allows it."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=min(shutil.get_terminal_size().columns, WIDEST) - 2)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shows_default = action.default is not None and action.default is not False
        text = super()._get_help_string(action) if shows_default else action.help
        return f"one of {', '.join(action.choices or ())}: {text}" if _has_long_choices(action) else text

    def _metavar_formatter(self, action: argparse.Action, default_metavar: str) -> Callable[[int], tuple[str, ...]]:
        if _has_long_choices(action):
            return lambda size: (default_metavar,) * size
        return super()._metavar_formatter(action, default_metavar)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)  # flags have hyphens

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        prose, _, command = text.partition("\n")
        filled = super()._fill_text(prose, width, indent)
        if not command:
            return filled
        together = re.sub(r" (?!-)", "\N{NO-BREAK SPACE}", command)  # a flag and its value
        room = width - len(indent) - len("   \\")
        lines = textwrap.wrap(together, room, break_long_words=False, break_on_hyphens=False)
        return f"{filled}\n{indent}" + f" \\\n{indent}  ".join(lines).replace("\N{NO-BREAK SPACE}", " ")


def _has_long_choices(action: argparse.Action) -> bool:
    return sum(len(choice) + 1 for choice in action.choices or ()) > WIDEST_CHOICES


class Parser(argparse.ArgumentParser):
    """Shows defaults in ``--help``, takes no abbreviations, and says what is wrong in one sentence.

    Args:
        doc: whose first line says what the script does; None where Python drops docstrings.
        epilog: what ``--help`` ends with.
        usage: the line that ``--help`` starts with, if it is not to be made from the flags.
    """

    def __init__(self, doc: str | None, epilog: str | None = None, usage: str | None = None) -> None:
        super().__init__(
            usage=usage,
            description=doc.splitlines()[0] if doc else None,
            epilog=epilog,
            formatter_class=_Formatter,
            allow_abbrev=False,
        )

    def given(self, argv: Sequence[str] | None = None) -> dict[str, str]:
        """The flags that a command line itself gives, whatever their values: name in the parsed arguments → flag.

        Positional arguments may be missing, as where ``--config`` gives them.
        """
        unset = object()
        required = [action for action in self._actions if action.required and not action.option_strings]
        for action in required:
            action.required = False
        try:
            names = vars(self.parse_args(argv, argparse.Namespace(**{action.dest: unset for action in self._actions})))
        finally:
            for action in required:
                action.required = True
        return {
            action.dest: action.option_strings[-1]
            for action in self._actions
            if action.option_strings and names[action.dest] is not unset
        }

    def error(self, message: str) -> NoReturn:
        """Exit with one sentence and exit code 2; for an unknown flag, name the nearest."""
        unknown = re.search(r"^unrecognized arguments: .*?(--?[a-zA-Z][^\s=]*)", message)
        if unknown and (near := get_close_matches(unknown[1], self._option_string_actions, n=1)):
            message += f"; did you mean {near[0]}?"
        self.exit(2, f"{self.prog}: error: {message} (--help lists all flags)\n")


# --------------------------------------------------------------------------------------------- groups and marks


class Group:
    """The group of a parser's flags with this title, made if it is not there.

    Args:
        parser: of the flags.
        title: in ``--help``.
        marks: of all flags that are declared through this object, for :func:`marked` to find.
    """

    def __init__(self, parser: argparse.ArgumentParser, title: str, *marks: str) -> None:
        found = (group for group in parser._action_groups if group.title == title)
        self._group = next(found, None) or parser.add_argument_group(title)
        self._marks = marks

    def either(self) -> "Group":
        """The same group for flags that exclude each other."""
        group = copy(self)
        group._group = self._group.add_mutually_exclusive_group()
        return group

    def add_argument(self, *names: str, **options: Any) -> None:
        """Declare a flag, as ``argparse`` does."""
        vars(self._group.add_argument(*names, **options))["marks"] = self._marks


def marked(parser: argparse.ArgumentParser, mark: str) -> set[str]:
    """Names, in the parsed arguments, of the flags that have a mark."""
    return {action.dest for action in parser._actions if mark in vars(action).get("marks", ())}


# ----------------------------------------------------------------------------------------------- types of values


def density(text: str) -> float:
    """Parse a share of weights, in (0, 1]."""
    return _number(text, Density)


def rate(text: str) -> float:
    """Parse a share, in [0, 1]."""
    return _number(text, Share)


def below_one(text: str) -> float:
    """Parse a share, in [0, 1)."""
    return _number(text, BelowOne)


def between_zero_and_one(text: str) -> float:
    """Parse a number in (0, 1)."""
    return _number(text, Annotated[float, Between(0, 1, open_low=True, open_high=True)])


def non_negative_float(text: str) -> float:
    """Parse a finite number, at least 0."""
    return _number(text, Amount)


def positive_float(text: str) -> float:
    """Parse a finite number above 0."""
    return _number(text, Annotated[float, Between(0, open_low=True)])


def non_negative(text: str) -> int:
    """Parse a whole number, at least 0."""
    return _number(text, Count)


def seed(text: str) -> int:
    """Parse a seed that every random generator takes, in [0, 2⁶³)."""
    return _number(text, Seed)


def positive(text: str) -> int:
    """Parse a whole number, at least 1."""
    return _number(text, Ordinal)


def path(text: str) -> Path:
    """Parse a path, in which a leading ``~`` is the user's home."""
    if not text:
        raise argparse.ArgumentTypeError("it is a path, not an empty text")
    return Path(os.path.expanduser(text))  # as a text: Path takes ./~ for ~


def _number(text: str, kind: Any) -> Any:
    try:
        value = get_args(kind)[0](text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{rule(kind)}, not {text!r}") from None
    if not in_range(value, kind):
        raise argparse.ArgumentTypeError(f"{rule(kind, value)}, not {text}")
    return value
