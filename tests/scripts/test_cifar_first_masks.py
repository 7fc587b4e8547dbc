"""The first masks that the CIFAR script's flags draw, or take over from trained weights."""

import json
import os
from pathlib import Path

import pytest
import torch

from helpers.cifar import SPARSE, TOTAL
from helpers.commands import one_sentence
from helpers.comparing import tree
from helpers.tensors import active
from sparselearning.process.files import load_torch
from sparselearning.training.engine import Trainer


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


@pytest.mark.parametrize(("source", "first_seed"), [("", 17), ("model_current.pth", 17), ("", 16)])
def test_several_seeds_cannot_start_from_a_folder_that_one_of_them_moves_aside(script, capsys, source, first_seed):
    """Later seeds would start from its result; it is known before the first one trains."""
    assert script("--pre_train --epochs 1", SPARSE) == 0
    (folder,) = [path.parent for path in Path("saved_models").rglob("config.json")]
    Path("link").symlink_to(folder)
    before = tree("saved_models")
    capsys.readouterr()
    prunes = f"--sparse-init prune_global --seed {first_seed} --iters 3 --resume"
    assert script("--pre_train --epochs 1", SPARSE, prunes, Path("link") / source) == 2
    assert "which all --iters runs start from, lies in the folder of one of them" in one_sentence(
        capsys.readouterr().err
    )
    assert tree("saved_models") == before


def test_all_seeds_prune_the_same_network(script):
    assert script("--pre_train --epochs 1 --cycle_rate 0") == 0
    (dense,) = [path.parent for path in Path("saved_models").rglob("config.json")]
    call = "--pre_train --epochs 1 --cycle_rate 0 --sparse --method DST --fix --sparse-init prune_global"
    assert script(call, "--iters 2 --save runs --resume", dense) == 0
    densities = [json.loads(Path("runs", seed, "summary.json").read_text())["density"] for seed in os.listdir("runs")]
    assert densities == pytest.approx([0.5, 0.5], abs=1e-3)
