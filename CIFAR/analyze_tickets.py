#!/usr/bin/env python3
"""Ask a finished run about its tickets: are they one network or several, and would another average have been better?

python3 analyze_tickets.py RUN
python3 analyze_tickets.py RUN --superposing_method CAA --tickets 1 2 3 --final-density 0.1 --no-update_bn
python3 analyze_tickets.py RUN --grid

RUN is the folder of a run made with --keep-tickets. Nothing is trained. Tables are printed; the same figures and their
pictures go to RUN/analysis/.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import main_suptickets
import torch
import torch.nn.functional as F
from cifar_data import Data, load_data
from cifar_models import build_model
from torch import Tensor, nn

from sparselearning import experiment, flags
from sparselearning.checkpoint import RunFolder, load_torch, save_torch, seed_everything, write_json
from sparselearning.engine import Precision
from sparselearning.errors import FaultError, UsageError
from sparselearning.masking import maskable_parameters
from sparselearning.superpose import AVERAGING, State, prune_to_density, superpose, update_bn

Matrix = list[list[float]]
ONE_BASIN = 0.02  # accuracy that a line may lose between networks of one basin (Frankle et al. 2020, sec. 3)


def main(argv: Sequence[str] | None = None) -> None:
    """Analyse one run."""
    given = parse(argv)
    folder = RunFolder(given.run)
    args = run_flags(folder, given)
    bench = Bench.of(args)
    numbers = given.tickets or kept_tickets(folder)
    members = [bench.load_ticket(folder.ticket(number), f"ticket {number}", args.rm_first) for number in numbers]
    if len(members) < 2:
        raise UsageError(f"superposing takes two tickets at least; {folder.path} has, or --tickets names, only one")
    density = args.final_density if args.sparse or "final_density" in given else None
    names = list(members[0].masks)

    weights = superpositions(members, AVERAGING[args.superposing_method](args.CIMA_factor), names, density)
    if args.update_bn:
        weights = [bench.fresh_statistics(*each) for each in zip(weights, (m.epoch for m in members[1:]), strict=True)]
    final = Member("superposition", weights[-1], nonzero_masks(weights[-1], names), members[-1].epoch)
    results: dict[str, Any] = {
        "run": str(folder.path),
        "evaluated_on": {"set": "held-out" if args.valid_split else "test", "images": len(bench.labels)},
        "settings": {
            "tickets": numbers,
            "superposing_method": args.superposing_method,
            "CIMA_factor": args.CIMA_factor if args.superposing_method == "CIMA" else None,
            "final_density": density,
            "update_bn": args.update_bn,
        },
        "same_as_run": same_state(final.state, load_torch(folder.previous)["state_dict"]),
    }

    member_logits = [bench.logits(member.state) for member in members]
    superposed_logits = [bench.logits(state) for state in weights]
    rows = [
        bench.row(member.name, logits, [member.state], names)
        for member, logits in zip(members, member_logits, strict=True)
    ]
    rows += [
        bench.row(f"superposition {n}", logits, [state], names)
        for n, (state, logits) in enumerate(zip(weights, superposed_logits, strict=True), start=1)
    ]
    ensemble = torch.stack(member_logits).mean(0)
    rows.append(bench.row("logit ensemble", ensemble, [member.state for member in members], names))
    results["networks"] = rows
    print(networks_table(results))

    everyone, logits = [*members, final], [*member_logits, superposed_logits[-1]]
    results["pairs"] = {
        "names": [member.name for member in everyone],
        "overlap": pairwise(lambda a, b: jaccard(a.values(), b.values()), [member.masks for member in everyone]),
        "disagreement": pairwise(disagreement, logits),
        "kl": pairwise(kl_divergence, logits),
    }
    results["layers"] = [layer_overlap(name, [member.masks[name] for member in members]) for name in names]
    print(pairs_tables(results["pairs"]), layers_table(results["layers"]), sep="\n")

    bn_epoch = members[-1].epoch if given.line_bn else None
    ends = itertools.combinations(everyone, 2) if given.all_pairs else neighbours(members, final)
    results["settings"] |= {"line_points": given.points, "line_bn": given.line_bn}
    results["lines"] = [bench.line(a, b, given.points, bn_epoch) for a, b in ends]
    print(lines_table(results["lines"]))

    if given.grid:
        results["grid"] = grid(bench, members, names, density, given.factors)
        print(grid_table(results["grid"], results["evaluated_on"]["set"]))

    if given.save_network:
        saved = {"state_dict": final.state, "masks": final.masks, "epoch": final.epoch + 1}
        save_torch(given.save_network, saved)
    out = folder.path / "analysis"
    write_json(out / "analysis.json", results)
    print(f"figures in {out / 'analysis.json'}; {draw(results, out)}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; flags of the run itself are only there if they were given."""
    parser = flags.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run made with --keep-tickets")
    again = parser.add_argument_group("superposing again", "what is not given is as it was in the run")
    parser.set_defaults(**dict.fromkeys(["tickets", "save_network"]))
    again.add_argument(
        "--tickets", type=flags.non_negative, nargs="+", metavar="N", default=argparse.SUPPRESS,
        help="superpose these, starting from the first; 0 is the pre-trained network; without: all",
    )  # fmt: skip
    again.add_argument("--superposing_method", choices=AVERAGING, default=argparse.SUPPRESS, help="the average")
    again.add_argument("--CIMA_factor", type=flags.rate, default=argparse.SUPPRESS, help="weight of a ticket in CIMA")
    again.add_argument(
        "--final-density", type=flags.density, default=argparse.SUPPRESS, help="budget to prune every superposition to"
    )
    again.add_argument(
        "--update_bn", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
        help="re-estimate BatchNorm statistics of the superpositions on the training data",
    )  # fmt: skip
    again.add_argument(
        "--save-network", type=Path, metavar="FILE", default=argparse.SUPPRESS,
        help="write the last superposition, laid out as model_previous.pth",
    )  # fmt: skip
    lines = parser.add_argument_group("straight lines between networks")
    lines.add_argument("--points", type=at_least_two, default=11, help="networks per line, its two ends included")
    lines.add_argument(
        "--line-bn", action="store_true",
        help="re-estimate BatchNorm at every point; without: running statistics are interpolated as the weights are",
    )  # fmt: skip
    lines.add_argument(
        "--all-pairs", action="store_true",
        help="between all networks; without: from ticket to next ticket, and from each to the superposition",
    )  # fmt: skip
    many = parser.add_argument_group("many averages at once")
    many.add_argument("--grid", action="store_true", help="CAA and CIMA with every factor, with and without BN")
    many.add_argument(
        "--factors", type=flags.rate, nargs="+", metavar="F", default=[0.1, 0.25, 0.5, 0.75, 0.9], help="CIMA's"
    )
    place = parser.add_argument_group("place", "what is not given is as it was in the run")
    place.add_argument("--data", default=argparse.SUPPRESS, help="the run's data set, if its .npz file has moved")
    place.add_argument("--data-dir", type=Path, default=argparse.SUPPRESS, metavar="DIR", help="where downloads are")
    place.add_argument("--no-cuda", action="store_true", default=argparse.SUPPRESS, help="stay on the CPU")
    return parser.parse_args(argv)


def at_least_two(text: str) -> int:
    """Parse a number of points."""
    if (value := flags.positive(text)) < 2:
        raise argparse.ArgumentTypeError("a line has two ends: give at least 2")
    return value


# ------------------------------------------------------------------------------------------- the run, rebuilt


def run_flags(folder: RunFolder, given: argparse.Namespace) -> argparse.Namespace:
    """Flags of the run, with those that the user gives anew in their place.

    Raises:
        UsageError: if the folder is no run's.
        FaultError: if its config.json is damaged.
    """
    if not folder.config.is_file():
        raise UsageError(f"{folder.path} is no folder of a run: it has no {folder.config.name}")
    try:
        recorded = json.loads(folder.config.read_text())["flags"]
    except (ValueError, KeyError, TypeError) as error:
        raise FaultError(f"{folder.config} is damaged: it is no JSON object with the run's flags") from error
    known = vars(main_suptickets.parse([]))
    return argparse.Namespace(**known | recorded | {k: v for k, v in vars(given).items() if k in known})


def kept_tickets(folder: RunFolder) -> list[int]:
    """Numbers of the tickets that the run kept, 0 (the pre-trained network) among them.

    Raises:
        UsageError: if it kept none.
    """
    numbers = list(itertools.takewhile(lambda number: folder.ticket(number).is_file(), itertools.count()))
    if not numbers:
        raise UsageError(f"{folder.ticket(0)} does not exist: tickets are kept by runs with --keep-tickets")
    return numbers


class Member(NamedTuple):
    """A network that is superposed, or that came of it."""

    name: str
    state: State
    masks: dict[str, Tensor]
    epoch: int  # at whose end it was taken


@dataclass(frozen=True)
class Bench:
    """A run's network, data and number formats: all evaluation is done here."""

    model: nn.Module
    data: Data
    precision: Precision
    device: torch.device
    labels: Tensor  # [N], of the evaluation set, in stored order

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Bench":
        """Rebuild what a run with these flags computes with."""
        runtime = flags.runtime(args)
        device = runtime.start()
        seed_everything(args.seed)
        data = load_data(
            args.data,
            data_dir=args.data_dir,
            batch_size=args.batch_size,
            test_batch_size=args.test_batch_size,
            valid_split=args.valid_split,
            seed=args.seed,
            device=device,
        )
        model = build_model(args.model, data.num_classes, data.channels, data.image_size).to(device)
        labels = torch.cat([batch.labels for batch in data.evaluation.epoch(0)])
        return cls(model, data, runtime.precision(device), device, labels)

    def load_ticket(self, path: Path, name: str, keep_first_dense: bool) -> Member:
        """Read a ticket that a run kept. The masks of a dense one are where it has weights.

        Raises:
            UsageError: if there is no such ticket, or it is another network's.
            FaultError: if the file is damaged.
        """
        saved = load_torch(path)
        if not {"state_dict", "masks", "epoch"} <= saved.keys():
            raise FaultError(f"{path} is no ticket that a run kept")
        experiment.load_weights(self.model, saved, path)
        state = self._state()
        masks = {name: mask.to(self.device) for name, mask in saved["masks"].items()}
        masks = masks or nonzero_masks(state, maskable_parameters(self.model, keep_first_dense))
        return Member(name, state, masks, saved["epoch"] - 1)

    @torch.no_grad()
    def logits(self, state: Mapping[str, Tensor]) -> Tensor:
        """Logits [N, classes] of the evaluation set, in eval mode."""
        self.model.load_state_dict(state)
        self.model.eval()
        with self.precision.context(self.device):
            return torch.cat([self.model(batch.images).float() for batch in self.data.evaluation.epoch(0)])

    def fresh_statistics(self, state: Mapping[str, Tensor], epoch: int) -> State:
        """Return the network with BatchNorm re-estimated on the batches that the run used for a ticket of ``epoch``."""
        self.model.load_state_dict(state)
        with self.precision.context(self.device):
            update_bn(self.data.train.epoch(epoch), self.model)
        return self._state()

    def row(self, name: str, logits: Tensor, states: Sequence[State], maskable: Sequence[str]) -> dict[str, Any]:
        """What one prediction is worth, and how many networks of which density it takes."""
        weights = [state[entry] for state in states for entry in maskable]
        non_zero = sum(int(weight.count_nonzero()) for weight in weights)
        return {
            "name": name,
            **self.quality(logits),
            "density": non_zero / sum(weight.numel() for weight in weights),
            "networks": len(states),
        }

    def quality(self, logits: Tensor) -> dict[str, float]:
        """Accuracy in [0, 1] and mean loss (nats) of predictions [N, classes]."""
        hits = int((logits.argmax(1) == self.labels).sum())
        return {"accuracy": hits / len(self.labels), "loss": F.cross_entropy(logits, self.labels).item()}

    def line(self, a: Member, b: Member, points: int, bn_epoch: int | None) -> dict[str, Any]:
        """Walk from one network straight to another, and find the barrier between them.

        The barrier is the largest gap below (accuracy) or above (loss) the straight line between what the two ends
        reach; 0 means that no point on the way is worse than that.

        Args:
            a, b: the ends.
            points: networks looked at, at equal distances, ends included.
            bn_epoch: re-estimate BatchNorm at every point, on this epoch's batches; None: interpolate it, too.
        """
        shares = [i / (points - 1) for i in range(points)]
        walk = []
        for share in shares:
            state = superpose(a.state, b.state, share)
            if bn_epoch is not None:
                state = self.fresh_statistics(state, bn_epoch)
            walk.append(self.quality(self.logits(state)))
        accuracy, loss = ([point[key] for point in walk] for key in ("accuracy", "loss"))
        return {
            "from": a.name,
            "to": b.name,
            "share": shares,
            "accuracy": accuracy,
            "loss": loss,
            "accuracy_barrier": max(-excess for excess in over_chord(shares, accuracy)),
            "loss_barrier": max(over_chord(shares, loss)),
        }

    def _state(self) -> State:
        return {name: entry.detach().clone() for name, entry in self.model.state_dict().items()}


# ----------------------------------------------------------------------------------------- superposing again


def superpositions(
    members: Sequence[Member], averaging: Callable[[int], float], maskable: Sequence[str], density: float | None
) -> list[State]:
    """Superpose the members one by one, as a run does; return the superposition after each but the first.

    BatchNorm statistics are averaged, not re-estimated: a later re-estimation forgets them, and weights do not depend
    on them, so that one list serves with and without.

    Args:
        members: the first is where the superposition starts; the others enter as tickets 1, 2, ….
        averaging: ticket number to its weight.
        maskable: names of the weights that the budget covers.
        density: the budget, in (0, 1]; None: no pruning.
    """
    state, made = members[0].state, []
    for number, member in enumerate(members[1:], start=1):
        state = superpose(state, member.state, averaging(number))
        if density is not None:
            state, _ = prune_to_density(state, maskable, density)
        made.append(state)
    return made


def grid(
    bench: Bench, members: Sequence[Member], maskable: Sequence[str], density: float | None, factors: Sequence[float]
) -> list[dict[str, Any]]:
    """Measure CAA, and CIMA with every factor, without and with BatchNorm re-estimation."""
    rows = []
    for method, factor in [("CAA", None), *(("CIMA", factor) for factor in factors)]:
        state = superpositions(members, AVERAGING[method](factor or 0.0), maskable, density)[-1]
        for fresh in (False, True):
            network = bench.fresh_statistics(state, members[-1].epoch) if fresh else state
            rows.append({"method": method, "factor": factor, "update_bn": fresh, **bench.quality(bench.logits(network))})
    return rows


# ------------------------------------------------------------------------------------------------- comparing


def nonzero_masks(state: Mapping[str, Tensor], names: Sequence[str] | Mapping[str, Any]) -> dict[str, Tensor]:
    """Where the named weights are not zero."""
    return {name: state[name] != 0 for name in names}


def same_state(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two networks are the same to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name].cpu(), b[name].cpu()) for name in a)


def pairwise(compare: Callable[[Any, Any], float], items: Sequence[Any]) -> Matrix:
    """``compare(row, column)`` of all pairs."""
    return [[compare(a, b) for b in items] for a in items]


def jaccard(a: "Iterator[Tensor] | Sequence[Tensor]", b: "Iterator[Tensor] | Sequence[Tensor]") -> float:
    """Weights that are active in both, over those active in either; 1 if there are none."""
    both = either = 0
    for one, other in zip(a, b, strict=True):
        both += int((one & other).sum())
        either += int((one | other).sum())
    return both / either if either else 1.0


def layer_overlap(name: str, masks: Sequence[Tensor]) -> dict[str, Any]:
    """Jaccard of one layer between all tickets, its mean over their pairs, and what random masks would reach.

    Random masks of densities d and e share d·e of the weights: they reach about d·e / (d + e - d·e).
    """
    density = [int(mask.sum()) / mask.numel() for mask in masks]
    chances = [d * e / (d + e - d * e) if d or e else 1.0 for d, e in itertools.combinations(density, 2)]
    overlaps = [jaccard([a], [b]) for a, b in itertools.combinations(masks, 2)]
    return {
        "name": name,
        "weights": masks[0].numel(),
        "density": density,
        "overlap": pairwise(lambda a, b: jaccard([a], [b]), masks),
        "mean_overlap": sum(overlaps) / len(overlaps),
        "chance": sum(chances) / len(chances),
    }


def disagreement(a: Tensor, b: Tensor) -> float:
    """Share of samples that two networks (logits [N, classes]) put into different classes."""
    return int((a.argmax(1) != b.argmax(1)).sum()) / len(a)


def kl_divergence(a: Tensor, b: Tensor) -> float:
    """KL(a ‖ b) between the predicted distributions (logits [N, classes]), in nats, mean over samples."""
    log_a, log_b = a.double().log_softmax(1), b.double().log_softmax(1)
    return F.kl_div(log_b, log_a, reduction="batchmean", log_target=True).item()


def over_chord(shares: Sequence[float], values: Sequence[float]) -> list[float]:
    """How far each value stands above the straight line from the first to the last."""
    first, last = values[0], values[-1]
    return [value - ((1 - share) * first + share * last) for share, value in zip(shares, values, strict=True)]


def neighbours(members: Sequence[Member], final: Member) -> list[tuple[Member, Member]]:
    """Lines from each ticket to the next, then from each to the superposition."""
    return [*itertools.pairwise(members), *((member, final) for member in members)]
