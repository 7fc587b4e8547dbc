"""Checkpoints that the CIFAR script is given: other flags, damage, other programs' weights."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from helpers.cifar import BOTH, WHOLE_METHOD, assert_same_outcome, stop_in
from helpers.commands import one_sentence
from helpers.comparing import tree
from sparselearning.process.files import load_torch
from sparselearning.training.engine import Trainer


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ("--lr 0.1", "lr (0.05 there, 0.1 here)"),
        ("--model lenet-300-100", "model"),
        ("--seed 18", "seed (17 there, 18 here)"),
        ("--epochs 5", "epochs"),
        ("--batch-size 8", "batch_size"),
        ("--final-density 0.2", "final_density"),
        ("--superposing_method CAA", "superposing_method"),
    ],
)
def test_other_flags_are_refused_and_named(script, stopped, capsys, change, names):
    before = tree(stopped)
    assert script(WHOLE_METHOD, change, "--resume", stopped, "--save", stopped) == 2
    assert names in one_sentence(capsys.readouterr().err)
    assert tree(stopped) == before
    assert os.listdir() == []


def test_a_flag_that_is_no_more_does_not_matter(script, stopped, undisturbed):
    content = load_torch(stopped / "checkpoint.pth")
    content["config"]["gone"] = 1
    Path("run").mkdir()
    torch.save(content, "run/checkpoint.pth")
    assert script(WHOLE_METHOD, "--save run --resume run") == 0
    assert_same_outcome(undisturbed["sgd"], "run")


def test_a_file_of_another_path_may_be_other_data(script, data, stopped, capsys):
    Path("moved").mkdir()
    shutil.copy(data, "moved")
    assert script(WHOLE_METHOD, "--data", Path("moved", data.name), "--save run --resume", stopped) == 2
    assert "other flags: data (" in one_sentence(capsys.readouterr().err)


def test_cycles_that_go_on_are_not_told_about_densities(script, monkeypatch, capsys):
    cycles = WHOLE_METHOD.replace("--pre_train", "")
    assert script(WHOLE_METHOD.replace("--cyclic_train", ""), "--save pretrained") == 0
    with monkeypatch.context() as context:
        stop_in(context, 2, signal.SIGTERM)
        assert script(cycles, "--save run --resume pretrained") == 143
    capsys.readouterr()
    assert script(cycles, "--save run --resume run") == 0
    assert not capsys.readouterr().err


def test_a_checkpoint_without_sparse_flags_is_refused(script, stopped, capsys):
    assert script(BOTH, "--resume", stopped, "--save run") == 2
    one_sentence(capsys.readouterr().err)
    assert os.listdir() == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: b"",
        lambda content: b"not a checkpoint at all\n",
        lambda content: json.dumps({"state_dict": {}}).encode(),
    ],
    ids=["half", "one byte short", "empty", "text", "json"],
)
@pytest.mark.parametrize(
    "call", [WHOLE_METHOD, WHOLE_METHOD.replace("--pre_train", ""), WHOLE_METHOD + " --sparse-init prune_uniform"]
)
def test_a_damaged_checkpoint_is_a_fault(script, stopped, capsys, spoil, call):
    Path("run").mkdir()
    Path("run/checkpoint.pth").write_bytes(spoil((stopped / "checkpoint.pth").read_bytes()))
    before = tree("run")
    assert script(call, "--save run --resume run") == 1
    assert "run/checkpoint.pth" in one_sentence(capsys.readouterr().err)
    assert tree("run") == before


@pytest.mark.parametrize("call", [WHOLE_METHOD.replace("--pre_train", ""), WHOLE_METHOD + " --sparse-init resume"])
@pytest.mark.parametrize("model", ["lenet-300-100", "cifar_resnet_8_5", "cifar_resnet_14_4"])
def test_weights_of_another_model_are_refused(script, stopped, capsys, call, model):
    assert script(call, "--model", model, "--save run --resume", stopped / "model_current.pth") == 2
    assert "another model" in one_sentence(capsys.readouterr().err)
    assert os.listdir() == []


def test_cycles_alone_start_from_checkpoints_of_other_programs(script, stopped):
    weights = load_torch(stopped / "model_current.pth")["state_dict"]
    others = {
        "example": {"epoch": 3, "arch": "resnet", "state_dict": weights, "best_acc1": 0.1, "optimizer": {"state": {}}},
        "parallel": {"state_dict": {f"module.{name}": entry for name, entry in weights.items()}, "optimizer": {}},
        "compiled": {f"_orig_mod.{name}": entry for name, entry in weights.items()},
        "configured": {"config": "resnet", "state_dict": weights},
    }
    cycles = WHOLE_METHOD.replace("--pre_train", "--execution masked")  # no kernels to compile
    for name, content in others.items():
        torch.save(content, f"{name}.pth")
        assert script(cycles, f"--save {name} --resume {name}.pth") == 0, name


@pytest.mark.parametrize(
    "content", [{0: torch.ones(2)}, {"state_dict": torch.ones(2)}, {"state_dict": {}}, {"config": {"a": 1}}]
)
@pytest.mark.parametrize("call", [WHOLE_METHOD, WHOLE_METHOD.replace("--pre_train", "")])
def test_files_that_are_no_weights_are_refused(script, capsys, content, call):
    torch.save(content, "odd.pth")
    assert script(call, "--save run --resume odd.pth") == 2
    assert "odd.pth" in one_sentence(capsys.readouterr().err)
    assert os.listdir() == ["odd.pth"]


@pytest.mark.parametrize(
    "change", ["--optimizer adam", "--rm-first", "--growth momentum", "--growth momentum --optimizer adam"]
)
def test_cycles_alone_with_other_flags_run_or_say_why_not(script, stopped, capsys, change):
    cycles = WHOLE_METHOD.replace("--pre_train", "")
    code = script(cycles, change, "--save run --resume", stopped)
    assert code in (0, 2)
    if code:
        one_sentence(capsys.readouterr().err)
        assert os.listdir() == []


def test_exploring_by_momentum_from_bare_weights_is_refused_before_anything_is_written(script, base, capsys):
    cycles = WHOLE_METHOD.replace("--pre_train", "")
    start = base / "model_current.pth"
    assert script(cycles, "--growth momentum --save run --resume", start) == 2
    assert "explores by momentum" in one_sentence(capsys.readouterr().err)
    assert os.listdir() == []


def test_cycles_alone_obey_their_own_optimizer_flags(script, base, monkeypatch):
    groups = []
    run = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self: groups.extend(self.optimizer.param_groups) or run(self))
    cycles = WHOLE_METHOD.replace("--pre_train", "")
    assert script(cycles, "--momentum 0.5 --l2 0.01 --save run --resume", base) == 0
    assert [(group["momentum"], group["weight_decay"]) for group in groups] == [(0.5, 0.01)]
