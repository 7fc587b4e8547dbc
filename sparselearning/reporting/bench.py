"""Where the networks of a run are measured: its kept tickets, and new superpositions of them."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparselearning.execution import sparse_network
from sparselearning.process.errors import FaultError, UsageError
from sparselearning.reporting.analysis import (
    ENSEMBLE,
    HELD_OUT,
    TEST_SET,
    GridRow,
    Line,
    NetworkRow,
    Pairs,
    Quality,
    superposition_name,
    ticket_name,
)
from sparselearning.reporting.comparisons import (
    accuracy,
    barrier,
    calibration_error,
    disagreement,
    jaccard,
    kl_divergence,
    pairwise,
)
from sparselearning.reporting.corruptions import corrupted
from sparselearning.sparse.costs import layer_flops, overall_density
from sparselearning.sparse.layers import maskable_parameters
from sparselearning.sparse.superpose import (
    AVERAGING,
    Averaging,
    State,
    chooses,
    differing_entries,
    prune_to_density,
    superpose,
)
from sparselearning.training.data import Batch, BatchSource
from sparselearning.training.experiment import Setup
from sparselearning.training.networks import SavedNetwork, load_weights
from sparselearning.training.passes import Passes
from sparselearning.training.run_folder import RunFolder
from sparselearning.training.runtime import Runtime


class Network(NamedTuple):
    """A ticket, what was superposed from tickets, or the moving average of a run's weights."""

    name: str
    state: State
    masks: dict[str, Tensor]  # of the maskable weights, bool
    epoch: int  # at whose end it, or its last member, was taken


Finish = Callable[[Network], Network]
"""What is done about the BatchNorm statistics of a new superposition."""


def as_it_is(network: Network) -> Network:
    """Leave the averaged BatchNorm statistics."""
    return network


@dataclass(frozen=True)
class Images:
    """Images that networks are measured on, in their stored order.

    Attributes:
        part: which they are, for people.
        batches: of all of them.
        labels: of all of them, [N].
    """

    part: str
    batches: Callable[[], Iterable[Batch]]
    labels: Tensor

    @classmethod
    def of(cls, part: str, source: BatchSource) -> "Images":
        """Read their labels."""
        return cls(part, lambda: source.epoch(0), torch.cat([batch.labels for batch in source.epoch(0)]))


@dataclass(frozen=True)
class Predictions:
    """Logits [N, classes] of one network.

    Attributes:
        measured: on the images that everything is measured on.
        held_out: on those that choices are made on, if they are others.
        corrupted: on the first ones corrupted, by the name of the corruption.
    """

    measured: Tensor
    held_out: Tensor | None = None
    corrupted: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def mean(cls, members: Sequence["Predictions"]) -> "Predictions":
        """Those of an ensemble: the mean of its members' logits."""
        held_out = [member.held_out for member in members if member.held_out is not None]
        return cls(
            measured=torch.stack([member.measured for member in members]).mean(dim=0),
            held_out=torch.stack(held_out).mean(dim=0) if held_out else None,
            corrupted={
                name: torch.stack([member.corrupted[name] for member in members]).mean(dim=0)
                for name in members[0].corrupted
            },
        )


@dataclass(frozen=True)
class Bench:
    """A run's model, images and number formats. Everything that is measured is measured here.

    Attributes:
        passes: of a model whose weights are those of whichever network was measured last.
        train: the images that BatchNorm statistics are re-estimated on.
        measured: the images that everything is measured on.
        held_out: training images that choices are made on; None: the run held none out.
        corrupted: the measured images, corrupted, by the name of the corruption.
    """

    passes: Passes
    train: BatchSource
    measured: Images
    held_out: Images | None
    corrupted: Mapping[str, Images]

    @classmethod
    def of(
        cls,
        setup: Setup,
        runtime: Runtime,
        weights: Mapping[str, nn.Parameter],
        *,
        on_test_set: bool = False,
        corruptions: Iterable[str] = (),
    ) -> "Bench":
        """Set up what a run computes with.

        Args:
            setup: of the run, on the device.
            runtime: resolved for the device.
            weights: that were masked; empty for dense training.
            on_test_set: measure on the test set even if the run held images out.
            corruptions: names in ``corruptions.CORRUPTIONS`` of what else to measure accuracy under.
        """
        model, sources = setup.model, setup.sources
        network: Any = torch.compile(model) if runtime.compile else model
        sparse = None
        if weights and runtime.execution != "masked":
            flops = layer_flops(model, setup.sample_shape) if runtime.execution == "auto" else None
            network = sparse = sparse_network(model, weights, layer_flops=flops)
        held_out = Images.of(HELD_OUT, sources.evaluation) if sources.test else None
        on_held_out = held_out if not on_test_set else None
        test_set = sources.test or sources.evaluation
        measured = on_held_out or Images.of(TEST_SET, test_set)
        source = sources.evaluation if on_held_out else test_set
        worse = {
            name: Images(
                f"{measured.part}, with {name}",
                partial(corrupted, source, name, setup.network_record["mean"], setup.network_record["std"]),
                measured.labels,
            )
            for name in corruptions
        }
        passes = Passes(model, network, runtime.precision(), sparse=sparse)
        return cls(passes, sources.train_once, measured, held_out, worse)

    def load_tickets(self, folder: RunFolder, numbers: Sequence[int]) -> list[Network]:
        """Read tickets that a run kept, all with the same weights masked.

        Raises:
            UsageError: if the run did not keep one, or it is another model's.
            FaultError: if a file is damaged.
        """
        members = [self.load(folder.ticket(number), ticket_name(number)) for number in numbers]
        for number, member in zip(numbers, members, strict=True):
            if differing := differing_entries(members[0].masks, member.masks):
                raise FaultError(
                    f"{folder.ticket(number)} is damaged: masks: {differing[0]} is not masked as in ticket {numbers[0]}"
                )
        return members

    def load(self, path: Path, name: str) -> Network:
        """Read one network. A dense one counts as masked where its weights are zero.

        Raises:
            UsageError: if there is none, or it is another model's.
            FaultError: if the file is damaged.
        """
        saved = SavedNetwork.read(path)
        load_weights(self.passes.model, vars(saved), path)
        state = self.passes.state()
        masks = {name: mask.to(self.passes.device) for name, mask in saved.masks.items()}
        masks = masks or nonzero(state, maskable_parameters(self.passes.model))
        return Network(name, state, masks, saved.epoch - 1)

    def predict(self, state: State) -> Predictions:
        """Predictions of a network, in eval mode, on all images that it is measured on."""
        choosing = self.held_out if self.held_out is not self.measured else None
        return Predictions(
            measured=self.logits(state, self.measured),
            held_out=self.logits(state, choosing) if choosing else None,
            corrupted={name: self.logits(state, images) for name, images in self.corrupted.items()},
        )

    def logits(self, state: State, images: Images) -> Tensor:
        """Predictions of a network, in eval mode: [N, classes], float32."""
        self.passes.model.load_state_dict(state)
        self.passes.network.eval()
        return torch.cat([self.passes.predict(batch) for batch in images.batches()])

    def quality(self, predictions: Predictions) -> Quality:
        """How good predictions are."""
        logits, labels = predictions.measured, self.measured.labels
        held_out = None
        if predictions.held_out is not None:
            assert self.held_out is not None
            held_out = accuracy(predictions.held_out, self.held_out.labels)
        return Quality(
            accuracy=accuracy(logits, labels),
            loss=F.cross_entropy(logits, labels).item(),
            ece=calibration_error(logits, labels),
            corrupted={name: accuracy(worse, labels) for name, worse in predictions.corrupted.items()} or None,
            held_out_accuracy=held_out,
        )

    def held_out_accuracy(self, network: Network) -> float:
        """Accuracy in [0, 1] on the images that choices are made on."""
        assert self.held_out is not None
        return accuracy(self.logits(network.state, self.held_out), self.held_out.labels)

    def row(
        self, networks: Sequence[Network], predictions: Mapping[str, Predictions], maskable: Iterable[str]
    ) -> NetworkRow:
        """Quality of one network, or of the ensemble of several: the mean of their logits."""
        together = Predictions.mean([predictions[network.name] for network in networks])
        weights = [network.state[name] for network in networks for name in maskable]
        return NetworkRow(
            name=networks[0].name if len(networks) == 1 else ENSEMBLE,
            **vars(self.quality(together)),
            density=overall_density(weights),
            forward_passes=len(networks),
        )

    def with_fresh_bn(self, network: Network) -> Network:
        """Re-estimate BatchNorm on the very batches that the run, in one process, used for this superposition."""
        return network._replace(state=self._fresh_bn(network.state, network.epoch))

    def line(
        self, a: Network, b: Network, points: int, predictions: Mapping[str, Predictions], bn_epoch: int | None = None
    ) -> Line:
        """Measure networks at equal distances on the straight line from one network to another, both ends included.

        The barrier is how far they get, at most, below (accuracy) or above (loss) the straight line between the
        figures of the two ends; at least 0.

        Args:
            a: where ``share`` is 0.
            b: where ``share`` is 1.
            points: at least 2.
            predictions: of both ends, by name.
            bn_epoch: epoch whose batches re-estimate BatchNorm at every point; None: its statistics are interpolated.
        """
        shares = [point / (points - 1) for point in range(points)]
        states: Iterable[State] = (superpose(a.state, b.state, share) for share in shares[1:-1])
        first, last = (predictions[end.name].measured for end in (a, b))
        if bn_epoch is not None:
            states = (self._fresh_bn(state, bn_epoch) for state in states)
            first, last = (self.logits(self._fresh_bn(end.state, bn_epoch), self.measured) for end in (a, b))
        inner = (self.logits(state, self.measured) for state in states)
        walk = [self.quality(Predictions(logits)) for logits in (first, *inner, last)]
        accuracies, losses = [point.accuracy for point in walk], [point.loss for point in walk]
        return Line(
            from_=a.name,
            to=b.name,
            share=shares,
            accuracy=accuracies,
            loss=losses,
            accuracy_barrier=barrier(shares, [-value for value in accuracies]),
            loss_barrier=barrier(shares, losses),
        )

    def _fresh_bn(self, state: State, epoch: int) -> State:
        self.passes.model.load_state_dict(state)
        self.passes.re_estimate_bn(self.train.epoch(epoch))
        return self.passes.state()


def kept_tickets(folder: RunFolder) -> list[int]:
    """Numbers of the tickets that a run kept, from 0, the pre-trained network.

    Raises:
        UsageError: if it kept none.
    """
    numbers = list(itertools.takewhile(lambda number: folder.ticket(number).is_file(), itertools.count()))
    if not numbers:
        others = any(folder.ticket(0).parent.glob("ticket_*.pth"))
        why = "though others are: name these with --tickets" if others else "as none is without --keep-tickets"
        raise UsageError(f"{folder.ticket(0)}, the pre-trained network, is not there, {why}")
    return numbers


def is_saved_network(network: Network, path: Path) -> bool:
    """Whether a file holds this network, to the bit."""
    saved = SavedNetwork.read(path).state_dict if path.is_file() else {}
    state = network.state
    return saved.keys() == state.keys() and all(torch.equal(state[name].cpu(), saved[name]) for name in state)


def compare(networks: Sequence[Network], predictions: Mapping[str, Predictions]) -> Pairs:
    """How alike the structure and the predictions of networks are, as one matrix per measure."""
    logits = [predictions[network.name].measured for network in networks]
    return Pairs(
        overlap=pairwise(lambda a, b: jaccard(a.masks.values(), b.masks.values()), networks),
        disagreement=pairwise(disagreement, logits),
        kl=pairwise(kl_divergence, logits),
        names=[network.name for network in networks],
    )


def neighbours(ends: Sequence[Network]) -> list[tuple[Network, Network]]:
    """From each ticket to the next, then from each to the superposition, which is the last."""
    *members, final = ends
    return [*itertools.pairwise(members), *((member, final) for member in members)]


# -------------------------------------------------------------------------------------- superposing again


def superpose_again(
    members: Sequence[Network],
    averaging: Averaging,
    maskable: Sequence[str],
    budget: float | None,
    accuracy: Callable[[Network], float],
) -> list[Network]:
    """Superpose tickets one by one, as the run did; return what there was after each but the first.

    BatchNorm statistics are averaged here. Re-estimating forgets them, so that doing so afterwards, with
    :meth:`Bench.with_fresh_bn`, gives what doing so at once gives.

    Args:
        members: the first is the start; the others enter as numbers 1, 2, ….
        averaging: number to the weights that are tried.
        maskable: names of the weights that the budget covers.
        budget: density in (0, 1] that each superposition is pruned to; None: no pruning.
        accuracy: what decides between several weights; the first of the best is taken.
    """
    state, made = members[0].state, []
    for number, member in enumerate(members[1:], start=1):
        tried = []
        for factor in averaging(number):
            union = superpose(state, member.state, factor)
            masks = nonzero(union, maskable)
            if budget is not None:
                union, masks = prune_to_density(union, maskable, budget)
            tried.append(Network(superposition_name(number), union, masks, member.epoch))
        made.append(tried[0] if len(tried) == 1 else max(tried, key=accuracy))
        state = made[-1].state
    return made


def grid(
    bench: Bench, members: Sequence[Network], maskable: Sequence[str], budget: float | None, factors: Sequence[float]
) -> list[GridRow]:
    """Measure the last superposition by every average, without and with BatchNorm re-estimation.

    CIMA with each of the factors; greedy only where images were held out. It chooses among networks whose BatchNorm
    is as it will be measured.
    """
    averages = [(name, None) for name in AVERAGING if name != "CIMA" and (bench.held_out or not chooses(name))]
    rows = []
    for method, factor in [*averages, *(("CIMA", factor) for factor in factors)]:
        averaging = AVERAGING[method](factor or 0.0)

        def measured(finish: Finish, averaging: Averaging = averaging) -> Quality:
            made = superpose_again(
                members, averaging, maskable, budget, lambda network: bench.held_out_accuracy(finish(network))
            )
            return bench.quality(bench.predict(finish(made[-1]).state))

        row = GridRow(
            superposing_method=method,
            CIMA_factor=factor,
            bn_averaged=measured(as_it_is),
            bn_re_estimated=measured(bench.with_fresh_bn),
        )
        rows.append(row)
    return rows


def nonzero(state: State, names: Iterable[str]) -> dict[str, Tensor]:
    """Masks of the named weights that are not zero."""
    return {name: state[name] != 0 for name in names}
