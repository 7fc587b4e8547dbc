"""Pictures of runs. Needs matplotlib, the optional extra ``plots``; the same files give the same pictures."""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from sparselearning.checkpoint import write_whole
from sparselearning.costs import layer_densities
from sparselearning.distributions import erk_densities
from sparselearning.runs import Group, Run, masked_weights
from sparselearning.schedules import cyclic_lr
from sparselearning.tables import COLUMNS, Column, final_accuracy

# Okabe and Ito's colours, which people with any colour vision can tell apart; shapes and dashes differ as well.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#666666"
STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.alpha": 0.3,
    "legend.fontsize": 8,
    "legend.framealpha": 0.9,
    "lines.linewidth": 1.4,
    "savefig.dpi": 200,
    "svg.hashsalt": "sparselearning",  # else names inside an SVG are drawn at random
}
WIDTH = 6.4  # inches


def save(figure: Figure, stem: Path) -> None:
    """Write ``stem.png`` and ``stem.svg``.

    Raises:
        FaultError: if the disk refuses.
    """
    with matplotlib.rc_context(STYLE):
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            write_whole(
                stem.with_name(f"{stem.name}.{kind}"),
                lambda file, kind=kind, metadata=metadata: figure.savefig(file, format=kind, metadata=metadata),
            )


def run_figures(run: Run) -> dict[str, Figure]:
    """All pictures of one run, finished or not, by name.

    Raises:
        FaultError: if a network's file is damaged.
    """
    figures = {"curves": curves(run), "schedules": schedules(run)}
    layers = layer_figure(run)
    return figures | ({"layers": layers} if layers else {})
