"""The CIFAR script from its command line to its files, on a tiny data set and on the digits."""

import dataclasses
import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import cifar_data
import main_suptickets
import numpy as np
import pytest
import torch
from cifar_models import build_model

from sparselearning import report
from sparselearning.process import files
from sparselearning.process.errors import FaultError
from sparselearning.process.files import load_torch
from sparselearning.process.script import run_script
from sparselearning.training.engine import Trainer
from sparselearning.training.run_folder import RunFolder

SCRIPT = Path(main_suptickets.__file__)
MODEL = "cifar_resnet_8_4"

RUN_FILES = {
    "config.json", "metrics.jsonl", "tickets.jsonl", "summary.json", "checkpoint.pth", "model_current.pth",
    "model_previous.pth",
}  # fmt: skip

# Two epochs of pre-training and two cycles of one epoch, 3 steps each, on 40 images.
BOTH = "--pre_train --cyclic_train --epochs 4 --cycle 1 --cycle_rate 0.5"
SPARSE = (
    "--sparse --init-density 0.6 --final-density 0.3 --update-frequency 2 --final-prune-epoch 2 --prune-rate 0.3 "
    "--large-death-rate 0.4"
)
WHOLE_METHOD = f"{BOTH} {SPARSE} --re_explore --no_maskupdates --cyc_lr --lr_1 0.001 --lr_2 0.01 --update_bn"


def write_npz(path, **changes):
    """40 training and 17 test images of 8 x 8 pixels in four classes that can be told apart, or what is changed."""
    rng = np.random.default_rng(0)
    labels = {"y_train": np.arange(40) % 4, "y_test": np.arange(17) % 4}
    arrays = {}
    for part in ("train", "test"):
        y = arrays[f"y_{part}"] = labels[f"y_{part}"]
        arrays[f"x_{part}"] = rng.integers(0, 120, (len(y), 8, 8, 3), dtype=np.uint8)
        arrays[f"x_{part}"][np.arange(len(y)), :, 2 * y, :] += 120
    arrays |= changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    write_npz(path)
    return path


@pytest.fixture(autouse=True)
def _workplace(tmp_path, monkeypatch):
    """A folder of its own to run in, and a disk that does not keep one waiting."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def script(data):
    """Run the script in this process; returns its exit code."""

    def run(*words):
        argv = " ".join(map(str, words)).split()
        before = ["--data", str(data), "--model", MODEL, "--batch-size", "16", "--lr", "0.05"]
        try:
            run_script(lambda: main_suptickets.main([*before, *argv]))
        except SystemExit as leaving:
            return leaving.code
        return 0

    return run


def one_sentence(err):
    """What went to stderr but for notes: one line, and nothing that looks like a crash."""
    told = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert len(told) == 1, err
    assert "Traceback" not in err
    return told[0]


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def without_times(row):
    return {k: v for k, v in row.items() if k not in ("seconds", "images_per_second", "total_seconds")}


def plain(value):
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.tolist()
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return value


def outcome(folder):
    """All files of a finished run that its seed decides, but for the times in them."""
    folder = Path(folder)
    return {
        "metrics": [without_times(row) for row in lines(folder / "metrics.jsonl")],
        "tickets": [without_times(row) for row in lines(folder / "tickets.jsonl")],
        "summary": without_times(json.loads((folder / "summary.json").read_text())),
        "current": plain(load_torch(folder / "model_current.pth")),
        "previous": plain(load_torch(folder / "model_previous.pth")),
    }


def assert_same_outcome(one, other):
    different = [name for name, content in outcome(one).items() if content != outcome(other)[name]]
    assert not different


def tree(folder):
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def maskable(model=MODEL, **options):
    settings = {"num_classes": 4, "in_channels": 3, "image_size": 8} | options
    return {name: p for name, p in build_model(model, **settings).named_parameters() if p.dim() in (2, 4)}


TOTAL = sum(parameter.numel() for parameter in maskable().values())


def non_zeros(state, names=None):
    return sum(int(torch.count_nonzero(state[name])) for name in names or maskable())


def active(masks):
    return sum(int(mask.sum()) for mask in masks.values())


def previous(folder):
    return load_torch(Path(folder) / "model_previous.pth")


# ------------------------------------------------------------------------------------------------ a run's files


def test_the_whole_method_and_its_files(script, capsys):
    assert script(WHOLE_METHOD, "--save run --keep-tickets") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert os.listdir() == ["run"]
    assert set(os.listdir("run")) == RUN_FILES | {"tickets"}
    assert len(os.listdir("run/tickets")) == 3  # the pre-trained network and both tickets

    config = json.loads(Path("run/config.json").read_text())
    assert config["final_density"] == 0.3
    assert {"torch", "python"} <= config["versions"].keys()
    assert config["device"].startswith("cpu")
    rows, tickets = lines("run/metrics.jsonl"), lines("run/tickets.jsonl")
    assert [(row["phase"], row["epoch"], row["ticket"]) for row in rows] == [
        ("pretrain", 0, None), ("pretrain", 1, None), ("cycle", 2, 1), ("cycle", 3, 2),
    ]  # fmt: skip
    assert all(0 <= row[name] <= 1 for row in rows for name in ("train_acc", "eval_acc", "density"))
    # P = 2: a tenth and a hundredth at once from epoch 1 on; then t = 2/3 of a cycle of one epoch of 3 batches
    assert [row["lr"] for row in rows] == pytest.approx([0.05, 0.0005, 0.007, 0.007])
    assert [row["factor"] for row in tickets] == [0.5, 0.5]

    budget = round(TOTAL * 0.3)
    assert [row["density"] for row in tickets] == [budget / TOTAL] * 2
    saved = previous("run")
    assert non_zeros(saved["state_dict"]) == active(saved["masks"]) == budget
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["density"] == budget / TOTAL
    assert summary["pretrain_acc"] == rows[1]["eval_acc"]
    assert summary["final_acc"] == tickets[1]["superposed_acc"] == summary["superposed_acc"][-1]
    for word in ("pre-trained", "ticket 1", "superposition 2", "final", "density", "gain", "run"):
        assert word in out


def test_default_folder(script):
    assert script(WHOLE_METHOD, "--indicate_method granet --seed 3") == 0
    folder = Path(
        f"saved_models/granet/{MODEL}/tiny/cycle_num_1/pretrain_epoch_2/cyclic_epochs_2/density_0.3/M=2/ex_rate=0.4/seed3"
    )
    assert set(os.listdir(folder)) == RUN_FILES


def test_the_same_command_gives_the_same_bits(script):
    for folder in "ab":
        assert script(WHOLE_METHOD, "--growth random --save", folder) == 0
    assert_same_outcome("a", "b")
    assert script(WHOLE_METHOD, "--growth random --seed 18 --save c") == 0
    assert outcome("a")["previous"] != outcome("c")["previous"]


def test_an_earlier_run_of_the_same_name_is_kept(script, capsys):
    assert script("--pre_train --epochs 1 --save run") == 0
    before = tree("run")
    assert script("--pre_train --epochs 2 --save run") == 0
    assert "moved" in capsys.readouterr().err
    kept = [name for name in os.listdir() if name != "run"]
    assert len(kept) == 1
    assert sorted(tree(kept[0]).values()) == sorted(before.values())
    assert len(lines("run/metrics.jsonl")) == 2


@pytest.mark.parametrize("call", ["", "--resume run", "--lr 0.3"])
def test_a_folder_that_a_run_is_using_is_refused_and_left_alone(script, capsys, call):
    assert script(WHOLE_METHOD, "--save run") == 0
    with RunFolder(Path("run")).in_use():
        before = tree("run")
        assert script(WHOLE_METHOD, "--save run", call) == 1
        assert "run is in use by another run (process " in one_sentence(capsys.readouterr().err)
        assert tree("run") == before
        assert os.listdir() == ["run"]
        report.main(["run", "--no-plots", "--out", "tables"])
    assert ".lock" not in os.listdir("run")


def test_a_folder_is_in_use_while_its_run_goes_on(script, monkeypatch):
    """After an earlier run moved aside, too: then nobody else may write there, or move it."""
    assert script(WHOLE_METHOD, "--save run") == 0
    seen = []

    def look(self):
        with pytest.raises(FaultError, match="in use"), self.folder.in_use():
            pass
        seen.append(self.folder.path.name)
        return train(self)

    train = Trainer.run
    monkeypatch.setattr(Trainer, "run", look)
    for call in ("--save run", "--save run --resume run", "--save other --resume run", "--save more --iters 2"):
        assert script(WHOLE_METHOD, call) == 0
    assert seen == ["run", "run", "other", "seed17", "seed18"]
    assert not list(Path().rglob(".lock"))


def test_without_locks_the_user_is_told(script, capsys, monkeypatch):
    monkeypatch.setattr(files, "lock_file", lambda file: False)
    assert script(WHOLE_METHOD, "--save run") == 0
    assert "run has no locks: no other run may write there meanwhile" in capsys.readouterr().err


def test_several_seeds_one_after_the_other(script):
    assert script(WHOLE_METHOD, "--iters 2 --seed 5 --save runs") == 0
    assert len(os.listdir("runs")) == 2
    for seed in (5, 6):
        assert script(WHOLE_METHOD, "--save alone --seed", seed) == 0
        (folder,) = [name for name in os.listdir("runs") if str(seed) in name]
        assert_same_outcome("alone", Path("runs", folder))  # the first run leaves no trace in the second
        assert json.loads(Path("runs", folder, "config.json").read_text())["seed"] == seed


def test_digits_are_learned(script):
    call = "--data digits --model lenet-300-100 --batch-size 64 --final-density 0.1 --update-frequency 10"
    assert script(WHOLE_METHOD, call, "--save run") == 0
    summary = json.loads(Path("run/summary.json").read_text())
    total = 3072 * 300 + 300 * 100 + 100 * 10
    assert non_zeros(previous("run")["state_dict"], ["1.weight", "3.weight", "5.weight"]) == round(total * 0.1)
    assert summary["pretrain_acc"] > 0.7
    assert summary["final_acc"] > 0.7
    # 599 test images: every accuracy is a whole number of them
    assert (599 * summary["final_acc"]) == pytest.approx(round(599 * summary["final_acc"]), abs=1e-9)


# ------------------------------------------------------------------------------------------- parts of the method


def test_plain_sparse_training_for_all_epochs(script):
    assert script("--pre_train --cycle_rate 0 --epochs 4", SPARSE, "--save run") == 0
    assert set(os.listdir("run")) == RUN_FILES - {"tickets.jsonl"}
    assert [row["phase"] for row in lines("run/metrics.jsonl")] == ["pretrain"] * 4
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["final_acc"] == summary["pretrain_acc"]
    assert active(previous("run")["masks"]) == round(TOTAL * 0.3)


def test_pretraining_alone_does_its_part_only(script):
    assert script("--pre_train --cycle 1 --cycle_rate 0.5 --epochs 4", SPARSE, "--save run") == 0
    assert [row["epoch"] for row in lines("run/metrics.jsonl")] == [0, 1]


@pytest.mark.parametrize("source", ["pretrained", "pretrained/model_current.pth", "pretrained/checkpoint.pth"])
def test_cycles_alone_after_pretraining_alone(script, source):
    pretraining = WHOLE_METHOD.replace("--cyclic_train", "")
    cycles = WHOLE_METHOD.replace("--pre_train", "") + " --keep-tickets"
    assert script(pretraining, "--save pretrained") == 0
    before = tree("pretrained")
    assert script(cycles, "--save cycles --resume", source) == 0
    assert tree("pretrained") == before
    start = load_torch(Path("cycles/tickets/ticket_0.pth"))
    trained = load_torch(Path("pretrained/model_current.pth"))
    assert plain(start["state_dict"]) == plain(trained["state_dict"])
    assert [row["epoch"] for row in lines("cycles/metrics.jsonl")] == [2, 3]
    assert len(lines("cycles/tickets.jsonl")) == 2
    assert non_zeros(previous("cycles")["state_dict"]) == round(TOTAL * 0.3)
    summaries = [json.loads(Path(folder, "summary.json").read_text()) for folder in ("pretrained", "cycles")]
    assert summaries[0]["pretrain_acc"] == summaries[1]["pretrain_acc"]


@pytest.mark.parametrize(("density", "told"), [("0.29", False), ("0.2", True)])
def test_cycles_alone_from_a_ticket_are_told_if_it_is_over_the_budget(script, capsys, density, told):
    """0.29 of the 4,940 weights are 1,433 of them: a little more than that share."""
    flags = f"--cyclic_train --epochs 4 --cycle 1 --cycle_rate 0.25 {SPARSE} --final-prune-epoch 1 --final-density 0.29"
    assert script(flags, "--pre_train --keep-tickets --save a") == 0
    capsys.readouterr()
    assert script(flags, f"--final-density {density} --resume a/tickets/ticket_0.pth --save b") == 0
    assert ("denser than the budget" in capsys.readouterr().err) == told


def test_cycles_alone_do_not_overwrite_the_run_that_they_start_from(script):
    """Without --save both parts have the same folder: what pre-training left must still be somewhere."""
    assert script(WHOLE_METHOD.replace("--cyclic_train", "")) == 0
    (folder,) = [path.parent for path in Path("saved_models").rglob("config.json")]
    pretraining = [without_times(row) for row in lines(folder / "metrics.jsonl")]
    checkpoint = (folder / "checkpoint.pth").read_bytes()
    assert script(WHOLE_METHOD.replace("--pre_train", ""), "--resume", folder) == 0
    rows = [without_times(row) for path in Path("saved_models").rglob("metrics.jsonl") for row in lines(path)]
    assert all(row in rows for row in pretraining)
    assert checkpoint in [path.read_bytes() for path in Path("saved_models").rglob("*.pth")]


def test_cycles_alone_go_on_from_cycles_alone(script):
    """The same flags, from a run that has just these: its weights are the start, not its end the result."""
    cycles = WHOLE_METHOD.replace("--pre_train", "") + " --keep-tickets"
    assert script(WHOLE_METHOD.replace("--cyclic_train", ""), "--save pretrained") == 0
    assert script(cycles, "--save first --resume pretrained") == 0
    assert script(cycles, "--save second --resume first") == 0
    start = load_torch(Path("second/tickets/ticket_0.pth"))["state_dict"]
    assert plain(start) == plain(load_torch(Path("first/model_current.pth"))["state_dict"])
    before = outcome("second")
    assert script(cycles, "--save second --resume second") == 0  # in its own folder it is finished
    assert outcome("second") == before


def test_pruning_goes_on_from_pruning(script):
    call = f"{BOTH} {SPARSE} --cycle_rate 0 --method DST --fix --sparse-init prune_global --pruning-rate 0.2"
    assert script(BOTH, "--cycle_rate 0 --save dense") == 0
    assert script(call, "--save first --resume dense") == 0
    assert script(call, "--save second --resume first") == 0
    densities = [json.loads(Path(folder, "summary.json").read_text())["density"] for folder in ("first", "second")]
    assert densities == pytest.approx([0.8, 0.64], abs=1e-3)


def test_cycles_alone_from_bare_weights_come_after_the_pruning_window(script):
    call = f"{BOTH} {SPARSE} --final-prune-epoch 2"
    assert script(BOTH.replace("--cyclic_train", ""), "--save dense") == 0
    assert script(call.replace("--pre_train", ""), "--save cycles --resume dense/model_previous.pth") == 0
    assert lines("cycles/metrics.jsonl")[0]["density"] == round(TOTAL * 0.3) / TOTAL
    assert load_torch(Path("cycles/checkpoint.pth"))["masking"]["steps"] == 12


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ("--final-prune-epoch 2", False),
        ("--final-prune-epoch 1", False),
        ("--final-prune-epoch 1 --update-frequency 1000", True),
        ("--final-prune-epoch 4 --update-frequency 7", True),
        ("--final-prune-epoch 1 --update-frequency 1000 --method DST", False),
        ("--final-prune-epoch 0 --update-frequency 1000", True),
        ("--final-prune-epoch 9 --init-density 0.3", False),
    ],
)
def test_gradual_pruning_that_does_not_get_to_its_end_is_told(script, capsys, call, told):
    assert script(BOTH, SPARSE, call, "--save run") == 0
    assert ("does not get to density 0.3" in capsys.readouterr().err) == told


def test_a_cycle_rate_of_one(script):
    assert script(BOTH, "--cycle_rate 1 --re_explore", SPARSE, "--save run") == 0
    assert len(lines("run/tickets.jsonl")) == 4


def test_pretraining_alone_with_nothing_to_pretrain_is_a_wrong_call(script, capsys):
    assert script("--pre_train --epochs 2 --cycle 1 --cycle_rate 1", SPARSE, "--save run") == 2
    one_sentence(capsys.readouterr().err)
    assert not Path("run").exists()


def test_cycles_alone_without_room_for_one_is_a_wrong_call(script, capsys):
    """There is nothing to do, and the note that all epochs pre-train would be wrong."""
    assert script("--pre_train --epochs 1 --cycle_rate 0", SPARSE, "--save pretrained") == 0
    capsys.readouterr()
    call = ("--cyclic_train --epochs 4 --cycle 8 --cycle_rate 0.5", SPARSE, "--resume pretrained --save run")
    assert script(*call) == 2
    one_sentence(capsys.readouterr().err)
    assert not Path("run").exists()


def test_too_short_a_cyclic_part_is_told_and_all_epochs_pretrain(script, capsys):
    assert script("--pre_train --cyclic_train --epochs 3 --cycle 2 --cycle_rate 0.5", SPARSE, "--save run") == 0
    assert "no tickets" in capsys.readouterr().err
    assert [row["phase"] for row in lines("run/metrics.jsonl")] == ["pretrain"] * 3
    assert not Path("run/tickets.jsonl").exists()


def test_dense_training_and_dense_tickets(script):
    assert script(BOTH, "--update_bn --superposing_method CAA --save run") == 0
    assert [row["factor"] for row in lines("run/tickets.jsonl")] == pytest.approx([1 / 2, 1 / 3])
    assert previous("run")["masks"] == {}
    assert [row["density"] for row in lines("run/tickets.jsonl")] == [1, 1]


def test_the_multiplier_stretches_epochs_milestones_and_pruning(script):
    call = "--pre_train --cyclic_train --epochs 2 --cycle 2 --cycle_rate 0.5 --multiplier 2 --final-prune-epoch 1"
    assert script(SPARSE, call, "--growth random --update-frequency 1 --save run") == 0
    rows = lines("run/metrics.jsonl")
    assert [row["phase"] for row in rows] == ["pretrain"] * 2 + ["cycle"] * 2
    assert [row["lr"] for row in rows] == pytest.approx([0.05] + [0.0005] * 3)
    assert len(lines("run/tickets.jsonl")) == 1
    assert active(load_torch(Path("run/checkpoint.pth"))["masks"]) == round(TOTAL * 0.3)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_static_sparse_training_keeps_its_first_masks(script, optimizer):
    call = f"--sparse --fix --method DST --init-density 0.3 --final-density 0.3 --lr 0.01 --optimizer {optimizer}"
    assert script("--pre_train --epochs 1", call, "--save short") == 0
    assert script(BOTH, call, "--update-frequency 1 --keep-tickets --save long") == 0
    first = plain(load_torch(Path("short/model_current.pth"))["masks"])
    for number in range(3):
        assert plain(load_torch(Path(f"long/tickets/ticket_{number}.pth"))["masks"]) == first
    assert plain(previous("long")["masks"]) == first


def test_the_first_layer_can_stay_dense(script):
    assert script(WHOLE_METHOD, "--rm-first --save run") == 0
    saved = previous("run")
    names = list(maskable())
    assert set(saved["masks"]) == set(names[1:])
    rest = sum(parameter.numel() for name, parameter in maskable().items() if name != names[0])
    assert non_zeros(saved["state_dict"], names[1:]) == round(rest * 0.3)
    assert saved["state_dict"][names[0]].all()
    assert lines("run/tickets.jsonl")[1]["density"] == round(rest * 0.3) / rest


def test_single_layers_stay_dense_or_start_at_their_own_density(script):
    layers = "--dense-layers fc --layer-density stages.2.*=0.1 conv1=0.5"
    assert script("--pre_train --epochs 1 --method DST", SPARSE, "--init-density 0.2", layers, "--save run") == 0
    saved = load_torch(Path("run/model_current.pth"))
    sizes = {name: weight.numel() for name, weight in maskable().items() if name != "fc.weight"}
    assert saved["masks"].keys() == sizes.keys()
    active = {name: int(mask.sum()) for name, mask in saved["masks"].items()}
    assert sum(active.values()) == round(sum(sizes.values()) * 0.2)
    for name, size in sizes.items():
        given = 0.1 if name.startswith("stages.2") else 0.5 if name == "conv1.weight" else None
        assert given is None or active[name] == round(size * given)
    assert saved["state_dict"]["fc.weight"].all()


def test_the_table_of_layers_is_all_that_show_layers_makes(script, capsys):
    layers = "--sparse --init-density 0.5 --dense-layers fc --layer-density conv1=0.25 --iters 3"
    assert script(BOTH, "--show-layers", layers) == 0
    assert os.listdir() == []
    printed = capsys.readouterr().out
    *table, last = printed[printed.index("layer ") :].splitlines()
    assert last == "superpositions are pruned to density 0.05 over all masked layers, by magnitude"
    rows = {cells[0]: [cell.strip() for cell in cells[1:] if cell.strip()] for cells in (r.split("  ") for r in table)}
    assert list(rows) == ["layer", *maskable(), "all"]
    # conv1: 8x8 pixels, 3·9·4 = 108 multiply-adds each.
    assert rows["conv1.weight"] == ["4x3x3x3", "108", "0.2500", "by magnitude", "0.014", "0.003"]
    assert rows["fc.weight"][2:4] == ["dense", "dense"]
    assert rows["all"][:3] == [f"{TOTAL:,}", "0.5000", "0.0500"]


@pytest.mark.parametrize(
    ("flags", "now", "at_end"),
    [
        ("", "dense", "dense"),
        ("--sparse --method DST --sparse-init uniform", "0.5000", "0.5000"),
        ("--sparse --method DST --sparse-init uniform --redistribution nonzeros", "0.5000", "by magnitude"),
        ("--sparse --method GMP_uniform --sparse-init uniform --final-density 0.25", "0.5000", "0.2500"),
        ("--sparse --method GraNet --sparse-init uniform --final-density 0.5", "0.5000", "0.5000"),
        ("--sparse --method GraNet --sparse-init uniform --fix", "0.5000", "0.5000"),
    ],
)
def test_densities_at_the_end_are_shown_where_they_are_known(script, capsys, flags, now, at_end):
    assert script("--show-layers", flags) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("stages.0.0.conv1.weight"))
    assert line.split("  ", 1)[1].replace("by magnitude", "by_magnitude").split()[2:4] == [
        now,
        at_end.replace(" ", "_"),
    ]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--dense-layers fcc", "nearest names are fc"),
        ("--layer-density nothing=0.1", "no layer matches 'nothing'"),
        ("--layer-density fc=0.1 fc*=0.2", "fc.weight gets density 0.1 from 'fc'"),
        ("--layer-density fc=0.1 fc=0.2", "'fc' two densities"),
        ("--layer-density fc=0.1 --dense-layers fc", "keeps it dense"),
        ("--layer-density *=0.1", "cannot make up for it"),
        ("--layer-density fc", "GLOB=D"),
        ("--layer-density =0.1", "GLOB=D"),
        ("--layer-density fc=2", r"(0, 1]"),
        ("--layer-density fc=0.1 --sparse-init GMP", "--sparse-init ERK, uniform"),
        ("--final-density 0.00001", "leaves none of"),
        ("--final-density 0.00001 --method DST", "leaves none of"),
    ],
)
def test_layers_that_cannot_be_are_refused_before_anything_is_written(script, capsys, flags, told):
    assert script(WHOLE_METHOD, "--save run", flags) == 2
    assert told in one_sentence(capsys.readouterr().err)
    assert os.listdir() == []


# -------------------------------------------------------------------------------------------------- superposing


def prune_by_sorting(state, names, budget):
    flat = torch.cat([state[name].flatten() for name in names])
    best = flat.abs().argsort(descending=True)[:budget]
    kept = torch.zeros_like(flat)
    kept[best] = flat[best]
    parts = kept.split([state[name].numel() for name in names])
    return state | {name: part.view_as(state[name]) for name, part in zip(names, parts, strict=True)}


def test_a_run_from_the_config_of_another_is_the_same_bit_for_bit(script):
    assert script(WHOLE_METHOD, "--seed 7 --save first") == 0
    main_suptickets.main(["--config", "first/config.json", "--save", "second"])
    for name in ("metrics.jsonl", "tickets.jsonl"):
        assert [*map(without_times, lines(f"first/{name}"))] == [*map(without_times, lines(f"second/{name}"))]
    first, second = (plain(load_torch(Path(folder, "model_previous.pth"))) for folder in ("first", "second"))
    assert first == second


@pytest.mark.parametrize("averaging", ["CIMA", "CAA"])
def test_superpositions_can_be_recomputed_from_the_kept_tickets(script, averaging):
    call = WHOLE_METHOD.replace("--update_bn", "")
    assert script(call, "--keep-tickets --save run --CIMA_factor 0.3 --superposing_method", averaging) == 0
    state, *tickets = [load_torch(Path(f"run/tickets/ticket_{number}.pth"))["state_dict"] for number in range(3)]
    factors = [0.3, 0.3] if averaging == "CIMA" else [1 / 2, 1 / 3]
    assert [row["factor"] for row in lines("run/tickets.jsonl")] == pytest.approx(factors)
    for number, (ticket, factor) in enumerate(zip(tickets, factors, strict=True)):
        union = {
            name: (1 - factor) * state[name] + factor * entry if entry.is_floating_point() else entry
            for name, entry in ticket.items()
        }
        assert lines("run/tickets.jsonl")[number]["union_density"] == non_zeros(union) / TOTAL
        state = prune_by_sorting(union, list(maskable()), round(TOTAL * 0.3))
    assert plain(previous("run")["state_dict"]) == plain(state)
    assert plain(load_torch(Path("run/model_current.pth"))["state_dict"]) == plain(tickets[-1])


def test_tickets_do_not_depend_on_how_they_are_superposed(script):
    assert script(WHOLE_METHOD, "--save a") == 0
    assert script(WHOLE_METHOD.replace("--update_bn", ""), "--superposing_method CAA --save b") == 0
    a, b = outcome("a"), outcome("b")
    assert a["current"] == b["current"]
    assert a["summary"]["ticket_acc"] == b["summary"]["ticket_acc"]
    assert a["previous"] != b["previous"]


# ---------------------------------------------------------------------------------------------------- held out


def test_the_test_set_is_touched_once_at_the_end(script, monkeypatch):
    log = []

    class Counted:
        def __init__(self, name, source):
            self.name, self.source, self.num_samples = name, source, source.num_samples

        def __len__(self):
            return len(self.source)

        def epoch(self, *args):
            log.append(self.name)
            return self.source.epoch(*args)

        def use_memory_format(self, memory_format):
            self.source.use_memory_format(memory_format)

    def load_counted(*args, **options):
        loaded = cifar_data.load_data(*args, **options)
        assert loaded.train.num_samples == 30
        assert loaded.evaluation.num_samples == 10
        return dataclasses.replace(
            loaded, evaluation=Counted("held out", loaded.evaluation), test=Counted("test", loaded.test)
        )

    monkeypatch.setattr(main_suptickets, "load_data", load_counted)
    assert script(WHOLE_METHOD, "--valid_split 0.25 --save run") == 0
    assert log == ["held out"] * 6 + ["test"]  # 4 epochs and 2 superpositions, then the result
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["test_acc"] * 17 == pytest.approx(round(summary["test_acc"] * 17))
    assert summary["final_acc"] * 10 == pytest.approx(round(summary["final_acc"] * 10))


def test_without_held_out_images_there_is_no_second_accuracy(script):
    assert script("--pre_train --epochs 1 --save run") == 0
    assert "test_acc" not in json.loads(Path("run/summary.json").read_text())


# -------------------------------------------------------------------------------------------------- first masks


@pytest.fixture(scope="module")
def base(data, tmp_path_factory):
    """A trained sparse network to start from."""
    folder = tmp_path_factory.mktemp("base") / "run"
    call = f"--data {data} --model {MODEL} --batch-size 16 --lr 0.05 --pre_train --epochs 2 {SPARSE} --growth random"
    main_suptickets.main([*call.split(), "--update-frequency", "4", "--save", str(folder)])
    return folder


def first_masks(script, monkeypatch, call):
    """The masks and weights that training starts with."""
    seen = {}
    run = Trainer.run

    def noting_run(self):
        seen["masks"] = {name: mask.clone() for name, mask in self.masking.masks.items()}
        seen["weights"] = {name: entry.clone() for name, entry in self.model.state_dict().items()}
        return run(self)

    monkeypatch.setattr(Trainer, "run", noting_run)
    assert script("--sparse --fix --method DST --pre_train --epochs 1 --save started", call) == 0
    for name, mask in seen["masks"].items():
        assert not seen["weights"][name][~mask].any()
    return seen["masks"], seen["weights"]


@pytest.mark.parametrize("init", ["ERK", "uniform", "snip", "GMP"])
def test_first_masks_of_a_fresh_network(script, monkeypatch, init):
    masks, _ = first_masks(script, monkeypatch, f"--sparse-init {init} --init-density 0.37")
    assert active(masks) == (TOTAL if init == "GMP" else round(TOTAL * 0.37))
    if init == "uniform":
        assert all(abs(int(mask.sum()) - 0.37 * mask.numel()) <= 1 for mask in masks.values())


@pytest.mark.parametrize("source", ["model_current.pth", "model_previous.pth", "checkpoint.pth", ""])
def test_first_masks_are_the_pattern_of_loaded_weights(script, monkeypatch, base, source):
    masks, weights = first_masks(script, monkeypatch, f"--sparse-init resume --resume {base / source}")
    loaded = load_torch(base / (source or "checkpoint.pth"))["state_dict"]
    assert all(torch.equal(weights[name], loaded[name]) for name in loaded)
    assert all(torch.equal(mask, loaded[name] != 0) for name, mask in masks.items())


@pytest.mark.parametrize("init", ["prune_uniform", "prune_global", "prune_and_grow_uniform", "prune_and_grow_global"])
def test_first_masks_by_pruning_a_trained_network(script, monkeypatch, base, init):
    before = tree(base)
    path = base / "model_current.pth"
    masks, weights = first_masks(script, monkeypatch, f"--sparse-init {init} --pruning-rate 0.4 --resume {path}")
    loaded = load_torch(path)["state_dict"]
    counts = {name: int(torch.count_nonzero(loaded[name])) for name in masks}
    if "grow" in init:
        assert {name: int(mask.sum()) for name, mask in masks.items()} == counts
    elif init == "prune_uniform":
        assert {name: int(mask.sum()) for name, mask in masks.items()} == {k: round(n * 0.6) for k, n in counts.items()}
    else:
        assert active(masks) == round(sum(counts.values()) * 0.6)
    for name, mask in masks.items():
        assert torch.equal(weights[name], loaded[name] * mask)
    if init == "prune_global":
        kept = torch.cat([loaded[name][mask].abs() for name, mask in masks.items()])
        dropped = torch.cat([loaded[name][~mask].abs() for name, mask in masks.items()])
        assert kept.min() >= dropped.max()
    assert tree(base) == before


@pytest.mark.parametrize("init", ["prune_structured", "prune_and_grow_structured"])
def test_first_masks_by_pruning_filters(script, monkeypatch, base, init):
    path = base / "model_current.pth"
    masks, _ = first_masks(script, monkeypatch, f"--sparse-init {init} --pruning-rate 0.5 --resume {path}")
    loaded = load_torch(path)["state_dict"]
    classifier = list(masks)[-1]
    assert torch.equal(masks[classifier], loaded[classifier] != 0)
    for name in list(masks)[:-1]:
        alive = loaded[name].flatten(1).any(dim=1)
        kept = masks[name].flatten(1).any(dim=1)
        count = int(alive.sum())
        assert int(kept.sum()) == (count if "grow" in init else max(1, round(count * 0.5)))


def test_pruning_a_network_in_its_own_folder_does_not_overwrite_it(script):
    assert script("--pre_train --epochs 1", SPARSE, "--save run") == 0
    before = tree("run")
    assert script("--pre_train --epochs 1", SPARSE, "--sparse-init prune_global --resume run --save run") == 0
    after = tree(".").values()
    assert all(content in after for content in before.values())


# ------------------------------------------------------------------------------------------ stopping and resuming


def stop_in(monkeypatch, step, number):
    """Let the signal arrive in the middle of one training step, as from outside."""
    steps = []
    train_batch = Trainer.train_batch

    def shot_at(self, batch):
        train_batch(self, batch)
        steps.append(None)
        if len(steps) == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Trainer, "train_batch", shot_at)


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """Optimizer to the folder of a run that nothing stopped."""
    folders = {}
    for optimizer in ("sgd", "adam"):
        folders[optimizer] = tmp_path_factory.mktemp("undisturbed") / optimizer
        call = f"--data {data} --model {MODEL} --batch-size 16 --lr 0.05 {WHOLE_METHOD} --optimizer {optimizer}"
        main_suptickets.main([*call.split(), "--save", str(folders[optimizer])])
    return folders


@pytest.mark.parametrize(
    ("step", "number", "code", "optimizer"),
    [
        (1, signal.SIGTERM, 143, "sgd"),
        (5, signal.SIGINT, 130, "sgd"),
        (5, signal.SIGINT, 130, "adam"),
        (6, signal.SIGTERM, 143, "sgd"),  # the last step of pre-training
        (9, signal.SIGINT, 130, "adam"),  # the last step of the first cycle
        (11, signal.SIGTERM, 143, "sgd"),
        (11, signal.SIGHUP, 129, "sgd"),
        (11, signal.SIGTERM, 143, "adam"),
    ],
)
def test_a_stopped_run_resumes_to_the_same_bits(
    script, monkeypatch, capsys, undisturbed, step, number, code, optimizer
):
    call = f"{WHOLE_METHOD} --optimizer {optimizer} --save run"
    with monkeypatch.context() as context:
        stop_in(context, step, number)
        assert script(call) == code
    told = one_sentence(capsys.readouterr().err)
    assert signal.Signals(number).name in told
    assert "--resume run" in told
    assert Path("run/checkpoint.pth").exists()
    assert not Path("run/summary.json").exists()
    assert len(lines("run/metrics.jsonl") if step > 3 else []) == (step - 1) // 3
    assert script(call, "--resume run") == 0
    assert_same_outcome(undisturbed[optimizer], "run")
    assert os.listdir() == ["run"]


@pytest.mark.parametrize("flags", ["--amp off", "--fp16 --growth momentum", "--amp bf16 --growth random"])
def test_on_a_gpu_too(gpu, script, monkeypatch, flags):
    call = f"{WHOLE_METHOD} --deterministic {flags}"
    assert script(call, "--save whole") == 0
    with monkeypatch.context() as context:
        stop_in(context, 5, signal.SIGINT)
        assert script(call, "--save run") == 130
    assert script(call, "--save run --resume run") == 0
    assert_same_outcome("whole", "run")
    assert "GPU" in json.loads(Path("run/config.json").read_text())["device"]


def test_a_finished_run_resumes_to_itself(script):
    assert script(WHOLE_METHOD, "--save run") == 0
    before, files = outcome("run"), set(os.listdir("run"))
    assert script(WHOLE_METHOD, "--save run --resume run") == 0
    assert outcome("run") == before
    assert set(os.listdir("run")) == files
    assert os.listdir() == ["run"]


def test_a_run_can_go_on_in_another_folder(script, monkeypatch, undisturbed):
    with monkeypatch.context() as context:
        stop_in(context, 7, signal.SIGTERM)
        assert script(WHOLE_METHOD, "--save run") == 143
    before = tree("run")
    assert script(WHOLE_METHOD, "--save elsewhere --resume run/checkpoint.pth") == 0
    assert tree("run") == before
    assert_same_outcome(undisturbed["sgd"], "elsewhere")


def test_a_finished_run_can_be_resumed_into_another_folder(script, undisturbed):
    assert script(WHOLE_METHOD, "--save elsewhere --resume", undisturbed["sgd"]) == 0
    assert_same_outcome(undisturbed["sgd"], "elsewhere")


def test_the_second_of_several_seeds_goes_on_where_it_stopped(script, monkeypatch):
    assert script(WHOLE_METHOD, "--seed 18 --save whole") == 0
    with monkeypatch.context() as context:
        stop_in(context, 12 + 7, signal.SIGTERM)
        assert script(WHOLE_METHOD, "--iters 2 --save runs") == 143
    second = next(path for path in Path("runs").iterdir() if not (path / "summary.json").exists())
    assert json.loads((second / "config.json").read_text())["seed"] == 18
    assert script(WHOLE_METHOD, f"--seed 18 --save {second} --resume {second}") == 0
    assert_same_outcome("whole", second)


def test_a_stop_at_the_end_of_one_seed_does_not_start_the_next(script, monkeypatch):
    summary_of = Trainer._summary

    def summary_under_fire(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return summary_of(self)

    monkeypatch.setattr(Trainer, "_summary", summary_under_fire)
    assert script(WHOLE_METHOD, "--iters 2 --save runs") == 143
    assert len(os.listdir("runs")) == 1


def test_interrupted_before_training(script, monkeypatch, capsys):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(main_suptickets, "load_data", interrupt)
    assert script(WHOLE_METHOD, "--save run") == 130
    one_sentence(capsys.readouterr().err)
    assert os.listdir() == []


def spawn(data, *words):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    argv = [sys.executable, str(SCRIPT), "--data", str(data), "--model", MODEL, "--batch-size", "16", "--lr", "0.05"]
    return subprocess.Popen(
        [*argv, *" ".join(map(str, words)).split()],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def test_a_process_that_is_told_to_stop(script, data):
    call = WHOLE_METHOD.replace("--epochs 4", "--epochs 400").replace("--cycle_rate 0.5", "--cycle_rate 0.25")
    process = spawn(data, call, "--save run")
    try:
        deadline = time.monotonic() + 60
        while not Path("run/metrics.jsonl").exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 143, err
    assert "go on with --resume run" in one_sentence(err)
    done = load_torch(Path("run/checkpoint.pth"))
    assert done["epoch"] < 400
    assert done["epoch"] == len(lines("run/metrics.jsonl"))
    assert not list(Path("run").glob("*.partial"))


def test_a_wrong_call_of_a_process(data):
    process = spawn(data, "--sparse --pre_train --cyclic_train --growth momentum --momentum 0 --save run")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert out == ""
    assert one_sentence(err).startswith("main_suptickets.py: error: ")
    assert os.listdir() == []


# --------------------------------------------------------------------------------------------- wrong checkpoints


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    """The checkpoint of a run with all of the method, after its third epoch."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    call = f"--data {data} --model {MODEL} --batch-size 16 --lr 0.05 {WHOLE_METHOD} --save {folder}"
    with pytest.MonkeyPatch.context() as context:
        stop_in(context, 8, signal.SIGTERM)
        with pytest.raises(Exception, match="SIGTERM"):
            main_suptickets.main(call.split())
    return folder


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
    for name, content in others.items():
        torch.save(content, f"{name}.pth")
        assert script(WHOLE_METHOD.replace("--pre_train", ""), f"--save {name} --resume {name}.pth") == 0, name


@pytest.mark.parametrize(
    "content", [{0: torch.ones(2)}, {"state_dict": torch.ones(2)}, {"state_dict": {}}, {"config": {"a": 1}}]
)
@pytest.mark.parametrize("call", [WHOLE_METHOD, WHOLE_METHOD.replace("--pre_train", "")])
def test_files_that_are_no_weights_are_refused(script, capsys, content, call):
    torch.save(content, "odd.pth")
    assert script(call, "--save run --resume odd.pth") == 2
    assert "odd.pth" in one_sentence(capsys.readouterr().err)
    assert os.listdir() == ["odd.pth"]


def test_a_network_that_does_not_compile(script, monkeypatch, capsys):
    def without_compiler(graph, inputs):
        raise RuntimeError("no working C++ compiler\nfound anywhere")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=without_compiler))
    assert script(WHOLE_METHOD, "--save run --compile") == 1
    told = one_sentence(capsys.readouterr().err)
    assert "no working C++ compiler" in told
    assert "--compile" in told


def test_output_that_nobody_reads_any_more(data):
    process = spawn(data, WHOLE_METHOD, "--save run")
    for _ in range(2):  # where and how it computes
        process.stdout.readline()
    process.stdout.close()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "nobody reads" in one_sentence(err)
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


# ---------------------------------------------------------------------------------------------------- wrong data

X, Y = np.zeros((8, 8, 8, 3), np.uint8), np.arange(8) % 4


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
