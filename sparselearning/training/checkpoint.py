"""What ``checkpoint.pth`` holds, entry by entry: read before a run believes any of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparselearning.process import distributed
from sparselearning.process.errors import UsageError
from sparselearning.process.schema import LARGEST, Amount, Count, FlagValue, Mismatch, Share
from sparselearning.process.seeding import rng_schema
from sparselearning.process.tensor_schema import (
    Check,
    all_of,
    between,
    check,
    conform,
    empty_or,
    exactly,
    inside,
    like,
    mapping,
    optional,
    record,
    sequence,
    tensor,
)
from sparselearning.sparse.masking import Masking
from sparselearning.sparse.optimizer_state import OPTIMIZER, optimizer_schema
from sparselearning.sparse.superpose import differing_entries, floating_entries
from sparselearning.training.networks import masked_zeros, state_schema
from sparselearning.training.passes import Passes, Tally
from sparselearning.training.plan import Plan
from sparselearning.training.records import EpochRow, TicketRow

MARKS = {"masking", "ranks"}
"""Entries that tell a checkpoint from other programs' files."""


def some(value: Any, where: str) -> None:
    """A list that is not empty."""
    conform(value, list[Any], where)
    if not value:
        raise Mismatch(f"{where} is empty")


HEAD = record({"config": dict[str, FlagValue], "epoch": Count, "state_dict": mapping(Any), "ranks": some})
"""What is read of a checkpoint to find out whose it is, and what it is to be used for."""
SCALER = record(
    {
        "scale": between(float, torch.finfo(torch.float32).tiny, LARGEST),
        "growth_factor": between(float, 1, LARGEST),
        "backoff_factor": Share,
        "growth_interval": between(int, 1, 2**31 - 1),
        "_growth_tracker": between(int, 0, 2**31 - 1),
    }
)
"""What ``torch.amp.GradScaler`` saves."""


@dataclass(frozen=True)
class CheckpointSchema:
    """What the checkpoints of one run hold.

    Attributes:
        passes: of the run's network.
        optimizer: over its parameters.
        masking: keeps it sparse; None: dense training.
        plan: of the run.
        batches: training batches of an epoch.
    """

    passes: Passes
    optimizer: torch.optim.Optimizer
    masking: Masking | None
    plan: Plan
    batches: int

    def check(self, saved: Mapping[str, Any], source: Path) -> None:
        """Check all of a checkpoint of this very run.

        Raises:
            FaultError: if an entry is missing, or not as ``Trainer.save_checkpoint`` writes it.
        """
        end = self.plan.end_epoch
        check(saved, record({"epoch": between(int, self.plan.first_epoch, end)}), source)
        check(saved, record({"batch": between(int, 0, self.batches if saved["epoch"] < end else 0)}), source)
        check(saved, self.at(saved["epoch"], saved["batch"]), source)

    def at(self, epoch: int, batch: int) -> Check:
        """What ``Trainer.save_checkpoint`` writes at a position of the run."""
        plan, start = self.plan, self.plan.budget.pretrain_epochs
        # Pre-training ends with a superposition. Cycles alone adopt one before their first batch.
        superposed = epoch > start or (epoch == start and (plan.first_epoch < start or batch > 0))
        masks = record({name: like(mask) for name, mask in self._masks.items()}, exact=True)
        gradients = {name: optional(like(p, finite=False)) for name, p in self.passes.model.named_parameters()}
        scaler = self.passes.precision.scaler
        rank = {
            "rng": rng_schema(self.passes.device),
            "buffers": state_schema(dict(self.passes.model.named_buffers())),
            "tally": Tally.check,
            "flops": Amount,
        }
        averaged = {name: like(entry) for name, entry in floating_entries(self.passes.model).items()}
        started = epoch > plan.first_epoch or batch > 0
        fields = {
            "config": dict[str, FlagValue],
            "epoch": exactly(epoch),
            "batch": exactly(batch),
            "trained": bool if batch == self.batches else exactly(False),
            "state_dict": self._state,
            "masks": masks,
            "optimizer": self._optimizer,
            "masking": self.masking.schema() if self.masking else exactly(None),
            "scaler": SCALER if scaler and scaler.is_enabled() else Any,
            "gradients": record(gradients, exact=True) if self.keeps_gradients(epoch, batch) else exactly(None),
            "superposition": self._state if superposed else exactly(None),
            "superposition_masks": masks if superposed and plan.final_density else empty_or(masks),
            "pretrain_acc": Share if superposed else exactly(None),
            "metrics": list[EpochRow],
            "tickets": list[TicketRow],
            "seconds": Amount,
            "total_seconds": Amount,
            "ranks": sequence(list, *[record(rank)] * distributed.world_size()),
        }
        if plan.ema_decay is not None:
            fields["average"] = record(averaged if started else {}, exact=True)
        return all_of(
            record(fields),
            masked_zeros("state_dict", "masks"),
            masked_zeros("superposition", "superposition_masks"),
            _rows_before(plan, epoch),
            self._together(epoch, batch),
        )

    def keeps_gradients(self, epoch: int, batch: int) -> bool:
        """Whether a checkpoint at this position holds gradients: the exploration that follows reads them."""
        return batch == self.batches and self.plan.explores_before(epoch + 1)

    def usable_here(self, saved: Mapping[str, Any], source: Path) -> dict[str, Any]:
        """Check and return what of another run's checkpoint this run can go on from: weights, optimizer, masks.

        Raises:
            UsageError: if its masks are of other layers.
            FaultError: if it is damaged.
        """
        masking = record({"masks": mapping(tensor(dtype=torch.bool))})
        check(saved, record({"state_dict": self._state, "optimizer": OPTIMIZER, "masking": optional(masking)}), source)
        usable, fields = {"state_dict": saved["state_dict"]}, {}
        own, other = (by["param_groups"] for by in (self.optimizer.state_dict(), saved["optimizer"]))
        if [group.keys() for group in own] == [group.keys() for group in other]:  # else it is of another kind
            usable["optimizer"], fields["optimizer"] = saved["optimizer"], self._optimizer
        if self.masking and saved["masking"]:
            if differing := differing_entries(self._masks, saved["masking"]["masks"]):
                raise UsageError(
                    f"{source} has masks of another model, or of other layers of it: {differing[0]} does not fit"
                )
            usable["masking"], fields["masking"] = saved["masking"], self.masking.schema()
        check(usable, record(fields), source)
        return usable

    @property
    def _masks(self) -> dict[str, torch.Tensor]:
        return self.masking.masks if self.masking else {}

    @property
    def _state(self) -> Check:
        return state_schema(self.passes.model.state_dict())

    @property
    def _optimizer(self) -> Check:
        return optimizer_schema(self.optimizer, {p: name for name, p in self.passes.model.named_parameters()})

    def _together(self, epoch: int, batch: int) -> Check:
        """What is said twice is said alike."""
        done = (epoch - self.plan.first_epoch) * self.batches + batch
        # Cycles alone go on counting from the steps of pre-training.
        steps = record({"steps": between(int, done, done if self.plan.pre_train else LARGEST)})

        def check_together(saved: Mapping[str, Any], where: str) -> None:
            if self.masking:
                steps(saved["masking"], inside(where, "masking"))
            for name, mask in saved["masks"].items():
                if not torch.equal(mask, saved["masking"]["masks"][name]):
                    raise Mismatch(f"{inside(where, 'masks')}.{name} is not the mask that masking has")
            samples = sum(float(rank["tally"][2]) for rank in saved["ranks"])
            if (samples > 0) != (batch > 0):
                raise Mismatch(f"{inside(where, 'ranks')} count {samples:g} samples in {batch} batches")

        return check_together


def _rows_before(plan: Plan, epoch: int) -> Check:
    """Rows of ``metrics`` and ``tickets`` are those of the epochs before this one."""

    def check_rows(saved: Mapping[str, Any], where: str) -> None:
        epochs = range(plan.first_epoch, epoch)
        found = [(row["epoch"], row["ticket"]) for row in saved["metrics"]]
        if found != [(past, plan.ticket(past)) for past in epochs]:
            raise Mismatch(f"{inside(where, 'metrics')} are not of the {len(epochs)} epochs before epoch {epoch}")
        tickets = sum(map(plan.ends_cycle, epochs))
        if [row["ticket"] for row in saved["tickets"]] != list(range(1, tickets + 1)):
            raise Mismatch(f"{inside(where, 'tickets')} are not the {tickets} tickets before epoch {epoch}")

    return check_rows
