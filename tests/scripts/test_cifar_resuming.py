"""The CIFAR script stopped by signals and resumed to the same bits."""

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import main_suptickets
import pytest

from helpers.cifar import SCRIPT, WHOLE_METHOD, assert_same_outcome, outcome, small_call, stop_in
from helpers.commands import one_sentence
from helpers.comparing import lines, tree
from helpers.processes import PATIENCE, environment, wait_until
from sparselearning.process.files import load_torch
from sparselearning.training.engine import Trainer


@pytest.mark.parametrize(
    ("step", "number", "code", "optimizer"),
    [
        (1, signal.SIGTERM, 143, "sgd"),
        (5, signal.SIGINT, 130, "sgd"),
        (6, signal.SIGTERM, 143, "sgd"),  # the last step of pre-training
        (9, signal.SIGINT, 130, "adam"),  # the last step of the first cycle
        (11, signal.SIGHUP, 129, "sgd"),
        (11, signal.SIGTERM, 143, "adam"),
    ],
)
def test_a_stopped_run_resumes_to_the_same_bits(
    script, monkeypatch, capsys, undisturbed, step, number, code, optimizer
):
    call = f"{WHOLE_METHOD} --optimizer {optimizer} --save run"
    with monkeypatch.context() as context:
        stop_in(context, step, number)
        assert script(call) == code
    told = one_sentence(capsys.readouterr().err)
    assert signal.Signals(number).name in told
    assert "--resume run" in told
    assert Path("run/checkpoint.pth").exists()
    assert not Path("run/summary.json").exists()
    assert len(lines("run/metrics.jsonl") if step > 3 else []) == (step - 1) // 3
    assert script(call, "--resume run") == 0
    assert_same_outcome(undisturbed[optimizer], "run")
    assert os.listdir() == ["run"]


@pytest.mark.parametrize("flags", ["--amp off", "--fp16 --growth momentum", "--amp bf16 --growth random"])
def test_on_a_gpu_too(gpu, script, monkeypatch, flags):
    call = f"{WHOLE_METHOD} --epochs 3 --cycle_rate 0.34 --deterministic {flags}"  # one cycle
    assert script(call, "--save whole") == 0
    with monkeypatch.context() as context:
        stop_in(context, 5, signal.SIGINT)
        assert script(call, "--save run") == 130
    assert script(call, "--save run --resume run") == 0
    assert_same_outcome("whole", "run")
    assert "GPU" in json.loads(Path("run/config.json").read_text())["device"]


def test_a_finished_run_resumes_to_itself(script):
    assert script(WHOLE_METHOD, "--save run") == 0
    before, files = outcome("run"), set(os.listdir("run"))
    assert script(WHOLE_METHOD, "--save run --resume run") == 0
    assert outcome("run") == before
    assert set(os.listdir("run")) == files
    assert os.listdir() == ["run"]


def test_a_run_can_go_on_in_another_folder(script, monkeypatch, undisturbed):
    with monkeypatch.context() as context:
        stop_in(context, 7, signal.SIGTERM)
        assert script(WHOLE_METHOD, "--save run") == 143
    before = tree("run")
    assert script(WHOLE_METHOD, "--save elsewhere --resume run/checkpoint.pth") == 0
    assert tree("run") == before
    assert_same_outcome(undisturbed["sgd"], "elsewhere")


def test_a_finished_run_can_be_resumed_into_another_folder(script, undisturbed):
    assert script(WHOLE_METHOD, "--save elsewhere --resume", undisturbed["sgd"]) == 0
    assert_same_outcome(undisturbed["sgd"], "elsewhere")


def test_the_second_of_several_seeds_goes_on_where_it_stopped(script, monkeypatch):
    assert script(WHOLE_METHOD, "--seed 18 --save whole") == 0
    with monkeypatch.context() as context:
        stop_in(context, 12 + 7, signal.SIGTERM)
        assert script(WHOLE_METHOD, "--iters 2 --save runs") == 143
    second = next(path for path in Path("runs").iterdir() if not (path / "summary.json").exists())
    assert json.loads((second / "config.json").read_text())["seed"] == 18
    assert script(WHOLE_METHOD, f"--seed 18 --save {second} --resume {second}") == 0
    assert_same_outcome("whole", second)


def test_a_stop_at_the_end_of_one_seed_does_not_start_the_next(script, monkeypatch):
    summary_of = Trainer._summary

    def summary_under_fire(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return summary_of(self)

    monkeypatch.setattr(Trainer, "_summary", summary_under_fire)
    assert script(WHOLE_METHOD, "--iters 2 --save runs") == 143
    assert len(os.listdir("runs")) == 1


def test_interrupted_before_training(script, monkeypatch, capsys):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(main_suptickets, "load_data", interrupt)
    assert script(WHOLE_METHOD, "--save run") == 130
    one_sentence(capsys.readouterr().err)
    assert os.listdir() == []


def test_a_process_that_is_told_to_stop(data, workplace):
    call = WHOLE_METHOD.replace("--epochs 4", "--epochs 400").replace("--cycle_rate 0.5", "--cycle_rate 0.25")
    words = small_call(data, "--execution masked --save run", call).split()
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, SCRIPT, *words], stdout=pipe, stderr=pipe, text=True, env=environment())
    try:
        wait_until(lambda: Path("run/metrics.jsonl").exists() or process.poll() is not None)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 143, err
    assert "continue with --resume run" in one_sentence(err)
    done = load_torch(Path("run/checkpoint.pth"))
    assert done["epoch"] < 400
    assert done["epoch"] == len(lines("run/metrics.jsonl"))
    assert not list(Path("run").glob("*.partial"))


def test_a_wrong_call_of_the_script_as_python_runs_it(workplace, monkeypatch, capsys):
    call = "--sparse --pre_train --cyclic_train --growth momentum --momentum 0 --save run"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *call.split()])
    monkeypatch.setattr(sys, "path", [*sys.path])  # which the script extends
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert one_sentence(err).startswith("main_suptickets.py: error: ")
    assert os.listdir() == []
