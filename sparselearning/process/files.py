"""Atomic writes, reads that say what is wrong, and locks."""

import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from sparselearning.process.errors import FaultError, UsageError
from sparselearning.process.schema import Record

MARK_WITHIN = 1 << 20
"""Bytes from the beginning of a file in which :func:`check_output` looks for its mark."""


def write_whole(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Write a file under a temporary name, then rename it, so that no reader ever finds half of it.

    Raises:
        FaultError: if the disk is full, read-only, or otherwise refuses; an earlier file at ``path`` stays.
    """
    temporary = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save hides the disk's error
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else error
        raise FaultError(f"cannot write {path}: {reason}") from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""

    def write(file: IO[bytes]) -> None:
        file.write(content)

    write_whole(path, write)


def write_text(path: Path, text: str) -> None:
    """Write a file of text in UTF-8 atomically."""
    write_bytes(path, text.encode())


def check_output(path: Path, mark: str) -> None:
    """Refuse an output file, named by the user, that exists and is not an earlier output of the same command.

    Args:
        path: of the file.
        mark: ASCII text near the beginning of every file that the command writes.

    Raises:
        UsageError: if another file is there, or none can be written.
    """
    try:
        if path.is_file():
            with path.open("rb") as file:
                is_free = mark.encode() in file.read(MARK_WITHIN)
        else:
            is_free = not os.path.lexists(path)
        above = _nearest(path.absolute().parent)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error
    if not is_free:
        raise UsageError(f"{path} exists, and is no earlier output of this command: name another file")
    if not above.is_dir():
        raise UsageError(f"{path} cannot be written: {above} is no folder")


def check_folder(path: Path) -> None:
    """Refuse a folder to write into, there already or not, if nothing can be written there; nothing is made yet.

    Raises:
        FaultError: saying why.
    """
    above = _nearest(path.absolute())
    if not above.is_dir():
        raise FaultError(f"cannot write into {path}: {above} is no folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise FaultError(f"cannot write into {path}: {above} is read-only")


def _nearest(path: Path) -> Path:
    """An absolute path if something is there, or else the nearest folder above it."""
    return next(place for place in (path, *path.parents) if os.path.lexists(place))


def save_torch(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors and plain values for :func:`load_torch`."""
    write_whole(path, lambda file: torch.save(content, file))


def copy_whole(source: Path, path: Path) -> None:
    """Copy a file atomically."""
    with source.open("rb") as original:
        write_whole(path, lambda file: shutil.copyfileobj(original, file))


def copy_file(source: str, path: str) -> None:
    """:func:`copy_whole` for :func:`shutil.copytree`, which names files by strings."""
    copy_whole(Path(source), Path(path))


def load_torch(path: Path) -> dict[str, Any]:
    """Read a file of :func:`save_torch` onto the CPU; never runs code from it.

    Raises:
        UsageError: if there is no such file.
        FaultError: if it cannot be read, is truncated, or is no PyTorch file of tensors and plain values.
    """
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    try:
        # Through memory: of a truncated stream PyTorch's errors are more uniform than of a truncated file.
        content = torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
    except OSError as error:
        raise FaultError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # whatever the unpickler stumbles over in a damaged file
        raise FaultError(f"{path} is truncated or not a file of tensors that PyTorch saved") from error
    if not isinstance(content, dict):
        raise FaultError(f"{path} holds no dictionary of tensors")
    return content


def write_json(path: Path, content: Mapping[str, Any] | Record) -> None:
    """Write one JSON object, readable by people."""
    write_text(path, json.dumps(_named_values(content), indent=2) + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any] | Record]) -> None:
    """Write one JSON object per line."""
    write_text(path, "".join(json.dumps(_named_values(row)) + "\n" for row in rows))


def _named_values(content: Mapping[str, Any] | Record) -> Mapping[str, Any]:
    return content.as_dict() if isinstance(content, Record) else content


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FaultError: if the file cannot be read, or holds no JSON object.
    """
    return _parse(_read_text(path), str(path))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read one JSON object per line.

    Raises:
        FaultError: if the file cannot be read, or a line holds no JSON object.
    """
    return [_parse(line, at_line(path, n)) for n, line in enumerate(_read_text(path).splitlines(), start=1)]


def at_line(path: Path, number: int) -> str:
    """Name a line of a file, from 1, in messages."""
    return f"{path}, line {number},"


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise FaultError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise FaultError(f"{path} is damaged: it is no text") from error


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise FaultError(f"{source} is damaged: it is nested too deep") from error
    except ValueError as error:  # no JSON, or a number of thousands of digits
        raise FaultError(f"{source} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise FaultError(f"{source} is damaged: it holds no named values")
    return content


def lock_file(file: IO[str]) -> bool:
    """Lock an open file for this process alone, until it is closed or the process dies.

    Over NFS, processes of different machines see each other's locks if the server and the mount support them.

    Returns:
        Whether it is locked: not every file system has locks.

    Raises:
        BlockingIOError: if another has locked it.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(1 << 20)  # others cannot read what is locked: not the text at the file's start
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # the second on Windows
        raise BlockingIOError(*error.args) from error
    except OSError:
        return False
    return True
