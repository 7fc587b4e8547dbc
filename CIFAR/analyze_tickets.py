#!/usr/bin/env python3
"""Ask a run about its tickets: do they lie in one basin, and would another average have been better?

python3 analyze_tickets.py RUN
python3 analyze_tickets.py RUN --superposing_method CAA --tickets 1 2 3 --final-density 0.1 --no-update_bn
python3 analyze_tickets.py RUN --grid

RUN is the folder of a run made with --keep-tickets. Nothing is trained. The tables that are printed, and pictures of
them, also go to RUN/analysis/.
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C during the imports below, which take seconds, needs no traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import main_suptickets
import torch
import torch.nn.functional as F
from cifar_data import Data
from ticket_tables import HELD_OUT, TEST_SET, grid_table, layers_table, lines_table, networks_table, pairs_tables
from torch import Tensor

from sparselearning.execution import sparse_network
from sparselearning.process.errors import FaultError, UsageError
from sparselearning.process.files import check_output, write_json
from sparselearning.process.script import run_script
from sparselearning.reporting.analysis import (
    ENSEMBLE,
    Analysis,
    EvaluatedOn,
    GridRow,
    LayerRow,
    Line,
    NetworkRow,
    Pairs,
    Quality,
    Settings,
    ticket_name,
)
from sparselearning.reporting.runs import find_runs, read_run
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
from sparselearning.training import flags
from sparselearning.training.networks import SavedNetwork, load_weights
from sparselearning.training.passes import Passes
from sparselearning.training.progress import print_notes
from sparselearning.training.run_folder import RunFolder

MADE_BY = "analyze_tickets.py"
"""What ``--save-network`` writes says so."""


def main(argv: Sequence[str] | None = None) -> None:
    """Analyse one run."""
    given = parse(argv)
    if given.save_network:
        check_output(given.save_network, MADE_BY)
    folder, args = rebuilt_flags(given)
    if chooses(args.superposing_method) and not args.valid_split:
        raise UsageError(
            f"--superposing_method {args.superposing_method} chooses by accuracy on held-out training images, and the "
            f"run in {folder.path} held none out (--valid_split)"
        )
    bench = Bench.of(args)
    numbers = given.tickets or kept_tickets(folder)
    members = [bench.load_ticket(folder, number) for number in numbers]
    if len(members) < 2:
        raise UsageError(f"superposing takes at least two tickets, and there is one: ticket {numbers[0]}")
    names = list(members[0].masks)
    for number, member in zip(numbers, members, strict=True):
        if differing := differing_entries(members[0].masks, member.masks):
            raise FaultError(
                f"{folder.ticket(number)} is damaged: masks: {differing[0]} is not masked as in ticket {numbers[0]}"
            )
    budget = args.final_density if args.sparse or "final_density" in given else None
    averaging = AVERAGING[args.superposing_method](args.CIMA_factor)
    finished = bench.with_fresh_bn if args.update_bn else lambda network: network
    superposed = superpose_again(members, averaging, names, budget, lambda made: bench.accuracy(finished(made)))
    superposed = [finished(network) for network in superposed]
    if given.save_network:
        final = superposed[-1]
        SavedNetwork(final.state, final.masks, final.epoch + 1).write(given.save_network, MADE_BY)

    predictions = {network.name: bench.logits(network.state) for network in [*members, *superposed]}
    ends = [*members, superposed[-1]]
    routes = itertools.combinations(ends, 2) if given.all_pairs else neighbours(ends)
    bn_epoch = members[-1].epoch if given.line_bn else None
    results = Analysis(
        run=str(folder.path),
        evaluated_on=EvaluatedOn(part=HELD_OUT if args.valid_split else TEST_SET, images=len(bench.labels)),
        settings=Settings(
            tickets=numbers,
            superposing_method=args.superposing_method,
            CIMA_factor=args.CIMA_factor if args.superposing_method == "CIMA" else None,
            final_density=budget,
            update_bn=args.update_bn,
            line_bn=given.line_bn,
        ),
        same_as_run=is_saved_network(superposed[-1], folder.previous),
        networks=[
            *(bench.row([network], predictions, names) for network in [*members, *superposed]),
            bench.row(members, predictions, names),
        ],
        pairs=compare(ends, predictions),
        layers=[compare_layer(name, [member.masks[name] for member in members]) for name in names],
        lines=[bench.line(a, b, given.points, predictions, bn_epoch) for a, b in routes],
        grid=grid(bench, members, names, budget, given.factors) if given.grid else None,
    )
    print(networks_table(results))
    print(pairs_tables(results.pairs), layers_table(results.layers), sep="\n")
    print(lines_table(results.lines))
    if results.grid:
        print(grid_table(results.grid, results.evaluated_on.part))
    write_json(folder.analysis, results)
    draw(results, folder.analysis.parent)
    print(f"all figures in {folder.analysis.parent}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line. What replaces a flag of the run is there only if it was given."""
    parser = flags.Parser(__doc__)
    parser.add_argument("run", type=flags.path, metavar="RUN", help="folder of a run made with --keep-tickets")
    again = parser.add_argument_group("superposing again", "what is not given is as it was in the run")
    again.add_argument(
        "--tickets", type=flags.non_negative, nargs="+", metavar="N",
        help="superpose these, starting from the first; 0 is the pre-trained network; without it, all",
    )  # fmt: skip
    again.add_argument("--superposing_method", choices=AVERAGING, default=argparse.SUPPRESS, help="the average")
    again.add_argument("--CIMA_factor", type=flags.rate, default=argparse.SUPPRESS, help="weight of a ticket in CIMA")
    again.add_argument(
        "--final-density", type=flags.density, default=argparse.SUPPRESS, help="prune every superposition to this"
    )
    again.add_argument(
        "--update_bn", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
        help="re-estimate the superpositions' BatchNorm statistics on the training data",
    )  # fmt: skip
    again.add_argument("--save-network", type=flags.path, metavar="FILE", help="write the last superposition there")
    many = parser.add_argument_group("many averages at once")
    many.add_argument(
        "--grid", action="store_true", help="also measure CAA, and CIMA with each of --factors, with and without BN"
    )
    many.add_argument(
        "--factors", type=flags.rate, nargs="+", metavar="F", default=[0.1, 0.25, 0.5, 0.75, 0.9],
        help="CIMA's, for --grid",
    )  # fmt: skip
    lines = parser.add_argument_group("straight lines between networks")
    lines.add_argument("--points", type=two_or_more, default=11, help="networks per line, both ends included")
    lines.add_argument(
        "--line-bn", action="store_true",
        help="re-estimate BatchNorm at every point; without it, its statistics are interpolated, as the weights are",
    )  # fmt: skip
    lines.add_argument(
        "--all-pairs", action="store_true",
        help="draw them between all networks, not only from ticket to next ticket and from each to the superposition",
    )  # fmt: skip
    place = parser.add_argument_group("place", "what is not given is as it was in the run")
    place.add_argument("--data", default=argparse.SUPPRESS, help="the run's data set, if its file has moved")
    place.add_argument(
        "--data-dir", type=flags.path, default=argparse.SUPPRESS, metavar="DIR", help="where downloads are"
    )
    place.add_argument("--no-cuda", action="store_true", default=argparse.SUPPRESS, help="compute on the CPU")
    return parser.parse_args(argv)


def two_or_more(text: str) -> int:
    """Parse the number of points of a line."""
    if (value := flags.positive(text)) < 2:
        raise argparse.ArgumentTypeError("a line has two ends: it is a whole number of at least 2")
    return value


# ---------------------------------------------------------------------------------------- the run, rebuilt


def rebuilt_flags(given: argparse.Namespace) -> tuple[RunFolder, argparse.Namespace]:
    """Find the run, and return its flags, those that the user gives anew in their place.

    Raises:
        UsageError: if there is no run, or more than one.
        FaultError: if the run's files are damaged.
    """
    found = find_runs([given.run])
    if len(found) > 1:
        raise UsageError(f"{given.run} holds {len(found)} runs: name one, such as {found[0]}")
    run = read_run(found[0])
    if missing := [name for name in ("data", "model") if name not in run.flags]:
        raise FaultError(f"{run.folder.config} is damaged or no run's of main_suptickets.py: {missing[0]} is missing")
    known = vars(main_suptickets.parse([]))
    kept = flags.restored(main_suptickets.make_parser(), run.flags, str(run.folder.config))
    anew = {name: value for name, value in vars(given).items() if name in known}
    return run.folder, argparse.Namespace(**{**known, **kept, **anew})


def kept_tickets(folder: RunFolder) -> list[int]:
    """Numbers of the tickets that a run kept, from 0, the pre-trained network.

    Raises:
        UsageError: if it kept none.
    """
    numbers = list(itertools.takewhile(lambda number: folder.ticket(number).is_file(), itertools.count()))
    if not numbers:
        raise UsageError(f"there is no file {folder.ticket(0)}: only runs with --keep-tickets keep their tickets")
    return numbers


class Network(NamedTuple):
    """A ticket, or what was superposed from tickets."""

    name: str
    state: State
    masks: dict[str, Tensor]  # of the maskable weights, bool
    epoch: int  # at whose end it, or the last ticket in it, was taken


@dataclass(frozen=True)
class Bench:
    """A run's model, data and number formats. Everything that is measured is measured here.

    Attributes:
        passes: of a model whose weights are those of whichever network was measured last.
        labels: of the evaluation set, [N].
    """

    passes: Passes
    data: Data
    labels: Tensor

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Bench":
        """Set up what a run with these flags computes with."""
        device, runtime = flags.runtime(args).start()
        data, model = main_suptickets.load(args, runtime, device)
        network: Any = torch.compile(model) if runtime.compile else model
        sparse = None
        if args.sparse and runtime.execution != "masked":
            sample_shape = (data.channels, data.image_size, data.image_size)
            flops = layer_flops(model, sample_shape) if runtime.execution == "auto" else None
            weights = maskable_parameters(model, args.rm_first, args.dense_layers or ())
            network = sparse = sparse_network(model, weights, layer_flops=flops)
        labels = torch.cat([batch.labels for batch in data.evaluation.epoch(0)])
        return cls(Passes(model, network, runtime.precision(), sparse=sparse), data, labels)

    def load_ticket(self, folder: RunFolder, number: int) -> Network:
        """Read a ticket that a run kept. A dense one counts as masked where its weights are zero.

        Raises:
            UsageError: if the run did not keep it, or it is another model's.
            FaultError: if the file is damaged.
        """
        path = folder.ticket(number)
        saved = SavedNetwork.read(path)
        load_weights(self.passes.model, vars(saved), path)
        state = self.passes.state()
        masks = {name: mask.to(self.passes.device) for name, mask in saved.masks.items()}
        masks = masks or nonzero(state, maskable_parameters(self.passes.model))
        return Network(ticket_name(number), state, masks, saved.epoch - 1)

    def logits(self, state: State) -> Tensor:
        """Predictions of a network, in eval mode, on the evaluation set in its stored order: [N, classes], float32."""
        self.passes.model.load_state_dict(state)
        self.passes.network.eval()
        return torch.cat([self.passes.predict(batch) for batch in self.data.evaluation.epoch(0)])

    def quality(self, logits: Tensor) -> Quality:
        """Accuracy in [0, 1], and mean loss per sample in nats."""
        hits = int((logits.argmax(dim=1) == self.labels).sum())
        return Quality(accuracy=hits / len(self.labels), loss=F.cross_entropy(logits, self.labels).item())

    def accuracy(self, network: Network) -> float:
        """Accuracy in [0, 1] of a network as it is."""
        return self.quality(self.logits(network.state)).accuracy

    def row(
        self, networks: Sequence[Network], predictions: Mapping[str, Tensor], maskable: Iterable[str]
    ) -> NetworkRow:
        """What one network is worth, or the ensemble of several: the mean of their logits."""
        logits = torch.stack([predictions[network.name] for network in networks]).mean(dim=0)
        weights = [network.state[name] for network in networks for name in maskable]
        quality = self.quality(logits)
        return NetworkRow(
            name=networks[0].name if len(networks) == 1 else ENSEMBLE,
            accuracy=quality.accuracy,
            loss=quality.loss,
            density=overall_density(weights),
            forward_passes=len(networks),
        )

    def with_fresh_bn(self, network: Network) -> Network:
        """Re-estimate BatchNorm on the very batches that the run used for this ticket's superposition."""
        return network._replace(state=self._fresh_bn(network.state, network.epoch))

    def line(
        self, a: Network, b: Network, points: int, predictions: Mapping[str, Tensor], bn_epoch: int | None = None
    ) -> Line:
        """Walk straight from one network to another, at equal distances; both ends count as points.

        The barrier is how far the walk gets, at worst, below (accuracy) or above (loss) the straight line between the
        figures of its two ends; 0: nowhere.

        Args:
            a: where ``share`` is 0.
            b: where ``share`` is 1.
            points: at least 2.
            predictions: the logits of both ends, by name.
            bn_epoch: epoch whose batches re-estimate BatchNorm at every point; None: its statistics are interpolated.
        """
        shares = [point / (points - 1) for point in range(points)]
        inner = (superpose(a.state, b.state, share) for share in shares[1:-1])
        ends = [predictions[a.name], predictions[b.name]]
        if bn_epoch is not None:
            inner = (self._fresh_bn(state, bn_epoch) for state in inner)
            ends = [self.logits(self._fresh_bn(network.state, bn_epoch)) for network in (a, b)]
        walk = [self.quality(logits) for logits in (ends[0], *map(self.logits, inner), ends[1])]
        accuracy, loss = [point.accuracy for point in walk], [point.loss for point in walk]
        return Line(
            from_=a.name,
            to=b.name,
            share=shares,
            accuracy=accuracy,
            loss=loss,
            accuracy_barrier=barrier(shares, [-value for value in accuracy]),
            loss_barrier=barrier(shares, loss),
        )

    def _fresh_bn(self, state: State, epoch: int) -> State:
        self.passes.model.load_state_dict(state)
        self.passes.re_estimate_bn(self.data.train.epoch(epoch))
        return self.passes.state()


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
            tried.append(Network(f"superposition {number}", union, masks, member.epoch))
        made.append(tried[0] if len(tried) == 1 else max(tried, key=accuracy))
        state = made[-1].state
    return made


def grid(
    bench: Bench, members: Sequence[Network], maskable: Sequence[str], budget: float | None, factors: Sequence[float]
) -> list[GridRow]:
    """Measure the last superposition by CAA, and by CIMA with every factor, without and with BN re-estimation."""
    rows = []
    for method, factor in [("CAA", None), *(("CIMA", factor) for factor in factors)]:
        averaging = AVERAGING[method](0.0 if factor is None else factor)
        network = superpose_again(members, averaging, maskable, budget, bench.accuracy)[-1]
        averaged, re_estimated = (
            bench.quality(bench.logits(candidate.state)) for candidate in (network, bench.with_fresh_bn(network))
        )
        row = GridRow(superposing_method=method, CIMA_factor=factor, bn_averaged=averaged, bn_re_estimated=re_estimated)
        rows.append(row)
    return rows


def is_saved_network(network: Network, path: Path) -> bool:
    """Whether a file holds this network, to the bit."""
    saved = SavedNetwork.read(path).state_dict if path.is_file() else {}
    state = network.state
    return saved.keys() == state.keys() and all(torch.equal(state[name].cpu(), saved[name]) for name in state)


# ---------------------------------------------------------------------------------------------- comparing


def nonzero(state: State, names: Iterable[str]) -> dict[str, Tensor]:
    """Masks of the named weights that are not zero."""
    return {name: state[name] != 0 for name in names}


def pairwise(compare: Callable[[Any, Any], float], items: Sequence[Any]) -> list[list[float]]:
    """Matrix of ``compare(row, column)``."""
    return [[compare(a, b) for b in items] for a in items]


def compare(networks: Sequence[Network], predictions: Mapping[str, Tensor]) -> Pairs:
    """How alike the structure and the predictions of networks are, as one matrix per measure."""
    logits = [predictions[network.name] for network in networks]
    return Pairs(
        overlap=pairwise(lambda a, b: jaccard(a.masks.values(), b.masks.values()), networks),
        disagreement=pairwise(disagreement, logits),
        kl=pairwise(kl_divergence, logits),
        names=[network.name for network in networks],
    )


def compare_layer(name: str, masks: Sequence[Tensor]) -> LayerRow:
    """Overlap of one layer's masks between all tickets; its mean over pairs, and that of random masks as dense.

    Random masks of densities d and e overlap in about d·e / (d + e - d·e).
    """
    densities = [int(mask.sum()) / mask.numel() for mask in masks]
    pairs = list(itertools.combinations(range(len(masks)), 2))
    overlap = pairwise(lambda a, b: jaccard([a], [b]), masks)
    chance = [d * e / (d + e - d * e) if d or e else 1.0 for d, e in itertools.combinations(densities, 2)]
    return LayerRow(
        name=name,
        weights=masks[0].numel(),
        densities=densities,
        overlap=overlap,
        mean_overlap=sum(overlap[i][j] for i, j in pairs) / len(pairs),
        chance=sum(chance) / len(chance),
    )


def jaccard(a: Iterable[Tensor], b: Iterable[Tensor]) -> float:
    """Weights active in both over weights active in either, over all the masks together; 1 if there are none."""
    shared = united = 0
    for one, other in zip(a, b, strict=True):
        shared += int((one & other).sum())
        united += int((one | other).sum())
    return shared / united if united else 1.0


def disagreement(a: Tensor, b: Tensor) -> float:
    """Share of the samples that two networks, by their logits [N, classes], put into different classes."""
    return int((a.argmax(dim=1) != b.argmax(dim=1)).sum()) / len(a)


def kl_divergence(a: Tensor, b: Tensor) -> float:
    """KL(a ‖ b) of the predicted distributions of two networks, by their logits [N, classes]; mean, in nats."""
    log_a, log_b = a.double().log_softmax(dim=1), b.double().log_softmax(dim=1)
    return F.kl_div(log_b, log_a, reduction="batchmean", log_target=True).item()


def barrier(shares: Sequence[float], values: Sequence[float]) -> float:
    """Largest rise of ``values`` above the straight line from the first to the last; at least 0."""
    first, last = values[0], values[-1]
    return max(0.0, *(value - (1 - share) * first - share * last for share, value in zip(shares, values, strict=True)))


def neighbours(ends: Sequence[Network]) -> list[tuple[Network, Network]]:
    """From each ticket to the next, then from each to the superposition, which is the last."""
    *members, final = ends
    return [*itertools.pairwise(members), *((member, final) for member in members)]


def draw(results: Analysis, out: Path) -> None:
    """Write the pictures, if matplotlib is there."""
    try:
        import ticket_plots
    except ModuleNotFoundError as error:
        print_notes(f"no pictures without {error.name}: pip install 'sparselearning[plots]'")
        return
    ticket_plots.save_all(results, out)


if __name__ == "__main__":
    run_script(main)
