"""The command line: defaults, help, what flags mean and do, the folder of a run. Nothing is trained here."""

import argparse
import json
import re
import shlex
import sys
from pathlib import Path

import main as imagenet_main
import main_suptickets
import pytest
from cifar_data import DATASETS
from cifar_models import model_names

from helpers.cifar import RUN, parse, run_cifar
from helpers.commands import one_sentence
from sparselearning.process.arguments import marked
from sparselearning.process.errors import UsageError
from sparselearning.sparse.schedules import DECAYS
from sparselearning.sparse.sparse_init import SPARSE_INITS
from sparselearning.sparse.superpose import AVERAGING
from sparselearning.sparse.topology import GROWTH, METHODS, PRUNE, REDISTRIBUTION
from sparselearning.training import flags
from sparselearning.training.plan import EpochBudget

# The published command lines of the CIFAR script.
COMMON = (
    "--update_bn --pre_train --cyclic_train --re_explore --no_maskupdates --cyc_lr --lr_2 0.005 --lr_1 0.001 "
    "--cycle 8 --cycle_rate 0.1 --sparse --decay-schedule constant --seed 41 --sparse-init ERK --update-frequency 1000 "
    "--batch-size 128 --prune-rate 0.5 --large-death-rate 0.5 --prune magnitude --final-density 0.05 --epochs 250 "
    "--model ResNet50 --data cifar100 "
)
PUBLISHED = {
    "granet": COMMON + "--indicate_method granet --method GraNet --growth gradient --init-density 0.5",
    "rigl": COMMON + "--indicate_method rigl --method DST --growth gradient --init-density 0.05",
    "set": COMMON + "--indicate_method set --method DST --growth random --init-density 0.05",
}


# ----------------------------------------------------------------------------------------------------- defaults


DEFAULTS = {
    "batch_size": 128, "test_batch_size": 128, "epochs": 160, "lr": 0.1, "momentum": 0.9, "l2": 5e-4, "seed": 17,
    "log_interval": 100, "optimizer": "sgd", "decay_schedule": "cosine", "workers": 4, "indicate_method": "Results",
    "cycle": 8, "cycle_rate": 0.2, "lr_1": 0.05, "lr_2": 0.0001, "growth": "gradient", "prune": "magnitude",
    "redistribution": "none", "prune_rate": 0.5, "pruning_rate": 0.5, "update_frequency": 100, "method": "GraNet",
    "init_density": 0.5, "final_density": 0.05, "init_prune_epoch": 0, "final_prune_epoch": 110,
    "large_death_rate": 0.8, "multiplier": 1, "model": "vgg-like", "data": "cifar10", "superposing_method": "CIMA",
    "CIMA_factor": 0.5, "valid_split": 0, "iters": 1, "save": None, "resume": None,
}  # fmt: skip
SWITCHES = {
    "sparse", "fix", "rm_first", "pre_train", "cyclic_train", "re_explore", "no_maskupdates", "cyc_lr", "update_bn",
    "no_cuda", "mgpu", "fp16", "nolrsche", "keep_tickets", "demo",
}  # fmt: skip


def test_defaults_are_the_documented_ones():
    args = vars(parse(""))
    assert {name: args[name] for name in DEFAULTS} == DEFAULTS
    assert {name: args[name] for name in SWITCHES} == dict.fromkeys(SWITCHES, False)


def test_both_names_of_the_batchnorm_flag():
    assert parse("--update_bn").update_bn
    assert parse("--bn_update").update_bn


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_lines(name, capsys):
    args = parse(PUBLISHED[name])
    main_suptickets.check(args)
    budget = EpochBudget.of_share(args.epochs, args.cycle_rate, args.cycle)
    assert (budget.pretrain_epochs, budget.cyclic_epochs, budget.tickets) == (226, 24, 3)
    assert (args.lr, args.lr_1, args.lr_2) == (0.1, 0.001, 0.005)
    plan = flags.plan(args, budget, main_suptickets.pretrain_lr(args, budget))
    assert [plan.lr(epoch, 0, 391) for epoch in (0, 112, 113, 168, 169, 225)] == pytest.approx(
        [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    )
    assert (plan.explore_rate, plan.updates_in_cycles, plan.final_density) == (0.5, False, 0.05)
    masking = flags.sparse_training(args, 391, budget.total_epochs).masking
    assert masking["total_steps"] == 250 * 391
    assert (masking["prune_start_step"], masking["prune_end_step"]) == (0, 110 * 391)
    assert masking["growth"] == ("random" if name == "set" else "gradient")


def test_demo_presets_give_way_to_flags():
    args = parse("--demo")
    assert (args.data, args.sparse, args.pre_train, args.cyclic_train, args.final_density) == (
        "digits", True, True, True, 0.05,
    )  # fmt: skip
    budget = EpochBudget.of_share(args.epochs, args.cycle_rate, args.cycle)
    assert budget.tickets >= 3
    assert not main_suptickets.check(args)
    assert not flags.pruning_window_warning(args, budget.pretrain_epochs)
    given = parse("--epochs 7 --demo --final-density 0.2")
    assert (given.epochs, given.final_density, given.data) == (7, 0.2, "digits")
    assert parse("").data == "cifar10"  # the presets do not stay behind


@pytest.mark.parametrize("recipe", main_suptickets.RECIPES)
def test_recipes_contradict_nothing_and_give_way_to_flags(recipe, capsys, tmp_path):
    args = parse(f"--recipe {recipe}")
    assert args.recipe == recipe
    assert not main_suptickets.check(args)
    given = parse(f"--epochs 125 --recipe={recipe} --method DST --init-density 0.05")
    assert vars(given) == vars(args) | {"epochs": 125, "method": "DST", "init_density": 0.05}
    assert not main_suptickets.check(given)
    control = parse(f"--recipe {recipe} --cycle_rate 0")
    assert EpochBudget.of_share(control.epochs, control.cycle_rate, control.cycle).tickets == 0
    assert main_suptickets.RECIPES[recipe] in help_of(capsys)
    path = config_of(tmp_path / "config.json", given)
    assert vars(parse(f"--config {path}")) == vars(given) | {"config": path}


def test_presets_exclude_each_other_and_recipes_the_flags_of_a_run(capsys, tmp_path):
    with pytest.raises(SystemExit):
        parse("--demo --recipe tuned")
    assert "--recipe: not allowed with argument --demo" in capsys.readouterr().err
    path = config_of(tmp_path / "config.json", parse("--pre_train --sparse --fix"))
    with pytest.raises(UsageError, match="--recipe and --config"):
        parse(f"--config {path} --recipe tuned")


# --------------------------------------------------------------------------------------------------------- help


def help_of(capsys):
    with pytest.raises(SystemExit) as leaving:
        parse("--help")
    assert leaving.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_shows_every_flag_and_default(capsys):
    text = help_of(capsys)
    for name, default in DEFAULTS.items():
        flag = re.search(rf"--{name.replace('_', '[-_]')}[ ,].*?(?= --|$)", text)
        assert flag, name
        if default is not None:
            assert f"(default: {default}" in text
    for name in SWITCHES:
        assert re.search(rf"--{name.replace('_', '[-_]')}\b", text), name


def test_help_names_all_choices(capsys):
    text = help_of(capsys)
    for table in (GROWTH, PRUNE, REDISTRIBUTION, SPARSE_INITS, METHODS, DECAYS, AVERAGING):
        # A list too long for a line of its own stands in the text, where lines can break.
        assert "{" + ",".join(table) + "}" in text or "one of " + ", ".join(table) + ":" in text
    for name in [*DATASETS, *model_names(), ".npz"]:
        assert name in text


@pytest.mark.parametrize(("columns", "widest"), [(60, 60), (80, 80), (100, 100), (250, 100)])
@pytest.mark.parametrize("script", [main_suptickets, imagenet_main])
def test_help_fits_terminals(script, columns, widest, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert max(map(len, script.make_parser().format_help().splitlines())) <= widest


def examples_of(script):
    """Title of every group of flags that a script adds: the command line that its help shows."""
    help_of_groups = script.make_parser().format_help().split("\n\n")
    commands = [re.search(r"^(.+):\n  .*:\n((?:  .*\\\n)*  .*)$", part) for part in help_of_groups]
    return {command[1]: shlex.split(command[2].replace("\\\n", " ")) for command in commands if command}


@pytest.mark.parametrize("script", [main_suptickets, imagenet_main])
def test_every_group_of_the_help_shows_a_command_line_that_fits_together(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script.__file__])
    own = [group for group in script.make_parser()._action_groups[2:] if group._group_actions]  # two are argparse's
    examples = examples_of(script)
    assert list(examples) == [group.title for group in own]
    for words in examples.values():
        assert words[:2] == ["python", Path(script.__file__).name]
        args = script.parse(words[2:])
        assert script.check(args, *([script.epoch_budget(args)] if script is imagenet_main else [])) == [], words


def test_help_says_what_the_methods_and_the_demo_are(capsys):
    text = help_of(capsys)
    for name, method in METHODS.items():
        assert f"{name}: {method.about}" in text
    assert main_suptickets.DEMO in text


def test_help_says_what_the_cyclic_rates_are(capsys):
    text = help_of(capsys)
    assert re.search(r"--lr_1 LR_1 [^-]*both ends", text)
    assert re.search(r"--lr_2 LR_2 [^-]*middle", text)


def test_given_flags_are_those_on_the_command_line_whatever_their_values():
    parser = main_suptickets.make_parser()
    assert parser.given([]) == {}
    argv = shlex.split("--lr 0.1 --bn_update --no-tf32 --init-density=0.5 --save x")
    assert parser.given(argv) == {
        "lr": "--lr", "update_bn": "--bn_update", "tf32": "--no-tf32", "init_density": "--init-density",
        "save": "--save",
    }  # fmt: skip
    assert vars(parser.parse_args([])) == vars(parse(""))  # nothing stays behind


def test_a_path_starts_at_home_where_a_tilde_says_so(monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/home/reader")
    args = parse("--save '~/x' --resume ~/y/~ --data-dir ./~ --tensorboard '~'")
    assert (args.save, args.resume) == (Path("/home/reader/x"), Path("/home/reader/y/~"))
    assert (args.data_dir, args.tensorboard) == (Path("~"), Path("/home/reader"))
    with pytest.raises(SystemExit) as leaving:
        parse("--save ''")
    assert leaving.value.code == 2
    assert "--save" in one_sentence(capsys.readouterr().err)


def test_no_abbreviations(capsys):
    with pytest.raises(SystemExit) as leaving:
        parse("--epoch 3")
    assert leaving.value.code == 2


# --------------------------------------------------------------------------------------- what flags mean and do


@pytest.mark.parametrize(
    ("epochs", "rate", "cycle", "expected"),
    [
        (250, 0.1, 8, (226, 24, 3)),
        (160, 0.2, 8, (128, 32, 4)),
        (10, 0.3, 1, (7, 3, 3)),  # 0.3 · 10 is below 3 in binary
        (10, 0.5, 3, (7, 3, 1)),
        (10, 1.0, 5, (0, 10, 2)),
        (10, 0.0, 1, (10, 0, 0)),
        (7, 0.1, 1, (7, 0, 0)),
    ],
)
def test_epoch_budget(epochs, rate, cycle, expected):
    budget = EpochBudget.of_share(epochs, rate, cycle)
    assert (budget.pretrain_epochs, budget.cyclic_epochs, budget.tickets) == expected


def test_learning_rate_of_pretraining():
    rates = [main_suptickets.pretrain_lr(parse("--lr 1"), EpochBudget(7, 1, 0))(epoch) for epoch in range(7)]
    assert rates == pytest.approx([1, 1, 1, 0.1, 0.1, 0.01, 0.01])  # ⌊3.5⌋ and ⌊5.25⌋
    constant = main_suptickets.pretrain_lr(parse("--lr 1 --nolrsche"), EpochBudget(7, 1, 0))
    assert {constant(epoch) for epoch in range(7)} == {1}


def test_pruning_window_in_steps_and_the_multiplier():
    args = parse(RUN + "--init-prune-epoch 2 --final-prune-epoch 5 --final-update-epoch 4 --multiplier 3")
    masking = flags.sparse_training(args, steps_per_epoch=10, total_epochs=30).masking
    assert (masking["prune_start_step"], masking["prune_end_step"], masking["total_steps"]) == (60, 150, 300)
    assert masking["final_update_step"] == 120
    assert flags.sparse_training(parse(RUN), 10, 30).masking["final_update_step"] is None


def test_flags_come_from_a_config_and_the_command_line_counts_more(tmp_path):
    first = parse(RUN + "--lr 0.3 --dense-layers fc conv1 --ema 0.9 --no-tf32 --save there --iters 3 --seed 5")
    path = config_of(tmp_path / "config.json", first)
    again = parse(f"--config {path} --seed 6")
    expected = vars(first) | {"save": None, "iters": 1, "seed": 6, "config": path}
    assert vars(again) == expected


def config_of(path, args):
    path.write_text(json.dumps({"command": "x", "versions": {}, "commit": None, **flags.values(args)}))
    return path


def test_the_presets_of_the_demo_count_more_than_a_config(tmp_path):
    path = config_of(tmp_path / "config.json", parse("--pre_train --epochs 3 --lr 0.3 --momentum 0.5"))
    given = parse(f"--config {path} --demo --momentum 0.7")
    assert (given.epochs, given.data, given.lr, given.momentum) == (parse("--demo").epochs, "digits", 0.3, 0.7)


def test_the_demo_again_from_its_config(tmp_path):
    path = config_of(tmp_path / "config.json", parse("--demo --seed 3"))
    assert vars(parse(f"--config {path}")) == vars(parse("--demo --seed 3")) | {"config": path}


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
    ],
)
def test_imagenet_from_a_config(tmp_path, changes, expected):
    first = imagenet_main.parse(shlex.split(IMAGENET))
    path = config_of(tmp_path / "config.json", first)
    again = imagenet_main.parse(shlex.split(f"--config {path} {changes}"))
    unasked = {"config": path, "local_rank": None, "resume": None}
    assert vars(again) == vars(first) | unasked | expected
    imagenet_main.check(again, imagenet_main.epoch_budget(again))


def test_a_config_of_the_other_script_names_what_does_not_fit(tmp_path):
    path = config_of(tmp_path / "config.json", parse(RUN))
    with pytest.raises(UsageError, match=r"this script has no flags .*'cycle_rate'"):
        imagenet_main.parse(["photos", "--config", str(path)])


def test_dense_training_has_neither_masks_nor_a_budget():
    args = parse("--pre_train --cyclic_train")
    assert flags.sparse_training(args, 10, 30) is None
    assert flags.plan(args, EpochBudget(3, 1, 1), lambda epoch: 0.1).final_density is None


def test_folder_of_a_run():
    args = parse(PUBLISHED["rigl"])
    path = flags.run_path(args, "ResNet50", "cifar100", EpochBudget.of_share(250, 0.1, 8))
    assert str(path) == (
        "saved_models/rigl/ResNet50/cifar100/cycle_num_8/pretrain_epoch_226/cyclic_epochs_24/density_0.05/M=3/"
        "ex_rate=0.5/seed41"
    )
    assert str(flags.run_path(parse("--save /a/b"), "m", "d", EpochBudget(1, 1, 1))) == "/a/b"


def test_values_of_the_flags_are_complete_and_plain():
    args = parse(RUN + "--save /a/b --resume c.pth")
    values = flags.values(args)
    assert json.loads(json.dumps(values)) == values
    assert values.keys() == vars(args).keys()
    assert (values["save"], values["resume"]) == ("/a/b", "c.pth")
    assert shlex.split(flags.command(["--save", "/a b"]))[-2:] == ["--save", "/a b"]


def test_a_resumed_run_may_move_but_not_change():
    def identity(call):
        return flags.identity(flags.values(parse(RUN + call)), main_suptickets.make_parser())

    first = identity("--save a --log-interval 5 --keep-tickets")
    assert first == identity("--save b --resume a --data-dir x --test-batch-size 7")
    for change in ("--seed 18", "--lr 0.2", "--model ResNet18", "--final-density 0.1", "--cyc_lr", "--amp bf16"):
        assert first != identity(change), change


OWN_MARKS = {
    main_suptickets: {
        flags.NO_EFFECT: ["data_dir", "demo", "iters", "log_interval", "mgpu", "recipe", "test_batch_size", "workers"],
        flags.OF_ONE_CALL: ["iters"],
        flags.ABOUT_MASKS: [],
        flags.ABOUT_TICKETS: ["cycle_rate"],
    },
    imagenet_main: {
        flags.NO_EFFECT: [
            "benchmark_inference", "benchmark_training", "evaluate", "gather_checkpoints", "local_rank", "master_port",
            "print_freq", "prof", "workers",
        ],
        flags.OF_ONE_CALL: ["local_rank"],
        flags.ABOUT_MASKS: ["density"],
        flags.ABOUT_TICKETS: ["cyclic_epochs", "pretrain_epoch"],
    },
}  # fmt: skip


@pytest.mark.parametrize("script", OWN_MARKS, ids=lambda script: script.__name__)
def test_marks_by_hand(script):
    parser = script.make_parser()
    own = flags.own_marks(parser)
    assert own == OWN_MARKS[script]
    for mark in flags.MARKS:
        assert flags.names_with(mark, own) == marked(parser, mark) | flags.names_with(mark, {})
    assert flags.names_with(flags.NO_EFFECT, {}) == {
        "config", "dry_run", "indicate_method", "keep_tickets", "resume", "save", "show_layers", "tensorboard", "wandb",
    }  # fmt: skip
    assert flags.names_with(flags.OF_ONE_CALL, {}) == {"config", "resume", "save"}
    about_masks, about_tickets = (flags.names_with(mark, {}) for mark in (flags.ABOUT_MASKS, flags.ABOUT_TICKETS))
    assert {"sparse", "growth", "final_density", "rm_first", "fix"} < about_masks
    assert {"pre_train", "cycle", "update_bn", "superposing_method"} < about_tickets
    assert about_masks & about_tickets == {"large_death_rate"}
    assert not {"ema", "seed", "lr", "multiplier", "amp"} & (about_masks | about_tickets)


def test_every_flag_is_looked_at(tiny_defaults, monkeypatch):
    """A flag changes what happens, or it does not exist."""
    seen = set()

    class Noticing(argparse.Namespace):
        def __getattribute__(self, name):
            seen.add(name)
            return super().__getattribute__(name)

    parse_before = main_suptickets.parse
    monkeypatch.setattr(main_suptickets, "parse", lambda argv: Noticing(**vars(parse_before(argv))))
    call = RUN + "--re_explore --cyc_lr --epochs 2 --cycle 1 --cycle_rate 0.5 --final-prune-epoch 1"
    assert run_cifar(call) == 0
    known = vars(parse_before([])).keys()
    # Three take effect while parsing, one is said to have none.
    assert known - seen <= {"config", "demo", "recipe", "workers"}


def test_every_choice_is_taken_from_its_table():
    """A new entry of a table is a new choice at once, and nothing else is one."""
    actions = main_suptickets.make_parser()._actions
    parser_choices = {action.dest: action.choices for action in actions if action.choices}
    tables = {
        "growth": GROWTH, "prune": PRUNE, "redistribution": REDISTRIBUTION, "sparse_init": SPARSE_INITS,
        "method": METHODS, "decay_schedule": DECAYS, "superposing_method": AVERAGING,
        "optimizer": main_suptickets.OPTIMIZERS,
    }  # fmt: skip
    assert {name: list(choices) for name, choices in parser_choices.items() if name in tables} == {
        name: list(table) for name, table in tables.items()
    }
    assert len(SPARSE_INITS) == 11
    assert set(METHODS) == {"DST", "GraNet", "GraNet_uniform", "GMP", "GMP_uniform"}
    assert set(PRUNE) == {"magnitude", "SET", "threshold", "global_magnitude"}
    assert set(GROWTH) == {"random", "gradient", "momentum", "momentum_neuron"}
    assert set(REDISTRIBUTION) == {"none", "nonzeros", "magnitude", "momentum"}


def test_the_data_flags_arrive(monkeypatch):
    class Seen(Exception):
        pass

    def load(name, **options):
        raise Seen(name, options)

    monkeypatch.setattr(main_suptickets, "load_data", load)
    call = "--data digits --valid_split 0.25 --batch-size 7 --test-batch-size 5 --seed 3 --data-dir there"
    with pytest.raises(Seen) as seen:
        main_suptickets.main(shlex.split(RUN + call))
    name, options = seen.value.args
    assert name == "digits"
    assert {"valid_split": 0.25, "batch_size": 7, "test_batch_size": 5, "seed": 3}.items() <= options.items()
    assert str(options["data_dir"]) == "there"
