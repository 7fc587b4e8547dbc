"""Faults that the CIFAR script meets: data, memory, disks, divergence, each told in a sentence."""

import errno
import json
import math
import os
import sys
from functools import partial
from pathlib import Path

import main_suptickets
import numpy as np
import pytest
import torch

from helpers.cifar import BOTH, SPARSE, WHOLE_METHOD, X, Y, assert_same_outcome, write_npz
from helpers.commands import one_sentence
from helpers.comparing import lines
from sparselearning.process.files import load_torch
from sparselearning.training.engine import Trainer

# --------------------------------------------------------------------------------------------- wrong checkpoints


def test_a_network_that_does_not_compile(script, monkeypatch, capsys):
    def without_compiler(graph, inputs):
        raise RuntimeError("no working C++ compiler\nfound anywhere")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=without_compiler))
    assert script(WHOLE_METHOD, "--save run --compile") == 1
    told = one_sentence(capsys.readouterr().err)
    assert "no working C++ compiler" in told
    assert "--compile" in told


def test_output_that_nobody_reads_any_more(script, monkeypatch, capsys):
    """Whoever reads it leaves when training starts."""
    reader, writer = os.pipe()
    run = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self: os.close(reader) or run(self))
    with open(writer, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert script(WHOLE_METHOD, "--save run") == 1
        print("more", flush=True)  # as Python's end flushes: what could not be written is gone, and raises no more
    assert "nobody reads" in one_sentence(capsys.readouterr().err)
    assert lines("run/metrics.jsonl")


def test_events_where_a_file_stands(script, capsys):
    Path("events").write_text("mine")
    for folder in ("events", "events/below"):
        assert script(WHOLE_METHOD, "--save run --tensorboard", folder) == 1
        assert "events" in one_sentence(capsys.readouterr().err)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried …")]
)
def test_more_memory_than_there_is(script, capsys, monkeypatch, error):
    def build(*args, **options):
        raise error

    monkeypatch.setattr(main_suptickets, "build_model", build)
    assert script(WHOLE_METHOD, "--save run") == 1
    assert "memory" in one_sentence(capsys.readouterr().err)


# ---------------------------------------------------------------------------------------------------- wrong data


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"x_test": None}, "x_test"),
        ({"y_train": None, "y_test": None}, "y_train"),
        ({"x_train": X.astype(np.float32), "y_train": Y}, "float32"),
        ({"x_train": X.transpose(0, 3, 1, 2), "y_train": Y}, "x_train"),
        ({"x_train": X[:, :4], "y_train": Y}, "x_train"),
        ({"x_train": X[:5], "y_train": Y}, "5 images"),
        ({"x_train": X[:0], "y_train": Y[:0]}, "no images"),
        ({"x_test": np.zeros((8, 4, 4, 3), np.uint8), "y_test": Y}, "shape"),
        ({"x_train": X, "y_train": Y - 1}, "-1"),
        ({"x_train": X, "y_train": Y / 2}, "float64"),
        ({"x_test": X, "y_test": Y + 1}, "label 4"),
        ({"x_train": X, "y_train": Y, "x_test": X[:0], "y_test": Y[:0]}, "no images"),
        ({"x_train": np.array([None] * 8), "y_train": Y}, "plain arrays"),
    ],
)
def test_wrong_data_is_a_fault_that_says_what(script, capsys, changes, fragment):
    write_npz("wrong.npz", **changes)
    assert script(WHOLE_METHOD, "--save run --data wrong.npz") == 1
    told = one_sentence(capsys.readouterr().err)
    assert fragment in told
    assert "wrong.npz" in told
    assert os.listdir() == ["wrong.npz"]


@pytest.mark.parametrize("content", [b"", b"not a zip", "half"])
def test_unreadable_data_is_a_fault(script, data, capsys, content):
    content = data.read_bytes()[:2000] if content == "half" else content
    Path("wrong.npz").write_bytes(content)
    assert script(WHOLE_METHOD, "--save run --data wrong.npz") == 1
    assert "wrong.npz" in one_sentence(capsys.readouterr().err)
    assert os.listdir() == ["wrong.npz"]


def test_data_that_cannot_be_downloaded_says_how_to_get_it(script, capsys, monkeypatch):
    from torchvision import datasets

    def no_network(*args, **options):
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(datasets, "CIFAR10", no_network)
    assert script(WHOLE_METHOD, "--save run --data cifar10 --data-dir there") == 1
    told = one_sentence(capsys.readouterr().err)
    assert "cifar-10-python.tar.gz" in told
    assert "there" in told
    assert not Path("run").exists()


@pytest.mark.parametrize("call", ["--valid_split 0.001", "--valid_split 0.999", "--sparse-init snip --batch-size 41"])
def test_more_images_asked_for_than_there_are_is_a_wrong_call(script, capsys, call):
    assert script(WHOLE_METHOD, call, "--save run") == 2
    one_sentence(capsys.readouterr().err)
    assert os.listdir() == []


def test_a_last_batch_of_one_image_trains_or_is_refused_in_one_sentence(script, capsys):
    """BatchNorm over one value has no variance: ResNet18 leaves one value per channel of an 8 x 8 image."""
    write_npz("odd.npz", x_train=np.tile(X, (2, 1, 1, 1))[:9], y_train=np.arange(9) % 4)
    code = script("--pre_train --epochs 1 --model ResNet18 --batch-size 4 --data odd.npz --save run")
    if code:
        one_sentence(capsys.readouterr().err)


def test_a_batch_larger_than_the_data_is_the_whole_of_it(script):
    assert script(WHOLE_METHOD, "--batch-size 1000 --test-batch-size 1000 --save run") == 0


# --------------------------------------------------------------------------------------------- disks, divergence


def test_a_folder_under_a_file_is_a_fault(script, capsys):
    Path("file").write_text("mine")
    assert script(WHOLE_METHOD, "--save file/run") == 1
    assert "file/run" in one_sentence(capsys.readouterr().err)
    assert Path("file").read_text() == "mine"


def test_a_file_in_the_place_of_the_folder_is_told(script, capsys):
    Path("file").write_text("mine")
    assert script(WHOLE_METHOD, "--save file") in (1, 2)
    assert "file" in one_sentence(capsys.readouterr().err)
    assert Path("file").read_text() == "mine"


def test_the_present_folder_trains_or_is_refused_in_one_sentence(script, capsys, monkeypatch, tmp_path):
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("mine")
    monkeypatch.chdir("mine")
    code = script(WHOLE_METHOD, "--save .")
    if code:
        one_sentence(capsys.readouterr().err)
    assert [path.read_text() for path in tmp_path.rglob("notes.txt")] == ["mine"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_place_that_cannot_be_written_is_a_fault(script, capsys):
    assert script(WHOLE_METHOD, "--save /proc/nowhere/run") == 1
    assert "/proc/nowhere/run" in one_sentence(capsys.readouterr().err)


@pytest.mark.parametrize("writes", [0, 1, 4, 9])
def test_a_disk_that_fills_up_is_a_fault_and_files_stay_whole(script, monkeypatch, capsys, undisturbed, writes):
    done = []

    def fsync(descriptor):
        done.append(descriptor)
        if len(done) > writes:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(os, "fsync", fsync)
        assert script(WHOLE_METHOD, "--save run") == 1
    assert "No space left on device" in one_sentence(capsys.readouterr().err)
    left = list(Path("run").iterdir()) if Path("run").exists() else []
    for path in left:
        if path.suffix == ".pth":
            load_torch(path)
        else:
            lines(path) if path.suffix == ".jsonl" else json.loads(path.read_text())
    if Path("run/checkpoint.pth").exists():
        assert script(WHOLE_METHOD, "--save run --resume run") == 0
        assert_same_outcome(undisturbed["sgd"], "run")


@pytest.mark.parametrize("sparse", ["", SPARSE])
def test_a_learning_rate_that_blows_up_names_epoch_and_step(script, capsys, sparse):
    assert script("--pre_train --epochs 3 --nolrsche --lr 1e30", sparse, "--save run") == 1
    told = one_sentence(capsys.readouterr().err)
    assert "epoch 0, step 1" in told
    assert set(os.listdir("run")) == {"config.json"}


@pytest.mark.parametrize("sparse", ["", SPARSE + " --re_explore"])
def test_a_cycle_that_blows_up_keeps_the_last_good_checkpoint(script, capsys, sparse):
    """Pre-training is sound; the only step of a cycle's epoch diverges, which its own loss does not show."""
    call = f"{BOTH} {sparse} --update_bn --batch-size 40 --lr 0.01 --cyc_lr --lr_1 1e30 --lr_2 1e30"
    assert script(call, "--save run") == 1
    told = one_sentence(capsys.readouterr().err)
    assert "epoch 2" in told
    saved = load_torch(Path("run/checkpoint.pth"))
    assert saved["epoch"] <= 2
    for name, entry in saved["state_dict"].items():
        assert entry.isfinite().all(), name
    assert len(lines("run/metrics.jsonl")) == 2
    assert not Path("run/tickets.jsonl").exists()
    assert all(math.isfinite(row["eval_loss"]) for row in lines("run/metrics.jsonl"))
