"""The command-line flags that both scripts share, as they are declared, and marks of what each is about."""

import argparse
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

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
from sparselearning.sparse.schedules import DECAYS
from sparselearning.sparse.sparse_init import SPARSE_INITS
from sparselearning.sparse.superpose import AVERAGING
from sparselearning.sparse.topology import GROWTH, METHODS, PRUNE, REDISTRIBUTION
from sparselearning.training.runtime import AMP

MARKS = NO_EFFECT, OF_ONE_CALL, ABOUT_MASKS, ABOUT_TICKETS = "no effect", "of one call", "about masks", "about tickets"
"""Marks of flags.

``NO_EFFECT``: changes where a run's files are, what it shows, or how much it evaluates at a time, not what it computes
(but for rounding), so that a resumed run may differ in it. Reports count ``--resume`` where it names first weights.
``OF_ONE_CALL``: ``--config`` does not take it over: where files were, what a run resumed, how it was started.
``ABOUT_MASKS``: without effect on dense training. ``ABOUT_TICKETS``: without effect on plain training.
"""

_CONSTANT = [name for name, method in METHODS.items() if not method.shrink]
SWITCHED_OFF: dict[str, tuple[str, Sequence[Any]]] = {
    "init_prune_epoch": ("method", _CONSTANT),
    "final_prune_epoch": ("method", _CONSTANT),
    "pruning_rate": ("sparse_init", [name for name in SPARSE_INITS if not name.startswith("prune_")]),
    "lr_1": ("cyc_lr", [False]),
    "lr_2": ("cyc_lr", [False]),
    "large_death_rate": ("re_explore", [False]),
    "CIMA_factor": ("superposing_method", [name for name in AVERAGING if name != "CIMA"]),
}
"""Name of a flag to that of another, and to the values of it with which the first one has no effect."""

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
        help="take the flags of an earlier run from its config.json, but for those of one call, such as --save and "
        "--resume; those on the command line take precedence",
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
    group.add_argument("--tensorboard", type=path, metavar="DIR", help="write TensorBoard scalars there as well")
    group = Group(parser, FILES, NO_EFFECT)
    group.add_argument("--keep-tickets", action="store_true", help="save every ticket, in tickets/ of the run's folder")
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
