"""How commands end: one sentence and the right exit code, whatever stdout, stderr and the other ranks are like."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from helpers.cifar import write_npz
from helpers.commands import exit_code, one_sentence
from helpers.processes import MULTIPROC, PATIENCE, ROOT, environment, finished, free_port, wait_until
from sparselearning.process import distributed, launch
from sparselearning.process.errors import UsageError
from sparselearning.process.script import run_script
from sparselearning.process.signals import stop_signals

CIFAR = ROOT / "CIFAR" / "main_suptickets.py"
needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


def raising(error):
    def main():
        raise error

    return main


# ------------------------------------------------------------------------------------------------- what the system says


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (PermissionError(13, "Permission denied", "/locked/run"), "/locked/run: Permission denied"),
        (OSError(36, "File name too long", "aaa"), "aaa: File name too long"),
        (OSError(12, "Cannot allocate memory"), "error: Cannot allocate memory"),
        (OSError("no reason at all"), "error: no reason at all"),
    ],
)
def test_what_the_system_refuses_is_one_sentence(capsys, error, told):
    assert exit_code(raising(error)) == 1
    assert one_sentence(capsys.readouterr().err).endswith(told)


def test_a_name_that_is_too_long_is_one_sentence(capsys):
    assert exit_code(lambda: os.stat("a" * 300)) == 1
    assert one_sentence(capsys.readouterr().err).endswith("aaa: File name too long")


def test_an_error_that_nobody_foresaw_keeps_its_traceback():
    with pytest.raises(KeyError, match="why"):
        run_script(raising(KeyError("why")))


def test_a_lost_rank_is_told_with_its_cause(capsys):
    error = dist.DistBackendError("NCCL error in: a.cpp:3, unhandled system error\nncclSystemError: it failed")
    assert exit_code(raising(error)) == 1
    assert "(NCCL error in: a.cpp:3, unhandled system error)" in one_sentence(capsys.readouterr().err)


# ------------------------------------------------------------------------------------------------------------- streams


@needs_dev_full
@pytest.mark.parametrize("flush", [True, False])
def test_a_full_disk_under_stdout_is_one_sentence(capsys, monkeypatch, flush):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert exit_code(lambda: print("result", flush=flush)) == 1
        assert one_sentence(capsys.readouterr().err).endswith("error: stdout: No space left on device")
        full.flush()  # as Python does at its end: what cannot be written is gone


@needs_dev_full
def test_help_on_a_full_disk_is_one_sentence(capsys, monkeypatch):
    def main():
        print("usage")
        sys.exit(0)

    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert exit_code(main) == 1
    assert "No space left on device" in one_sentence(capsys.readouterr().err)


def test_closed_streams_are_no_fault(monkeypatch, tmp_path):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)

    def main():
        print("result")
        (tmp_path / "tty").write_text(str(sys.stderr.isatty()))
        raise UsageError("wrong")

    assert exit_code(main) == 2
    assert (tmp_path / "tty").read_text() == "False"


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_no_character_stops_a_script(monkeypatch, encoding):
    """± on a terminal of 1967; the byte of a file name that is no UTF-8."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
    run_script(lambda: print("97 ± 1 %, k\udce4fer"))
    assert b"fer\n" in written.getvalue()


def test_an_ascii_terminal_and_python_without_docstrings():
    plain = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONOPTIMIZE": "2"}
    command = [sys.executable, CIFAR, "--help"]
    ended = subprocess.run(command, env=environment() | plain, capture_output=True, text=True, timeout=PATIENCE)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "--superposing_method" in ended.stdout


# ------------------------------------------------------------------------------------------------------------- signals


def test_a_hangup_stops_a_run_unless_nohup_has_started_it(monkeypatch):
    monkeypatch.setattr(launch.torchrun, "run", lambda args: None)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ.pop("TORCHELASTIC_SIGNALS_TO_HANDLE", None)  # an earlier launch in this process leaves it
    before = signal.getsignal(signal.SIGHUP)
    with stop_signals() as received:
        os.kill(os.getpid(), signal.SIGHUP)
        assert received() == signal.SIGHUP
    assert signal.getsignal(signal.SIGHUP) is before
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with stop_signals() as received:
            os.kill(os.getpid(), signal.SIGHUP)
            assert received() == 0
            os.kill(os.getpid(), signal.SIGTERM)
            assert received() == signal.SIGTERM
        launch.launch(["main.py"])
        assert "SIGHUP" not in os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"]
    finally:
        signal.signal(signal.SIGHUP, before)


MODULES = [*(ROOT / "CIFAR").glob("*.py"), *(ROOT / "ImageNet").glob("*.py")]
SCRIPTS = [path for path in MODULES if path.read_text().startswith("#!")]


COMMANDS = ["sparselearning", *(f"sparselearning.{p.stem}" for p in (ROOT / "sparselearning").glob("[a-z]*.py"))]


@pytest.mark.parametrize(
    "words",
    [*([script] for script in SCRIPTS), *(["-m", command, "--help"] for command in COMMANDS), [f"-m{COMMANDS[-1]}"]],
    ids=lambda words: str(words[0 if len(words) == 1 else 1]).removeprefix(str(ROOT)),
)
def test_an_interrupt_during_imports_needs_no_traceback(tmp_path, words):
    # Many short naps: a signal that comes just before one begins is answered after it.
    (tmp_path / "torch.py").write_text(
        "import time\nprint('importing', flush=True)\nfor _ in range(600):\n    time.sleep(0.1)"
    )
    path = environment() | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, *words], env=path, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == ("", "")
        assert process.returncode == 130


@pytest.mark.parametrize("words", [["-c", "import sparselearning"], ["-m", "mine", "sparselearning.report"]])
def test_programs_that_import_the_library_keep_their_interrupts(tmp_path, words):
    (tmp_path / "torch.py").write_text(
        "import os, signal\nprint(signal.getsignal(signal.SIGINT) is signal.default_int_handler)\nos._exit(0)"
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("import sparselearning")
    path = environment() | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "PYTHONUNBUFFERED": "1"}
    ended = subprocess.run([sys.executable, *words], env=path, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.stdout == "True\n"


ORPHAN = """
import os, sys, time
from sparselearning.process.signals import stop_signals, stop_with_parent
if os.fork():
    while not os.path.exists(sys.argv[1]):
        time.sleep(0.02)
    os._exit(0)
stop_with_parent()
with stop_signals() as received:
    open(sys.argv[1], "w").close()
    while not received():
        time.sleep(0.02)
os.rename(sys.argv[1], sys.argv[1] + f" and stopped by {received()}")
"""


def test_a_process_whose_parent_is_gone_is_told_to_stop(tmp_path):
    subprocess.run([sys.executable, "-c", ORPHAN, tmp_path / "began"], env=environment(), check=True, timeout=PATIENCE)
    wait_until((tmp_path / f"began and stopped by {signal.SIGTERM:d}").exists, 30)


# ------------------------------------------------------------------------------------------------------ other ranks


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_alone_leaves_at_once(monkeypatch, capsys, rank):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "stop", lambda: pytest.fail("it waits for the others to leave the group with it"))
    monkeypatch.setattr(os, "_exit", sys.exit)
    assert exit_code(raising(UsageError("there is no data set"))) == 2
    assert one_sentence(capsys.readouterr().err).endswith("error: there is no data set")


ONE_ASTRAY = """
import os, sys, time
import torch.distributed as dist
sys.path.insert(0, sys.argv[2])
import main_suptickets
from sparselearning.process.script import run_script

dist.destroy_process_group = lambda: time.sleep(600)  # NCCL's waits for ranks that wait for this one
data = "nowhere.npz" if os.environ["RANK"] == "1" else sys.argv[3]
run_script(lambda: main_suptickets.main(["--no-cuda", "--pre_train", "--data", data, "--save", sys.argv[1]]))
"""


def test_a_rank_that_fails_alone_ends_the_job_in_seconds(tmp_path):
    (tmp_path / "child.py").write_text(ONE_ASTRAY)
    write_npz(tmp_path / "data.npz")
    command = [*MULTIPROC, "--nproc_per_node", "2", "--master_port", str(free_port()), tmp_path / "child.py"]
    command += [tmp_path / "run", CIFAR.parent, tmp_path / "data.npz"]
    assert finished(command, tmp_path / "log") == 2  # or it waits for 600 s
    log = (tmp_path / "log").read_text()
    assert "child.py: error: there is no data set or file 'nowhere.npz'" in log
    assert "Traceback" not in log
    assert not (tmp_path / "run").exists()
