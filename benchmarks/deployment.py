#!/usr/bin/env python3
"""What unstructured masks save in deployment on this CPU, and what they do not: file size, memory, time.

python benchmarks/deployment.py

Sizes are those of ResNet50 for CIFAR-100 with ERK masks. Times compare dense kernels with products by CSR matrices
(32-bit indices), a convolution as ``unfold`` and one product; every layer is measured alternately with its dense
twin, in CPU time of one thread, which other work on the machine disturbs less than wall-clock time. All weights and
inputs are random: neither size nor time depends on the values.
"""

import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone runs without being installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "CIFAR"))

from cifar_models import build_model

from sparselearning import Masking
from sparselearning.export import save_sparse
from sparselearning.process.arguments import Parser, path
from sparselearning.process.files import check_output, write_json
from sparselearning.process.script import run_script
from sparselearning.sparse.distributions import active_count
from sparselearning.sparse.layers import maskable_parameters
from sparselearning.training.provenance import environment

DENSITIES = (0.2, 0.1, 0.05, 0.02)
BATCH = 8

# Name: (layer, shape of its input without the batch). The convolutions are ResNet50's.
LAYERS: dict[str, tuple[Callable[[], nn.Linear | nn.Conv2d], tuple[int, ...]]] = {
    "linear 4096→4096": (lambda: nn.Linear(4096, 4096, bias=False), (4096,)),
    "linear 2048→100": (lambda: nn.Linear(2048, 100, bias=False), (2048,)),
    "conv 1x1 1024→256, 8x8": (lambda: nn.Conv2d(1024, 256, 1, bias=False), (1024, 8, 8)),
    "conv 3x3 128→128, 16x16": (lambda: nn.Conv2d(128, 128, 3, padding=1, bias=False), (128, 16, 16)),
    "conv 3x3 512→512, 4x4": (lambda: nn.Conv2d(512, 512, 3, padding=1, bias=False), (512, 4, 4)),
}


def to_csr(weight: Tensor) -> Tensor:
    """The weight as a CSR matrix, one row per output, with the 32-bit indices that MKL computes with."""
    matrix = weight.detach().flatten(1).to_sparse_csr()
    rows, columns = matrix.crow_indices().int(), matrix.col_indices().int()
    return torch.sparse_csr_tensor(rows, columns, matrix.values(), matrix.shape)


class CsrLinear(nn.Module):
    """A linear layer without bias whose weight is a CSR matrix."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        self.weight = to_csr(dense.weight)

    def forward(self, x: Tensor) -> Tensor:
        """B x inputs to B x outputs."""
        return (self.weight @ x.t()).t()


class CsrConv2d(nn.Module):
    """A convolution without bias or groups as one product of a CSR matrix with the unfolded images."""

    def __init__(self, dense: nn.Conv2d) -> None:
        super().__init__()
        self.weight = to_csr(dense.weight)
        self.kernel_size, self.padding, self.stride = dense.kernel_size, dense.padding, dense.stride

    def forward(self, images: Tensor) -> Tensor:
        """B x inputs x H x W to B x outputs x H' x W'."""
        batch = len(images)
        height, width = (
            (size + 2 * pad - kernel) // stride + 1
            for size, pad, kernel, stride in zip(
                images.shape[2:], self.padding, self.kernel_size, self.stride, strict=True
            )
        )
        if self.kernel_size == (1, 1):
            step_y, step_x = self.stride
            patches = images[:, :, ::step_y, ::step_x].flatten(2)
        else:
            patches = unfold(images, self.kernel_size, padding=self.padding, stride=self.stride)
        product = self.weight @ patches.transpose(0, 1).reshape(self.weight.shape[1], -1)
        return product.view(-1, batch, height, width).transpose(0, 1)


CSR_TWINS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {nn.Linear: CsrLinear, nn.Conv2d: CsrConv2d}


def sparsify(layer: nn.Linear | nn.Conv2d, density: float) -> None:
    """Keep a random share of the weights, in place."""
    size = layer.weight.numel()
    off = torch.randperm(size)[active_count(size, density) :]
    with torch.no_grad():
        layer.weight.view(-1)[off] = 0


def resnet50(density: float) -> nn.Module:
    """ResNet50 for CIFAR-100 with random ERK masks."""
    model = build_model("ResNet50", num_classes=100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Masking(optimizer, init_density=density, final_density=density).add_module(model, "ERK")
    return model.eval()


def with_csr_layers(model: nn.Module) -> nn.Module:
    """Replace every convolution and linear layer by its CSR twin, in place."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) in CSR_TWINS:
                setattr(module, name, CSR_TWINS[type(child)](child))
    return model


def csr_bytes(matrix: Tensor) -> int:
    """Bytes of a CSR matrix: values, column indices, row pointers."""
    return sum(part.nbytes for part in (matrix.values(), matrix.col_indices(), matrix.crow_indices()))


def sizes(density: float) -> dict[str, int]:
    """Bytes of ResNet50 on disk and of its maskable weights in memory, dense and sparse."""
    model = resnet50(density)
    weights = maskable_parameters(model).values()
    with tempfile.TemporaryDirectory() as folder:
        dense, packed = Path(folder, "dense.pth"), Path(folder, "packed.safetensors")
        torch.save(model.state_dict(), dense)
        save_sparse(packed, model.state_dict(), {})
        return {
            "file_dense": dense.stat().st_size,
            "file_packed": packed.stat().st_size,
            "memory_dense": sum(weight.nbytes for weight in weights),
            "memory_csr": sum(csr_bytes(to_csr(weight)) for weight in weights),
        }


def compare(dense: nn.Module, sparse: nn.Module, inputs: Tensor, repeats: int) -> dict[str, Any]:
    """Time two modules that compute the same, in turn, after one call of each for warming up.

    Returns:
        Median seconds of each; and how many times as fast the sparse one is, as median and quartiles over the pairs.

    Raises:
        AssertionError: if they do not compute the same.
    """
    torch.testing.assert_close(sparse(inputs), dense(inputs), rtol=1e-3, atol=1e-3)
    dense_seconds, csr_seconds = [], []
    for _ in range(repeats):
        dense_seconds.append(seconds(dense, inputs))
        csr_seconds.append(seconds(sparse, inputs))
    speedups = [dense / csr for dense, csr in zip(dense_seconds, csr_seconds, strict=True)]
    low, speedup, high = statistics.quantiles(speedups, n=4)
    return {
        "dense_seconds": statistics.median(dense_seconds),
        "csr_seconds": statistics.median(csr_seconds),
        "speedup": speedup,
        "speedup_quartiles": [low, high],
    }


def seconds(module: nn.Module, inputs: Tensor) -> float:
    """CPU time of one call in this thread, which does all the work."""
    start = time.thread_time()
    module(inputs)
    return time.thread_time() - start


def layer_times(name: str, density: float) -> dict[str, Any]:
    """Time one layer of :data:`LAYERS` against its CSR twin."""
    build, shape = LAYERS[name]
    layer = build()
    sparsify(layer, density)
    return compare(layer, CSR_TWINS[type(layer)](layer), torch.randn(BATCH, *shape), repeats=15)


def network_times(density: float) -> dict[str, Any]:
    """Time all of ResNet50 against itself with CSR layers."""
    dense = resnet50(density)
    sparse = resnet50(density)
    sparse.load_state_dict(dense.state_dict())
    return compare(dense, with_csr_layers(sparse), torch.randn(BATCH, 3, 32, 32), repeats=3)


def table(results: dict[str, Any]) -> str:
    """All figures in Markdown."""
    sizes, about = results["sizes"], results["machine"]
    rows = [
        ["density (dense in brackets)", *(f"{density:g}" for density in DENSITIES)],
        ["---", *("---:" for _ in DENSITIES)],
        [f"file, packed ({megabytes(sizes[0]['file_dense'])})", *(megabytes(size["file_packed"]) for size in sizes)],
        [f"memory, CSR ({megabytes(sizes[0]['memory_dense'])})", *(megabytes(size["memory_csr"]) for size in sizes)],
    ]
    for name, times in results["times"].items():
        dense = statistics.median(time["dense_seconds"] for time in times) * 1e3
        rows.append([f"{name} ({dense:.3g} ms)", *(f"{time['speedup']:.2g}×" for time in times)])  # noqa: RUF001
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    where = f"one thread of {about['device'].removeprefix('cpu: ')}, {about['instructions']}"
    return "\n".join(lines) + (
        f"\n\nn×: n times as fast as dense, at batch {BATCH} in float32. Measured on "  # noqa: RUF001
        f"{where}, torch {about['versions']['torch']}, commit {about['commit']}."
    )


def megabytes(size: int) -> str:
    """Bytes, readable."""
    return f"{size / 1e6:.1f} MB"


COMMAND = "python benchmarks/deployment.py"


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the file."""
    parser = Parser(__doc__)
    parser.add_argument("--out", type=path, metavar="FILE.json", help="write all figures there, too")
    args = parser.parse_args(argv)
    if args.out:
        check_output(args.out, COMMAND)
    warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    times = {name: [layer_times(name, density) for density in DENSITIES] for name in LAYERS}
    times["ResNet50, all layers"] = [network_times(density) for density in DENSITIES]
    results = {
        "command": COMMAND,
        "machine": environment(torch.device("cpu")) | {"instructions": torch.backends.cpu.get_cpu_capability()},
        "batch": BATCH,
        "densities": DENSITIES,
        "sizes": [sizes(density) for density in DENSITIES],
        "times": times,
    }
    if args.out:
        write_json(args.out, results)
    print(table(results))


if __name__ == "__main__":
    run_script(main)
