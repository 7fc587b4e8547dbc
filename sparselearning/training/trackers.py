"""Where the figures of a run go besides its own files and the terminal: one interface, an entry per service."""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from sparselearning.process.errors import FaultError, UsageError, first_line
from sparselearning.process.files import check_folder, write_text
from sparselearning.training.records import EpochRow, Results, Summary, TicketRow


class Tracker(Protocol):
    """A service that draws curves of runs; making one checks that what it needs is there, and writes nothing."""

    def start(self, so_far: Results) -> None:
        """Begin the run's record there, or continue it after the rows ``so_far``; the run's folder exists by now."""

    def epoch(self, row: EpochRow) -> None:
        """Record a finished epoch."""

    def ticket(self, row: TicketRow) -> None:
        """Record a ticket and the superposition with it."""

    def finished(self, summary: Summary) -> None:
        """Record how the run ended."""

    def close(self) -> None:
        """End the record, wherever the run is."""


class TensorBoard:
    """Event files for TensorBoard.

    Args:
        folder: where they go.

    Raises:
        UsageError: if TensorBoard is not installed.
        FaultError: if the folder cannot be written into.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UsageError("--tensorboard needs another package: pip install tensorboard") from None
        check_folder(folder)
        self._folder = folder
        self._writer_class = SummaryWriter
        self._writer: Any = None

    def start(self, so_far: Results) -> None:
        """Open a file; that of a resumed run replaces the earlier ones, which may lack points, and have later ones."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._writer = self._writer_class(str(self._folder), purge_step=0 if so_far.metrics else None)
            for row in so_far.metrics:
                self.epoch(row)
            for ticket in so_far.tickets:
                self.ticket(ticket)
        except OSError as error:
            raise FaultError(f"--tensorboard cannot write into {self._folder}: {error.strerror}") from error

    def epoch(self, row: EpochRow) -> None:
        """Scalars over epochs."""
        self._add(row.epoch, _figures(row))

    def ticket(self, row: TicketRow) -> None:
        """Scalars over tickets."""
        self._add(row.ticket, _figures(row, "ticket/"))

    def finished(self, summary: Summary) -> None:
        """Scalars of one point."""
        self._add(0, _figures(summary, "summary/"))

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()

    def _add(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)


class WeightsAndBiases:
    """A run on Weights & Biases; ``WANDB_MODE=offline`` keeps it in a file, to be sent by ``wandb sync``.

    Args:
        project: that the run belongs to.
        id_file: keeps the run's id there, so that a resumed run continues its curves.
        config: content of ``config.json``. Of absolute paths the last part alone is sent, and the command not at all,
            to keep the layout of the user's disk private.

    Raises:
        UsageError: if the package is not installed, or the project's name is invalid.
    """

    def __init__(self, project: str, id_file: Path, config: Mapping[str, Any]) -> None:
        try:
            from wandb import Error, Settings, init  # of a folder of that name these cannot be imported
        except ImportError:
            raise UsageError("--wandb needs another package: pip install wandb") from None
        if not project:
            raise UsageError("--wandb needs the name of a project")
        try:
            Settings(project=project)
        except Error as error:
            raise UsageError(f"--wandb: {first_line(error)}") from error
        self._init, self._error = init, Error
        self._id_file = id_file
        self._options = {
            "project": project,
            "name": f"{config['indicate_method']}-seed{config['seed']}",
            "group": config["indicate_method"],
            "config": {name: _without_folder(value) for name, value in config.items() if name != "command"},
            # W&B's own console would get between progress bars and the terminal.
            "settings": Settings(console="off", silent=True),
        }
        self._run: Any = None
        self._is_finished = False

    def start(self, so_far: Results) -> None:
        """Open the run that the folder knows, or a new one."""
        if not self._id_file.exists():
            write_text(self._id_file, secrets.token_hex(4))  # a random id: two runs may have equal names and flags
        try:
            self._run = self._init(id=self._id_file.read_text(), resume="allow", **self._options)
        except self._error as error:
            raise FaultError(f"--wandb: {first_line(error)} (WANDB_MODE=offline needs no account)") from error
        self._run.define_metric("*", step_metric="epoch")
        self._run.define_metric("ticket/*", step_metric="ticket/ticket")
        place = (
            f"offline, to be sent by: wandb sync {self._run.settings.sync_dir}" if self._run.offline else self._run.url
        )
        print(f"Weights & Biases: {place or 'switched off by WANDB_MODE'}", flush=True)

    def epoch(self, row: EpochRow) -> None:
        """Curves over epochs."""
        self._run.log(_figures(row))

    def ticket(self, row: TicketRow) -> None:
        """Curves over tickets."""
        self._run.log(_figures(row, "ticket/"))

    def finished(self, summary: Summary) -> None:
        """The run's summary."""
        self._run.summary.update(summary.as_dict())
        self._is_finished = True

    def close(self) -> None:
        """Send what has not been sent; a run that was stopped counts as failed until it is resumed and ends."""
        if self._run is not None:
            self._run.finish(exit_code=0 if self._is_finished else 1)


def _figures(row: EpochRow | TicketRow | Summary, prefix: str = "") -> dict[str, float]:
    return {prefix + name: value for name, value in row.as_dict().items() if isinstance(value, int | float)}


def _without_folder(value: Any) -> Any:
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
