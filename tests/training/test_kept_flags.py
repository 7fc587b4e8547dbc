"""Flags that come from elsewhere than the command line: presets, ``--config``, the run that is resumed."""

import json
import shlex
from pathlib import Path

import main as imagenet_main
import main_suptickets
import pytest

from helpers.cifar import RUN, parse
from sparselearning.process.errors import UsageError
from sparselearning.training import flag_checks, kept_flags
from sparselearning.training.plan import EpochBudget


def test_flags_come_from_a_config_and_the_command_line_counts_more(tmp_path):
    first = parse(RUN + "--lr 0.3 --dense-layers fc conv1 --ema 0.9 --no-tf32 --save there --iters 3 --seed 5")
    path = config_of(tmp_path / "config.json", first)
    again = parse(f"--config {path} --seed 6")
    expected = vars(first) | {"save": None, "iters": 1, "seed": 6, "config": path}
    assert vars(again) == expected


def config_of(path, args):
    path.write_text(json.dumps({"command": "x", "versions": {}, "commit": None, **kept_flags.values(args)}))
    return path


def test_a_config_of_the_other_script_names_what_does_not_fit(tmp_path):
    path = config_of(tmp_path / "config.json", parse(RUN))
    with pytest.raises(UsageError, match=r"this script has no flags .*'cycle_rate'"):
        imagenet_main.parse(["photos", "--config", str(path)])


IMAGENET = (
    "photos --arch resnet18 -c fanin --pre_train --sparse --density 0.2 --pretrain_epoch 5 --cyclic_epochs 4 --cycle 2 "
    "--wd 0.001 --local_rank 0 --resume there"
)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ("", {}),
        ("slides", {"data": Path("slides")}),  # the folder comes from there too, unless one is given
        ("--final-density 0.3", {"density": 0.3, "final_density": 0.3}),  # one budget, one of whose names is given
        ("--density 0.3", {"density": 0.3, "final_density": 0.3}),
        ("--pretrain_epoch 7", {"pretrain_epoch": 7, "epochs": 11}),
        ("--cyclic_epochs 6 photos", {"cyclic_epochs": 6, "epochs": 11}),
        ("--arch resnet50", {"arch": "resnet50"}),
        ("--arch vit_b_16", {"arch": "vit_b_16", "model_config": None}),  # which knows no -c
    ],
)
def test_imagenet_from_a_config(tmp_path, changes, expected):
    first = imagenet_main.parse(shlex.split(IMAGENET))
    path = config_of(tmp_path / "config.json", first)
    again = imagenet_main.parse(shlex.split(f"--config {path} {changes}"))
    unasked = {"config": path, "local_rank": None, "resume": None}
    assert vars(again) == vars(first) | unasked | expected
    imagenet_main.check(again, imagenet_main.epoch_budget(again))


def test_a_dense_imagenet_run_from_a_config_gives_no_folder_either(tmp_path):
    path = config_of(tmp_path / "config.json", imagenet_main.parse(shlex.split("--pre_train --cyclic_epochs 0 photos")))
    words = shlex.split(f"--config {path} --growth random")
    args, parser = imagenet_main.parse(words), imagenet_main.make_parser()
    assert args.data == Path("photos")
    assert "--growth" in flag_checks.without_masks_note(args, parser, words)[0]
    with pytest.raises(SystemExit):
        parser.parse_args(words)


def test_a_given_model_config_is_not_dropped(tmp_path):
    path = config_of(tmp_path / "config.json", imagenet_main.parse(shlex.split(IMAGENET)))
    args = imagenet_main.parse(shlex.split(f"--config {path} --arch vit_b_16 -c fanin"))
    with pytest.raises(UsageError, match="vit_b_16 starts as torchvision's: leave it out"):
        imagenet_main.check(args, imagenet_main.epoch_budget(args))


def test_demo_presets_give_way_to_flags():
    args = parse("--demo")
    assert (args.data, args.sparse, args.pre_train, args.cyclic_train, args.final_density) == (
        "digits", True, True, True, 0.05,
    )  # fmt: skip
    budget = EpochBudget.of_share(args.epochs, args.cycle_rate, args.cycle)
    assert budget.tickets >= 3
    assert not main_suptickets.check(args)
    assert not flag_checks.pruning_window_warning(args, budget.pretrain_epochs)
    given = parse("--epochs 7 --demo --final-density 0.2")
    assert (given.epochs, given.final_density, given.data) == (7, 0.2, "digits")
    assert parse("").data == "cifar10"  # the presets do not stay behind


def test_the_presets_of_the_demo_count_more_than_a_config(tmp_path):
    path = config_of(tmp_path / "config.json", parse("--pre_train --epochs 3 --lr 0.3 --momentum 0.5"))
    given = parse(f"--config {path} --demo --momentum 0.7")
    assert (given.epochs, given.data, given.lr, given.momentum) == (parse("--demo").epochs, "digits", 0.3, 0.7)


def test_the_demo_again_from_its_config(tmp_path):
    path = config_of(tmp_path / "config.json", parse("--demo --seed 3"))
    assert vars(parse(f"--config {path}")) == vars(parse("--demo --seed 3")) | {"config": path}


@pytest.mark.parametrize("recipe", main_suptickets.RECIPES)
def test_recipes_contradict_nothing_and_give_way_to_flags(recipe, tmp_path):
    args = parse(f"--recipe {recipe} --update-frequency 26")
    assert args.recipe == recipe
    assert not main_suptickets.check(args)
    given = parse(f"--epochs 125 --recipe={recipe} --update-frequency 26 --method DST --init-density 0.05")
    assert vars(given) == vars(args) | {"epochs": 125, "method": "DST", "init_density": 0.05}
    assert not main_suptickets.check(given)
    control = parse(f"--recipe {recipe} --update-frequency 26 --cycle_rate 0")
    assert EpochBudget.of_share(control.epochs, control.cycle_rate, control.cycle).tickets == 0
    assert main_suptickets.RECIPES[recipe] in " ".join(main_suptickets.make_parser().format_help().split())
    path = config_of(tmp_path / "config.json", given)
    assert vars(parse(f"--config {path}")) == vars(given) | {"config": path}


def test_presets_exclude_each_other_and_recipes_the_flags_of_a_run(capsys, tmp_path):
    with pytest.raises(SystemExit):
        parse("--demo --recipe tuned")
    assert "--recipe: not allowed with argument --demo" in capsys.readouterr().err
    path = config_of(tmp_path / "config.json", parse("--pre_train --sparse --fix"))
    with pytest.raises(UsageError, match="--recipe and --config"):
        parse(f"--config {path} --recipe tuned")


def test_a_recipe_needs_the_steps_between_updates_which_depend_on_the_data():
    with pytest.raises(UsageError, match="--recipe tuned needs --update-frequency"):
        parse("--recipe tuned")


def test_values_of_the_flags_are_complete_and_plain():
    args = parse(RUN + "--save /a/b --resume c.pth")
    values = kept_flags.values(args)
    assert json.loads(json.dumps(values)) == values
    assert values.keys() == vars(args).keys()
    assert (values["save"], values["resume"]) == ("/a/b", "c.pth")
    assert shlex.split(kept_flags.command(["--save", "/a b"]))[-2:] == ["--save", "/a b"]


def test_a_folder_of_images_may_move_under_its_name():
    def known_as(path):
        args = imagenet_main.parse([path, "--pre_train"])
        return kept_flags.settled(kept_flags.values(args), imagenet_main.make_parser())["data"]

    assert known_as("photos/2012") == known_as("/scratch/1/2012/") == known_as("../2012")
    assert known_as("photos/2012") != known_as("photos/2013")


def test_a_resumed_run_may_move_but_not_change():
    def identity(call):
        return kept_flags.identity(kept_flags.values(parse(RUN + call)), main_suptickets.make_parser())

    first = identity("--save a --log-interval 5 --keep-tickets")
    assert first == identity("--save b --resume a --data-dir x --test-batch-size 7")
    for change in ("--seed 18", "--lr 0.2", "--model ResNet18", "--final-density 0.1", "--cyc_lr", "--amp bf16"):
        assert first != identity(change), change


@pytest.mark.parametrize("path", ["/data/imagenet", "/scratch/1/imagenet/", "imagenet", "../imagenet/train/.."])
def test_a_folder_of_images_is_known_by_its_name(path):
    def settled(data):
        args = imagenet_main.parse(shlex.split(f"{data} --pre_train"))
        return kept_flags.settled(kept_flags.values(args), imagenet_main.make_parser())

    assert settled(path) == settled("/scratch/2/imagenet")
    assert settled(path) != settled("/scratch/2/imagenet-100")
