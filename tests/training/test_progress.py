"""What a person sees while a run goes on."""

import io
import os
import sys

import pytest

from sparselearning.training.progress import Progress
from sparselearning.training.records import Results


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def fileno(self):
        return 2


@pytest.mark.parametrize(("columns", "shortest"), [(80, 10), (100, 30)])
def test_the_bar_is_a_bar_on_common_terminals(columns, shortest, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(os, "get_terminal_size", lambda descriptor: os.terminal_size((columns, 25)))
    progress = Progress()
    progress.start(done_batches=99_000, total_batches=99_999, so_far=Results(pretrain_acc=None))
    figures = {"lr": 0.0001234, "loss": 0.001234, "accuracy": 0.9876, "density": 0.1234, "images/s": 12345.6}
    progress.within_epoch("pretrain", 249, 390, 391, figures)
    shown = sys.stderr.getvalue().split("\r")[-1]
    progress.close()
    assert len(shown) < columns
    assert len(shown.split("|")[1]) >= shortest
    assert "loss 0.001234  accuracy 0.9876" in shown
