"""Check values from outside before they are used: what a file holds, and the numbers that options are given.

A dataclass declares the types, ranges and entries of a file. A damaged file ends in one sentence that names the file
and the entry. What the dataclass does not declare is ignored, so that files of later versions, which may hold more,
stay readable.
"""

import dataclasses
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from sparselearning.process.errors import FaultError, UsageError

T = TypeVar("T")
LARGEST = 3.4028234663852886e38
"""Largest number of a run, float32's."""
Plain = bool | int | float | str | None
FlagValue = Plain | list[Plain] | dict[str, Plain]
WORDS: dict[Any, str] = {
    bool: "true or false", int: "a whole number", float: "a number", str: "text", FlagValue: "the value of a flag",
}  # fmt: skip


@dataclass(frozen=True)
class Between:
    """Bounds of a number, included unless they are open; not ``finite``: none, infinities and NaN are allowed."""

    low: float = -LARGEST
    high: float = LARGEST
    finite: bool = True
    open_low: bool = False
    open_high: bool = False

    def allows(self, value: float) -> bool:
        """Whether a number is within them."""
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return (above and below) or (not self.finite and isinstance(value, float))

    def __str__(self) -> str:
        if self.high == LARGEST:
            return "" if self.low == -LARGEST else f" {'above' if self.open_low else 'of at least'} {self.low}"
        return f" in {'[('[self.open_low]}{self.low}, {self.high}{'])'[self.open_high]}"


FINITE = Between()
Share = Annotated[float, Between(0, 1)]
Density = Annotated[float, Between(0, 1, open_low=True)]
BelowOne = Annotated[float, Between(0, 1, open_high=True)]
Amount = Annotated[float, Between(0)]
Count = Annotated[int, Between(0)]
Ordinal = Annotated[int, Between(1)]
Seed = Annotated[int, Between(0, 2**63, open_high=True)]
"""What every random generator takes."""
Unbounded = Annotated[float, Between(finite=False)]
"""Such as the loss of a network that overflows."""


class Mismatch(ValueError):
    """A value is not what it should be: says which and why, not in which file."""


class Record:
    """Base of dataclasses that are the objects of a JSON file; what their ``__post_init__`` refuses is damage.

    A field may end in an underscore that its name in the file lacks (``from_``).
    """

    def as_dict(self) -> dict[str, Any]:
        """What goes into the file, in the order of the fields; optional ones that are None are left out."""
        entries = ((field, getattr(self, field.name)) for field in dataclasses.fields(self))  # type: ignore[arg-type]
        return {
            _key(field): _plain(value)
            for field, value in entries
            if value is not None or field.default is dataclasses.MISSING
        }


def read(kind: type[T], content: Any, source: str, complete: bool = False) -> T:
    """Check plain values, and return them as what they are declared to be.

    Args:
        kind: a dataclass, or any type that one may have a field of: ``bool``, ``int``, ``float``, ``str``,
            ``Literal``, ``list[…]``, ``dict[str, …]``, numbers ``Annotated`` with :class:`Between`, any of these
            ``| None``, and unions of plain types.
        content: what the file holds.
        source: the file, for messages.
        complete: fields with a default have to be there as well.

    Raises:
        FaultError: naming the first entry that is missing or of another type or range.
    """
    try:
        return _read(kind, content, "", complete)
    except Mismatch as error:
        raise FaultError(f"{source} is damaged or no run's: {error}") from None


def in_range(value: float, kind: Any) -> bool:
    """Whether a number, of whatever type, is within the bounds that ``kind`` is ``Annotated`` with."""
    return get_args(kind)[1].allows(value)


def rule(kind: Any, value: Any = None) -> str:
    """What messages say of an option that takes numbers of ``kind``, after its name, and is given ``value``."""
    return f"must be {_words(kind, value)}"


def check_option(name: str, value: float, kind: Any) -> None:
    """Refuse a number that an option does not take.

    Raises:
        UsageError: if it is not in the range of ``kind``, or not whole where that is of whole numbers.
    """
    is_whole = isinstance(value, Integral) or (isinstance(value, Real) and float(value).is_integer())
    if (get_args(kind)[0] is int and not is_whole) or not in_range(value, kind):
        raise UsageError(f"{name} {rule(kind, value)}, not {shown(value)}")


def check_entry(kind: Any, value: Any, entry: str) -> None:
    """Check one plain value, complete.

    Raises:
        Mismatch: naming the first ``entry`` in it that is missing or of another type or range.
    """
    _read(kind, value, entry, complete=True)


@cache  # typing takes long to tell it, and files hold many values of few types
def _parts(kind: Any) -> tuple[Any, Callable[[Any], bool] | None]:
    """Origin of a type; and what tells whether a value is of it, unless it holds others.

    Equal types share one entry, so that nothing here may depend on the order in which a union is written.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    holds_others = origin in (Union, UnionType, list, dict) or dataclasses.is_dataclass(kind)
    return origin, None if holds_others else _tester(kind, origin, arguments)


def _tester(kind: Any, origin: Any, arguments: tuple[Any, ...]) -> Callable[[Any], bool]:
    """What tells whether a value is of a type that holds no others."""
    if origin is Annotated:
        base, limits = arguments
        return lambda value: _is_number(base, value) and limits.allows(value)
    if origin is Literal:
        return lambda value: isinstance(value, str) and value in arguments
    if kind in (int, float):
        return lambda value: _is_number(kind, value) and FINITE.allows(value)
    if kind is str:
        return _is_text
    return lambda value: kind is Any or isinstance(value, origin or kind)


def _is_number(kind: type, value: Any) -> bool:
    return isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


@cache
def _fields(kind: Any) -> list[tuple[dataclasses.Field, str, Any]]:
    """Fields of a dataclass, their names in a file, and their types."""
    types = get_type_hints(kind, include_extras=True)
    return [(field, _key(field), types[field.name]) for field in dataclasses.fields(kind)]


def _read(kind: Any, value: Any, entry: str, complete: bool) -> Any:
    origin, is_one = _parts(kind)
    if is_one:
        if not is_one(value):
            raise _mismatch(entry, value, _words(kind, value))
        return value
    if origin in (Union, UnionType):
        return _read_union(kind, value, entry, complete)
    if origin is list and isinstance(value, list):
        (inner,) = get_args(kind)
        is_one = _parts(inner)[1]
        if is_one and all(map(is_one, value)):
            return [*value]
        return [_read(inner, item, f"{entry}[{place}]", complete) for place, item in enumerate(value)]
    if origin is dict and isinstance(value, Mapping):
        _, inner = get_args(kind)
        return {_read_key(key, entry): _read(inner, value[key], _join(entry, key), complete) for key in value}
    if origin in (list, dict):
        raise _mismatch(entry, value, _words(kind, value))
    if not isinstance(value, Mapping):
        raise _mismatch(entry, value, "named values")
    return _read_fields(kind, value, entry, complete)


def _read_fields(kind: Any, value: Mapping[str, Any], entry: str, complete: bool) -> Any:
    fields = {}
    for field, key, type_ in _fields(kind):
        inner = _join(entry, key)
        if key in value:
            fields[field.name] = _read(type_, value[key], inner, complete)
        elif complete or (field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING):
            raise Mismatch(f"{inner} is missing")
    try:
        return kind(**fields)
    except Mismatch as error:
        raise Mismatch(f"{entry}: {error}" if entry else str(error)) from None


def _read_union(kind: Any, value: Any, entry: str, complete: bool) -> Any:
    kinds = get_args(kind)
    options = [option for option in kinds if option is not NoneType]
    if value is None and len(options) < len(kinds):
        return None
    if len(options) == 1:
        return _read(options[0], value, entry, complete)
    if not any(_matches(option, value) for option in options):
        raise _mismatch(entry, value, _words(kind, value))
    return value


def _matches(kind: Any, value: Any) -> bool:
    if is_one := _parts(kind)[1]:
        return is_one(value)
    try:
        _read(kind, value, "", complete=False)
    except Mismatch:
        return False
    return True


def _read_key(key: Any, entry: str) -> str:
    if not _is_text(key):
        raise _mismatch(f"a name in {entry}" if entry else "a name", key, _words(str))
    return key


def _words(kind: Any, value: Any = None) -> str:
    """What a value should have been, for people; ``LARGEST`` is named only where a number is beyond it."""
    origin, arguments = get_origin(kind), get_args(kind)
    base, bounds = arguments if origin is Annotated else (kind, FINITE)
    if base in (int, float) and bounds.high == LARGEST and _is_number(float, value) and value > LARGEST:
        return f"{WORDS[base]} of at most {LARGEST:.2g}"
    if kind in WORDS:
        return WORDS[kind]
    if origin is Annotated:
        return WORDS[base] + str(bounds)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin in (Union, UnionType):
        return " or ".join(_words(argument, value) for argument in arguments)
    if origin in (list, dict):
        return f"a list of {_words(arguments[0])}" if origin is list else "named values"
    return f"a {kind.__name__}"


def _mismatch(entry: str, value: Any, expected: str) -> Mismatch:
    return Mismatch(f"{entry or 'it'} is {shown(value)}, not {expected}")


def shown(value: Any) -> str:
    """A value in one line of few characters, whatever it is."""
    try:
        return " ".join(reprlib.repr(value).split())
    except ValueError:  # Python writes no whole number of more than some thousand digits
        return "a number of thousands of digits"


def _join(entry: str, key: str) -> str:
    return f"{entry}.{key}" if entry else str(key)


def _key(field: dataclasses.Field) -> str:
    return field.name.removesuffix("_")


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.as_dict()
    return [_plain(item) for item in value] if isinstance(value, list) else value
