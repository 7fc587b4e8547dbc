"""The ImageNet script in one process, on generated JPEGs of 64 pixels and narrow networks, to save time."""

import json
import runpy
import shlex
import shutil

import main
import pytest
import torch
from imagenet_resnet import build_model

from helpers.commands import exit_code
from helpers.comparing import assert_identical, lines, results
from helpers.imagenet import NUM_CLASSES, SCRIPTS, TRAIN_IMAGES, write_images
from helpers.narrow_networks import narrow_networks
from helpers.tensors import active
from sparselearning import export
from sparselearning.process.errors import UsageError
from sparselearning.process.files import load_torch
from sparselearning.sparse.costs import layer_flops
from sparselearning.training import profiling
from sparselearning.training.run_folder import RunFolder
from sparselearning.training.runtime import Runtime

ARCH = "mobilenet_v3_small"
SMALL = shlex.split(
    f"--no-cuda --arch {ARCH} -b 4 -j 0 --lr 0.01 --sparse --method DST --init-density 0.2 --final-density 0.1 "
    "--update-frequency 2 --pre_train --cyclic_train --cyc_lr --lr_1 0.001 --lr_2 0.002 --bn_update --warmup 1 "
    "--label-smoothing 0.1 --pretrain_epoch 1 --cyclic_epochs 2 --cycle 1 --execution masked"  # no kernels to compile
)
DENSE = shlex.split(f"--no-cuda --arch {ARCH} -b 4 -j 0 --pre_train --pretrain_epoch 1 --cyclic_epochs 0 --cycle 1")


def run(*words):
    """Run the script, on images of 64 pixels unless it is told otherwise; return its exit code."""
    sizes = shlex.split("--train-crop-size 64 --val-resize-size 72 --val-crop-size 64")
    return exit_code(lambda: main.main([*sizes, *map(str, words)]))


@pytest.fixture(scope="module", autouse=True)
def narrow():
    with narrow_networks():
        yield


@pytest.fixture(scope="module")
def trained(home):
    keep = ["--gather-checkpoints", "--keep-tickets"]
    assert run(*SMALL, *keep, home / "imagenet2012", "--save", home / "trained") == 0
    return RunFolder(home / "trained")


def test_snip_says_that_it_cannot_rank_a_vision_transformer(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = "--arch vit_b_16 -b 4 -j 0 --no-cuda --sparse --method DST --sparse-init snip --show-layers"
    assert run(*shlex.split(flags), home / "imagenet2012") == 0
    assert "snip leaves no weight active in" in capsys.readouterr().err
    assert run(*shlex.split(flags.replace("vit_b_16", "resnet18")), home / "imagenet2012") == 0
    assert "snip leaves" not in capsys.readouterr().err


@pytest.mark.parametrize("arch", ["resnet18", "vit_b_16"])
def test_networks_of_torchvision(home, tmp_path, capsys, arch):
    """Trained, superposed, resumed bit by bit though they drop out units, costed, and exported."""
    small = [arch if word == ARCH else word for word in SMALL]
    sizes = shlex.split("--train-crop-size 32 --val-resize-size 40 --val-crop-size 32")
    flags = [*small, *sizes, "--execution", "auto", "--gather-checkpoints", home / "imagenet2012"]
    assert run(*flags, "--save", tmp_path / "whole") == 0
    printed, whole = capsys.readouterr(), RunFolder(tmp_path / "whole")
    assert printed.err.count("no BatchNorm statistics: there is nothing for --update_bn") == (arch == "vit_b_16")
    assert run(*flags, "--save", tmp_path / "again", "--resume", whole.epoch_checkpoint(2)) == 0
    assert_identical(results(tmp_path / "again"), results(whole.path))

    superposition, summary = load_torch(whole.previous), json.loads(whole.summary.read_text())
    size = sum(mask.numel() for mask in superposition["masks"].values())
    assert active(superposition["masks"]) == round(size * 0.1)
    assert 0 < summary["inference_flops_of_dense"] < summary["training_flops_of_dense"] < 1

    record = whole.read_config()["network"]
    assert record["arguments"] == {"arch": arch, "num_classes": NUM_CLASSES, "image_size": 32}
    export.main([str(whole.path), str(tmp_path / "packed.safetensors"), "--fold-bn"])
    packed, metadata = export.load_sparse(tmp_path / "packed.safetensors")
    folded = export.fold_batchnorms(export.build_network(record, superposition["state_dict"], whole.previous))
    assert all(torch.equal(packed[name], entry) for name, entry in folded.state_dict().items())
    assert metadata["folded_batchnorms"] == (6 if arch == "resnet18" else 0)


def test_batchnorms_of_depthwise_convolutions_are_folded_too(trained, tmp_path):
    export.main([str(trained.path), str(tmp_path / "packed.safetensors"), "--fold-bn"])
    assert export.load_sparse(tmp_path / "packed.safetensors")[1]["folded_batchnorms"] == 7  # of MobileNet, all


def test_sizes_of_images(home, tmp_path):
    sizes = shlex.split("--train-crop-size 32 --val-resize-size 60 --val-crop-size 48")
    assert run(*DENSE, *sizes, home / "imagenet2012", "--save", tmp_path / "run") == 0
    config = RunFolder(tmp_path / "run").read_config()
    assert config["network"]["input_shape"] == [3, 48, 48]
    assert config["network"]["arguments"]["image_size"] == 32
    with torch.device("meta"):
        flops = layer_flops(build_model(ARCH, NUM_CLASSES), (3, 32, 32))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["inference_flops"] == sum(flops.values())


def test_on_a_gpu_too(gpu, home, tmp_path):
    flags = [*SMALL[1:], "--cyclic_epochs", "1", "--deterministic", home / "imagenet2012"]
    assert run(*flags, "--gather-checkpoints", "--save", tmp_path / "whole") == 0
    whole = RunFolder(tmp_path / "whole")
    assert run(*flags, "--save", tmp_path / "again", "--resume", whole.epoch_checkpoint(1)) == 0
    assert_identical(results(tmp_path / "again"), results(whole.path))


def test_config_says_what_was_left_out_on_the_command_line(trained):
    config = trained.read_config()
    assert (config["density"], config["final_density"], config["epochs"]) == (0.1, 0.1, 3)


def test_every_epochs_checkpoint_is_kept_and_resumes_exactly(home, trained, tmp_path):
    assert [trained.epoch_checkpoint(epoch).exists() for epoch in range(5)] == [False, True, True, True, False]
    resume = [*SMALL, home / "imagenet2012", "--save", tmp_path / "again", "--resume", trained.epoch_checkpoint(2)]
    assert run(*resume) == 0
    assert_identical(results(tmp_path / "again"), results(trained.path))


def distance(state, other):
    return sum(float((state[name] - other[name]).norm() ** 2) for name in state if "weight" in name)


def test_training_goes_on_from_the_ticket_and_changes_it(trained):
    first, second = (load_torch(trained.ticket(number))["state_dict"] for number in (1, 2))
    between = load_torch(trained.epoch_checkpoint(2))
    assert all(torch.equal(between["state_dict"][name], first[name]) for name in first)
    assert 0 < distance(second, first) < 0.1 * distance(second, between["superposition"])


def test_evaluation_of_a_run_and_of_any_weights(home, trained, tmp_path, capsys):
    summary = json.loads(trained.summary.read_text())
    superposed = load_torch(trained.previous)["state_dict"]
    torch.save({f"module.{name}": entry for name, entry in superposed.items()}, tmp_path / "bare.pth")
    for weights, accuracy in (
        (["--resume", trained.path], summary["final_acc"]),
        (["--resume", trained.current], summary["ticket_acc"][-1]),
        (["--pretrained-weights", trained.previous], summary["final_acc"]),
        (["--pretrained-weights", tmp_path / "bare.pth"], summary["final_acc"]),
    ):
        capsys.readouterr()
        flags = ["--no-cuda", "--arch", ARCH, "-b", "4", "-j", "0", "--save", tmp_path / "run"]
        assert run(*flags, home / "imagenet2012", "--evaluate", *weights) == 0
        assert f"accuracy {accuracy:.2%}\n" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_pretrained_weights_are_where_training_starts(home, trained, tmp_path):
    flags = [*DENSE, "--lr", "0", "--pretrained-weights", trained.previous, "--save", tmp_path / "run"]
    assert run(*flags, home / "imagenet2012") == 0
    start, end = (load_torch(path)["state_dict"] for path in (trained.previous, tmp_path / "run" / "model_current.pth"))
    assert all(torch.equal(start[name], end[name]) for name in start if name.endswith(("weight", "bias")))


def test_cycles_alone_start_from_pretrained_weights(home, trained, tmp_path):
    cycles = [word for word in SMALL if word != "--pre_train"]
    flags = [*cycles, "--pretrained-weights", trained.previous, "--save", tmp_path / "run", "--keep-tickets"]
    assert run(*flags, home / "imagenet2012") == 0
    start = load_torch(tmp_path / "run" / "tickets" / "ticket_0.pth")["state_dict"]
    weights = load_torch(trained.previous)["state_dict"]
    assert all(torch.equal(start[name], weights[name]) for name in weights)


@pytest.mark.parametrize("epoch", [2, 3])
def test_a_run_goes_back_to_one_of_its_checkpoints(home, trained, tmp_path, epoch):
    """The later run moves aside, whole; what stands in its place is consistent, and in the end equal."""
    shutil.copytree(trained.path, tmp_path / "run")
    there, aside = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run.old-1")
    call = [*SMALL, "--keep-tickets", home / "imagenet2012", "--save", there.path]
    assert run(*call, "--resume", there.epoch_checkpoint(epoch)) == 0
    assert aside.epoch_checkpoint(3).read_bytes() == trained.epoch_checkpoint(3).read_bytes()
    for file in ("metrics", "tickets", "summary"):
        written, before = (getattr(folder, file).read_text().splitlines() for folder in (there, trained))
        assert len(written) == len(before)
    for file in ("current", "previous"):
        written, before = (load_torch(getattr(folder, file))["state_dict"] for folder in (there, trained))
        assert all(torch.equal(written[name], before[name]) for name in before)
    for number in range(3):
        written, before = (load_torch(folder.ticket(number))["state_dict"] for folder in (there, trained))
        assert all(torch.equal(written[name], before[name]) for name in before)
    assert load_torch(there.checkpoint)["epoch"] == 3


@pytest.mark.parametrize(
    ("flags", "printed"),
    [
        (["--benchmark-training", "--benchmark-inference"], ["training step", "loader", "evaluation step", "images/s"]),
        (["--prof", *SMALL], ["aten::", "convolution"]),
        (
            ["--arch", "resnet18", "--sparse", "--dense-layers", "fc", "--show-layers"],
            ["layer2.0.conv2.weight", "128x128x3x3", "by magnitude"],
        ),
        ([*SMALL, "--dry-run"], ["1 epoch of pre-training, then 2 cycles", "s a step", "saved_models"]),
    ],
    ids=["benchmarks", "profile", "layers", "plan"],
)
def test_what_is_done_in_place_of_training_writes_nothing(home, tmp_path, monkeypatch, capsys, flags, printed):
    monkeypatch.setattr(profiling, "WARMUP_STEPS", 1)
    monkeypatch.setattr(profiling, "STEPS", 1)
    monkeypatch.chdir(tmp_path)
    assert run("--no-cuda", "--arch", ARCH, "-b", "4", "-j", "0", *flags, home / "imagenet2012") == 0
    text = capsys.readouterr().out
    assert all(words in text for words in printed)
    assert list(tmp_path.iterdir()) == []


def damage(home, root):
    """A copy of the data set with one training image cut short; its path."""
    shutil.copytree(home / "imagenet2012", root)
    path = root / "train" / "n2" / "1.JPEG"
    path.write_bytes(path.read_bytes()[:200])
    return path


def test_a_damaged_image_is_left_out_and_counted(home, tmp_path, capsys):
    path = damage(home, tmp_path / "data")
    assert run(*DENSE, tmp_path / "data", "--save", tmp_path / "run") == 0
    assert f"left out damaged image {path}" in (message := capsys.readouterr().err)
    assert message.count("left out") == 1
    assert "; 1 so far" in message
    assert lines(tmp_path / "run" / "metrics.jsonl")[0]["samples"] == TRAIN_IMAGES - 1


def test_strict_data_stops_at_a_damaged_image(home, tmp_path, capsys):
    path = damage(home, tmp_path / "data")
    assert run(*DENSE, tmp_path / "data", "--save", tmp_path / "run", "--strict-data") == 1
    assert f"damaged image {path}" in capsys.readouterr().err


CONTRADICTIONS = {
    "--superposing_method greedy": "this script evaluates on its validation set alone",
    "--epochs 90 --pretrain_epoch 2 --cyclic_epochs 4": "--epochs 90 is not --pretrain_epoch 2 + --cyclic_epochs 4 = 6",
    "--density 0.2 --final-density 0.1": "--density 0.2 contradicts --final-density 0.1",
    "--pretrain_epoch 0 --cyclic_epochs 0": "no epochs at all",
    "--cyclic_epochs 6 --cycle 4": "--cyclic_epochs 6 is no whole number of --cycle 4 epochs",
    "--static-loss-scale 128": "loss scaling is for float16",
    "--dynamic-loss-scale": "loss scaling is for float16",
    "--fp16 --static-loss-scale 128 --dynamic-loss-scale": "one of --static-loss-scale and --dynamic-loss-scale",
    "--fp16": "float16 training needs a GPU",
    "--evaluate": "--evaluate needs weights",
    "--prof --dry-run": "give one of them",
    "--sparse --method GraNet --init-density 0.5 --density 0.6": "--final-density 0.6, which is above it",
    "--re_explore": "--re_explore is about masks",
    "--sparse --growth momentum --momentum 0": "need a --momentum above 0",
    "--sparse --init-prune-epoch 3 --final-prune-epoch 2": "before it starts at epoch 3",
    "--cyclic_epochs 4 --cycle 0": "at least 1, not 0",
    "--density 0": "must be a number in (0, 1], not 0",
    "--arch vit_b16": "unknown architecture 'vit_b16': the nearest of torchvision's",
    "--arch vit_b_16 -c fanin": "vit_b_16 starts as torchvision's: leave it out",
    "--arch vit_b_16 --train-crop-size 40": "vit_b_16 cannot be built for images of 40 pixels (Input shape indivisible",
    "--arch squeezenet1_1 --val-crop-size 8": "this network takes no images of 8 x 8 pixels",
    "--train-crop-size 8 -b 1": "BatchNorm cannot train on one image at a time",
    "--train-crop-size 0": "at least 1, not 0",
    "--val-crop-size 73": "--val-crop-size 73 cannot be cut out of images that --val-resize-size scales to 72",
    "--pretrained-weights nowhere.pth": "no file nowhere.pth",
    "--resume nowhere": "no file nowhere",
}


@pytest.mark.parametrize("flags", CONTRADICTIONS)
def test_wrong_calls_end_with_a_sentence_and_nothing_written(home, tmp_path, monkeypatch, capsys, flags):
    monkeypatch.chdir(tmp_path)
    base = shlex.split("--no-cuda --arch resnet18 -b 4 -j 0 --pre_train --cyclic_train")
    assert run(*base, *flags.split(), home / "imagenet2012") == 2
    (message,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
    assert CONTRADICTIONS[flags] in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("re_estimates", ["--bn_update", "--ema 0.9"])
def test_a_rank_with_one_image_to_re_estimate_batchnorm_on_is_refused(tmp_path, monkeypatch, re_estimates):
    """Of three images, the second of two ranks trains on two, one of them the first rank's too."""
    for split in ("train", "val"):
        write_images(tmp_path / split, classes=("a", "b", "c"), per_class=1)
    monkeypatch.setattr(main.distributed, "world_size", lambda: 2)
    monkeypatch.setattr(main.distributed, "rank", lambda: 1)
    sizes = "--train-crop-size 8 --val-resize-size 8 --val-crop-size 8"
    call = f"{tmp_path} --arch resnet18 -b 2 -j 0 --pre_train --cyclic_train {sizes} {re_estimates}"
    with pytest.raises(UsageError, match="BatchNorm cannot train on one image at a time"):
        main.set_up(main.parse(shlex.split(call)), Runtime(), torch.device("cpu"))


def test_neither_part_is_nothing_to_do(home, capsys):
    assert run("--no-cuda", home / "imagenet2012") == 2
    assert "nothing to do" in capsys.readouterr().err


def test_dense_training_names_the_given_flags_that_are_about_masks(capsys):
    assert run(*DENSE, "--density", 0.2, "--growth", "random", "nowhere") == 2
    note, _ = capsys.readouterr().err.splitlines()
    assert note.endswith("so that these have no effect: --growth, --density")


def test_missing_folders_are_named(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*DENSE, "nowhere") == 2
    assert "nowhere is not a folder" in capsys.readouterr().err
    (tmp_path / "half").mkdir()
    shutil.copytree(home / "imagenet2012" / "train", tmp_path / "half" / "train")
    assert run(*DENSE, "half") == 2
    assert "half/val" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["half"]


def test_weights_of_another_network_are_refused(home, trained, tmp_path, capsys):
    other = ["mobilenet_v3_large" if word == ARCH else word for word in DENSE]
    assert run(*other, "--pretrained-weights", trained.current, home / "imagenet2012", "--save", tmp_path / "run") == 2
    assert "holds weights of another model" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_other_script_is_the_same_program():
    assert runpy.run_path(str(SCRIPTS / "main_suptickets.py"))["main"].__code__.co_filename == main.__file__
