"""What the flags of both scripts mean to the library: plan, masks, device, and what a run writes."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sparselearning.process.errors import UsageError
from sparselearning.sparse.superpose import AVERAGING
from sparselearning.training import experiment, kept_flags, preview, provenance
from sparselearning.training.experiment import SparseTraining
from sparselearning.training.flags import own_marks
from sparselearning.training.plan import EpochBudget, Plan
from sparselearning.training.run_folder import RunFolder
from sparselearning.training.runtime import Runtime
from sparselearning.training.trackers import TensorBoard, Tracker, WeightsAndBiases


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
        amp=kept_flags.number_format(args.amp, args.fp16),
        channels_last=args.channels_last,
        compile=args.compile,
        execution=args.execution,
        tf32=args.tf32,
        deterministic=args.deterministic,
        static_loss_scale=getattr(args, "static_loss_scale", None),
    )


def action(args: argparse.Namespace) -> Callable[..., object]:
    """What a script does with a setup, plan, masks, runtime and output: the run, or a preview of it."""
    if args.dry_run:
        return preview.dry_run
    return preview.show_layers if args.show_layers else experiment.run


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


def output(
    args: argparse.Namespace,
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    folder: RunFolder,
    network_record: Mapping[str, Any],
    device: torch.device,
    log_interval: int,
) -> experiment.Output:
    """What a run writes and shows.

    Args:
        args: parsed by ``parser``.
        parser: of the script.
        argv: the command line; None: that of the program.
        folder: of the run.
        network_record: how its network is built again (``Setup.network_record``).
        device: of the run.
        log_interval: batches between reads of the running loss.

    Raises:
        UsageError, FaultError: as :func:`trackers` does.
    """
    known = kept_flags.values(args)
    config = {
        "command": kept_flags.command(argv), **known, **provenance.environment(device),
        "network": network_record, "marks": own_marks(parser),
    }  # fmt: skip
    return experiment.Output(
        folder=folder,
        config=config,
        identity=kept_flags.identity(known, parser),
        settled=partial(kept_flags.settled, parser=parser, device=device),
        resume=args.resume,
        log_interval=log_interval,
        keep_tickets=args.keep_tickets,
        trackers=trackers(args, folder, config),
    )


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
