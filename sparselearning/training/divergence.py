"""Notices a run that diverges, without making a GPU wait at every step."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sparselearning.process import distributed
from sparselearning.process.errors import FaultError
from sparselearning.training.plan import Position


class DivergenceWatch:
    """Watches the losses of an epoch and, at its end or at a stop, the network.

    Args:
        model: on its device.
        at: the position of the run.
        batches: training batches of an epoch.
        checkpoint: where the last good one is, if there is one.
    """

    def __init__(self, model: nn.Module, at: Position, batches: int, checkpoint: Path) -> None:
        self._model = model
        self._at = at
        self._batches = batches
        self._checkpoint = checkpoint
        self._bad_batch = torch.full((), -1, device=next(model.parameters()).device)  # first with a loss not finite

    def see(self, loss: Tensor) -> None:
        """Record the loss of the present batch; nothing waits for it."""
        fine = torch.isfinite(loss) | (self._bad_batch >= 0)
        self._bad_batch = torch.where(fine, self._bad_batch, self._at.batch)

    def check_losses(self) -> None:
        """Stop the run if a loss of this rank was not finite.

        Raises:
            FaultError: saying at which step.
        """
        if (bad := int(self._bad_batch)) >= 0:
            raise self.fault(bad)

    def check_network(self) -> None:
        """Stop the run if a loss of any rank was not finite, or the network is not; called by all ranks.

        Raises:
            FaultError: saying at which step.
        """
        bad = distributed.max_over_ranks(int(self._bad_batch))
        if bad < 0 and not all_finite(self._model.state_dict()):
            bad = self._at.batch
        if bad >= 0:
            raise self.fault(bad)

    def fault(self, batch: int | None = None) -> FaultError:
        """The error of a run that has diverged, at the present batch if no other is given."""
        path, step = self._checkpoint, self._at.batch if batch is None else batch
        last = f"the last good checkpoint is {path}" if path.exists() else "there is no checkpoint yet"
        return FaultError(
            f"the loss is no longer finite at epoch {self._at.epoch}, step {step} of {self._batches}; {last} "
            "(a smaller learning rate may help)"
        )


def all_finite(state: Mapping[str, Tensor]) -> bool:
    """Whether a network holds no infinity and no NaN."""
    return all(bool(entry.isfinite().all()) for entry in state.values())
