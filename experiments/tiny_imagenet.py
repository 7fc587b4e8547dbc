#!/usr/bin/env python3
"""The ImageNet script on photographs: RigL and GraNet in two processes on 20 classes of Tiny ImageNet, with controls.

python3 experiments/tiny_imagenet.py DIR    # hours of two cores

DIR has 500 photographs DIR/train/CLASS/NAME.JPEG of each class, and 50 DIR/val/CLASS/NAME.JPEG: in the archive
tiny-imagenet-200 they lie in train/CLASS/images, and in val/images, whose classes are in val/val_annotations.txt.

Give the same command again: finished runs are skipped, a stopped one is resumed. The records of finished runs go to
results/, and from there to the tables of RESULTS.md.
"""

import os
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import study  # puts the folder of sweep on the path
import sweep
from study import RESULTS, ROOT, WORK

from sparselearning.process import arguments
from sparselearning.process.errors import UsageError
from sparselearning.process.script import run_script
from sparselearning.training.run_folder import RunFolder

NAME = "tiny-imagenet"
DATA = WORK / "tiny-imagenet-20"  # a link, so that the commands that runs record are the same everywhere
CLASSES = [
    "n01443537", "n01784675", "n02002724", "n02123045", "n02231487", "n02410509", "n02669723", "n02814533", "n02909870",
    "n03026506", "n03255030", "n03584254", "n03770439", "n03937543", "n04070727", "n04259630", "n04398044", "n04532670",
    "n07615774", "n07871810",
]  # fmt: skip
SEEDS = (41, 42, 43)
# The lines of docs/imagenet.md that are consistent, a fifth as long, with as many updates.
SHARED = (
    "--sparse-init ERK --first_m 6 --second_m 12 --third_m 17 --init-prune-epoch 0 --final-prune-epoch 6 "
    "-j2 --arch resnet18 -c fanin --update-frequency 12 --label-smoothing 0.1 -b 32 --lr 0.1 "
    "--warmup 1 --density 0.1 --epochs 20 --train-crop-size 64 --val-resize-size 64 --val-crop-size 64 --pre_train"
)
METHODS = ("rigl", "granet")
SCHEDULES = {
    "": "--pretrain_epoch 18 --cyclic_epochs 2 --cycle 1 --cyclic_train --bn_update --cyc_lr --lr_1 0.0001 "
    "--lr_2 0.0005 --large-death-rate 0.5",
    "-control": "--pretrain_epoch 20 --cyclic_epochs 0",
}


class Launched(sweep.Run):
    """One run of the ImageNet script in two processes."""

    @property
    def program(self) -> list[str]:
        """The launcher, and what it launches."""
        return ["ImageNet/multiproc.py", "--nproc_per_node", "2", "ImageNet/main.py"]


def main(argv: Sequence[str] | None = None) -> None:
    """Do the runs one after the other.

    Raises:
        UsageError: if the photographs are not those of the 20 classes.
        FaultError: if runs failed, after all others are done.
    """
    parser = arguments.Parser(__doc__)
    parser.add_argument("data", metavar="DIR", type=arguments.path, help="the photographs")
    photographs = parser.parse_args(argv).data.resolve()
    check(photographs)
    os.chdir(ROOT)  # so that the commands that runs record work from the top of any checkout
    DATA.parent.mkdir(exist_ok=True)
    DATA.unlink(missing_ok=True)
    DATA.symlink_to(photographs)
    runs = [planned(method, schedule, seed) for seed, method, schedule in product(SEEDS, METHODS, SCHEDULES)]
    failed = sweep.do(runs)
    study.collect(WORK / NAME, RESULTS / NAME)
    study.pages.publish(RESULTS)
    sweep.check_done(failed, runs)


def check(photographs: Path) -> None:
    """Refuse other photographs.

    Raises:
        UsageError: naming what is missing or too much.
    """
    for split, images in (("train", 500), ("val", 50)):
        for name in CLASSES:
            if (found := len([*(photographs / split / name).glob("*.JPEG")])) != images:
                raise UsageError(f"{photographs / split / name} has {found} JPEG files, not {images}")
        if others := {path.name for path in (photographs / split).iterdir()} - {*CLASSES}:
            raise UsageError(f"{photographs / split} has more than the 20 classes: {min(others)}")


def planned(method: str, schedule: str, seed: int) -> Launched:
    """One run in a folder of its own."""
    folder = RunFolder(WORK / NAME / f"{method}{schedule}" / f"seed{seed}")
    words = [*words_of(method, schedule, seed), "--save", str(folder.path), str(DATA)]
    return Launched(f"{method}{schedule} seed {seed}", words, folder)


def words_of(method: str, schedule: str, seed: int) -> list[str]:
    """The flags of one run, but for folders."""
    flags = sweep.METHODS[method].flags.format(density=0.1)
    return f"{SHARED} {flags} {SCHEDULES[schedule]} --indicate_method {method} --seed {seed}".split()


if __name__ == "__main__":
    run_script(main)
