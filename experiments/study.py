#!/usr/bin/env python3
"""Do the runs of RESULTS.md, keep their records in results/, and fill in the tables of the pages and their picture.

python3 experiments/study.py cifar100-10k            # some hours of a CPU
python3 experiments/study.py cifar100 --gpus 0 1     # the README's lines for ResNet50, one run per GPU at a time
python3 experiments/study.py claim --prepare         # its part of the data, study/cifar100-claim.npz, and nothing else

Give the same command again: finished runs are skipped, stopped ones are resumed.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "CIFAR"), str(ROOT)]

import cifar_data  # noqa: E402  found once its folder is on the path
import networks  # noqa: E402
import pages  # noqa: E402
import sweep  # noqa: E402

from sparselearning import analyze  # noqa: E402
from sparselearning.process import arguments  # noqa: E402
from sparselearning.process.errors import UsageError  # noqa: E402
from sparselearning.process.files import check_output, copy_whole, write_json, write_whole  # noqa: E402
from sparselearning.process.script import run_script  # noqa: E402
from sparselearning.reporting.runs import find_runs, read_run  # noqa: E402
from sparselearning.training.run_folder import RunFolder  # noqa: E402

WORK = Path("study")
RESULTS = Path("results")


class Experiment(NamedTuple):
    """Runs of one table.

    Attributes:
        methods: names in ``sweep.METHODS``.
        control: train plainly beside them, too.
        flags: on top of the study's; ``{before}`` is replaced by the folder of the study's experiments, ``{seed}`` by
            the run's seed.
        without: the study's switches to leave out.
        seeds: in place of the study's.
        analysis: in place of the study's.
    """

    methods: Sequence[str]
    control: bool = False
    flags: str = ""
    without: Sequence[str] = ()
    seeds: tuple[int, ...] | None = None
    analysis: str | None = None


class Subset(NamedTuple):
    """A part of CIFAR-100, the same always: some classes, some training images of each, and images to test on.

    Attributes:
        name: of its file.
        classes: how many; the first in the order of the labels.
        images_per_class: how many to train on, drawn at random.
        pixels: their height and width, a divisor of 32, if blocks of pixels are averaged.
        rest: which of each class's training images that were not drawn are test images, too.
        test_images: CIFAR-100's own test images are test images.
    """

    name: str
    classes: int
    images_per_class: int
    pixels: int | None = None
    rest: slice = slice(0)
    test_images: bool = True

    def of(self, whole: cifar_data.Arrays) -> cifar_data.Arrays:
        """Draw it from all of CIFAR-100."""
        generator = np.random.default_rng(0)
        labels = range(self.classes)
        shuffled = [generator.permutation(np.flatnonzero(whole.y_train == label)) for label in labels]
        train = np.sort(np.concatenate([indices[: self.images_per_class] for indices in shuffled]))
        rest = np.sort(np.concatenate([indices[self.images_per_class :][self.rest] for indices in shuffled]))
        test = np.flatnonzero(whole.y_test < self.classes) if self.test_images else np.arange(0)
        return cifar_data.Arrays(
            self._shrunk(whole.x_train[train]),
            whole.y_train[train],
            self._shrunk(np.concatenate([whole.x_test[test], whole.x_train[rest]])),
            np.concatenate([whole.y_test[test], whole.y_train[rest]]),
        )

    @property
    def path(self) -> Path:
        """Where it lies."""
        return WORK / f"{self.name}.npz"

    @property
    def test_set(self) -> str:
        """Its test images, for people."""
        shrunk = f", averaged down to {self.pixels} x {self.pixels} pixels" if self.pixels else ""
        taken = len(range(50_000 // 100 - self.images_per_class)[self.rest])
        parts = [
            *(["CIFAR-100's test images"] if self.test_images else []),
            *([f"{taken} of the training images of each that were not drawn to train on"] if taken else []),
        ]
        return f"of the first {self.classes} classes of CIFAR-100: {' and '.join(parts)}{shrunk}"

    def _shrunk(self, images: np.ndarray) -> np.ndarray:
        """Average blocks of pixels of images [N, H, H, 3], uint8."""
        if self.pixels is None:
            return images
        block = images.shape[1] // self.pixels
        blocks = images.reshape(len(images), self.pixels, block, self.pixels, block, 3)
        return np.round(blocks.mean((2, 4))).astype(np.uint8)


@dataclass(frozen=True)
class Study:
    """Experiments that share flags, data and seeds.

    Attributes:
        flags: of all runs.
        experiments: by name, in the order in which they run.
        seeds: of each.
        subset: of CIFAR-100; None: all of it.
        analysis: flags of ``sparselearning.analyze``, for each run.
        kept: experiments whose networks stay in the results: of each method, the first seed's. They need a subset.
    """

    flags: str
    experiments: dict[str, Experiment]
    seeds: tuple[int, ...] = (41, 42, 43)
    subset: Subset | None = None
    analysis: str = "--grid --points 3"
    kept: Sequence[str] = ()


MAIN = "{before}/main/granet"
MAIN_OF_CLAIM = f"{WORK}/claim/main/granet"
"""Runs whose pre-trained networks cycles alone start from: of the same study, or of ``claim``."""


def cycles_again(
    flags: str = "", without: Sequence[str] = (), analysis: str | None = None, source: str = MAIN
) -> Experiment:
    """Cycles alone, from the pre-trained networks of the runs in ``source``, whose folder is named after their method.

    They start without momentum: compare them with ``cycles_again()``, which has the flags of ``main`` itself.
    """
    return Experiment(
        [Path(source).name],
        flags=f"{flags} --resume {source}/seed{{seed}}/tickets/ticket_0.pth",
        without=["--pre_train", *without],
        analysis=analysis,
    )


WITHOUT_GRID = "--points 2 --on test --corruptions"
"""What is measured of runs with dozens of tickets, whose grid of averages would take hours, and of runs beside them."""


def swa_flags(rate: float) -> str:
    """Stochastic weight averaging (Izmailov et al. 2018, algorithm 1) for as many epochs as the cycles take.

    A constant rate, and the mean of the pre-trained network and that of every epoch since; without ``--re_explore``.
    """
    # 24 of 250 epochs, as three cycles of 8 are: of a tenth of them, 25, none is left over by cycles of one.
    return f"--cycle 1 --cycle_rate 0.096 --lr_1 {rate} --lr_2 {rate} --superposing_method CAA"


def swa(rate: float, analysis: str = WITHOUT_GRID, source: str = MAIN) -> Experiment:
    """Stochastic weight averaging from pre-trained networks, as other :func:`cycles_again`."""
    return cycles_again(swa_flags(rate), ["--re_explore"], analysis, source)


TICKETS = (
    "--pre_train --cyclic_train --re_explore --no_maskupdates --cyc_lr --lr_1 0.001 --lr_2 0.005 --update_bn "
    "--large-death-rate 0.5"
)
SHORT = "--update-frequency 100 --final-density 0.1 --batch-size 32 --lr 0.05 --test-batch-size 100"
TEN_THOUSAND = Subset("cifar100-10k", classes=100, images_per_class=100)
CLAIM = Subset("cifar100-claim", classes=10, images_per_class=75, pixels=16, rest=slice(200))
FITTED = (
    f"{TICKETS} --model cifar_resnet_20_48 --epochs 250 --cycle 8 --cycle_rate 0.1 --decay-schedule constant "
    "--sparse-init ERK --update-frequency 26 --batch-size 60 --prune-rate 0.5 --prune magnitude --final-density 0.05 "
    "--valid_split 0.2 --ema 0.999 --keep-tickets"
)
"""The published flags, with batches and updates scaled to 600 images, which the network fits (RESULTS.md)."""


def candidate(flags: str, explores: bool = False) -> Experiment:
    """Other cycles from the pre-trained networks of ``claim``, to choose by images that it does not test on."""
    return cycles_again(flags, without=[] if explores else ["--re_explore"], source=MAIN_OF_CLAIM)


STUDIES = {
    "cifar100-10k": Study(
        flags=f"{TICKETS} {SHORT} --model cifar_resnet_20 --epochs 20 --cycle 1 --cycle_rate 0.2 --final-prune-epoch 8 "
        "--keep-tickets",
        experiments={
            "main": Experiment(["granet", "rigl", "set"], control=True),
            "again": cycles_again(),
            "no-exploration": cycles_again(without=["--re_explore"]),
            "mask-updates": cycles_again(without=["--no_maskupdates"]),
            "no-exploration-rate-0.05": cycles_again("--lr_2 0.05", without=["--re_explore"]),
            "density-0.05": Experiment(["granet"], control=True, flags="--final-density 0.05"),
            "wider": Experiment(["granet"], control=True, flags="--model cifar_resnet_20_24"),
        },
        subset=TEN_THOUSAND,
    ),
    "cifar100-20": Study(
        flags=f"{TICKETS} {SHORT} --model cifar_resnet_20 --epochs 75 --cycle 3 --cycle_rate 0.2 "
        "--final-prune-epoch 20 --keep-tickets",
        experiments={
            "main": Experiment(["granet"], control=True),
            "again": cycles_again(),
            "no-exploration": cycles_again(without=["--re_explore"]),
            "rate-0.05": cycles_again("--lr_2 0.05"),
            "no-exploration-rate-0.05": cycles_again("--lr_2 0.05", without=["--re_explore"]),
            "more-tickets-rate-0.05": cycles_again("--lr_2 0.05 --cycle 1", without=["--re_explore"]),
            "one-ticket-rate-0.05": cycles_again("--lr_2 0.05 --cycle 15", without=["--re_explore"]),
        },
        subset=Subset("cifar100-20", classes=20, images_per_class=250),
    ),
    "claim": Study(
        flags=FITTED,
        experiments={
            "main": Experiment(["granet"], control=True, seeds=(41, 42, 43, 44, 45)),
            "methods": Experiment(["rigl", "set"], control=True),
            "again": cycles_again(),
            "no-exploration": cycles_again(without=["--re_explore"]),
            "rate-0.05": cycles_again("--lr_2 0.05"),
            "no-exploration-rate-0.05": cycles_again("--lr_2 0.05", without=["--re_explore"]),
            "one-cycle": cycles_again("--cycle 24"),
            "one-cycle-no-exploration-rate-0.05": cycles_again("--cycle 24 --lr_2 0.05", without=["--re_explore"]),
            "swa": swa(0.005),
            "swa-rate-0.05": swa(0.05),
        },
        subset=CLAIM,
        analysis="--grid --points 3 --on test --corruptions",
        kept=["main", "methods"],
    ),
    "recipe": Study(
        flags=FITTED,
        experiments={
            "again": candidate("", explores=True),
            "rate-0.02": candidate("--lr_2 0.02"),
            "rate-0.05": candidate("--lr_2 0.05"),
            "rate-0.1": candidate("--lr_2 0.1"),
            "rate-0.05-cycles-of-12": candidate("--lr_2 0.05 --cycle 12"),
            "rate-0.05-cycles-of-4": candidate("--lr_2 0.05 --cycle 4"),
            "rate-0.05-cycles-of-2": candidate("--lr_2 0.05 --cycle 2"),
            "rate-0.05-explore-0.1": candidate("--lr_2 0.05 --large-death-rate 0.1", explores=True),
            "rate-0.05-explore-0.3": candidate("--lr_2 0.05 --large-death-rate 0.3", explores=True),
            **{f"swa-rate-{rate}": swa(rate, "--points 2 --on test", MAIN_OF_CLAIM) for rate in (0.02, 0.05, 0.1)},
            "twice-the-cycles-rate-0.05": Experiment(
                ["granet"], flags="--cycle_rate 0.2 --lr_2 0.05", without=["--re_explore"]
            ),
        },
        seeds=(41, 42, 43, 44, 45),
        # The training images of claim, and those that it neither trains nor tests on.
        subset=CLAIM._replace(name="cifar100-recipe", rest=slice(200, None), test_images=False),
        analysis="--grid --points 2 --on test",
    ),
    "recipe-test": Study(
        flags=FITTED,
        experiments={
            "published": Experiment(["granet"], control=True),
            "swa-rate-0.1": Experiment(["granet"], flags=swa_flags(0.1), without=["--re_explore"]),
            # Other methods, from the pre-trained networks of claim.
            **{
                f"swa-rate-0.1-{method}": swa(0.1, source=f"{WORK}/claim/methods/{method}")._replace(seeds=(41, 42, 43))
                for method in ("rigl", "set")
            },
        },
        seeds=(61, 62, 63, 64, 65),
        subset=CLAIM,
        analysis=WITHOUT_GRID,
    ),
    "number-formats": Study(
        flags=f"{TICKETS} {SHORT} --model cifar_resnet_8 --epochs 4 --cycle 1 --cycle_rate 0.5 --final-prune-epoch 1",
        experiments={
            "float32": Experiment(["granet"], flags="--amp off --no-tf32 --no-channels-last"),
            "channels-last": Experiment(["granet"], flags="--amp off --no-tf32"),
            "bfloat16": Experiment(["granet"], flags="--amp bf16"),
            "bfloat16-compiled": Experiment(["granet"], flags="--amp bf16 --compile"),
        },
        subset=TEN_THOUSAND,
    ),
    "execution": Study(
        flags=f"{TICKETS} --model cifar_resnet_20 --epochs 10 --cycle 1 --cycle_rate 0.2 --sparse-init ERK "
        "--update-frequency 500 --batch-size 128 --lr 0.1 --prune-rate 0.5 --prune magnitude --final-density 0.05",
        experiments={
            "sparse": Experiment(["rigl"], flags="--execution sparse"),
            "masked": Experiment(["rigl"], flags="--execution masked"),
        },
    ),
    "cifar100": Study(
        flags=f"{TICKETS} --model ResNet50 --epochs 250 --cycle 8 --cycle_rate 0.1 --decay-schedule constant "
        "--sparse-init ERK --update-frequency 1000 --batch-size 128 --prune-rate 0.5 --prune magnitude "
        "--final-density 0.05 --keep-tickets --compile",
        experiments={"main": Experiment(["granet", "rigl", "set"], control=True)},
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a study's experiments, one after the other.

    Raises:
        UsageError: if the data are not CIFAR-100, networks to start from are still to be trained, or matplotlib is
            missing.
        FaultError: if they cannot be read, or runs failed.
    """
    args = parse(argv)
    study = STUDIES[args.study]
    data = args.data if args.data in cifar_data.DATASETS else os.path.relpath(os.path.expanduser(args.data), ROOT)
    data_dir = Path(os.path.relpath(args.data_dir, ROOT))
    os.chdir(ROOT)  # so that the commands that runs record work from the top of any checkout
    if not args.collect:
        data = prepared(data, data_dir, study.subset)
    if args.prepare:
        print(data)
        return
    for name in args.only or study.experiments:
        out = WORK / args.study / name
        if not args.collect:
            seeds = args.seeds or study.experiments[name].seeds or study.seeds
            words = sweep_words(study, name, out, seeds, args.gpus)
            check_starts(words, seeds)
            sweep.main([*words, "--data", data, "--data-dir", str(data_dir)])
            for run in map(RunFolder, runs_under(out)):
                if run.read_config()["seed"] in seeds and run.ticket(0).is_file() and not run.analysis.is_file():
                    analyze.main([str(run.path), *(study.experiments[name].analysis or study.analysis).split()])
        collect(out, RESULTS / args.study / name)
        if name in study.kept:
            keep_networks(args.study, name)
    pages.publish(RESULTS)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = arguments.Parser(__doc__)
    parser.add_argument("study", choices=STUDIES, help=f"one of {', '.join(STUDIES)}")
    parser.add_argument("--data", default="cifar100", help="CIFAR-100: to be downloaded, or an .npz file of it")
    parser.add_argument(
        "--data-dir", type=arguments.path, default=Path("data"), metavar="DIR", help="where downloads go"
    )
    parser.add_argument(
        "--gpus", nargs="+", metavar="ID",
        help="as for sweep.py; on a machine without, as many runs at a time as there are names",
    )  # fmt: skip
    names = sorted({name for study in STUDIES.values() for name in study.experiments})
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"any of {', '.join(names)}")
    parser.add_argument("--seeds", type=arguments.seed, nargs="+", metavar="SEED", help="in place of the study's own")
    parser.add_argument("--prepare", action="store_true", help="run nothing, only write the study's part of the data")
    parser.add_argument("--collect", action="store_true", help="run nothing, only gather what there is")
    args = parser.parse_args(argv)
    if args.collect and args.prepare:
        raise UsageError("--prepare comes before the runs, and --collect after them: give one of them")
    if args.collect and args.seeds:
        raise UsageError("--collect gathers the runs of all seeds: leave out --seeds")
    if missing := [name for name in args.only or () if name not in STUDIES[args.study].experiments]:
        raise UsageError(f"{args.study} has no experiment {missing[0]}")
    return args


def sweep_words(
    study: Study, name: str, out: Path, seeds: Sequence[int], gpus: Sequence[str] | None = None
) -> list[str]:
    """What sweep.py has to be told to do one experiment, but for the data."""
    one = study.experiments[name]
    shared = [word for word in study.flags.split() if word not in one.without]
    return [
        "--seeds", *map(str, seeds), "--methods", *one.methods, *(["--control"] if one.control else []),
        *(["--gpus", *gpus] if gpus else []), "--out", str(out),
        "--", *shared, *one.flags.replace("{before}", str(out.parent)).split(),
    ]  # fmt: skip


def check_starts(words: Sequence[str], seeds: Sequence[int]) -> None:
    """Refuse cycles alone before the networks are there that they start from.

    Raises:
        UsageError: naming the experiment that trains them.
    """
    if "--resume" not in words:
        return
    template = words[list(words).index("--resume") + 1]
    for path in (Path(template.replace("{seed}", str(seed))) for seed in seeds):
        if not path.is_file():
            study, experiment = path.parts[1:3]
            raise UsageError(f"there is no {path} to start from: {study} --only {experiment} trains it")


def prepared(data: str, data_dir: Path, subset: Subset | None) -> str:
    """Return the ``--data`` of a study's runs; write its part of the data, unless that is there already.

    Raises:
        UsageError: if the data are not CIFAR-100.
        FaultError: if they cannot be read.
    """
    if subset and subset.path.is_file():
        return str(subset.path)
    whole, num_classes = cifar_data.load_arrays(data, data_dir)
    images = len(whole.y_train)
    if (images, num_classes) != (50_000, 100):
        raise UsageError(f"{data} is not CIFAR-100: it has {images:,} training images of {num_classes} classes")
    if subset is None:
        return data
    write_whole(subset.path, lambda file: np.savez_compressed(file, **subset.of(whole)._asdict()))
    return str(subset.path)


def runs_under(folder: Path) -> list[Path]:
    """Run folders in a folder, which need not exist yet."""
    try:
        return find_runs([folder])
    except UsageError:
        return []


def collect(source: Path, target: Path) -> None:
    """Copy the records of finished runs, but no networks, nor how to build them.

    Raises:
        UsageError: if anything but an earlier copy is there.
    """
    for path in runs_under(source):
        run, kept = RunFolder(path), RunFolder(target / path.relative_to(source))
        if not run.summary.is_file():
            continue
        check_output(kept.config, '"versions"')
        write_json(kept.config, {name: value for name, value in run.read_config().items() if name != "network"})
        for there, here in zip(_text_files(run), _text_files(kept), strict=True):
            if there.is_file():
                copy_whole(there, here)


def _text_files(run: RunFolder) -> list[Path]:
    return [run.summary, run.metrics, run.tickets, run.analysis]


def keep_networks(name: str, experiment: str) -> None:
    """Write the networks to take away of an experiment's finished runs."""
    study = STUDIES[name]
    one, subset = study.experiments[experiment], study.subset
    assert subset is not None
    seed = (one.seeds or study.seeds)[0]
    for method in one.methods:
        run = RunFolder(WORK / name / experiment / method / f"seed{seed}")
        if run.summary.is_file():
            folder = RESULTS / "networks" / f"{name}-{method}"
            prepare = f"python experiments/study.py {name} --prepare"
            networks.keep(read_run(run.path), folder, subset.path, prepare, subset.test_set)


if __name__ == "__main__":
    run_script(main)
