"""The analysis of a run's tickets, as typed values: ``analysis/analysis.json``.

``sparselearning.analyze`` measures and writes it; tables, pictures and reports read it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from sparselearning.process.schema import Amount, Count, Mismatch, Ordinal, Record, Share, Unbounded

ENSEMBLE = "logit ensemble"
"""Name of the row that is no network: the mean of the tickets' logits."""
MOVING_AVERAGE = "moving average"
"""Name of the moving average of all steps' weights (``--ema``)."""
TEST_SET, HELD_OUT = "test set", "held-out part of the training set"
"""Images that networks are measured on."""
Matrix = list[list[Share]]


def ticket_name(number: int) -> str:
    """Name of a ticket, from 0, the pre-trained network."""
    return f"ticket {number}"


def superposition_name(number: int) -> str:
    """Name of the superposition of the first ticket and ``number`` more."""
    return f"superposition {number}"


@dataclass(frozen=True, kw_only=True)
class Settings(Record):
    """How tickets were superposed again.

    Attributes:
        tickets: numbers of the tickets, from 0, the pre-trained network.
        superposing_method: name of the average.
        CIMA_factor: weight of each ticket; None for other averages.
        final_density: budget that superpositions are pruned to; None: not pruned.
        update_bn: whether their BatchNorm statistics were re-estimated.
        line_bn: whether those of networks on straight lines were.
    """

    tickets: list[Count]
    superposing_method: str
    CIMA_factor: Share | None
    final_density: Share | None
    update_bn: bool
    line_bn: bool


@dataclass(frozen=True, kw_only=True)
class EvaluatedOn(Record):
    """The images that everything was measured on."""

    part: str
    images: Ordinal


@dataclass(frozen=True, kw_only=True)
class Quality(Record):
    """How good predictions are.

    Attributes:
        accuracy: in [0, 1].
        loss: mean per sample, the negative log-likelihood of the labels in nats.
        ece: expected calibration error, in [0, 1]; None in analyses of earlier versions.
        corrupted: accuracy on corrupted pictures, by the name of the corruption; None if not measured.
        held_out_accuracy: on the training images that choices are made on; None if everything is measured on those,
            or there are none.
    """

    accuracy: Share
    loss: Unbounded
    ece: Unbounded | None = None
    corrupted: dict[str, Share] | None = None
    held_out_accuracy: Share | None = None


@dataclass(frozen=True, kw_only=True)
class NetworkRow(Quality):
    """Quality of a ticket, a superposition or the ensemble, and the forward passes that a prediction takes."""

    name: str
    density: Share
    forward_passes: Ordinal


@dataclass(frozen=True, kw_only=True)
class Pairs(Record):
    """One square matrix per measure, over the networks ``names``.

    Attributes:
        overlap: of masks (Jaccard).
        disagreement: share of images whose predicted classes differ.
        kl: KL(row ‖ column) of predictions, in nats.
        names: of rows and columns.
    """

    overlap: Matrix
    disagreement: Matrix
    kl: list[list[Unbounded]]
    names: list[str]

    def __post_init__(self) -> None:
        for measure, matrix in (("overlap", self.overlap), ("disagreement", self.disagreement), ("kl", self.kl)):
            _check_square(measure, matrix, len(self.names))


@dataclass(frozen=True, kw_only=True)
class LayerRow(Record):
    """Masks of one layer in all tickets.

    Attributes:
        name: of the weight.
        weights: their number.
        densities: in each ticket.
        overlap: between tickets.
        mean_overlap: over pairs of tickets.
        chance: the same for random masks of these densities.
    """

    name: str
    weights: Ordinal
    densities: list[Share]
    overlap: Matrix
    mean_overlap: Share
    chance: Amount

    def __post_init__(self) -> None:
        _check_square("overlap", self.overlap, len(self.densities))


@dataclass(frozen=True, kw_only=True)
class Line(Record):
    """Networks on the straight line from one network to another.

    Attributes:
        from_: name of the network where ``share`` is 0.
        to: name of the network where it is 1.
        share: of the way, at each point, in [0, 1].
        accuracy: at each point.
        loss: at each point.
        accuracy_barrier: how far accuracy falls, at most, below the line between its values at the ends.
        loss_barrier: how far loss rises, at most, above that line.
    """

    from_: str
    to: str
    share: list[Share]
    accuracy: list[Share]
    loss: list[Unbounded]
    accuracy_barrier: Share
    loss_barrier: Unbounded

    def __post_init__(self) -> None:
        lengths = [len(self.share), len(self.accuracy), len(self.loss)]
        if min(lengths) < 2 or len(set(lengths)) > 1:
            raise Mismatch(f"share, accuracy and loss have {', '.join(map(str, lengths))} points")


@dataclass(frozen=True, kw_only=True)
class GridRow(Record):
    """The last superposition by one average, with averaged and with re-estimated BatchNorm statistics."""

    superposing_method: str
    CIMA_factor: Share | None
    bn_averaged: Quality
    bn_re_estimated: Quality


@dataclass(frozen=True, kw_only=True)
class Analysis(Record):
    """All that was measured.

    Attributes:
        run: its folder.
        evaluated_on: which images.
        settings: of superposing again.
        same_as_run: whether the last superposition is the run's own, to the bit; of plain training, its network.
        networks: each ticket, each superposition, the ensemble; of plain training, its network, called ticket 0; last,
            the moving average of the run's weights, if it kept one.
        pairs: of all tickets and the last superposition.
        layers: each masked layer.
        lines: at least from each ticket to the next.
        grid: other averages; None if they were not measured.
    """

    run: str
    evaluated_on: EvaluatedOn
    settings: Settings
    same_as_run: bool
    networks: list[NetworkRow]
    pairs: Pairs
    layers: list[LayerRow]
    lines: list[Line]
    grid: list[GridRow] | None = None

    def __post_init__(self) -> None:
        names = [ticket_name(number) for number in self.settings.tickets]
        if not names:
            raise Mismatch("settings.tickets has no tickets")
        for place, known in (("networks", {row.name for row in self.networks}), ("pairs.names", {*self.pairs.names})):
            wanted = [*names, ENSEMBLE] if place == "networks" and len(names) > 1 else names
            if missing := [name for name in wanted if name not in known]:
                raise Mismatch(f"{place} lacks {missing[0]}")
        if missing_steps := set(pairwise(names)) - {(line.from_, line.to) for line in self.lines}:
            raise Mismatch("lines lacks that from {} to {}".format(*min(missing_steps)))

    def steps(self) -> list[Line]:
        """Straight lines from one ticket to the next."""
        steps = set(pairwise(map(ticket_name, self.settings.tickets)))
        return [line for line in self.lines if (line.from_, line.to) in steps]


def _check_square(name: str, matrix: Sequence[Sequence[float]], size: int) -> None:
    if len(matrix) != size or any(len(row) != size for row in matrix):
        raise Mismatch(f"{name} is no matrix of {size} rows and columns")
