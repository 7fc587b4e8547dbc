"""The files in a run's folder; the path of the folder itself is decided by ``from_flags.run_path``."""

import contextlib
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from sparselearning.process.errors import FaultError, UsageError
from sparselearning.process.files import check_folder, copy_file, copy_whole, lock_file, read_json
from sparselearning.process.schema import FlagValue, read
from sparselearning.training.records import History, flags_of

ELSEWHERE = "wait until it has ended, or name another folder with --save"


def _is_at(path: Path, file: IO[str]) -> bool:
    """Whether ``path`` still names this open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


class RunFolder:
    """The files that one run leaves behind (docs/runs.md, "What a run leaves behind")."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.metrics = path / "metrics.jsonl"
        self.tickets = path / "tickets.jsonl"
        self.summary = path / "summary.json"
        self.checkpoint = path / "checkpoint.pth"
        self.current = path / "model_current.pth"
        self.previous = path / "model_previous.pth"
        self.ema = path / "model_ema.pth"
        self.analysis = path / "analysis" / "analysis.json"
        self.wandb_id = path / "wandb_id.txt"
        self.lock = path / ".lock"

    @classmethod
    def of(cls, path: Path) -> "RunFolder":
        """The folder that ``--resume PATH`` means: itself, or the one that a checkpoint is in."""
        if path.is_dir():
            return cls(path)
        above = cls(path.parent.parent)
        is_epochs = path.parent == above.epoch_checkpoint(0).parent and path.stem.startswith("epoch_")
        return above if is_epochs else cls(path.parent)

    def read_config(self) -> dict[str, Any]:
        """Content of ``config.json``, checked.

        Raises:
            FaultError: if it is damaged, or no run's.
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
            raise FaultError(f"{self.path} is to be a run's folder, but it is a file")
        with contextlib.ExitStack() as opened:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                file = opened.enter_context(self.lock.open("a+"))
                locked = lock_file(file)
                if not _is_at(self.lock, file):
                    raise BlockingIOError("the run that had locked it has just ended, and deleted it")
                file.truncate(0)
                os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
            except BlockingIOError as error:
                file.seek(0)
                raise FaultError(f"{self.path} is in use by another run ({file.read()}): {ELSEWHERE}") from error
            except OSError as error:
                raise FaultError(f"cannot write into {self.path}: {error.strerror}") from error
            try:
                yield locked
            finally:
                if _is_at(self.lock, file):  # else it was moved aside
                    with contextlib.suppress(OSError):  # Windows deletes no open file
                        self.lock.unlink()

    def check(self, goes_on: bool) -> None:
        """Refuse a folder that a run could not begin in, and make nothing.

        Args:
            goes_on: the run resumes the one in the folder.

        Raises:
            FaultError: if another run is in it, or it cannot be written into.
            UsageError: if the folder holds something else than a run.
        """
        check_folder(self.path)
        if self.is_in_use():
            raise FaultError(f"{self.path} is in use by another run: {ELSEWHERE}")
        if not goes_on:
            self._holds_run()

    def _holds_run(self) -> bool:
        """Whether the folder holds an earlier run, which may be moved aside.

        Raises:
            UsageError: if it may not be, or the folder holds something else.
        """
        if not any(file.exists() for file in (self.metrics, self.summary, self.checkpoint)):
            if not self.config.exists():
                return False
            if "versions" not in self.read_config():
                raise UsageError(f"{self.config} is no run's: name another folder for the run")
        if self.path.resolve() == Path.cwd():
            raise UsageError(f"{self.path} is the present folder, and not empty: name another one for the run")
        return True

    def make_room(self) -> Path | None:
        """Move an earlier run of the same name aside; return where it went. Other files in the folder stay."""
        if not self._holds_run():
            return None
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

    def copy_tickets(self, source: "RunFolder", numbers: Iterable[int]) -> None:
        """Copy those of these tickets that another run has kept.

        Raises:
            FaultError: if one cannot be read or written.
        """
        try:
            for kept in filter(lambda number: source.ticket(number).is_file(), numbers):
                copy_whole(source.ticket(kept), self.ticket(kept))
        except OSError as error:
            raise FaultError(f"cannot copy the tickets of {source.path} to {self.path}: {error}") from error

    def check_has_ended(self) -> None:
        """Refuse to resume a run in another folder while it is still writing its files.

        Raises:
            FaultError: if it is.
        """
        if self.is_in_use():
            raise FaultError(f"{self.path} is in use by another run: resume it once that has ended")

    def copy_from(self, source: Path) -> None:
        """Copy the files of a run that is resumed in this folder.

        Raises:
            FaultError: if one cannot be read or written, or the run there has not ended.
        """
        RunFolder(source).check_has_ended()
        try:
            if RunFolder(source).config.exists():
                ignore = shutil.ignore_patterns("*.partial", self.lock.name)
                shutil.copytree(source, self.path, dirs_exist_ok=True, ignore=ignore, copy_function=copy_file)
        except (OSError, shutil.Error) as error:
            raise FaultError(f"cannot copy the run {source} to {self.path}: {error}") from error


def find_checkpoint(path: Path) -> Path:
    """Return the file that ``--resume PATH`` means: a ``.pth`` file itself, or the checkpoint in a run's folder."""
    return RunFolder(path).checkpoint if path.is_dir() else path
