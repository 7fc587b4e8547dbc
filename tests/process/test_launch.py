"""The launcher: what torchrun is given, how it ends, and processes that find each other."""

import contextlib
import json
import signal
import socket

import pytest
import torch
from torch.distributed.elastic.multiprocessing.api import ProcessFailure, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from helpers.commands import exit_code
from helpers.processes import MULTIPROC, PATIENCE, finished, free_port, started
from sparselearning.process import distributed, launch
from sparselearning.process.errors import FaultError, UsageError


@pytest.fixture
def launched(monkeypatch):
    """What torchrun would be given, instead of starting it."""
    calls = []
    monkeypatch.setattr(launch.torchrun, "run", calls.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return calls


@pytest.mark.parametrize("default", [None, 29500])  # torchrun's own, after and before torch 2.12
def test_the_port_among_the_scripts_arguments_counts(launched, monkeypatch, default):
    build = launch.torchrun.get_args_parser

    def parser():
        built = build()
        built.set_defaults(master_port=default)
        return built

    monkeypatch.setattr(launch.torchrun, "get_args_parser", parser)
    launch.launch(["--nproc_per_node", "2", "main.py", "--sparse", "--master_port", "7768", "-j20", "-p", "500", "DIR"])
    launch.launch(["--nproc_per_node=2", "--master_port=1234", "main.py", "--master_port=7768"])
    assert [args.master_port for args in launched] == [7768, 1234]
    assert launched[0].training_script_args == ["--sparse", "--master_port", "7768", "-j20", "-p", "500", "DIR"]


def test_without_a_port_torchrun_chooses(launched):
    launch.launch(["--nproc_per_node", "2", "main.py", "-p", "500"])
    assert launched[0].master_port == launch.torchrun.get_args_parser().parse_args(["main.py"]).master_port


def test_the_published_launchers_flags_are_torchruns(launched):
    flags = "--nnodes 3 --node_rank 2 --nproc_per_node 8 --master_addr first.host --master_port 29500"
    launch.launch([*flags.split(), "main.py"])
    (args,) = launched
    assert (args.nnodes, args.node_rank, args.nproc_per_node) == ("3", 2, "8")
    assert (args.master_addr, args.master_port) == ("first.host", 29500)


def test_more_processes_than_gpus_are_refused(launched, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match=r"2 processes .* 1 GPU"):
        launch.launch(["--nproc_per_node", "2", "main.py"])
    with pytest.raises(UsageError, match=r"2 processes .* 1 GPU"):
        distributed.check_gpus(2)
    assert launched == []
    launch.launch(["--nproc_per_node", "2", "main.py", "--no-cuda"])
    assert len(launched) == 1


@pytest.mark.parametrize(
    "flags",
    [
        *(f"--nproc_per_node {count}" for count in ("0", "00", "-1", "x", "gpu")),
        "--nnodes 0",
        "--nproc_per_node 1 --master_port 99999",
    ],
)
def test_what_torchrun_refuses_is_told_in_a_sentence(monkeypatch, flags):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=r"torchrun refuses to start main\.py: ."):
        launch.launch([*flags.split(), "main.py"])


def test_an_environment_that_no_launcher_made_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UsageError, match="which of 2 processes this one is"):
        distributed.start(use_cuda=False)


@pytest.mark.parametrize("code", [1, 2])
def test_the_launcher_ends_with_the_status_of_the_rank_that_failed(launched, monkeypatch, capsys, code):
    def fail(args):
        raise ChildFailedError("main.py", {1: ProcessFailure(1, 4242, code, "no file")})

    monkeypatch.setattr(launch.torchrun, "run", fail)
    assert exit_code(lambda: launch.launch(["main.py"])) == code
    assert "process 1 of main.py" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_launcher_that_is_stopped_says_by_what(launched, monkeypatch, number):
    def stop(args):
        raise SignalException("stopped", number)

    monkeypatch.setattr(launch.torchrun, "run", stop)
    assert exit_code(lambda: launch.launch(["main.py"])) == 128 + number


def test_a_fault_that_only_one_rank_meets_is_shown(monkeypatch, capsys):
    def meet():
        raise FaultError("damaged image ant/3.JPEG")

    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert exit_code(meet) == 1
    assert "damaged image ant/3.JPEG" in capsys.readouterr().err


def test_a_port_in_use_is_named(monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        assert exit_code(lambda: launch.launch(["--nproc_per_node", "2", "main.py", "--master_port", str(port)])) == 1
    assert str(port) in capsys.readouterr().err


def test_ranks_that_do_not_find_each_other_say_so(capsys):
    def fail():
        raise RuntimeError("Gloo connectFullMesh failed with timed out connecting: Connection refused")

    assert exit_code(fail) == 1
    assert "Traceback" not in capsys.readouterr().err


REPORTER = """
import json, os, sys
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
print(json.dumps([[os.environ[name] for name in names], sys.argv[1:]]))
"""


def test_two_launchers_are_two_machines(tmp_path):
    child, port = tmp_path / "child.py", str(free_port())
    child.write_text(REPORTER)
    logs = [tmp_path / f"node{node}" for node in (0, 1)]
    launcher = [*MULTIPROC, "--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--node_rank"]
    with contextlib.ExitStack() as stack:
        nodes = [
            stack.enter_context(started([*launcher, str(node), child, "-p", "500", "--master_port", port], log))
            for node, log in enumerate(logs)
        ]
        assert [node.wait(PATIENCE) for node in nodes] == [0, 0]
    for rank, log in enumerate(logs):
        (line,) = (json.loads(line) for line in log.read_text().splitlines() if line.startswith("[["))
        assert line == [[str(rank), "2", "0", "127.0.0.1", port], ["-p", "500", "--master_port", port]]


MORTAL = """
import os, pathlib, signal, sys, time, torch
from sparselearning.process import distributed

first_attempt = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
there = pathlib.Path(sys.argv[1], "there")
if not first_attempt and os.environ["RANK"] == "0":
    while not there.exists():
        time.sleep(0.02)
    time.sleep(1)  # the other rank, which is there first, must not take the dead rank's address for this one's
elif not first_attempt:
    there.touch()
distributed.start(use_cuda=False)
distributed.sum_over_ranks(torch.ones(1))
if first_attempt and distributed.is_main():
    os.kill(os.getpid(), signal.SIGKILL)
try:
    ranks = int(distributed.sum_over_ranks(torch.ones(1)))
except RuntimeError:
    sys.exit("the other rank has gone away")
pathlib.Path(sys.argv[1], f"rank{distributed.rank()}").write_text(str(ranks))
distributed.stop()
"""


def test_ranks_find_each_other_again_after_an_elastic_restart(tmp_path):
    (tmp_path / "child.py").write_text(MORTAL)
    command = [*MULTIPROC, "--nproc_per_node", "2", "--max_restarts", "1", tmp_path / "child.py", tmp_path]
    assert finished([*command, "--master_port", str(free_port())], tmp_path / "log", seconds=60) == 0
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == ["2", "2"]
