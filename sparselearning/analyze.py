"""Ask a run about its tickets: do they lie in one basin, and would another average have been better?

python -m sparselearning.analyze RUN
python -m sparselearning.analyze RUN --superposing_method CAA --tickets 1 2 3 --final-density 0.1 --no-update_bn
python -m sparselearning.analyze RUN --grid --corruptions --on test

RUN is the folder of a run made with --keep-tickets; of plain training, which has no tickets, its network is measured.
So is the moving average of the weights, of runs with --ema. Nothing is trained. The tables that are printed, and
pictures of them, also go to RUN/analysis/. It computes in one process: of a run in several, which re-estimated
BatchNorm on other batches, superpositions come out nearly equal.
"""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

from sparselearning.process import arguments
from sparselearning.process.errors import UsageError
from sparselearning.process.files import check_output, write_json
from sparselearning.process.script import run_script
from sparselearning.reporting.analysis import MOVING_AVERAGE, Analysis, EvaluatedOn, Settings
from sparselearning.reporting.analysis_tables import (
    grid_table,
    layers_table,
    lines_table,
    networks_table,
    pairs_tables,
)
from sparselearning.reporting.bench import (
    Bench,
    as_it_is,
    compare,
    grid,
    is_saved_network,
    kept_tickets,
    neighbours,
    superpose_again,
)
from sparselearning.reporting.comparisons import compare_layer
from sparselearning.reporting.corruptions import CORRUPTIONS
from sparselearning.reporting.runs import Run, find_runs, read_run
from sparselearning.sparse.layers import maskable_parameters
from sparselearning.sparse.superpose import AVERAGING, chooses
from sparselearning.training import from_flags, kept_flags
from sparselearning.training.networks import SavedNetwork
from sparselearning.training.progress import print_notes
from sparselearning.training.scripts import Script, script_of

MADE_BY = "analyze_tickets.py"
"""Mark in the files of ``--save-network``: the former name of this command."""


def main(argv: Sequence[str] | None = None, otherwise: Script | None = None) -> None:
    """Analyse one run.

    Args:
        argv: the command line.
        otherwise: script of runs whose ``config.json`` leads to none, as those of early versions.

    Raises:
        UsageError: if there is no such run, or it cannot be asked this.
        FaultError: if one of its files is damaged.
    """
    given = parse(argv)
    if given.save_network:
        check_output(given.save_network, MADE_BY)
    run, script, args = rebuilt_flags(given, otherwise)
    folder = run.folder
    device, runtime = from_flags.runtime(args).start()
    setup = script.set_up(args, runtime, device)
    if chooses(args.superposing_method) and setup.sources.test is None:
        raise UsageError(
            f"--superposing_method {args.superposing_method} chooses by accuracy on held-out training images, and the "
            f"run in {folder.path} held none out (--valid_split)"
        )
    masked = maskable_parameters(setup.model, args.rm_first, args.dense_layers or ()) if args.sparse else {}
    bench = Bench.of(setup, runtime, masked, on_test_set=given.on == "test", corruptions=given.corruptions)
    numbers = given.tickets or kept_tickets(folder)
    members = bench.load_tickets(folder, numbers)
    if len(members) < 2 and not run.is_plain:
        raise UsageError(f"superposing takes at least two tickets, and there is one: ticket {numbers[0]}")
    names = list(members[0].masks)
    budget = args.final_density if args.sparse or "final_density" in given else None
    averaging = AVERAGING[args.superposing_method](args.CIMA_factor)
    finish = bench.with_fresh_bn if args.update_bn else as_it_is
    superposed = superpose_again(members, averaging, names, budget, lambda made: bench.held_out_accuracy(finish(made)))
    superposed = [finish(network) for network in superposed]
    final = superposed[-1] if superposed else members[-1]
    if given.save_network:
        SavedNetwork(final.state, final.masks, final.epoch + 1).write(given.save_network, MADE_BY)

    averages = [bench.load(folder.ema, MOVING_AVERAGE)] if folder.ema.is_file() else []
    predictions = {network.name: bench.predict(network.state) for network in [*members, *superposed, *averages]}
    ends = [*members, *superposed[-1:]]
    routes = itertools.combinations(ends, 2) if given.all_pairs else neighbours(ends)
    bn_epoch = members[-1].epoch if given.line_bn else None
    results = Analysis(
        run=str(folder.path),
        evaluated_on=EvaluatedOn(part=bench.measured.part, images=len(bench.measured.labels)),
        settings=Settings(
            tickets=numbers,
            superposing_method=args.superposing_method,
            CIMA_factor=args.CIMA_factor if args.superposing_method == "CIMA" else None,
            final_density=budget,
            update_bn=args.update_bn,
            line_bn=given.line_bn,
        ),
        same_as_run=is_saved_network(final, folder.previous),
        networks=[
            *(bench.row([network], predictions, names) for network in [*members, *superposed]),
            *([bench.row(members, predictions, names)] if superposed else []),
            *(bench.row([network], predictions, names) for network in averages),
        ],
        pairs=compare(ends, predictions),
        layers=[compare_layer(name, [member.masks[name] for member in members]) for name in names if superposed],
        lines=[bench.line(a, b, given.points, predictions, bn_epoch) for a, b in routes],
        grid=grid(bench, members, names, budget, given.factors) if given.grid and superposed else None,
    )
    print(networks_table(results))
    if superposed:
        print(pairs_tables(results.pairs), layers_table(results.layers), sep="\n")
        print(lines_table(results.lines))
    if results.grid:
        print(grid_table(results.grid, results.evaluated_on.part))
    write_json(folder.analysis, results)
    draw(results, folder.analysis.parent)
    print(f"all figures in {folder.analysis.parent}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line. What replaces a flag of the run is there only if it was given."""
    parser = arguments.Parser(__doc__)
    parser.prog = "python -m sparselearning.analyze"
    parser.add_argument("run", type=arguments.path, metavar="RUN", help="folder of a run made with --keep-tickets")
    parser.add_argument(
        "--on", choices=["evaluation", "test"], default="evaluation",
        help="evaluation: measure on what the run evaluated on, the images that it held out (--valid_split) or else "
        "the test set; test: on the test set. Choices are always made on images held out",
    )  # fmt: skip
    parser.add_argument(
        "--corruptions", action="store_const", const=tuple(CORRUPTIONS), default=(),
        help=f"also measure accuracy on these images with {', '.join(CORRUPTIONS)} (deterministic, of one severity)",
    )  # fmt: skip
    again = parser.add_argument_group("superposing again", "what is not given is as it was in the run")
    again.add_argument(
        "--tickets", type=arguments.non_negative, nargs="+", metavar="N",
        help="superpose these, starting from the first; 0 is the pre-trained network; without it, all",
    )  # fmt: skip
    again.add_argument("--superposing_method", choices=AVERAGING, default=argparse.SUPPRESS, help="the average")
    again.add_argument(
        "--CIMA_factor", type=arguments.rate, default=argparse.SUPPRESS, help="weight of a ticket in CIMA"
    )
    again.add_argument(
        "--final-density", type=arguments.density, default=argparse.SUPPRESS, help="prune every superposition to this"
    )
    again.add_argument(
        "--update_bn", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
        help="re-estimate the superpositions' BatchNorm statistics on the training data",
    )  # fmt: skip
    again.add_argument("--save-network", type=arguments.path, metavar="FILE", help="write the last superposition there")
    many = parser.add_argument_group("many averages at once")
    many.add_argument(
        "--grid", action="store_true",
        help="also measure, with and without BN, CAA, CIMA with each of --factors and, if images were held out, greedy",
    )  # fmt: skip
    many.add_argument(
        "--factors", type=arguments.rate, nargs="+", metavar="F", default=[0.1, 0.25, 0.5, 0.75, 0.9],
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
        "--data-dir", type=arguments.path, default=argparse.SUPPRESS, metavar="DIR", help="where downloads are"
    )
    place.add_argument("--no-cuda", action="store_true", default=argparse.SUPPRESS, help="compute on the CPU")
    return parser.parse_args(argv)


REPLACED = {"superposing_method", "CIMA_factor", "final_density", "update_bn", "data", "data_dir", "no_cuda"}
"""Flags of the run that the command line may replace."""


def two_or_more(text: str) -> int:
    """Parse the number of points of a line."""
    if (value := arguments.positive(text)) < 2:
        raise argparse.ArgumentTypeError("a line has two ends: it is a whole number of at least 2")
    return value


def rebuilt_flags(given: argparse.Namespace, otherwise: Script | None) -> tuple[Run, Script, argparse.Namespace]:
    """Find the run and its script, and return its flags, with those that the user replaces.

    Raises:
        UsageError: if there is no run, or more than one, or its script has no such flag.
        FaultError: if the run's files are damaged.
    """
    found = find_runs([given.run])
    if len(found) > 1:
        raise UsageError(f"{given.run} holds {len(found)} runs: name one, such as {found[0]}")
    run = read_run(found[0])
    source = run.folder.config
    config = run.folder.read_config()
    script = otherwise if otherwise and "network" not in config else script_of(config, source)
    parser = script.make_parser()
    anew = {name: value for name, value in kept_flags.values(given).items() if name in REPLACED}
    known = {action.dest for action in parser._actions}
    if unknown := [name for name in anew if name not in known]:
        raise UsageError(f"the script of the run in {run.folder.path} has no flag {unknown[0]} to replace")
    return run, script, kept_flags.of_run(parser, {**run.flags, **anew}, str(source))


def draw(results: Analysis, out: Path) -> None:
    """Write the pictures, if matplotlib is there."""
    try:
        from sparselearning.reporting.analysis_plots import save_all
    except ModuleNotFoundError as error:
        print_notes(f"no pictures without {error.name}: pip install 'sparselearning[plots]'")
        return
    save_all(results, out)


if __name__ == "__main__":
    run_script(main)
