"""How every command ends, well or badly."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from sparselearning import distributed
from sparselearning.errors import FaultError, UsageError
from sparselearning.signals import Stopped


def run_script(main: Callable[[], None]) -> None:
    """Run a script's ``main`` and leave the process with one clear sentence and the right status if it fails."""
    try:
        main()
        distributed.stop()
        return
    except Stopped as stop:
        message, code = f"{stop}: go on with --resume {stop.checkpoint.parent}", stop.exit_code
    except (UsageError, FaultError) as error:
        message, code = f"error: {error}", error.exit_code
    except torch.OutOfMemoryError as error:
        message, code = f"error: the GPU's memory is full ({error.args[0].splitlines()[0]}): try a smaller batch", 1
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            message, code = "error: the memory of this machine is full: try a smaller batch or network", 1
        elif distributed.is_lost_contact(error):
            message, code = "error: another process of this run has gone away or cannot be reached", 1
        elif any(kind.__name__ == "TorchDynamoException" for kind in type(error).__mro__):  # it is private
            inner = getattr(error, "inner_exception", error)
            cause = str(inner).strip().partition("\n")[0] or type(inner).__name__
            message, code = f"error: PyTorch cannot compile this ({cause}): leave out --compile", 1
        else:
            raise
    except BrokenPipeError:
        message, code = "error: nobody reads this output any more", 1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at its end
    except KeyboardInterrupt:
        message, code = "stopped", 130
    if distributed.is_main() or code in (UsageError.exit_code, FaultError.exit_code):  # a fault may be one rank's own
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
    distributed.stop()
    sys.exit(code)
