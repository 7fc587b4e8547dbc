"""``--dry-run``: everything is checked, the plan is printed, and nothing is trained or written."""

import itertools
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.cifar import BOTH, SPARSE, TOTAL, WHOLE_METHOD
from helpers.commands import one_sentence
from helpers.comparing import tree
from sparselearning.training.preview import duration
from sparselearning.training.profiling import endless
from sparselearning.training.run_folder import RunFolder


def plan_of(capsys):
    """Name to text of the lines of a plan."""
    printed = capsys.readouterr().out
    return dict(re.split(r"\s+", line, maxsplit=1) for line in printed[printed.index("epochs ") :].splitlines())


def test_a_plan_worked_out_by_hand(script, capsys):
    assert script(WHOLE_METHOD, "--save run --iters 3 --dry-run") == 0
    assert os.listdir() == []
    plan = plan_of(capsys)
    # 40 images in batches of 16 are 3 steps an epoch; updates every 2 steps end with the 6 steps of pre-training.
    assert plan["epochs"] == "2 epochs of pre-training, then 2 cycles of 1 epoch: 2 tickets; 12 steps, 3 an epoch"
    assert plan["updates"] == "3 topology updates, one in 2 steps; 2 explorations"
    assert plan["density"] == f"0.6000 of {TOTAL:,} weights now, 0.3000 after the last update"
    assert re.fullmatch(
        r"[\d.]+ million an image in the dense network; 0\.\d+ of that now; .* decide .*", plan["FLOPs"]
    )
    assert re.fullmatch(r"about \d+ s, at [\d.e-]+ s a step \(mean of 3\)", plan["time"])
    assert plan["files"] == "run/seed17"


@pytest.mark.parametrize(
    ("flags", "updates", "flops"),
    [
        ("", "none: training is dense", "in the dense network"),
        ("--sparse --fix", "0 topology updates", "0.500 of that now, 0.500 after the last update"),
        (
            "--sparse --method GMP_uniform --update-frequency 1 --init-prune-epoch 1 --final-prune-epoch 2",
            "4 topology updates, one in 1 step",  # steps 3 to 6
            "after the last update",
        ),
        (
            "--sparse --method DST --update-frequency 2 --final-update-epoch 1",
            "1 topology update, one in 2 steps",
            "0.500 of that now, 0.500 after",
        ),
    ],
)
def test_what_updates_come(script, capsys, flags, updates, flops):
    assert script("--pre_train --epochs 2 --cycle_rate 0 --sparse-init uniform", flags, "--dry-run") == 0
    plan = plan_of(capsys)
    assert plan["epochs"] == "2 epochs of pre-training; 6 steps, 3 an epoch"
    assert plan["updates"] == updates
    assert flops in plan["FLOPs"]


def test_a_run_that_goes_on(script, stopped, capsys):
    before = tree(stopped)
    assert script(WHOLE_METHOD, "--save", stopped, "--resume", stopped, "--dry-run") == 0
    assert tree(stopped) == before
    plan = plan_of(capsys)
    assert plan["epochs"].endswith("resumes at epoch 2, step 2")
    assert plan["updates"] == "0 topology updates; 1 exploration"
    assert script(WHOLE_METHOD, "--lr 0.3 --save", stopped, "--resume", stopped, "--dry-run") == 2
    assert "other flags" in one_sentence(capsys.readouterr().err)
    assert tree(stopped) == before


@pytest.mark.parametrize("dry", ["", "--dry-run"])
def test_a_folder_that_a_resumed_run_could_not_begin_in(script, stopped, capsys, dry):
    Path("other").mkdir()
    Path("other/config.json").write_text("{}")
    assert script(WHOLE_METHOD, "--save other --resume", stopped, dry) == 2
    assert "other/config.json is no run's" in one_sentence(capsys.readouterr().err)


def test_a_run_that_has_ended(script, undisturbed, capsys):
    finished = undisturbed["sgd"]
    assert script(WHOLE_METHOD, "--save", finished, "--resume", finished, "--dry-run") == 0
    assert plan_of(capsys)["time"] == "nothing is left to train"


@pytest.mark.parametrize(
    ("call", "code", "told"),
    [
        (f"{BOTH} --data nowhere.npz", 2, "nowhere.npz"),
        (f"{BOTH} --re_explore", 2, "--sparse"),
        (f"{BOTH} --resume nowhere", 2, "nowhere"),
        (f"{BOTH} --save mine", 1, "mine is no folder"),
        (f"{BOTH} --save busy", 1, "busy is in use by another run"),
        (f"{BOTH} --save other", 2, "is no run's"),
        (f"{BOTH} {SPARSE} --tensorboard mine", 1, "mine is no folder"),
        (f"{BOTH} --show-layers", 2, "not allowed with"),
        ("--dry-run", 2, "nothing to do"),
    ],
)
def test_what_would_stop_a_run_stops_a_dry_one(script, capsys, call, code, told):
    Path("mine").write_text("mine")
    Path("other").mkdir()
    Path("other/config.json").write_text("{}")
    with RunFolder(Path("busy")).in_use():
        before = tree(".")
        assert script(call, "--dry-run") == code
        assert tree(".") == before
    assert told in one_sentence(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "1 s"),
        (59.4, "59 s"),
        (60, "1 min 0 s"),
        (12_030, "3 h 20 min"),
        (187_200, "2 d 4 h"),
        (3605, "1 h 0 min"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_source_that_has_no_batches_for_a_rank_ends_at_once():
    empty = SimpleNamespace(epoch=lambda epoch: iter(()))
    assert list(endless(empty)) == []
    two = SimpleNamespace(epoch=lambda epoch: iter((2 * epoch, 2 * epoch + 1)))
    assert list(itertools.islice(endless(two), 5)) == [0, 1, 2, 3, 4]
