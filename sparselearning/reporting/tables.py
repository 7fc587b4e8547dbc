"""Figures of groups of runs as tables: mean ± sample standard deviation, in Markdown, LaTeX and CSV."""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from sparselearning.reporting.columns import Cells, Column, Figure
from sparselearning.reporting.measured import (
    WORTH_SHOWING,
    averages_cells,
    differences_cells,
    differences_in_full,
    distances_cells,
)
from sparselearning.reporting.runs import Group, Run, differing_flags, legend, one_line
from sparselearning.training.records import Environment, Summary

DRAWN_BY = "sparselearning.report"
"""Program name in the metadata of pictures."""


def _summary(entry: Callable[[Summary], float | None], scale: float = 1.0) -> Figure:
    """Entry of ``summary.json``."""

    def value(group: Group, run: Run) -> float | None:
        figure = entry(run.summary) if run.summary else None
        return None if figure is None else scale * figure

    return value


def _of_tickets(value: Figure) -> Figure:
    """What says something of runs with tickets only."""
    return lambda group, run: None if run.is_plain else value(group, run)


def _last_ticket(group: Group, run: Run) -> float:
    return 100 * run.tickets[-1].ticket_acc


def final_accuracy(run: Run) -> float:
    """Accuracy in percent of the network that a run ends with: on the test set, if that was kept for the end."""
    assert run.summary is not None
    test_acc = run.summary.test_acc
    return 100 * (run.summary.final_acc if test_acc is None else test_acc)


def _pairs_with_control(group: Group) -> bool:
    return group.control is not None and set(group.seeds) <= set(group.control.seeds)


def _plain_accuracy(group: Group, run: Run) -> float | None:
    """Of the plain run of the same seed; where the seeds differ, of the mean plain run."""
    if group.control is None:
        return None
    plain = {other.seed: final_accuracy(other) for other in group.control.runs}
    return plain[run.seed] if _pairs_with_control(group) else fmean(plain.values())


def _gain_over_plain(group: Group, run: Run) -> float | None:
    plain = _plain_accuracy(group, run)
    return None if plain is None else final_accuracy(run) - plain


GAIN_OVER_PLAIN = Column(
    "gain_over_plain_points",
    "over plain training [points]",
    _gain_over_plain,
    signed=True,
    has_std=_pairs_with_control,
)
COLUMNS = (
    Column("density", "density", _summary(lambda of: of.density), digits=4, has_std=lambda group: False),
    Column("pretrain_acc_percent", "pre-trained [%]", _of_tickets(_summary(lambda of: of.pretrain_acc, 100))),
    Column("last_ticket_acc_percent", "last ticket [%]", _of_tickets(_last_ticket)),
    Column("final_acc_percent", "final [%]", _summary(lambda of: of.final_acc, 100)),
    Column("test_acc_percent", "final on test set [%]", _summary(lambda of: of.test_acc, 100)),
    Column("ema_acc_percent", "moving average [%]", _summary(lambda of: of.ema_acc, 100)),
    Column("ema_test_acc_percent", "moving average on test set [%]", _summary(lambda of: of.ema_test_acc, 100)),
    Column("gain_points", "gain over pre-training [points]", _of_tickets(_summary(lambda of: of.gain)), signed=True),
    Column(
        "gain_over_ticket_points", "over last ticket [points]", _summary(lambda of: of.gain_over_ticket), signed=True
    ),
    GAIN_OVER_PLAIN,
    Column("explored", "ever active, R_s", _summary(lambda of: of.explored), digits=3),
    Column("parameters_of_dense", "parameters [of dense]", _summary(lambda of: of.parameters_of_dense), digits=3),
    Column(
        "inference_flops_of_dense", "inference FLOPs [of dense]", _summary(lambda of: of.inference_flops_of_dense),
        digits=3,
    ),
    Column(
        "training_flops_of_dense", "training FLOPs [of dense]", _summary(lambda of: of.training_flops_of_dense),
        digits=3,
    ),
    Column("total_minutes", "time [min]", _summary(lambda of: of.total_seconds, 1 / 60), digits=1),
)  # fmt: skip

HEADLINE = (
    Column("plain_acc_percent", "plain training [%]", _plain_accuracy, has_std=_pairs_with_control),
    Column("superposed_acc_percent", "superposed [%]", lambda group, run: final_accuracy(run)),
    replace(GAIN_OVER_PLAIN, title=f"{GAIN_OVER_PLAIN.title}, ± standard error", shows_error=True),
)
"""What the claim of superposing is about: its networks beside plain training of the same length."""


# ------------------------------------------------------------------------------------------------------- tables


def _columns(groups: Sequence[Group], among: Sequence[Column] = COLUMNS) -> list[Column]:
    """Columns that some group fills."""
    return [column for column in among if any(column.spread(group) for group in groups)]


def _cells(groups: Sequence[Group], plus_minus: str, nothing: str, among: Sequence[Column] = COLUMNS) -> Cells:
    """One row per group."""
    columns = _columns(groups, among)
    rows = [
        [group.label, str(len(group.runs)), *(c.text(c.spread(group), plus_minus, nothing) for c in columns)]
        for group in groups
    ]
    return [["method", "n", *(column.title for column in columns)], *rows]


def headline_table(groups: Sequence[Group]) -> str:
    """Groups with tickets, each beside its control, in the columns of :data:`HEADLINE`."""
    return markdown(_cells([group for group in groups if group.ticket_flags], " ± ", "-", HEADLINE))


def markdown(cells: Cells) -> str:
    """A table that can be read as it is or rendered; an empty text if there are no cells."""
    if not cells:
        return ""
    rows = [[one_line(cell).replace("|", r"\|") for cell in row] for row in cells]
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        aligned = [cells[0].ljust(widths[0])]
        aligned += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join(aligned)} |\n"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "".join(map(line, [rows[0], rule, *rows[1:]]))


LATEX_ESCAPES = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)


def latex_table(groups: Sequence[Group]) -> str:
    """The same table for a paper; needs the package booktabs."""
    header, *rows = _cells(groups, r" \pm ", "")
    lines = [r"% \usepackage{booktabs}", rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}", r"\toprule"]
    lines += [" & ".join(title.translate(LATEX_ESCAPES) for title in header) + r" \\", r"\midrule"]
    for label, *figures in rows:
        cells = [label.translate(LATEX_ESCAPES), *(f"${figure}$" if figure else "--" for figure in figures)]
        lines.append(" & ".join(cells) + r" \\")
    comments = [f"% {sentence}" for sentence in legend(groups)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", *comments]) + "\n"


def csv_table(groups: Sequence[Group]) -> str:
    """The same table for programs: mean and deviation apart, six significant digits, nothing where nothing is known."""
    columns = _columns(groups)
    names = [f"{column.name}_{part}" for column in columns for part in ("mean", "std")]
    rows = []
    for group in groups:
        spreads = [column.spread(group) for column in columns]
        figures = [figure for s in spreads for figure in ((s.mean, s.std) if s else (None, None))]
        rows.append([group.full_label, len(group.runs), *map(_number, figures)])
    return _csv(["method", "n", *names], rows)


def csv_of_runs(groups: Sequence[Group]) -> str:
    """One row per run: its figures, where it ran, and where its files are."""
    (method, seed, *_, device, torch, folder), *rows = cells_of_runs(groups)
    return _csv([method, seed, *(column.name for column in _columns(groups)), device, torch, folder], rows)


def cells_of_runs(groups: Sequence[Group]) -> Cells:
    """The same for people: figures of six significant digits, under the titles that they have in other tables."""
    columns = _columns(groups)
    rows = [
        [
            group.full_label, str(run.seed), *(_number(column.value(group, run)) for column in columns),
            run.config.device or "", run.config.versions.get("torch", ""), str(run.folder.path),
        ]
        for group in groups
        for run in group.runs
    ]  # fmt: skip
    return [["method", "seed", *(column.title for column in columns), "device", "torch", "folder"], *rows]


def ticket_cells(run: Run) -> Cells:
    """One row per ticket of a run."""
    densities = ("union_density", "density")
    rows = [
        [str(row.ticket), *(f"{100 * accuracy:.2f}" for accuracy in (row.ticket_acc, row.superposed_acc))]
        + ["-" if (density := getattr(row, name)) is None else f"{density:.4f}" for name in densities]
        for row in run.tickets
    ]
    return [["number", "ticket [%]", "superposition [%]", "its density before pruning back", "density"], *rows]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _csv(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


def markdown_report(groups: Sequence[Group], left_out: Sequence[str] = ()) -> str:
    """The tables, and what one must know to read them."""
    tables = map(markdown, report_cells(groups).values())
    return "\n".join(tables) + "\n" + "".join(f"- {one_line(note)}\n" for note in report_notes(groups, left_out))


def report_cells(groups: Sequence[Group]) -> dict[str, Cells]:
    """All tables of a report, by their headings."""
    tables = {
        "Results": _cells(groups, " ± ", "-"),
        **averages_cells(groups),
        "The last superposition over others, seed by seed": differences_cells(groups),
        **differences_in_full(groups),
        "How far kept tickets are apart": distances_cells(groups),
    }
    return {heading: cells for heading, cells in tables.items() if cells}


def report_notes(groups: Sequence[Group], left_out: Sequence[str] = ()) -> list[str]:
    """What one must know to read them, ``left_out`` of the runs that are in no group included."""
    runs = [run for group in groups for run in group.runs]
    notes = [*legend(groups), "mean ± sample standard deviation over n seeds; one run has no deviation"]
    if any(group.control for group in groups):
        notes.append(
            "plain training has the same flags and epochs, and no tickets; groups whose seeds it has are compared "
            "seed by seed, others by their means, without a deviation"
        )
    if any(run.analysis for run in runs):
        notes.append("the best of several, picked on the images that it is measured on, overstates its accuracy")
    if differences_cells(groups):
        notes.append(
            "differences between networks are taken seed by seed, ± their standard error; in brackets p of a two-sided "
            f"t-test, and how many seeds n of this deviation show {WORTH_SHOWING} points with a power of 80 %; the "
            "first setting is that of the first of several groups that differ in flags about tickets alone"
        )
    if any(run.summary and run.summary.test_acc is not None for run in runs):
        notes.append("gains over plain training are those on the test set, the other gains those on the held-out set")
    notes += [note for note in (_missing_control(group, groups) for group in groups) if note]
    notes += [f"left out: {sentence}" for sentence in left_out]
    notes.append(f"ran on (commits): {machines(known for run in runs for known in run.environments)}")
    return notes


def _missing_control(group: Group, groups: Sequence[Group]) -> str | None:
    """Why a group with tickets is compared with no plain training although there is some of its method."""
    plain = [other for other in groups if not other.ticket_flags and other.method == group.method]
    if group.control or not group.ticket_flags or not plain:
        return None
    differences = [differing_flags([other, group]) for other in plain]
    nearest = min(range(len(plain)), key=lambda i: len(differences[i]))
    listed = ", ".join(f"{name} ({there} there, {here} here)" for name, (there, here) in differences[nearest].items())
    return f"{group.label} has no plain training to compare with: {plain[nearest].label} differs in {listed}"


def machines(environments: Iterable[Environment]) -> str:
    """Every hardware and version once, and the commits that ran on it."""
    commits: dict[str, set[str]] = {}
    for known in environments:
        device = known.device or "an unknown device"
        parts = [device] + ([f"threads: {known.threads}"] if device.startswith("cpu") and known.threads else [])
        parts.append(f"PyTorch {known.versions.get('torch', 'of unknown version')}")
        own = commits.setdefault(", ".join(parts), set())
        if known.commit:
            own.add(known.commit)
    named = {machine: f" ({', '.join(sorted(own))})" if own else "" for machine, own in commits.items()}
    return "; ".join(f"{machine}{named[machine]}" for machine in sorted(named))
