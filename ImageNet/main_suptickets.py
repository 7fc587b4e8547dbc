#!/usr/bin/env python3
"""Sup-tickets on ImageNet: the same program as main.py, under the name that the method has on CIFAR."""

import os
import signal

if __name__ == "__main__":  # Ctrl-C during the imports below, which take seconds, needs no traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from main import main

from sparselearning.process.script import run_script

if __name__ == "__main__":
    run_script(main)
