"""How fast a trainer's steps are, and where their time goes. Nothing is written."""

import itertools
import time
from collections.abc import Callable, Iterable

import torch
from torch.profiler import ProfilerActivity

from sparselearning.process import distributed
from sparselearning.training.data import Batch, BatchSource
from sparselearning.training.engine import Trainer

WARMUP_STEPS = 5
STEPS = 20
PROFILED_STEPS = 5


def measure(trainer: Trainer, *, training: bool, inference: bool, profile: bool) -> None:
    """Print images per second of training and evaluation steps, and a table of the costliest operations."""
    if training:
        trainer.passes.network.train()
        resident = next(iter(trainer.sources.train.epoch(0)))
        _report("training step, one resident batch", trainer, itertools.repeat(resident), trainer.train_batch)
        _report("training step, batches from the loader", trainer, endless(trainer.sources.train), trainer.train_batch)
    if inference:
        trainer.passes.network.eval()
        repeated = itertools.cycle(itertools.islice(trainer.sources.evaluation.epoch(0), 1))  # a rank may have none
        _report("evaluation step, one resident batch", trainer, repeated, trainer.passes.predict)
    if profile:
        _profile(trainer)


def endless(source: BatchSource) -> Iterable[Batch]:
    """Batches of one epoch after the other; none of a source that has none for this rank."""
    for epoch in itertools.count():
        batch = None
        for batch in source.epoch(epoch):
            yield batch
        if batch is None:
            return


def timed(
    trainer: Trainer, batches: Iterable[Batch], step: Callable[[Batch], object], steps: int, warmup_steps: int = 1
) -> tuple[float, int]:
    """Time ``steps`` steps, loading their batches included, after ``warmup_steps``; return seconds and images."""
    coming = iter(batches)
    for batch in itertools.islice(coming, warmup_steps):
        step(batch)
    _wait(trainer)
    images, began = 0, time.perf_counter()
    for batch in itertools.islice(coming, steps):
        step(batch)
        images += len(batch.labels)
    _wait(trainer)
    return time.perf_counter() - began, images


def _report(what: str, trainer: Trainer, batches: Iterable[Batch], step: Callable[[Batch], object]) -> None:
    seconds, images = timed(trainer, batches, step, STEPS, WARMUP_STEPS)
    rate = distributed.world_size() * images / seconds
    if distributed.is_main():
        print(f"{what}: {rate:,.1f} images/s over {STEPS} steps ({1000 * seconds / STEPS:.1f} ms per step)")


def _wait(trainer: Trainer) -> None:
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)


def _profile(trainer: Trainer) -> None:
    activities = [ProfilerActivity.CPU]
    if trainer.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    batch = next(iter(trainer.sources.train.epoch(0)))
    trainer.passes.network.train()
    for _ in range(WARMUP_STEPS):
        trainer.train_batch(batch)
    with torch.profiler.profile(activities=activities) as result:
        for _ in range(PROFILED_STEPS):
            trainer.train_batch(batch)
        _wait(trainer)
    if distributed.is_main():
        sort_by = "self_device_time_total" if trainer.device.type == "cuda" else "self_cpu_time_total"
        print(result.key_averages().table(sort_by=sort_by, row_limit=25, max_name_column_width=50))
