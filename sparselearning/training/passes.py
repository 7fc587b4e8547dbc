"""Passes of one network over batches: gradients, predictions, accuracy, BatchNorm statistics."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparselearning.process import distributed
from sparselearning.process.schema import Mismatch
from sparselearning.process.tensor_schema import tensor
from sparselearning.sparse.superpose import State, update_bn
from sparselearning.training.data import Batch

if TYPE_CHECKING:
    from sparselearning.execution.network import SparseNetwork


@dataclass(frozen=True)
class Precision:
    """How the forward and backward passes are computed; weights and statistics are always float32."""

    autocast: torch.dtype | None = None
    scaler: torch.amp.GradScaler | None = None

    def context(self, device: torch.device) -> AbstractContextManager:
        """Context of a forward pass."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.autocast)


@dataclass(frozen=True)
class Passes:
    """What a network is run with, in training and in evaluation.

    Attributes:
        model: the network, on its device.
        network: what computes its forward passes: the model itself, compiled, or data-parallel. Only BatchNorm
            statistics are re-estimated on the model itself.
        precision: number formats of the forward pass.
        label_smoothing: of the training loss, in [0, 1).
        sparse: computes the model's passes with active weights alone, inside ``network``; None: nothing does.
    """

    model: nn.Module
    network: nn.Module
    precision: Precision = Precision()
    label_smoothing: float = 0.0
    sparse: "SparseNetwork | None" = None

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

    def backward(self, batch: Batch, scaled: bool = True, dense_gradients: bool = False) -> tuple[Tensor, Tensor]:
        """Compute the gradients of one batch, averaged over the ranks, in whatever mode the network is.

        Args:
            batch: this rank's share.
            scaled: leave the gradients multiplied by the loss scale, if there is one.
            dense_gradients: compute those of inactive weights even where the coming step does not read them.

        Returns:
            The share's logits [n, classes] and mean loss.
        """
        self.model.zero_grad()
        if self.sparse is not None:
            self.sparse.dense_gradients = dense_gradients
        with self.precision.context(self.device):
            logits = self.network(batch.images)
            loss = F.cross_entropy(logits, batch.labels, label_smoothing=self.label_smoothing)
        weighted = loss if batch.weight == 1 else loss * batch.weight
        if self.precision.scaler and scaled:
            weighted = self.precision.scaler.scale(weighted)
        weighted.backward()
        return logits, loss

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        """Logits [n, classes] of a batch, float32, in whatever mode the network is."""
        # Without the data-parallel wrapper, which would wait for ranks that have fewer batches.
        network = distributed.without_data_parallel(self.network)
        with self.precision.context(self.device):
            return network(batch.images).float()

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, float]:
        """Mean loss and accuracy in [0, 1] in evaluation mode, every sample counted once over all ranks."""
        self.network.eval()
        tally = Tally(self.device)
        for batch in batches:
            logits = self.predict(batch)
            tally.add(logits, batch.labels, F.cross_entropy(logits, batch.labels))
        loss_sum, hits, samples = distributed.sum_over_ranks(tally.sums).tolist()
        return loss_sum / samples, hits / samples

    def re_estimate_bn(self, batches: Iterable[Batch]) -> None:
        """Re-estimate the BatchNorm statistics on these batches."""
        with self.precision.context(self.device):
            update_bn(batches, self.sparse or self.model)

    def state(self) -> State:
        """A copy of the network's weights and statistics as they are."""
        return {name: entry.detach().clone() for name, entry in self.model.state_dict().items()}

    @contextmanager
    def borrowing(self, state: Mapping[str, Tensor]) -> Iterator[None]:
        """Load other weights into the network for a while; its parameters stay the ones that the optimizer holds."""
        own = self.state()
        self.model.load_state_dict(state)
        try:
            yield
        finally:
            self.model.load_state_dict(own)


class Tally:
    """Running sums over samples, kept on the device so that nothing waits for them.

    Attributes:
        sums: of loss, hits and samples, float64 [3].
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    @staticmethod
    def check(sums: Any, where: str) -> None:
        """Check what is to become :attr:`sums`."""
        tensor((3,), torch.float64, low=0, high=2**53)(sums, where)
        _, hits, samples = sums.tolist()
        if hits > samples:
            raise Mismatch(f"{where} counts {hits:g} hits among {samples:g} samples")

    def add(self, logits: Tensor, labels: Tensor, mean_loss: Tensor) -> None:
        """Count one batch: logits [n, classes], labels [n], and their mean loss."""
        hits = (logits.argmax(dim=1) == labels).sum()
        samples = hits.new_full((), len(labels))
        self.sums.add_(torch.stack([mean_loss.double() * samples, hits.double(), samples.double()]))


@contextmanager
def keeping_buffers(model: nn.Module) -> Iterator[None]:
    """Restore buffers afterwards, for a pass in training mode that does not train."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)
