#!/usr/bin/env python3
"""Sup-tickets on ImageNet: the same program as main.py, under the name that the method has on CIFAR."""

import os
import signal

if __name__ == "__main__":  # Ctrl-C during the imports below, which take seconds, needs no traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import sys
from importlib.util import spec_from_file_location
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone runs without being installed

from sparselearning.process.script import run_script
from sparselearning.training.builders import import_as

# By its place: other projects have a main.py, too, and may be first on the search path.
MAIN = Path(__file__).resolve().with_name("main.py")
program = import_as(str(MAIN), spec_from_file_location(str(MAIN), MAIN))
main, make_parser, set_up = program.main, program.make_parser, program.set_up

if __name__ == "__main__":
    run_script(main)
