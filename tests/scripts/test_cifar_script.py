"""The CIFAR script from its command line to its files, on a tiny data set and on the digits."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import cifar_data
import main_suptickets
import pytest

from helpers.cifar import (
    MODEL,
    RUN_FILES,
    TOTAL,
    WHOLE_METHOD,
    assert_same_outcome,
    maskable,
    non_zeros,
    outcome,
    previous,
)
from helpers.commands import one_sentence
from helpers.comparing import lines, plain, tree, without_times
from helpers.tensors import active, prune_by_sorting
from sparselearning import report
from sparselearning.process.errors import FaultError
from sparselearning.process.files import load_torch
from sparselearning.training import run_folder
from sparselearning.training.engine import Trainer
from sparselearning.training.run_folder import RunFolder

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
def test_a_folder_that_a_run_is_using_is_refused_and_left_alone(script, undisturbed, capsys, call):
    shutil.copytree(undisturbed["sgd"], "run")
    with RunFolder(Path("run")).in_use():
        before = tree("run")
        assert script(WHOLE_METHOD, "--save run", call) == 1
        assert "run is in use by another run (process " in one_sentence(capsys.readouterr().err)
        assert tree("run") == before
        assert os.listdir() == ["run"]
        report.main(["run", "--no-plots", "--out", "tables"])
    assert ".lock" not in os.listdir("run")


@pytest.mark.parametrize("dry", ["", "--dry-run"])
def test_a_run_that_is_still_going_on_is_not_resumed_elsewhere(script, undisturbed, stopped, capsys, dry):
    """Nor is the earlier run there moved aside for it."""
    shutil.copytree(stopped, "run")
    shutil.copytree(undisturbed["sgd"], "elsewhere")
    with RunFolder(Path("run")).in_use():
        before = tree(".")
        for place in ("elsewhere", "new"):
            assert script(WHOLE_METHOD, "--resume run --save", place, dry) == 1
            assert "run is in use by another run: resume it once that" in one_sentence(capsys.readouterr().err)
            assert tree(".") == before
    assert sorted(os.listdir()) == ["elsewhere", "run"]


def test_a_folder_is_in_use_while_its_run_goes_on(script, undisturbed, monkeypatch):
    """After an earlier run moved aside, too: then nobody else may write there, or move it."""
    shutil.copytree(undisturbed["sgd"], "run")
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
    monkeypatch.setattr(run_folder, "lock_file", lambda file: False)
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


def test_several_seeds_have_curves_of_their_own(script):
    pytest.importorskip("tensorboard")
    assert script(WHOLE_METHOD, "--iters 2 --seed 5 --save runs --tensorboard curves") == 0
    assert sorted(os.listdir("curves")) == ["seed5", "seed6"]


def test_digits_are_learned(script):
    call = "--data digits --model lenet-300-100 --batch-size 64 --final-density 0.1 --update-frequency 10"
    assert script(WHOLE_METHOD, call, "--execution masked --save run") == 0  # no kernels to compile
    summary = json.loads(Path("run/summary.json").read_text())
    total = 3072 * 300 + 300 * 100 + 100 * 10
    assert non_zeros(previous("run")["state_dict"], ["1.weight", "3.weight", "5.weight"]) == round(total * 0.1)
    assert summary["pretrain_acc"] > 0.7
    assert summary["final_acc"] > 0.7
    # 599 test images: every accuracy is a whole number of them
    assert (599 * summary["final_acc"]) == pytest.approx(round(599 * summary["final_acc"]), abs=1e-9)


# -------------------------------------------------------------------------------------------------- superposing


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


def test_tickets_do_not_depend_on_how_they_are_superposed(script, undisturbed):
    assert script(WHOLE_METHOD.replace("--update_bn", ""), "--superposing_method CAA --save b") == 0
    a, b = outcome(undisturbed["sgd"]), outcome("b")
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
