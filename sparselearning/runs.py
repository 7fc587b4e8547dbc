"""Finished and unfinished runs as they lie on the disk: found, read, checked, and grouped over their seeds."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sparselearning import flags
from sparselearning.errors import FaultError, UsageError
from sparselearning.files import RunFolder, load_torch
from sparselearning.provenance import ENVIRONMENT
from sparselearning.sparse_init import SPARSE_INITS

Types = Mapping[str, Any]
NUMBER: Any = (int, float)
OPTIONAL_NUMBER = (int, float, type(None))
FROM_TRAINED_WEIGHTS = {name for name, init in SPARSE_INITS.items() if init.needs_trained_weights}
NO_FLAGS = {"command", "network", "resumed", *ENVIRONMENT}
FLAGS = {"seed": int, **dict.fromkeys(("sparse", "fix", "pre_train"), bool)}
FLAGS |= dict.fromkeys(("method", "growth", "indicate_method"), str)
METRICS = dict.fromkeys(("epoch", "lr", "train_loss", "train_acc", "eval_loss", "eval_acc", "density"), NUMBER)
METRICS |= {"ticket": OPTIONAL_NUMBER}
TICKETS = dict.fromkeys(("ticket", "ticket_acc", "superposed_acc"), NUMBER)
SUMMARY = dict.fromkeys(("pretrain_acc", "final_acc", "density", "gain", "total_seconds"), NUMBER)
SUMMARY |= {"ticket_acc": list, "superposed_acc": list, "gain_over_ticket": OPTIONAL_NUMBER}
ANALYSIS = {"networks": list, "settings": dict, "evaluated_on": dict, "pairs": dict, "lines": list}
"""What the report needs of each file: name to type."""

SET_ASIDE = re.compile(r"\.old-\d+$")
SEED_FOLDER = re.compile(r"(?<![^/\\])seed\d+(?![^/\\])")


@dataclass(frozen=True)
class Run:
    """What one run left behind (README, "What a run leaves behind").

    Attributes:
        folder: its files.
        flags: every flag's value, under the names of ``config.json``.
        environments: code, versions and hardware (``provenance.environment``), first and after each change.
        metrics: one row per finished epoch, at least one.
        tickets: one row per ticket.
        summary: None as long as the run is unfinished.
        analysis: what ``analyze_tickets.py`` found out about its tickets; None if nobody has looked.
    """

    folder: RunFolder
    flags: Mapping[str, Any]
    environments: Sequence[Mapping[str, Any]]
    metrics: Sequence[Mapping[str, Any]]
    tickets: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any] | None
    analysis: Mapping[str, Any] | None = None

    @property
    def seed(self) -> int:
        """Seed of weights, masks, data order and augmentation."""
        return self.flags["seed"]

    @property
    def is_plain(self) -> bool:
        """Whether this is plain training: no cheap tickets."""
        return not self.tickets

    @property
    def method(self) -> str:
        """Name of the training method that the flags make."""
        flags = self.flags
        if not flags["sparse"]:
            return "dense"
        if flags["fix"]:
            return "static"
        if flags["method"] == "DST":
            return {"gradient": "RigL", "random": "SET"}.get(flags["growth"], f"DST/{flags['growth']}")
        grows_otherwise = flags["method"].startswith("GraNet") and flags["growth"] != "gradient"
        return f"{flags['method']}/{flags['growth']}" if grows_otherwise else flags["method"]

    @property
    def name(self) -> str:
        """What the user called the run with ``--indicate_method``, else its method."""
        given = self.flags["indicate_method"]
        return self.method if given == "Results" else given


@dataclass
class Group:
    """Finished runs that differ in nothing but their seed.

    Attributes:
        recipe: the flags of all its runs that took effect, seed and name apart; flags about tickets are in
            ``ticket_flags``.
        ticket_flags: empty for plain training.
        label: short name that no other group has.
        control: plain training that is otherwise equal, if there is one.
    """

    name: str
    recipe: Mapping[str, Any]
    ticket_flags: Mapping[str, Any]
    runs: list[Run] = field(default_factory=list)
    label: str = ""
    control: "Group | None" = None

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
    """
    found: dict[Path, Path] = {}  # resolved → as the user would write it
    for path in paths:
        if not path.is_dir():
            raise UsageError(f"{path} is not a folder: name a run's folder, or one that runs lie under")
        folders = [path] if _is_run(path) else sorted(config.parent for config in path.rglob("config.json"))
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
    """Read a run's text files.

    Raises:
        FaultError: if one is damaged or cannot be read.
    """
    folder = RunFolder(path)
    config = _read_json(folder.config, FLAGS)
    flag_values = {name: value for name, value in config.items() if name not in NO_FLAGS}
    first = {name: config[name] for name in ENVIRONMENT if name in config}
    environments = [first, *config.get("resumed", [])]
    metrics = _read_jsonl(folder.metrics, METRICS)
    if not metrics:
        raise FaultError(f"{folder.metrics} holds no finished epoch")
    summary = _read_json(folder.summary, SUMMARY) if folder.summary.exists() else None
    tickets = []
    if folder.tickets.exists():
        tickets = _read_jsonl(folder.tickets, TICKETS)
    elif summary:  # which repeats the accuracies, for whoever keeps only the small files
        columns = zip(summary["ticket_acc"], summary["superposed_acc"], strict=False)
        tickets = [dict(zip(TICKETS, (n, *pair), strict=True)) for n, pair in enumerate(columns, start=1)]
    cycles = {row["ticket"] for row in metrics}
    for row in tickets:
        _check(row, TICKETS, str(folder.summary))
        if row["ticket"] not in cycles:
            raise FaultError(f"{folder.metrics} is damaged: it has no epoch of ticket {row['ticket']}")
    analysis = _read_json(folder.analysis, ANALYSIS) if folder.analysis.exists() else None
    return Run(folder, flag_values, environments, metrics, tickets, summary, analysis)


def masked_weights(path: Path) -> dict[str, Tensor]:
    """Weights of the masked layers of a saved network, by name in model order; empty for a dense one.

    Raises:
        UsageError: if there is no such file.
        FaultError: if it is damaged.
    """
    content = load_torch(path)
    try:
        return {name: content["state_dict"][name] for name in content["masks"]}
    except (KeyError, TypeError) as error:
        raise FaultError(f"{path} is no network of a run: it lacks {error}") from error


def _is_run(path: Path) -> bool:
    folder = RunFolder(path)
    return folder.config.is_file() and folder.metrics.is_file()


def _read_json(path: Path, types: Types) -> dict[str, Any]:
    return _parse(_read_text(path), types, str(path))


def _read_jsonl(path: Path, types: Types) -> list[dict[str, Any]]:
    lines = _read_text(path).splitlines()
    return [_parse(line, types, f"{path}, line {number},") for number, line in enumerate(lines, start=1)]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise FaultError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise FaultError(f"{path} is damaged: it is no text") from error


def _parse(text: str, types: Types, where: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise FaultError(f"{where} is damaged: {error}") from error
    _check(content, types, where)
    return content


def _check(content: Any, types: Types, where: str) -> None:
    if not isinstance(content, dict):
        raise FaultError(f"{where} is damaged: it holds no named values")
    for name, kind in types.items():
        if name not in content or not isinstance(content[name], kind):
            found = repr(content[name]) if name in content else "missing"
            raise FaultError(f"{where} is damaged or no run's: {name} is {found}")


# ------------------------------------------------------------------------------------------------------ grouping


def group_runs(runs: Iterable[Run]) -> tuple[list[Group], list[str]]:
    """Put together what differs only in its seed; find each group's control.

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
        recipe, ticket_flags = _effective_flags(run)
        key = json.dumps([run.name, recipe, ticket_flags], sort_keys=True)
        group = groups.setdefault(key, Group(run.name, recipe, ticket_flags))
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


def differing_flags(groups: Iterable[Group]) -> dict[str, list[Any]]:
    """Flags that took effect in several of the groups, and not with one value, to their value in each group."""
    settings = [{**group.recipe, **group.ticket_flags} for group in groups]
    names = dict.fromkeys(name for flags in settings for name in flags)
    values = {name: [flags.get(name) for flags in settings] for name in names}
    return {name: column for name, column in values.items() if len({repr(v) for v in column if v is not None}) > 1}


def _is_control(plain: Group, group: Group) -> bool:
    return not plain.ticket_flags and plain.recipe == group.recipe


def _effective_flags(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """Flags that made the run what it is, apart from seed and name: those of any training, those of tickets.

    Epochs count as trained, however a script's flags divide them up.
    """
    skipped = flags.WITHOUT_EFFECT_ON_RESULTS | {"seed", "indicate_method", "epochs"}
    skipped |= set() if run.flags["sparse"] else flags.SPARSE_FLAGS - {"sparse"}
    effective = {name: value for name, value in run.flags.items() if name not in skipped}
    tickets = {name: value for name, value in effective.items() if name in flags.TICKET_FLAGS}
    recipe = {name: value for name, value in effective.items() if name not in tickets}
    recipe["epochs"] = run.metrics[-1]["epoch"] + 1
    ticket_flags = {} if run.is_plain else tickets
    if start := _start(run):
        (recipe if run.flags["pre_train"] else ticket_flags)["resume"] = start
    return recipe, ticket_flags


def _start(run: Run) -> str | None:
    """Path of the weights that the run started from, but for seeds in it; None: it started from scratch."""
    given = run.flags
    takes_masks = given["sparse"] and given.get("sparse_init") in FROM_TRAINED_WEIGHTS
    if (given["pre_train"] and not takes_masks) or not given.get("resume"):
        return None
    return SEED_FOLDER.sub("seedN", str(given["resume"]))


def _label(groups: Sequence[Group]) -> None:
    """Name each group, and add what tells it from others of that name."""
    for group in groups:
        namesakes = [other for other in groups if other.name == group.name]
        parts = [group.name]
        if not group.ticket_flags and any(other.ticket_flags for other in namesakes):
            parts.append("plain")
        own = {**group.recipe, **group.ticket_flags}
        parts += [f"{name} {_show(own[name])}" for name in differing_flags(namesakes) if name in own]
        group.label = ", ".join(parts)


def _show(value: Any) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
