"""Pictures of runs. Needs matplotlib, the optional extra ``plots``; the same files give the same pictures."""

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from sparselearning.process.files import write_bytes
from sparselearning.reporting.runs import Group, Run, legend, masked_weights
from sparselearning.reporting.tables import COLUMNS, DRAWN_BY, GAIN_OVER_PLAIN
from sparselearning.sparse.costs import layer_densities, overall_density
from sparselearning.sparse.distributions import erk_densities
from sparselearning.sparse.schedules import cyclic_lr
from sparselearning.training.records import EpochRow

# Okabe and Ito's colours, which people with any colour vision can tell apart; shapes and dashes differ as well.
BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#555555"
TICKET: dict[str, Any] = {
    "color": VERMILION,
    "marker": "^",
    "markersize": 8,
    "markerfacecolor": "none",
    "linestyle": "none",
}
SUPERPOSITION: dict[str, Any] = {"color": GREEN, "marker": "D", "markersize": 4.5, "linestyle": "none"}
PARTS = (("training", BLUE, "-", 2.4), ("evaluation", ORANGE, "--", 1.4))  # the wider one shows beneath an equal one
COMPARED = {
    "pretrain_acc_percent": (GREY, "s"),
    "last_ticket_acc_percent": (VERMILION, "^"),
    "final_acc_percent": (GREEN, "D"),
    "test_acc_percent": (ORANGE, "o"),
}
DIPS = "(the density dips where an epoch ends with an update: what grows starts at zero)"
DENSITY_TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1)
WIDTH = 6.4  # inches
LABEL_WIDTH, NOTE_WIDTH = 34, 130  # characters
MANY = 12  # groups: more of them are drawn closer together
STYLE: Any = [
    "default",
    {
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.constrained_layout.use": True,
        "font.size": 9,
        "grid.alpha": 0.3,
        "legend.fontsize": 8,
        "lines.linewidth": 1.4,
        "lines.markersize": 4,
        "savefig.dpi": 200,
        "svg.hashsalt": "sparselearning",  # without it, names inside an SVG are drawn at random
    },
]


def run_figures(run: Run) -> dict[str, Figure]:
    """All pictures of one run, finished or not, by name.

    Raises:
        FaultError: if a network's file is damaged.
    """
    figures = {"curves": curves(run), "schedules": schedules(run)}
    if layers := layer_figure(run):
        figures["layers"] = layers
    return figures


def save(figure: Figure, stem: Path) -> str:
    """Write ``stem.png`` and ``stem.svg``; return the latter's text. The figure keeps its layout from then on.

    Raises:
        FaultError: if the disk refuses.
    """
    undated: dict[str, dict[str, Any]] = {"png": {"Software": DRAWN_BY}, "svg": {"Creator": DRAWN_BY, "Date": None}}
    files = {kind: io.BytesIO() for kind in undated}
    with style.context(STYLE):
        for kind, metadata in undated.items():
            figure.savefig(files[kind], format=kind, metadata=metadata)
            figure.set_layout_engine("none")  # the second file keeps the layout of the first
            write_bytes(stem.with_name(f"{stem.name}.{kind}"), files[kind].getvalue())
    return files["svg"].getvalue().decode()


# ------------------------------------------------------------------------------------------------------- one run


@style.context(STYLE)
def curves(run: Run) -> Figure:
    """Loss and accuracy over the epochs; below, the accuracies of tickets and superpositions enlarged."""
    panels = 3 if run.tickets else 2
    figure = Figure(figsize=(WIDTH, 2.5 * panels))
    loss, accuracy, *enlarged = figure.subplots(panels)
    shown = {
        loss: ([row.train_loss for row in run.metrics], [row.eval_loss for row in run.metrics]),
        accuracy: ([100 * row.train_acc for row in run.metrics], [100 * row.eval_acc for row in run.metrics]),
    }
    for axes, curves_of_parts in shown.items():
        for (label, color, dashes, width), values in zip(PARTS, curves_of_parts, strict=True):
            axes.plot(_epochs_done(run), values, dashes, color=color, label=label, marker=_dot(run), linewidth=width)
        _shade_cycles(axes, run)
    _log_scale(loss)
    loss.set(ylabel="loss [nats per sample]", xlabel="epochs")
    accuracy.set(ylabel="accuracy [%]", xlabel="epochs")
    for axes in enlarged:
        _mark_tickets(accuracy, run)
        _enlarge_tickets(axes, run)
    _legend_above(figure, accuracy)
    return figure


def _mark_tickets(axes: Axes, run: Run) -> list[float]:
    """Mark the networks that were superposed and the superpositions; return the accuracies shown, in percent."""
    ends = [end for _, end in _cycles(run)]
    tickets = [100 * row.ticket_acc for row in run.tickets]
    superpositions = [100 * row.superposed_acc for row in run.tickets]
    axes.plot(ends[: len(tickets)], tickets, label="ticket", **TICKET)
    axes.plot(ends[: len(tickets)], superpositions, label="superposition", **SUPERPOSITION)
    pretrained = [100 * row.eval_acc for row in run.metrics if row.ticket is None][-1:]
    if run.summary:  # which knows it even if the run began with the cycles
        pretrained = [100 * run.summary.pretrain_acc]
    for accuracy in pretrained:
        axes.axhline(accuracy, color=GREY, linestyle=":", label="pre-trained")
    return tickets + superpositions + pretrained


def _enlarge_tickets(axes: Axes, run: Run) -> None:
    shown = _mark_tickets(axes, run)
    margin = max(0.12 * (max(shown) - min(shown)), 0.25)
    first, last = _cycles(run)[0][0], _cycles(run)[-1][1]
    axes.set(xlim=(first - 0.03 * (last - first), last + 0.03 * (last - first)))
    axes.set(ylim=(min(shown) - margin, max(shown) + margin))
    axes.set(ylabel="evaluation accuracy [%]", xlabel="epochs (the cycles, enlarged)")
    _shade_cycles(axes, run)


@style.context(STYLE)
def schedules(run: Run) -> Figure:
    """Learning rate, density and, if it was recorded, the share of weights ever active, over the epochs."""
    shares = {"density": [row.density for row in run.metrics]}
    explored = [row.explored for row in run.metrics if row.explored is not None]
    if len(explored) == len(run.metrics):
        shares["$R_s$: ever active"] = explored
    figure = Figure(figsize=(WIDTH, 2.5 + 2.1 * len(shares)))
    rate, *others = figure.subplots(1 + len(shares), sharex=True)
    _draw_learning_rate(rate, run)
    for axes, (name, values) in zip(others, shares.items(), strict=True):
        axes.plot(_epochs_done(run), values, color=BLUE, marker=_dot(run))
        axes.set(ylabel=f"{name}\n[share of maskable weights]", ylim=(0, 1.1 * max(values) or 1))
    for axes in (rate, *others):
        _shade_cycles(axes, run)
    others[-1].set(xlabel=f"epochs\n{DIPS}" if _density_dips(run) else "epochs")
    _legend_above(figure, rate)
    return figure


def _density_dips(run: Run) -> bool:
    """Whether the density rises after an epoch: no schedule does that."""
    return any(later.density > row.density for row, later in pairwise(run.metrics))


def _draw_learning_rate(axes: Axes, run: Run) -> None:
    """Draw the rate of every step, and on it what short runs recorded of each epoch's last step."""
    cycle_lr, times = run.config.cycle_lr, np.linspace(0, 1, 201)
    cycles = _cycles(run)[: len(run.tickets)]  # the length of an unfinished one is unknown
    if cycle_lr is not None:
        rates = [cyclic_lr(t % 1, *cycle_lr) for t in times]
        for start, end in cycles:
            axes.plot(start + times * (end - start), rates, color=BLUE)
    places = [float(done) for done in _epochs_done(run)]
    for number, row in enumerate(run.metrics):
        if row.ticket is None or cycle_lr is None:
            axes.plot([row.epoch, row.epoch + 1], [row.lr] * 2, color=BLUE)
        elif row.ticket <= len(cycles):
            places[number] = _place_of_rate(row, *cycles[row.ticket - 1], *cycle_lr)
    axes.plot([], [], color=BLUE, label="every step")
    if _dot(run):
        recorded = [row.lr for row in run.metrics]
        axes.plot(places, recorded, ".", color=VERMILION, label="last step of each epoch")
    _log_scale(axes)
    axes.set(ylabel="learning rate")


def _place_of_rate(row: EpochRow, start: int, end: int, lr_1: float, lr_2: float) -> float:
    """Where in its epoch of a cycle the last step was: somewhat before the epoch's end, where the rate is the row's.

    Args:
        row: of an epoch in the cycle.
        start: first epoch of the cycle.
        end: epoch after its last one.
        lr_1: at both ends.
        lr_2: in the middle.
    """
    done = (row.epoch + 1 - start) / (end - start)
    half = (row.lr - lr_1) / (2 * (lr_2 - lr_1)) if lr_1 != lr_2 else done
    place = start + (half if done <= 0.5 else 1 - half) * (end - start)
    return min(max(place, row.epoch), row.epoch + 1)


@style.context(STYLE)
def layer_figure(run: Run) -> Figure | None:
    """Density of each layer in the last ticket and in the superposition with it, beside ERK's.

    None where there are no networks, or only dense ones.

    Raises:
        FaultError: if a network's file is damaged.
    """
    files = {"last ticket": (run.folder.current, TICKET), "superposition": (run.folder.previous, SUPERPOSITION)}
    if run.is_plain:
        files = {"trained network": (run.folder.previous, SUPERPOSITION)}
    networks = {label: masked_weights(path) for label, (path, _) in files.items() if path.is_file()}
    if not networks or not all(networks.values()):
        return None
    final = list(networks.values())[-1]
    overall = overall_density(final.values())
    erk = erk_densities({name: weight.shape for name, weight in final.items()}, overall)
    figure = Figure(figsize=(WIDTH, 1.5 + 0.19 * len(final)))
    axes = figure.subplots()
    places = range(len(final))
    axes.plot(
        list(erk.values()),
        places,
        "|",
        color=GREY,
        markersize=10,
        markeredgewidth=1.5,
        label=f"ERK ({overall:.4f} overall)",
    )
    highest = max(erk.values())
    for label, weights in networks.items():
        densities = layer_densities(weights).values()
        highest = max(highest, *densities)
        label_text = f"{label} ({overall_density(weights.values()):.4f} overall)"
        axes.plot(list(densities), places, label=label_text, **files[label][1])
    axes.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    axes.set(xlim=(0, 1.05 * highest), xlabel="density [share of the layer's weights], square-root scale")
    ticks = [0.0]
    for tick in DENSITY_TICKS:
        if tick <= highest and math.sqrt(tick) - math.sqrt(ticks[-1]) > 0.08 * math.sqrt(highest):
            ticks.append(tick)
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    labels = [f"{name.removesuffix('.weight')} ({weight.numel():,})" for name, weight in final.items()]
    axes.set_yticks(places, labels, fontsize=7)
    axes.set(ylim=(len(final) - 0.4, -0.6), ylabel="layer (number of weights)")
    _legend_above(figure, axes)
    return figure


# -------------------------------------------------------------------------------------------------- several runs


@style.context(STYLE)
def comparison(groups: Sequence[Group]) -> Figure:
    """Accuracy of each group before superposing and at the end: mean, sample standard deviation, every run.

    A dashed line shows where plain training that is otherwise equal ends.
    """
    columns = [column for column in COLUMNS if column.name in COMPARED and any(map(column.spread, groups))]
    labels = [_wrapped(f"{group.label} (n = {len(group.runs)})", LABEL_WIDTH) for group in groups]
    notes = [_wrapped(sentence, NOTE_WIDTH) for sentence in legend(groups)]
    pitch = 0.13 + (0.17 if len(groups) <= MANY else 0.14) * len(columns)
    pitch = max(pitch, 0.06 + 0.15 * max(label.count("\n") + 1 for label in labels))
    below = 0.115 * sum(note.count("\n") + 1 for note in notes)
    figure = Figure(figsize=(WIDTH, 1.2 + pitch * len(groups) + below))
    axes = figure.subplots()
    for row, column in enumerate(columns):
        color, marker = COMPARED[column.name]
        offset = (row - (len(columns) - 1) / 2) * 0.75 / len(columns)
        axes.plot([], [], color=color, marker=marker, linestyle="none", label=column.title.removesuffix(" [%]"))
        for place, group in enumerate(groups):
            if spread := column.spread(group):
                y = place + offset
                axes.errorbar(spread.mean, y, xerr=spread.std, color=color, marker=marker, capsize=3, markersize=5)
                singles = [single for run in group.runs if (single := column.value(group, run)) is not None]
                if len(singles) > 1:
                    axes.plot(singles, [y + 0.06 / pitch] * len(singles), ".", color=color, markersize=3)
    plain: dict[str, Any] = {"color": BLUE, "linestyle": "--", "linewidth": 1}
    if any(group.control for group in groups):
        axes.plot([], [], label="plain training, final (mean)", **plain)
    for place, group in enumerate(groups):
        if group.control and (spread := columns[-1].spread(group.control)):
            axes.plot([spread.mean] * 2, [place - 0.45, place + 0.45], **plain)
    for border in range(1, len(groups)):
        axes.axhline(border - 0.5, color=GREY, linewidth=0.5, alpha=0.4)
    axes.set_yticks(range(len(groups)), labels, parse_math=False)
    axes.grid(visible=False, axis="y")
    axes.set(ylim=(len(groups) - 0.5, -0.5), xlabel="accuracy [%]: mean ± sample standard deviation; dots: runs")
    _legend_above(figure, axes)
    if notes:
        _notes_below(figure, notes)
    return figure


@style.context(STYLE)
def gains(settings: Mapping[str, Sequence[Group]]) -> Figure:
    """Gain over plain training, in points, of every group that has a control: mean, 95 % t-interval, every seed.

    Args:
        settings: groups by what they have in common.
    """
    rows: list[tuple[str, Group | None]] = []
    for title, groups in settings.items():
        rows.append((title, None))
        rows += [(f"{group.label} (n = {len(group.runs)})", group) for group in groups if group.control]
    diamond: dict[str, Any] = {"color": GREEN, "marker": "D", "capsize": 3, "markersize": 4.5}
    figure = Figure(figsize=(WIDTH, 1.2 + 0.22 * len(rows)))
    axes = figure.subplots()
    for place, (_, group) in enumerate(rows):
        if group is None or (spread := GAIN_OVER_PLAIN.spread(group)) is None:
            continue
        axes.errorbar(spread.mean, place, xerr=spread.margin, **diamond)
        singles = [single for run in group.runs if (single := GAIN_OVER_PLAIN.value(group, run)) is not None]
        axes.plot(singles, [place] * len(singles), ".", color=VERMILION, markersize=3.5, zorder=3)
    axes.errorbar([], [], xerr=[], label="mean, 95 % confidence interval", **diamond)
    axes.plot([], [], ".", color=VERMILION, label="one seed")
    axes.axvline(0, color=BLUE, linestyle="--", linewidth=1, label="plain training")
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], parse_math=False)
    for tick, (_, group) in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_fontweight("bold" if group is None else "normal")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel="gain over plain training [points]")
    _legend_above(figure, axes)
    return figure


def _notes_below(figure: Figure, notes: Sequence[str]) -> None:
    """Explain the numbers of labels below all panels."""
    nothing = [Line2D([], [], linestyle="none") for _ in notes]
    legend_below = figure.legend(
        nothing, notes, loc="outside lower left", handlelength=0, handletextpad=0, labelspacing=0.25, frameon=False,
        fontsize=6.5,
    )  # fmt: skip
    for text in legend_below.get_texts():
        text.set_parse_math(False)


def _wrapped(text: str, width: int) -> str:
    """A text in lines that break between flags where they can."""
    hard = "\N{NO-BREAK SPACE}"
    words = text.replace(" ", hard).replace(f",{hard}", ", ")
    return textwrap.fill(words, width, break_on_hyphens=False)


# ----------------------------------------------------------------------------------------------------- small parts


def _epochs_done(run: Run) -> list[int]:
    """Where a row of the metrics belongs on an axis of epochs: it was written when its epoch was done."""
    return [row.epoch + 1 for row in run.metrics]


def _cycles(run: Run) -> list[tuple[int, int]]:
    """First epoch of each cycle, and the epoch after its last one so far."""
    in_cycles = [row for row in run.metrics if row.ticket is not None]
    spans = [[row.epoch for row in rows] for _, rows in groupby(in_cycles, key=lambda row: row.ticket)]
    return [(epochs[0], epochs[-1] + 1) for epochs in spans]


def _shade_cycles(axes: Axes, run: Run) -> None:
    """Shade the cycles on an axis of epochs."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    for number, (start, end) in enumerate(_cycles(run)):
        axes.axvspan(
            start,
            end,
            color=GREY,
            alpha=(0.1, 0.18)[number % 2],
            linewidth=0,
            zorder=0,
            label=None if number else "cycles",
        )


def _dot(run: Run) -> str:
    """Marker of single epochs, if there are few."""
    return "." if len(run.metrics) <= 50 else ""


def _legend_above(figure: Figure, axes: Axes) -> None:
    """Name what is drawn in ``axes`` above all panels, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4 if len(labels) == 4 else 3, frameon=False)


def _log_scale(axes: Axes) -> None:
    """Logarithmic, with plain numbers at the ticks; linear if values have no logarithm or hardly differ."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines])
    values = values[np.isfinite(values)]
    if not len(values) or values.min() <= 0 or values.max() < 4 * values.min():
        return
    axes.set_yscale("log")
    decades = math.log10(values.max()) - math.log10(values.min())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if decades < 1 else (1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
