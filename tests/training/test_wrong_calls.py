"""Wrong calls are one sentence and exit code 2 before anything is written; doubtful ones are warned about."""

import json
import os

import main_suptickets
import pytest

from helpers.cifar import RUN, parse, run_cifar
from helpers.commands import one_sentence
from sparselearning.process.errors import FaultError, UsageError
from sparselearning.training import flag_checks
from sparselearning.training.plan import EpochBudget

# --------------------------------------------------------------------------------------------------- wrong calls


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("--sparse --cycle-rate 0.1", "unrecognized arguments: --cycle-rate 0.1; did you mean --cycle_rate?"),
        ("--final-densty=0.1", "did you mean --final-density?"),
        ("--xyzzy", "unrecognized arguments: --xyzzy ("),
        ("--pre_train 3", "unrecognized arguments: 3 ("),
    ],
)
def test_a_wrong_flag_suggests_the_nearest(capsys, wrong, told):
    with pytest.raises(SystemExit) as end:
        parse(wrong)
    assert end.value.code == 2
    assert told in one_sentence(capsys.readouterr().err)


WRONG_CALLS = {
    # unknown names
    "--no-such-flag": "--no-such-flag",
    RUN + "--method RigL": "'RigL'",
    RUN + "--growth best": "'best'",
    RUN + "--prune all": "'all'",
    RUN + "--redistribution fair": "'fair'",
    RUN + "--sparse-init erk": "'erk'",
    RUN + "--decay-schedule step": "'step'",
    RUN + "--superposing_method EMA": "'EMA'",
    RUN + "--superposing_method greedy": "--valid_split",
    RUN + "--ema 1": "(0, 1)",
    RUN + "--ema 0": "(0, 1)",
    RUN + "--optimizer lamb": "'lamb'",
    RUN + "--amp fp8": "'fp8'",
    # numbers out of range, or none
    RUN + "--init-density 0": "(0, 1]",
    RUN + "--init-density 1.01": "(0, 1]",
    RUN + "--init-density nan": "(0, 1]",
    RUN + "--final-density -0.1": "(0, 1]",
    RUN + "--final-density half": "half",
    RUN + "--prune-rate 1.5": "[0, 1]",
    RUN + "--prune-rate -0.5": "[0, 1]",
    RUN + "--pruning-rate 2": "[0, 1]",
    RUN + "--large-death-rate 1.1": "[0, 1]",
    RUN + "--cycle_rate 1.2": "[0, 1]",
    RUN + "--cycle_rate -0.1": "[0, 1]",
    RUN + "--CIMA_factor 1.5": "[0, 1]",
    RUN + "--valid_split 1": "[0, 1)",
    RUN + "--momentum 1": "[0, 1)",
    RUN + "--lr nan": "nan",
    RUN + "--lr inf": "must be a number of at most 3.4e+38, not inf",
    RUN + f"--epochs {10**39}": f"must be a whole number of at most 3.4e+38, not {10**39}",
    RUN + "--lr -1": "-1",
    RUN + "--lr_1 -1": "-1",
    RUN + "--l2 -1": "-1",
    RUN + "--cycle 0": "--cycle",
    RUN + "--cycle 2.5": "--cycle",
    RUN + "--epochs 0": "--epochs",
    RUN + "--iters 0": "--iters",
    RUN + "--multiplier 0": "--multiplier",
    RUN + "--batch-size 0": "--batch-size",
    RUN + "--test-batch-size -1": "--test-batch-size",
    RUN + "--update-frequency 0": "--update-frequency",
    RUN + "--log-interval 0": "--log-interval",
    RUN + "--init-prune-epoch -1": "--init-prune-epoch",
    RUN + "--seed -1": "--seed",
    RUN + "--seed 17.5": "--seed",
    RUN + "--seed 99999999999999999999": "seed",
    # contradictions
    "--sparse": "nothing to do",
    "": "nothing to do",
    "--sparse --cyclic_train": "--resume",
    "--pre_train --cyclic_train --re_explore": "--sparse",
    "--pre_train --cyclic_train --no_maskupdates": "--sparse",
    RUN + "--init-density 0.1 --final-density 0.2": "--final-density",
    RUN + "--method GMP --init-density 0.1 --final-density 0.2": "--final-density",
    RUN + "--method GraNet_uniform --init-density 0.1 --final-density 0.2": "--final-density",
    RUN + "--init-prune-epoch 20 --final-prune-epoch 10": "epoch 10",
    RUN + "--growth momentum --momentum 0": "--momentum",
    RUN + "--growth momentum_neuron --momentum 0": "--momentum",
    RUN + "--redistribution momentum --momentum 0": "--momentum",
    RUN + "--fix --re_explore": "--fix",
    RUN + "--sparse-init prune_uniform": "--resume",
    RUN + "--sparse-init prune_and_grow_structured": "--resume",
    RUN + "--sparse-init resume": "--resume",
    RUN + "--fp16 --amp bf16": "--fp16",
    RUN + "--iters 2 --resume nowhere": "--iters",
    "--pre_train --sparse-init resume --iters 2 --resume nowhere": "--iters",  # dense: no mask takes the weights over
    # what is not there
    RUN + "--config=": "it is a path, not an empty text",  # as of a shell's variable that is not set
    RUN + "--resume nowhere": "nowhere",
    RUN + "--data nothing": "nothing",
    RUN + "--data nothing.npz": "nothing.npz",
    RUN + "--data .": "'.'",
    RUN + "--model ResNet51": "ResNet51",
    RUN + "--model cifar_resnet_9": "cifar_resnet_9",
    RUN + "--model lenet5 --data tiny.npz": "lenet5",
}


@pytest.mark.parametrize("call", WRONG_CALLS)
def test_a_wrong_call_is_one_sentence_and_exit_2_before_anything_is_written(call, tiny_defaults, capsys):
    assert run_cifar(call) == 2
    assert WRONG_CALLS[call] in one_sentence(capsys.readouterr().err)
    assert os.listdir(tiny_defaults) == ["tiny.npz"]


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        ("--model vgg-like --batch-size 1", 2),
        ("--model vgg-like --batch-size 2", 0),
        ("--model wrn-10-1 --batch-size 1", 0),
    ],
)
def test_single_images_are_refused_where_batchnorm_would_see_single_values(
    flags, code, tiny_defaults, monkeypatch, capsys
):
    """vgg-like's BatchNorm1d always does; the last BatchNorm of wrn-10-1 sees 2 x 2 pixels of these images."""
    started = []
    monkeypatch.setattr("sparselearning.training.experiment.run", lambda *args: started.append(args))
    assert run_cifar(f"--pre_train {flags}") == code
    assert len(started) == (code == 0)
    if code:
        assert "at least 2 per step" in one_sentence(capsys.readouterr().err)


def test_a_wrong_call_stops_all_of_iters(tiny_defaults, capsys):
    assert run_cifar(RUN + "--iters 3 --model lenet5") == 2
    one_sentence(capsys.readouterr().err)
    assert os.listdir(tiny_defaults) == ["tiny.npz"]


@pytest.mark.parametrize("flags", ["--growth momentum --momentum 0", "--model ResNet51", "--model wrn-15-2"])
def test_wrong_calls_do_not_wait_for_the_data(flags, tiny_defaults, monkeypatch):
    monkeypatch.setattr(main_suptickets, "load_data", lambda *args, **options: pytest.fail("data was loaded"))
    assert run_cifar(RUN + flags) == 2


def test_momentum_growth_with_adam_needs_no_momentum_flag():
    args = parse(RUN + "--growth momentum --momentum 0 --optimizer adam")
    assert not main_suptickets.check(args)


def test_a_denser_end_is_allowed_where_no_schedule_goes_there():
    main_suptickets.check(parse(RUN + "--method DST --init-density 0.1 --final-density 0.2"))


# ------------------------------------------------------------------------------------------------------ warnings


@pytest.mark.parametrize(
    ("call", "fragment"),
    [
        (RUN + "--method DST --init-density 0.5 --final-density 0.1", "DST"),
        (RUN + "--method GraNet --init-density 0.1 --final-density 0.1", "nothing to prune"),
        (RUN + "--sparse-init GMP --method GMP", "--init-density"),
        (RUN + "--fix", "--fix"),
    ],
)
def test_doubtful_flags_are_warned_about(call, fragment):
    warnings = main_suptickets.check(parse(call))
    assert any(fragment in warning for warning in warnings)


@pytest.mark.parametrize(
    "call",
    [
        RUN,
        RUN + "--method DST --init-density 0.05",
        "--pre_train",
        RUN + "--method DST --init-density 0.5 --sparse-init resume --resume there",
        "--sparse --cyclic_train --resume there --method DST --init-density 0.5 --final-density 0.1",
    ],
)
def test_sound_flags_are_not(call):
    assert main_suptickets.check(parse(call)) == []


def test_dense_training_names_the_given_flags_that_are_about_masks(tiny_defaults, monkeypatch, capsys):
    monkeypatch.setattr("sparselearning.training.experiment.run", lambda *args: None)

    def notes(call):
        assert run_cifar(call) == 0
        return [line for line in capsys.readouterr().err.splitlines() if "--sparse" in line]

    call = "--pre_train --method GraNet --lr 0.1 --init-density 0.5 --sparse-init ERK --large-death-rate 0.8 --fix"
    (note,) = notes(call)
    assert note.endswith("no effect: --sparse-init, --init-density, --method, --fix, --large-death-rate")
    assert notes("--pre_train --lr 0.1") == []
    assert notes(call.replace("--fix", "--sparse")) == []
    assert notes("--demo --method DST --init-density 0.05") == []


@pytest.mark.parametrize(
    ("epochs", "rates"),
    [(1, [0.1]), (2, [0.1, 0.001]), (3, [0.1, 0.01, 0.001]), (4, [0.1, 0.1, 0.01, 0.001])],
)
def test_a_milestone_at_epoch_0_does_not_count(epochs, rates):
    rate = main_suptickets.pretrain_lr(parse(""), EpochBudget(epochs, 8, 0))
    assert [rate(epoch) for epoch in range(epochs)] == pytest.approx(rates)


def test_a_pruning_window_past_pretraining_is_warned_about():
    args = parse(RUN + "--final-prune-epoch 6 --multiplier 2")
    assert flag_checks.pruning_window_warning(args, 12) == []
    assert "epoch 12, after pre-training, which ends at epoch 11" in flag_checks.pruning_window_warning(args, 11)[0]
    assert flag_checks.pruning_window_warning(parse(RUN + "--method DST"), 11) == []


def test_too_few_epochs_for_a_cycle_are_told():
    args = parse(RUN + "--epochs 30")
    assert EpochBudget.of_share(30, 0.2, 8) == EpochBudget(30, 8, 0)
    assert "8 epochs" in flag_checks.check_budget(args, EpochBudget(30, 8, 0))[0]
    assert "(1 epoch)" in flag_checks.check_budget(args, EpochBudget(30, 1, 0))[0]
    assert flag_checks.check_budget(args, EpochBudget(22, 8, 1)) == []
    assert flag_checks.check_budget(parse("--sparse --pre_train"), EpochBudget(30, 8, 0)) == []


# --------------------------------------------------------------------------------------- what flags mean and do


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ({"lr": 0.1, "learning_rate": 0.1}, UsageError, "no flags 'learning_rate'"),
        ({"lr": "fast"}, FaultError, "lr"),
        (None, UsageError, "no such file"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, content, error, message):
    if content is not None:
        (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(error, match=message):
        parse(f"--config {tmp_path / 'config.json'} {RUN}")


@pytest.mark.parametrize(("text", "said"), [("--method GMP", "GMP only prunes"), ("--fix", "--fix freezes")])
def test_a_last_update_is_nothing_to_what_never_grows(text, said):
    warnings = main_suptickets.check(parse(RUN + f"--final-update-epoch 3 {text}"))
    assert [said in warning for warning in warnings if "--final-update-epoch" in warning] == [True]


def test_number_formats_that_need_a_gpu_say_so(tiny_defaults, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run_cifar(RUN + "--fp16") == 2
    assert "GPU" in one_sentence(capsys.readouterr().err)
    assert run_cifar(RUN + "--mgpu") == 2
    assert "--mgpu" in one_sentence(capsys.readouterr().err)
    assert os.listdir(tiny_defaults) == ["tiny.npz"]


def test_more_processes_than_gpus_say_so(monkeypatch):
    from sparselearning.process import distributed

    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UsageError, match=r"2 processes .* 1 GPU"):
        distributed.check_gpus(2)
