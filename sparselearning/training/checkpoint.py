"""``checkpoint.pth``: all that a run needs to resume bit by bit, collected from its parts and given back to them.

Nothing of a file is used before every entry has been checked.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from sparselearning.process import distributed
from sparselearning.process.errors import UsageError
from sparselearning.process.files import copy_whole, save_torch
from sparselearning.process.schema import LARGEST, Amount, Count, FlagValue, Mismatch, Share, read
from sparselearning.process.seeding import rng_schema, rng_state, set_rng_state
from sparselearning.process.tensor_schema import (
    Check,
    Kind,
    all_of,
    between,
    check,
    conform,
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
from sparselearning.sparse.optimizer_state import OPTIMIZER, load_optimizer_state, optimizer_schema, optimizer_state
from sparselearning.sparse.superpose import MovingAverage, differing_entries
from sparselearning.training.measurements import Measurements
from sparselearning.training.networks import masked_zeros, state_schema
from sparselearning.training.passes import Passes, Tally
from sparselearning.training.plan import Plan, Position
from sparselearning.training.run_folder import RunFolder
from sparselearning.training.superposition import Superposition

SECONDS_BETWEEN_CHECKPOINTS = 60
MARKS = {"masking", "ranks"}
"""Entries that tell a checkpoint from other programs' files."""


def some(value: Any, where: str) -> None:
    """A list that is not empty."""
    conform(value, list[Any], where)
    if not value:
        raise Mismatch(f"{where} is empty")


HEAD = record({"config": dict[str, FlagValue], "epoch": Count, "state_dict": mapping(Any), "ranks": some})
"""What is read of a checkpoint to find out which run's it is, and how a new run can use it."""
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


class Part(Protocol):
    """A part of a run whose state is in its checkpoint, as entries that no other part has."""

    def state_dict(self) -> dict[str, Any]:
        """Its entries, by name."""

    def schema(self, at: Position) -> Check:
        """What they hold at a position of the run."""

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take them back from among all entries, once these are checked."""


@dataclass(frozen=True)
class Entry:
    """A part with a single entry: the state of something that does not know of checkpoints.

    Attributes:
        name: of the entry.
        kind: what it holds at a position of the run.
        save: returns it.
        load: takes it back.
    """

    name: str
    kind: Callable[[Position], Kind]
    save: Callable[[], Any]
    load: Callable[[Any], object]

    def state_dict(self) -> dict[str, Any]:
        """The entry, by its name."""
        return {self.name: self.save()}

    def schema(self, at: Position) -> Check:
        """What it holds at a position of the run."""
        return record({self.name: self.kind(at)})

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take it back."""
        self.load(saved[self.name])


class Checkpoint:
    """Writes the checkpoint of a run, and lets the run resume from one.

    Args:
        folder: of the run.
        identity: values that a checkpoint must share with the run that resumes from it (``kept_flags.identity``).
        plan: of the run.
        at: the position of the run.
        batches: training batches of an epoch.
        passes: of the network.
        optimizer: over its parameters.
        masking: keeps it sparse; None: dense training.
        superposition: so far.
        results: the rows, clocks and costs so far.
        average: of the weights of all steps; None: there is none.
        keep_all: write a checkpoint after every epoch, and keep them all.
    """

    def __init__(
        self,
        folder: RunFolder,
        identity: Mapping[str, Any],
        plan: Plan,
        at: Position,
        batches: int,
        passes: Passes,
        optimizer: torch.optim.Optimizer,
        masking: Masking | None,
        *,
        superposition: Superposition,
        results: Measurements,
        average: MovingAverage | None,
        keep_all: bool,
    ) -> None:
        self._folder = folder
        self._identity = dict(identity)
        self._plan = plan
        self._at = at
        self._batches = batches
        self._optimizer = optimizer
        self._masking = masking
        self._keep_all = keep_all
        self._written_at = float("-inf")
        self._momentum = momentum(optimizer, passes.model)
        self._topology = topology(masking)
        self._parts: list[Part] = [
            weights(passes.model),
            self._momentum,
            self._topology,
            loss_scale(passes.precision.scaler),
            gradients(passes.model, at, self._keeps_gradients),
            superposition,
            results,
        ]
        if average is not None:
            self._parts.append(moving_average(average, plan))
        self._own_parts = [random_numbers(passes.device), buffers(passes.model), tally(results), flops(results)]

    # ---------------------------------------------------------------------------------------------- writing

    def save(self) -> None:
        """Write all that :meth:`load` needs to resume here. Called by all ranks."""
        own = distributed.gather_objects(collected(self._own_parts))
        if distributed.is_main():
            entries = {"config": self._identity, **self._at.state_dict(), **collected(self._parts), "ranks": own}
            masks = entries["masking"]["masks"] if self._masking else {}  # the same tensors: the file holds them once
            save_torch(self._folder.checkpoint, entries | {"masks": masks})
        self._written_at = time.monotonic()

    def save_if_due(self, important: bool) -> None:
        """Write it after an epoch, if it is important or the last one was written a while ago."""
        overdue = time.monotonic() - self._written_at > SECONDS_BETWEEN_CHECKPOINTS
        if distributed.broadcast_object(important or overdue or self._keep_all):
            self.save()
            if self._keep_all and distributed.is_main():
                copy_whole(self._folder.checkpoint, self._folder.epoch_checkpoint(self._at.epoch))

    def _keeps_gradients(self, at: Position) -> bool:
        """Whether there are gradients in it at this position: the exploration that follows reads them."""
        return at.batch == self._batches and self._plan.explores_before(at.epoch + 1)

    # ---------------------------------------------------------------------------------------------- reading

    def load(self, saved: Mapping[str, Any], source: Path) -> None:
        """Go back to where :meth:`save` was called.

        Args:
            saved: what it wrote.
            source: for messages.

        Raises:
            FaultError: if an entry is not as this run writes it; nothing is changed then.
        """
        self.check(saved, source)
        self._at.load_state_dict(saved)
        for part in self._parts:
            part.load_state_dict(saved)
        for own_part in self._own_parts:
            own_part.load_state_dict(saved["ranks"][distributed.rank()])

    def load_training(self, saved: Mapping[str, Any], source: Path) -> None:
        """Take over momentum, masks and step counter of another run's checkpoint, not its position or seed.

        The optimizer keeps its own settings; of another kind of optimizer nothing is taken over.

        Raises:
            UsageError: if its masks are of other layers.
            FaultError: if it is damaged; nothing is changed then.
        """
        masking = record({"masks": mapping(tensor(dtype=torch.bool))})
        check(saved, record({"optimizer": OPTIMIZER, "masking": optional(masking)}), source)
        parts = []
        own, other = (by["param_groups"] for by in (self._optimizer.state_dict(), saved["optimizer"]))
        if [group.keys() for group in own] == [group.keys() for group in other]:  # else it is of another kind
            parts.append(self._momentum)
        if self._masking and saved["masking"]:
            if differing := differing_entries(self._masking.masks, saved["masking"]["masks"]):
                raise UsageError(
                    f"{source} has masks of another model, or of other layers of it: {differing[0]} does not fit"
                )
            parts.append(self._topology)
        check(saved, all_of(*(part.schema(self._at) for part in parts)), source)
        for part in parts:
            part.load_state_dict(saved)

    def check(self, saved: Mapping[str, Any], source: Path) -> None:
        """Check all of a checkpoint of this very run.

        Raises:
            FaultError: if an entry is missing, or not as :meth:`save` writes it.
        """
        first, end = self._plan.first_epoch, self._plan.end_epoch
        check(saved, all_of(Position, record({"epoch": between(int, first, end)})), source)
        at = read(Position, saved, str(source))
        check(saved, record({"batch": between(int, 0, self._batches if at.epoch < end else 0)}), source)
        masks = {name: like(mask) for name, mask in self._masking.masks.items()} if self._masking else {}
        own = all_of(*(part.schema(at) for part in self._own_parts))
        fields = {
            "config": dict[str, FlagValue],
            "trained": bool if at.batch == self._batches else exactly(False),
            "masks": record(masks, exact=True),
            "ranks": sequence(list, *[own] * distributed.world_size()),
        }
        together = masked_zeros("state_dict", "masks"), self._together(at)
        check(saved, all_of(*(part.schema(at) for part in self._parts), record(fields), *together), source)

    def _together(self, at: Position) -> Check:
        """Entries that repeat one another agree."""
        done = (at.epoch - self._plan.first_epoch) * self._batches + at.batch
        # Cycles alone count on from the steps of pre-training.
        steps = record({"steps": between(int, done, done if self._plan.pre_train else LARGEST)})

        def check_together(saved: Mapping[str, Any], where: str) -> None:
            if self._masking:
                steps(saved["masking"], inside(where, "masking"))
            for name, mask in saved["masks"].items():
                if not torch.equal(mask, saved["masking"]["masks"][name]):
                    raise Mismatch(f"{inside(where, 'masks')}.{name} is not the mask that masking has")
            samples = sum(float(rank["tally"][2]) for rank in saved["ranks"])
            if (samples > 0) != (at.batch > 0):
                raise Mismatch(f"{inside(where, 'ranks')} count {samples:g} samples in {at.batch} batches")

        return check_together


def collected(parts: Iterable[Part]) -> dict[str, Any]:
    """The entries of all parts."""
    return {name: entry for part in parts for name, entry in part.state_dict().items()}


# -------------------------------------------------------------------------------------------- parts of one entry


def weights(model: nn.Module) -> Entry:
    """A network's weights and statistics."""
    return Entry("state_dict", lambda at: state_schema(model.state_dict()), model.state_dict, model.load_state_dict)


def momentum(optimizer: torch.optim.Optimizer, model: nn.Module) -> Entry:
    """What the optimizer keeps for each weight."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return Entry(
        "optimizer",
        lambda at: optimizer_schema(optimizer, names),
        partial(optimizer_state, optimizer),
        partial(load_optimizer_state, optimizer),
    )


def topology(masking: Masking | None) -> Entry:
    """Masks, counters and state of their updates; the seed of this run counts, not that of the file."""
    if masking is None:
        return Entry("masking", lambda at: exactly(None), lambda: None, lambda saved: None)
    return Entry(
        "masking",
        lambda at: masking.schema(),
        masking.state_dict,
        lambda saved: masking.load_state_dict(saved | {"seed": masking.seed}),
    )


def loss_scale(scaler: torch.amp.GradScaler | None) -> Entry:
    """That of float16 training; in other number formats the entry is ignored."""
    if scaler is None:
        return Entry("scaler", lambda at: Any, lambda: None, lambda saved: None)
    return Entry("scaler", lambda at: SCALER if scaler.is_enabled() else Any, scaler.state_dict, scaler.load_state_dict)


def gradients(model: nn.Module, at: Position, are_kept: Callable[[Position], bool]) -> Entry:
    """Those of the last batch, where an exploration is to read them."""

    def kind(at: Position) -> Kind:
        parameters = {name: optional(like(p, finite=False)) for name, p in model.named_parameters()}
        return record(parameters, exact=True) if are_kept(at) else exactly(None)

    def save() -> dict[str, Any] | None:
        return {name: parameter.grad for name, parameter in model.named_parameters()} if are_kept(at) else None

    def load(saved: Mapping[str, Any] | None) -> None:
        for name, parameter in model.named_parameters():
            if saved is not None and saved[name] is not None:
                parameter.grad = torch.empty_like(parameter).copy_(saved[name])

    return Entry("gradients", kind, save, load)


def moving_average(average: MovingAverage, plan: Plan) -> Entry:
    """That of the weights of all steps, from the first one's on."""

    def kind(at: Position) -> Kind:
        started = at.epoch > plan.first_epoch or at.batch > 0
        entries = average.entries if started else {}
        return record({name: like(entry) for name, entry in entries.items()}, exact=True)

    return Entry("average", kind, lambda: average.average, average.load)


# ----------------------------------------------------------------------------- parts that each process has its own of


def random_numbers(device: torch.device) -> Entry:
    """State of the random generators."""
    return Entry("rng", lambda at: rng_schema(device), lambda: rng_state(device), lambda s: set_rng_state(s, device))


def buffers(model: nn.Module) -> Entry:
    """BatchNorm statistics, which are the same on all processes only at the end of an epoch."""

    def save() -> dict[str, torch.Tensor]:
        return {name: buffer.cpu() for name, buffer in model.named_buffers()}

    def load(saved: Mapping[str, torch.Tensor]) -> None:
        for name, buffer in model.named_buffers():
            buffer.copy_(saved[name])

    return Entry("buffers", lambda at: state_schema(dict(model.named_buffers())), save, load)


def tally(results: Measurements) -> Entry:
    """Loss, hits and samples of the epoch so far."""
    sums = results.tally.sums
    return Entry("tally", lambda at: Tally.check, sums.cpu, sums.copy_)


def flops(results: Measurements) -> Entry:
    """FLOPs of training in the epoch so far."""
    costs = results.costs
    return Entry("flops", lambda at: Amount, lambda: costs.flops, lambda saved: setattr(costs, "flops", saved))
