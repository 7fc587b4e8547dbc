"""Start one process per GPU (or several on a CPU) through ``torch.distributed.run``."""

import argparse
import os
import sys
from collections.abc import Sequence

import torch
from torch.distributed import DistNetworkError
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from sparselearning.process import distributed
from sparselearning.process.errors import FaultError, UsageError
from sparselearning.process.signals import hangups_are_ignored


def launch(argv: Sequence[str]) -> None:
    """Run a script in several processes: torchrun's own flags, then the script, then its arguments.

    A ``--master_port`` among the script's arguments takes effect unless the launcher has one of its own.

    Raises:
        UsageError: if torchrun refuses its flags, a machine has fewer GPUs than processes, or a process says that the
            call is wrong.
        FaultError: if a process fails, upon which the others are stopped, or the port is in use.
        SystemExit: 128 plus the signal that stopped the launcher.
    """
    args = torchrun.get_args_parser().parse_args(argv)
    own_flags = argv[: list(argv).index(args.training_script)]
    if not any(flag.startswith(("--master_port", "--master-port")) for flag in own_flags):
        args.master_port = _port_of_script(args.training_script_args) or args.master_port
    if torch.cuda.is_available() and "--no-cuda" not in args.training_script_args and args.nproc_per_node.isdigit():
        distributed.check_gpus(int(args.nproc_per_node))
    if "OMP_NUM_THREADS" not in os.environ and args.nproc_per_node.isdigit():
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // max(1, int(args.nproc_per_node))))
    if hangups_are_ignored():  # which torchrun would undo
        os.environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGQUIT")
    try:
        torchrun.run(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        kind = UsageError if failure.exitcode == UsageError.exit_code else FaultError
        raise kind(
            f"process {rank} of {args.training_script} failed with exit code {failure.exitcode} and took the job down; "
            "its messages are above"
        ) from error
    except (ValueError, AssertionError) as error:
        reason = str(error) or "the numbers of processes and machines are at least 1"
        raise UsageError(f"torchrun refuses to start {args.training_script}: {reason}") from error
    except DistNetworkError as error:
        raise FaultError(f"cannot listen on port {args.master_port}: choose another --master_port") from error
    except SignalException as stop:
        sys.exit(128 + stop.sigval)


def launch_on_all_gpus(argv: Sequence[str]) -> None:
    """Start this very script once per GPU of the machine.

    Raises:
        UsageError: if there is no GPU.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not gpus:
        raise UsageError("--mgpu uses all GPUs of this machine, and there is none")
    launch([f"--nproc_per_node={gpus}", sys.argv[0], *argv])


def is_launched() -> bool:
    """Whether a launcher started this process."""
    return "LOCAL_RANK" in os.environ


def _port_of_script(script_args: Sequence[str]) -> int | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--master_port", "--master-port", type=int)
    return parser.parse_known_args(list(script_args))[0].master_port
