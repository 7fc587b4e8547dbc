"""Two sides measured in turn, their ratio compared with goals, and all of it as a table, JSON and a picture."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from sparselearning.process.files import write_whole

COMMAND = "benchmarks/speed.py"
"""Program name in the files that are written."""
TITLES = ["what", "this", "reference", "ratio", "to reach"]
COLUMNS = "{:<42} {:>30} {:>30} {:>23}  {}"


class Side(NamedTuple):
    """One side of a comparison: ``run`` is timed and does ``work`` (calls, steps or images); ``prepare`` is not."""

    run: Callable[[], object]
    work: float = 1
    prepare: Callable[[], object] = lambda: None


def alternate(sides: Sequence[Side], repeats: int, device: torch.device) -> list[list[float]]:
    """Measure all sides in turn, A B A B …, ``repeats`` times after one round that warms up.

    Returns:
        Per side, the seconds per unit of work of every round.
    """
    seconds: list[list[float]] = [[] for _ in sides]
    for round_number in range(1 + repeats):
        for side, samples in zip(sides, seconds, strict=True):
            side.prepare()
            wait(device)
            began = time.perf_counter()
            side.run()
            wait(device)
            if round_number:
                samples.append((time.perf_counter() - began) / side.work)
    return seconds


def wait(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Bar:
    """A goal of a row: at most ``limit``, or at least, for rates.

    Attributes:
        limit: of the ratio, or of the figure itself if ``of_figure``.
        stretch: a harder limit.
    """

    limit: float
    stretch: float | None = None
    of_figure: bool = False


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        what: name of the comparison.
        unit: of both sides; one that ends in ``/s`` is a rate, of which more is better.
        this: the library's figure, round by round.
        reference: the reference's.
        bars: what the row is to reach.
    """

    what: str
    unit: str
    this: list[float]
    reference: list[float]
    bars: Sequence[Bar] = ()

    @classmethod
    def of_times(cls, what: str, this: list[float], reference: list[float]) -> "Row":
        """Milliseconds, from seconds."""
        return cls(what, "ms", [1000 * seconds for seconds in this], [1000 * seconds for seconds in reference])

    @classmethod
    def of_rates(cls, what: str, this: list[float], reference: list[float]) -> "Row":
        """Images per second, from seconds per image."""
        return cls(what, "images/s", [1 / seconds for seconds in this], [1 / seconds for seconds in reference])

    @property
    def ratios(self) -> list[float]:
        """This over reference, round by round."""
        return [a / b for a, b in zip(self.this, self.reference, strict=True)]

    @property
    def is_rate(self) -> bool:
        """Whether more is better."""
        return self.unit.endswith("/s")

    def verdict(self, bar: Bar) -> str:
        """Say whether the median reaches the bar: ``stretch``, ``pass`` or ``FAIL``."""
        figure = median(self.this if bar.of_figure else self.ratios)
        for limit, word in ((bar.stretch, "stretch"), (bar.limit, "pass")):
            if limit is not None and (figure >= limit if self.is_rate else figure <= limit):
                return word
        return "FAIL"

    def cells(self) -> list[str]:
        """The row in a table with the columns of :data:`TITLES`."""
        verdicts = [f"{self._text(bar)}: {self.verdict(bar)}" for bar in self.bars]
        this, reference = (f"{spread(side)} {self.unit}" for side in (self.this, self.reference))
        return [self.what, this, reference, spread(self.ratios), ", ".join(verdicts) or "-"]

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "Row":
        """Read what :meth:`as_json` wrote."""
        bars = [Bar(bar["limit"], bar["stretch"], bar["of_figure"]) for bar in saved["bars"]]
        return cls(saved["what"], saved["unit"], saved["this"], saved["reference"], bars)

    def _text(self, bar: Bar) -> str:
        limits = " / ".join(number(limit) for limit in (bar.limit, bar.stretch) if limit is not None)
        return f"{'≥' if self.is_rate else '≤'} {limits}" + (f" {self.unit}" if bar.of_figure else "")

    def as_json(self) -> dict[str, Any]:
        """Everything measured, sample by sample, with ratios and verdicts."""
        ratios = self.ratios
        return asdict(self) | {
            "ratio": {"median": median(ratios), "min": min(ratios), "max": max(ratios)},
            "bars": [asdict(bar) | {"verdict": self.verdict(bar)} for bar in self.bars],
        }


def line(cells: Sequence[str]) -> str:
    """One line of the table on a terminal."""
    return COLUMNS.format(*cells)


def markdown(rows: Iterable[Row]) -> str:
    """The table in Markdown."""
    lines = [TITLES, ["---", *["---:"] * (len(TITLES) - 1)], *(row.cells() for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def spread(values: Sequence[float]) -> str:
    """Median, and smallest to largest in brackets."""
    middle = number(median(values))
    return middle if len(values) == 1 else f"{middle} ({number(min(values))}..{number(max(values))})"


def number(value: float) -> str:
    """At least three digits."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3f}" if 0.1 <= value < 10 else f"{value:.3g}"


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draw how many times faster each row is than its reference, with its range and its bars. Needs matplotlib.

    Raises:
        FaultError: if the disk refuses.
    """
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    from sparselearning.reporting.plots import BLUE, STYLE, VERMILION

    rows = [row for row in rows if row.unit != "MB"]
    with style.context(STYLE):
        figure = Figure(figsize=(7.5, 1.2 + 0.3 * len(rows)))
        axes = figure.subplots()
        for place, row in enumerate(rows):
            faster = [ratio if row.is_rate else 1 / ratio for ratio in row.ratios]
            limits = [bar.limit if row.is_rate else 1 / bar.limit for bar in row.bars if not bar.of_figure]
            axes.vlines(limits, place - 0.35, place + 0.35, color=VERMILION, linewidth=2)
            axes.hlines(place, min(faster), max(faster), color=BLUE, linewidth=2)
            axes.plot(median(faster), place, "o", color=BLUE, markersize=6)
            axes.annotate(
                f"{median(faster):.3g} x", (max(faster), place), (7, 0), textcoords="offset points", va="center",
                fontsize=8, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )  # fmt: skip
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_yticks(range(len(rows)), [row.what for row in rows])
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.margins(x=0.15)
        axes.set_xlabel("times faster than the reference\n(line: range of the rounds; red: to reach)")
        figure.suptitle(title, fontsize=7, wrap=True)
        options: dict[str, Any] = {"format": "png", "metadata": {"Software": COMMAND}, "bbox_inches": "tight"}
        write_whole(path, lambda file: figure.savefig(file, **options))
