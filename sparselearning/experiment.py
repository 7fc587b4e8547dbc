"""The part of a script that is no recipe: device, masks, resuming, the run itself, and how it ends."""

import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from sparselearning import distributed
from sparselearning.checkpoint import RunFolder, find_checkpoint, load_torch, write_json
from sparselearning.data import Batch, BatchSource
from sparselearning.engine import Plan, Precision, Sources, Stopped, Trainer, stop_signals
from sparselearning.errors import FaultError, UsageError
from sparselearning.masking import Masking
from sparselearning.progress import Progress
from sparselearning.report import run_table
from sparselearning.sparse_init import SPARSE_INITS

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """Where and in which number formats a run computes."""

    use_cuda: bool = True
    amp: str = "off"

    def start(self) -> torch.device:
        """Join the other ranks, if any, and choose the device.

        Raises:
            UsageError: if the device cannot do what is asked.
        """
        device = distributed.start(self.use_cuda and torch.cuda.is_available())
        if self.amp == "fp16" and device.type != "cuda":
            raise UsageError("--fp16 needs a GPU, and none is in use here")
        return device

    def precision(self, device: torch.device) -> Precision:
        """Number formats of the forward pass."""
        scaler = torch.amp.GradScaler(device.type) if self.amp == "fp16" else None
        return Precision(AMP[self.amp], scaler)


@dataclass(frozen=True)
class SparseTraining:
    """How a run is kept sparse: the arguments of :class:`Masking` and of its ``add_module``."""

    masking: dict[str, Any]
    sparse_init: str = "ERK"
    pruning_rate: float = 0.5
    keep_first_dense: bool = False
    frozen: bool = False


@dataclass(frozen=True)
class Recipe:
    """What a data set brings: network, optimizer, batches, loss.

    Attributes:
        model: on the device.
        optimizer: over its parameters.
        sources: training and evaluation batches.
        test: the test set, touched once, at the end; None if the evaluation set is the test set.
        class_balanced_batch: draws the batch that masks by gradient (``snip``, ``prune_and_grow_*``) are drawn from.
        label_smoothing: of the training loss.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    sources: Sources
    class_balanced_batch: Callable[[], Batch]
    test: BatchSource | None = None
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class Output:
    """What a run writes and shows.

    Attributes:
        folder: the run's folder.
        config: content of ``config.json``.
        identity: the part of it that a resumed run must share.
        resume: where to start from.
    """

    folder: RunFolder
    config: dict[str, Any]
    identity: dict[str, Any] = field(default_factory=dict)
    resume: Path | None = None
    log_interval: int = 100
    keep_tickets: bool = False


def run(recipe: Recipe, plan: Plan, sparse: SparseTraining | None, runtime: Runtime, output: Output) -> dict[str, Any]:
    """Do one run from its start, or from where it was stopped, to its table; return ``summary.json``'s content.

    Raises:
        UsageError: if what ``resume`` names does not fit.
        FaultError: if training or the disk fails.
        Stopped: on SIGINT or SIGTERM, after writing the checkpoint.
    """
    began = time.perf_counter()
    device = next(recipe.model.parameters()).device
    saved = load_torch(find_checkpoint(output.resume)) if output.resume else None
    continues = saved is not None and _continues(saved, plan, sparse, output)
    if saved is not None and not continues:
        load_weights(recipe.model, saved, output.resume)
    masking = None
    if sparse:
        init = sparse.sparse_init
        if continues:
            init = "GMP"  # any: the checkpoint's masks replace them
        elif not plan.pre_train and not SPARSE_INITS[init].needs_trained_weights:
            init = "resume"  # cycles alone start from trained weights, which random masks would destroy
        masking = _mask(recipe, sparse, init)
    network = distributed.wrap(recipe.model, device)
    batches = len(recipe.sources.train)
    with stop_signals() as stop_signal:
        trainer = Trainer(
            recipe.model,
            network,
            recipe.optimizer,
            masking,
            recipe.sources,
            plan,
            output.folder,
            Progress(
                (plan.end_epoch - plan.first_epoch) * batches,
                (saved["epoch"] - plan.first_epoch) * batches + saved["batch"] if continues and saved else 0,
            ),
            precision=runtime.precision(device),
            label_smoothing=recipe.label_smoothing,
            log_interval=output.log_interval,
            keep_tickets=output.keep_tickets,
            config=output.identity,
            stop_signal=stop_signal,
        )
        if saved is not None:
            if continues:
                trainer.load_checkpoint(saved)
            elif not plan.pre_train and "optimizer" in saved:
                trainer.load_training_state(saved)
        _open_folder(output, keep=continues)
        summary = trainer.run()
    if recipe.test is not None:
        summary["test_acc"] = trainer.evaluate_superposition(recipe.test)[1]
    summary["total_seconds"] = time.perf_counter() - began
    if distributed.is_main():
        write_json(output.folder.summary, summary)
        print(run_table(summary, output.folder.path))
    distributed.barrier()
    return summary


def run_script(main: Callable[[], None]) -> None:
    """Run a script's ``main`` and leave the process with one clear sentence and the right status if it fails."""
    try:
        main()
        distributed.stop()
        return
    except Stopped as stop:
        message, code = f"{stop}: go on with --resume {stop.checkpoint.parent}", stop.exit_code
    except (UsageError, FaultError) as error:
        message, code = f"error: {error}", error.exit_code
    except torch.OutOfMemoryError as error:
        message, code = f"error: the GPU's memory is full ({error.args[0].splitlines()[0]}): try a smaller batch", 1
    except KeyboardInterrupt:
        message, code = "stopped before training began: nothing was written", 130
    if distributed.is_main():
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
    distributed.stop()
    sys.exit(code)


def _mask(recipe: Recipe, sparse: SparseTraining, init: str) -> Masking:
    """Make the masking and draw its first masks."""
    masking = Masking(recipe.optimizer, **sparse.masking)
    masking.updates_enabled = not sparse.frozen
    if SPARSE_INITS[init].needs_gradients:
        buffers = [(buffer, buffer.clone()) for buffer in recipe.model.buffers()]
        batch = recipe.class_balanced_batch()
        recipe.model.train()
        nn.functional.cross_entropy(recipe.model(batch.images), batch.labels).backward()
        for buffer, before in buffers:
            buffer.copy_(before)
    masking.add_module(recipe.model, init, pruning_rate=sparse.pruning_rate, keep_first_dense=sparse.keep_first_dense)
    recipe.optimizer.zero_grad()
    return masking


def _continues(saved: Mapping[str, Any], plan: Plan, sparse: SparseTraining | None, output: Output) -> bool:
    """Whether a saved file is a run with these very flags, to go on with; else its weights are a start.

    Raises:
        UsageError: if it is neither.
    """
    is_checkpoint = "config" in saved
    if is_checkpoint and saved["config"] == output.identity:
        if len(saved["ranks"]) != distributed.world_size():
            raise UsageError(
                f"{output.resume} was written by {len(saved['ranks'])} process(es): go on with as many, "
                f"not {distributed.world_size()}"
            )
        return True
    if not plan.pre_train or (sparse and SPARSE_INITS[sparse.sparse_init].needs_trained_weights):
        return False
    if not is_checkpoint:
        raise UsageError(
            f"{output.resume} is no checkpoint of a run: weights alone can start --cyclic_train without --pre_train, "
            "or --sparse-init resume and prune_*"
        )
    names = sorted(saved["config"].keys() | output.identity.keys())
    differing = [
        f"{name} ({saved['config'].get(name)} there, {output.identity.get(name)} here)"
        for name in names
        if saved["config"].get(name) != output.identity.get(name)
    ]
    raise UsageError(f"{output.resume} belongs to a run with other flags: {', '.join(differing)}")


def load_weights(model: nn.Module, saved: Mapping[str, Any], source: Path | None) -> None:
    """Load the weights of any saved ``.pth``: a run's file, or a bare state dict, data-parallel or not.

    Raises:
        UsageError: if they belong to another model.
    """
    state: Mapping[str, Tensor] = saved.get("state_dict", saved)
    state = {name.removeprefix("module."): entry for name, entry in state.items()}
    own = model.state_dict()
    for name in [*own, *state]:
        if name not in own or name not in state or own[name].shape != getattr(state[name], "shape", None):
            raise UsageError(f"{source} holds weights of another model: {name} does not fit")
    model.load_state_dict(state)


def _open_folder(output: Output, keep: bool) -> None:
    """Make the run's folder and write ``config.json``; an earlier run of the same name moves aside."""
    if distributed.is_main():
        folder = output.folder
        goes_on_here = (
            keep and output.resume and find_checkpoint(output.resume).parent.resolve() == folder.path.resolve()
        )
        if not goes_on_here and (aside := folder.make_room()):
            print(f"an earlier run stood in {folder.path}: moved to {aside}", file=sys.stderr)
        write_json(folder.config, output.config)
    distributed.barrier()


def environment(device: torch.device) -> dict[str, Any]:
    """What else a result depends on: versions and hardware."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "world_size": distributed.world_size(),
    }
