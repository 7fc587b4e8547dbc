#!/usr/bin/env python3
"""Run main_suptickets.py for several methods and seeds, then tabulate mean and deviation.

python3 sweep.py --seeds 41 42 43 --methods granet rigl set --out sweeps/first -- --pre_train --cyclic_train --data …

Flags after ``--`` go to every run, with the run's seed in place of ``{seed}``; a method's own flags (METHODS) follow
them, and so take precedence. Give the same command again: finished runs are skipped, stopped ones are resumed, and
failed ones are tried again.
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C during the imports below, which take seconds, needs no traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import importlib.util
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import main_suptickets

from sparselearning import report
from sparselearning.process import arguments
from sparselearning.process.errors import FaultError, UsageError
from sparselearning.process.files import check_output
from sparselearning.process.script import run_script
from sparselearning.process.signals import stop_signals
from sparselearning.training import kept_flags
from sparselearning.training.run_folder import RunFolder
from sparselearning.training.start import differing_flags

SCRIPT = Path(__file__).with_name("main_suptickets.py")
SECONDS_BETWEEN_LOOKS = 0.1


class Method(NamedTuple):
    """A method's flags, and switches that contradict it and are left out of the shared flags."""

    flags: str  # {density} is replaced by the --final-density of the run
    without: tuple[str, ...] = ()


METHODS = {
    "dense": Method("", without=("--re_explore", "--no_maskupdates")),
    "static": Method("--sparse --method DST --init-density {density} --fix", without=("--re_explore",)),
    "set": Method("--sparse --method DST --init-density {density} --growth random"),
    "rigl": Method("--sparse --method DST --init-density {density} --growth gradient"),
    # In-Time Over-Parameterization (2102.02887): update rarely, so that new weights have time to grow.
    "set-itop": Method("--sparse --method DST --init-density {density} --growth random --update-frequency 1500"),
    "rigl-itop": Method("--sparse --method DST --init-density {density} --growth gradient --update-frequency 4000"),
    "granet": Method("--sparse --method GraNet --init-density 0.5 --growth gradient"),
    "granet-from-dense": Method("--sparse --method GraNet --init-density 1 --growth gradient"),
    "gmp": Method("--sparse --method GMP --init-density 1 --sparse-init GMP"),
    "snip": Method(
        "--sparse --method DST --init-density {density} --fix --sparse-init snip", without=("--re_explore",)
    ),
}
PLAIN = Method("--pre_train --cycle_rate 0", without=("--cyclic_train",))
"""On top of a method: the same training for the same epochs with its own full schedule, without tickets."""
METHOD_SWITCHES = ("--sparse", "--fix")
"""Switches that methods set: left out of the shared flags."""


def main(argv: Sequence[str] | None = None) -> None:
    """Do all runs that are not done, and report on those that are.

    Raises:
        UsageError: if a run's flags contradict one another, its folder holds a run with other flags, or something else
            is where a log or the report is to go.
        FaultError: if runs failed, after all others are done.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    args = parse(words[:end])
    runs = [
        planned(method, seed, words[end + 1 :], args.out, control)
        for seed in dict.fromkeys(args.seeds)
        for method in dict.fromkeys(args.methods)
        for control in ((False, True) if args.control else (False,))
    ]
    report.check_out(args.out / "report")
    for run in runs if args.gpus else ():
        check_output(run.log, SCRIPT.name)
    if args.dry_run:
        print("\n".join(f"# finished: {run.name}" if run.finished else shlex.join(run.command()) for run in runs))
        return

    failed = do(runs, args.gpus)
    without_plots = [] if importlib.util.find_spec("matplotlib") else ["--no-plots"]
    if finished := [str(run.folder.path) for run in runs if run.finished]:
        report.main([*finished, "--out", str(args.out / "report"), *without_plots])
    check_done(failed, runs)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line up to ``--``."""
    parser = arguments.Parser(__doc__)
    parser.usage = "%(prog)s --seeds N [N …] --methods NAME [NAME …] [options] -- FLAGS OF main_suptickets.py"
    parser.add_argument(
        "--seeds", type=arguments.seed, nargs="+", required=True, metavar="N", help="one run per seed and method"
    )
    parser.add_argument(
        "--methods", choices=METHODS, nargs="+", required=True, metavar="NAME", help=f"any of {', '.join(METHODS)}"
    )
    parser.add_argument(
        "--control", action="store_true",
        help=f"also run a control for each: plain training without tickets, for the same epochs ({PLAIN.flags})",
    )  # fmt: skip
    parser.add_argument(
        "--out",
        type=arguments.path,
        default=Path("sweep"),
        metavar="DIR",
        help="run folders, DIR/NAME/seedN, and DIR/report",
    )
    parser.add_argument(
        "--gpus", nargs="+", metavar="ID",
        help="one run at a time on each of these (CUDA_VISIBLE_DEVICES), its output in DIR/NAME/seedN.log; "
        "without it, one run after the other on whatever there is",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------------- one run


@dataclass(frozen=True)
class Run:
    """One run of main_suptickets.py: its name, flags and folder."""

    name: str
    flags: list[str]
    folder: RunFolder

    @property
    def finished(self) -> bool:
        """Whether there is nothing more to do."""
        return self.folder.summary.is_file()

    @property
    def log(self) -> Path:
        """File of its output if others run beside it; not in its folder, which has to be empty when it starts."""
        return self.folder.path.with_suffix(".log")

    @property
    def program(self) -> list[str]:
        """What Python is to run, before the flags."""
        return [os.path.relpath(SCRIPT)]

    def command(self) -> list[str]:
        """The command that starts or resumes it."""
        resume = ["--resume", str(self.folder.checkpoint)] if self.folder.checkpoint.is_file() else []
        return [sys.executable, *self.program, *self.flags, *resume]


def planned(method: str, seed: int, shared: Sequence[str], out: Path, control: bool) -> Run:
    """Compose one run, and check its flags and its folder before anything runs.

    Raises:
        UsageError: if the flags contradict one another, or the folder holds a run with others.
        FaultError: if the folder's configuration is damaged.
    """
    layers = [METHODS[method], PLAIN] if control else [METHODS[method]]
    without = {*METHOD_SWITCHES, *(switch for layer in layers for switch in layer.without)}
    words = [word.replace("{seed}", str(seed)) for word in shared if word not in without]
    given = main_suptickets.make_parser().given(words)
    for flag, own in (("save", "--out"), ("seed", "--seeds")):
        if flag in given:
            raise UsageError(f"--{flag} after -- would be one for all runs: give {own} before it")
    for flag in ("dry_run", "show_layers"):
        if flag in given:
            raise UsageError(
                f"{given[flag]} after -- would train nothing: for the commands alone, give --dry-run before it"
            )
    of_all = main_suptickets.parse(words)
    words += [word for layer in layers for word in layer.flags.format(density=of_all.final_density).split()]
    folder = RunFolder(out / (f"{method}-control" if control else method) / f"seed{seed}")
    words += ["--indicate_method", method, "--seed", str(seed), "--save", str(folder.path)]
    if of_all.tensorboard:
        words += ["--tensorboard", str(of_all.tensorboard / folder.path.relative_to(out))]
    run = Run(f"{folder.path.parent.name} seed {seed}", words, folder)

    args = main_suptickets.parse(words)
    for switch in METHOD_SWITCHES:
        if getattr(args, switch.removeprefix("--")) and switch not in words:
            raise UsageError(
                f"{method} cannot be combined with --demo, --recipe or --config of a run with {switch}: "
                "give its flags one by one"
            )
    main_suptickets.check(args)
    if args.iters > 1:
        raise UsageError("--iters and --seeds both ask for several seeds: give --seeds alone")
    _check_folder(run, args)
    return run


def _check_folder(run: Run, args: argparse.Namespace) -> None:
    if not run.folder.config.is_file():
        return
    parser = main_suptickets.make_parser()
    identity = kept_flags.identity(kept_flags.values(args), parser)
    settled = partial(kept_flags.settled, parser=parser)
    if differing := differing_flags(run.folder.read_config(), identity, settled):
        others = ", ".join(differing)
        raise UsageError(f"{run.folder.path} holds a run with other flags, {others}: choose another --out")


# ---------------------------------------------------------------------------------------------------- all of them


def do(runs: Sequence[Run], gpus: Sequence[str] | None = None) -> list[Run]:
    """Do all runs that are not finished; return those that failed.

    Raises:
        SystemExit: on a stop signal, which the runs get, too.
    """
    to_do = [run for run in runs if not run.finished]
    print(f"runs: {len(runs)}, of them finished before: {len(runs) - len(to_do)}", flush=True)
    with stop_signals() as stop_signal:
        failed = execute(to_do, gpus, stop_signal)
        stopped = stop_signal()
    if stopped:
        print(f"{Path(sys.argv[0]).name}: stopped: the same command resumes where it stopped", file=sys.stderr)
        sys.exit(128 + stopped)
    return failed


def check_done(failed: Sequence[Run], runs: Sequence[Run]) -> None:
    """Raise FaultError if runs failed."""
    if failed:
        names = ", ".join(run.name for run in failed)
        raise FaultError(f"runs failed: {len(failed)} of {len(runs)} ({names}): the same command tries them again")


def execute(runs: Sequence[Run], gpus: Sequence[str] | None, stop_signal: Callable[[], int]) -> list[Run]:
    """Do the runs one after the other, or one at a time on each GPU; return those that failed.

    A stop signal is passed on to the runs under way, which write their checkpoints; no other is started then.
    """
    waiting, free = deque(runs), deque[str | None](gpus or [None])
    working: dict[subprocess.Popen, tuple[Run, str | None]] = {}
    failed = []
    passed_on = False
    try:
        while waiting or working:
            if stop_signal() and not passed_on:
                passed_on = True
                waiting.clear()
                for process in working:
                    process.send_signal(stop_signal())
            while waiting and free:
                run, gpu = waiting.popleft(), free.popleft()
                working[_start(run, gpu, at_once=len(gpus or [None]))] = run, gpu
                print(f"{run.name}: started{'' if gpu is None else f' on GPU {gpu}'}", flush=True)
            time.sleep(SECONDS_BETWEEN_LOOKS)
            for process in [process for process in working if process.poll() is not None]:
                run, gpu = working.pop(process)
                free.append(gpu)
                if process.returncode:
                    failed.append(run)
                print(f"{run.name}: {f'exit code {process.returncode}' if process.returncode else 'done'}", flush=True)
    finally:
        for process in working:
            process.terminate()
    return failed


def _start(run: Run, gpu: str | None, at_once: int) -> subprocess.Popen:
    environment = dict(os.environ)
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // at_once)))
    try:
        run.log.parent.mkdir(parents=True, exist_ok=True)
        # A session of its own: Ctrl-C then reaches it once, through us, and not a second time from the terminal,
        # when it may be on its way out already.
        if gpu is None:
            return subprocess.Popen(run.command(), env=environment, start_new_session=True)
        with run.log.open("ab") as log:
            log.write(f"{shlex.join(run.command())}\n".encode())
            log.flush()
            return subprocess.Popen(
                run.command(), env=environment, start_new_session=True, stdout=log, stderr=subprocess.STDOUT
            )
    except OSError as error:
        raise FaultError(f"cannot start {run.name}: {error}") from error


if __name__ == "__main__":
    run_script(main)
