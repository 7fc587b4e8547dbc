"""What flags mean: epochs, rates, masks, the folder of a run."""

import argparse
import shlex

import main_suptickets
import pytest

from helpers.cifar import RUN, parse, run_cifar
from sparselearning.training import from_flags
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


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_lines(name, capsys):
    args = parse(PUBLISHED[name])
    main_suptickets.check(args)
    budget = EpochBudget.of_share(args.epochs, args.cycle_rate, args.cycle)
    assert (budget.pretrain_epochs, budget.cyclic_epochs, budget.tickets) == (226, 24, 3)
    assert (args.lr, args.lr_1, args.lr_2) == (0.1, 0.001, 0.005)
    plan = from_flags.plan(args, budget, main_suptickets.pretrain_lr(args, budget))
    assert [plan.lr(epoch, 0, 391) for epoch in (0, 112, 113, 168, 169, 225)] == pytest.approx(
        [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    )
    assert (plan.explore_rate, plan.updates_in_cycles, plan.final_density) == (0.5, False, 0.05)
    masking = from_flags.sparse_training(args, 391, budget.total_epochs).masking
    assert masking["total_steps"] == 250 * 391
    assert (masking["prune_start_step"], masking["prune_end_step"]) == (0, 110 * 391)
    assert masking["growth"] == ("random" if name == "set" else "gradient")


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
    masking = from_flags.sparse_training(args, steps_per_epoch=10, total_epochs=30).masking
    assert (masking["prune_start_step"], masking["prune_end_step"], masking["total_steps"]) == (60, 150, 300)
    assert masking["final_update_step"] == 120
    assert from_flags.sparse_training(parse(RUN), 10, 30).masking["final_update_step"] is None


def test_dense_training_has_neither_masks_nor_a_budget():
    args = parse("--pre_train --cyclic_train")
    assert from_flags.sparse_training(args, 10, 30) is None
    assert from_flags.plan(args, EpochBudget(3, 1, 1), lambda epoch: 0.1).final_density is None


def test_folder_of_a_run():
    args = parse(PUBLISHED["rigl"])
    path = from_flags.run_path(args, "ResNet50", "cifar100", EpochBudget.of_share(250, 0.1, 8))
    assert str(path) == (
        "saved_models/rigl/ResNet50/cifar100/cycle_num_8/pretrain_epoch_226/cyclic_epochs_24/density_0.05/M=3/"
        "ex_rate=0.5/seed41"
    )
    assert str(from_flags.run_path(parse("--save /a/b"), "m", "d", EpochBudget(1, 1, 1))) == "/a/b"


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
