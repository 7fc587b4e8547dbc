"""One figure of every run, and what a table shows of it: a column of tables, or a row of those on their side."""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, inf, isfinite, sqrt
from statistics import NormalDist, fmean, stdev

from scipy.special import nctdtr, stdtr, stdtrit

from sparselearning.reporting.runs import Group, Run

Figure = Callable[[Group, Run], float | None]
"""From one run of a group to a number; None if it has none."""

Cells = list[list[str]]
"""A table: header and rows."""

POWER = 0.8
"""Share of the experiments that are to show what is there."""


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

    @property
    def margin(self) -> float | None:
        """Half the length of the mean's 95 % confidence interval, by Student's t-distribution."""
        return None if self.error is None else float(stdtrit(self.n - 1, 0.975)) * self.error

    @property
    def p(self) -> float | None:
        """Probability of a mean as far from zero by chance: p-value of the two-sided t-test."""
        if self.error is None:
            return None
        return 2 * float(stdtr(self.n - 1, -abs(self.mean) / self.error)) if self.error else float(self.mean == 0)

    def runs_to_show(self, least: float) -> int | None:
        """How many runs of this deviation show a mean of ``least``: p is below 0.05 in four of five such experiments.

        The power of the t-test is that of the noncentral t-distribution; what the other tail adds to it is left out.
        """
        if self.std is None:
            return None
        effect = least / self.std if self.std else inf
        runs = max(2, ceil((sum(map(NormalDist().inv_cdf, (0.975, POWER))) / effect) ** 2))  # t is wider than normal
        while nctdtr(runs - 1, effect * sqrt(runs), stdtrit(runs - 1, 0.975)) > 1 - POWER:
            runs += 1
        return runs


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
        shows_error: show the standard error of the mean in place of the deviation.
    """

    name: str
    title: str
    value: Figure
    digits: int = 2
    signed: bool = False
    has_std: Callable[[Group], bool] = lambda group: True
    shows_error: bool = False

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
        """Show a mean and its deviation, or error, with the column's digits."""
        if spread is None:
            return nothing
        mean = round(spread.mean, self.digits) + 0.0  # + 0.0 turns -0.0 into 0.0
        deviation = spread.error if self.shows_error else spread.std
        shown = "" if deviation is None else f"{plus_minus}{deviation:.{self.digits}f}"
        return f"{mean:{'+' if self.signed else ''}.{self.digits}f}{shown}"
