"""Comparing tickets and superposing them again, without training, on one tiny run."""

import functools
import itertools
import json
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import analyze_tickets
import main as imagenet_main
import main_suptickets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from helpers.commands import not_imported
from helpers.damage import damages, names
from helpers.narrow_networks import narrow_networks
from sparselearning import analyze
from sparselearning.process.errors import FaultError, UsageError
from sparselearning.process.files import save_torch
from sparselearning.process.schema import read
from sparselearning.reporting.analysis import Analysis
from sparselearning.reporting.bench import Bench, Predictions
from sparselearning.sparse.superpose import prune_to_density, superpose
from sparselearning.training import from_flags

DENSITY, FACTOR, MEMBERS = 0.1, 0.3, 3
ROOT = Path(analyze.__file__).parents[1]
IMAGENET_FLAGS = shlex.split(
    "--no-cuda --arch mobilenet_v3_small --train-crop-size 32 --val-resize-size 40 --val-crop-size 32 -b 4 -j 0 "
    "--lr 0.01 --sparse --method DST --init-density 0.2 --final-density 0.1 --update-frequency 2 --pre_train "
    "--cyclic_train --bn_update --pretrain_epoch 1 --cyclic_epochs 1 --cycle 1 --keep-tickets --execution masked"
)
RUN_FLAGS = shlex.split(
    f"--model cifar_resnet_8_4 --epochs 3 --cycle 1 --cycle_rate 0.67 --batch-size 16 --test-batch-size 16 --lr 0.05 "
    f"--sparse --method GraNet --init-density 0.5 --final-density {DENSITY} --final-prune-epoch 1 --update-frequency 4 "
    f"--pre_train --cyclic_train --re_explore --large-death-rate 0.5 --cyc_lr --lr_1 0.01 --lr_2 0.05 --update_bn "
    f"--CIMA_factor {FACTOR} --keep-tickets --workers 1 --no-cuda --seed 5 --execution masked"
)


# ---------------------------------------------------------------------------------------------------- a tiny run


@pytest.fixture(scope="module")
def run_flags(tmp_path_factory):
    """Of runs on some of scikit-learn's digits, of 8 x 8 pixels as they are."""
    data = tmp_path_factory.mktemp("data") / "digits.npz"
    images, labels = load_digits(return_X_y=True)
    images = (255 / 16 * images).astype(np.uint8).reshape(-1, 8, 8)
    np.savez(data, x_train=images[:80], y_train=labels[:80], x_test=images[80:112], y_test=labels[80:112])
    return [*RUN_FLAGS, "--data", str(data)]


@pytest.fixture(scope="module")
def finished(run_flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("analysis") / "run"
    main_suptickets.main([*run_flags, "--save", str(folder)])
    return folder


@pytest.fixture(scope="module")
def analysed(finished):
    """The run analysed with its own settings, and a grid."""
    return analyse(
        finished, "--points", 3, "--grid", "--factors", 0.9, FACTOR, "--save-network", finished.parent / "again.pth"
    )


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    """A copy to analyse otherwise, or to spoil; without pictures, which take longest."""
    monkeypatch.setattr(analyze, "draw", lambda results, out: None)
    return shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("analysis"))


def analyse(run, *words):
    analyze.main([str(run), "--points", "2", *map(str, words)])
    return json.loads((run / "analysis" / "analysis.json").read_text())


def load(path):
    return torch.load(path, weights_only=True)


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def accuracies(results):
    return {row["name"]: row["accuracy"] for row in results["networks"]}


def test_the_runs_own_settings_reproduce_its_superposition_bit_for_bit(finished, analysed):
    own, again = load(finished / "model_previous.pth"), load(finished.parent / "again.pth")
    assert same_tensors(own["state_dict"], again["state_dict"])
    assert same_tensors(own["masks"], again["masks"])
    assert own["epoch"] == again["epoch"]
    assert analysed["same_as_run"]


def test_accuracies_are_those_that_the_run_recorded(finished, analysed):
    summary = json.loads((finished / "summary.json").read_text())
    recorded = {"ticket 0": summary["pretrain_acc"]}
    for row in map(json.loads, (finished / "tickets.jsonl").read_text().splitlines()):
        recorded |= {f"ticket {row['ticket']}": row["ticket_acc"]}
        recorded |= {f"superposition {row['ticket']}": row["superposed_acc"]}
    found = accuracies(analysed)
    assert len(recorded) == 5
    assert {name: found[name] for name in recorded} == recorded


def bench_of(run, **options):
    _, script, args = analyze.rebuilt_flags(analyze.parse([str(run)]), None)
    device, runtime = from_flags.runtime(args).start()
    return Bench.of(script.set_up(args, runtime, device), runtime, {}, **options)


def test_the_ensemble_is_the_mean_of_all_members_logits(finished, analysed):
    bench = bench_of(finished)
    states = [load(finished / "tickets" / f"ticket_{number}.pth")["state_dict"] for number in range(MEMBERS)]
    mean = sum(bench.logits(state, bench.measured) for state in states) / MEMBERS
    ensemble = analysed["networks"][-1]
    assert ensemble["forward_passes"] == MEMBERS
    assert ensemble["loss"] == pytest.approx(bench.quality(Predictions(mean)).loss, rel=1e-5)


def test_matrices_have_the_networks_of_the_run_in_order(analysed):
    pairs = analysed["pairs"]
    assert pairs["names"] == ["ticket 0", "ticket 1", "ticket 2", "superposition 2"]
    for key, diagonal in (("overlap", 1), ("disagreement", 0), ("kl", 0)):
        for i, j in itertools.product(range(4), repeat=2):
            value = pairs[key][i][j]
            assert value == pytest.approx(diagonal, abs=1e-12) if i == j else value >= 0
            if key != "kl":
                assert value == pairs[key][j][i]
    assert pairs["overlap"][0][1] < 1  # the exploration moved connections


def test_lines_start_and_end_at_their_networks(analysed):
    final, accuracy = "superposition 2", accuracies(analysed)
    expected = [("ticket 0", "ticket 1"), ("ticket 1", "ticket 2"), *((f"ticket {n}", final) for n in range(3))]
    assert [(line["from"], line["to"]) for line in analysed["lines"]] == expected
    for line in analysed["lines"]:
        assert line["share"] == [0, 0.5, 1]
        assert (line["accuracy"][0], line["accuracy"][-1]) == (accuracy[line["from"]], accuracy[line["to"]])


def test_the_grid_holds_the_runs_own_settings(analysed):
    averages = [(row["superposing_method"], row["CIMA_factor"]) for row in analysed["grid"]]
    assert averages == [("CAA", None), ("CIMA", 0.9), ("CIMA", FACTOR)]
    final = next(row for row in analysed["networks"] if row["name"] == "superposition 2")
    assert analysed["grid"][-1]["bn_re_estimated"] == {key: final[key] for key in ("accuracy", "loss", "ece")}


def test_pictures_come_with_matplotlib(finished, analysed):
    pytest.importorskip("matplotlib")
    pictures = {"networks", "pairs", "layers", "lines", "grid"}
    expected = {f"{name}.{kind}" for name in pictures for kind in ("png", "svg")} | {"analysis.json"}
    assert {path.name for path in (finished / "analysis").iterdir()} == expected


def test_without_matplotlib_there_are_no_pictures(analysed, tmp_path, monkeypatch, capsys):
    for module in ("sparselearning.reporting.analysis_plots", "sparselearning.reporting.plots"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    analyze.draw(read(Analysis, analysed, "analysis.json"), tmp_path)
    assert "no pictures without matplotlib" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_another_average_budget_and_subset(run, tmp_path, capsys):
    words = ["--superposing_method", "CAA", "--no-update_bn", "--final-density", "0.2", "--tickets", "1", "2"]
    results = analyse(run, *words, "--save-network", tmp_path / "other.pth")
    one, two = (load(run / "tickets" / f"ticket_{number}.pth") for number in (1, 2))
    average = superpose(one["state_dict"], two["state_dict"], 1 / 2)
    expected, _ = prune_to_density(average, one["masks"], 0.2)
    assert same_tensors(expected, load(tmp_path / "other.pth")["state_dict"])
    assert [row["name"] for row in results["networks"]] == ["ticket 1", "ticket 2", "superposition 1", "logit ensemble"]
    assert not results["same_as_run"]
    assert "by CAA, pruned to density 0.2, BatchNorm averaged; the last superposition is not" in capsys.readouterr().out


@pytest.fixture(scope="module")
def held_out(run_flags, tmp_path_factory):
    """A greedy run that chose on a fifth of the training images, and kept the moving average of its weights."""
    folder = tmp_path_factory.mktemp("held_out") / "run"
    more = "--superposing_method greedy --valid_split 0.2 --ema 0.9 --execution auto"
    main_suptickets.main([*run_flags, *more.split(), "--save", str(folder)])
    return folder


@pytest.fixture(scope="module")
def by_held_out(held_out):
    """That run analysed with its own settings, and a grid; without pictures, which take longest."""
    with pytest.MonkeyPatch.context() as context:
        context.setattr(analyze, "draw", lambda results, out: None)
        return analyse(held_out, "--grid", "--factors", "0.5")


@pytest.fixture
def greedy(held_out, tmp_path, monkeypatch):
    """A copy to analyse otherwise, without pictures."""
    monkeypatch.setattr(analyze, "draw", lambda results, out: None)
    return shutil.copytree(held_out, tmp_path / "run", ignore=shutil.ignore_patterns("analysis"))


def test_a_greedy_run_is_superposed_again_to_the_bit(greedy, by_held_out):
    assert by_held_out["same_as_run"]
    assert by_held_out["settings"]["superposing_method"] == "greedy"
    rows = [json.loads(line) for line in (greedy / "tickets.jsonl").read_text().splitlines()]
    assert [row["superposed_acc"] for row in rows] == [accuracies(by_held_out)[f"superposition {n}"] for n in (1, 2)]
    again = analyse(greedy, "--superposing_method", "CIMA", "--tickets", "0", "1")
    best = analyse(greedy, "--tickets", "0", "1")
    assert accuracies(best)["superposition 1"] >= accuracies(again)["superposition 1"]


def test_choices_are_made_on_held_out_images_and_measured_on_the_test_set(greedy, by_held_out, capsys):
    by_test = analyse(greedy, "--grid", "--factors", "0.5", "--on", "test")
    assert by_held_out["evaluated_on"] == {"part": "held-out part of the training set", "images": 16}
    assert by_test["evaluated_on"] == {"part": "test set", "images": 32}
    assert by_test["same_as_run"], "the very choices of the run"
    summary = json.loads((greedy / "summary.json").read_text())
    assert accuracies(by_test)["superposition 2"] == summary["test_acc"]
    for there, here in zip(by_held_out["networks"], by_test["networks"], strict=True):
        assert "held_out_accuracy" not in there
        assert here["held_out_accuracy"] == there["accuracy"]
    assert [row["superposing_method"] for row in by_test["grid"]] == ["CAA", "greedy", "CIMA"]
    for there, here in zip(by_held_out["grid"], by_test["grid"], strict=True):
        for bn in ("bn_averaged", "bn_re_estimated"):
            assert here[bn]["held_out_accuracy"] == there[bn]["accuracy"]
    final = next(row for row in by_test["networks"] if row["name"] == "superposition 2")
    assert by_test["grid"][1]["bn_re_estimated"].items() <= final.items()
    assert "accuracy, held-out" in capsys.readouterr().out


def test_the_moving_average_is_measured_beside_tickets(greedy):
    summary = json.loads((greedy / "summary.json").read_text())
    for part, recorded in (("evaluation", "ema_acc"), ("test", "ema_test_acc")):
        row = analyse(greedy, "--on", part, "--corruptions")["networks"][-1]
        assert (row["name"], row["accuracy"]) == ("moving average", summary[recorded])
        assert row["density"] == pytest.approx(DENSITY, abs=1e-3)
        assert set(row["corrupted"]) == {"noise", "blur", "contrast"}


@pytest.mark.parametrize("plain", [False, True])
def test_a_picture_names_every_network(by_held_out, plain):
    plots = pytest.importorskip("sparselearning.reporting.analysis_plots")
    results = read(Analysis, by_held_out, "analysis.json")
    if plain:
        alone = replace(results.settings, tickets=[0])
        results = replace(results, settings=alone, networks=[results.networks[0], results.networks[-1]])
    (axes,) = plots.networks(results).axes
    tickets = ["ticket 0", "ticket 1", "ticket 2", "superposition 1", "superposition 2"]
    names_ = ["ticket 0"] if plain else [*tickets, "logit ensemble, 3 forward passes"]
    assert [label.get_text() for label in axes.get_yticklabels()] == [*names_, "moving average"]


def test_accuracy_on_corrupted_pictures(run, capsys):
    results = analyse(run, "--corruptions", "--grid", "--factors", str(FACTOR))
    names_ = ["noise", "blur", "contrast"]
    rows = [*results["networks"], results["grid"][1]["bn_re_estimated"]]
    assert [list(row["corrupted"]) for row in rows] == [names_] * len(rows)
    final = results["networks"][-2]
    assert results["grid"][1]["bn_re_estimated"].items() <= final.items()
    assert results == analyse(run, "--corruptions", "--grid", "--factors", str(FACTOR)), "to the bit"
    bench = bench_of(run, corruptions=["blur"])
    predictions = bench.predict(load(run / "tickets" / "ticket_2.pth")["state_dict"])
    assert bench.quality(predictions).corrupted == {"blur": results["networks"][2]["corrupted"]["blur"]}
    assert (predictions.measured - predictions.corrupted["blur"]).abs().max() > 0.01
    assert "accuracy, contrast" in capsys.readouterr().out


def test_the_network_of_plain_training_is_measured_alone(run_flags, tmp_path, capsys):
    folder = tmp_path / "run"
    main_suptickets.main([*run_flags, "--cycle_rate", "0", "--epochs", "1", "--save", str(folder)])
    results = analyse(folder, "--grid", "--corruptions", "--save-network", tmp_path / "plain.pth")
    (only,) = results["networks"]
    assert only["name"] == "ticket 0"
    assert only["accuracy"] == json.loads((folder / "summary.json").read_text())["final_acc"]
    assert set(only["corrupted"]) == {"noise", "blur", "contrast"}
    assert results["same_as_run"]
    assert (results["lines"], results["layers"]) == ([], [])
    assert "grid" not in results
    assert "superposed" not in capsys.readouterr().out.partition("all figures")[0].split("images of")[1]
    assert same_tensors(load(folder / "model_previous.pth")["masks"], load(tmp_path / "plain.pth")["masks"])
    read(Analysis, results, "analysis.json")


def test_a_greedy_average_needs_held_out_images(run):
    with pytest.raises(UsageError, match="held none out"):
        analyse(run, "--superposing_method", "greedy")


def test_lines_with_bn_re_estimated_end_at_the_superposition_that_has_it_too(run):
    results = analyse(run, "--line-bn", "--tickets", "0", "1")
    to_final = [line for line in results["lines"] if line["to"] == "superposition 1"]
    assert [line["accuracy"][-1] for line in to_final] == [accuracies(results)["superposition 1"]] * 2


def test_tickets_of_a_dense_run_are_not_pruned_and_all_pairs_have_lines(run):
    config = json.loads((run / "config.json").read_text())
    config |= {"sparse": False}
    (run / "config.json").write_text(json.dumps(config))
    for number in range(MEMBERS):
        path = run / "tickets" / f"ticket_{number}.pth"
        save_torch(path, load(path) | {"masks": {}})
    results = analyse(run, "--all-pairs")
    assert len(results["lines"]) == 6
    assert results["settings"]["final_density"] is None
    final = next(row for row in results["networks"] if row["name"] == "superposition 2")
    assert final["density"] > DENSITY


def test_the_first_name_of_the_command_still_works_on_early_runs_too(run):
    config = json.loads((run / "config.json").read_text())
    del config["network"]
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="does not lead to the script"):
        analyse(run)
    analyze_tickets.main([str(run), "--points", "2"])
    assert json.loads((run / "analysis" / "analysis.json").read_text())["same_as_run"]


# ------------------------------------------------------------------------------------------------ the other script


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A run of the ImageNet script on generated images, and what the command made of it, called from elsewhere.

    The script is not imported then, nor on the path.
    """
    home = tmp_path_factory.mktemp("photographs")
    numbers = np.random.default_rng(0)
    for split, label, number in itertools.product(("train", "val"), range(2), range(4)):
        (folder := home / "data" / split / f"n{label}").mkdir(parents=True, exist_ok=True)
        pixels = numbers.integers(0, 120, (36, 48, 3), dtype=np.uint8) + np.uint8(90 * label)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    with narrow_networks():
        imagenet_main.main([*IMAGENET_FLAGS, str(home / "data"), "--save", str(home / "run")])
        with not_imported([ROOT / "ImageNet"]), pytest.MonkeyPatch.context() as elsewhere:
            elsewhere.chdir(home)
            elsewhere.setattr(analyze, "draw", lambda results, out: None)
            analyze.main([str(home / "run"), "--points", "2", "--grid", "--corruptions"])
        yield home / "run"


def test_an_imagenet_run_is_analysed_alike(photographs):
    results = json.loads((photographs / "analysis" / "analysis.json").read_text())
    assert results["same_as_run"]
    assert results["evaluated_on"] == {"part": "test set", "images": 8}
    summary = json.loads((photographs / "summary.json").read_text())
    assert accuracies(results)["ticket 0"] == summary["pretrain_acc"]
    assert accuracies(results)["superposition 1"] == summary["final_acc"]
    assert [row["superposing_method"] for row in results["grid"]] == ["CAA", *["CIMA"] * 5]
    assert all(row["corrupted"].keys() == {"noise", "blur", "contrast"} for row in results["networks"])


def test_the_first_name_of_the_command_knows_imagenet_runs_too(photographs, monkeypatch, capsys):
    monkeypatch.setattr(analyze, "draw", lambda results, out: None)
    analyze_tickets.main([str(photographs), "--points", "2"])
    assert "8 images of the test set" in capsys.readouterr().out


def test_a_flag_that_the_runs_script_does_not_have(photographs):
    with pytest.raises(UsageError, match="has no flag data_dir"):
        analyse(photographs, "--data-dir", "elsewhere")


# -------------------------------------------------------------------------------------------------------- misuse


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(UsageError, match="no run"):
        analyse(tmp_path)


def test_a_folder_of_several_runs_must_be_narrowed_down(run):
    shutil.copytree(run, run.parent / "second")
    with pytest.raises(UsageError, match="holds 2 runs: name one"):
        analyse(run.parent)


def test_a_run_that_kept_its_tickets_but_for_the_first(run):
    (run / "tickets" / "ticket_0.pth").unlink()
    with pytest.raises(UsageError, match=r"ticket_0\.pth, .*, is not there, though others are: name these"):
        analyse(run)


def test_a_run_that_kept_no_tickets(run):
    shutil.rmtree(run / "tickets")
    with pytest.raises(UsageError, match="--keep-tickets"):
        analyse(run)


@pytest.mark.parametrize(
    ("tickets", "message"), [(["1"], "at least two tickets"), (["0", "7"], r"no file .*ticket_7\.pth")]
)
def test_tickets_that_do_not_do(run, tickets, message):
    with pytest.raises(UsageError, match=message):
        analyse(run, "--tickets", *tickets)


def test_a_ticket_of_another_model(run):
    path = run / "tickets" / "ticket_1.pth"
    saved = load(path)
    save_torch(path, saved | {"state_dict": {"other": torch.zeros(2)}, "masks": {}})
    with pytest.raises(UsageError, match=r"ticket_1\.pth holds weights of another model"):
        analyse(run)


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"no"), lambda path: save_torch(path, {"masks": {}})])
def test_a_damaged_ticket(run, damage):
    damage(run / "tickets" / "ticket_1.pth")
    with pytest.raises(FaultError, match=r"ticket_1\.pth"):
        analyse(run)


@pytest.mark.parametrize("words", [["--points", "1"], ["--CIMA_factor", "2"], ["--superposing_method", "mean"]])
def test_values_out_of_range_exit_2(run, words):
    with pytest.raises(SystemExit) as exit_:
        analyse(run, *words)
    assert exit_.value.code == 2
    assert not (run / "analysis").exists()


class Reached(Exception):
    """All that ``config.json`` decides is decided."""


FOR_ALL_FLAGS = {"removed", "null", "true", "text", "minus", "huge"}
FOR_ONE_OF_A_KIND = FOR_ALL_FLAGS | {"fraction", "nan", "list", "object", "nested"}
"""Of a kind are flags whose values are of one type."""
LOADED_BY = ("data", "data_dir", "model", "batch_size", "test_batch_size", "valid_split", "seed")


def test_damaged_flags_are_named_or_harmless(run, monkeypatch):
    load, loaded = main_suptickets.load, {}

    def load_once(args, *arguments):
        key = repr([getattr(args, name) for name in LOADED_BY])
        if key not in loaded:
            loaded[key] = load(args, *arguments)
        return loaded[key]

    def stop_before_the_tickets(folder):
        raise Reached

    monkeypatch.setattr(analyze, "script_of", lambda config, source: main_suptickets)
    monkeypatch.setattr(main_suptickets, "load", load_once)
    monkeypatch.setattr(main_suptickets, "make_parser", functools.cache(main_suptickets.make_parser))
    monkeypatch.setattr(analyze, "kept_tickets", stop_before_the_tickets)
    path = run / "config.json"
    refused, flags_of_kind = 0, {type(value): name for name, value in json.loads(path.read_text()).items()}
    for place, damage, damaged in damages(path.read_text(), lines=False):
        if damage not in (FOR_ONE_OF_A_KIND if place[0] in flags_of_kind.values() else FOR_ALL_FLAGS):
            continue
        path.write_text(damaged)
        with pytest.raises((Reached, FaultError, UsageError)) as caught:
            analyse(run)
        if caught.type is not Reached:
            refused += 1
            sentence = str(caught.value)
            named = str(path) in sentence and names(sentence, place)
            # A flag that could be is told by what it leads to: no such file, no image left, no such layer, no GPU.
            assert named or place[0] in ("data", "data_dir", "model", "dense_layers", "valid_split", "fp16"), (
                place,
                damage,
                sentence,
            )
        assert path.read_text() == damaged
    assert refused > 100


@pytest.mark.parametrize("name", ["model_previous.pth", "config.json", "tickets"])
def test_a_saved_network_replaces_nothing_of_the_run(run, name):
    path = run / name
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(UsageError, match=name):
        analyse(run, "--save-network", path)
    assert (path.read_bytes() if path.is_file() else None) == before


def test_a_saved_network_replaces_an_earlier_one(run, tmp_path):
    for _ in range(2):
        analyse(run, "--save-network", tmp_path / "again.pth", "--points", 2)
    assert set(load(tmp_path / "again.pth")) == {"made_by", "state_dict", "masks", "epoch"}
