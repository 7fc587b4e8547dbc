"""The examples run, in seconds: they keep their budgets, and learn."""

import itertools
import math
import re
import runpy
import sys
from pathlib import Path
from pydoc_data import topics

import pytest
import sklearn.datasets
import torch
from sklearn.datasets import load_digits

from helpers.imagenet import write_images

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch, capsys):
    """Run an example with a line of flags; return its names and its table's rows, cells by name of the row."""

    def run(name, flags):
        monkeypatch.setattr(sys, "argv", [name, *flags.split()])
        monkeypatch.setattr(sys, "path", [*sys.path])
        names = runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        rows = (re.split(r"\s{2,}|\s(?=[\d.]+%?$)", line) for line in capsys.readouterr().out.splitlines()[1:])
        return names, {row[0]: row[1:] for row in rows}

    return run


def test_a_language_model_is_superposed(example, monkeypatch):
    few = dict(itertools.islice(topics.topics.items(), 21))  # most of the time would go to evaluating on the others
    monkeypatch.setattr(topics, "topics", few)
    names, rows = example("language_model.py", "--steps 9 --density 0.2")
    tickets = [f"{kind} {number}" for number in (1, 2, 3) for kind in ("ticket", "superposition")]
    assert list(rows) == ["dense", "RigL", "RigL, two thirds of the steps", *tickets]
    assert [density for density, _ in rows.values()] == ["1.0000", *["0.2000"] * 8]
    losses = {name: float(loss) for name, (_, loss) in rows.items()}
    assert max(losses.values()) < math.log(len(names["alphabet"])) + 1  # as good as a guess, or near that
    assert losses["dense"] < 3.5 < losses["dense"] + 1.5

    masks, state = names["masks"], names["superposed"].state_dict()
    kept, total = (sum(int(count(mask)) for mask in masks.values()) for count in (torch.sum, torch.numel))
    assert kept == round(0.2 * total)
    assert sum(int(state[name].count_nonzero()) for name in masks) == kept
    assert {"blocks.0.self_attn.in_proj_weight", "blocks.1.linear2.weight", "head.weight"} <= masks.keys()
    assert not masks.keys() & {"characters.weight", "places.weight", "norm.weight"}


@pytest.mark.parametrize("data", ["digits", "folder"])
def test_a_network_is_fine_tuned_to_a_density(example, tmp_path, monkeypatch, data):
    pixels, labels = load_digits(return_X_y=True)
    few = pixels[:192], labels[:192]  # two batches to train on, one to evaluate on
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda return_X_y: few)
    for part in ("train", "val"):
        write_images(tmp_path / part, classes=("ant", "bee"), per_class=2)
    flags = "--arch mobilenet_v3_small --epochs 1 --density 0.3" + (f" --data {tmp_path}" if data == "folder" else "")
    names, rows = example("finetune.py", flags)
    assert list(rows) == ["trained", "fine-tuned, dense", "fine-tuned, GraNet"]
    assert [density for density, _ in rows.values()] == ["1.0000", "1.0000", "0.3000"]
    assert names["tuned"].classifier[-1].out_features == names["classes"] == (10 if data == "digits" else 2)


@pytest.mark.parametrize(
    ("name", "flags", "told"),
    [
        ("language_model.py", "--steps 8", "--steps is at least 9, and --density lies in (0, 1]"),
        ("language_model.py", "--density 0", "--steps is at least 9, and --density lies in (0, 1]"),
        ("finetune.py", "--epochs 0", "--epochs is at least 1, and --density lies in (0, 1]"),
        ("finetune.py", "--data missing", "missing has no folders train and val"),
        ("finetune.py", "--arch resnet19", "invalid choice: 'resnet19'"),
        ("finetune.py", "--arch googlenet", "invalid choice: 'googlenet'"),  # in training it returns three logits
        ("finetune.py", "--arch squeezenet1_1", "invalid choice: 'squeezenet1_1'"),  # it ends with a convolution
        ("finetune.py", "--arch alexnet", "alexnet takes no images of 32 x 32 pixels (Given input size"),
    ],
)
def test_wrong_calls_are_told(example, capsys, name, flags, told):
    with pytest.raises(SystemExit) as end:
        example(name, flags)
    assert end.value.code == 2
    assert told in capsys.readouterr().err
