"""What both scripts do with a setup: masks, resuming, and the run itself."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from warnings import catch_warnings, filterwarnings

import torch
from torch import nn

from sparselearning.execution import sparse_execution
from sparselearning.process import distributed
from sparselearning.process.errors import UsageError, first_line
from sparselearning.process.files import write_json
from sparselearning.process.signals import Stopped, stop_signals
from sparselearning.sparse.costs import layer_flops
from sparselearning.sparse.distributions import check_leaves_weights
from sparselearning.sparse.masking import Masking
from sparselearning.sparse.sparse_init import SPARSE_INITS
from sparselearning.sparse.superpose import batchnorms
from sparselearning.training.data import Batch, Sources
from sparselearning.training.engine import Trainer
from sparselearning.training.networks import load_weights
from sparselearning.training.opening import has_own_checkpoint, open_folder
from sparselearning.training.passes import Passes, keeping_buffers
from sparselearning.training.plan import Plan
from sparselearning.training.progress import Progress, print_notes, run_table
from sparselearning.training.records import Summary
from sparselearning.training.run_folder import RunFolder
from sparselearning.training.runtime import Runtime
from sparselearning.training.start import Continue, Fresh, FromWeights, Start, find_start
from sparselearning.training.trackers import Tracker


@dataclass(frozen=True)
class SparseTraining:
    """How a run is kept sparse: the arguments of :class:`Masking` and of its ``add_module``."""

    masking: dict[str, Any]
    sparse_init: str = "ERK"
    pruning_rate: float = 0.5
    keep_first_dense: bool = False
    dense_layers: Sequence[str] = ()
    layer_densities: Mapping[str, float] = field(default_factory=dict)
    frozen: bool = False

    def first_masks(self, plan: Plan) -> str:
        """Name in :data:`SPARSE_INITS` of how the first masks are drawn, where they are."""
        if plan.pre_train or SPARSE_INITS[self.sparse_init].needs_trained_weights:
            return self.sparse_init
        return "resume"  # cycles alone start from trained weights, which random masks would destroy


@dataclass(frozen=True)
class Setup:
    """What a data set brings: network, optimizer, batches, loss.

    Attributes:
        model: on the device.
        optimizer: over its parameters.
        sources: training and evaluation batches.
        sample_shape: of one input, e.g. ``(3, 32, 32)``.
        class_balanced_batch: draws the batch that masks by gradient (``snip``, ``prune_and_grow_*``) are drawn from.
        label_smoothing: of the training loss.
        network_record: how to build the model again and prepare its images: entry ``network`` of ``config.json``.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    sources: Sources
    sample_shape: tuple[int, ...]
    class_balanced_batch: Callable[[], Batch]
    label_smoothing: float = 0.0
    network_record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Output:
    """What a run writes and shows.

    Attributes:
        folder: the run's folder.
        config: content of ``config.json``.
        identity: the part of it that a resumed run must share (``kept_flags.identity``).
        settled: replaces values in such a part that mean the same here by one (``kept_flags.settled``).
        resume: where to start from.
        log_interval: batches between reads of the running loss.
        keep_tickets: write every ticket to a file of its own.
        keep_checkpoints: keep the checkpoint of every epoch.
        trackers: services that get the figures as well.
    """

    folder: RunFolder
    config: dict[str, Any]
    identity: dict[str, Any] = field(default_factory=dict)
    settled: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    resume: Path | None = None
    log_interval: int = 100
    keep_tickets: bool = False
    keep_checkpoints: bool = False
    trackers: Sequence[Tracker] = ()


def check_images(model: nn.Module, shapes: Iterable[Sequence[int]]) -> None:
    """Refuse images that a network does not take.

    Args:
        model: a copy of it is run, on the ``meta`` device, where nothing is computed.
        shapes: of single images, (C, H, W).

    Raises:
        UsageError: naming the first such shape.
    """
    copy = deepcopy(model).to("meta").eval()
    height = width = 0
    try:
        for channels, height, width in dict.fromkeys(map(tuple, shapes)):  # each once: it takes a while
            copy(torch.empty(1, channels, height, width, device="meta"))
    except Exception as error:  # networks raise errors of many kinds
        reason = first_line(error)
        raise UsageError(f"this network takes no images of {height} x {width} pixels ({reason})") from error


def check_smallest_batch(model: nn.Module, shape: Sequence[int], images: int) -> None:
    """Refuse single images per step and process where a BatchNorm would then see a single value per channel.

    Args:
        model: a copy of it is run, on the ``meta`` device, where nothing is computed.
        shape: of an image that it takes, (C, H, W).
        images: the fewest that a process gets in a training step.

    Raises:
        UsageError: if this network cannot train on them.
    """
    if images > 1:
        return
    try:
        deepcopy(model).to("meta").train()(torch.empty(1, *shape, device="meta"))
    except ValueError as error:
        raise UsageError("BatchNorm cannot train on one image at a time: at least 2 per step and process") from error


def prepare(
    setup: Setup,
    plan: Plan,
    sparse: SparseTraining | None,
    runtime: Runtime,
    output: Output,
    stop_signal: Callable[[], int] = lambda: 0,
    start: Start | None = None,
) -> Trainer:
    """Draw the masks, or load them and all else that the run starts with; no file of the run is written yet.

    Args:
        start: what ``output.resume`` names, if it has been read already.

    Raises:
        UsageError: if what ``resume`` names does not fit.
        FaultError: if it cannot be read.
    """
    first_masks = sparse.first_masks(plan) if sparse else None
    trainer_with = partial(_trainer, setup, plan, sparse, runtime, output, stop_signal)
    start = start or start_of(plan, sparse, output)
    match start:
        case Fresh():
            trainer = trainer_with(first_masks)
        case FromWeights(saved, source, with_training=False):
            load_weights(setup.model, saved, source)
            trainer = trainer_with(first_masks)
        case FromWeights(saved, source, with_training=True):
            load_weights(setup.model, saved, source)
            trainer = trainer_with(first_masks if saved.get("masking") is None else None)
            trainer.checkpoint.load_training(saved, source)
        case Continue(saved, source):
            trainer = trainer_with(None)
            trainer.checkpoint.load(saved, source)
    if plan.update_bn and plan.cyclic_train and plan.budget.tickets and not batchnorms(setup.model):
        print_notes("this network has no BatchNorm statistics: there is nothing for --update_bn to re-estimate")
    if trainer.masking:
        if plan.explores_before(trainer.at.epoch):
            trainer.masking.check_can_explore()
        if plan.final_density is not None:
            check_leaves_weights(sum(mask.numel() for mask in trainer.masking.masks.values()), plan.final_density)
            if not plan.pre_train and trainer.masking.is_denser_than(plan.final_density):
                print_notes(f"the weights to start from are denser than the budget of {plan.final_density}")
        if unfinished := trainer.masking.unfinished_pruning(plan.updates_end_epoch * len(setup.sources.train)):
            print_notes(unfinished)
    return trainer


def start_of(plan: Plan, sparse: SparseTraining | None, output: Output) -> Start:
    """Read what ``output.resume`` names: see :func:`find_start`."""
    first_masks = sparse.first_masks(plan) if sparse else None
    return find_start(output.resume, output.folder, output.identity, plan, first_masks, output.settled)


def _trainer(
    setup: Setup,
    plan: Plan,
    sparse: SparseTraining | None,
    runtime: Runtime,
    output: Output,
    stop_signal: Callable[[], int],
    first_masks: str | None,
) -> Trainer:
    """A trainer at the first epoch of a plan; without ``first_masks``, its masks are still to be loaded."""
    device = next(setup.model.parameters()).device
    runtime = runtime.resolved(device)
    masking = _mask(setup, plan, sparse, first_masks) if sparse else None
    flops = layer_flops(setup.model, setup.sample_shape)
    network: Any = torch.compile(setup.model) if runtime.compile else setup.model
    executed = None
    if masking and runtime.execution != "masked":
        network = executed = sparse_execution(setup.model, masking, flops if runtime.execution == "auto" else None)
    return Trainer(
        Passes(setup.model, distributed.wrap(network, device), runtime.precision(), setup.label_smoothing, executed),
        setup.optimizer,
        masking,
        setup.sources,
        plan,
        output.folder,
        Progress(output.trackers),
        layer_flops=flops,
        log_interval=output.log_interval,
        keep_tickets=output.keep_tickets,
        keep_checkpoints=output.keep_checkpoints,
        identity=output.identity,
        stop_signal=stop_signal,
    )


def run(setup: Setup, plan: Plan, sparse: SparseTraining | None, runtime: Runtime, output: Output) -> Summary:
    """Do one run from its start, or from where it was stopped, to its end; print its table and return its summary.

    Raises:
        UsageError: if what ``resume`` names does not fit.
        FaultError: if training or the disk fails, or another run is using the folder.
        Stopped: on a stop signal, after writing the checkpoint.
    """
    if distributed.broadcast_object(has_own_checkpoint(output.folder)):  # as rank 0, which wrote it, sees it
        output = replace(output, resume=output.folder.path)
    with stop_signals() as stop_signal, ExitStack() as held:
        start = start_of(plan, sparse, output)
        trainer = prepare(setup, plan, sparse, runtime, output, stop_signal, start)
        if distributed.is_main() and trainer.masking:
            print(f"execution: {_execution(trainer)}", flush=True)
        config = {**output.config, "executed": _execution(trainer)}
        distributed.on_main(partial(open_folder, output.folder, start, config, held))
        del start  # a whole checkpoint, which need not stay in memory until the end
        summary = trainer.run()
        if distributed.is_main():
            write_json(output.folder.summary, summary)
            print(run_table(summary, output.folder.path))
        # All wait for the files, and agree: a signal that came too late to stop this run keeps the next from starting.
        if signal_number := distributed.max_over_ranks(stop_signal()):
            raise Stopped(signal_number, output.folder.checkpoint)
    return summary


def _execution(trainer: Trainer) -> str:
    """How the run begins to compute: ``auto`` may switch as masks change."""
    sparse = trainer.passes.sparse
    if sparse is None:
        return "masked" if trainer.masking else "dense"
    return "sparse" if sparse.is_sparse else "masked, which is faster at this density"


def _mask(setup: Setup, plan: Plan, sparse: SparseTraining, first_masks: str | None) -> Masking:
    """Make the Masking and draw its first masks, unless they are to be loaded."""
    # Cycles alone come after the steps of pre-training.
    masking = Masking(setup.optimizer, steps=plan.first_epoch * len(setup.sources.train), **sparse.masking)
    masking.updates_enabled = not sparse.frozen
    init = None if first_masks is None else SPARSE_INITS[first_masks]
    if init and init.needs_gradients:
        batch = setup.class_balanced_batch()
        setup.model.train()
        with keeping_buffers(setup.model):
            nn.functional.cross_entropy(setup.model(batch.images), batch.labels).backward()
    with catch_warnings():
        filterwarnings("ignore", "gradual pruning")  # `prepare` says so, and knows when updates end
        masking.add_module(
            setup.model,
            first_masks,
            pruning_rate=sparse.pruning_rate,
            keep_first_dense=sparse.keep_first_dense,
            dense_layers=sparse.dense_layers,
            layer_densities=sparse.layer_densities if init and init.shares_density else {},
        )
    if first_masks == "snip":
        _note_empty_layers(masking)
    setup.optimizer.zero_grad()
    return masking


def _note_empty_layers(masking: Masking) -> None:
    """Tell the user which layers saliency leaves empty, as it does where a classifier starts at zero."""
    if empty := [name for name, count in masking.active_counts().items() if not count]:
        print_notes(
            f"snip leaves no weight active in {len(empty)} of {len(masking.masks)} masked layers, {empty[-1]} among "
            "them: where a network's last weights start at zero, as in vision transformers, so does every saliency"
        )
