"""Parts of the method by the CIFAR script's flags: one phase alone, pruning, layers, budgets."""

import json
import os
from pathlib import Path

import pytest

from helpers.cifar import (
    BOTH,
    RUN_FILES,
    SPARSE,
    TOTAL,
    WHOLE_METHOD,
    maskable,
    non_zeros,
    outcome,
    previous,
    run_cifar,
    small_call,
)
from helpers.commands import one_sentence
from helpers.comparing import lines, plain, tree, without_times
from helpers.tensors import active
from sparselearning.process.files import load_torch


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


@pytest.fixture(scope="module")
def pretrained(data, tmp_path_factory):
    """The folder of the first part of a run alone."""
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    pretraining = WHOLE_METHOD.replace("--cyclic_train", "")
    assert run_cifar(small_call(data, pretraining, "--save", folder)) == 0
    return folder


@pytest.mark.parametrize("source", ["", "model_current.pth", "checkpoint.pth"])
def test_cycles_alone_after_pretraining_alone(script, pretrained, source):
    cycles = WHOLE_METHOD.replace("--pre_train", "") + " --keep-tickets"
    before = tree(pretrained)
    assert script(cycles, "--save cycles --resume", pretrained / source) == 0
    assert tree(pretrained) == before
    start = load_torch(Path("cycles/tickets/ticket_0.pth"))
    trained = load_torch(pretrained / "model_current.pth")
    assert plain(start["state_dict"]) == plain(trained["state_dict"])
    assert [row["epoch"] for row in lines("cycles/metrics.jsonl")] == [2, 3]
    assert len(lines("cycles/tickets.jsonl")) == 2
    assert non_zeros(previous("cycles")["state_dict"]) == round(TOTAL * 0.3)
    summaries = [json.loads(Path(folder, "summary.json").read_text()) for folder in (pretrained, "cycles")]
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


def test_cycles_alone_go_on_from_cycles_alone(script, pretrained):
    """The same flags, from a run that has just these: its weights are the start, not its end the result."""
    cycles = WHOLE_METHOD.replace("--pre_train", "") + " --keep-tickets"
    assert script(cycles, "--save first --resume", pretrained) == 0
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
    assert script(BOTH, SPARSE, call, "--show-layers") == 0
    assert capsys.readouterr().err.count("does not get to density 0.3") == told


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
    layers = "--sparse --init-density 0.5 --dense-layers fc --layer-density conv1=0.25 --iters 3 --update-frequency 1"
    assert script(BOTH, "--final-prune-epoch 2 --show-layers", layers) == 0
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
        ("--sparse --method GraNet --sparse-init uniform --update-frequency 9999", "0.5000", "0.5000"),
        # The cubic schedule at step 250 of 330: 0.05 + 0.45 (80/330)^3 = 0.0564, which is 8 of 144 weights.
        ("--sparse --method GMP_uniform --sparse-init uniform --update-frequency 250", "0.5000", "0.0556"),
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
