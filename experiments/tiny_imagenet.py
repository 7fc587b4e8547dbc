#!/usr/bin/env python3
"""The ImageNet script on photographs: RigL and GraNet in two processes on 20 classes of Tiny ImageNet, with controls.

python3 experiments/tiny_imagenet.py DIR    # DIR/train/CLASS/NAME.JPEG, DIR/val/CLASS/NAME.JPEG: hours of two cores

Give the same command again: finished runs are skipped, a stopped one is resumed. The records of finished runs go to
results/, and from there to the tables of RESULTS.md.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import study
from study import RESULTS, ROOT, WORK

from sparselearning.process import arguments
from sparselearning.process.errors import FaultError
from sparselearning.process.script import run_script
from sparselearning.training.run_folder import RunFolder

NAME = "tiny-imagenet"
SEEDS = (41, 42, 43)
# The lines of docs/imagenet.md that are consistent, a fifth as long, with as many updates.
SHARED = (
    "--sparse --sparse-init ERK --first_m 6 --second_m 12 --third_m 17 --init-prune-epoch 0 --final-prune-epoch 6 "
    "--growth gradient -j2 --arch resnet18 -c fanin --update-frequency 12 --label-smoothing 0.1 -b 32 --lr 0.1 "
    "--warmup 1 --density 0.1 --epochs 20 --train-crop-size 64 --val-resize-size 64 --val-crop-size 64 --pre_train"
)
METHODS = {"rigl": "--method DST --init-density 0.1", "granet": "--method GraNet --init-density 0.5"}
SCHEDULES = {
    "": "--pretrain_epoch 18 --cyclic_epochs 2 --cycle 1 --cyclic_train --bn_update --cyc_lr --lr_1 0.0001 "
    "--lr_2 0.0005 --large-death-rate 0.5",
    "-control": "--pretrain_epoch 20 --cyclic_epochs 0",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Do the runs one after the other.

    Raises:
        FaultError: if one of them fails.
    """
    parser = arguments.Parser(__doc__)
    parser.add_argument("data", metavar="DIR", type=arguments.path, help="the photographs")
    args: argparse.Namespace = parser.parse_args(argv)
    data = os.path.relpath(args.data, ROOT)
    os.chdir(ROOT)  # so that the commands that runs record work from the top of any checkout
    for seed, method, schedule in product(SEEDS, METHODS, SCHEDULES):
        folder = RunFolder(WORK / NAME / f"{method}{schedule}" / f"seed{seed}")
        if not folder.summary.is_file():
            print(f"{method}{schedule}, seed {seed}", flush=True)
            words = [*words_of(method, schedule, seed), "--save", str(folder.path), data]
            resume = ["--resume", str(folder.path)] if folder.checkpoint.is_file() else []
            launcher = [sys.executable, "ImageNet/multiproc.py", "--nproc_per_node", "2", "ImageNet/main.py"]
            if code := subprocess.run([*launcher, *words, *resume]).returncode:
                raise FaultError(f"{folder.path}: exit code {code}")
        study.collect(WORK / NAME, RESULTS / NAME)
    for page in filter(Path.is_file, study.PAGES):
        study.fill(page)


def words_of(method: str, schedule: str, seed: int) -> list[str]:
    """The flags of one run, but for folders."""
    line = f"{SHARED} {METHODS[method]} {SCHEDULES[schedule]} --indicate_method {method} --seed {seed}"
    return line.split()


if __name__ == "__main__":
    run_script(main)
