"""The one network that a run makes of its tickets (Sup-tickets, sec. 3.3)."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparselearning.process.errors import FaultError
from sparselearning.process.tensor_schema import Check, Kind, all_of, exactly, record, tensor
from sparselearning.sparse.costs import CostMeter, overall_density
from sparselearning.sparse.superpose import State, batchnorms, prune_to_density, superpose
from sparselearning.training.data import Sources
from sparselearning.training.divergence import all_finite
from sparselearning.training.networks import masked_zeros, state_schema
from sparselearning.training.passes import Passes
from sparselearning.training.plan import Plan, Position
from sparselearning.training.records import TicketRow
from sparselearning.training.stopping import Stops

ENTRIES = "superposition", "superposition_masks"
"""Of a checkpoint: state and masks."""


class Superposition:
    """Starts as the network that pre-training left; then each ticket is averaged in.

    The ticket is the present network. To measure a superposition, its weights are loaded into the same network for a
    while; the ticket's are put back.

    Args:
        passes: of the network.
        maskable: names of the weights that the budget covers.
        plan: says how tickets are averaged, what the budget is, and whether BatchNorm is re-estimated.
        sources: training batches to re-estimate BatchNorm on, and those to measure on.
        stops: checks for a request to stop.
        costs: gives the cost of a pass.

    Attributes:
        state: weights and statistics; None until pre-training has ended.
        masks: of its masked weights; empty for a dense network.
    """

    def __init__(
        self, passes: Passes, maskable: Sequence[str], plan: Plan, sources: Sources, stops: Stops, costs: CostMeter
    ) -> None:
        self.state: State | None = None
        self.masks: dict[str, Tensor] = {}
        self._passes = passes
        self._maskable = maskable
        self._plan = plan
        self._sources = sources
        self._stops = stops
        self._costs = costs

    def begin(self, masks: Mapping[str, Tensor]) -> None:
        """Start as the present network, which has these masks."""
        self.state = self._passes.state()
        self.masks = {name: mask.clone() for name, mask in masks.items()}

    def add(self, number: int, ticket_acc: float) -> TicketRow:
        """Average ticket ``number`` in, with whichever of the plan's factors gives the best accuracy.

        Raises:
            StopRequested: on a request to stop; nothing is changed then.
            FaultError: if the result is not finite.
        """
        began = time.perf_counter()
        best: _Candidate | None = None
        bn_flops = 0.0
        for factor in self._plan.averaging(number):
            candidate = self._with_ticket(factor)
            bn_flops += self._bn_flops(candidate.state)
            if best is None or candidate.accuracy > best.accuracy:
                best = candidate
        assert best is not None
        if not all_finite(best.state):
            raise FaultError(f"superposition {number} is not finite: its BatchNorm statistics overflow")
        self.state, self.masks = best.state, best.masks
        return TicketRow(
            ticket=number,
            ticket_acc=ticket_acc,
            superposed_acc=best.accuracy,
            factor=best.factor,
            union_density=best.union_density,
            density=self._density(best.state),
            bn_flops=bn_flops,
            seconds=time.perf_counter() - began,
        )

    def _with_ticket(self, factor: float) -> "_Candidate":
        """Average, prune to the budget, re-estimate BatchNorm, measure."""
        union = superpose(self.so_far, self._passes.model.state_dict(), factor)
        pruned, masks = self.prune(union)
        with self._passes.borrowing(pruned):
            if self._plan.update_bn:
                self._passes.re_estimate_bn(self._stops.batches(self._sources.train_once))
            _, accuracy = self._passes.evaluate(self._stops.batches(self._sources.evaluation))
            return _Candidate(factor, self._passes.state(), masks, self._density(union), accuracy)

    def prune(self, state: State) -> tuple[State, dict[str, Tensor]]:
        """A network pruned to the budget, and its masks; dense training has neither."""
        if self._plan.final_density is None:
            return state, {}
        return prune_to_density(state, self._maskable, self._plan.final_density)

    @property
    def so_far(self) -> State:
        """The state, of a run that has ended its pre-training."""
        assert self.state is not None
        return self.state

    def _density(self, state: State) -> float:
        return overall_density(state[name] for name in self._maskable)

    def _bn_flops(self, state: State) -> float:
        """Cost of re-estimating a superposition's BatchNorm statistics, if that is done."""
        if not (self._plan.update_bn and batchnorms(self._passes.model)):
            return 0.0
        per_sample = self._costs.forward({name: state[name] for name in self._maskable})
        return self._sources.train_once.num_samples * per_sample

    # --------------------------------------------------------------------------------------- in a checkpoint

    def state_dict(self) -> dict[str, Any]:
        """Its entries of a checkpoint."""
        return dict(zip(ENTRIES, (self.state, self.masks), strict=True))

    def schema(self, at: Position) -> Check:
        """What they hold at a position of the run."""
        kinds: tuple[Kind, Kind] = exactly(None), exactly({})
        if self._plan.is_superposed(at):
            own = self._passes.model.state_dict()
            masks = record({name: tensor(own[name].shape, torch.bool) for name in self._maskable}, exact=True)
            kinds = state_schema(own), exactly({}) if self._plan.final_density is None else masks
        return all_of(record(dict(zip(ENTRIES, kinds, strict=True))), masked_zeros(*ENTRIES))

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take them back."""
        state, masks = (saved[name] for name in ENTRIES)
        self.state = None if state is None else self._on_device(state)
        self.masks = self._on_device(masks)

    def _on_device(self, entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: entry.to(self._passes.device) for name, entry in entries.items()}


class _Candidate(NamedTuple):
    """A superposition with the new ticket: pruned back, BatchNorm re-estimated, measured."""

    factor: float
    state: State
    masks: dict[str, Tensor]
    union_density: float  # before it was pruned back
    accuracy: float
