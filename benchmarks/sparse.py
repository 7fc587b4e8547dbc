#!/usr/bin/env python3
"""How fast training with active weights alone is on this CPU, beside dense and masked training.

python benchmarks/sparse.py                                               five networks, batch 64, one thread
python benchmarks/sparse.py --networks ResNet18 --densities 0.1 0.05 --threads 1 2 --out sparse.json --plot sparse.png
python benchmarks/sparse.py --kernels                                     the kernels beside a straightforward one

A row is one training step: forward, backward and optimizer, float32, ERK masks, on 32x32 images of noise. Both sides
are measured in turn, A B A B …, after one round that warms up; the table shows medians, and in brackets the smallest
and the largest of the rounds. Each row names the share of the dense FLOPs that the active weights need: no ratio can be
less, unless the dense side is far from the processor's peak.
"""

import argparse
import copy
import itertools
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone runs without being installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "CIFAR"))

from cifar_models import build_model
from comparison import TITLES, Bar, Row, Side, alternate, line, markdown, plot

from sparselearning import Masking
from sparselearning.execution import sparse_execution
from sparselearning.execution.functions import ActiveWeights, Shape, SparseConvolution, empty_activations
from sparselearning.process.files import check_output, write_json
from sparselearning.process.script import run_script
from sparselearning.sparse.costs import inference_flops, layer_densities, layer_flops
from sparselearning.training import flags
from sparselearning.training.provenance import environment
from sparselearning.training.runtime import Runtime

NETWORKS = ("ResNet18", "ResNet50", "vgg16", "wrn-16-8", "cifar_resnet_20")
CLASSES = 100
SLIM = ("wrn-16-8", "cifar_resnet_20")
"""Networks whose bars at density 0.05 are others."""

BARS = {0.1: Bar(0.65, 0.45), 0.05: Bar(0.40, 0.25), 0.02: Bar(0.28, 0.18)}
BARS_OF_SLIM = BARS | {0.05: Bar(0.45, 0.30)}

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


def training_rows(name: str, density: float, batch: int, reference: str, repeats: int) -> Iterator[Row]:
    """One network's training step with active weights alone, beside the dense or masked one."""
    torch.manual_seed(0)
    images, labels = torch.randn(batch, 3, 32, 32), torch.randint(0, CLASSES, (batch,))
    steps: dict[str, Callable[[], object]] = {}
    model = build_model(name, CLASSES)
    flops = layer_flops(model, images.shape[1:])
    for side in ("sparse", reference):
        one = copy.deepcopy(model).to(memory_format=torch.channels_last)
        optimizer = sgd(one)
        step: Callable[[], object] = optimizer.step
        network: nn.Module = one
        if side != "dense":
            masking = Masking(optimizer, init_density=density, final_density=density, update_frequency=10**9)
            masking.add_module(one)
            step = lambda masking=masking: masking.step(keep_gradients=False)  # noqa: E731
            share = inference_flops(flops, layer_densities(masking.masks)) / inference_flops(flops)
            network = sparse_execution(one, masking) if side == "sparse" else one
        batches = images.contiguous(memory_format=torch.channels_last)
        steps[side] = lambda network=network, step=step, batches=batches: training_step(network, step, batches, labels)
    threads = torch.get_num_threads()
    what = (
        f"{name}, density {density:g} ({share:.3f} of the FLOPs), batch {batch}, {threads} thread{'s'[: threads > 1]}"
    )
    this, other = alternate([Side(step) for step in steps.values()], repeats, torch.device("cpu"))
    row = Row.of_times(f"{what}, beside {reference}", this, other)
    bars = BARS_OF_SLIM if name in SLIM else BARS
    if reference == "dense" and batch == 64 and density in bars:
        row = Row(row.what, row.unit, row.this, row.reference, [bars[density]])
    yield row


def straightforward(weight: Tensor, padded: Tensor, target: Tensor) -> Callable[[], object]:
    """Forward pass without cache blocking: ``y[o, tile] += w_j · x[tile + offset_j]``, eight active weights at a time.

    Args:
        weight: [outputs, channels, k, k], odd k.
        padded: [channels, rows + k - 1, columns + k - 1, images], zero at the borders.
        target: [outputs, rows, columns + k - 1, images]; the last columns are left with what nobody reads.
    """
    from numba import njit

    outputs, _, size, _ = weight.shape
    output, channel, row, column = (index.numpy() for index in weight.nonzero(as_tuple=True))
    _, rows, columns, images = padded.shape
    offsets = ((channel * rows + row) * columns + column) * images
    starts = np.searchsorted(output, np.arange(outputs + 1))
    values = weight[weight != 0].numpy()
    source, sums = padded.numpy().ravel(), target.numpy().reshape(outputs, -1)
    numbers = sums.shape[1] - (size - 1) * images  # the very last ones would be read from beyond the end

    @njit(fastmath=True)
    def run(source, sums, values, offsets, starts, numbers):  # type: ignore[no-untyped-def]
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

    return lambda: run(source, sums, values, offsets, starts, numbers)


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
                return SparseConvolution.apply(inputs, weight, None, active, False)

        plain()
        agrees = torch.allclose(target[:, :-1, :rows].permute(3, 0, 1, 2), this()[:, :, :-1], rtol=1e-3, atol=1e-3)
        assert agrees, "the two kernels differ"
        gigaflops = 2e-9 * int(torch.count_nonzero(weight)) * rows * rows * batch
        samples = alternate([Side(this), Side(plain)], repeats, torch.device("cpu"))
        rates = [[gigaflops / seconds for seconds in side] for side in samples]
        what = f"conv {size}x{size} {channels}→{outputs}, {rows}x{rows}, density {density:g}, batch {batch}"
        yield Row(what, "GFLOP/s", rates[0], rates[1], [Bar(1.5, 2.0)])


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = flags.Parser(__doc__)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, metavar="NAME", help="of the CIFAR script's")
    parser.add_argument(
        "--densities", nargs="+", type=flags.density, default=[0.1, 0.05, 0.02], help="share of weights"
    )
    parser.add_argument("--batches", nargs="+", type=flags.positive, default=[64], help="images per step")
    parser.add_argument("--threads", nargs="+", type=flags.positive, default=[1], help="of PyTorch and of the kernels")
    parser.add_argument("--references", nargs="+", choices=["dense", "masked"], default=["dense"], help="other side")
    parser.add_argument("--kernels", action="store_true", help="measure single layers in place of networks")
    parser.add_argument("--repeats", type=flags.positive, default=3, help="rounds, besides the one that warms up")
    parser.add_argument("--out", type=flags.path, metavar="FILE.json", help="write all samples there")
    parser.add_argument(
        "--show", type=flags.path, metavar="FILE.json", help="measure nothing: print (and draw) such a file"
    )
    parser.add_argument("--plot", type=flags.path, metavar="FILE.png", help="draw the table there; needs matplotlib")
    return parser.parse_args(argv)


def rows_of(args: argparse.Namespace) -> Iterator[Row]:
    """All rows that are asked for."""
    for threads in args.threads:
        torch.set_num_threads(threads)
        if args.kernels:
            for batch in args.batches:
                yield from kernel_rows(batch, args.repeats)
            continue
        for name, batch, density, reference in itertools.product(
            args.networks, args.batches, args.densities, args.references
        ):
            yield from training_rows(name, density, batch, reference, args.repeats)


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
    print(head, line(TITLES), sep="\n\n", flush=True)
    results: dict[str, Any] = {"title": head, "command": command, "machine": here}
    rows: list[Row] = []
    for row in rows_of(args):
        rows.append(row)
        print(line(row.cells()), flush=True)
        if args.out:
            write_json(args.out, results | {"rows": [row.as_json() for row in rows]})
    print(markdown(rows))
    if args.plot:
        plot(rows, f"{head}\n{command}", args.plot)


if __name__ == "__main__":
    run_script(main)
