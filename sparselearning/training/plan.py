"""When a run does what: which epoch belongs to which phase, ticket and learning rate."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sparselearning.process.schema import Count, Record
from sparselearning.sparse.schedules import cyclic_lr
from sparselearning.sparse.superpose import Averaging


@dataclass(frozen=True)
class EpochBudget:
    """How one run divides its epochs between pre-training and cycles of ``cycle_epochs`` each."""

    pretrain_epochs: int
    cycle_epochs: int
    tickets: int

    @property
    def cyclic_epochs(self) -> int:
        """Epochs spent in cycles."""
        return self.cycle_epochs * self.tickets

    @property
    def total_epochs(self) -> int:
        """Epochs of the whole run."""
        return self.pretrain_epochs + self.cyclic_epochs

    @classmethod
    def of_share(cls, epochs: int, cycle_rate: float, cycle_epochs: int) -> "EpochBudget":
        """Give ``cycle_rate`` of the epochs to whole cycles and the rest to pre-training (Sup-tickets, sec. 3).

        >>> EpochBudget.of_share(250, 0.1, 8)
        EpochBudget(pretrain_epochs=226, cycle_epochs=8, tickets=3)
        """
        # 0.3 * 10 is 2.9999999999999996 in binary; the nudge keeps floor() from losing that epoch.
        tickets = math.floor(epochs * cycle_rate + 1e-9) // cycle_epochs
        return cls(epochs - tickets * cycle_epochs, cycle_epochs, tickets)


@dataclass(kw_only=True)
class Position(Record):
    """Position of a run, which its parts share. Its fields are entries of ``checkpoint.pth``.

    Attributes:
        epoch: the present one, from 0; at the end of the run, the plan's ``end_epoch``.
        batch: training batches of the epoch that are done.
        trained: whether all of them are, and what follows them in the epoch is not.
    """

    epoch: Count
    batch: Count = 0
    trained: bool = False

    def next_epoch(self) -> None:
        """Move to the start of the next epoch."""
        self.epoch, self.batch, self.trained = self.epoch + 1, 0, False

    def state_dict(self) -> dict[str, Any]:
        """Its entries of a checkpoint."""
        return self.as_dict()

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Move to where a checkpoint was written."""
        vars(self).update({name: saved[name] for name in vars(self)})


@dataclass(frozen=True)
class Plan:
    """When a run does what.

    Attributes:
        budget: epochs of pre-training and of cycles.
        pre_train: do the pre-training part.
        cyclic_train: do the cycles.
        pretrain_lr: epoch to learning rate.
        cycle_lr: ``(lr_1, lr_2)`` of the cyclic learning rate; None: the last rate of pre-training stays.
        explore_rate: share of every layer's active weights that the exploration at the start of a cycle moves;
            None: no exploration.
        updates_in_cycles: whether the periodic topology updates continue in the cycles.
        averaging: ticket number 1, 2, … to the factors that are tried as its weight in the superposition, in [0, 1].
        update_bn: re-estimate the superposition's BatchNorm statistics.
        final_density: budget that a superposition is pruned back to; None: dense training.
        ema_decay: of the moving average of all steps' weights, in (0, 1); None: there is none.
    """

    budget: EpochBudget
    pretrain_lr: Callable[[int], float]
    averaging: Averaging
    pre_train: bool = True
    cyclic_train: bool = True
    cycle_lr: tuple[float, float] | None = None
    explore_rate: float | None = None
    updates_in_cycles: bool = True
    update_bn: bool = False
    final_density: float | None = None
    ema_decay: float | None = None

    @property
    def first_epoch(self) -> int:
        """Epoch that the run starts with; cycles alone start where pre-training would have ended."""
        return 0 if self.pre_train else self.budget.pretrain_epochs

    @property
    def end_epoch(self) -> int:
        """Epoch after the run's last one."""
        return self.budget.total_epochs if self.cyclic_train else self.budget.pretrain_epochs

    @property
    def updates_end_epoch(self) -> int:
        """Epoch after the last one with periodic topology updates."""
        return self.end_epoch if self.updates_in_cycles else self.budget.pretrain_epochs

    def is_cycle(self, epoch: int) -> bool:
        """Whether an epoch belongs to a cycle."""
        return epoch >= self.budget.pretrain_epochs

    def starts_cycle(self, epoch: int) -> bool:
        """Whether a cycle starts with this epoch."""
        return self._in_cycle(epoch) == 0 and self.is_cycle(epoch) and epoch < self.end_epoch

    def explores_before(self, epoch: int) -> bool:
        """Whether connections are explored between the epoch before and this one."""
        return self.explore_rate is not None and self.starts_cycle(epoch)

    def ends_cycle(self, epoch: int) -> bool:
        """Whether a ticket is ready at the end of this epoch."""
        return self.is_cycle(epoch) and self._in_cycle(epoch + 1) == 0

    def ticket(self, epoch: int) -> int | None:
        """Number, from 1, of the ticket that this epoch works on."""
        if not self.is_cycle(epoch):
            return None
        return (epoch - self.budget.pretrain_epochs) // self.budget.cycle_epochs + 1

    def is_superposed(self, at: Position) -> bool:
        """Whether there is a superposition where a run is stopped; cycles alone begin one before their first batch."""
        start = self.budget.pretrain_epochs
        return at.epoch > start or (at.epoch == start and (self.first_epoch < start or at.batch > 0))

    def lr(self, epoch: int, batch: int, batches: int) -> float:
        """Learning rate of one batch."""
        if not self.is_cycle(epoch):
            return self.pretrain_lr(epoch)
        if self.cycle_lr is None:
            return self.pretrain_lr(max(self.budget.pretrain_epochs - 1, 0))
        return cyclic_lr((self._in_cycle(epoch) + batch / batches) / self.budget.cycle_epochs, *self.cycle_lr)

    def _in_cycle(self, epoch: int) -> int:
        return (epoch - self.budget.pretrain_epochs) % self.budget.cycle_epochs
