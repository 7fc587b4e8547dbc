"""One figure of every run, and what a table shows of it: a column of tables, or a row of those on their side."""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, isfinite, sqrt
from statistics import fmean, stdev

from sparselearning.reporting.runs import Group, Run

Figure = Callable[[Group, Run], float | None]
"""From one run of a group to a number; None if it has none."""

Cells = list[list[str]]
"""A table: header and rows."""


@dataclass(frozen=True)
class Spread:
    """One figure over a group's ``n`` runs: mean and sample standard deviation (n - 1); no deviation, no ``std``."""

    mean: float
    std: float | None
    n: int

    @property
    def error(self) -> float | None:
        """Standard error of the mean."""
        return None if self.std is None else self.std / sqrt(self.n)

    def runs_to_show(self, least: float) -> int | None:
        """How many runs of this deviation it takes until two standard errors are at most ``least``; 2 at least."""
        return None if self.std is None else max(2, ceil((2 * self.std / least) ** 2))


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
        return Spread(mean, stdev(known) if has_std else None, len(known))

    def text(self, spread: Spread | None, plus_minus: str, nothing: str) -> str:
        """Show a mean and its deviation with the column's digits."""
        return nothing if spread is None else self._text(spread.mean, spread.std, plus_minus)

    def text_with_error(self, spread: Spread | None) -> str:
        """Show a mean and its standard error."""
        return "-" if spread is None else self._text(spread.mean, spread.error, " ± ")

    def _text(self, mean: float, deviation: float | None, plus_minus: str) -> str:
        mean = round(mean, self.digits) + 0.0  # + 0.0 turns -0.0 into 0.0
        shown = "" if deviation is None else f"{plus_minus}{deviation:.{self.digits}f}"
        return f"{mean:{'+' if self.signed else ''}.{self.digits}f}{shown}"
