"""Pictures of what an analysis of tickets measured. Needs matplotlib, the optional extra ``plots``."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.figure import Figure

from sparselearning.reporting import plots
from sparselearning.reporting.analysis import ENSEMBLE, MOVING_AVERAGE, Analysis

ABOVE: Any = {"loc": "lower center", "bbox_to_anchor": (0.5, 1), "ncols": 2, "frameon": False}
"""Place of a legend that hides no point."""


def save_all(results: Analysis, out: Path) -> None:
    """Write a picture of every part that was measured, as PNG and SVG."""
    for name, draw in FIGURES.items():
        if getattr(results, name):
            plots.save(draw(results), out / name)


@style.context(plots.STYLE)
def networks(results: Analysis) -> Figure:
    """Accuracy of every ticket, of every superposition, of the ensemble, and of the moving average."""
    rows = results.networks
    kinds = {
        "ticket": plots.VERMILION,
        "superposition": plots.GREEN,
        ENSEMBLE: plots.BLUE,
        MOVING_AVERAGE: plots.ORANGE,
    }
    figure = Figure(figsize=(plots.WIDTH, 1.2 + 0.25 * len(rows)))
    axes = figure.subplots()
    for place, row in enumerate(rows):
        color = next(color for kind, color in kinds.items() if row.name.startswith(kind))
        axes.plot(100 * row.accuracy, place, "o", color=color)
        axes.annotate(
            f"{100 * row.accuracy:.2f}", (100 * row.accuracy, place), (6, 0), textcoords="offset points",
            va="center", fontsize=8,
        )  # fmt: skip
    names = [row.name + (f", {row.forward_passes} forward passes" if row.name == ENSEMBLE else "") for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set(xlabel=f"accuracy [%] on the {results.evaluated_on.part}")
    return figure


@style.context(plots.STYLE)
def pairs(results: Analysis) -> Figure:
    """Mask overlap, disagreement and divergence of all pairs, as shaded tables."""
    names = [_short(name) for name in results.pairs.names]
    panels = (
        (results.pairs.overlap, "mask overlap (Jaccard)", 1, "{:.2f}"),
        (results.pairs.disagreement, "predictions differ [%]", 100, "{:.1f}"),
        (results.pairs.kl, "KL(row ‖ column) [nats]", 1, "{:.3f}"),
    )
    size = max(2.2, 0.38 * len(names) + 0.6)
    figure = Figure(figsize=(3 * size, size + 0.5))
    for axes, (values, title, scale, form) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        matrix = [[scale * value for value in row] for row in values]
        largest = max(map(max, matrix)) or 1
        axes.imshow(matrix, cmap="Blues", vmin=0, vmax=largest)
        for i, row in enumerate(matrix):
            for j, value in enumerate(row):
                color = "white" if value > 0.6 * largest else "black"
                axes.text(j, i, form.format(value), ha="center", va="center", fontsize=6.5, color=color)
        axes.set_xticks(range(len(names)), names)
        axes.set_yticks(range(len(names)), names)
        axes.grid(False)
        axes.set_title(title, fontsize=9)
    return figure


@style.context(plots.STYLE)
def layers(results: Analysis) -> Figure:
    """Mask overlap of every layer between tickets, beside that of random masks of the same densities."""
    rows = results.layers
    figure = Figure(figsize=(plots.WIDTH, 1.2 + 0.19 * len(rows)))
    axes = figure.subplots()
    places = range(len(rows))
    axes.plot([row.chance for row in rows], places, "|", color=plots.GREY, markersize=9, label="random masks")
    axes.plot([row.mean_overlap for row in rows], places, "o", color=plots.VERMILION, label="tickets, mean of pairs")
    axes.set_yticks(places, [row.name.removesuffix(".weight") for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="mask overlap (Jaccard)", xlim=(0, 1.02))
    axes.legend(**ABOVE)
    return figure


@style.context(plots.STYLE)
def lines(results: Analysis) -> Figure:
    """Accuracy and loss along the straight lines: between tickets on the left, to the superposition on the right."""
    columns: dict[str, Sequence[Any]] = {
        "from ticket to ticket": [line for line in results.lines if line.to.startswith("ticket")],
        "from ticket to superposition": [line for line in results.lines if not line.to.startswith("ticket")],
    }
    figure = Figure(figsize=(1.25 * plots.WIDTH, 6))
    panels = figure.subplots(2, 2, sharex=True, sharey="row")
    for (accuracy, loss), (title, shown) in zip(panels.T, columns.items(), strict=True):
        for number, line in enumerate(shown):
            look = {
                "color": f"C{number % 10}",
                "linestyle": ("-", "--", ":")[number % 3],
                "linewidth": 3 - 2 * number / max(1, len(shown) - 1),  # the first ones show beneath equal ones
                "marker": ".",
                "markersize": 4,
            }
            label = f"{_short(line.from_)} to {_short(line.to)}"
            accuracy.plot(line.share, [100 * value for value in line.accuracy], label=label, **look)
            loss.plot(line.share, line.loss, label=label, **look)
        accuracy.set_title(title, fontsize=9)
        loss.set(xlabel="way from the first (0) to the second (1)")
        loss.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4, frameon=False)
    bn = "re-estimated" if results.settings.line_bn else "interpolated"
    panels[0, 0].set(ylabel=f"accuracy [%], BatchNorm {bn}")
    panels[1, 0].set(ylabel="loss [nats per sample]")
    return figure


@style.context(plots.STYLE)
def grid(results: Analysis) -> Figure:
    """Accuracy by CIMA's factor, beside that of other averages, for averaged and re-estimated BatchNorm statistics."""
    figure = Figure(figsize=(plots.WIDTH, 3.2))
    axes = figure.subplots()
    rows = results.grid or []
    cima = sorted(((row.CIMA_factor, row) for row in rows if row.CIMA_factor is not None), key=lambda pair: pair[0])
    others = [row for row in rows if row.CIMA_factor is None]
    for quality, label, color, marker, offset in (  # the dashes of equal lines take turns
        (lambda row: row.bn_re_estimated, "BatchNorm re-estimated", plots.GREEN, "D", 0),
        (lambda row: row.bn_averaged, "BatchNorm averaged", plots.ORANGE, "o", 4),
    ):
        accuracies = [100 * quality(row).accuracy for _, row in cima]
        factors = [factor for factor, _ in cima]
        axes.plot(factors, accuracies, color=color, marker=marker, markersize=4.5, label=f"CIMA, {label}")
        for row, dashes in zip(others, cycle(((4, 4), (1, 3))), strict=False):
            axes.axhline(
                100 * quality(row).accuracy,
                color=color,
                linestyle=(offset, dashes),
                label=f"{row.superposing_method}, {label}",
            )
    axes.set(xlabel="CIMA's factor: weight of each new ticket", xlim=(0, 1))
    axes.set(ylabel=f"accuracy [%]\non the {results.evaluated_on.part}")
    axes.legend(**ABOVE)
    return figure


def _short(name: str) -> str:
    return name.replace("ticket ", "t").replace("superposition ", "s")


FIGURES = {"networks": networks, "pairs": pairs, "layers": layers, "lines": lines, "grid": grid}
"""Part of the results to its picture."""
