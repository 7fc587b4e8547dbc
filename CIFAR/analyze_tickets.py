#!/usr/bin/env python3
"""Ask a run about its tickets: ``python -m sparselearning.analyze`` under its first name, for early runs too.

python3 analyze_tickets.py RUN
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C during the imports below, which take seconds, needs no traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from collections.abc import Sequence

import main_suptickets

from sparselearning import analyze
from sparselearning.process.script import run_script


def main(argv: Sequence[str] | None = None) -> None:
    """Analyse one run."""
    analyze.main(argv, otherwise=main_suptickets)


if __name__ == "__main__":
    run_script(main)
