"""Check what a file of tensors holds before it is used.

To the types that :mod:`sparselearning.process.schema` reads come tensors, and dictionaries whose entries the network at
hand decides. A kind is one of those types, or a function of a value and its place in the file that
raises :class:`Mismatch`::

    record({"epoch": between(int, 0, 10), "acc": Share | None, "masks": mapping(tensor(dtype=torch.bool))})
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FunctionType
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from sparselearning.process.errors import FaultError
from sparselearning.process.schema import Between, Mismatch, check_entry, shown

Kind = Any
Check = Callable[[Any, str], None]

FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
TYPES = FLOATS | INTEGERS | {torch.bool, torch.complex64, torch.complex128}


def check(content: Any, kind: Kind, source: Path) -> None:
    """Check what was read from a file.

    Raises:
        FaultError: one sentence that names the file and the first entry that is not as it has to be.
    """
    try:
        conform(content, kind)
    except Mismatch as mismatch:
        raise FaultError(f"{source} is damaged: {mismatch}") from mismatch


def conform(value: Any, kind: Kind, where: str = "") -> None:
    """Check a value.

    Args:
        value: anything.
        kind: what it has to be.
        where: its place, for messages.

    Raises:
        Mismatch: if it is not.
    """
    if isinstance(kind, FunctionType):
        kind(value, where)
    else:
        check_entry(kind, value, where)


def inside(where: str, key: Any) -> str:
    """Name the place of an entry of a dictionary, in one short line."""
    name = key if isinstance(key, str) and key.isprintable() and len(key) <= 120 else shown(key)
    return f"{where}.{name}" if where else name


# ------------------------------------------------------------------------------------------------- single values


def between(kind: type, low: float, high: float) -> Kind:
    """A number, ``int`` or ``float``, in [low, high]."""
    return Annotated[kind, Between(low, high)]


def exactly(expected: Any) -> Check:
    """This plain value, and of its type."""

    def check_value(value: Any, where: str) -> None:
        if type(value) is not type(expected) or value != expected:
            raise Mismatch(f"{where} is {shown(value)}, not {expected!r}")

    return check_value


def optional(kind: Kind) -> Check:
    """None, or what ``kind`` is."""
    return lambda value, where: None if value is None else conform(value, kind, where)


def tensor(
    shape: torch.Size | tuple[int, ...] | None = None,
    dtype: torch.dtype | None = None,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    finite: bool = True,
    convertible: bool = False,
) -> Check:
    """A tensor of this shape and type with finite values in [low, high].

    Args:
        shape: None: any.
        dtype: None: any.
        low: least value.
        high: largest value.
        finite: if not, infinities and NaN are allowed.
        convertible: in place of a floating-point ``dtype`` any other is allowed, and of an integer one any other.
    """

    def check_tensor(value: Any, where: str) -> None:
        if type(value) not in (Tensor, nn.Parameter):
            raise Mismatch(f"{where} is {shown(value)}, not a tensor")
        if value.layout is not torch.strided or value.is_meta or value.dtype not in TYPES:
            raise Mismatch(f"{where} is no tensor of plain numbers")
        if shape is not None and value.shape != shape:
            raise Mismatch(f"{where} has shape {list(value.shape)}, not {list(shape)}")
        alike = convertible and any({value.dtype, dtype} <= kinds for kinds in (FLOATS, INTEGERS))
        if dtype is not None and value.dtype != dtype and not alike:
            raise Mismatch(f"{where} is of type {_name(value.dtype)}, not {_name(dtype)}")
        value = value.detach().to(dtype or value.dtype)
        if finite and not value.isfinite().all():
            raise Mismatch(f"{where} is not finite")
        if low > -math.inf and (value < low).any():
            raise Mismatch(f"{where} has values below {low}")
        if high < math.inf and (value > high).any():
            raise Mismatch(f"{where} has values above {high}")

    return check_tensor


def like(example: Tensor, **options: Any) -> Check:
    """A tensor of the shape and type of ``example``; ``options`` as in :func:`tensor`."""
    return tensor(example.shape, example.dtype, **options)


# ------------------------------------------------------------------------------------------------- containers


def record(fields: Mapping[Any, Kind], *, exact: bool = False, label: Callable[[Any], str] = lambda key: key) -> Check:
    """A dictionary with these entries.

    Args:
        fields: key to what has to be there.
        exact: refuse other entries; without it, they are ignored.
        label: what messages call an entry, by its key.
    """

    def check_record(value: Any, where: str) -> None:
        _check_dictionary(value, where)
        for key, kind in fields.items():
            if key not in value:
                raise Mismatch(f"{inside(where, label(key))} is missing")
            conform(value[key], kind, inside(where, label(key)))
        if exact and (others := [key for key in value if key not in fields]):
            raise Mismatch(f"{inside(where, others[0])} does not belong there")

    return check_record


def mapping(kind: Kind) -> Check:
    """A dictionary from names to what ``kind`` is."""

    def check_mapping(value: Any, where: str) -> None:
        _check_dictionary(value, where)
        for key, entry in value.items():
            if not isinstance(key, str):
                raise Mismatch(f"{inside(where, key)} does not belong there: it has no name")
            conform(entry, kind, inside(where, key))

    return check_mapping


def empty_or(kind: Kind) -> Check:
    """An empty dictionary, or what ``kind`` is."""
    return lambda value, where: None if isinstance(value, Mapping) and not value else conform(value, kind, where)


def sequence(container: type[list] | type[tuple], *kinds: Kind) -> Check:
    """A list or tuple with one entry for each of ``kinds``."""

    def check_sequence(value: Any, where: str) -> None:
        if not isinstance(value, container) or len(value) != len(kinds):
            found = f"has {len(value)} entries" if isinstance(value, container) else f"is {shown(value)}"
            raise Mismatch(f"{where} {found}, not a {container.__name__} of {len(kinds)}")
        for place, (kind, entry) in enumerate(zip(kinds, value, strict=True)):
            conform(entry, kind, f"{where}[{place}]")

    return check_sequence


def all_of(*kinds: Kind) -> Check:
    """What all of these are, checked in this order."""

    def check_all(value: Any, where: str) -> None:
        for kind in kinds:
            conform(value, kind, where)

    return check_all


def _check_dictionary(value: Any, where: str) -> None:
    if not isinstance(value, Mapping):
        raise Mismatch(f"{where or 'it'} is {shown(value)}, not named values")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
