"""The records in a run's files, as typed values: the engine writes them, progress and reports read them.

The names of the fields are those in the files, in their order. A field without a default is in every run's file; one
with a default may be missing from those of earlier versions, and is None then.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from sparselearning.process.schema import Amount, Count, Mismatch, Ordinal, Record, Seed, Share


@dataclass(frozen=True, kw_only=True)
class EpochRow(Record):
    """A finished epoch: one line of ``metrics.jsonl``.

    Attributes:
        phase: of training.
        epoch: from 0.
        ticket: that the epoch's cycle ends in, from 1; None in pre-training.
        lr: of the last step.
        train_loss: mean per sample over the epoch, in nats.
        train_acc: in [0, 1], over the epoch.
        eval_loss: after the epoch.
        eval_acc: after the epoch.
        density: non-zero over maskable weights.
        explored: share of the maskable weights that have ever been active.
        samples: trained on, over all ranks.
        training_flops: spent on them.
        seconds: of training.
        images_per_second: of training, over all ranks.
    """

    phase: Literal["pretrain", "cycle"] | None = None
    epoch: Count
    ticket: Ordinal | None
    lr: Amount
    train_loss: float
    train_acc: Share
    eval_loss: float
    eval_acc: Share
    density: Share
    explored: Share | None = None
    samples: Count | None = None
    training_flops: Amount | None = None
    seconds: Amount | None = None
    images_per_second: Amount | None = None

    def __post_init__(self) -> None:
        if self.phase is not None and (self.phase == "cycle") != (self.ticket is not None):
            raise Mismatch(f"phase is {self.phase!r}, but ticket is {self.ticket}")


@dataclass(frozen=True, kw_only=True)
class TicketRow(Record):
    """A ticket and the superposition with it: one line of ``tickets.jsonl``.

    Attributes:
        ticket: from 1.
        ticket_acc: of the ticket, in [0, 1].
        superposed_acc: of the superposition with it, in [0, 1].
        factor: weight of the ticket in the superposition.
        union_density: of the superposition before it was pruned back.
        density: of the superposition.
        bn_flops: spent on re-estimating its BatchNorm statistics.
        seconds: of superposing, evaluation included.
    """

    ticket: Ordinal
    ticket_acc: Share
    superposed_acc: Share
    factor: Share | None = None
    union_density: Share | None = None
    density: Share | None = None
    bn_flops: Amount | None = None
    seconds: Amount | None = None


@dataclass(frozen=True, kw_only=True)
class Summary(Record):
    """A finished run: ``summary.json``.

    Attributes:
        pretrain_acc: of the network that pre-training left, in [0, 1].
        ticket_acc: of each ticket.
        superposed_acc: of the superposition with each ticket.
        final_acc: of the last superposition; without tickets, of the network that pre-training left.
        density: of that network: non-zero over maskable weights.
        gain: of its accuracy over pre-training, in points.
        gain_over_ticket: of its accuracy over the last ticket's, in points; None without tickets.
        images_per_second: of training.
        explored: share of the maskable weights that have ever been active.
        parameters: active ones of the final network.
        inference_flops: of the final network, per sample.
        training_flops: of the whole run.
        parameters_of_dense: as a multiple of the dense network's; the next two likewise.
        inference_flops_of_dense: the same.
        training_flops_of_dense: the same.
        test_acc: of the final network on a test set that was kept for the end; None: there was none.
        ema_acc: of the moving average of all steps' weights, measured as ``final_acc`` is; None: there was none.
        ema_test_acc: of the same on a test set that was kept for the end.
        total_seconds: of the whole run, stops left out.
    """

    pretrain_acc: Share
    ticket_acc: list[Share]
    superposed_acc: list[Share]
    final_acc: Share
    density: Share
    gain: float
    gain_over_ticket: float | None
    images_per_second: Amount | None = None
    explored: Share | None = None
    parameters: Count | None = None
    inference_flops: Amount | None = None
    training_flops: Amount | None = None
    parameters_of_dense: Amount | None = None
    inference_flops_of_dense: Amount | None = None
    training_flops_of_dense: Amount | None = None
    test_acc: Share | None = None
    ema_acc: Share | None = None
    ema_test_acc: Share | None = None
    total_seconds: Amount

    def __post_init__(self) -> None:
        tickets, superpositions = len(self.ticket_acc), len(self.superposed_acc)
        if tickets != superpositions:
            raise Mismatch(f"ticket_acc is of {tickets} tickets, and superposed_acc of {superpositions}")
        *_, (name, last) = (
            ("pretrain_acc", self.pretrain_acc),
            *(("superposed_acc", acc) for acc in self.superposed_acc),
        )
        if self.final_acc != last:
            raise Mismatch(f"final_acc is {self.final_acc}, but {name} ends at {last}")
        self._check_gain("gain", self.gain, "pretrain_acc", self.pretrain_acc)
        if tickets:
            self._check_gain("gain_over_ticket", self.gain_over_ticket, "ticket_acc", self.ticket_acc[-1])
        elif self.gain_over_ticket is not None:
            raise Mismatch(f"gain_over_ticket is {self.gain_over_ticket}, but ticket_acc is empty")

    def _check_gain(self, name: str, gain: float | None, start: str, before: float) -> None:
        if gain is None or not math.isclose(gain, 100 * (self.final_acc - before), abs_tol=1e-9):
            raise Mismatch(f"{name} is {gain}, but {start} is {before} and final_acc {self.final_acc}")


@dataclass(kw_only=True)
class Results(Record):
    """What a run has found so far, from which its rows and its summary are written: entries of ``checkpoint.pth``.

    Attributes:
        pretrain_acc: of the network that pre-training left, in [0, 1]; None before that.
        metrics: of the finished epochs.
        tickets: of the tickets.
        seconds: of training in the present epoch.
        total_seconds: of the run, stops left out.
    """

    pretrain_acc: Share | None
    metrics: list[EpochRow] = field(default_factory=list)
    tickets: list[TicketRow] = field(default_factory=list)
    seconds: Amount = 0.0
    total_seconds: Amount = 0.0


@dataclass(frozen=True, kw_only=True)
class Environment(Record):
    """Code, versions and hardware that a run depends on besides its flags: ``provenance.environment``.

    Attributes:
        commit: short hash of the checkout; None if there is none.
        versions: of Python and packages, by name.
        device: name of the GPU or the processor.
        threads: of PyTorch on the CPU.
        world_size: processes.
    """

    commit: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    device: str | None = None
    threads: Count | None = None
    world_size: Ordinal | None = None


@dataclass(frozen=True, kw_only=True)
class History(Environment):
    """What ``config.json`` says beside the flags.

    Attributes:
        resumed: environments that the run was resumed with, where they had changed.
        marks: what its script says of the flags that it declares itself, see ``flags.own_marks``.
    """

    resumed: list[Environment] = field(default_factory=list)
    marks: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Config(History):
    """The entries of ``config.json`` that reports read by name; the file has every flag of the run.

    Attributes:
        seed: of weights, masks, data order and augmentation.
        indicate_method: what the user called the run.
        sparse: with masks.
        fix: with a frozen topology.
        method: what happens at a topology update.
        growth: how weights are grown.
        sparse_init: how the first masks are drawn.
        pre_train: did the pre-training part.
        resume: what the run was resumed or started from.
        cyc_lr: with a cyclic learning rate.
        lr_1: at both ends of a cycle.
        lr_2: in the middle of a cycle.
    """

    seed: Seed
    indicate_method: str
    sparse: bool
    fix: bool
    method: str
    growth: str
    sparse_init: str | None = None
    pre_train: bool
    resume: str | None = None
    cyc_lr: bool = False
    lr_1: Amount | None = None
    lr_2: Amount | None = None

    @property
    def cycle_lr(self) -> tuple[float, float] | None:
        """``(lr_1, lr_2)`` of the cyclic learning rate; None: there is none."""
        if not self.cyc_lr or self.lr_1 is None or self.lr_2 is None:
            return None
        return self.lr_1, self.lr_2

    def __post_init__(self) -> None:
        if self.cyc_lr and None in (self.lr_1, self.lr_2):
            raise Mismatch(f"cyc_lr is on, but lr_1 is {self.lr_1} and lr_2 {self.lr_2}")


NO_FLAGS = {"command", "executed", "network", *(entry.name for entry in fields(History))}


def flags_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every flag's value in the content of ``config.json``."""
    return {name: value for name, value in config.items() if name not in NO_FLAGS}
