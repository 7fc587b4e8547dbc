"""How a run starts: afresh, from trained weights, or where it was stopped."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparselearning.process import distributed
from sparselearning.process.errors import UsageError
from sparselearning.process.files import load_torch
from sparselearning.process.tensor_schema import check
from sparselearning.sparse.sparse_init import SPARSE_INITS
from sparselearning.training.checkpoint import HEAD, MARKS
from sparselearning.training.plan import Plan
from sparselearning.training.run_folder import RunFolder, find_checkpoint


@dataclass(frozen=True)
class Fresh:
    """With the network's own first weights."""


@dataclass(frozen=True)
class FromWeights:
    """A new run from trained weights.

    Attributes:
        saved: content of a file with weights.
        source: the file.
        with_training: it is a run's checkpoint, whose momentum, masks and step counter the run starts with as well.
    """

    saved: Mapping[str, Any]
    source: Path
    with_training: bool = False


@dataclass(frozen=True)
class Continue:
    """This very run is resumed.

    Attributes:
        saved: content of its checkpoint.
        source: the file.
    """

    saved: Mapping[str, Any]
    source: Path


Start = Fresh | FromWeights | Continue


def find_start(
    resume: Path | None,
    folder: RunFolder,
    identity: Mapping[str, Any],
    plan: Plan,
    sparse_init: str | None,
    settled: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
) -> Start:
    """Read what ``--resume`` names, and decide how a run starts from it.

    A finished run with flags that start from weights can be either: in its own folder it is resumed; in another, its
    weights are the start of a new run.

    Args:
        resume: a file, or a run's folder; None: nothing.
        folder: of the run that starts.
        identity: values that a checkpoint must share with the run that resumes from it (``kept_flags.identity``).
        plan: of the run.
        sparse_init: how its first masks are drawn; None: dense training.
        settled: replaces values in an ``identity`` that mean the same here by one (``kept_flags.settled``).

    Raises:
        UsageError: if it is nothing that this run can start from.
        FaultError: if it cannot be read.
    """
    if resume is None:
        return Fresh()
    source = find_checkpoint(resume)
    saved = load_torch(source)
    is_checkpoint = not saved.keys().isdisjoint(MARKS)
    if is_checkpoint:
        check(saved, HEAD, source)
    init = None if sparse_init is None else SPARSE_INITS[sparse_init]
    takes_weights = not plan.pre_train or (init is not None and init.needs_trained_weights)
    differing = differing_flags(saved["config"], identity, settled) if is_checkpoint else []
    if is_checkpoint and not differing:
        in_place = RunFolder.of(resume).path.resolve() == folder.path.resolve()
        if not takes_weights or saved["epoch"] != plan.end_epoch or in_place:
            _check_processes(len(saved["ranks"]), resume)
            return Continue(saved, source)
    if takes_weights:
        keeps_pattern = sparse_init in (None, "resume")
        return FromWeights(saved, source, with_training=is_checkpoint and not plan.pre_train and keeps_pattern)
    if not is_checkpoint:
        raise UsageError(
            f"{resume} is no checkpoint of a run: weights alone can start --cyclic_train without --pre_train, "
            "or --sparse-init resume and prune_*"
        )
    raise UsageError(f"{resume} belongs to a run with other flags: {', '.join(differing)}")


def differing_flags(
    there: Mapping[str, Any], here: Mapping[str, Any], settled: Callable[[Mapping[str, Any]], Mapping[str, Any]]
) -> list[str]:
    """Flags in which a checkpoint's run and this one differ, also when ``settled``, with both values, for people."""
    settled_there, settled_here = settled(there), settled(here)
    return [
        f"{name} ({there.get(name, settled_there.get(name))} there, {value} here)"
        for name, value in sorted(here.items())
        if settled_there.get(name) != settled_here[name] and (name not in there or there[name] != value)
    ]


def _check_processes(processes: int, resume: Path) -> None:
    """Refuse to resume with another number of processes."""
    if processes != distributed.world_size():
        raise UsageError(
            f"{resume} was written by {processes} process{'es' * (processes > 1)}: resume with as many, "
            f"not {distributed.world_size()}"
        )
