"""Finished and unfinished runs as they lie on the disk: found, read, checked, and grouped over their seeds."""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from torch import Tensor

from sparselearning.process.errors import FaultError, UsageError
from sparselearning.process.files import at_line, read_json, read_jsonl
from sparselearning.process.schema import read
from sparselearning.reporting.analysis import Analysis
from sparselearning.sparse.sparse_init import SPARSE_INITS
from sparselearning.training import flags
from sparselearning.training.networks import SavedNetwork
from sparselearning.training.records import Config, Environment, EpochRow, Summary, TicketRow, flags_of
from sparselearning.training.run_folder import RunFolder

Row = TypeVar("Row", EpochRow, TicketRow)
FROM_TRAINED_WEIGHTS = {name for name, init in SPARSE_INITS.items() if init.needs_trained_weights}
LONGEST_LABEL = 60
"""Characters of a group's label; those that would be longer are numbered."""
MARKS_OF_EARLIER_SCRIPTS = {
    flags.NO_EFFECT: [
        "benchmark_inference", "benchmark_training", "data_dir", "demo", "evaluate", "gather_checkpoints", "iters",
        "local_rank", "log_interval", "master_port", "mgpu", "print_freq", "prof", "test_batch_size", "workers",
    ],
    flags.ABOUT_MASKS: ["density"],
    flags.ABOUT_TICKETS: ["cycle_rate", "cyclic_epochs", "pretrain_epoch"],
}  # fmt: skip
"""Marks of the scripts' own flags in runs of earlier versions, whose ``config.json`` has none."""
SET_ASIDE = re.compile(r"\.old-\d+$")
SEED_FOLDER = re.compile(r"(?<![^/\\])seed\d+(?![^/\\])")


@dataclass(frozen=True)
class Run:
    """What one run left behind (docs/runs.md, "What a run leaves behind").

    Attributes:
        folder: its files.
        config: what ``config.json`` says of the run.
        flags: every flag's value, under the names of ``config.json``.
        metrics: one row per finished epoch, at least one.
        tickets: one row per ticket.
        summary: None as long as the run is unfinished.
        analysis: what ``sparselearning.analyze`` measured of its tickets; None if it has not been run.
    """

    folder: RunFolder
    config: Config
    flags: Mapping[str, Any]
    metrics: Sequence[EpochRow]
    tickets: Sequence[TicketRow]
    summary: Summary | None
    analysis: Analysis | None = None

    @property
    def seed(self) -> int:
        """Seed of weights, masks, data order and augmentation."""
        return self.config.seed

    @property
    def environments(self) -> Sequence[Environment]:
        """Code, versions and hardware that it ran with, first and after each change."""
        return [self.config, *self.config.resumed]

    @property
    def is_plain(self) -> bool:
        """Whether this is plain training: no cheap tickets."""
        return not self.tickets

    @property
    def method(self) -> str:
        """Name of the training method that the flags make."""
        config = self.config
        if not config.sparse:
            return "dense"
        if config.fix:
            return "static"
        if config.method == "DST":
            return {"gradient": "RigL", "random": "SET"}.get(config.growth, f"DST/{config.growth}")
        grows_otherwise = config.method.startswith("GraNet") and config.growth != "gradient"
        return f"{config.method}/{config.growth}" if grows_otherwise else config.method

    @property
    def name(self) -> str:
        """What the user called the run with ``--indicate_method``, else its method; in one line."""
        given = one_line(self.config.indicate_method)
        return one_line(self.method) if given in ("Results", "") else given


@dataclass
class Group:
    """Finished runs that differ in nothing but their seed.

    Attributes:
        training_flags: the flags of all its runs that took effect, seed and name apart; flags about tickets are in
            ``ticket_flags``.
        ticket_flags: empty for plain training.
        label: name that no other group has, of at most :data:`LONGEST_LABEL` characters.
        full_label: the same, however long.
        control: plain training that is otherwise equal, if there is one.
    """

    name: str
    training_flags: Mapping[str, Any]
    ticket_flags: Mapping[str, Any]
    runs: list[Run] = field(default_factory=list)
    label: str = ""
    full_label: str = ""
    control: "Group | None" = None

    @property
    def flags(self) -> dict[str, Any]:
        """All flags that took effect, but for seed and name."""
        return {**self.training_flags, **self.ticket_flags}

    @property
    def method(self) -> str:
        """Name of the runs' training method."""
        return self.runs[0].method

    @property
    def seeds(self) -> list[int]:
        """Seeds of the runs, in their order."""
        return [run.seed for run in self.runs]


# ------------------------------------------------------------------------------------------------------- reading


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """Return the run folders that the paths mean: each path itself, or else all that lie under it, by name.

    Runs that a later one of the same name has moved aside (``*.old-1``) count only when they are named themselves.

    Raises:
        UsageError: if a path does not exist or holds no run.
        FaultError: if a folder cannot be searched.
    """
    found: dict[Path, Path] = {}  # resolved → as the user would write it
    for path in paths:
        if not path.is_dir():
            raise UsageError(f"{path} is not a folder: name a run's folder, or one that runs lie under")
        folders = [path] if _is_run(path) else _folders_with_config(path)
        folders = [
            folder
            for folder in folders
            if _is_run(folder) and not any(SET_ASIDE.search(part) for part in folder.relative_to(path).parts)
        ]
        if not folders:
            raise UsageError(f"{path} holds no run: no folder in it has a config.json and a metrics.jsonl")
        for folder in folders:
            found.setdefault(folder.resolve(), folder)
    return list(found.values())


def read_run(path: Path) -> Run:
    """Read a run's text files, each checked by itself and against the others.

    Raises:
        FaultError: if one is damaged or cannot be read, or contradicts another.
    """
    folder = RunFolder(path)
    content = folder.read_config()
    config = read(Config, content, str(folder.config))
    metrics = _read_rows(EpochRow, folder.metrics)
    _check_epochs(metrics, folder)
    summary = read(Summary, read_json(folder.summary), str(folder.summary)) if folder.summary.exists() else None
    if folder.tickets.exists():
        tickets = _read_rows(TicketRow, folder.tickets)
    else:  # the summary repeats the accuracies, for whoever keeps only the small files
        columns = zip(summary.ticket_acc, summary.superposed_acc, strict=True) if summary else ()
        tickets = [TicketRow(ticket=n, ticket_acc=t, superposed_acc=s) for n, (t, s) in enumerate(columns, start=1)]
    _check_tickets(tickets, metrics, summary, folder)
    analysis = read(Analysis, read_json(folder.analysis), str(folder.analysis)) if folder.analysis.exists() else None
    return Run(folder, config, flags_of(content), metrics, tickets, summary, analysis)


def _read_rows(kind: type[Row], path: Path) -> list[Row]:
    return [read(kind, row, at_line(path, number)) for number, row in enumerate(read_jsonl(path), start=1)]


def _check_epochs(metrics: Sequence[EpochRow], folder: RunFolder) -> None:
    """Epochs follow each other, and so do the tickets of their cycles."""
    if not metrics:
        raise FaultError(f"{folder.metrics} holds no finished epoch")
    ticket = None
    for number, row in enumerate(metrics, start=1):
        if row.epoch != metrics[0].epoch + number - 1:
            raise _contradiction(folder.metrics, number, f"epoch is {row.epoch} after {metrics[number - 2].epoch}")
        if row.ticket not in (ticket, (ticket or 0) + 1):
            raise _contradiction(folder.metrics, number, f"ticket is {row.ticket} after {ticket}")
        ticket = row.ticket


def _check_tickets(
    tickets: Sequence[TicketRow], metrics: Sequence[EpochRow], summary: Summary | None, folder: RunFolder
) -> None:
    """Tickets are numbered from 1, each has a cycle, and a finished run's are those of its summary."""
    for number, row in enumerate(tickets, start=1):
        if row.ticket != number:
            raise _contradiction(folder.tickets, number, f"ticket is {row.ticket}, not {number}")
    cycles = metrics[-1].ticket or 0
    if len(tickets) > cycles:
        raise FaultError(f"{folder.metrics} is damaged: it has no epoch of ticket {cycles + 1}")
    if summary is None:
        return
    for name, here, there in (
        ("ticket_acc", summary.ticket_acc, [row.ticket_acc for row in tickets]),
        ("superposed_acc", summary.superposed_acc, [row.superposed_acc for row in tickets]),
    ):
        if here != there:
            raise FaultError(f"{folder.summary} is damaged: {name} is not that of {folder.tickets}")
    if len(tickets) < cycles:
        raise FaultError(f"{folder.summary} is damaged: ticket_acc lacks ticket {cycles} of {folder.metrics}")


def _contradiction(path: Path, line: int, sentence: str) -> FaultError:
    return FaultError(f"{at_line(path, line)} is damaged: {sentence}")


def masked_weights(path: Path) -> dict[str, Tensor]:
    """Weights of the masked layers of a saved network, by name in model order; empty for a dense one.

    Raises:
        UsageError: if there is no such file.
        FaultError: if it is damaged.
    """
    network = SavedNetwork.read(path)
    return {name: network.state_dict[name] for name in network.masks}


def _folders_with_config(path: Path) -> list[Path]:
    def fail(error: OSError) -> NoReturn:
        raise FaultError(f"{error.filename} cannot be searched for runs: {error.strerror}") from error

    return sorted(Path(place) for place, _, names in os.walk(path, onerror=fail) if "config.json" in names)


def _is_run(path: Path) -> bool:
    folder = RunFolder(path)
    return folder.config.is_file() and folder.metrics.is_file()


# ------------------------------------------------------------------------------------------------------ grouping


def group_runs(runs: Iterable[Run]) -> tuple[list[Group], list[str]]:
    """Group runs that differ only in their seed; find each group's control.

    Args:
        runs: in the order that groups are to have.

    Returns:
        The groups of finished runs, and one sentence about each run that is in none: unfinished, or a repetition.
    """
    groups: dict[str, Group] = {}
    left_out = []
    for run in runs:
        if run.summary is None:
            left_out.append(f"{run.folder.path}: unfinished, epochs done: {len(run.metrics)}")
            continue
        training_flags, ticket_flags = _effective_flags(run)
        key = json.dumps([run.name, training_flags, ticket_flags], sort_keys=True)
        group = groups.setdefault(key, Group(run.name, training_flags, ticket_flags))
        if run.seed in group.seeds:
            same = group.runs[group.seeds.index(run.seed)]
            left_out.append(f"{run.folder.path}: has the flags and the seed of {same.folder.path}, which counts")
            continue
        group.runs.append(run)
    found = list(groups.values())
    _label(found)
    for group in found:
        if group.ticket_flags:
            group.control = next((other for other in found if _is_control(other, group)), None)
    return found, left_out


def differing_flags(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """Flags that took effect in several of the groups, and not with one value, to their value in each group."""
    names = dict.fromkeys(name for group in groups for name in group.flags)
    values = {name: [group.flags.get(name) for group in groups] for name in names}
    return {name: column for name, column in values.items() if len({repr(v) for v in column if v is not None}) > 1}


def _is_control(plain: Group, group: Group) -> bool:
    return not plain.ticket_flags and plain.training_flags == group.training_flags


def _effective_flags(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """Flags that made the run what it is, apart from seed and name: those of any training, those of tickets.

    Epochs count as trained, however a script's flags divide them up.
    """
    marks = run.config.marks or MARKS_OF_EARLIER_SCRIPTS
    skipped = flags.names_with(flags.NO_EFFECT, marks) | {"seed", "epochs"}
    skipped |= set() if run.config.sparse else flags.names_with(flags.ABOUT_MASKS, marks) - {"sparse"}
    about_tickets = flags.names_with(flags.ABOUT_TICKETS, marks)
    skipped |= {name for name, (other, off) in flags.SWITCHED_OFF.items() if run.flags.get(other) in off}
    effective = {name: value for name, value in run.flags.items() if name not in skipped}
    tickets = {name: value for name, value in effective.items() if name in about_tickets}
    training_flags = {name: value for name, value in effective.items() if name not in tickets}
    training_flags["epochs"] = run.metrics[-1].epoch + 1
    ticket_flags = {} if run.is_plain else tickets
    if start := _start(run):
        (training_flags if run.config.pre_train else ticket_flags)["resume"] = start
    return training_flags, ticket_flags


def _start(run: Run) -> str | None:
    """Path of the weights that the run started from, but for seeds in it; None: it started from scratch."""
    given = run.config
    takes_masks = given.sparse and given.sparse_init in FROM_TRAINED_WEIGHTS
    if (given.pre_train and not takes_masks) or not given.resume:
        return None
    return SEED_FOLDER.sub("seedN", given.resume)


def _label(groups: Sequence[Group]) -> None:
    """Name each group, and add what tells it from others of that name; number it where that takes too many words.

    Groups that look alike even so, as they differ in what is not shown, are numbered, too.
    """
    for name in dict.fromkeys(group.name for group in groups):
        family = [group for group in groups if group.name == name]
        flags = differing_flags(family)
        full, short = _named(family, flags), _named(family, _fitting(family, flags))
        for group, full_label, label in zip(family, full, short, strict=True):
            group.full_label, group.label = full_label, label
    labels, full_labels = [group.label for group in groups], [group.full_label for group in groups]
    for number, group in enumerate(groups, start=1):
        ending = f" #{number}"
        if len(group.label) > LONGEST_LABEL or labels.count(group.label) > 1:
            group.label = shortened(group.label, LONGEST_LABEL - len(ending)) + ending
        if full_labels.count(group.full_label) > 1:
            group.full_label += ending


def _named(family: Sequence[Group], flags: Mapping[str, Sequence[Any]]) -> list[str]:
    """The name of each group with its values of these flags, as far as they took effect."""
    has_tickets = any(group.ticket_flags for group in family)
    labels = [f"{group.name}, plain" if has_tickets and not group.ticket_flags else group.name for group in family]
    for flag, column in flags.items():
        labels = [
            f"{label}, {flag} {value}" if flag in group.flags else label
            for label, value, group in zip(labels, _show(column), family, strict=True)
        ]
    return labels


def _fitting(family: Sequence[Group], flags: Mapping[str, Sequence[Any]]) -> Mapping[str, Sequence[Any]]:
    """These flags but for the last ones that are not needed to tell all groups apart, until labels are short enough."""
    for flag in reversed(list(flags)):
        if max(map(len, _named(family, flags))) <= LONGEST_LABEL:
            break
        fewer = {name: column for name, column in flags.items() if name != flag}
        flags = fewer if len(set(_named(family, fewer))) == len(family) else flags
    return flags


def legend(groups: Iterable[Group]) -> list[str]:
    """What labels leave out, or all that they stand for where they leave out something in their midst."""
    return [
        f"{group.label}: {group.full_label.removeprefix(f'{group.label}, ').removeprefix(f'{group.name}, ')}"
        for group in groups
        if group.label != group.full_label
    ]


def _show(column: Sequence[Any]) -> list[str]:
    """Values of one flag for people: of paths, only the part that is not the same in all of them."""
    given = [value for value in column if value is not None]
    paths = [value.split("/") for value in given if isinstance(value, str)]
    start = end = 0
    if len(paths) == len(given) and min(map(len, paths)) > 1:
        start = _shared(paths)
        end = _shared([path[start:][::-1] for path in paths])
    return [_show_one(value, start, end) for value in column]


def _shared(paths: Sequence[Sequence[str]]) -> int:
    """How many parts all of them have in common at the start."""
    return sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)))


def _show_one(value: Any, start: int, end: int) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, str) and start + end:
        path = value.split("/")
        value = "/".join(["…"] * (start > 0) + path[start : len(path) - end] + ["…"] * (end > 0))
    return one_line(str(value))


def one_line(text: str) -> str:
    """A text without line breaks and other characters that would spoil a table."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def shortened(text: str, length: int) -> str:
    """A text of at most so many characters."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"
