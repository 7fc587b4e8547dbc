"""Figures of groups of runs as tables: mean ± sample standard deviation, in Markdown, LaTeX and CSV."""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite
from statistics import fmean, stdev
from typing import Any, NamedTuple

from sparselearning.reporting.analysis import ENSEMBLE, Matrix, Pairs, Quality, ticket_name
from sparselearning.reporting.corruptions import CORRUPTIONS
from sparselearning.reporting.runs import Group, Run, differing_flags, legend, one_line
from sparselearning.training.records import Environment, Summary

DRAWN_BY = "sparselearning.report"
"""What pictures of reports name as the program that drew them."""

Figure = Callable[[Group, Run], float | None]
"""From one run of a group to a number; None if it has none."""

Cells = list[list[str]]
"""A table: header and rows."""


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1) of one figure over a group's runs; no deviation, no ``std``."""

    mean: float
    std: float | None


@dataclass(frozen=True)
class Column:
    """One figure of every run.

    Attributes:
        name: in CSV files, unit included.
        title: in tables for people.
        value: the figure of one run of a group; None if it has none.
        digits: after the point.
        signed: show the sign of positive figures too.
        has_std: whether a standard deviation says something about the group's runs.
    """

    name: str
    title: str
    value: Figure
    digits: int = 2
    signed: bool = False
    has_std: Callable[[Group], bool] = lambda group: True

    def spread(self, group: Group) -> Spread | None:
        """Mean ± deviation over the group; None unless every run has the figure."""
        values = [self.value(group, run) for run in group.runs]
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return None
        mean = fmean(known)
        has_std = len(known) > 1 and isfinite(mean) and self.has_std(group)  # else a network overflowed
        return Spread(mean, stdev(known) if has_std else None)

    def text(self, spread: Spread | None, plus_minus: str, nothing: str) -> str:
        """Show a spread with the column's digits."""
        if spread is None:
            return nothing
        mean = round(spread.mean, self.digits) + 0.0  # + 0.0 turns -0.0 into 0.0
        std = "" if spread.std is None else f"{plus_minus}{spread.std:.{self.digits}f}"
        return f"{mean:{'+' if self.signed else ''}.{self.digits}f}{std}"


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
    return group.control is not None and sorted(group.seeds) == sorted(group.control.seeds)


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
    GAIN_OVER_PLAIN,
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


def _averages_cells(groups: Sequence[Group]) -> dict[str, Cells]:
    """How good kept tickets, their ensemble and other averages are, where ``sparselearning.analyze`` measured them.

    A table per measure, by heading: accuracy; negative log-likelihood and calibration; accuracy on corrupted pictures.
    """
    looked_at = [group for group in groups if _is_analysed(group)]
    titles = dict.fromkeys(title for group in looked_at for run in group.runs for title in _averages(run))
    parts = {run.analysis.evaluated_on.part for group in looked_at for run in group.runs if run.analysis}
    tables = {}
    for measure in MEASURES:
        rows = [Column(title, title, partial(_average, title, measure.value), measure.digits) for title in titles]
        cells = _column_per_group(measure.title.format(" or ".join(sorted(parts))), looked_at, rows)
        if cells:
            tables[measure.heading] = cells
    return tables


def _differences_cells(groups: Sequence[Group]) -> Cells:
    """How far apart kept tickets are, the network that they start from included, where that was measured."""
    looked_at = [group for group in groups if _is_analysed(group)]
    return _column_per_group("between tickets, the first network included", looked_at, DIFFERENCES)


def _column_per_group(title: str, groups: Sequence[Group], rows: Sequence[Column]) -> Cells:
    """A table on its side: each figure that some group has in a row; nothing where there is no such figure."""
    known = [row for row in rows if any(row.spread(group) for group in groups)]
    cells = [[row.title, *(row.text(row.spread(group), " ± ", "-") for group in groups)] for row in known]
    return [[title, *(group.label for group in groups)], *cells] if cells else []


class Measure(NamedTuple):
    """How good a network is.

    Attributes:
        heading: above its table.
        title: of its table, with a place for the images that it was measured on.
        value: None where it was not measured.
        digits: after the point.
    """

    heading: str
    title: str
    value: Callable[[Quality], float | None]
    digits: int = 2


def _corrupted(name: str) -> Measure:
    def value(quality: Quality) -> float | None:
        accuracy = (quality.corrupted or {}).get(name)
        return None if accuracy is None else 100 * accuracy

    return Measure(f"Their accuracy on corrupted pictures: {name}", f"accuracy on the {{}}, {name} [%]", value)


MEASURES = (
    Measure("Other averages of kept tickets", "accuracy on the {} [%]", lambda of: 100 * of.accuracy),
    Measure(
        "Their likelihood", "negative log-likelihood on the {} [nats]",
        lambda of: None if of.ece is None else of.loss, digits=4,
    ),
    Measure(
        "Their calibration", "expected calibration error on the {} [%]",
        lambda of: None if of.ece is None else 100 * of.ece,
    ),
    *map(_corrupted, CORRUPTIONS),
)  # fmt: skip
"""One table each; likelihood beside calibration, where that was measured."""


def _average(title: str, measure: Callable[[Quality], float | None], group: Group, run: Run) -> float | None:
    """Mean of a measure over the networks that a title stands for."""
    known = [value for value in map(measure, _averages(run).get(title, ())) if value is not None]
    return fmean(known) if known else None


def _is_analysed(group: Group) -> bool:
    """Whether all runs were analysed, and alike."""
    looks = [
        (run.analysis.settings, run.analysis.evaluated_on.part, [line.share for line in run.analysis.lines[:1]])
        if run.analysis
        else None
        for run in group.runs
    ]
    return looks[0] is not None and all(other == looks[0] for other in looks)


def _averages(run: Run) -> dict[str, Sequence[Quality]]:
    """Tickets, their ensemble, and every way to superpose them, to the networks that its figures are the mean of."""
    assert run.analysis is not None
    networks: dict[str, Quality] = {row.name: row for row in run.analysis.networks}
    names = [ticket_name(number) for number in run.analysis.settings.tickets]
    first, *others = (networks[name] for name in names)
    found: dict[str, Sequence[Quality]] = {"pre-trained" if names[0] == ticket_name(0) else names[0]: [first]}
    if not others:
        return found
    found |= {
        "tickets, their mean": others,
        "last ticket": others[-1:],
        f"best ticket, {_chosen_on(others)}": [_best(others)],
        "ensemble of all (mean of logits)": [networks[ENSEMBLE]],
    }
    averages: list[Quality] = []
    for row in run.analysis.grid or []:
        name = row.superposing_method + ("" if row.CIMA_factor is None else f" {row.CIMA_factor:g}")
        found[f"{name}, BatchNorm re-estimated"] = [row.bn_re_estimated]
        found[f"{name}, BatchNorm averaged"] = [row.bn_averaged]
        averages += [row.bn_re_estimated, row.bn_averaged]
    if averages and averages[0].held_out_accuracy is not None:
        found[f"best of these averages, {_chosen_on(averages)}"] = [_best(averages)]
    return found


def _chosen_on(qualities: Sequence[Quality]) -> str:
    return f"chosen on {'these' if qualities[0].held_out_accuracy is None else 'held-out'} images"


def _best(qualities: Iterable[Quality]) -> Quality:
    """The first of the best, on held-out images where others are measured on."""
    return max(qualities, key=lambda of: of.accuracy if of.held_out_accuracy is None else of.held_out_accuracy)


def _over_pairs(measure: Callable[[Pairs], Matrix], scale: float = 1.0) -> Figure:
    """Mean over all pairs of tickets of a matrix in the analysis."""

    def value(group: Group, run: Run) -> float | None:
        assert run.analysis is not None
        pairs = run.analysis.pairs
        names = {ticket_name(number) for number in run.analysis.settings.tickets}
        tickets = [place for place, name in enumerate(pairs.names) if name in names]
        values = [measure(pairs)[i][j] for i in tickets for j in tickets if i < j]
        return scale * fmean(values) if values else None

    return value


def _middle(group: Group, run: Run) -> float | None:
    """By how many points the middle of a line is above the better of its ends; None if nobody looked there."""
    assert run.analysis is not None
    gains = []
    for line in run.analysis.steps():
        if 0.5 not in line.share:
            return None
        gains.append(line.accuracy[line.share.index(0.5)] - max(line.accuracy[0], line.accuracy[-1]))
    return 100 * fmean(gains) if gains else None


def _barrier(group: Group, run: Run) -> float | None:
    """By how many points a line falls, at worst, below what its ends promise."""
    assert run.analysis is not None
    barriers = [line.accuracy_barrier for line in run.analysis.steps()]
    return 100 * max(barriers) if barriers else None


DIFFERENCES = (
    Column(
        "disagreement_percent",
        "images predicted unlike, mean over pairs [%]",
        _over_pairs(lambda pairs: pairs.disagreement, 100),
    ),
    Column(
        "overlap", "overlap of masks (Jaccard), mean over pairs", _over_pairs(lambda pairs: pairs.overlap), digits=3
    ),
    Column("middle_points", "middle between successive ones, over the better, mean [points]", _middle, signed=True),
    Column("barrier_points", "accuracy barrier between successive ones, largest [points]", _barrier),
)


def markdown(cells: Cells) -> str:
    """A table that can be read as it is or rendered; nothing of no cells."""
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
        **_averages_cells(groups),
        "How far kept tickets are apart": _differences_cells(groups),
    }
    return {heading: cells for heading, cells in tables.items() if cells}


def report_notes(groups: Sequence[Group], left_out: Sequence[str] = ()) -> list[str]:
    """What one must know to read them, ``left_out`` of the runs that are in no group included."""
    runs = [run for group in groups for run in group.runs]
    notes = [*legend(groups), "mean ± sample standard deviation over n seeds; one run has no deviation"]
    if any(group.control for group in groups):
        notes.append(
            "plain training has the same flags and epochs, and no tickets; groups of the same seeds are compared "
            "seed by seed, others by their means, without a deviation"
        )
    if any(run.analysis for run in runs):
        notes.append("the best of several, picked on the images that it is measured on, overstates its accuracy")
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
