"""The CIFAR script on a tiny data set: flags that make it quick, and what its runs leave."""

import json
import os
import shlex
from pathlib import Path

import main_suptickets
import numpy as np
import torch
from cifar_models import build_model

from helpers.commands import exit_code
from helpers.comparing import lines, plain, without_times
from sparselearning.process.files import load_torch
from sparselearning.training.engine import Trainer

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


RUN = "--sparse --pre_train --cyclic_train "


def parse(text):
    return main_suptickets.parse(shlex.split(text))


def small_call(data, *words, model=MODEL):
    """The flags of a small run on a data set, with these added, as one text."""
    return f"--data {data} --model {model} --batch-size 16 --lr 0.05 {' '.join(map(str, words))}"


def run_cifar(text):
    """Run the script in this process; return its exit code."""
    return exit_code(lambda: main_suptickets.main(shlex.split(text)))


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


def maskable(model=MODEL, **options):
    settings = {"num_classes": 4, "in_channels": 3, "image_size": 8} | options
    return {name: p for name, p in build_model(model, **settings).named_parameters() if p.dim() in (2, 4)}


TOTAL = sum(parameter.numel() for parameter in maskable().values())


def non_zeros(state, names=None):
    return sum(int(torch.count_nonzero(state[name])) for name in names or maskable())


def previous(folder):
    return load_torch(Path(folder) / "model_previous.pth")


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


X, Y = np.zeros((8, 8, 8, 3), np.uint8), np.arange(8) % 4
