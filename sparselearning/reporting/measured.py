"""Tables of what ``sparselearning.analyze`` measured of groups of runs: networks, differences, and how far apart.

Differences are taken seed by seed. Their tables show mean ± standard error, the p-value of a two-sided t-test, and of
accuracies how many seeds of this deviation show :data:`WORTH_SHOWING` with a power of 80 %.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from statistics import fmean
from typing import NamedTuple

from sparselearning.reporting.analysis import (
    ENSEMBLE,
    MOVING_AVERAGE,
    EvaluatedOn,
    Matrix,
    Pairs,
    Quality,
    superposition_name,
    ticket_name,
)
from sparselearning.reporting.columns import Cells, Column, Figure
from sparselearning.reporting.corruptions import CORRUPTIONS
from sparselearning.reporting.runs import Group, Run

WORTH_SHOWING = 0.3
"""Points of accuracy."""
PLAIN, PRETRAINED, LAST_TICKET, SUPERPOSED = "plain training", "pre-trained", "last ticket", "last superposition"
AVERAGE, FIRST = "moving average of weights", "that of the first setting"
"""Titles of networks; the first setting is that of the first of the groups that differ in flags about tickets alone."""
UNKNOWN = "-"


# ----------------------------------------------------------------------------------------------------- networks


def averages_cells(groups: Sequence[Group]) -> dict[str, Cells]:
    """How good kept tickets, their ensemble and other averages are, where ``sparselearning.analyze`` measured them.

    A table per measure, by heading: accuracy; negative log-likelihood and calibration; accuracy on corrupted pictures.
    """
    analysed = [group for group in groups if _is_analysed(group)]
    titles = dict.fromkeys(title for group in analysed for run in group.runs for title in _networks(run))
    parts = {run.analysis.evaluated_on.part for group in analysed for run in group.runs if run.analysis}
    tables = {}
    for measure in MEASURES:
        rows = [Column(title, title, partial(_average, title, measure.value), measure.digits) for title in titles]
        cells = _column_per_group(measure.title.format(" or ".join(sorted(parts))), analysed, rows)
        if cells:
            tables[measure.heading] = cells
    return tables


def _column_per_group(title: str, groups: Sequence[Group], rows: Sequence[Column]) -> Cells:
    """A transposed table: a row for each figure that some group has; empty if there is none."""
    known = [row for row in rows if any(row.spread(group) for group in groups)]
    cells = [[row.title, *(row.text(row.spread(group), " ± ", "-") for group in groups)] for row in known]
    return [[title, *(group.label for group in groups)], *cells] if cells else []


class Measure(NamedTuple):
    """How good a network is.

    Attributes:
        heading: above its table.
        title: of its table, with a place for the images that it was measured on.
        difference: of two networks, unit included.
        value: None where it was not measured.
        digits: after the point.
    """

    heading: str
    title: str
    difference: str
    value: Callable[[Quality], float | None]
    digits: int = 2


def _corrupted(name: str) -> Measure:
    def value(quality: Quality) -> float | None:
        accuracy = (quality.corrupted or {}).get(name)
        return None if accuracy is None else 100 * accuracy

    return Measure(
        f"Their accuracy on corrupted pictures: {name}", f"accuracy on the {{}}, {name} [%]", f"{name} [points]", value
    )


ACCURACY = Measure(
    "Other averages of kept tickets", "accuracy on the {} [%]", "accuracy [points]", lambda of: 100 * of.accuracy
)
MEASURES = (
    ACCURACY,
    Measure(
        "Their likelihood", "negative log-likelihood on the {} [nats]", "negative log-likelihood [nats]",
        lambda of: None if of.ece is None else of.loss, digits=4,
    ),
    Measure(
        "Their calibration", "expected calibration error on the {} [%]", "calibration error [points]",
        lambda of: None if of.ece is None else 100 * of.ece,
    ),
    *map(_corrupted, CORRUPTIONS),
)  # fmt: skip
"""One table each; likelihood beside calibration, where that was measured."""


def _average(title: str, measure: Callable[[Quality], float | None], group: Group, run: Run) -> float | None:
    return _mean(measure, _networks(run).get(title, ()))


def _mean(measure: Callable[[Quality], float | None], networks: Sequence[Quality]) -> float | None:
    """Mean of a measure over networks; None where it was not measured."""
    known = [value for value in map(measure, networks) if value is not None]
    return fmean(known) if known else None


def _has_analysed_tickets(group: Group) -> bool:
    return bool(group.ticket_flags) and _is_analysed(group)


def _evaluated_on(group: Group) -> EvaluatedOn:
    """The images that an analysed group was measured on."""
    assert group.runs[0].analysis is not None
    return group.runs[0].analysis.evaluated_on


def _is_analysed(group: Group) -> bool:
    """Whether all runs were analysed, and alike."""
    looks = [
        (run.analysis.settings, run.analysis.evaluated_on.part, [line.share for line in run.analysis.lines[:1]])
        if run.analysis
        else None
        for run in group.runs
    ]
    return looks[0] is not None and all(other == looks[0] for other in looks)


def _networks(run: Run) -> dict[str, Sequence[Quality]]:
    """Titles of what was measured of a run, each with the networks that its figures are the mean of.

    They are its tickets, their ensemble, every way to superpose them, and the moving average of its weights.
    """
    assert run.analysis is not None
    networks: dict[str, Quality] = {row.name: row for row in run.analysis.networks}
    average = {AVERAGE: [networks[MOVING_AVERAGE]]} if MOVING_AVERAGE in networks else {}
    names = [ticket_name(number) for number in run.analysis.settings.tickets]
    first, *others = (networks[name] for name in names)
    if not others:
        return {PLAIN: [first], **average}
    found: dict[str, Sequence[Quality]] = {PRETRAINED if names[0] == ticket_name(0) else names[0]: [first]}
    found |= {
        "tickets, their mean": others,
        LAST_TICKET: others[-1:],
        f"best ticket, {_chosen_on(others)}": [_best(others)],
    }
    if (last := superposition_name(len(others))) in networks:
        found[SUPERPOSED] = [networks[last]]
    found |= {"ensemble of all (mean of logits)": [networks[ENSEMBLE]], **average}
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


# -------------------------------------------------------------------------------------------------- differences


class Place(NamedTuple):
    """Where networks that are compared are: in a run, or in the run of its seed in another group.

    Attributes:
        title: of the networks.
        group: None: the run's own.
    """

    title: str
    group: Group | None = None

    def networks(self, run: Run) -> Sequence[Quality]:
        """Those of a run; empty where there are none."""
        runs = [run] if self.group is None else [other for other in self.group.runs if other.seed == run.seed]
        return _networks(runs[0]).get(self.title, ()) if runs else ()


def differences_cells(groups: Sequence[Group]) -> Cells:
    """By how much the last superposition is more accurate than other networks, a row per group with tickets."""
    compared = {group.label: (group, _others(group, groups)) for group in groups if _has_analysed_tickets(group)}
    titles = [
        title for title in (PLAIN, PRETRAINED, LAST_TICKET, FIRST) if any(title in of for _, of in compared.values())
    ]
    rows = [
        [
            label,
            str(len(group.runs)),
            *(_difference(ACCURACY, group, Place(SUPERPOSED), of.get(title)) for title in titles),
        ]
        for label, (group, of) in compared.items()
    ]
    parts = sorted({_evaluated_on(group).part for group, _ in compared.values()})
    header = [
        f"{SUPERPOSED}, accuracy on the {' or '.join(parts)}",
        "n",
        *(f"over {title} [points]" for title in titles),
    ]
    return [header, *rows] if rows else []


def differences_in_full(groups: Sequence[Group]) -> dict[str, Cells]:
    """All differences in all measures, a table per group with tickets whose plain training was analysed, too."""
    tables = {}
    for group in filter(_has_analysed_tickets, groups):
        if (plain := _plain(group)) is None:
            continue
        compared = {
            f"{SUPERPOSED} over {title}": (Place(SUPERPOSED), of) for title, of in _others(group, groups).items()
        }
        for title in _networks(group.runs[0]):
            compared.setdefault(f"{title} over {PLAIN}", (Place(title), Place(PLAIN, plain)))
        if AVERAGE in _networks(plain.runs[0]):
            compared[f"{PLAIN}'s {AVERAGE} over {PLAIN}"] = (Place(AVERAGE, plain), Place(PLAIN, plain))
        columns = [
            [measure.difference, *(_difference(measure, group, ours, theirs) for ours, theirs in compared.values())]
            for measure in MEASURES
        ]
        known = [column for column in columns if set(column[1:]) != {UNKNOWN}]
        first = [f"{group.label}, n = {len(group.runs)}, on the {_evaluated_on(group).part}", *compared]
        tables[f"Differences, seed by seed: {group.label}"] = [list(row) for row in zip(first, *known, strict=True)]
    return tables


def _others(group: Group, groups: Sequence[Group]) -> dict[str, Place]:
    """What a group's last superposition is compared with, by title."""
    plain, first = _plain(group), next(filter(partial(_differs_in_ticket_flags_alone, group), groups))
    return {
        **({PLAIN: Place(PLAIN, plain)} if plain else {}),
        **{title: Place(title) for title in (PRETRAINED, LAST_TICKET)},
        **({FIRST: Place(SUPERPOSED, first)} if first is not group else {}),
    }


def _plain(group: Group) -> Group | None:
    """The control, if it was analysed on the same images."""
    control = group.control
    return control if control and _is_analysed(control) and _evaluated_on(control) == _evaluated_on(group) else None


def _differs_in_ticket_flags_alone(group: Group, other: Group) -> bool:
    """Whether another group, or this one, was trained alike before its tickets, and analysed on the same images."""
    alike = other.training_flags == group.training_flags and _has_analysed_tickets(other)
    return alike and _evaluated_on(other) == _evaluated_on(group)


def _difference(measure: Measure, group: Group, ours: Place, theirs: Place | None) -> str:
    """Mean difference ± standard error, if every run has it, its p-value, and of an accuracy the seeds to show."""

    def value(_: Group, run: Run) -> float | None:
        one, other = (_mean(measure.value, place.networks(run) if place else ()) for place in (ours, theirs))
        return None if one is None or other is None else one - other

    column = Column(measure.difference, measure.difference, value, measure.digits, signed=True, shows_error=True)
    spread = column.spread(group)
    text = column.text(spread, " ± ", UNKNOWN)
    if spread is None or spread.p is None:
        return text
    seeds = f", n {spread.runs_to_show(WORTH_SHOWING)}" if measure is ACCURACY else ""
    return f"{text} (p {f'{spread.p:.2g}' if spread.p >= 0.001 else '< 0.001'}{seeds})"


# --------------------------------------------------------------------------------------- how far tickets are apart


def distances_cells(groups: Sequence[Group]) -> Cells:
    """How far apart kept tickets are, the network that they start from included, where that was measured."""
    analysed = [group for group in groups if _is_analysed(group)]
    return _column_per_group("between tickets, the first network included", analysed, DISTANCES)


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
    """By how many points the middle of a line is above the better of its ends; None if that was not measured."""
    assert run.analysis is not None
    gains = []
    for line in run.analysis.steps():
        if 0.5 not in line.share:
            return None
        gains.append(line.accuracy[line.share.index(0.5)] - max(line.accuracy[0], line.accuracy[-1]))
    return 100 * fmean(gains) if gains else None


def _barrier(group: Group, run: Run) -> float | None:
    """By how many points accuracy on a line falls, at most, below that between the values at its ends."""
    assert run.analysis is not None
    barriers = [line.accuracy_barrier for line in run.analysis.steps()]
    return 100 * max(barriers) if barriers else None


DISTANCES = (
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
