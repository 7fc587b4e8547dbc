"""The published ImageNet lines in two processes."""

import contextlib
import io
import json
import shlex

import main as imagenet_main
import pytest

from helpers.comparing import assert_identical, lines, results
from helpers.imagenet import TRAIN_IMAGES, VAL_IMAGES
from helpers.narrow_networks import narrow_networks
from helpers.processes import PATIENCE, finished, free_port
from helpers.tensors import active
from sparselearning.process.files import load_torch
from sparselearning.training.run_folder import RunFolder

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
SMALL = "--train-crop-size 32 --val-resize-size 40 --val-crop-size 32"


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


def run_script(folder, words):
    """Run the script in a folder, in a process that is a rank already, on a narrow network; what it told on stderr."""
    told = io.StringIO()
    with narrow_networks(), pytest.MonkeyPatch.context() as context, contextlib.redirect_stderr(told):
        context.chdir(folder)
        imagenet_main.main(words)
    return told.getvalue()


def on_ranks(ranks, home, name, *more):
    """Run a line's script on ranks that stand ready, without its launcher and workers; return what rank 0 told."""
    words = words_of(shrunk(name), f"{SMALL} --execution masked")
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
    """Whose $1 is empty, as it is when pasted, and whose $2 lets the images trained on be smaller.

    It alone starts its launcher and the processes that decode images, and trains the whole network as users would.
    """
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
    return folder, on_ranks(ranks, home, "Granet", "--save", str(folder.path), "--gather-checkpoints")


def test_the_published_granet_line(granet):
    folder, told = granet
    assert f"note: {NOTES['Granet']}" in told
    check_published_run(folder, density=0.1)


def test_two_ranks_resume_exactly(ranks, home, granet, tmp_path):
    on_ranks(ranks, home, "Granet", "--save", str(tmp_path), "--resume", str(granet[0].epoch_checkpoint(1)))
    assert_identical(results(tmp_path), results(granet[0].path))
