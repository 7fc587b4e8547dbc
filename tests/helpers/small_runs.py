"""Runs of a network of a few hundred weights, with all of the method, in memory and on disk."""

import copy
import dataclasses
import math
import signal

import torch
from torch import nn

from helpers.comparing import lines, plain, without_times
from sparselearning.process.files import load_torch
from sparselearning.sparse.superpose import AVERAGING
from sparselearning.training import experiment
from sparselearning.training.data import Batch, Sources
from sparselearning.training.experiment import Output, Setup, SparseTraining
from sparselearning.training.plan import EpochBudget, Plan
from sparselearning.training.run_folder import RunFolder
from sparselearning.training.runtime import Runtime


class Batches:
    """Batches that depend on (epoch, batch) alone; the last one is smaller. Counts the passes made over it."""

    def __init__(self, samples, batch_size, *, shuffled=False, seed=0, poison=None):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(samples) % 3
        self.images = torch.randn(samples, 2, 5, 5, generator=generator) + self.labels.view(-1, 1, 1, 1) * 0.5
        self.num_samples, self.batch_size, self.shuffled, self.poison = samples, batch_size, shuffled, poison
        self.passes = 0

    def __len__(self):
        return math.ceil(self.num_samples / self.batch_size)

    def epoch(self, epoch, start=0):
        self.passes += 1
        order = torch.arange(self.num_samples)
        if self.shuffled:
            order = torch.randperm(self.num_samples, generator=torch.Generator().manual_seed(epoch))
        for batch in range(start, len(self)):
            mine = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            images = self.images[mine]
            if self.poison == (epoch, batch):
                images = images * torch.nan
            yield Batch(images, self.labels[mine])


def network(dropout):
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(54, 10),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(10, 3),
    )


MASKABLE = {"0.weight": 108, "5.weight": 540, "8.weight": 30}
TOTAL = sum(MASKABLE.values())

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4, fused=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, fused=True),
}
# Pre-training of 2 epochs, then 2 cycles of 2, all of the method switched on.
PLAN = Plan(
    budget=EpochBudget(pretrain_epochs=2, cycle_epochs=2, tickets=2),
    pretrain_lr=lambda epoch: 0.05,
    averaging=AVERAGING["CIMA"](0.5),
    cycle_lr=(0.01, 0.1),
    explore_rate=0.4,
    update_bn=True,
    final_density=0.2,
)
DENSE = dataclasses.replace(PLAN, explore_rate=None, final_density=None)

MASKING = {
    "method": "GraNet",
    "growth": "gradient",
    "prune_rate": 0.3,
    "decay_schedule": "cosine",
    "update_frequency": 2,
    "init_density": 0.5,
    "final_density": 0.2,
    "prune_start_step": 0,
    "prune_end_step": 6,
    "total_steps": 18,
    "seed": 3,
}


def sparse(frozen=False, sparse_init="ERK", **changes):
    return SparseTraining(masking=MASKING | changes, frozen=frozen, sparse_init=sparse_init)


class Signals:
    """Asks for a stop at one of the points where the trainer looks for signals, and counts them."""

    def __init__(self, at=None, number=signal.SIGTERM):
        self.looks, self.at, self.number = 0, at, number

    def __call__(self):
        self.looks += 1
        return int(self.number) if self.looks == self.at else 0


def set_up(dropout=0.0, optimizer="sgd", train=None, test=None, memory_format=torch.contiguous_format):
    model = network(dropout).to(memory_format=memory_format)
    train = train or Batches(20, 8, shuffled=True)
    return Setup(
        model=model,
        optimizer=OPTIMIZERS[optimizer](model.parameters()),
        sources=Sources(train=train, train_once=train, evaluation=Batches(13, 8, seed=1), test=test),
        sample_shape=(2, 5, 5),
        class_balanced_batch=lambda: next(Batches(9, 9).epoch(0)),
    )


def prepare(
    folder, plan=PLAN, masks=MASKING, signals=None, *, resume=None, flags=None, brought=None, amp="off", **options
):
    """A trainer in ``folder``; ``masks`` are the arguments of a Masking, a SparseTraining, or None for dense."""
    torch.manual_seed(1 if resume is None else 999)  # what resuming does not bring back would show
    masks = sparse(**masks) if isinstance(masks, dict) else masks
    output = Output(RunFolder(folder), config={}, identity=flags or {"flags": "the same"}, resume=resume)
    output = dataclasses.replace(output, **{k: options.pop(k) for k in list(options) if hasattr(output, k)})
    signals = signals or Signals()
    return experiment.prepare(brought or set_up(**options), plan, masks, Runtime(amp=amp), output, signals)


def result(trainer, summary):
    """All that a run ends with, in memory and on disk, but for the times."""
    folder = trainer.folder
    return {
        "weights": plain(trainer.model.state_dict()),
        "optimizer": plain(trainer.optimizer.state_dict()["state"]),
        "masking": plain(trainer.masking.state_dict()) if trainer.masking else None,
        "superposition": plain(trainer.superposition.state),
        "superposition masks": plain(trainer.superposition.masks),
        "metrics": [without_times(row) for row in lines(folder.metrics)],
        "tickets": [without_times(row) for row in lines(folder.tickets)],
        "summary": without_times(summary.as_dict()),
        "current": plain(load_torch(folder.current)),
        "previous": plain(load_torch(folder.previous)),
    }


def record_steps(trainer):
    """Before each step: the rate. After each step: its number, the weights, the active counts."""
    seen = []
    step = trainer.train_batch

    def train_batch(batch):
        before = copy.deepcopy(trainer.model.state_dict())
        rate = trainer.optimizer.param_groups[0]["lr"]
        position = trainer.at.epoch, trainer.at.batch
        step(batch)
        masks = {k: m.clone() for k, m in trainer.masking.masks.items()} if trainer.masking else {}
        seen.append((position, rate, before, copy.deepcopy(trainer.model.state_dict()), masks))

    trainer.train_batch = train_batch
    return seen


def non_zeros(state):
    return sum(int(torch.count_nonzero(state[name])) for name in MASKABLE)


def mixed(previous, ticket, factor):
    return {
        name: ((1 - factor) * previous[name].double() + factor * t.double()).float() if t.is_floating_point() else t
        for name, t in ticket.items()
    }


def ticket_states(folder, count):
    return [load_torch(folder.ticket(number))["state_dict"] for number in range(count + 1)]
