"""What a run has measured so far: its rows, clocks and costs, and the summary that is made of them."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from sparselearning.process import distributed
from sparselearning.process.schema import Mismatch, Share, read
from sparselearning.process.tensor_schema import Check, all_of, exactly, inside, record
from sparselearning.sparse.costs import CostMeter, cost_summary, layer_densities, overall_density
from sparselearning.sparse.masking import Masking
from sparselearning.sparse.superpose import State
from sparselearning.training.data import Batch
from sparselearning.training.passes import Passes, Tally
from sparselearning.training.plan import Plan, Position
from sparselearning.training.records import EpochRow, Results, Summary


class Measurements:
    """Counts while a run trains, and makes its rows and its summary.

    Args:
        passes: of the network.
        masking: keeps it sparse; None: dense training.
        maskable: names of the weights that densities are about.
        plan: of the run.
        costs: adds up what training costs.

    Attributes:
        results: what goes into the run's files.
        tally: of this rank in this epoch.
        costs: what training has cost in this epoch.
    """

    def __init__(
        self, passes: Passes, masking: Masking | None, maskable: Sequence[str], plan: Plan, costs: CostMeter
    ) -> None:
        self.results = Results(pretrain_acc=None)
        self.tally = Tally(passes.device)
        self.costs = costs
        self._model = passes.model
        self._masking = masking
        self._maskable = maskable
        self._plan = plan
        self._images = 0  # since training last began: a resumed epoch's rate is its own
        self._began = self._clock = time.perf_counter()

    # ------------------------------------------------------------------------------------------- counting

    def start_clock(self) -> None:
        """Count the run's seconds from now on."""
        self._clock = time.perf_counter()

    def total_seconds(self) -> float:
        """Seconds of the run so far, stops left out."""
        now = time.perf_counter()
        self.results.total_seconds += now - self._clock
        self._clock = now
        return self.results.total_seconds

    @contextmanager
    def training(self) -> Iterator[None]:
        """Count the seconds of this block as training."""
        self._began, self._images = time.perf_counter(), 0
        try:
            yield
        finally:
            self.results.seconds += time.perf_counter() - self._began

    def count(self, batch: Batch, logits: Tensor, loss: Tensor, sparse_steps: int | None) -> None:
        """Count a training step on a batch with these logits and mean loss; ``sparse_steps`` as in ``CostMeter``."""
        self.tally.add(logits, batch.labels, loss)
        self.costs.count(len(batch.labels), sparse_steps)
        self._images += len(batch.labels)

    def figures(self, lr: float) -> dict[str, float]:
        """Running figures within an epoch, for people: of this rank's share."""
        loss_sum, hits, samples = self.tally.sums.tolist()
        figures = {"lr": lr, "loss": loss_sum / samples, "accuracy": hits / samples}
        if self._masking:
            figures["density"] = self._masking.density()
        rate = distributed.world_size() * self._images / (time.perf_counter() - self._began)
        return figures | {"images/s": rate}

    # ------------------------------------------------------------------------------------ rows and summary

    def end_epoch(self, epoch: int, lr: float, eval_loss: float, eval_acc: float) -> EpochRow:
        """Make the row of an epoch that is done, and count the next one's from zero; called by all ranks."""
        loss_sum, hits, samples = distributed.sum_over_ranks(self.tally.sums.clone()).tolist()
        row = EpochRow(
            phase="cycle" if self._plan.is_cycle(epoch) else "pretrain",
            epoch=epoch,
            ticket=self._plan.ticket(epoch),
            lr=lr,
            train_loss=loss_sum / samples,
            train_acc=hits / samples,
            eval_loss=eval_loss,
            eval_acc=eval_acc,
            density=self._density(self._model.state_dict()),
            explored=self._masking.explored() if self._masking else 1.0,
            samples=int(samples),
            training_flops=sum(distributed.gather_objects(self.costs.flops)),
            seconds=self.results.seconds,
            images_per_second=samples / self.results.seconds,
        )
        self.results.metrics.append(row)
        self.tally.sums.zero_()
        self.results.seconds = self.costs.flops = 0.0
        return row

    def summary(self, superposition: State) -> Summary:
        """The summary of a finished run whose last superposition this is."""
        results = self.results
        ticket_acc = [row.ticket_acc for row in results.tickets]
        superposed_acc = [row.superposed_acc for row in results.tickets]
        assert results.pretrain_acc is not None
        final_acc = superposed_acc[-1] if superposed_acc else results.pretrain_acc
        images = sum(row.samples or 0 for row in results.metrics)
        seconds = sum(row.seconds or 0 for row in results.metrics)
        return Summary(
            pretrain_acc=results.pretrain_acc,
            ticket_acc=ticket_acc,
            superposed_acc=superposed_acc,
            final_acc=final_acc,
            density=self._density(superposition),
            gain=100 * (final_acc - results.pretrain_acc),
            gain_over_ticket=100 * (final_acc - ticket_acc[-1]) if ticket_acc else None,
            images_per_second=images / seconds if seconds else None,
            explored=results.metrics[-1].explored if results.metrics else None,
            **self._cost_summary(superposition, images),
            total_seconds=self.total_seconds(),
        )

    def _cost_summary(self, state: State, images: int) -> dict[str, Any]:
        if not self.results.metrics:
            return {}
        training = sum(row.training_flops or 0 for row in self.results.metrics)
        return cost_summary(
            self.costs.layers,
            {name: parameter.numel() for name, parameter in self._model.named_parameters()},
            layer_densities({name: state[name] for name in self._maskable}),
            training + sum(row.bn_flops or 0 for row in self.results.tickets),
            images,
        )

    def _density(self, state: Mapping[str, Tensor]) -> float:
        """Non-zero over maskable weights, exactly."""
        return overall_density(state[name] for name in self._maskable)

    # --------------------------------------------------------------------------------------- in a checkpoint

    def state_dict(self) -> dict[str, Any]:
        """Its entries of a checkpoint."""
        self.total_seconds()
        return self.results.as_dict()

    def schema(self, at: Position) -> Check:
        """What they hold at a position of the run."""
        accuracy = Share if self._plan.is_superposed(at) else exactly(None)
        return all_of(Results, record({"pretrain_acc": accuracy}), _rows_before(self._plan, at.epoch))

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take them back."""
        self.results = read(Results, saved, "the checkpoint")


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
