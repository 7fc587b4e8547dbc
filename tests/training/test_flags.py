"""The flags as they are declared: defaults, help, marks, choices."""

import re
import shlex
import sys
from pathlib import Path

import main as imagenet_main
import main_suptickets
import pytest
from cifar_data import DATASETS
from cifar_models import model_names

from helpers.cifar import parse
from helpers.commands import one_sentence
from sparselearning.process.arguments import marked
from sparselearning.sparse.schedules import DECAYS
from sparselearning.sparse.sparse_init import SPARSE_INITS
from sparselearning.sparse.superpose import AVERAGING
from sparselearning.sparse.topology import GROWTH, METHODS, PRUNE, REDISTRIBUTION
from sparselearning.training import flags

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
    assert flags.names_with(flags.OF_ONE_CALL, {}) == {"config", "resume", "save", "tensorboard"}
    about_masks, about_tickets = (flags.names_with(mark, {}) for mark in (flags.ABOUT_MASKS, flags.ABOUT_TICKETS))
    assert {"sparse", "growth", "final_density", "rm_first", "fix"} < about_masks
    assert {"pre_train", "cycle", "update_bn", "superposing_method"} < about_tickets
    assert about_masks & about_tickets == {"large_death_rate"}
    assert not {"ema", "seed", "lr", "multiplier", "amp"} & (about_masks | about_tickets)


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
