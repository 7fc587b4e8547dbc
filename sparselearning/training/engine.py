"""One run of the method: pre-training, cycles that each end in a cheap ticket, and their superposition.

:class:`Trainer` is the loop; its state is in parts, from which ``checkpoint.pth`` is collected. It is resumable
at every batch. Its position is (epoch, batch); what follows an epoch's last batch (evaluation, superposing, the
exploration that opens the next cycle) is a transaction that is committed as a whole, and repeated if it is
interrupted.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparselearning.process import distributed
from sparselearning.process.files import write_jsonl
from sparselearning.process.signals import Stopped
from sparselearning.sparse.costs import CostMeter
from sparselearning.sparse.layers import maskable_parameters
from sparselearning.sparse.masking import Masking
from sparselearning.sparse.optimizer_state import take_step
from sparselearning.sparse.selection import SelectionError
from sparselearning.sparse.superpose import MovingAverage
from sparselearning.training.checkpoint import Checkpoint
from sparselearning.training.data import Batch, BatchSource, Sources
from sparselearning.training.divergence import DivergenceWatch
from sparselearning.training.measurements import Measurements
from sparselearning.training.networks import SavedNetwork
from sparselearning.training.passes import Passes, keeping_buffers
from sparselearning.training.plan import Plan, Position
from sparselearning.training.progress import Progress
from sparselearning.training.records import Summary
from sparselearning.training.run_folder import RunFolder
from sparselearning.training.stopping import StopRequested, Stops, repeated_on_resume
from sparselearning.training.superposition import Superposition


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
        log_interval: batches between reads of the running loss.
        keep_tickets: write every ticket to a file of its own.
        keep_checkpoints: write a checkpoint after every epoch, and keep them all.
        identity: values that a checkpoint must share with the run that resumes it (``kept_flags.identity``).
        stop_signal: returns the signal that asks the run to stop, 0 for none.

    Attributes:
        at: the position in the run.
        superposition: of the tickets so far.
        average: of the weights of all steps, if the plan asks for one.
        measurements: rows, clocks and costs.
        checkpoint: saves and loads all of these.
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
        self.device = passes.device
        self.batches = len(sources.train)

        maskable = list(masking.masks if masking else maskable_parameters(passes.model))
        costs = CostMeter(layer_flops)
        self.at = Position(epoch=plan.first_epoch)
        self.stops = Stops(stop_signal, self.at)
        self.divergence = DivergenceWatch(passes.model, self.at, self.batches, folder.checkpoint)
        self.superposition = Superposition(passes, maskable, plan, sources, self.stops, costs)
        self.average = MovingAverage(passes.model, plan.ema_decay) if plan.ema_decay is not None else None
        self.measurements = Measurements(passes, masking, maskable, plan, costs)
        self.checkpoint = Checkpoint(
            folder,
            identity or {},
            plan,
            self.at,
            self.batches,
            passes,
            optimizer,
            masking,
            superposition=self.superposition,
            results=self.measurements,
            average=self.average,
            keep_all=keep_checkpoints,
        )

    # ------------------------------------------------------------------------------------------ the loop

    def run(self) -> Summary:
        """Train from the present position to the end; return the run's summary, not yet written.

        Raises:
            Stopped: on a stop signal, after writing the checkpoint.
            FaultError: if the loss is no longer finite, or a file cannot be written.
        """
        self._begin()
        try:
            self._start_bar()
            if self.superposition.state is None and self.at.epoch == self.plan.budget.pretrain_epochs:
                self._adopt_pretrained(self.evaluate()[1], epochs=self.at.epoch)  # cycles alone
                self._open_cycle(at_hand=False)
            while self.at.epoch < self.plan.end_epoch:
                if not self.at.trained:
                    self._train_epoch()
                self._finish_epoch()
            summary = self._summary()
            self.progress.finished(summary)
            return summary
        except StopRequested as request:
            self.divergence.check_network()
            self.checkpoint.save()
            raise Stopped(request.number, self.folder.checkpoint) from None
        finally:
            self.progress.close()

    def _train_epoch(self) -> None:
        """Train on the epoch's batches, or those that are left of them."""
        at, plan = self.at, self.plan
        self.passes.network.train()
        if self.masking and at.epoch >= plan.updates_end_epoch:
            self.masking.updates_enabled = False
        with self.measurements.training():
            for batch in self.sources.train.epoch(at.epoch, at.batch):
                lr = plan.lr(at.epoch, at.batch, self.batches)
                for group in self.optimizer.param_groups:
                    group["lr"] = lr
                self.train_batch(batch)
                at.batch += 1
                self._show(lr)
                self.stops.check()
        distributed.average_buffers(self.model)
        at.trained = True

    def train_batch(self, batch: Batch) -> None:
        """One step: backward pass, optimizer, masks, topology update when due."""
        # The exploration that opens the next epoch reads the gradients of this epoch's last batch.
        explores = self.plan.explores_before(self.at.epoch + 1) and self.at.batch + 1 == self.batches
        logits, loss = self.passes.backward(batch, dense_gradients=explores)
        logits, loss = logits.detach(), loss.detach()
        self.divergence.see(loss)
        update_due = self.masking is not None and self.masking.update_due
        sparse_steps = self.masking.sparse_steps if self.masking else None
        if update_due or self.device.type == "cpu":  # a check makes a GPU wait, and costs a CPU nothing
            self.divergence.check_losses()
        self._step(keep_gradients=explores)
        if self.average is not None:
            self.average.update()
        self.measurements.count(batch, logits, loss, sparse_steps)
        if update_due:
            self.measurements.costs.train_with(self._masks)

    def _step(self, keep_gradients: bool) -> None:
        scaler = self.passes.precision.scaler
        if not self.masking:
            take_step(self.optimizer, scaler)
            return
        try:
            self.masking.step(scaler, keep_gradients=keep_gradients)
        except SelectionError as error:
            raise self.divergence.fault() from error

    def _finish_epoch(self) -> None:
        """Evaluate, superpose at the end of a cycle, and commit; repeated if it is interrupted."""
        at, plan, results = self.at, self.plan, self.measurements.results
        self.divergence.check_network()
        with repeated_on_resume(self.device):
            eval_loss, eval_acc = self.evaluate()
            if not math.isfinite(eval_loss):
                raise self.divergence.fault()
            ticket = plan.ticket(at.epoch) if plan.ends_cycle(at.epoch) else None
            ticket_row = None if ticket is None else self.superposition.add(ticket, eval_acc)
        row = self.measurements.end_epoch(
            at.epoch, plan.lr(at.epoch, self.batches - 1, self.batches), eval_loss, eval_acc
        )
        if at.epoch + 1 == plan.budget.pretrain_epochs:
            self._adopt_pretrained(eval_acc, epochs=at.epoch + 1)
        if ticket_row:
            results.tickets.append(ticket_row)
        if distributed.is_main():
            write_jsonl(self.folder.metrics, results.metrics)
            if ticket_row:
                write_jsonl(self.folder.tickets, results.tickets)
                self._write_networks(ticket_row.ticket, epochs=at.epoch + 1)
        self.progress.epoch(row)
        if ticket_row:
            self.progress.ticket(ticket_row)
        at.next_epoch()
        self._open_cycle(at_hand=True)
        self.checkpoint.save_if_due(important=bool(ticket_row) or at.epoch == plan.end_epoch)

    def _adopt_pretrained(self, accuracy: float, epochs: int) -> None:
        """Start the superposition as the present network."""
        self.superposition.begin(self._masks)
        self.measurements.results.pretrain_acc = accuracy
        if distributed.is_main():
            self._write_networks(0, epochs)

    def _open_cycle(self, at_hand: bool) -> None:
        """Explore connections if a cycle starts here.

        Args:
            at_hand: explore on the gradients of the last batch; else compute those of the coming epoch's first batch.
        """
        if not self.masking or not self.plan.explores_before(self.at.epoch):
            return
        if not at_hand:
            self._compute_gradients(scaled=True)
        if not self.masking.gradients_are_finite():
            # Scaled float16 gradients may overflow: the optimizer skips such steps, but the exploration has no other.
            self._compute_gradients(scaled=False)
            if not self.masking.gradients_are_finite():
                raise self.divergence.fault()
        self.masking.truncate_weights(self.plan.explore_rate)
        self.measurements.costs.train_with(self._masks)

    def _compute_gradients(self, scaled: bool) -> None:
        """Compute the gradients of the epoch's first batch, ahead of training on it."""
        self.passes.network.train()
        with keeping_buffers(self.model):
            self.passes.backward(next(iter(self.sources.train.epoch(self.at.epoch))), scaled, dense_gradients=True)

    # ------------------------------------------------------------------------------------------ measuring

    def evaluate(self, source: BatchSource | None = None) -> tuple[float, float]:
        """Mean loss and accuracy in [0, 1] of the present network, on the evaluation set if no other is given."""
        source = self.sources.evaluation if source is None else source  # one without batches on this rank is empty
        return self.passes.evaluate(self.stops.batches(source))

    def evaluate_superposition(self, source: BatchSource) -> tuple[float, float]:
        """Mean loss and accuracy of the superposition so far."""
        with self.passes.borrowing(self.superposition.so_far):
            return self.evaluate(source)

    def _finish_average(self, average: MovingAverage) -> tuple[float, float | None]:
        """Prune the moving average to the budget, re-estimate its BatchNorm, and write it.

        Returns:
            Its accuracy, and that on the test set.
        """
        pruned, masks = self.superposition.prune(average.state())
        with repeated_on_resume(self.device), self.passes.borrowing(pruned):
            self.passes.re_estimate_bn(self.stops.batches(self.sources.train_once))
            finished = self.passes.state()
            _, accuracy = self.evaluate()
            test_accuracy = None if self.sources.test is None else self.evaluate(self.sources.test)[1]
        if distributed.is_main():
            SavedNetwork(finished, masks, self.at.epoch).write(self.folder.ema)
        return accuracy, test_accuracy

    def _summary(self) -> Summary:
        """Of the run, which is at its end; the test set is touched here, and nowhere else."""
        test_acc = ema_acc = ema_test_acc = None
        if self.sources.test is not None:
            _, test_acc = self.evaluate_superposition(self.sources.test)
        if self.average is not None:
            ema_acc, ema_test_acc = self._finish_average(self.average)
        summary = self.measurements.summary(self.superposition.so_far)
        return replace(summary, test_acc=test_acc, ema_acc=ema_acc, ema_test_acc=ema_test_acc)

    # ------------------------------------------------------------------------------------- showing and writing

    def _begin(self) -> None:
        """Start the clock, and write the files whose content the checkpoint holds if the folder lacks them."""
        results = self.measurements.results
        self.measurements.start_clock()
        self.measurements.costs.train_with(self._masks)
        if not distributed.broadcast_object(bool(results.metrics) and not self.folder.metrics.exists()):
            return
        if distributed.is_main():
            write_jsonl(self.folder.metrics, results.metrics)
            if results.tickets:
                write_jsonl(self.folder.tickets, results.tickets)
            if self.at.epoch == self.plan.end_epoch:
                self._write_networks(len(results.tickets), epochs=self.at.epoch)
        self.checkpoint.save()

    def _start_bar(self) -> None:
        """Show the position of the run."""
        epochs = self.plan.end_epoch - self.plan.first_epoch
        done = (self.at.epoch - self.plan.first_epoch) * self.batches + self.at.batch
        self.progress.start(done, epochs * self.batches, self.measurements.results)

    def _show(self, lr: float) -> None:
        """Move the bar by a batch and, every ``log_interval`` batches, print the running figures."""
        self.progress.batch()
        if self.at.batch % self.log_interval == 0:
            self.divergence.check_losses()
            phase = "cycle" if self.plan.is_cycle(self.at.epoch) else "pretrain"
            self.progress.within_epoch(phase, self.at.epoch, self.at.batch, self.batches, self.measurements.figures(lr))

    def _write_networks(self, ticket: int, epochs: int) -> None:
        """Write the ticket and the superposition so far."""
        current = SavedNetwork(self.model.state_dict(), self._masks, epochs)
        current.write(self.folder.current)
        SavedNetwork(self.superposition.so_far, self.superposition.masks, epochs).write(self.folder.previous)
        if self.keep_tickets:
            current.write(self.folder.ticket(ticket))

    @property
    def _masks(self) -> dict[str, Tensor]:
        return self.masking.masks if self.masking else {}
