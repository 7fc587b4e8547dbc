"""Ctrl-C while ``python -m sparselearning…`` is still importing, which takes seconds, ends it without a traceback.

Importing this module is all: the package does so first. Programs that import the library keep their signal handlers.
"""

import os
import signal
import sys

PACKAGE = __name__.partition(".")[0]


def _is_command() -> bool:
    """Whether Python is still looking for a module of the package that ``-m`` named: sys.argv begins with -m then."""
    return sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)].removeprefix("-m").partition(".")[0] == PACKAGE


if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # until run_script restores the usual one
