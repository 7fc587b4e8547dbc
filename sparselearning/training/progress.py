"""What a person sees during a run: a bar on a terminal, plain lines elsewhere, nothing on other ranks."""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sparselearning.process import distributed
from sparselearning.process.errors import first_line
from sparselearning.sparse.costs import inference_flops
from sparselearning.training.records import EpochRow, Results, Summary, TicketRow
from sparselearning.training.trackers import Tracker

SECONDS_BETWEEN_LINES = 60


def print_notes(*sentences: str) -> None:
    """Tell the user, once for all ranks, what is suspicious but not an error."""
    if distributed.is_main():
        for sentence in sentences:
            print(f"note: {sentence}", file=sys.stderr)


class Progress:
    """A bar over the batches of the whole run, and one line per epoch and ticket.

    Off a terminal there is no bar; epochs longer than a minute then print a line every minute.

    Args:
        trackers: services that get the figures as well.
    """

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self._speaks = distributed.is_main()
        self._trackers = list(trackers) if self._speaks else []
        self._bar = tqdm(disable=True)
        self._last_line = time.monotonic()

    def start(self, done_batches: int, total_batches: int, so_far: Results) -> None:
        """Show the bar of a run of ``total_batches``, of which ``done_batches`` are done, with the rows ``so_far``."""
        for tracker in self._trackers:
            tracker.start(so_far)
        self._bar = tqdm(
            initial=done_batches,
            total=total_batches,
            unit="batch",
            dynamic_ncols=True,
            disable=not (self._speaks and sys.stderr.isatty()),
            bar_format="{desc} {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]{postfix}",
        )

    def batch(self) -> None:
        """Count one training batch."""
        self._bar.update()

    def within_epoch(self, phase: str, epoch: int, batch: int, batches: int, row: Mapping[str, Any]) -> None:
        """Show the running figures of an epoch; called every log interval."""
        self._bar.set_description_str(f"{phase} {epoch}")
        figures = {key: f"{key} {value:.4g}" for key, value in row.items()}
        # No more, so that the bar keeps some width on 80 columns: the line of the epoch has the rest.
        self._bar.set_postfix_str(f"{figures['loss']}  {figures['accuracy']}")
        now = time.monotonic()
        if self._bar.disable and now - self._last_line > SECONDS_BETWEEN_LINES:
            self.line(f"  epoch {epoch:>4}  batch {batch}/{batches}  {'  '.join(figures.values())}")

    def epoch(self, row: EpochRow) -> None:
        """Print a finished epoch."""
        self._track(lambda tracker: tracker.epoch(row))
        ticket = f" ticket {row.ticket}" if row.ticket else ""
        self.line(
            f"{row.phase:<8} epoch {row.epoch:>4}{ticket}  lr {row.lr:<8.4g} "
            f"train {row.train_loss:.4f} / {row.train_acc:7.2%}  eval {row.eval_loss:.4f} / "
            f"{row.eval_acc:7.2%}  density {row.density:.4f}  {row.images_per_second:,.0f} images/s"
        )

    def ticket(self, row: TicketRow) -> None:
        """Print a ticket and the superposition with it."""
        self._track(lambda tracker: tracker.ticket(row))
        self.line(
            f"ticket {row.ticket}: {row.ticket_acc:.2%}; superposed with factor {row.factor:.3g}: "
            f"{row.superposed_acc:.2%} (density {row.union_density:.4f} before pruning back, {row.density:.4f} after)"
        )

    def line(self, text: str) -> None:
        """Print one line, above the bar."""
        if self._speaks:
            self._bar.clear()
            print(text, flush=True)
            self._bar.refresh()
        self._last_line = time.monotonic()

    def finished(self, summary: Summary) -> None:
        """Pass the summary on to the trackers."""
        self._track(lambda tracker: tracker.finished(summary))

    def close(self) -> None:
        """Remove the bar from the screen."""
        self._bar.close()
        self._track(lambda tracker: tracker.close())

    def _track(self, record: Callable[[Tracker], None]) -> None:
        """Pass something on to every tracker; one that fails is dropped, for its curves are not worth a run."""
        self._trackers = [tracker for tracker in self._trackers if _works(record, tracker)]


def _works(record: Callable[[Tracker], None], tracker: Tracker) -> bool:
    try:
        record(tracker)
    except Exception as error:  # services and packages of others fail in many ways
        print_notes(f"{type(tracker).__name__} has failed ({first_line(error)}): the run continues without it")
        return False
    return True


def run_table(summary: Summary, folder: Path) -> str:
    """The table that ends a run: every network that it made, what superposing gained, and where the files are."""
    rows = [("pre-trained", summary.pretrain_acc)]
    for number, (ticket, superposed) in enumerate(
        zip(summary.ticket_acc, summary.superposed_acc, strict=True), start=1
    ):
        rows += [(f"ticket {number}", ticket), (f"superposition {number}", superposed)]
    rows.append(("final", summary.final_acc))
    if summary.test_acc is not None:
        rows.append(("final, on the test set", summary.test_acc))
    if summary.ema_acc is not None:
        rows.append(("moving average", summary.ema_acc))
    if summary.ema_test_acc is not None:
        rows.append(("same, on the test set", summary.ema_test_acc))
    lines = [f"{'network':<24}accuracy", *(f"{name:<24}{accuracy:8.2%}" for name, accuracy in rows), ""]
    lines.append(f"density {summary.density:.4f}   gain over pre-training {summary.gain:+.2f} points")
    if summary.gain_over_ticket is not None:
        lines[-1] += f", over the last ticket {summary.gain_over_ticket:+.2f} points"
    costs = {
        "parameters": summary.parameters_of_dense,
        "inference FLOPs": summary.inference_flops_of_dense,
        "training FLOPs": summary.training_flops_of_dense,
    }
    if known := [f"{cost:.3f} of the {name}" for name, cost in costs.items() if cost is not None]:
        lines.append(f"of the dense network: {', '.join(known)}")
    lines.append(f"{summary.total_seconds:.0f} s; files in {folder}")
    return "\n".join(lines)


def layer_table(
    shapes: Mapping[str, Sequence[int]],
    flops: Mapping[str, float],
    now: Mapping[str, float],
    at_end: Mapping[str, float | None],
) -> str:
    """The table of ``--show-layers``: a line per layer, and one for all of them.

    Args:
        shapes: of the layers' weights, by name.
        flops: dense forward FLOPs of one sample, by name.
        now: densities of the layers that have masks, and of all of these together under ``all``.
        at_end: the same after the last topology update; None where the weights' magnitudes are to decide.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    cells = [("layer", "shape", "weights", "density now", "at the end", "MFLOPs dense", "MFLOPs now")]
    for name in [*shapes, "all"]:
        dense_flops = flops.get(name, 0.0) if name in shapes else inference_flops(flops)
        flops_now = dense_flops * now.get(name, 1.0) if name in shapes else inference_flops(flops, now)
        final = at_end.get(name, 1.0)
        cells.append(
            (
                name,
                "x".join(map(str, shapes.get(name, ()))),
                f"{sizes[name] if name in sizes else sum(sizes.values()):,}",
                f"{now[name]:.4f}" if name in now else "dense",
                "dense" if name not in at_end else "by magnitude" if final is None else f"{final:.4f}",
                f"{dense_flops / 1e6:,.3f}",
                f"{flops_now / 1e6:,.3f}",
            )
        )
    names, shape_texts, *figures = zip(*cells, strict=True)
    columns = [_padded(names, str.ljust), _padded(shape_texts, str.ljust), *(_padded(c, str.rjust) for c in figures)]
    return "\n".join("  ".join(line) for line in zip(*columns, strict=True))


def _padded(texts: Sequence[str], justify: Callable[[str, int], str]) -> list[str]:
    width = max(map(len, texts))
    return [justify(text, width) for text in texts]
