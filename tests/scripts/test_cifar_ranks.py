"""The CIFAR script under torchrun: two processes end where one does, and stop and go on together."""

import json
import os
import re
import shlex
import signal
import sys
import time
from pathlib import Path

import main_suptickets
import numpy as np
import pytest
import torch

from helpers.commands import exit_code
from helpers.comparing import assert_identical, lines, results
from helpers.processes import MULTIPROC, ROOT, marked_processes, on_linux, started, wait_until
from sparselearning.process.files import load_torch
from sparselearning.training.run_folder import RunFolder

# Batches of 9 cannot be halved: each step has shares of 4 and 5 images. LeNet has neither BatchNorm nor dropout.
FLAGS = shlex.split(
    "--no-cuda --model lenet-300-100 --sparse --pre_train --cyclic_train --re_explore --cyc_lr --lr_1 0.02 --lr_2 0.05 "
    "--method GraNet --growth gradient --init-density 0.5 --final-density 0.2 --final-prune-epoch 2 --seed 5 "
    "--update-frequency 3 --epochs 6 --cycle 2 --cycle_rate 0.7 --batch-size 9 --test-batch-size 5 --lr 0.05 "
    "--large-death-rate 0.3 --execution masked"
)
STEPS = 9  # of an epoch
SCRIPT = ROOT / "CIFAR" / "main_suptickets.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]

WAITING = """
import os, runpy, signal, sys
from sparselearning.process import distributed
from sparselearning.training.engine import Trainer

signals, noticed = os.pipe()
os.set_blocking(noticed, False)
signal.set_wakeup_fd(noticed)
train_batch = Trainer.train_batch

def wait_and_train(trainer, batch):
    last_rank = distributed.rank() + 1 == distributed.world_size()
    if last_rank and (trainer.at.epoch, trainer.at.batch) == (4, 1):
        os.read(signals, 1)
    train_batch(trainer, batch)

Trainer.train_batch = wait_and_train
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Flags of the runs, on images in four colours that take no time to learn."""
    path, rng, labels = tmp_path_factory.mktemp("data") / "colours.npz", np.random.default_rng(0), np.arange(110) % 4
    images = rng.integers(0, 96, (110, 8, 8, 3), dtype=np.uint8)
    images[np.arange(110), :, :, labels % 3] += 80
    images[labels == 3] += 70
    np.savez(path, x_train=images[:80], y_train=labels[:80], x_test=images[80:], y_test=labels[80:])
    return [*FLAGS, "--data", str(path)]


def waiting_run(home, flags):
    """The words of a run whose last rank waits, after one batch of the second cycle, until it gets a signal."""
    (home / "waiting.py").write_text(WAITING)
    return [home / "waiting.py", SCRIPT, *flags]


@pytest.fixture(scope="module")
def undisturbed_cifar(ranks, flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cifar") / "undisturbed"
    ranks(main_suptickets.main, [*flags, "--save", str(folder)])
    return folder


def is_close(value, other, rel):
    return value == (pytest.approx(other, rel=rel) if isinstance(other, float) else other)


def test_cifar_in_two_processes_equals_one(flags, undisturbed_cifar, tmp_path):
    """But for rounding, which on some processors decides between two weights that are nearly as large in a cycle."""
    main_suptickets.main([*flags, "--save", str(tmp_path)])
    alone, together = results(tmp_path), results(undisturbed_cifar)
    assert alone.keys() == together.keys()
    for name, value in alone.items():
        if name in ("metrics", "tickets"):
            for row, other in zip(value, together[name], strict=True):
                assert row.keys() == other.keys()
                rel = 1e-5 if row.get("phase") == "pretrain" else 0.01
                assert all(is_close(row[key], other[key], rel) for key in row), (row, other)
        elif " masks " in name:
            assert (together[name] != value).float().mean() < 0.001, name
        else:
            assert (together[name] - value).float().norm() < 0.03 * value.float().norm(), name
    assert json.loads((undisturbed_cifar / "config.json").read_text())["world_size"] == 2


def test_cifar_stops_on_sigterm_to_the_launcher_and_resumes_exactly(ranks, flags, undisturbed_cifar, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    words = [*waiting_run(tmp_path, flags), "--save", folder]
    with started([*MULTIPROC, "--nproc_per_node", "2", *words], log) as launcher:
        wait_until(lambda: len(lines(folder / "metrics.jsonl")) == 4 or launcher.poll() is not None)
        launcher.terminate()
        assert launcher.wait(60) == 143
    assert f"stopped by SIGTERM: continue with --resume {folder}\n" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert list(folder.rglob("*.partial")) == []
    stopped = load_torch(folder / "checkpoint.pth")
    assert stopped["epoch"] == 4
    assert 0 < stopped["batch"] < STEPS  # in the middle of the second cycle's first epoch
    ranks(main_suptickets.main, [*flags, "--save", str(folder), "--resume", str(folder)])
    assert_identical(results(folder), results(undisturbed_cifar))


@on_linux
def test_torchrun_that_is_killed_leaves_no_rank_and_a_checkpoint(flags, tmp_path):
    """One rank will do: that two stop at the same batch is seen above."""
    folder, log = tmp_path / "run", tmp_path / "log"
    with started([*TORCHRUN, "1", *waiting_run(tmp_path, flags), "--save", folder], log) as launcher:
        wait_until(lambda: lines(folder / "metrics.jsonl") or launcher.poll() is not None)
        launcher.kill()
        launcher.wait()
        wait_until(lambda: not marked_processes(log), 30)
    assert f"stopped by SIGTERM: continue with --resume {folder}\n" in log.read_text()
    assert load_torch(folder / "checkpoint.pth")["epoch"] >= 1
    assert not RunFolder(folder).lock.exists()


def rank_processes(launcher):
    """Process ids of a launcher's ranks, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (folder / "environ").read_bytes().split(b"\0") if parent == launcher.pid else []
        except OSError:  # it has just ended
            continue
        found |= {int(entry[5:]): int(folder.name) for entry in variables if entry.startswith(b"RANK=")}
    return found


@pytest.fixture(scope="module")
def killed(flags, tmp_path_factory):
    """A run whose rank 1 is killed after its first epoch: folder, exit status, seconds that it took, output."""
    home = tmp_path_factory.mktemp("killed")
    folder, log = RunFolder(home / "run"), home / "log"
    words = [*waiting_run(home, flags), "--save", folder.path]
    with started([*MULTIPROC, "--nproc_per_node", "2", *words], log) as launcher:
        wait_until(lambda: folder.checkpoint.exists() or launcher.poll() is not None)
        os.kill(rank_processes(launcher)[1], signal.SIGKILL)
        began = time.monotonic()
        status = launcher.wait(120)
    return folder, status, time.monotonic() - began, log


@on_linux
def test_a_killed_rank_takes_the_job_down(killed):
    folder, status, seconds, log = killed
    printed = log.read_text()
    assert status != 0
    assert seconds < 60
    assert f"process 1 of {log.with_name('waiting.py')} failed with exit code -9" in printed
    assert "Traceback" not in printed
    assert 1 <= len(lines(folder.metrics)) < 6
    wait_until(lambda: not marked_processes(log), 30)


@on_linux
def test_a_killed_rank_leaves_whole_files(killed):
    files = [
        path
        for path in killed[0].path.rglob("*")
        if path.is_file() and path.suffix != ".partial" and path != killed[0].lock
    ]
    assert {path.name for path in files} >= {"config.json", "metrics.jsonl", "checkpoint.pth"}
    for path in files:
        if path.suffix == ".pth":
            load_torch(path)
        else:
            for text in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
                json.loads(text)


@on_linux
def test_a_killed_run_resumes_exactly(ranks, flags, undisturbed_cifar, killed):
    folder = killed[0].path
    ranks(main_suptickets.main, [*flags, "--save", str(folder), "--resume", str(folder)])
    assert_identical(results(folder), results(undisturbed_cifar))


def test_cifar_with_another_number_of_processes_is_refused(flags, undisturbed_cifar, tmp_path, capsys):
    folder = undisturbed_cifar
    before = {path: path.read_bytes() for path in folder.iterdir()}
    resume = [*flags, "--save", str(tmp_path / "run"), "--resume", str(folder)]
    assert exit_code(lambda: main_suptickets.main(resume)) == 2
    assert re.search(r"written by 2 processes: resume with as many, not 1\n$", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_cifar_on_all_gpus_needs_one(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert exit_code(lambda: main_suptickets.main([*FLAGS, "--mgpu"])) == 2
    assert "--mgpu uses all GPUs" in capsys.readouterr().err
