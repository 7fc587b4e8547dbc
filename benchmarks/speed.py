#!/usr/bin/env python3
"""What sparse training costs on this machine, every figure beside a straightforward reference.

python benchmarks/speed.py                                                ResNet50 for CIFAR-100 at density 0.05
python benchmarks/speed.py --only masks prune-and-grow --out speed.json
python benchmarks/speed.py --out speed.json --plot speed.png

The two sides of a row are measured in turn, A B A B …, after one round that warms up; the table shows medians, and in
brackets the smallest and the largest of the rounds. A ratio is this / reference, round by round: of times, less is
better; of rates, more. The references are in ``references.py``; products in float32 use TensorFloat-32 on both sides
of a GPU's rows, as PyTorch's convolutions do by default.
"""

import argparse
import copy
import gc
import itertools
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone runs without being installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "CIFAR"))

import references
from cifar_data import DATASETS, TensorLoader, channel_statistics
from cifar_models import build_model, model_names
from comparison import COMMAND, TITLES, Bar, Row, Side, alternate, line, markdown, plot

from sparselearning.process import arguments
from sparselearning.process.errors import FaultError, UsageError
from sparselearning.process.files import check_output, read_json, write_json
from sparselearning.process.script import run_script
from sparselearning.sparse.layers import maskable_parameters
from sparselearning.sparse.masking import Masking
from sparselearning.sparse.superpose import AVERAGING, prune_to_density, superpose
from sparselearning.sparse.topology import Layer, shrink_globally
from sparselearning.training import experiment
from sparselearning.training.data import Batch, Sources
from sparselearning.training.engine import Trainer
from sparselearning.training.experiment import SparseTraining
from sparselearning.training.plan import EpochBudget, Plan
from sparselearning.training.provenance import environment
from sparselearning.training.run_folder import RunFolder
from sparselearning.training.runtime import Runtime

LR = 0.001
"""Small, for labels drawn at random must not make the loss diverge."""
PRUNE_RATE = 0.5
PER_IMAGE_SAMPLE = 1000
"""Images that the per-image pipeline is timed on."""
BF16 = Runtime(amp="bf16")
FP32 = Runtime(amp="off", execution="masked")
COMPILED = replace(BF16, compile=True)
NCHW = torch.contiguous_format


@dataclass(frozen=True)
class Setting:
    """What is measured, and where."""

    model: str
    classes: int
    batch_size: int
    density: float
    images: int
    repeats: int
    compile: bool
    device: torch.device

    @property
    def steps(self) -> int:
        """Training steps that are timed together: on a GPU many, which queue up as they do in a run."""
        return 20 if self.device.type == "cuda" else 1

    @cached_property
    def layout(self) -> torch.memory_format:
        """Memory format that a run gives the network and its images."""
        with torch.device("meta"):
            return Runtime().memory_format(build_model(self.model, self.classes))

    def measure(self, *sides: Side) -> list[list[float]]:
        """Per side, the seconds per unit of work of every round."""
        return alternate(sides, self.repeats, self.device)


BARS_HOLD_FOR = {"model": "ResNet50", "classes": 100, "density": 0.05, "batch_size": 128}  # 23.65 million weights
BARS: dict[str, dict[str, list[Bar]]] = {
    "masked step / dense step": {"cpu": [Bar(1.02)], "cuda": [Bar(1.02)]},
    "masked step / dense step, compiled": {"cpu": [Bar(1.02)], "cuda": [Bar(1.02)]},
    "mask application": {"cpu": [Bar(0.25)], "cuda": [Bar(0.5)]},
    "prune and grow, by gradient": {"cpu": [Bar(1 / 8, 1 / 12)], "cuda": [Bar(20, of_figure=True)]},
    "prune and grow, at random": {"cpu": [Bar(1 / 8, 1 / 12)], "cuda": [Bar(20, of_figure=True)]},
    "global prune to the density": {"cpu": [Bar(1 / 4)], "cuda": [Bar(10, of_figure=True)]},
    "superpose + prune": {"cpu": [Bar(500, of_figure=True)], "cuda": [Bar(30, of_figure=True)]},
    "input path": {"cpu": [Bar(20_000, of_figure=True)], "cuda": [Bar(500_000, of_figure=True)]},
    "training, bf16 channels-last": {"cpu": [Bar(3.2)], "cuda": [Bar(4)]},
    "training, bf16 channels-last compiled": {
        "cpu": [Bar(3.6)],
        "cuda": [Bar(6), Bar(15_000, 25_000, of_figure=True)],
    },
    "memory for masks / parameters + optimizer": {"cuda": [Bar(0.15)]},
}


def bars(setting: Setting, what: str) -> list[Bar]:
    """What a row is to reach in this setting."""
    if any(getattr(setting, name) != value for name, value in BARS_HOLD_FOR.items()):
        return []
    return BARS.get(what, {}).get(setting.device.type, [])


# ----------------------------------------------------------------------------------------- what is measured on


@cache
def synthetic_images(setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    """Random images, uint8 [n, 32, 32, 3], a whole number of batches, and their labels."""
    generator = np.random.default_rng(0)
    count = max(1, setting.images // setting.batch_size) * setting.batch_size
    images = generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return images, generator.integers(0, setting.classes, count)


@cache
def make_loader(setting: Setting, memory_format: torch.memory_format) -> TensorLoader:
    """Training batches, as for CIFAR-100."""
    images, labels = synthetic_images(setting)
    mean, std = channel_statistics(images)
    loader = TensorLoader(
        images,
        labels,
        mean=mean,
        std=std,
        batch_size=setting.batch_size,
        augmentation=DATASETS["cifar100"].augmentation,
        device=setting.device,
    )
    loader.use_memory_format(memory_format)
    return loader


def endless(loader: TensorLoader) -> Iterator[Batch]:
    """Batches of one epoch after the other."""
    return itertools.chain.from_iterable(loader.epoch(number) for number in itertools.count())


def first_batch(setting: Setting, memory_format: torch.memory_format) -> Batch:
    """One batch, on the device."""
    return next(endless(make_loader(setting, memory_format)))


def make_model(setting: Setting, memory_format: torch.memory_format) -> nn.Module:
    """The network, with the same weights at every call."""
    torch.manual_seed(0)
    return build_model(setting.model, setting.classes).to(setting.device, memory_format=memory_format)


def make_optimizer(model: nn.Module, fused: bool) -> torch.optim.SGD:
    """SGD as the CIFAR script has it (fused), or as PyTorch does it by default."""
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4, fused=fused or None)


def make_trainer(setting: Setting, runtime: Runtime, sparse: bool = True) -> Trainer:
    """The training engine, in a static topology."""
    model = make_model(setting, setting.layout)
    loader = make_loader(setting, setting.layout)
    density = {"init_density": setting.density, "final_density": setting.density}
    trainer = experiment.prepare(
        experiment.Setup(
            model=model,
            optimizer=make_optimizer(model, fused=True),
            sources=Sources(train=loader, train_once=loader, evaluation=loader),
            sample_shape=(3, 32, 32),
            class_balanced_batch=lambda: loader.class_balanced_batch(setting.batch_size, seed=0),
        ),
        Plan(EpochBudget(1, 1, 0), pretrain_lr=lambda epoch: LR, averaging=AVERAGING["CAA"](0.5)),
        SparseTraining(density, frozen=True) if sparse else None,
        runtime,
        experiment.Output(RunFolder(Path("unused")), config={}),
    )
    trainer.passes.network.train()
    return trainer


class SparseNetwork:
    """A masked network in the middle of training, with random gradients and momentum.

    Args:
        setting: which network, where.
        growth: mode of growing.
        density: share of active weights.
        memory_format: of its convolutions; by default as a run has it.
        seed: of masks.
        fused: use the fused optimizer.
    """

    def __init__(
        self,
        setting: Setting,
        *,
        growth: str = "gradient",
        density: float | None = None,
        memory_format: torch.memory_format | None = None,
        seed: int = 0,
        fused: bool = True,
    ) -> None:
        self.model = make_model(setting, memory_format or setting.layout)
        self.optimizer = make_optimizer(self.model, fused)
        density = density or setting.density
        self.masking = Masking(
            self.optimizer, growth=growth, prune_rate=PRUNE_RATE, init_density=density, final_density=density, seed=seed
        )
        self.masking.add_module(self.model)
        self.masking.updates_enabled = False
        self.weights = maskable_parameters(self.model)
        for parameter in self.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        self.masking.step()
        self._state = copy.deepcopy(self.model.state_dict())
        self._masks = copy.deepcopy(self.masking.state_dict())

    def restore(self) -> None:
        """Go back to the weights and masks of the beginning."""
        self.model.load_state_dict(self._state)
        self.masking.load_state_dict(self._masks)

    def float_masks(self) -> references.FloatMasks:
        """The reference's masks for this network."""
        return references.FloatMasks(self.weights, self.masking.masks, self.optimizer)


# ------------------------------------------------------------------------------------------------- the cases


def case_step(setting: Setting) -> Iterator[Row]:
    """Training steps on one resident batch, masked against dense, in the same number format."""
    runtimes = {"masked step / dense step": BF16}
    if setting.compile:
        runtimes["masked step / dense step, compiled"] = COMPILED
    batch = first_batch(setting, setting.layout)

    def steps(trainer: Trainer) -> None:
        for _ in range(setting.steps):
            trainer.train_batch(batch)

    for what, runtime in runtimes.items():
        masked, dense = (make_trainer(setting, runtime, sparse) for sparse in (True, False))
        sides = (Side(partial(steps, trainer), setting.steps) for trainer in (masked, dense))
        yield Row.of_times(what, *setting.measure(*sides))


def case_masks(setting: Setting) -> Iterator[Row]:
    """What masks add to a training step: gradients masked in place against products with weights and momentum."""
    ours, theirs = SparseNetwork(setting), SparseNetwork(setting, memory_format=NCHW).float_masks()
    yield Row.of_times("mask application", *setting.measure(Side(ours.masking.mask_gradients), Side(theirs.apply)))
    yield Row.of_times(
        "mask application, keeping gradients", *setting.measure(Side(ours.masking.apply_masks), Side(theirs.apply))
    )


def case_optimizer(setting: Setting) -> Iterator[Row]:
    """One step of the fused SGD, with masks and without."""
    masked, dense = SparseNetwork(setting), SparseNetwork(setting)
    sides = (Side(partial(masked.masking.step, keep_gradients=False)), Side(dense.optimizer.step))
    yield Row.of_times("optimizer step, masked / dense", *setting.measure(*sides))


def case_prune_and_grow(setting: Setting) -> Iterator[Row]:
    """One topology update of all layers, by selection against sorts of whole layers."""
    for growth, what in (("gradient", "prune and grow, by gradient"), ("random", "prune and grow, at random")):
        ours, theirs = SparseNetwork(setting, growth=growth), SparseNetwork(setting, memory_format=NCHW)
        reference = theirs.float_masks()
        first_masks = dict(reference.masks)

        def restore(network: SparseNetwork, reference: references.FloatMasks, masks: dict[str, Tensor]) -> None:
            network.restore()
            reference.masks = dict(masks)

        sides = (
            Side(ours.masking.truncate_weights, prepare=ours.restore),
            Side(
                partial(reference.prune_and_grow, PRUNE_RATE, growth),
                prepare=partial(restore, theirs, reference, first_masks),
            ),
        )
        yield Row.of_times(what, *setting.measure(*sides))


def case_global_prune(setting: Setting) -> Iterator[Row]:
    """A dense network cut to the density by global magnitude."""
    ours, theirs = (make_model(setting, layout) for layout in (setting.layout, NCHW))
    names = list(maskable_parameters(ours))
    sides = (
        Side(lambda: prune_to_density(ours.state_dict(), names, setting.density)),
        Side(lambda: references.prune_to_density(theirs.state_dict(), names, setting.density)),
    )
    yield Row.of_times("global prune to the density", *setting.measure(*sides))


def case_gradual_prune(setting: Setting) -> Iterator[Row]:
    """GraNet's pruning at one update, here from twice the density to the density."""
    network = SparseNetwork(setting, density=min(1.0, 2 * setting.density), memory_format=NCHW)
    weights = [weight.detach() for weight in network.weights.values()]
    masks = list(network.masking.masks.values())
    layers = [Layer(weight.flatten(), mask.flatten()) for weight, mask in zip(weights, masks, strict=True)]

    def restore() -> None:
        for layer, mask in zip(layers, masks, strict=True):
            layer.mask = mask.flatten().clone()

    sides = (
        Side(lambda: shrink_globally(layers, setting.density), prepare=restore),
        Side(lambda: references.gradual_prune(weights, masks, setting.density)),
    )
    yield Row.of_times("gradual global prune of the masks", *setting.measure(*sides))


def case_superpose(setting: Setting) -> Iterator[Row]:
    """Two tickets averaged and pruned back to the density."""
    ours, theirs = (
        [SparseNetwork(setting, seed=seed, memory_format=layout).model.state_dict() for seed in (1, 2)]
        for layout in (setting.layout, NCHW)
    )
    names = list(maskable_parameters(make_model(setting, NCHW)))
    sides = (
        Side(lambda: prune_to_density(superpose(*ours, 0.5), names, setting.density)),
        Side(lambda: references.prune_to_density(superpose(*theirs, 0.5), names, setting.density)),
    )
    yield Row.of_times("superpose + prune", *setting.measure(*sides))


def case_bn(setting: Setting) -> Iterator[Row]:
    """BatchNorm statistics of resident batches: bf16 channels-last against PyTorch's own pass in fp32 NCHW."""
    trainer, model = make_trainer(setting, BF16), make_model(setting, NCHW)
    ours = [first_batch(setting, setting.layout)] * setting.steps
    theirs = [first_batch(setting, NCHW).images] * setting.steps
    images = setting.steps * setting.batch_size
    sides = (
        Side(partial(trainer.passes.re_estimate_bn, ours), images),
        Side(partial(torch.optim.swa_utils.update_bn, theirs, model), images),
    )
    yield Row.of_rates("BatchNorm pass", *setting.measure(*sides))


def case_input(setting: Setting) -> Iterator[Row]:
    """Augmented batches on the device: whole epochs against a per-image PIL pipeline in one process."""
    loader = make_loader(setting, setting.layout)
    epochs = itertools.count()
    images, labels = (array[:PER_IMAGE_SAMPLE] for array in synthetic_images(setting))
    per_image = DataLoader(references.PerImageData(images, labels), setting.batch_size, shuffle=True)

    def one_epoch() -> None:
        for _ in loader.epoch(next(epochs)):
            pass

    def one_by_one() -> None:
        for batch in per_image:
            for tensor in batch:
                tensor.to(setting.device)

    sides = (Side(one_epoch, loader.num_samples), Side(one_by_one, len(images)))
    yield Row.of_rates("input path", *setting.measure(*sides))


def case_training(setting: Setting) -> Iterator[Row]:
    """Masked training, input path included, in each number format against fp32 NCHW with float masks."""
    runtimes = {"training, fp32 channels-last": FP32, "training, bf16 channels-last": BF16}
    if setting.compile:
        runtimes["training, bf16 channels-last compiled"] = COMPILED
    trainers = [make_trainer(setting, runtime) for runtime in runtimes.values()]
    network = SparseNetwork(setting, memory_format=NCHW, fused=False)
    reference = references.Training(network.model, network.optimizer, network.float_masks())

    def side(step: Callable[[Batch], None], memory_format: torch.memory_format) -> Side:
        batches = endless(make_loader(setting, memory_format))

        def steps() -> None:
            for batch in itertools.islice(batches, setting.steps):
                step(batch)

        return Side(steps, setting.steps * setting.batch_size)

    sides = [side(trainer.train_batch, setting.layout) for trainer in trainers]
    *ours, theirs = setting.measure(*sides, side(reference.step, NCHW))
    for what, seconds in zip(runtimes, ours, strict=True):
        yield Row.of_rates(what, seconds, theirs)


def case_memory(setting: Setting) -> Iterator[Row]:
    """Memory for masks: on a GPU, the peak of masked training over dense training; on a CPU, the tensors' bytes."""
    trainer = make_trainer(setting, BF16)
    assert trainer.masking is not None
    trainer.train_batch(first_batch(setting, setting.layout))
    masks = tensor_bytes(trainer.masking.state_dict())
    trained = tensor_bytes([list(trainer.model.parameters()), trainer.optimizer.state_dict()])
    if setting.device.type == "cuda":
        del trainer
        masks = peak_bytes(setting, sparse=True) - peak_bytes(setting, sparse=False)
    yield Row("memory for masks / parameters + optimizer", "MB", [masks / 1e6], [trained / 1e6])


def tensor_bytes(tree: Any) -> int:
    """Bytes of all tensors in nested containers."""
    if isinstance(tree, Tensor):
        return tree.numel() * tree.element_size()
    parts = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, list) else ()
    return sum(tensor_bytes(part) for part in parts)


def peak_bytes(setting: Setting, sparse: bool) -> int:
    """Most GPU memory that training held at once, a topology update included."""
    batch = first_batch(setting, setting.layout)
    gc.collect()
    before = torch.cuda.memory_allocated()
    trainer = make_trainer(setting, BF16, sparse)
    trainer.train_batch(batch)  # makes the momentum, and cuDNN try its algorithms
    torch.cuda.reset_peak_memory_stats()
    trainer.train_batch(batch)
    if trainer.masking:
        trainer.passes.backward(batch, dense_gradients=True)  # the step has masked its gradients
        trainer.masking.truncate_weights(PRUNE_RATE)
    trainer.train_batch(batch)
    return torch.cuda.max_memory_allocated() - before


CASES: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "step": case_step,
    "masks": case_masks,
    "optimizer": case_optimizer,
    "prune-and-grow": case_prune_and_grow,
    "global-prune": case_global_prune,
    "gradual-prune": case_gradual_prune,
    "superpose": case_superpose,
    "bn": case_bn,
    "input": case_input,
    "training": case_training,
    "memory": case_memory,
}


def title(setting: Setting, here: Mapping[str, Any]) -> str:
    """Setting and machine on one line."""
    where = here["device"] + ("" if setting.device.type == "cuda" else f", {here['threads']} threads")
    return (
        f"{setting.model}, {setting.classes} classes, batch {setting.batch_size}, density {setting.density:g}; "
        f"{where}; torch {here['versions']['torch']}; commit {here['commit']}"
    )


def markdown_of(path: Path) -> str:
    """The table of a file that ``--out`` wrote.

    Raises:
        UsageError: if there is no such file.
        FaultError: if it is damaged, or another program's.
    """
    if not path.is_file():
        raise UsageError(f"there is no file {path}: --out writes such a one")
    saved = read_json(path)
    try:
        return f"{markdown(map(Row.from_json, saved['rows']))}\n{saved['title']}"
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FaultError(f"{path} is damaged, or nothing that --out wrote") from error


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = arguments.Parser(__doc__)
    parser.add_argument("--model", default="ResNet50", help=f"one of {model_names()}")
    parser.add_argument("--classes", type=arguments.positive, default=100, help="of the classifier")
    parser.add_argument("--batch-size", type=arguments.positive, default=128, help="images per step")
    parser.add_argument("--density", type=arguments.density, default=0.05, help="share of active weights")
    parser.add_argument("--images", type=arguments.positive, default=50_000, help="of the synthetic data set")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cuda", "cpu"], default=default, help="where to compute")
    parser.add_argument("--repeats", type=arguments.positive, default=5, help="rounds, besides the one that warms up")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help="what to measure")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="measure compiled networks too"
    )
    parser.add_argument("--out", type=arguments.path, metavar="FILE.json", help="write all samples there")
    parser.add_argument(
        "--plot", type=arguments.path, metavar="FILE.png", help="draw the table there; needs matplotlib"
    )
    parser.add_argument(
        "--show", type=arguments.path, metavar="FILE.json", help="measure nothing, print such a file in Markdown"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the files."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.show:
        print(markdown_of(args.show))
        return
    for path in filter(None, (args.out, args.plot)):
        check_output(path, COMMAND)
    if args.plot and not find_spec("matplotlib"):
        raise UsageError("--plot needs matplotlib: pip install matplotlib, or leave it out")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("there is no GPU that PyTorch can use here: measure with --device cpu")
    device, _ = Runtime(use_cuda=args.device == "cuda").start()
    setting = Setting(
        args.model, args.classes, args.batch_size, args.density, args.images, args.repeats, args.compile, device
    )
    here = environment(device)
    head = title(setting, here)
    print(head, line(TITLES), sep="\n\n", flush=True)
    results: dict[str, Any] = {
        "title": head,
        "command": shlex.join(["python", COMMAND, *argv]),
        "setting": asdict(setting) | {"device": device.type},
        "machine": here,
    }
    rows: list[Row] = []
    for name in args.only:
        for row in CASES[name](setting):
            rows.append(replace(row, bars=bars(setting, row.what)))
            print(line(rows[-1].cells()), flush=True)
        gc.collect()
        if args.out:
            write_json(args.out, results | {"rows": [row.as_json() for row in rows]})
    if args.plot:
        plot(rows, head, args.plot)


if __name__ == "__main__":
    run_script(main)
