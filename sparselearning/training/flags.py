"""The command-line flags that both scripts share, their checks, and what they mean to the library."""

import argparse
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from sparselearning import execution
from sparselearning.process.arguments import (
    Group,
    Parser,
    between_zero_and_one,
    density,
    marked,
    non_negative,
    non_negative_float,
    path,
    positive,
    rate,
    seed,
)
from sparselearning.process.errors import FaultError, UsageError
from sparselearning.process.files import read_json
from sparselearning.process.schema import FlagValue, read, shown
from sparselearning.sparse.schedules import DECAYS, check_densities, check_window
from sparselearning.sparse.sparse_init import SPARSE_INITS, check_shares_density
from sparselearning.sparse.superpose import AVERAGING, chooses
from sparselearning.sparse.topology import GROWTH, METHODS, PRUNE, REDISTRIBUTION, check_momentum, chosen_modes
from sparselearning.training import experiment, preview, provenance
from sparselearning.training.experiment import SparseTraining
from sparselearning.training.plan import EpochBudget, Plan
from sparselearning.training.records import flags_of
from sparselearning.training.run_folder import RunFolder
from sparselearning.training.runtime import AMP, Runtime
from sparselearning.training.trackers import TensorBoard, Tracker, WeightsAndBiases

MARKS = NO_EFFECT, OF_ONE_CALL, ABOUT_MASKS, ABOUT_TICKETS = "no effect", "of one call", "about masks", "about tickets"
"""Marks of flags.

``NO_EFFECT``: changes where a run's files are, what it shows, or how much it evaluates at a time, not what it computes
(but for rounding), so that a resumed run may differ in it. Reports count ``--resume`` where it names first weights.
``OF_ONE_CALL``: ``--config`` does not take it over: where files were, what a run resumed, how it was started.
``ABOUT_MASKS``: without effect on dense training. ``ABOUT_TICKETS``: without effect on plain training.
"""

LOOK = "what a run would do"
DATA = "data and network"
TRAINING = "length, batches, learning rate, seeds"
MASKS = "which weights are active"
UPDATES = "how masks change"
TICKETS = "cheap tickets and their superposition"
FILES = "files and figures"
SPEED = "devices, number formats, speed"
EXAMPLES = {
    LOOK: ("what a sparse run would do", "--pre_train --sparse --final-prune-epoch 60 --dry-run"),
    DATA: ("dense training", "--pre_train"),
    TRAINING: ("dense training of twice the length", "--pre_train --lr 0.05 --multiplier 2"),
    MASKS: (
        "static sparse training, the first layer dense",
        "--pre_train --sparse --method DST --fix --init-density 0.1 --final-density 0.1 --rm-first",
    ),
    UPDATES: (
        "RigL at density 0.1",
        "--pre_train --sparse --method DST --growth gradient --init-density 0.1 --final-density 0.1",
    ),
    TICKETS: (
        "GraNet, then a ticket every other epoch",
        "--pre_train --cyclic_train --sparse --method GraNet --final-prune-epoch 60 --cycle 2 --cyc_lr --lr_1 0.001 "
        "--lr_2 0.05 --update_bn",
    ),
    FILES: ("a folder of one's own choice", "--pre_train --sparse --final-prune-epoch 60 --save runs/first"),
    SPEED: (
        "active weights alone, on a CPU",
        "--pre_train --sparse --final-prune-epoch 60 --no-cuda --execution sparse",
    ),
}
"""Group of flags, in the order of ``--help``, to an example: what it does, and its flags."""


def layer_density(text: str) -> str:
    """Check a pattern of layers and their density, ``GLOB=D``."""
    pattern, equals, value = text.rpartition("=")
    if not (pattern and equals):
        raise argparse.ArgumentTypeError(f"it is written GLOB=D, such as fc=0.1, not {text!r}")
    density(value)
    return text


class RunParser(Parser):
    """Parser of a script that trains: its flags are in the groups of :data:`EXAMPLES`.

    Args:
        doc: as of :class:`Parser`.
        start: what the command lines of the examples begin with.
    """

    def __init__(self, doc: str | None, start: str) -> None:
        super().__init__(doc, usage="python %(prog)s [flags]")
        for title, (does, example) in EXAMPLES.items():
            self.add_argument_group(title, f"{does}:\npython %(prog)s {start} {example}")


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Flags about the run as a whole: seed, files, device, number formats."""
    group = Group(parser, LOOK, NO_EFFECT).either()
    group.add_argument(
        "--dry-run", action="store_true",
        help="check data, flags, --resume and folder, print the plan (epochs, updates, density, FLOPs, time "
        "estimated from three steps), and stop; nothing is written",
    )  # fmt: skip
    group.add_argument(
        "--show-layers", action="store_true",
        help="print every layer's shape, density now and at the end, and FLOPs, and stop",
    )  # fmt: skip
    group = Group(parser, LOOK, NO_EFFECT, OF_ONE_CALL)
    group.add_argument(
        "--config", type=path, metavar="FILE",
        help="take the flags of an earlier run from its config.json, but for --save and --resume; those on the command "
        "line take precedence",
    )  # fmt: skip
    group = Group(parser, TRAINING)
    group.add_argument(
        "--multiplier",
        type=positive,
        default=1,
        help="factor for all counts of epochs, milestones and warm-up included, but not for --cycle",
    )
    group.add_argument("--seed", type=seed, default=17, help="of weights, masks, data order and augmentation")
    group = Group(parser, TICKETS)
    group.add_argument(
        "--ema", type=between_zero_and_one, metavar="DECAY",
        help="a baseline beside superposing: also measure, at the end, the exponential moving average of every step's "
        "weights, pruned to the budget and with BatchNorm re-estimated",
    )  # fmt: skip
    group = Group(parser, FILES, NO_EFFECT)
    group.add_argument(
        "--indicate_method", default="Results", metavar="NAME", help="name of the run: in its path and in reports"
    )
    group = Group(parser, FILES, NO_EFFECT, OF_ONE_CALL)
    group.add_argument("--save", type=path, metavar="DIR", help="where the run's files go, in place of saved_models/…")
    group.add_argument(
        "--resume", type=path, metavar="PATH",
        help="resume from a checkpoint.pth or a run's folder; for --cyclic_train alone and for --sparse-init resume "
        "and prune_*, any saved .pth to start from",
    )  # fmt: skip
    group = Group(parser, FILES, NO_EFFECT)
    group.add_argument("--keep-tickets", action="store_true", help="save every ticket, in tickets/ of the run's folder")
    group.add_argument("--tensorboard", type=path, metavar="DIR", help="write TensorBoard scalars there as well")
    group.add_argument(
        "--wandb", metavar="PROJECT",
        help="send curves, tickets, flags and summary to this project of Weights & Biases as well; with "
        "WANDB_MODE=offline in the environment they stay in a file",
    )  # fmt: skip
    group = Group(parser, SPEED)
    group.add_argument("--no-cuda", action="store_true", help="train on the CPU even if there is a GPU")
    group.add_argument(
        "--amp", choices=["auto", *AMP],
        help="number format of forward passes; auto: bf16 on a GPU that has it, else off (float32) (default: auto)",
    )  # fmt: skip
    group.add_argument(
        "--fp16", action="store_true", help="the same as --amp fp16: float16 with loss scaling, on a GPU"
    )
    group.add_argument(
        "--channels-last", action=argparse.BooleanOptionalAction, default=True,
        help="channels-last memory format of images and convolutions, in which most are faster",
    )  # fmt: skip
    group.add_argument(
        "--execution", choices=execution.EXECUTIONS, default="auto",
        help="masked multiplies by the zeros of inactive weights; sparse computes with active ones alone, on CPUs; "
        "auto is what is faster by shapes and densities, always masked on a GPU",
    )  # fmt: skip
    group.add_argument(
        "--compile", action="store_true", help="compile the network's passes: slower start, faster steps"
    )
    group.add_argument(
        "--tf32", action=argparse.BooleanOptionalAction, default=True,
        help="let a GPU round the inputs of float32 products to TensorFloat-32",
    )  # fmt: skip
    group.add_argument(
        "--deterministic", action="store_true", help="only algorithms with bit-identical results on a GPU too (slower)"
    )


def add_sparse_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of sparse training: masks, topology updates, densities."""
    methods = "; ".join(f"{name}: {method.about}" for name, method in METHODS.items())
    group = Group(parser, MASKS, ABOUT_MASKS)
    group.add_argument("--sparse", action="store_true", help="train with masks; without it training is dense")
    group.add_argument(
        "--sparse-init", choices=SPARSE_INITS, default="ERK",
        help="how the first masks are drawn; cycles alone take the pattern of the loaded weights, but for prune_*",
    )  # fmt: skip
    group.add_argument("--init-density", type=density, default=0.5, help="share of active weights at the start")
    group.add_argument(
        "--final-density", type=density, default=0.05,
        help="share that GraNet and GMP end at, and that every superposition is pruned back to",
    )  # fmt: skip
    group.add_argument("--rm-first", action="store_true", help="keep the first layer dense, outside the masks")
    group.add_argument(
        "--dense-layers", nargs="+", metavar="GLOB",
        help="keep the layers dense whose names match, such as fc or 'layer4.*' (--show-layers lists names)",
    )  # fmt: skip
    group.add_argument(
        "--layer-density", nargs="+", type=layer_density, metavar="GLOB=D",
        help="density of the layers that match at the start; the others share what is left of --init-density",
    )  # fmt: skip
    group.add_argument(
        "--pruning-rate", type=rate, default=0.5, help="share of the trained weights that --sparse-init prune_* drops"
    )
    group = Group(parser, UPDATES, ABOUT_MASKS)
    group.add_argument(
        "--method", choices=METHODS, default="GraNet", help=f"what happens at a topology update. {methods}"
    )
    group.add_argument("--prune", choices=PRUNE, default="magnitude", help="which weights an update removes")
    group.add_argument("--growth", choices=GROWTH, default="gradient", help="which weights an update grows")
    group.add_argument(
        "--redistribution", choices=REDISTRIBUTION, default="none",
        help="how the removed weights are shared out over layers; none: a layer regrows what it lost",
    )  # fmt: skip
    group.add_argument(
        "--prune-rate", type=rate, default=0.5, help="share of a layer's active weights that an update removes"
    )
    group.add_argument(
        "--decay-schedule", choices=DECAYS, default="cosine", help="how the prune rate falls over the whole run"
    )
    group.add_argument(
        "--update-frequency", type=positive, default=100, metavar="STEPS", help="steps from one update to the next"
    )
    group.add_argument(
        "--init-prune-epoch", type=non_negative, default=0, metavar="EPOCH", help="gradual pruning starts here"
    )
    group.add_argument(
        "--final-prune-epoch", type=non_negative, default=110, metavar="EPOCH",
        help="gradual pruning reaches the final density here",
    )  # fmt: skip
    group.add_argument(
        "--final-update-epoch", type=non_negative, metavar="EPOCH",
        help="updates prune and grow in the epochs before this one only; gradual pruning and --re_explore "
        "continue (default: in all)",
    )  # fmt: skip
    group.add_argument("--fix", action="store_true", help="freeze the topology: static sparse training")


def add_ticket_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of cheap tickets and their superposition."""
    group = Group(parser, TICKETS, ABOUT_TICKETS)
    group.add_argument("--pre_train", action="store_true", help="do the pre-training part of the run")
    group.add_argument("--cyclic_train", action="store_true", help="do the cycles, each of which ends in a ticket")
    group.add_argument("--cycle", type=positive, default=8, metavar="EPOCHS", help="length of a cycle")
    group.add_argument(
        "--cyc_lr", action="store_true", help="cyclic learning rate in the cycles; without it, the last rate"
    )
    group.add_argument(
        "--lr_1", type=non_negative_float, default=0.05,
        help="learning rate at both ends of a cycle, where the ticket is taken (not the maximum, unless it is larger)",
    )  # fmt: skip
    group.add_argument("--lr_2", type=non_negative_float, default=0.0001, help="learning rate in the middle of a cycle")
    group.add_argument(
        "--re_explore", action="store_true", help="start each cycle with one large prune-and-grow (--large-death-rate)"
    )
    group = Group(parser, TICKETS, ABOUT_TICKETS, ABOUT_MASKS)
    group.add_argument(
        "--large-death-rate",
        type=rate,
        default=0.8,
        help="share of every layer's active weights that --re_explore prunes and grows",
    )
    group = Group(parser, TICKETS, ABOUT_TICKETS)
    group.add_argument("--no_maskupdates", action="store_true", help="stop the periodic topology updates in the cycles")
    group.add_argument(
        "--superposing_method", choices=AVERAGING, default="CIMA",
        help="CIMA: each new ticket enters with weight --CIMA_factor; CAA: all members weigh the same; greedy: the "
        "factor that is best on the images that --valid_split holds out",
    )  # fmt: skip
    group.add_argument("--CIMA_factor", type=rate, default=0.5, help="weight of the new ticket in CIMA")
    group.add_argument(
        "--update_bn", "--bn_update", dest="update_bn", action="store_true",
        help="re-estimate the superposition's BatchNorm statistics on the training data",
    )  # fmt: skip


@cache
def _shared() -> Parser:
    """The flags that all scripts share."""
    parser = Parser(None)
    for add_flags in (add_run_flags, add_sparse_flags, add_ticket_flags):
        add_flags(parser)
    return parser


def own_marks(parser: argparse.ArgumentParser) -> dict[str, list[str]]:
    """Mark to names of the flags that a script itself declares, for ``config.json``: reports do not see its parser."""
    return {mark: sorted(marked(parser, mark) - marked(_shared(), mark)) for mark in MARKS}


def names_with(mark: str, own: Mapping[str, Sequence[str]]) -> set[str]:
    """Names of a run's flags that have a mark, its script's :func:`own_marks` among them."""
    return marked(_shared(), mark).union(own.get(mark, ()))


def check(args: argparse.Namespace, momentum_is_zero: bool, has_weights: bool) -> list[str]:
    """Refuse contradictory flags before anything is trained or written; return warnings about suspicious ones.

    Args:
        args: the command line.
        momentum_is_zero: whether the optimizer that it asks for keeps no momentum.
        has_weights: whether it names weights to start from.

    Raises:
        UsageError: one sentence about the first contradiction.
    """
    warnings: list[str] = []
    if args.execution == "sparse":
        if not args.sparse:
            raise UsageError("--execution sparse is about masks: give --sparse as well")
        if args.compile or args.fp16 or args.amp not in (None, "auto", "off"):
            raise UsageError(
                "--execution sparse computes in float32 and is not compiled: leave out --compile and --amp"
            )
        execution.check_available("--execution sparse")
    if chooses(args.superposing_method) and not getattr(args, "valid_split", 0):
        has_flag = hasattr(args, "valid_split")
        how = "give --valid_split SHARE" if has_flag else "this script evaluates on its validation set alone"
        raise UsageError(
            f"--superposing_method {args.superposing_method} chooses by accuracy on held-out training images: {how}"
        )
    if args.fp16 and args.amp not in (None, "fp16"):
        raise UsageError(f"--fp16 means --amp fp16, which contradicts --amp {args.amp}")
    if not (args.pre_train or args.cyclic_train):
        raise UsageError("nothing to do: give --pre_train, --cyclic_train, or both")
    if args.cyclic_train and not args.pre_train and not has_weights:
        raise UsageError("--cyclic_train alone needs trained weights to start from: give --resume PATH or --pre_train")
    if not args.sparse:
        for flag in ("re_explore", "no_maskupdates"):
            if getattr(args, flag):
                raise UsageError(f"--{flag} is about masks: give --sparse as well")
        return warnings
    if args.execution == "auto" and not execution.is_available():
        warnings.append("masks save no time on a CPU without the package that compiles kernels: pip install numba")
    if args.fix and args.re_explore:
        raise UsageError("--fix freezes the topology and --re_explore changes it: give one of them")
    if SPARSE_INITS[args.sparse_init].needs_trained_weights and not has_weights:
        raise UsageError(f"--sparse-init {args.sparse_init} starts from trained weights: give --resume PATH")
    if layer_densities(args):
        if not args.pre_train:
            raise UsageError("--layer-density is about the masks that pre-training starts with: give --pre_train too")
        check_shares_density(args.sparse_init, ("--layer-density", "--sparse-init"))
    if args.final_update_epoch is not None and (args.fix or not METHODS[args.method].grows):
        never = "--fix freezes the topology" if args.fix else f"{args.method} only prunes"
        warnings.append(f"{never}: --final-update-epoch has no effect")
    modes = chosen_modes(args.prune, args.growth, args.redistribution)
    check_momentum(modes, not momentum_is_zero, needed="a --momentum above 0")
    check_window(args.init_prune_epoch, args.final_prune_epoch, unit="epoch")
    if METHODS[args.method].shrink:
        check_densities(args.method, args.init_density, args.final_density, ("--init-density", "--final-density"))
        if args.init_density == args.final_density and METHODS[args.method].grows:
            warnings.append(
                f"{args.method} has nothing to prune at --init-density = --final-density = {args.final_density}: "
                "it trains as DST does; GraNet usually starts at 0.5"
            )
        if args.fix and args.init_density != args.final_density:
            warnings.append(f"--fix stops {args.method}'s gradual pruning: the density stays at --init-density")
        if args.sparse_init == "GMP" and args.init_density != 1:
            warnings.append(
                f"--sparse-init GMP starts dense, but the pruning schedule at --init-density {args.init_density}: "
                "give --init-density 1 for a schedule from dense"
            )
    elif args.pre_train and not SPARSE_INITS[args.sparse_init].needs_trained_weights:  # else the weights decide
        if args.sparse_init == "GMP":
            warnings.append(
                "--sparse-init GMP starts dense and DST stays so; only the superposition is cut to the budget"
            )
        elif args.init_density != args.final_density:
            warnings.append(
                f"DST keeps --init-density {args.init_density}; only the superposition is cut to --final-density "
                f"{args.final_density}. For gradual pruning give --method GraNet"
            )
    return warnings


def without_masks_note(args: argparse.Namespace, parser: Parser, argv: Sequence[str] | None) -> list[str]:
    """Tell the user which of the given flags have no effect on dense training."""
    if args.sparse:
        return []
    about_masks = marked(parser, ABOUT_MASKS)
    if without_effect := [flag for name, flag in parser.given(argv).items() if name in about_masks]:
        return [f"training is dense without --sparse, so that these have no effect: {', '.join(without_effect)}"]
    return []


def pruning_window_warning(args: argparse.Namespace, pretrain_epochs: int) -> list[str]:
    """Warn about gradual pruning that ends after pre-training."""
    end = args.final_prune_epoch * args.multiplier
    if not (args.sparse and METHODS[args.method].shrink and end > pretrain_epochs):
        return []
    return [f"gradual pruning ends at epoch {end}, after pre-training, which ends at epoch {pretrain_epochs}"]


def check_budget(args: argparse.Namespace, budget: EpochBudget) -> list[str]:
    """Warn if the cyclic part is shorter than one cycle.

    Raises:
        UsageError: if nothing is left to do.
    """
    cycle = f"{budget.cycle_epochs} epoch{'s' * (budget.cycle_epochs > 1)}"
    if not budget.total_epochs:
        raise UsageError("nothing to do: pre-training and cycles have no epochs at all")
    if not args.pre_train and not budget.tickets:
        raise UsageError(f"nothing to do: the cyclic part is shorter than one cycle ({cycle})")
    if not args.cyclic_train and not budget.pretrain_epochs:
        raise UsageError(
            "nothing to do: no epochs are left for pre-training beside the cycles, and they are not asked for"
        )
    if not args.cyclic_train or budget.tickets:
        return []
    return [f"the cyclic part is shorter than one cycle ({cycle}): all epochs pre-train, no tickets"]


def layer_densities(args: argparse.Namespace) -> dict[str, float]:
    """Pattern to density, as ``--layer-density`` gives them.

    Raises:
        UsageError: if one pattern is given two densities.
    """
    densities: dict[str, float] = {}
    for text in args.layer_density or ():
        pattern, _, value = text.rpartition("=")
        if densities.setdefault(pattern, float(value)) != float(value):
            raise UsageError(f"--layer-density gives {pattern!r} two densities: {densities[pattern]} and {value}")
    return densities


def sparse_training(args: argparse.Namespace, steps_per_epoch: int, total_epochs: int) -> SparseTraining | None:
    """What the sparse flags mean in steps; None for dense training."""
    if not args.sparse:
        return None
    return SparseTraining(
        masking={
            "method": args.method,
            "prune": args.prune,
            "growth": args.growth,
            "redistribution": args.redistribution,
            "prune_rate": args.prune_rate,
            "decay_schedule": args.decay_schedule,
            "update_frequency": args.update_frequency,
            "init_density": args.init_density,
            "final_density": args.final_density,
            "prune_start_step": args.init_prune_epoch * args.multiplier * steps_per_epoch,
            "prune_end_step": args.final_prune_epoch * args.multiplier * steps_per_epoch,
            "final_update_step": None
            if args.final_update_epoch is None
            else args.final_update_epoch * args.multiplier * steps_per_epoch,
            "total_steps": total_epochs * steps_per_epoch,
            "seed": args.seed,
        },
        sparse_init=args.sparse_init,
        pruning_rate=args.pruning_rate,
        keep_first_dense=args.rm_first,
        dense_layers=args.dense_layers or (),
        layer_densities=layer_densities(args),
        frozen=args.fix,
    )


def plan(args: argparse.Namespace, budget: EpochBudget, pretrain_lr: Callable[[int], float]) -> Plan:
    """What the ticket flags mean."""
    return Plan(
        budget=budget,
        pretrain_lr=pretrain_lr,
        averaging=AVERAGING[args.superposing_method](args.CIMA_factor),
        pre_train=args.pre_train,
        cyclic_train=args.cyclic_train,
        cycle_lr=(args.lr_1, args.lr_2) if args.cyc_lr else None,
        explore_rate=args.large_death_rate if args.re_explore else None,
        updates_in_cycles=not args.no_maskupdates,
        update_bn=args.update_bn,
        final_density=args.final_density if args.sparse else None,
        ema_decay=args.ema,
    )


def runtime(args: argparse.Namespace) -> Runtime:
    """What the flags about devices and number formats mean."""
    return Runtime(
        use_cuda=not args.no_cuda,
        amp=_amp(args.amp, args.fp16),
        channels_last=args.channels_last,
        compile=args.compile,
        execution=args.execution,
        tf32=args.tf32,
        deterministic=args.deterministic,
        static_loss_scale=getattr(args, "static_loss_scale", None),
    )


def _amp(amp: str | None, fp16: bool) -> str:
    """Number format that both flags ask for, a choice of ``--amp``."""
    return "fp16" if fp16 else amp or "auto"


def action(args: argparse.Namespace) -> Callable[..., object]:
    """What a script does with a recipe, plan, masks, runtime and output: the run, or a preview of it."""
    if args.dry_run:
        return preview.dry_run
    return preview.show_layers if args.show_layers else experiment.run


def trackers(args: argparse.Namespace, folder: RunFolder, config: Mapping[str, Any]) -> list[Tracker]:
    """Services that get the figures of a run besides its own files, checked but not started.

    Raises:
        UsageError: if a package for it is missing.
        FaultError: if it cannot be written into.
    """
    found: list[Tracker] = []
    if args.tensorboard is not None:
        found.append(TensorBoard(args.tensorboard))
    if args.wandb is not None:
        found.append(WeightsAndBiases(args.wandb, folder.wandb_id, config))
    return found


def output(
    args: argparse.Namespace,
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    folder: RunFolder,
    network: Mapping[str, Any],
    device: torch.device,
    log_interval: int,
) -> experiment.Output:
    """What a run writes and shows.

    Args:
        args: parsed by ``parser``.
        parser: of the script.
        argv: the command line; None: that of the program.
        folder: of the run.
        network: how it is built again (``Recipe.network``).
        device: of the run.
        log_interval: batches between reads of the running loss.

    Raises:
        UsageError, FaultError: as :func:`trackers` does.
    """
    known = values(args)
    config = {
        "command": command(argv), **known, **provenance.environment(device),
        "network": network, "marks": own_marks(parser),
    }  # fmt: skip
    return experiment.Output(
        folder=folder,
        config=config,
        identity=identity(known, parser),
        settled=partial(settled, device=device),
        resume=args.resume,
        log_interval=log_interval,
        keep_tickets=args.keep_tickets,
        trackers=trackers(args, folder, config),
    )


def run_path(args: argparse.Namespace, model: str, data: str, budget: EpochBudget) -> Path:
    """Folder of one run."""
    if args.save:
        return args.save
    return Path(
        "saved_models",
        args.indicate_method,
        model,
        data,
        f"cycle_num_{args.cycle}",
        f"pretrain_epoch_{budget.pretrain_epochs}",
        f"cyclic_epochs_{budget.cyclic_epochs}",
        f"density_{args.final_density:g}",
        f"M={budget.tickets}",
        f"ex_rate={args.large_death_rate:g}",
        f"seed{args.seed}",
    )


def take_over(parser: Parser, argv: Sequence[str]) -> None:
    """Let the flags of the run that ``--config`` names, if it is there, be the parser's defaults.

    Positional arguments may then be left out, too.

    Raises:
        UsageError: if there is no such file, or it has entries that are no flags of this parser.
        FaultError: if it is damaged.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config", nargs="?")
    if not (found := finder.parse_known_args(argv)[0].config):  # the parser itself says what is wrong with none
        return
    source = path(found)
    if not source.is_file():
        raise UsageError(f"--config {source}: there is no such file")
    kept = read(dict[str, FlagValue], flags_of(read_json(source)), str(source))
    known = {action.dest for action in parser._actions}
    if unknown := [name for name in kept if name not in known]:
        raise UsageError(f"--config {source}: this script has no flags {', '.join(map(shown, unknown))}")
    own = marked(parser, OF_ONE_CALL)
    taken = {name: value for name, value in kept.items() if name not in own}
    parser.set_defaults(**restored(parser, taken, str(source)))
    for action in parser._actions:
        if not action.option_strings and action.dest in taken:
            action.nargs, action.required = "?", False


def of_run(parser: Parser, kept: Mapping[str, Any], source: str) -> argparse.Namespace:
    """All flags of a run, :func:`restored`; those that its version of the script did not have get their defaults.

    Raises:
        FaultError: naming the first flag that is missing although it has no default, or whose value no command line
            gives.
    """
    if missing := [action.dest for action in parser._actions if action.required and action.dest not in kept]:
        raise FaultError(f"{source} is damaged or no run's of this script: {missing[0]} is missing")
    known = {name: parser.get_default(name) for name in (action.dest for action in parser._actions)}
    return argparse.Namespace(**{**known, **restored(parser, kept, source)})


def restored(parser: argparse.ArgumentParser, kept: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The flags of a run as its parser would make them; what the parser does not know is left out.

    Args:
        parser: of the script that the run was made with.
        kept: name to value, as :func:`values` wrote it.
        source: where, for messages.

    Raises:
        FaultError: naming the first flag whose value no command line gives.
    """
    known = [action for action in parser._actions if action.dest in kept]
    return {action.dest: _restored(action, kept[action.dest], source) for action in known}


def _restored(action: argparse.Action, value: Any, source: str) -> Any:
    if value is None and action.default is None:
        return None
    items = value if action.nargs == "+" and isinstance(value, list) else [value]
    kind: Any = bool if action.nargs == 0 else action.type or str
    try:
        made = [bool(item) if kind is bool else kind(str(item)) for item in items]
    except argparse.ArgumentTypeError as error:
        raise FaultError(f"{source} is damaged or no run's: {action.dest} is {shown(value)} ({error})") from error
    written = [str(item) if isinstance(item, Path) else item for item in made]
    alike = all(type(there) is type(here) and there == here for there, here in zip(items, written, strict=True))
    if not alike or (action.choices and not set(made) <= set(action.choices)):
        raise FaultError(f"{source} is damaged or no run's: {action.dest} is {shown(value)}")
    return made if action.nargs == "+" else made[0]


def values(args: argparse.Namespace) -> dict[str, Any]:
    """Every flag's value, as plain values."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def identity(values: Mapping[str, Any], parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The flags that a resumed run must share."""
    without_effect = marked(parser, NO_EFFECT)
    return {name: value for name, value in values.items() if name not in without_effect}


def settled(values: Mapping[str, Any], device: torch.device | None = None) -> dict[str, Any]:
    """A run's flags with one word for each number format and execution: two that mean the same become equal.

    Args:
        values: by name, maybe of an earlier version that had fewer.
        device: what ``auto`` means on it takes its place; None: ``auto`` stays.
    """
    amp = _amp(values.get("amp"), bool(values.get("fp16")))
    runtime = Runtime(amp=amp, compile=bool(values.get("compile")), execution=str(values.get("execution")))
    if device is not None:
        runtime = runtime.resolved(device)
    return {**values, "amp": runtime.amp, "fp16": runtime.amp == "fp16", "execution": runtime.execution}


def command(argv: Sequence[str] | None) -> str:
    """The command line, quoted for a shell."""
    return shlex.join(["python", sys.argv[0], *(sys.argv[1:] if argv is None else argv)])
