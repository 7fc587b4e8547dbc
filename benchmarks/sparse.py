#!/usr/bin/env python3
"""How fast training and prediction with active weights alone are on this CPU, beside the alternatives.

python benchmarks/sparse.py --out sparse.json --plot sparse.png             everything: some hours
python benchmarks/sparse.py --networks ResNet18 --densities 0.1 0.05 --batches 64 --references dense
python benchmarks/sparse.py --kernels                                       the kernels beside a straightforward one
python benchmarks/sparse.py --quick                                         whether it runs, in seconds

Training: one step, forward, backward and optimizer, ERK masks, on 32x32 images of noise, beside a step of the dense
network in float32, of the masked one, of the dense one in bfloat16, and of the dense one compiled; channels-last all.
Memory: the most that a process has held after two steps, beside a masked one. Prediction: images per second beside
onnxruntime with the dense network. All sides are measured in turn, A B C A B C …, after one round that warms up; the
table shows medians, in brackets the smallest and the largest ratio of the rounds, and whether they reach their bars.
Each case names the share of the dense FLOPs that the active weights need: no ratio of times can be less, unless the
other side is far from the processor's peak.
"""

import argparse
import copy
import itertools
import json
import multiprocessing
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone runs without being installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "CIFAR"))

from cifar_models import build_model
from comparison import Bar, Row, Side, alternate, markdown, number, plot, spread

from sparselearning import Masking
from sparselearning.execution import sparse_execution, sparse_inference
from sparselearning.execution.active_weights import ActiveWeights, Shape
from sparselearning.execution.functions import SparseConvolution
from sparselearning.execution.layout import empty_activations
from sparselearning.export import to_onnx
from sparselearning.process import arguments
from sparselearning.process.files import check_output, write_json
from sparselearning.process.script import run_script
from sparselearning.sparse.costs import inference_flops, layer_densities, layer_flops
from sparselearning.training.provenance import environment
from sparselearning.training.runtime import Runtime

REFERENCES = ("dense", "masked", "bf16", "compiled")
NETWORKS = ("ResNet18", "ResNet50", "vgg16", "wrn-16-8", "cifar_resnet_20")
CLASSES = 100
SLIM = ("wrn-16-8", "cifar_resnet_20")
"""Networks whose bars at density 0.05 are others."""

BARS = {0.1: Bar(0.65, 0.45), 0.05: Bar(0.40, 0.25), 0.02: Bar(0.28, 0.18)}
BARS_OF_SLIM = BARS | {0.05: Bar(0.45, 0.30)}
BAR_OF_MEMORY = Bar(1.05, 0.9)
BAR_OF_PREDICTION = Bar(3, 5)
BAR_BATCH, PREDICTION_BATCHES = 64, (1, 32)  # images; the bars of prediction are for ResNet50 at density 0.05

COLUMNS = "  {:<29} {:>14} {:>14} {:>20}  {}"

# Channels, outputs, kernel, rows, density: ResNet18's and ResNet50's layers that take the most time at density 0.05.
LAYERS = (
    (64, 64, 3, 32, 0.22),
    (128, 128, 3, 16, 0.108),
    (256, 256, 3, 8, 0.053),
    (64, 256, 1, 32, 0.45),
    (1024, 256, 1, 8, 0.113),
)


def training_step(network: nn.Module, take_step: Callable[[], object], images: Tensor, labels: Tensor) -> None:
    """Forward, backward and optimizer."""
    network.train()
    for parameter in network.parameters():
        parameter.grad = None
    F.cross_entropy(network(images), labels).backward()
    take_step()


def sgd(model: nn.Module) -> torch.optim.SGD:
    """The optimizer of the CIFAR script; the rate leaves the weights as they are."""
    return torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, fused=True)


def images_and_labels(batch: int) -> tuple[Tensor, Tensor]:
    """Noise, channels-last."""
    images = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    return images, torch.randint(0, CLASSES, (batch,))


def step_of(side: str, dense: nn.Module, density: float, batch: int) -> Callable[[], object]:
    """A training step of a copy of the network: sparse, masked, dense, dense in bfloat16, or dense and compiled."""
    model = copy.deepcopy(dense).to(memory_format=torch.channels_last)
    optimizer = sgd(model)
    images, labels = images_and_labels(batch)
    take_step: Callable[[], object] = optimizer.step
    network: nn.Module = model
    if side in ("sparse", "masked"):
        masking = masked(model, optimizer, density)
        take_step = lambda: masking.step(keep_gradients=False)  # noqa: E731
        network = sparse_execution(model, masking) if side == "sparse" else model
    elif side == "compiled":
        network = torch.compile(model)  # type: ignore[assignment]

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=side == "bf16"):
            training_step(network, take_step, images, labels)

    return step


def masked(model: nn.Module, optimizer: torch.optim.Optimizer, density: float) -> Masking:
    """ERK masks for a model."""
    masking = Masking(optimizer, init_density=density, final_density=density, update_frequency=10**9)
    masking.add_module(model)
    return masking


def name_of(model: nn.Module, name: str, density: float, batch: int) -> str:
    """The case in a table: network, density, share of the FLOPs, batch, threads."""
    twin = copy.deepcopy(model)
    flops = layer_flops(twin, (3, 32, 32))
    share = inference_flops(flops, layer_densities(masked(twin, sgd(twin), density).masks)) / inference_flops(flops)
    threads = torch.get_num_threads()
    plural = "s"[: threads > 1]
    return f"{name}, density {density:g}, {share:.3f} of the FLOPs, batch {batch}, {threads} thread{plural}"


def training_rows(name: str, density: float, batch: int, references: Sequence[str], repeats: int) -> Iterator[Row]:
    """One network's training step with active weights alone, beside the others; its memory beside the masked one's."""
    torch.manual_seed(0)
    model = build_model(name, CLASSES)
    case = name_of(model, name, density, batch)
    sides = [Side(step_of(side, model, density, batch)) for side in ("sparse", *references)]
    this, *others = alternate(sides, repeats, torch.device("cpu"))
    bars = BARS_OF_SLIM if name in SLIM else BARS
    for reference, other in zip(references, others, strict=True):
        has_bar = reference == "dense" and batch == BAR_BATCH and density in bars
        row = Row.of_times(f"{case}: step beside {reference}", this, other)
        yield replace(row, bars=[bars[density]] if has_bar else [])
    if "masked" in references and Path("/proc/self/status").exists():
        peaks = [peak_megabytes(side, name, density, batch) for side in ("sparse", "masked")]
        bar = [BAR_OF_MEMORY] if batch == BAR_BATCH else []
        yield Row(f"{case}: memory beside masked", "MB", [peaks[0]], [peaks[1]], bar)


def peak_megabytes(side: str, name: str, density: float, batch: int) -> float:
    """The most memory that a process of its own has held after two steps."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak, side, name, density, batch, torch.get_num_threads()).result()


def _peak(side: str, name: str, density: float, batch: int, threads: int) -> float:
    torch.set_num_threads(threads)
    step = step_of(side, build_model(name, CLASSES), density, batch)
    step(), step()
    lines = dict(entry.split(":") for entry in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024 / 1e6


def prediction_rows(name: str, density: float, batch: int, repeats: int) -> Iterator[Row]:
    """Prediction with active weights alone beside onnxruntime with the dense network, BatchNorms folded by either."""
    import onnxruntime

    torch.manual_seed(0)
    model = build_model(name, CLASSES).eval()
    case = name_of(model, name, density, batch)
    content = to_onnx(model, (3, 32, 32))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: images_and_labels(batch)[0].contiguous().numpy()}
    masked(model, sgd(model), density)
    fast, images = sparse_inference(model), torch.from_numpy(*inputs.values())
    calls = max(1, 32 // batch)
    sides = [
        Side(lambda: [fast(images) for _ in range(calls)], calls * batch),
        Side(lambda: [session.run(None, inputs) for _ in range(calls)], calls * batch),
    ]
    row = Row.of_rates(f"{case}: prediction beside onnxruntime", *alternate(sides, repeats, torch.device("cpu")))
    has_bar = name == "ResNet50" and density == 0.05 and batch in PREDICTION_BATCHES and torch.get_num_threads() == 1
    yield replace(row, bars=[BAR_OF_PREDICTION] if has_bar else [])


@njit(fastmath=True)
def _add_slices(source, sums, values, offsets, starts, numbers):  # type: ignore[no-untyped-def]
    """The loops of :func:`straightforward`, compiled once for all layers."""
    tile = 1024
    for begin in range(0, numbers, tile):
        end = min(begin + tile, numbers)
        for o in range(len(sums)):
            y = sums[o, begin:end]
            y[:] = 0
            j = starts[o]
            while j + 8 <= starts[o + 1]:
                n = end - begin
                a, b = source[begin + offsets[j] :][:n], source[begin + offsets[j + 1] :][:n]
                c, d = source[begin + offsets[j + 2] :][:n], source[begin + offsets[j + 3] :][:n]
                e, f = source[begin + offsets[j + 4] :][:n], source[begin + offsets[j + 5] :][:n]
                g, h = source[begin + offsets[j + 6] :][:n], source[begin + offsets[j + 7] :][:n]
                w = values[j : j + 8]
                for i in range(n):
                    y[i] += (
                        w[0] * a[i] + w[1] * b[i] + w[2] * c[i] + w[3] * d[i]
                        + w[4] * e[i] + w[5] * f[i] + w[6] * g[i] + w[7] * h[i]
                    )  # fmt: skip
                j += 8
            while j < starts[o + 1]:
                x = source[begin + offsets[j] :][: end - begin]
                w0 = values[j]
                for i in range(end - begin):
                    y[i] += w0 * x[i]
                j += 1


def straightforward(weight: Tensor, padded: Tensor, target: Tensor) -> Callable[[], object]:
    """Forward pass without cache blocking: ``y[o, tile] += w_j · x[tile + offset_j]``, eight active weights at a time.

    Args:
        weight: [outputs, channels, k, k], odd k.
        padded: [channels, rows + k - 1, columns + k - 1, images], zero at the borders.
        target: [outputs, rows, columns + k - 1, images]; the last columns hold values that are not used.
    """
    outputs, _, size, _ = weight.shape
    output, channel, row, column = (index.numpy() for index in weight.nonzero(as_tuple=True))
    _, rows, columns, images = padded.shape
    offsets = ((channel * rows + row) * columns + column) * images
    starts = np.searchsorted(output, np.arange(outputs + 1))
    values = weight[weight != 0].numpy()
    source, sums = padded.numpy().ravel(), target.numpy().reshape(outputs, -1)
    numbers = sums.shape[1] - (size - 1) * images  # the very last ones would be read from beyond the end
    return lambda: _add_slices(source, sums, values, offsets, starts, numbers)


def kernel_rows(batch: int, repeats: int) -> Iterator[Row]:
    """Forward passes of single layers beside :func:`straightforward`, on one thread."""
    for channels, outputs, size, rows, density in LAYERS:
        torch.manual_seed(0)
        weight = torch.randn(outputs, channels, size, size) * (torch.rand(outputs, channels, size, size) < density)
        inputs = empty_activations(batch, channels, rows, rows).normal_()
        pad = size // 2
        padded = F.pad(inputs.permute(1, 2, 3, 0), (0, 0, pad, pad, pad, pad)).contiguous()
        target = torch.empty(outputs, rows, rows + 2 * pad, batch)
        shape = Shape(outputs, channels, (size, size), padding=(pad, pad))
        active = ActiveWeights(shape, weight != 0, weight.stride())
        plain = straightforward(weight, padded, target)

        def this(weight: Tensor = weight, inputs: Tensor = inputs, active: ActiveWeights = active) -> Tensor:
            with torch.no_grad():
                return SparseConvolution.apply(inputs, weight, None, active, False, None)[0]

        plain()
        agrees = torch.allclose(target[:, :-1, :rows].permute(3, 0, 1, 2), this()[:, :, :-1], rtol=1e-3, atol=1e-3)
        assert agrees, "the two kernels differ"
        gigaflops = 2e-9 * int(torch.count_nonzero(weight)) * rows * rows * batch
        samples = alternate([Side(this), Side(plain)], repeats, torch.device("cpu"))
        rates = [[gigaflops / seconds for seconds in side] for side in samples]
        what = f"conv {size}x{size} {channels}→{outputs}, {rows}x{rows}, density {density:g}, batch {batch}: forward"
        yield Row(what, "GFLOP/s", rates[0], rates[1], [Bar(1.5, 2.0)])


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = arguments.Parser(__doc__)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, metavar="NAME", help="of the CIFAR script's")
    parser.add_argument(
        "--densities", nargs="+", type=arguments.density, default=[0.2, 0.1, 0.05, 0.02, 0.01], help="share of weights"
    )
    parser.add_argument(
        "--batches", nargs="+", type=arguments.positive, default=[1, 8, 64, 128], help="images per step"
    )
    parser.add_argument(
        "--prediction-batches",
        nargs="*",
        type=arguments.positive,
        default=PREDICTION_BATCHES,
        help="images; needs onnxruntime",
    )
    parser.add_argument(
        "--threads", nargs="+", type=arguments.positive, default=[1], help="of PyTorch and of the kernels"
    )
    parser.add_argument(
        "--references", nargs="*", choices=REFERENCES, default=REFERENCES, help="other sides of a training step"
    )
    parser.add_argument("--kernels", action="store_true", help="measure single layers in place of networks")
    parser.add_argument("--repeats", type=arguments.positive, default=3, help="rounds, besides the one that warms up")
    parser.add_argument("--out", type=arguments.path, metavar="FILE.json", help="write all samples there")
    parser.add_argument(
        "--show", type=arguments.path, metavar="FILE.json", help="measure nothing: print (and draw) such a file"
    )
    parser.add_argument(
        "--plot", type=arguments.path, metavar="FILE.png", help="draw the table there; needs matplotlib"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny network, few images, one round")
    args = parser.parse_args(argv)
    if args.quick:
        args.networks, args.densities, args.repeats = ["cifar_resnet_8"], [0.1], 1
        args.batches, args.prediction_batches, args.references = [2], [2], ["dense", "masked"]
    if args.prediction_batches and not find_spec("onnxruntime"):
        print("prediction is left out: it is measured beside onnxruntime, which is not installed", file=sys.stderr)
        args.prediction_batches = []
    return args


def rows_of(args: argparse.Namespace) -> Iterator[Row]:
    """All rows that are asked for."""
    for threads in args.threads:
        torch.set_num_threads(threads)
        if args.kernels:
            for batch in args.batches:
                yield from kernel_rows(batch, args.repeats)
            continue
        for name, density in itertools.product(args.networks, args.densities):
            for batch in args.batches if args.references else []:
                yield from training_rows(name, density, batch, args.references, args.repeats)
            for batch in args.prediction_batches:
                yield from prediction_rows(name, density, batch, args.repeats)


def lines_of(row: Row, before: Row | None) -> Iterator[str]:
    """The row in a table of at most 100 columns, and first its case, unless that of the row before is the same."""
    case, _, what = row.what.partition(": ")
    if before is None or before.what.partition(": ")[0] != case:
        yield case
    sign = "≥" if row.is_rate else "≤"
    verdicts = ", ".join(f"{sign} {bar.limit:g}: {row.verdict(bar)}" for bar in row.bars)
    figures = [f"{number(median(side))} {row.unit}" for side in (row.this, row.reference)]
    yield COLUMNS.format(what, *figures, spread(row.ratios), verdicts).rstrip()


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the files."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.show:
        saved = json.loads(args.show.read_text())
        shown = [Row.from_json(row) for row in saved["rows"]]
        print(saved["title"], markdown(shown), sep="\n\n")
        if args.plot:
            plot(shown, f"{saved['title']}\n{saved['command']}", args.plot)
        return
    if args.out:
        check_output(args.out, "benchmarks/sparse.py")
    device, _ = Runtime(use_cuda=False).start()
    here = environment(device)
    command = shlex.join(["python", "benchmarks/sparse.py", *argv])
    head = f"{here['device']}; torch {here['versions']['torch']}; commit {here['commit']}"
    titles = COLUMNS.format("", "sparse", "the other", "ratio", "to reach")
    print(head, titles, sep="\n\n", flush=True)
    results: dict[str, Any] = {"title": head, "command": command, "machine": here}
    rows: list[Row] = []
    for row in rows_of(args):
        print(*lines_of(row, rows[-1] if rows else None), sep="\n", flush=True)
        rows.append(row)
        if args.out:
            write_json(args.out, results | {"rows": [row.as_json() for row in rows]})
    if args.plot:
        plot(rows, f"{head}\n{command}", args.plot)


if __name__ == "__main__":
    run_script(main)
