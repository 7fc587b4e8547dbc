"""One run of the method: pre-training, cycles that each end in a cheap ticket, and their superposition.

:class:`Trainer` is resumable at every batch. Its position is (epoch, batch); what follows an epoch's last batch
(evaluation, superposing, the exploration that opens the next cycle) is a transaction that is committed as a whole
and begun anew if it is interrupted.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparselearning.process import distributed
from sparselearning.process.errors import FaultError
from sparselearning.process.files import copy_whole, save_torch, write_jsonl
from sparselearning.process.schema import read
from sparselearning.process.seeding import rng_state, set_rng_state
from sparselearning.process.signals import Stopped
from sparselearning.sparse.costs import CostMeter, cost_summary, layer_densities, overall_density
from sparselearning.sparse.layers import maskable_parameters
from sparselearning.sparse.masking import Masking
from sparselearning.sparse.optimizer_state import optimizer_state, take_step
from sparselearning.sparse.selection import SelectionError
from sparselearning.sparse.superpose import MovingAverage, State, batchnorms, prune_to_density, superpose
from sparselearning.training.checkpoint import CheckpointSchema
from sparselearning.training.data import Batch, BatchSource
from sparselearning.training.networks import SavedNetwork
from sparselearning.training.passes import Passes, Tally, keeping_buffers
from sparselearning.training.plan import Plan
from sparselearning.training.progress import Progress
from sparselearning.training.records import EpochRow, Summary, TicketRow
from sparselearning.training.run_folder import RunFolder

SECONDS_BETWEEN_CHECKPOINTS = 60


@dataclass(frozen=True)
class Sources:
    """Batches for each purpose.

    Attributes:
        train: shuffled and augmented.
        train_once: the same, every sample once over all ranks; for BatchNorm statistics.
        evaluation: what epochs, tickets and superpositions are measured on.
        test: the test set, touched once, at the end; None if the evaluation set is the test set.
    """

    train: BatchSource
    train_once: BatchSource
    evaluation: BatchSource
    test: BatchSource | None = None


class Trainer:
    """Carries out a :class:`Plan` on a network and its optimizer, and writes the run's files.

    Args:
        passes: of the network.
        optimizer: over the model's parameters.
        masking: keeps the model sparse; None: dense training.
        sources: batches.
        plan: when to do what.
        folder: where files go.
        progress: what to show.
        layer_flops: dense forward FLOPs per sample of each layer, to compute costs from.
        log_interval: batches between looks at the running loss.
        keep_tickets: write every ticket to a file of its own.
        keep_checkpoints: write a checkpoint after every epoch, and keep them all.
        identity: values that a checkpoint must share with the run that resumes it.
        stop_signal: returns the signal that asks the run to stop, 0 for none.
    """

    def __init__(
        self,
        passes: Passes,
        optimizer: torch.optim.Optimizer,
        masking: Masking | None,
        sources: Sources,
        plan: Plan,
        folder: RunFolder,
        progress: Progress,
        *,
        layer_flops: Mapping[str, float],
        log_interval: int = 100,
        keep_tickets: bool = False,
        keep_checkpoints: bool = False,
        identity: Mapping[str, Any] | None = None,
        stop_signal: Callable[[], int] = lambda: 0,
    ) -> None:
        self.passes = passes
        self.model = passes.model
        self.optimizer = optimizer
        self.masking = masking
        self.sources = sources
        self.plan = plan
        self.folder = folder
        self.progress = progress
        self.log_interval = log_interval
        self.keep_tickets = keep_tickets
        self.keep_checkpoints = keep_checkpoints
        self.identity = dict(identity or {})
        self.stop_signal = stop_signal

        self.device = passes.device
        self.maskable = list(masking.masks if masking else maskable_parameters(passes.model))
        self.epoch = plan.first_epoch
        self.batch = 0
        self.continues = False  # a run that was stopped before
        self.trained = False  # the epoch's batches are done, what follows them is not
        self.superposition: State | None = None
        self.superposition_masks: dict[str, Tensor] = {}
        self.average = MovingAverage(passes.model, plan.ema_decay) if plan.ema_decay is not None else None
        self.pretrain_acc: float | None = None
        self.metrics: list[EpochRow] = []
        self.tickets: list[TicketRow] = []
        self._tally = Tally(self.device)  # of this rank in this epoch
        self._costs = CostMeter(layer_flops)  # the same
        self._bad_batch = torch.full((), -1, device=self.device)  # first batch of the epoch with a loss not finite
        self._explorable = False  # the gradients at hand are dense ones of an epoch's last batch
        self._seconds = 0.0
        self._schema = CheckpointSchema(passes, optimizer, masking, plan, len(sources.train))
        self._stop = distributed.AgreedFlag()
        self._last_checkpoint = float("-inf")
        self._earlier_seconds = 0.0  # of this run, before it was resumed
        self._resumed_at = time.perf_counter()

    # ------------------------------------------------------------------------------------------ the run

    def run(self) -> Summary:
        """Train from the present position to the end; return the run's summary, not yet written.

        Raises:
            Stopped: on a stop signal, after writing the checkpoint.
            FaultError: if the loss is no longer finite, or a file cannot be written.
        """
        batches = len(self.sources.train)
        done = (self.epoch - self.plan.first_epoch) * batches + self.batch
        self._resumed_at = time.perf_counter()
        self._costs.train_with(self._masks())
        if self.continues:
            self._restore_files()
        try:
            self.progress.start(done, (self.plan.end_epoch - self.plan.first_epoch) * batches)
            if self.superposition is None and self.epoch == self.plan.budget.pretrain_epochs:  # cycles alone
                self._adopt_pretrained(self.evaluate()[1], epochs=self.epoch)
                self._open_cycle()
            while self.epoch < self.plan.end_epoch:
                if not self.trained:
                    self._train_epoch()
                self._finish_epoch()
            summary = self._summary()
            if self.sources.test is not None:
                _, test_acc = self.evaluate_superposition(self.sources.test)
                summary = replace(summary, test_acc=test_acc)
            if self.average is not None:
                ema_acc, ema_test_acc = self._measure_average(self.average.state())
                summary = replace(summary, ema_acc=ema_acc, ema_test_acc=ema_test_acc)
            summary = replace(summary, total_seconds=self._total_seconds())
            self.progress.finished(summary)
        except _StopRequested as request:
            self._check_finite(stopping=True)
            self.save_checkpoint()
            raise Stopped(request.number, self.folder.checkpoint) from None
        finally:
            self.progress.close()
        return summary

    def _train_epoch(self) -> None:
        batches = len(self.sources.train)
        plan = self.plan
        self.passes.network.train()
        if self.masking and self.epoch >= plan.updates_end_epoch:
            self.masking.updates_enabled = False
        began = time.perf_counter()
        images = 0  # since this call began: a resumed epoch's rate is its own
        try:
            for batch in self.sources.train.epoch(self.epoch, self.batch):
                lr = plan.lr(self.epoch, self.batch, batches)
                for group in self.optimizer.param_groups:
                    group["lr"] = lr
                self.train_batch(batch)
                self.batch += 1
                images += len(batch.labels)
                self.progress.batch()
                if self.batch % self.log_interval == 0:
                    self._show(lr, distributed.world_size() * images / (time.perf_counter() - began))
                self._check_signals()
        finally:
            self._seconds += time.perf_counter() - began
        distributed.average_buffers(self.model)
        self.trained = True

    def train_batch(self, batch: Batch) -> None:
        """One step: backward pass, optimizer, masks, topology update when due."""
        # The exploration that opens the next epoch reads the gradients of this epoch's last batch.
        self._explorable = self.plan.explores_before(self.epoch + 1) and self.batch + 1 == len(self.sources.train)
        logits, loss = self.passes.backward(batch, dense_gradients=self._explorable)
        finite = torch.isfinite(loss.detach())
        self._bad_batch = torch.where(finite | (self._bad_batch >= 0), self._bad_batch, self.batch)
        update_due = self.masking is not None and self.masking.update_due
        sparse_steps = self.masking.sparse_steps if self.masking else None
        if update_due or self.device.type == "cpu":  # looking costs a GPU a wait, a CPU nothing
            self._check_finite()
        scaler = self.passes.precision.scaler
        if self.masking:
            try:
                self.masking.step(scaler, keep_gradients=self._explorable)
            except SelectionError as error:
                raise self._diverged(self.batch) from error
        else:
            take_step(self.optimizer, scaler)
        if self.average is not None:
            self.average.update()
        self._tally.add(logits.detach(), batch.labels, loss.detach())
        self._costs.count(len(batch.labels), sparse_steps)
        if update_due:
            self._costs.train_with(self._masks())

    def _finish_epoch(self) -> None:
        """Evaluate, superpose at the end of a cycle, and commit; begun anew if it is interrupted."""
        self._check_finite()
        epoch, plan = self.epoch, self.plan
        rng = rng_state(self.device)
        try:
            eval_loss, eval_acc = self.evaluate()
            if not math.isfinite(eval_loss):
                raise self._diverged(self.batch)
            ticket_row = self._superpose_ticket(eval_acc) if plan.ends_cycle(epoch) else None
        except _StopRequested:
            set_rng_state(rng, self.device)  # dropout draws while BatchNorm is re-estimated
            raise
        loss_sum, hits, samples = distributed.sum_over_ranks(self._tally.sums.clone()).tolist()
        row = EpochRow(
            phase="cycle" if plan.is_cycle(epoch) else "pretrain",
            epoch=epoch,
            ticket=plan.ticket(epoch),
            lr=plan.lr(epoch, len(self.sources.train) - 1, len(self.sources.train)),
            train_loss=loss_sum / samples,
            train_acc=hits / samples,
            eval_loss=eval_loss,
            eval_acc=eval_acc,
            density=self._density(self.model.state_dict()),
            explored=self.masking.explored() if self.masking else 1.0,
            samples=int(samples),
            training_flops=sum(distributed.gather_objects(self._costs.flops)),
            seconds=self._seconds,
            images_per_second=samples / self._seconds,
        )
        self.metrics.append(row)
        if epoch + 1 == plan.budget.pretrain_epochs:
            self._adopt_pretrained(eval_acc, epochs=epoch + 1)
        if ticket_row:
            self.tickets.append(ticket_row)
        if distributed.is_main():
            write_jsonl(self.folder.metrics, self.metrics)
            if ticket_row:
                write_jsonl(self.folder.tickets, self.tickets)
                self._write_networks(ticket_row.ticket, epochs=epoch + 1)
        self.progress.epoch(row)
        if ticket_row:
            self.progress.ticket(ticket_row)
        self.epoch, self.batch, self.trained = epoch + 1, 0, False
        self._tally.sums.zero_()
        self._seconds = self._costs.flops = 0.0
        self._open_cycle()
        self._maybe_save_checkpoint(bool(ticket_row) or self.epoch == plan.end_epoch)

    # -------------------------------------------------------------------------------- tickets and superposing

    def _adopt_pretrained(self, accuracy: float, epochs: int) -> None:
        """Let the network as it is be the first superposition."""
        self.superposition = self.passes.state()
        self.superposition_masks = {name: mask.clone() for name, mask in self._masks().items()}
        self.pretrain_acc = accuracy
        if distributed.is_main():
            self._write_networks(0, epochs)

    def _open_cycle(self) -> None:
        """Explore connections if a cycle starts here, on the last batch's gradients, or else a first one's."""
        if not self.masking or not self.plan.explores_before(self.epoch):
            return
        if not self._explorable:
            self._look_at_gradients(scaled=True)
        if not self.masking.gradients_are_finite():
            # Scaled float16 gradients may overflow; the optimizer skips such steps, but here they are all there is.
            self._look_at_gradients(scaled=False)
            if not self.masking.gradients_are_finite():
                raise self._diverged(self.batch)
        self.masking.truncate_weights(self.plan.explore_rate)
        self._costs.train_with(self._masks())

    def _look_at_gradients(self, scaled: bool) -> None:
        """Compute the gradients of the epoch's first batch, ahead of training on it."""
        self.passes.network.train()
        with keeping_buffers(self.model):
            self.passes.backward(next(iter(self.sources.train.epoch(self.epoch))), scaled, dense_gradients=True)

    def _superpose_ticket(self, ticket_acc: float) -> TicketRow:
        """Superpose the network as it is with the superposition so far; the network itself stays as it is."""
        began = time.perf_counter()
        number = self.plan.ticket(self.epoch)
        assert number is not None
        best, bn_flops = None, 0.0
        for factor in self.plan.averaging(number):
            made = self._superposed(factor)
            bn_flops += self._bn_flops(made.state)
            if best is None or made.accuracy > best.accuracy:
                best = made
        assert best is not None
        if not _all_finite(best.state):
            raise FaultError(f"superposition {number} is not finite: its BatchNorm statistics overflow")
        self.superposition, self.superposition_masks = best.state, best.masks
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

    def _superposed(self, factor: float) -> "_Superposition":
        """What the superposition becomes if the network as it is enters it with this factor."""
        assert self.superposition is not None
        state = superpose(self.superposition, self.model.state_dict(), factor)
        union_density = self._density(state)
        state, masks = self._pruned(state)
        with self.passes.borrowing(state):
            if self.plan.update_bn:
                self.passes.re_estimate_bn(self._guarded(self.sources.train_once))
            _, accuracy = self.evaluate()
            return _Superposition(factor, self.passes.state(), masks, union_density, accuracy)

    def _pruned(self, state: State) -> tuple[State, dict[str, Tensor]]:
        """A network pruned to the budget, and its masks; dense training has neither."""
        if self.plan.final_density is None:
            return state, {}
        return prune_to_density(state, self.maskable, self.plan.final_density)

    def _measure_average(self, state: State) -> tuple[float, float | None]:
        """Accuracy of the moving average, pruned to the budget, its BatchNorm re-estimated; that on the test set."""
        rng = rng_state(self.device)
        try:
            with self.passes.borrowing(self._pruned(state)[0]):
                self.passes.re_estimate_bn(self._guarded(self.sources.train_once))
                _, accuracy = self.evaluate()
                return accuracy, None if self.sources.test is None else self.evaluate(self.sources.test)[1]
        except _StopRequested:
            set_rng_state(rng, self.device)  # dropout draws while BatchNorm is re-estimated
            raise

    def evaluate(self, source: BatchSource | None = None) -> tuple[float, float]:
        """Mean loss and accuracy in [0, 1] of the network as it is, on the evaluation set if no other is given."""
        return self.passes.evaluate(self._guarded(source or self.sources.evaluation))

    def evaluate_superposition(self, source: BatchSource) -> tuple[float, float]:
        """Mean loss and accuracy of the superposition so far."""
        assert self.superposition is not None
        with self.passes.borrowing(self.superposition):
            return self.evaluate(source)

    def _density(self, state: Mapping[str, Tensor]) -> float:
        """Non-zero over maskable weights, exactly."""
        return overall_density(state[name] for name in self.maskable)

    # ------------------------------------------------------------------------------------ stopping and faults

    def _guarded(self, source: BatchSource) -> Iterator[Batch]:
        """Batches of an exact pass, cut short by a stop signal that all ranks have seen."""
        lockstep = distributed.min_over_ranks(len(source))
        for number, batch in enumerate(source.epoch(self.epoch)):
            if number < lockstep:
                self._check_signals()
            yield batch

    def _check_signals(self) -> None:
        number = self._stop.exchange(self.stop_signal())
        if number:
            self._stop.collect()
            raise _StopRequested(number)

    def _check_finite(self, stopping: bool = False) -> None:
        """Stop if a loss of this epoch was not finite or, after its last batch, if the network is not.

        Args:
            stopping: the network is about to be written, after whatever batch.
        """
        bad = int(self._bad_batch)
        if self.trained or stopping:
            bad = distributed.max_over_ranks(bad)
            if bad < 0 and not _all_finite(self.model.state_dict()):
                bad = self.batch
        if bad >= 0:
            raise self._diverged(bad)

    def _diverged(self, batch: int) -> FaultError:
        last = (
            f"the last good checkpoint is {self.folder.checkpoint}"
            if self.folder.checkpoint.exists()
            else "there is no checkpoint yet"
        )
        return FaultError(
            f"the loss is no longer finite at epoch {self.epoch}, step {batch} of {len(self.sources.train)}; {last} "
            "(a smaller learning rate may help)"
        )

    def _show(self, lr: float, images_per_second: float) -> None:
        self._check_finite()
        loss_sum, hits, samples = self._tally.sums.tolist()
        phase = "cycle" if self.plan.is_cycle(self.epoch) else "pretrain"
        figures = {"lr": lr, "loss": loss_sum / samples, "accuracy": hits / samples}
        if self.masking:
            figures["density"] = self.masking.density()
        figures["images/s"] = images_per_second
        self.progress.within_epoch(phase, self.epoch, self.batch, len(self.sources.train), figures)

    # ------------------------------------------------------------------------------------------------- files

    def _masks(self) -> dict[str, Tensor]:
        return self.masking.masks if self.masking else {}

    def _write_networks(self, ticket: int, epochs: int) -> None:
        assert self.superposition is not None
        current = SavedNetwork(self.model.state_dict(), self._masks(), epochs)
        current.write(self.folder.current)
        SavedNetwork(self.superposition, self.superposition_masks, epochs).write(self.folder.previous)
        if self.keep_tickets:
            current.write(self.folder.ticket(ticket))

    def _restore_files(self) -> None:
        """Write the files that the checkpoint remembers if the folder does not have them."""
        if not distributed.broadcast_object(bool(self.metrics) and not self.folder.metrics.exists()):
            return
        if distributed.is_main():
            write_jsonl(self.folder.metrics, self.metrics)
            if self.tickets:
                write_jsonl(self.folder.tickets, self.tickets)
            if self.epoch == self.plan.end_epoch:
                self._write_networks(len(self.tickets), epochs=self.epoch)
        self.save_checkpoint()

    def _summary(self) -> Summary:
        ticket_acc = [row.ticket_acc for row in self.tickets]
        superposed_acc = [row.superposed_acc for row in self.tickets]
        final_acc = superposed_acc[-1] if superposed_acc else self.pretrain_acc
        assert final_acc is not None
        assert self.pretrain_acc is not None
        assert self.superposition is not None
        images = sum(row.samples or 0 for row in self.metrics)
        seconds = sum(row.seconds or 0 for row in self.metrics)
        return Summary(
            pretrain_acc=self.pretrain_acc,
            ticket_acc=ticket_acc,
            superposed_acc=superposed_acc,
            final_acc=final_acc,
            density=self._density(self.superposition),
            gain=100 * (final_acc - self.pretrain_acc),
            gain_over_ticket=100 * (final_acc - ticket_acc[-1]) if ticket_acc else None,
            images_per_second=images / seconds if seconds else None,
            explored=self.metrics[-1].explored if self.metrics else None,
            **self._cost_summary(self.superposition, images),
            total_seconds=self._total_seconds(),
        )

    # ------------------------------------------------------------------------------------------------- costs

    def _bn_flops(self, state: State) -> float:
        """Cost of re-estimating a superposition's BatchNorm statistics, if that is done."""
        if not (self.plan.update_bn and batchnorms(self.model)):
            return 0.0
        per_sample = self._costs.forward({name: state[name] for name in self.maskable})
        return self.sources.train_once.num_samples * per_sample

    def _cost_summary(self, state: State, images: int) -> dict[str, Any]:
        if not self.metrics:
            return {}
        spent = sum(row.training_flops or 0 for row in self.metrics) + sum(row.bn_flops or 0 for row in self.tickets)
        return cost_summary(
            self._costs.layers,
            {name: parameter.numel() for name, parameter in self.model.named_parameters()},
            layer_densities({name: state[name] for name in self.maskable}),
            spent,
            images,
        )

    def _total_seconds(self) -> float:
        return self._earlier_seconds + time.perf_counter() - self._resumed_at

    def _maybe_save_checkpoint(self, important: bool) -> None:
        overdue = time.monotonic() - self._last_checkpoint > SECONDS_BETWEEN_CHECKPOINTS
        if distributed.broadcast_object(important or overdue or self.keep_checkpoints):
            self.save_checkpoint()
            if self.keep_checkpoints and distributed.is_main():
                copy_whole(self.folder.checkpoint, self.folder.epoch_checkpoint(self.epoch))

    def save_checkpoint(self) -> None:
        """Write all that :meth:`load_checkpoint` needs to go on bit by bit from here. Called by all ranks."""
        gradients = None
        if self._schema.keeps_gradients(self.epoch, self.batch):
            gradients = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        ranks = distributed.gather_objects(
            {
                "rng": rng_state(self.device),
                "buffers": {name: buffer.cpu() for name, buffer in self.model.named_buffers()},
                "tally": self._tally.sums.cpu(),
                "flops": self._costs.flops,
            }
        )
        if distributed.is_main():
            masking = self.masking.state_dict() if self.masking else None
            scaler = self.passes.precision.scaler
            save_torch(
                self.folder.checkpoint,
                {
                    "config": self.identity,
                    "epoch": self.epoch,
                    "batch": self.batch,
                    "trained": self.trained,
                    "state_dict": self.model.state_dict(),
                    "masks": masking["masks"] if masking else {},  # the same tensors: the file holds them once
                    "optimizer": optimizer_state(self.optimizer),
                    "masking": masking,
                    "scaler": scaler.state_dict() if scaler else None,
                    "gradients": gradients,
                    "superposition": self.superposition,
                    "superposition_masks": self.superposition_masks,
                    "pretrain_acc": self.pretrain_acc,
                    "metrics": [row.as_dict() for row in self.metrics],
                    "tickets": [row.as_dict() for row in self.tickets],
                    "seconds": self._seconds,
                    "total_seconds": self._total_seconds(),
                    "ranks": ranks,
                }
                | ({"average": self.average.average} if self.average else {}),
            )
        self._last_checkpoint = time.monotonic()

    def load_checkpoint(self, saved: Mapping[str, Any], source: Path) -> None:
        """Go back to where :meth:`save_checkpoint` was called.

        Args:
            saved: what it wrote.
            source: for messages.

        Raises:
            FaultError: if an entry is not as this run writes it; nothing is changed then.
        """
        self._schema.check(saved, source)
        self.continues = True
        self._take_over(saved)
        self.epoch, self.batch, self.trained = saved["epoch"], saved["batch"], saved["trained"]
        self._explorable = bool(saved["gradients"])
        for name, parameter in self.model.named_parameters():
            if saved["gradients"] and saved["gradients"][name] is not None:
                parameter.grad = torch.empty_like(parameter).copy_(saved["gradients"][name])
        if saved["superposition"] is not None:
            self.superposition = {k: v.to(self.device) for k, v in saved["superposition"].items()}
        self.superposition_masks = {k: v.to(self.device) for k, v in saved["superposition_masks"].items()}
        if self.average is not None:
            self.average.load(saved["average"])
        self.pretrain_acc = saved["pretrain_acc"]
        self.metrics = read(list[EpochRow], saved["metrics"], str(source))
        self.tickets = read(list[TicketRow], saved["tickets"], str(source))
        self._seconds = saved["seconds"]
        self._earlier_seconds = saved["total_seconds"]
        if self.passes.precision.scaler:
            self.passes.precision.scaler.load_state_dict(saved["scaler"])
        own = saved["ranks"][distributed.rank()]
        for name, buffer in self.model.named_buffers():
            buffer.copy_(own["buffers"][name])
        self._tally.sums.copy_(own["tally"])
        self._costs.flops = own["flops"]
        set_rng_state(own["rng"], self.device)

    def load_training_state(self, saved: Mapping[str, Any], source: Path) -> None:
        """Take over weights, momentum, masks and step counter of another run's checkpoint, not its position or seed.

        The optimizer keeps its own settings; of another kind of optimizer nothing is taken over.

        Raises:
            UsageError: if its masks are of other layers.
            FaultError: if it is damaged; nothing is changed then.
        """
        self._take_over(self._schema.usable_here(saved, source))

    def _take_over(self, saved: Mapping[str, Any]) -> None:
        """Load weights and, if they are there, the optimizer's state and masks."""
        self.model.load_state_dict(saved["state_dict"])
        if "optimizer" in saved:
            state = {number: kept for number, kept in saved["optimizer"]["state"].items() if kept}
            self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
            for parameter, kept in self.optimizer.state.items():
                for key, value in kept.items():
                    # Fused steps read memory straight through: state has to lie as its parameter does.
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        kept[key] = torch.empty_like(parameter).copy_(value)
        if self.masking and saved.get("masking"):
            self.masking.load_state_dict(saved["masking"] | {"seed": self.masking.seed})


def _all_finite(state: Mapping[str, Tensor]) -> bool:
    return all(bool(entry.isfinite().all()) for entry in state.values())


class _Superposition(NamedTuple):
    """A superposition that a ticket has entered: pruned back, BatchNorm re-estimated, measured."""

    factor: float
    state: State
    masks: dict[str, Tensor]
    union_density: float  # before it was pruned back
    accuracy: float


class _StopRequested(Exception):
    """All ranks have seen the same stop signal at the same batch."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
