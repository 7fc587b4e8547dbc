#!/usr/bin/env python3
"""Sup-tickets on ImageNet: the same program as main.py, under the name that the method has on CIFAR."""

import os
import signal

if __name__ == "__main__":  # Ctrl-C during the imports below, which take seconds, needs no traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import sys
from pathlib import Path

if str(Path(__file__).resolve().parent) not in sys.path:  # ``sparselearning.analyze`` imports this file from elsewhere
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from main import main, make_parser, set_up

from sparselearning.process.script import run_script

__all__ = ["main", "make_parser", "set_up"]

if __name__ == "__main__":
    run_script(main)
