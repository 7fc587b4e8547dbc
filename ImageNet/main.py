#!/usr/bin/env python3
"""Sup-tickets on ImageNet: pre-train a sparse network, collect cheap tickets, superpose them into one.

python main.py --sparse --pre_train --cyclic_train --cyc_lr --bn_update … DIR            one GPU or CPU
python multiproc.py --nproc_per_node 8 main.py … DIR                                     one machine with many
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C during the imports below, which take seconds, needs no traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone runs without being installed
if str(Path(__file__).resolve().parent) not in sys.path:  # ``sparselearning.analyze`` imports this file from elsewhere
    sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from imagenet_data import MEAN, STD, check_centre, load_imagenet
from imagenet_resnet import INITS, RESNETS, build_model, check_arch
from torch import nn

from sparselearning.process import arguments, distributed
from sparselearning.process.errors import UsageError
from sparselearning.process.files import load_torch
from sparselearning.process.script import run_script
from sparselearning.process.seeding import derive_seed, seed_everything
from sparselearning.sparse.schedules import milestone_lr
from sparselearning.training import experiment, flag_checks, flags, from_flags, kept_flags, profiling
from sparselearning.training.builders import builder_name
from sparselearning.training.data import Sources
from sparselearning.training.networks import load_weights
from sparselearning.training.plan import EpochBudget, Plan
from sparselearning.training.progress import print_notes
from sparselearning.training.run_folder import RunFolder
from sparselearning.training.runtime import Runtime

FINAL_DENSITY = 0.1
DEFAULT_INIT = "classic"


def main(argv: Sequence[str] | None = None) -> None:
    """Train, or evaluate, or measure speed."""
    args = parse(argv)
    budget = epoch_budget(args)
    parser = make_parser()
    warnings = check(args, budget) + flag_checks.without_masks_note(args, parser, argv)
    if args.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    device, runtime = from_flags.runtime(args).start()
    print_notes(*warnings)
    if distributed.is_main():
        print(runtime.description(device), flush=True)

    setup = set_up(args, runtime, device)
    if args.pretrained_weights:
        load_weights(setup.model, load_torch(args.pretrained_weights), args.pretrained_weights)
    plan = from_flags.plan(args, budget, pretrain_lr(args))
    sparse = from_flags.sparse_training(args, len(setup.sources.train), budget.total_epochs)
    folder = RunFolder(from_flags.run_path(args, args.arch, Path(os.path.abspath(args.data)).name, budget))
    output = from_flags.output(args, parser, argv, folder, setup.network_record, device, args.print_freq)
    output = dataclasses.replace(output, keep_checkpoints=args.gather_checkpoints)
    if args.evaluate:
        evaluate(setup, plan, runtime, output)
    elif measures_only(args):
        trainer = experiment.prepare(setup, plan, sparse, runtime, output)
        profiling.measure(
            trainer, training=args.benchmark_training, inference=args.benchmark_inference, profile=args.prof
        )
    else:
        from_flags.action(args)(setup, plan, sparse, runtime, output)


def set_up(args: argparse.Namespace, runtime: Runtime, device: torch.device) -> experiment.Setup:
    """Network, optimizer and data of a run, on the device, before its first step."""
    seed_everything(args.seed)
    data = load_imagenet(
        args.data,
        batch_size=args.batch_size,
        workers=args.workers,
        seed=args.seed,
        device=device,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        strict_data=args.strict_data,
        image_size=args.train_crop_size,
        resize=args.val_resize_size,
        val_image_size=args.val_crop_size,
    )
    network_arguments = {"arch": args.arch, "num_classes": data.num_classes, "image_size": data.image_size}
    model = build_model(**network_arguments, init=args.model_config or DEFAULT_INIT)
    sample_shape = (data.channels, data.image_size, data.image_size)
    val_shape = (data.channels, data.val_image_size, data.val_image_size)
    experiment.check_images(model, [sample_shape, val_shape])
    re_estimates = args.update_bn or args.ema is not None
    passes = [data.train, data.train_once] if re_estimates else [data.train]
    experiment.check_smallest_batch(model, sample_shape, min(source.smallest_batch for source in passes))
    if distributed.rank():  # ranks start from one network, and drop out units independently
        seed_everything(derive_seed(args.seed, "rank", distributed.rank()))
    memory_format = runtime.memory_format(model)
    data.use_memory_format(memory_format)
    model = model.to(device, memory_format=memory_format)
    return experiment.Setup(
        model=model,
        optimizer=make_optimizer(model, args),
        sources=Sources(train=data.train, train_once=data.train_once, evaluation=data.evaluation),
        sample_shape=sample_shape,
        class_balanced_batch=lambda: data.train.class_balanced_batch(args.batch_size, args.seed),
        label_smoothing=args.label_smoothing,
        network_record={
            "builder": builder_name(build_model),
            "arguments": network_arguments,
            "input_shape": list(val_shape),
            "mean": [255 * mean for mean in MEAN],
            "std": [255 * std for std in STD],
            "resize": args.val_resize_size,
        },
    )


def make_parser() -> flags.RunParser:
    """All flags of this script."""
    parser = flags.RunParser(__doc__, start="DIR")
    parser.usage = "python %(prog)s DIR [flags]"
    parser.add_argument("data", type=arguments.path, metavar="DIR", help="folder with train/CLASS/* and val/CLASS/*")
    group = arguments.Group(parser, flags.DATA)
    group.add_argument(
        "--arch", default="resnet50", metavar="NAME",
        help="any classification network of torchvision, by its name there, such as vit_b_16 or mobilenet_v3_small",
    )  # fmt: skip
    group.add_argument(
        "-c", "--model-config", choices=INITS,
        help=f"first convolutions of {', '.join(RESNETS)}: Kaiming normal by fan_out (classic) or fan_in (default: "
        f"{DEFAULT_INIT}); other networks start as torchvision's do",
    )  # fmt: skip
    group.add_argument(
        "--pretrained-weights", type=arguments.path, metavar="PATH", help="first weights, from a saved .pth"
    )
    group.add_argument(
        "--train-crop-size", type=arguments.positive, default=224, metavar="PIXELS",
        help="side of the random crop that is trained on; FLOPs are counted at this size",
    )  # fmt: skip
    group.add_argument(
        "--val-resize-size", type=arguments.positive, default=256, metavar="PIXELS",
        help="shorter side that a validation image is scaled to",
    )  # fmt: skip
    group.add_argument(
        "--val-crop-size", type=arguments.positive, default=224, metavar="PIXELS",
        help="side of the centre that is then cut out",
    )  # fmt: skip
    group.add_argument("--strict-data", action="store_true", help="stop at a damaged image instead of skipping it")
    group = arguments.Group(parser, flags.TRAINING)
    group.add_argument(
        "--epochs", type=arguments.positive, help="the whole run; must be the sum of both parts (default: that sum)"
    )
    group.add_argument("-b", "--batch-size", type=arguments.positive, default=64, help="images per step and process")
    group.add_argument("--lr", type=arguments.non_negative_float, default=0.1, help="learning rate of pre-training")
    group.add_argument("--warmup", type=arguments.non_negative, default=0, metavar="EPOCHS", help="linear warm-up")
    group.add_argument(
        "--first_m", type=arguments.non_negative, default=30, metavar="EPOCH", help="rate x0.1 from here"
    )
    group.add_argument("--second_m", type=arguments.non_negative, default=60, metavar="EPOCH", help="x0.1 again")
    group.add_argument("--third_m", type=arguments.non_negative, default=80, metavar="EPOCH", help="x0.1 again")
    group.add_argument("--momentum", type=arguments.below_one, default=0.9, help="of SGD")
    group.add_argument("--wd", "--weight-decay", dest="wd", type=arguments.non_negative_float, default=1e-4,
                        help="weight decay")  # fmt: skip
    group.add_argument(
        "--bn-weight-decay", action="store_true", help="decay weights and biases of BatchNorm and LayerNorm too"
    )
    group.add_argument("--label-smoothing", type=arguments.below_one, default=0.0, help="of the training loss")
    flags.add_sparse_flags(parser)
    group = arguments.Group(parser, flags.MASKS, flags.ABOUT_MASKS)
    group.add_argument(
        "--density", type=arguments.density,
        help=f"budget: another name of --final-density (default of both: {FINAL_DENSITY})",
    )  # fmt: skip
    flags.add_ticket_flags(parser)
    group = arguments.Group(parser, flags.TICKETS, flags.ABOUT_TICKETS)
    group.add_argument(
        "--pretrain_epoch", type=arguments.non_negative, default=88, metavar="EPOCHS", help="pre-training"
    )
    group.add_argument("--cyclic_epochs", type=arguments.non_negative, default=12, metavar="EPOCHS", help="all cycles")
    group = arguments.Group(parser, flags.FILES, flags.NO_EFFECT)
    group.add_argument(
        "-p",
        "--print-freq",
        type=arguments.positive,
        default=10,
        metavar="STEPS",
        help="steps between progress updates",
    )
    group.add_argument("--gather-checkpoints", action="store_true", help="keep the checkpoint of every epoch")
    group = arguments.Group(parser, flags.SPEED, flags.NO_EFFECT)
    group.add_argument("-j", "--workers", type=arguments.non_negative, default=5, help="decoding processes per process")
    group = arguments.Group(parser, flags.SPEED)
    group.add_argument("--static-loss-scale", type=arguments.positive_float, help="fixed scale (default: adapted)")
    group.add_argument("--dynamic-loss-scale", action="store_true", help="scale adapted to the gradients: the default")
    group = arguments.Group(parser, flags.SPEED, flags.NO_EFFECT)
    group.add_argument(
        "--master_port", type=arguments.positive, help="read by multiproc.py, which starts the processes"
    )
    group = arguments.Group(parser, flags.SPEED, flags.NO_EFFECT, flags.OF_ONE_CALL)
    group.add_argument(
        "--local_rank", "--local-rank", type=arguments.non_negative, help="rank on this machine, set by old launchers"
    )
    flags.add_run_flags(parser)
    measures = "in place of training"
    parser.add_argument_group(
        measures, "how fast it would be:\npython %(prog)s DIR --benchmark-training --benchmark-inference"
    )
    group = arguments.Group(parser, measures, flags.NO_EFFECT)
    group.add_argument("--evaluate", action="store_true", help="evaluate --resume or --pretrained-weights and stop")
    group.add_argument("--prof", action="store_true", help="profile a few training steps and stop")
    group.add_argument("--benchmark-training", action="store_true", help="time training steps and stop")
    group.add_argument("--benchmark-inference", action="store_true", help="time evaluation steps and stop")
    parser.set_defaults(cycle=4, final_density=None)
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    words = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    kept_flags.take_over(parser, words)
    given = parser.given(words).keys()
    if given & {"density", "final_density"}:  # what --config brings is no contradiction to it
        parser.set_defaults(density=None, final_density=None)
    if given & {"pretrain_epoch", "cyclic_epochs"}:
        parser.set_defaults(epochs=None)
    args = parser.parse_args(words)
    args.density = args.final_density = resolve_density(args.density, args.final_density)
    args.epochs = args.epochs or args.pretrain_epoch + args.cyclic_epochs
    if args.arch in RESNETS:
        args.model_config = args.model_config or DEFAULT_INIT
    elif "model_config" not in given:  # what --config brings is about another network
        args.model_config = None
    if args.evaluate or args.show_layers or measures_only(args):
        args.pre_train = args.pre_train or not args.cyclic_train
    return args


def epoch_budget(args: argparse.Namespace) -> EpochBudget:
    """Both parts of the run, as named on the command line.

    Raises:
        UsageError: if they contradict ``--epochs`` or ``--cycle``.
    """
    total = args.pretrain_epoch + args.cyclic_epochs
    if args.epochs != total:
        raise UsageError(
            f"--epochs {args.epochs} is not --pretrain_epoch {args.pretrain_epoch} + --cyclic_epochs "
            f"{args.cyclic_epochs} = {total}: change them together"
        )
    pretrain, cyclic = args.pretrain_epoch * args.multiplier, args.cyclic_epochs * args.multiplier
    tickets = cyclic // args.cycle
    if tickets == 0:  # less than one cycle: all epochs pre-train
        return EpochBudget(pretrain + cyclic, args.cycle, 0)
    if cyclic % args.cycle:
        raise UsageError(f"--cyclic_epochs {args.cyclic_epochs} is no whole number of --cycle {args.cycle} epochs")
    return EpochBudget(pretrain, args.cycle, tickets)


def check(args: argparse.Namespace, budget: EpochBudget) -> list[str]:
    """Refuse contradictory flags; return warnings about suspicious ones.

    Raises:
        UsageError: one sentence about the first contradiction.
    """
    check_arch(args.arch)
    if args.model_config and args.arch not in RESNETS:
        raise UsageError(
            f"-c {args.model_config} is about {', '.join(RESNETS)}; {args.arch} starts as torchvision's: leave it out"
        )
    check_centre(args.val_crop_size, args.val_resize_size, ("--val-crop-size", "--val-resize-size"))
    if not args.fp16 and args.amp != "fp16" and (args.static_loss_scale or args.dynamic_loss_scale):
        raise UsageError("loss scaling is for float16: give --fp16 as well")
    if args.static_loss_scale and args.dynamic_loss_scale:
        raise UsageError("give one of --static-loss-scale and --dynamic-loss-scale")
    looks = [flag for flag in ("--dry-run", "--show-layers") if getattr(args, flag[2:].replace("-", "_"))]
    if looks and (args.evaluate or measures_only(args)):
        raise UsageError(f"{looks[0]}, --evaluate and measuring speed each stop after it: give one of them")
    has_weights = args.resume is not None or args.pretrained_weights is not None
    if args.evaluate and not has_weights:
        raise UsageError("--evaluate needs weights: give --resume PATH or --pretrained-weights PATH")
    warnings = flag_checks.check(args, momentum_is_zero=args.momentum == 0, has_weights=has_weights)
    warnings += flag_checks.check_budget(args, budget)
    return warnings + flag_checks.pruning_window_warning(args, budget.pretrain_epochs)


def resolve_density(density: float | None, final_density: float | None) -> float:
    """Settle ``--density`` and ``--final-density``, two names of one budget.

    Raises:
        UsageError: if they differ.
    """
    if None not in (density, final_density) and density != final_density:
        raise UsageError(f"--density {density} contradicts --final-density {final_density}: they name the same budget")
    return density or final_density or FINAL_DENSITY


def measures_only(args: argparse.Namespace) -> bool:
    """Whether the command measures speed in place of training."""
    return args.prof or args.benchmark_training or args.benchmark_inference


def make_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """SGD whose weight decay leaves normalisation layers alone unless ``--bn-weight-decay`` is given."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm)]
    undecayed = [] if args.bn_weight_decay else [p for norm in norms for p in norm.parameters()]
    exempt = set(undecayed)
    groups = [{"params": [p for p in model.parameters() if p not in exempt], "weight_decay": args.wd}]
    if undecayed:
        groups.append({"params": undecayed, "weight_decay": 0.0})
    return torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum, fused=True)


def pretrain_lr(args: argparse.Namespace) -> Callable[[int], float]:
    """Epoch to learning rate in pre-training: linear warm-up, then ten times smaller at each milestone."""
    milestones = [args.multiplier * milestone for milestone in (args.first_m, args.second_m, args.third_m)]
    return lambda epoch: milestone_lr(epoch, args.lr, milestones, args.warmup * args.multiplier)


def evaluate(setup: experiment.Setup, plan: Plan, runtime: Runtime, output: experiment.Output) -> None:
    """Print loss and accuracy of saved weights; of a run's folder, those of its superposition."""
    if output.resume:
        path = RunFolder(output.resume).previous if output.resume.is_dir() else output.resume
        load_weights(setup.model, load_torch(path), path)
    trainer = experiment.prepare(setup, plan, None, runtime, dataclasses.replace(output, resume=None))
    loss, accuracy = trainer.evaluate()
    if distributed.is_main():
        print(f"evaluation loss {loss:.4f}, accuracy {accuracy:.2%}")


if __name__ == "__main__":
    run_script(main)
