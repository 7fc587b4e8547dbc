#!/usr/bin/env python3
"""Sup-tickets on CIFAR-sized images: pre-train a sparse network, collect cheap tickets, superpose them into one.

python3 main_suptickets.py --demo
python3 main_suptickets.py --pre_train --cyclic_train --re_explore --cyc_lr --update_bn --sparse --data cifar100 …
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C during the imports below, which take seconds, needs no traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import copy
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone runs without being installed
if str(Path(__file__).resolve().parent) not in sys.path:  # ``sparselearning.analyze`` imports this file from elsewhere
    sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from cifar_data import Data, check_data_name, data_help, load_data
from cifar_models import build_model, model_names
from torch import nn

from sparselearning.process import arguments, distributed, launch
from sparselearning.process.errors import UsageError
from sparselearning.process.script import run_script
from sparselearning.process.seeding import seed_everything
from sparselearning.sparse.schedules import milestone_lr
from sparselearning.sparse.sparse_init import SPARSE_INITS
from sparselearning.training import experiment, flag_checks, flags, from_flags, kept_flags, opening
from sparselearning.training.builders import builder_name
from sparselearning.training.data import Sources
from sparselearning.training.plan import EpochBudget
from sparselearning.training.progress import print_notes
from sparselearning.training.run_folder import RunFolder
from sparselearning.training.runtime import Runtime

OPTIMIZERS = {
    "sgd": lambda parameters, args: torch.optim.SGD(
        parameters, lr=args.lr, momentum=args.momentum, weight_decay=args.l2, fused=True
    ),
    "adam": lambda parameters, args: torch.optim.Adam(parameters, lr=args.lr, weight_decay=args.l2, fused=True),
}

DEMO = (
    "--indicate_method demo --data digits --model cifar_resnet_8 --epochs 40 --cycle 3 --cycle_rate 0.3 "
    "--batch-size 64 --pre_train --cyclic_train --sparse --final-prune-epoch 15 --update-frequency 10 --re_explore "
    "--large-death-rate 0.2 --no_maskupdates --cyc_lr --lr_1 0.001 --lr_2 0.005 --update_bn"
)
"""What ``--demo`` puts before the flags of the user: the whole method in a minute or two of two CPU cores."""

RECIPES = {
    "tuned": (
        "--sparse --method GraNet --growth gradient --prune magnitude --init-density 0.5 --final-density 0.05 "
        "--final-prune-epoch 110 --sparse-init ERK --decay-schedule constant --prune-rate 0.5 --epochs 250 "
        "--optimizer sgd --lr 0.1 --momentum 0.9 --l2 0.0005 --pre_train --cyclic_train --no_maskupdates --cyc_lr "
        "--cycle 1 --cycle_rate 0.096 --lr_1 0.1 --lr_2 0.1 --superposing_method CAA --update_bn"
    ),
}
"""What ``--recipe`` puts before the flags of the user, by its name: settings tested in RESULTS.md."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run once, or ``--iters`` times with one seed after the other."""
    args = parse(argv)
    if args.mgpu and args.no_cuda:
        raise UsageError("--mgpu uses all GPUs and --no-cuda none: give one of them")
    if args.mgpu and not launch.is_launched():
        launch.launch_on_all_gpus(sys.argv[1:] if argv is None else argv)
        return
    takes_over_masks = args.sparse and SPARSE_INITS[args.sparse_init].needs_trained_weights
    if args.iters > 1 and args.resume and args.pre_train and not takes_over_masks:
        raise UsageError("--resume continues one run: give its --seed in place of --iters")
    seeds = [of_seed(args, args.seed + i) for i in range(args.iters)]
    if args.iters > 1 and args.resume:
        for one in seeds:
            opening.check_start_lies_elsewhere(folder_of(one), args.resume)
    for one in seeds[:1] if args.show_layers or args.dry_run else seeds:
        run(one, argv)


def of_seed(args: argparse.Namespace, seed: int) -> argparse.Namespace:
    """The flags of one of several runs, whose files are in folders of their own."""
    one = copy.copy(args)
    one.seed = seed
    if args.save and args.iters > 1:
        one.save = args.save / f"seed{seed}"
    if args.tensorboard and args.iters > 1:
        one.tensorboard = args.tensorboard / f"seed{seed}"
    return one


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line, after the presets of ``--demo`` or ``--recipe`` if one is there.

    Raises:
        UsageError: if it asks for a recipe and for the flags of a run, or a recipe lacks what depends on the data.
    """
    words = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    kept_flags.take_over(parser, words)
    args, given = parser.parse_args(words), parser.given(words)
    if given.keys() >= {"recipe", "config"}:
        raise UsageError("--recipe and --config both stand for other flags, and might contradict: give one of them")
    if "recipe" in given and "update_frequency" not in given:
        raise UsageError(
            f"--recipe {args.recipe} needs --update-frequency: where it was tested, an update came every 2.6 epochs "
            "(--update-frequency 1000 for CIFAR-100 in batches of 128)"
        )
    if "recipe" in given or "demo" in given:
        presets = RECIPES[args.recipe] if "recipe" in given else DEMO
        args = parser.parse_args([*shlex.split(presets), *words])
    args.pre_train = args.pre_train or (args.show_layers and not args.cyclic_train)
    return args


def make_parser() -> flags.RunParser:
    """All flags of this script."""
    parser = flags.RunParser(__doc__, start="--data digits --model cifar_resnet_8")
    group = arguments.Group(parser, flags.LOOK, flags.NO_EFFECT).either()
    group.add_argument(
        "--demo", action="store_true", help=f"a complete small run on digits; puts before the other flags: {DEMO}"
    )
    recipes = "; ".join(f"{name}: {words}" for name, words in RECIPES.items())
    group.add_argument(
        "--recipe",
        choices=RECIPES,
        help=f"flags of a setting tested in RESULTS.md, to which --update-frequency has to be added; puts before the "
        f"other flags {recipes}",
    )
    group = arguments.Group(parser, flags.DATA)
    group.add_argument("--data", default="cifar10", help=data_help())
    group = arguments.Group(parser, flags.DATA, flags.NO_EFFECT)
    group.add_argument(
        "--data-dir", type=arguments.path, default=Path("data"), metavar="DIR", help="where downloads go"
    )
    group = arguments.Group(parser, flags.DATA)
    group.add_argument("--model", default="vgg-like", help=f"one of {', '.join(model_names())}")
    group.add_argument(
        "--valid_split", type=arguments.below_one, default=0.0, metavar="SHARE",
        help="hold out the last share of the training set and evaluate on it; the test set is used once, at the end",
    )  # fmt: skip
    group = arguments.Group(parser, flags.TRAINING)
    group.add_argument("--epochs", type=arguments.positive, default=160, help="of the whole run, cycles included")
    group.add_argument("--batch-size", type=arguments.positive, default=128, help="images per step, over all processes")
    group.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd", help="SGD with --momentum, or Adam")
    group.add_argument("--lr", type=arguments.non_negative_float, default=0.1, help="learning rate of pre-training")
    group.add_argument(
        "--nolrsche", action="store_true", help="constant rate; without it, x0.1 at half and three quarters"
    )
    group.add_argument("--momentum", type=arguments.below_one, default=0.9, help="of SGD")
    group.add_argument("--l2", type=arguments.non_negative_float, default=5e-4, help="weight decay")
    group = arguments.Group(parser, flags.TRAINING, flags.NO_EFFECT, flags.OF_ONE_CALL)
    group.add_argument("--iters", type=arguments.positive, default=1, help="runs, with seeds seed, seed + 1, …")
    flags.add_sparse_flags(parser)
    flags.add_ticket_flags(parser)
    group = arguments.Group(parser, flags.TICKETS, flags.ABOUT_TICKETS)
    group.add_argument(
        "--cycle_rate", type=arguments.rate, default=0.2, help="share of the epochs for the cycles, cut to whole cycles"
    )
    group = arguments.Group(parser, flags.FILES, flags.NO_EFFECT)
    group.add_argument(
        "--log-interval", type=arguments.positive, default=100, metavar="STEPS", help="steps between progress updates"
    )
    group = arguments.Group(parser, flags.SPEED, flags.NO_EFFECT)
    group.add_argument("--test-batch-size", type=arguments.positive, default=128, help="images per evaluation step")
    group.add_argument(
        "--workers",
        type=arguments.non_negative,
        default=4,
        help="without effect, kept for old command lines: batches are made on the device",
    )
    group.add_argument("--mgpu", action="store_true", help="use all GPUs of this machine")
    flags.add_run_flags(parser)
    return parser


def run(args: argparse.Namespace, argv: Sequence[str] | None) -> None:
    """Do one run of one seed."""
    parser = make_parser()
    warnings = check(args) + flag_checks.without_masks_note(args, parser, argv)
    budget = epoch_budget(args)
    warnings += flag_checks.check_budget(args, budget)
    warnings += flag_checks.pruning_window_warning(args, budget.pretrain_epochs)
    device, runtime = from_flags.runtime(args).start()
    print_notes(*warnings)
    if distributed.is_main():
        print(runtime.description(device), flush=True)

    setup = set_up(args, runtime, device)
    from_flags.action(args)(
        setup,
        from_flags.plan(args, budget, pretrain_lr(args, budget)),
        from_flags.sparse_training(args, len(setup.sources.train), budget.total_epochs),
        runtime,
        from_flags.output(args, parser, argv, folder_of(args), setup.network_record, device, args.log_interval),
    )


def epoch_budget(args: argparse.Namespace) -> EpochBudget:
    """Both parts of the run."""
    return EpochBudget.of_share(args.epochs * args.multiplier, args.cycle_rate, args.cycle)


def folder_of(args: argparse.Namespace) -> RunFolder:
    """Where the files of one run go."""
    return RunFolder(from_flags.run_path(args, args.model, Path(args.data).stem, epoch_budget(args)))


def check(args: argparse.Namespace) -> list[str]:
    """Refuse contradictory flags; return warnings about suspicious ones.

    Raises:
        UsageError: one sentence about the first contradiction.
    """
    check_data_name(args.data)
    with torch.device("meta"):  # only the name is checked: classes and image size are known once the data are loaded
        build_model(args.model, num_classes=10)
    momentum_is_zero = args.optimizer == "sgd" and args.momentum == 0
    return flag_checks.check(args, momentum_is_zero, has_weights=args.resume is not None)


def set_up(args: argparse.Namespace, runtime: Runtime, device: torch.device) -> experiment.Setup:
    """Network, optimizer and data of a run, on the device, before its first step."""
    data, model = load(args, runtime, device)
    sample_shape = (data.channels, data.image_size, data.image_size)
    return experiment.Setup(
        model=model,
        optimizer=OPTIMIZERS[args.optimizer](model.parameters(), args),
        sources=Sources(
            train=data.train,
            train_once=data.train,  # has every image once already
            evaluation=data.evaluation,
            test=data.test if args.valid_split else None,
        ),
        sample_shape=sample_shape,
        class_balanced_batch=lambda: data.train.class_balanced_batch(args.batch_size, args.seed),
        network_record={
            "builder": builder_name(build_model),
            "arguments": {
                "name": args.model,
                "num_classes": data.num_classes,
                "in_channels": data.channels,
                "image_size": data.image_size,
            },
            "input_shape": list(sample_shape),
            "mean": list(data.mean),
            "std": list(data.std),
        },
    )


def load(args: argparse.Namespace, runtime: Runtime, device: torch.device) -> tuple[Data, nn.Module]:
    """Load the data and build the network, both on the device, as drawn by the run's seed."""
    seed_everything(args.seed)
    with distributed.main_first():
        data = load_data(
            args.data,
            data_dir=args.data_dir,
            batch_size=args.batch_size,
            test_batch_size=args.test_batch_size,
            valid_split=args.valid_split,
            seed=args.seed,
            device=device,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )
    model = build_model(args.model, data.num_classes, data.channels, data.image_size)
    images = min(args.batch_size, data.train.num_samples) // distributed.world_size()
    experiment.check_smallest_batch(model, (data.channels, data.image_size, data.image_size), images)
    memory_format = runtime.memory_format(model)
    data.use_memory_format(memory_format)
    return data, model.to(device, memory_format=memory_format)


def pretrain_lr(args: argparse.Namespace, budget: EpochBudget) -> Callable[[int], float]:
    """Epoch to learning rate in pre-training: ten times smaller at half and at three quarters of it.

    With a single epoch both would be epoch 0, and nothing would be trained at ``--lr``: so epoch 0 is no milestone.
    """
    epochs = budget.pretrain_epochs
    milestones = [] if args.nolrsche else [milestone for milestone in (epochs // 2, epochs * 3 // 4) if milestone]
    return lambda epoch: milestone_lr(epoch, args.lr, milestones)


if __name__ == "__main__":
    run_script(main)
