"""The folder that a run begins or goes on in: who may have it, what moves aside, what is copied and noted there."""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sparselearning.process import distributed
from sparselearning.process.errors import UsageError
from sparselearning.process.files import write_json
from sparselearning.training.progress import print_notes
from sparselearning.training.provenance import ENVIRONMENT
from sparselearning.training.run_folder import RunFolder, find_checkpoint
from sparselearning.training.start import Continue, Start


def check_folder(folder: RunFolder, start: Start) -> None:
    """Refuse a folder that a run could not begin in, as :func:`open_folder` would, and make nothing.

    Raises:
        FaultError: if another run is in it, or it cannot be written into, or the run that is resumed has not ended.
        UsageError: if the folder holds something else than a run.
    """
    _check_start(folder, start)
    folder.check(_stays_in_place(folder, start))


def open_folder(folder: RunFolder, start: Start, config: Mapping[str, Any], held: ExitStack) -> None:
    """Make a run's folder and write ``config.json``; another run there is moved aside, unless it is still running.

    A resumed run keeps its files, and copies them into another folder; one that goes back to an earlier checkpoint
    leaves them to the later run, but for copies of the tickets that were kept until then.

    Args:
        folder: of the run.
        start: how it starts.
        config: content of ``config.json``, if the run has none yet.
        held: keeps other runs out of the folder until this is closed.

    Raises:
        FaultError: if another run is using the folder, or it cannot be made, or the run that is resumed has not ended.
        UsageError: if the folder holds something else than a run.
    """
    _check_start(folder, start)
    if not held.enter_context(folder.in_use()):
        print_notes(f"the file system of {folder.path} has no locks: no other run may write there meanwhile")
    if not _stays_in_place(folder, start):
        on_windows = os.name == "nt"  # which moves no folder with an open file in it
        if on_windows:
            held.close()
        aside = folder.make_room()
        if aside:
            print_notes(f"the earlier run in {folder.path} was moved to {aside}")
        if aside or on_windows:
            held.enter_context(folder.in_use())
        if source := _resumed(start):
            folder.copy_from(source.path)
        elif isinstance(start, Continue):
            later = RunFolder.of(start.source)
            now_in = RunFolder(aside) if aside and _is_same(later, folder) else later
            folder.copy_tickets(now_in, _tickets_of(start.saved))
    if not folder.config.exists():
        write_json(folder.config, config)
    else:
        _note_environment(folder, config)
    distributed.remember(_opened(folder))


def has_own_checkpoint(folder: RunFolder) -> bool:
    """Whether the checkpoint there is of this very job, restarted by the launcher, and not of an earlier run."""
    return distributed.is_main() and folder.checkpoint.exists() and distributed.remembers(_opened(folder))


def _opened(folder: RunFolder) -> str:
    return f"the run in {folder.path.resolve()} has begun"


def check_start_lies_elsewhere(folder: RunFolder, resume: Path) -> None:
    """Refuse files to start from that the run would move aside, where later runs are to start from them as well.

    Args:
        folder: of the run.
        resume: a file, or a run's folder.

    Raises:
        UsageError: if they lie in the run's folder.
    """
    if find_checkpoint(resume).resolve().is_relative_to(folder.path.resolve()):
        raise UsageError(
            f"{resume}, which all --iters runs start from, lies in the folder of one of them: name another with --save"
        )


def _check_start(folder: RunFolder, start: Start) -> None:
    """Refuse to move another run aside for one that is resumed while it is still going on elsewhere."""
    source = _resumed(start)
    if source and not _stays_in_place(folder, start):
        source.check_has_ended()


def _resumed(start: Start) -> RunFolder | None:
    """The run whose files are this one's too; None: a new one, or one that goes back to an earlier checkpoint."""
    if not isinstance(start, Continue):
        return None
    source = RunFolder.of(start.source)
    return source if start.source.resolve() == source.checkpoint.resolve() else None


def _stays_in_place(folder: RunFolder, start: Start) -> bool:
    """Whether a run goes on in the folder that holds it, rather than in one that is to be free."""
    source = _resumed(start)
    return source is not None and _is_same(source, folder)


def _is_same(one: RunFolder, other: RunFolder) -> bool:
    return one.path.resolve() == other.path.resolve()


def _tickets_of(saved: Mapping[str, Any]) -> range:
    """Numbers of the tickets that a run had until this checkpoint, from 0, the pre-trained network."""
    return range(0 if saved["pretrain_acc"] is None else 1 + len(saved["tickets"]))


def _note_environment(folder: RunFolder, config: Mapping[str, Any]) -> None:
    """Add the code, versions and hardware that a run is resumed with to its ``config.json``, if they are others.

    Raises:
        FaultError: if the file is damaged.
    """
    there = folder.read_config()
    latest = (there.get("resumed") or [there])[-1]
    now = {name: config[name] for name in ENVIRONMENT if name in config}
    if any(latest.get(name) != value for name, value in now.items()):
        there.setdefault("resumed", []).append(now)
        write_json(folder.config, there)
