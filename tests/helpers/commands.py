"""Commands run in this process: what they end with, and what they say then."""

import contextlib
import os
import sys
from pathlib import Path

import pytest

from sparselearning.process.script import run_script


def exit_code(main):
    """The exit code of a program whose main function this is."""
    try:
        run_script(main)
    except SystemExit as leaving:
        return leaving.code
    return 0


@contextlib.contextmanager
def not_imported(folders, off_the_path=()):
    """As if Python had imported no module from these folders, nor looked for any in them and those ``off_the_path``."""
    within = tuple(f"{folder}{os.sep}" for folder in folders)
    before = dict(sys.modules)

    def forget():
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None)).startswith(within):
                del sys.modules[name]

    with pytest.MonkeyPatch.context() as context:
        places = {*folders, *off_the_path}
        context.setattr(sys, "path", [place for place in sys.path if Path(place) not in places])
        forget()
        try:
            yield
        finally:
            forget()
            sys.modules.update(before)


def one_sentence(err):
    """What went to stderr but for notes: one line, and nothing that looks like a crash."""
    told = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert len(told) == 1, err
    assert "Traceback" not in err
    return told[0]
