"""The published ImageNet lines in two processes; ranks that are killed."""

import contextlib
import io
import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import main as imagenet_main
import pytest

from helpers.comparing import assert_identical, lines, results
from helpers.imagenet import TRAIN_IMAGES, VAL_IMAGES
from helpers.processes import PATIENCE, finished, free_port, marked_processes, on_linux, started, wait_until
from helpers.tensors import active
from sparselearning.process.files import load_torch
from sparselearning.training.run_folder import RunFolder

# --------------------------------------------------------------------------------------- the two published lines


PUBLISHED = {
    "Rigl": "python $1multiproc.py --nproc_per_node 2 $1main.py --sparse --sparse-init ERK --first_m 30 --second_m 60 "
    "--third_m 85 --method DST --init-prune-epoch 0 --final-prune-epoch 30 --init-density 0.5 --final-density 0.1 "
    "--multiplier 1 --growth gradient --seed 17 --master_port 7768 -j20 -p 500 --arch resnet50 -c fanin "
    "--update-frequency 4000 --label-smoothing 0.1 -b 64 --lr 0.1 --warmup 5 --density 0.1 $2 ../../imagenet2012/ "
    "--epochs 100 --indicate_method Rigl --cyclic_epochs 8 --pretrain_epoch 92 --pre_train --cyclic_train --bn_update "
    "--lr_2 0.0005 --lr_1 0.0001 --cycle 2 --large-death-rate 0.5 --cyc_lr",
}
PUBLISHED["Granet"] = (
    PUBLISHED["Rigl"]
    .replace("--method DST", "--method GraNet")
    .replace("--init-density 0.5", "--init-density 0.1")
    .replace("--indicate_method Rigl", "--indicate_method Granet")
)
EPOCHS = 3  # 2 of pre-training, then one cycle of 1
SMALL = "--train-crop-size 64 --val-resize-size 72 --val-crop-size 64"


def shrunk(name):
    """A published line with its numbers cut down to seconds of work, consistently, and a port that is free."""
    cut = {
        "--arch resnet50": "--arch resnet18",
        "-b 64": "-b 2",
        "--epochs 100": f"--epochs {EPOCHS}",
        "--pretrain_epoch 92": "--pretrain_epoch 2",
        "--cyclic_epochs 8": "--cyclic_epochs 1",
        "--cycle 2": "--cycle 1",
        "--warmup 5": "--warmup 1",
        "--first_m 30": "--first_m 1",
        "--second_m 60": "--second_m 2",
        "--third_m 85": "--third_m 3",
        "--final-prune-epoch 30": "--final-prune-epoch 1",
        "--update-frequency 4000": "--update-frequency 2",
        "--master_port 7768": f"--master_port {free_port()}",
    }
    line = PUBLISHED[name]
    for published, small in cut.items():
        assert line.count(f"{published} ") == 1
        line = line.replace(f"{published} ", f"{small} ")
    return line


def words_of(line, more=""):
    """The words of a line, the launcher first."""
    return shlex.split(line.replace("$1", "").replace("$2", more))[1:]


def quick(name):
    """The words of the same line, for a network and images that train in a second, without kernels to compile."""
    line = shrunk(name).replace("--arch resnet18 -c fanin", "--arch mobilenet_v3_small")
    return words_of(line, f"{SMALL} --execution masked")


def run_script(folder, words):
    """Run the script in a folder, in a process that is a rank already; return what it told on stderr."""
    with pytest.MonkeyPatch.context() as context, contextlib.redirect_stderr(io.StringIO()) as told:
        context.chdir(folder)
        imagenet_main.main(words)
    return told.getvalue()


def on_ranks(ranks, home, name, *more):
    """Run a line's script on ranks that stand ready, without its launcher and workers; return what rank 0 told."""
    words = quick(name)
    return ranks(run_script, home / "clone" / "ImageNet", [*words[words.index("main.py") + 1 :], "-j0", *more])[0]


def check_published_run(folder, density):
    """What any run with the published numbers leaves behind; ``density`` is the one that it trains at."""
    metrics, (ticket,) = lines(folder.metrics), lines(folder.tickets)
    assert [row["phase"] for row in metrics] == ["pretrain", "pretrain", "cycle"]
    assert [row["lr"] for row in metrics[:2]] == pytest.approx([0.05, 0.01])  # warm-up, first milestone
    assert [row["samples"] for row in metrics] == [TRAIN_IMAGES] * EPOCHS
    summary = json.loads(folder.summary.read_text())
    assert summary["superposed_acc"] == [summary["final_acc"]] == [ticket["superposed_acc"]]
    assert all(accuracy * VAL_IMAGES % 1 == 0 for accuracy in (summary["pretrain_acc"], summary["final_acc"]))
    assert json.loads(folder.config.read_text())["world_size"] == 2

    current, previous = load_torch(folder.current), load_torch(folder.previous)
    size = sum(mask.numel() for mask in current["masks"].values())
    assert active(current["masks"]) == round(size * density)
    assert active(previous["masks"]) == round(size * 0.1)
    # Weights that an update grew in the very last step are still zero: only then can a union fall short of it.
    available = round(size * ticket["union_density"])
    non_zeros = sum(int(previous["state_dict"][name].count_nonzero()) for name in previous["masks"])
    assert non_zeros == min(round(size * 0.1), available)
    assert summary["density"] == non_zeros / size
    for saved in (current, previous):
        assert all(not saved["state_dict"][name][~mask].any() for name, mask in saved["masks"].items())
    buffers = [
        value for state in load_torch(folder.checkpoint)["optimizer"]["state"].values() for value in state.values()
    ]
    assert sum(int(buffer.count_nonzero()) for buffer in buffers if buffer.dim() in (2, 4)) <= round(size * density)
    assert list(folder.path.rglob("*.partial")) == []


NOTES = {
    "Rigl": "DST keeps --init-density 0.5; only the superposition is cut to --final-density 0.1",
    "Granet": "GraNet has nothing to prune at --init-density = --final-density = 0.1",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_line_is_understood_as_it_stands(name):
    words = words_of(PUBLISHED[name])
    args = imagenet_main.parse(words[words.index("main.py") + 1 :])
    assert (args.arch, args.model_config, args.workers, args.print_freq) == ("resnet50", "fanin", 20, 500)
    assert (args.batch_size, args.label_smoothing, args.warmup, args.master_port) == (64, 0.1, 5, 7768)
    budget = imagenet_main.epoch_budget(args)
    assert (budget.pretrain_epochs, budget.cycle_epochs, budget.tickets) == (92, 2, 4)
    assert [warning for warning in imagenet_main.check(args, budget) if NOTES[name] in warning]


def test_the_published_rigl_line_pasted_into_a_shell(home):
    """Whose $1 is empty, as it is when pasted, and whose $2 lets the images trained on be smaller."""
    log = home / "Rigl.log"
    shell = ["sh", "-c", 'python() { "$PYTHON" "$@"; }; ' + shrunk("Rigl"), "sh", "", SMALL]
    assert finished(shell, log, home / "clone" / "ImageNet", 2 * PATIENCE) == 0, log.read_text()
    printed = log.read_text()
    assert f"note: {NOTES['Rigl']}" in printed
    assert "Traceback" not in printed
    saved_models = home / "clone" / "ImageNet" / "saved_models" / "Rigl" / "resnet18" / "imagenet2012"
    folder = "cycle_num_1/pretrain_epoch_2/cyclic_epochs_1/density_0.1/M=1/ex_rate=0.5/seed17"
    check_published_run(RunFolder(saved_models / folder), density=0.5)


@pytest.fixture(scope="module")
def granet(ranks, home):
    """The other published line: what its run left, and what it told."""
    folder = RunFolder(home / "granet")
    return folder, on_ranks(ranks, home, "Granet", "--save", str(folder.path))


def test_the_published_granet_line(granet):
    folder, told = granet
    assert f"note: {NOTES['Granet']}" in told
    check_published_run(folder, density=0.1)


# ------------------------------------------------------------------------------------------------- killed ranks


def rank_processes(launcher):
    """Process ids of a launcher's ranks, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (folder / "environ").read_bytes().split(b"\0") if parent == launcher.pid else []
        except OSError:  # it has just ended
            continue
        found |= {int(entry[5:]): int(folder.name) for entry in variables if entry.startswith(b"RANK=")}
    return found


def kill_when(launcher, rank, condition):
    """SIGKILL one rank as soon as something holds, while all still run."""
    wait_until(lambda: condition() or launcher.poll() is not None)
    ranks = wait_until(lambda: len(found := rank_processes(launcher)) == 2 and found)
    os.kill(ranks[rank], signal.SIGKILL)


@pytest.fixture(scope="module")
def killed(home):
    """That run by the launcher, whose rank 1 is killed in its second epoch: folder, exit status, seconds, output."""
    folder, log = RunFolder(home / "killed"), home / "killed.log"
    command = [sys.executable, *quick("Granet"), "--save", folder.path]
    with started(command, log, home / "clone" / "ImageNet") as launcher:
        kill_when(launcher, 1, folder.checkpoint.exists)
        assert len(marked_processes(log)) > 3  # the launcher, two ranks, and what they started
        began = time.monotonic()
        status = launcher.wait(120)
    return folder, status, time.monotonic() - began, log


@on_linux
def test_a_killed_rank_takes_the_job_down(killed):
    folder, status, seconds, log = killed
    printed = log.read_text()
    assert status != 0
    assert seconds < 60
    assert "process 1 of main.py failed with exit code -9" in printed
    assert "Traceback" not in printed
    assert 1 <= len(lines(folder.metrics)) < EPOCHS
    wait_until(lambda: not marked_processes(log), 30)  # neither ranks nor their workers stay


@on_linux
def test_a_killed_rank_leaves_whole_files(killed):
    files = [
        path
        for path in killed[0].path.rglob("*")
        if path.is_file() and path.suffix != ".partial" and path != killed[0].lock
    ]
    assert {path.name for path in files} >= {"config.json", "metrics.jsonl", "checkpoint.pth"}
    for path in files:
        if path.suffix == ".pth":
            load_torch(path)
        else:
            for text in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
                json.loads(text)


@on_linux
def test_a_killed_run_resumes_exactly(ranks, home, granet, killed):
    folder = killed[0].path
    on_ranks(ranks, home, "Granet", "--save", str(folder), "--resume", str(folder))
    assert_identical(results(folder), results(granet[0].path))
