"""Atomic writes, and where a run keeps its own."""

import contextlib
import io
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from sparselearning.errors import FaultError, UsageError
from sparselearning.records import History, flags_of
from sparselearning.schema import FlagValue, Record, read

MARK_WITHIN = 1 << 20
"""Bytes from the beginning of a file in which :func:`check_output` looks for its mark."""


def write_whole(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Write a file under a temporary name, then rename it, so that no reader ever meets half of it.

    Raises:
        FaultError: if the disk is full, read-only, or otherwise refuses; what stood at ``path`` is still there.
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
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save words the disk's anew
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else error
        raise FaultError(f"cannot write {path}: {reason}") from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""

    def write(file: IO[bytes]) -> None:
        file.write(content)

    write_whole(path, write)


def write_text(path: Path, text: str) -> None:
    """Write a file of text in UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def check_output(path: Path, mark: str) -> None:
    """Refuse a file to write, named by the user, if what stands there is not an earlier one of the same command.

    Args:
        path: of the file.
        mark: ASCII text near the beginning of every file that the command writes.

    Raises:
        UsageError: if something else stands there, or no file can.
    """
    try:
        if path.is_file():
            with path.open("rb") as file:
                is_free = mark.encode() in file.read(MARK_WITHIN)
        else:
            is_free = not os.path.lexists(path)
        above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error
    if not is_free:
        raise UsageError(f"{path} exists, and is no earlier output of this command: name another file")
    if not above.is_dir():
        raise UsageError(f"{path} cannot be written: {above} is no folder")


def save_torch(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors and plain values for :func:`load_torch`."""
    write_whole(path, lambda file: torch.save(content, file))


def copy_whole(source: Path, path: Path) -> None:
    """Copy a file, whole or not at all."""
    with source.open("rb") as original:
        write_whole(path, lambda file: shutil.copyfileobj(original, file))


def _copy(source: str, path: str) -> None:
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
        # Through memory: PyTorch words its complaints about a truncated stream better than about a truncated file.
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


def _stands_at(path: Path, file: IO[str]) -> bool:
    """Whether what stands at ``path`` now is an open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


class RunFolder:
    """The files that one run leaves behind (README, "What a run leaves behind")."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.metrics = path / "metrics.jsonl"
        self.tickets = path / "tickets.jsonl"
        self.summary = path / "summary.json"
        self.checkpoint = path / "checkpoint.pth"
        self.current = path / "model_current.pth"
        self.previous = path / "model_previous.pth"
        self.analysis = path / "analysis" / "analysis.json"
        self.lock = path / ".lock"

    @classmethod
    def of(cls, path: Path) -> "RunFolder":
        """The folder that ``--resume PATH`` means: itself, or the one that a checkpoint lies in."""
        if path.is_dir():
            return cls(path)
        above = cls(path.parent.parent)
        is_epochs = path.parent == above.epoch_checkpoint(0).parent and path.stem.startswith("epoch_")
        return above if is_epochs else cls(path.parent)

    def read_config(self) -> dict[str, Any]:
        """Content of ``config.json``, once that is known to be a run's.

        Raises:
            FaultError: if it is damaged.
        """
        content = read_json(self.config)
        read(History, content, str(self.config))
        read(dict[str, FlagValue], flags_of(content), str(self.config))
        return content

    def ticket(self, number: int) -> Path:
        """Where ``--keep-tickets`` puts a ticket; 0 is the pre-trained network."""
        return self.path / "tickets" / f"ticket_{number}.pth"

    def epoch_checkpoint(self, epoch: int) -> Path:
        """Where ``--gather-checkpoints`` keeps the state after ``epoch`` epochs."""
        return self.path / "checkpoints" / f"epoch_{epoch}.pth"

    @contextlib.contextmanager
    def in_use(self) -> Iterator[bool]:
        """Make the folder if need be, and keep other runs out of it.

        Yields:
            Whether other runs notice: False on a file system without locks.

        Raises:
            FaultError: if another run is in it, or it cannot be made.
        """
        if self.path.exists() and not self.path.is_dir():
            raise FaultError(f"{self.path} is to be a run's folder, but a file stands there")
        with contextlib.ExitStack() as opened:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                file = opened.enter_context(self.lock.open("a+"))
                locked = lock_file(file)
                if not _stands_at(self.lock, file):
                    raise BlockingIOError("whoever had locked it has just ended, and deleted it")
                file.truncate(0)
                os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
            except BlockingIOError as error:
                file.seek(0)
                raise FaultError(
                    f"{self.path} is in use by another run ({file.read()}): wait until it has ended, or name another "
                    "folder with --save"
                ) from error
            except OSError as error:
                raise FaultError(f"cannot write into {self.path}: {error.strerror}") from error
            try:
                yield locked
            finally:
                if _stands_at(self.lock, file):  # else it has moved aside
                    with contextlib.suppress(OSError):  # Windows deletes no open file
                        self.lock.unlink()

    def make_room(self) -> Path | None:
        """Move an earlier run of the same name aside; return where it went. Other files in the folder stay."""
        if not any(file.exists() for file in (self.metrics, self.summary, self.checkpoint)):
            if not self.config.exists():
                return None
            if "versions" not in self.read_config():
                raise UsageError(f"{self.config} is no run's: name another folder for the run")
        if self.path.resolve() == Path.cwd():
            raise UsageError(f"{self.path} is the present folder, and not empty: name another one for the run")
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.old-{number}")).exists():
            number += 1
        try:
            self.path.rename(aside)
        except OSError as error:
            raise FaultError(f"cannot move the earlier run {self.path} aside: {error.strerror}") from error
        RunFolder(aside).lock.unlink(missing_ok=True)
        return aside

    def is_in_use(self) -> bool:
        """Whether a run is in the folder now, as far as locks tell."""
        try:
            with self.lock.open() as file:
                lock_file(file)
        except BlockingIOError:
            return True
        except OSError:  # no lock, or none that may be read
            return False
        return False

    def copy_from(self, source: Path) -> None:
        """Bring along the files of a run that goes on here.

        Raises:
            FaultError: if one cannot be read or written, or the run there has not ended.
        """
        if RunFolder(source).is_in_use():
            raise FaultError(f"{source} is in use by another run: go on from it once that has ended")
        try:
            if RunFolder(source).config.exists():
                ignore = shutil.ignore_patterns("*.partial", self.lock.name)
                shutil.copytree(source, self.path, dirs_exist_ok=True, ignore=ignore, copy_function=_copy)
        except (OSError, shutil.Error) as error:
            raise FaultError(f"cannot copy the run {source} to {self.path}: {error}") from error


def find_checkpoint(path: Path) -> Path:
    """Return the file that ``--resume PATH`` means: a ``.pth`` file itself, or the checkpoint in a run's folder."""
    return RunFolder(path).checkpoint if path.is_dir() else path
