"""How every command ends: one clear sentence, the right exit code, and no rank that others wait for."""

import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from sparselearning.process import distributed
from sparselearning.process.errors import FaultError, UsageError, first_line
from sparselearning.process.signals import Stopped

SECONDS_AFTER_OTHERS = 1.0
"""How long a rank that has lost another waits for that one to end first: the launcher blames the first to end."""


def run_script(main: Callable[[], None]) -> None:
    """Run a script's ``main`` and leave the process with one clear sentence and the right exit code if it fails."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # scripts set another one for their imports
    _prepare_streams()
    try:
        try:
            main()
        finally:
            sys.stdout.flush()  # or a full disk shows at Python's end, as no sentence
        distributed.stop()
    except BaseException as error:
        alone, all_stop = distributed.world_size() == 1, isinstance(error, Stopped)
        told = _sentence(error)
        if told is None:
            if alone:
                raise
            if not isinstance(error, SystemExit):
                traceback.print_exc()
        elif distributed.is_main() or told[1] in (UsageError.exit_code, FaultError.exit_code):  # may be a rank's own
            print(f"{Path(sys.argv[0]).name}: {told[0]}", file=sys.stderr, flush=True)
        code = told[1] if told else getattr(error, "code", 1)
        if not (alone or all_stop):  # others may wait for this rank, and leaving their group for them
            _flush()
            if isinstance(error, RuntimeError) and distributed.is_lost_contact(error):
                time.sleep(SECONDS_AFTER_OTHERS)
            os._exit(code)
        distributed.stop()
        sys.exit(code)


def _sentence(error: BaseException) -> tuple[str, int] | None:
    """What to tell of an error, and the exit code; None for an unexpected one."""
    match error:
        case Stopped():
            return f"{error}: continue with --resume {error.checkpoint.parent}", error.exit_code
        case UsageError() | FaultError():
            return f"error: {error}", error.exit_code
        case torch.OutOfMemoryError():
            return f"error: the GPU's memory is full ({first_line(error)}): try a smaller batch", 1
        case MemoryError() | RuntimeError() if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            return "error: the memory of this machine is full: try a smaller batch or network", 1
        case RuntimeError() if distributed.is_lost_contact(error):
            cause = first_line(error)
            return f"error: another process of this run has gone away or cannot be reached ({cause})", 1
        case RuntimeError() if any(kind.__name__ == "TorchDynamoException" for kind in type(error).__mro__):  # private
            cause = first_line(getattr(error, "inner_exception", error))
            return f"error: PyTorch cannot compile this ({cause}): leave out --compile", 1
        case OSError():
            stdout_fails = error.filename is None and not _flush()
            if isinstance(error, BrokenPipeError):
                return "error: nobody reads this output any more (broken pipe)", 1
            place = "stdout" if stdout_fails else error.filename
            return f"error: {f'{place}: ' if place else ''}{error.strerror or error}", 1
        case KeyboardInterrupt():
            return "stopped", 130
    return None


def _prepare_streams() -> None:
    """Let printing fail neither for a closed stream nor for a character that a terminal does not know."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # each takes its own, lowest free, number
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is


def _flush() -> bool:
    """Write out what was printed; if that fails, drop it, so that Python's end does not try once more."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True
