#!/usr/bin/env python3
"""What unstructured sparsity saves in deployment on this CPU, and what it does not: file size, memory, time.

python benchmarks/deployment.py

Sizes are those of ResNet50 for CIFAR-100 with ERK masks. Times compare dense kernels with products by CSR matrices
(32-bit indices), a convolution as ``unfold`` and one product; every layer is measured alternately with its dense
twin. All weights and inputs are random: neither size nor time depends on the values.
"""

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "CIFAR"))

from cifar_models import build_model  # noqa: E402  found once its folder is on the path

from sparselearning import Masking  # noqa: E402
from sparselearning.checkpoint import write_json  # noqa: E402
from sparselearning.distributions import active_count  # noqa: E402
from sparselearning.export import save_sparse  # noqa: E402
from sparselearning.masking import maskable_parameters  # noqa: E402

SPARSITIES = (0.8, 0.9, 0.95, 0.98)
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


def alternately(*calls: Callable[[], object], repeats: int) -> list[list[float]]:
    """Seconds of each call, in turn, ``repeats`` times after one for warming up."""
    seconds: list[list[float]] = [[] for _ in calls]
    for repeat in range(repeats + 1):
        for call, measured in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            if repeat:
                measured.append(time.perf_counter() - start)
    return seconds


def compare(dense: nn.Module, sparse: nn.Module, inputs: Tensor, repeats: int) -> dict[str, Any]:
    """Time two modules that compute the same.

    Raises:
        AssertionError: if they do not.
    """
    torch.testing.assert_close(sparse(inputs), dense(inputs), rtol=1e-3, atol=1e-3)
    dense_seconds, csr_seconds = alternately(lambda: dense(inputs), lambda: sparse(inputs), repeats=repeats)
    result: dict[str, Any] = {}
    for name, seconds in (("dense", dense_seconds), ("csr", csr_seconds)):
        low, middle, high = statistics.quantiles(seconds, n=4)
        result[name] = {"median_seconds": middle, "quartiles": [low, high]}
    result["speedup"] = result["dense"]["median_seconds"] / result["csr"]["median_seconds"]
    return result


def layer_times(name: str, density: float) -> dict[str, Any]:
    """Time one layer of :data:`LAYERS` against its CSR twin."""
    build, shape = LAYERS[name]
    layer = build()
    sparsify(layer, density)
    return compare(layer, CSR_TWINS[type(layer)](layer), torch.randn(BATCH, *shape), repeats=15)


def network_times(density: float) -> dict[str, Any]:
    """Time all of ResNet50 against itself with CSR layers."""
    torch.manual_seed(0)
    dense = resnet50(density)
    sparse = resnet50(density)
    sparse.load_state_dict(dense.state_dict())
    return compare(dense, with_csr_layers(sparse), torch.randn(BATCH, 3, 32, 32), repeats=3)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    return {
        "cpu": names[0] if names else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }


def table(results: dict[str, Any]) -> str:
    """All figures in Markdown."""
    head = f"| {'sparsity':<40} | " + " | ".join(f"{sparsity:>9.0%}" for sparsity in SPARSITIES) + " |"
    lines = [head, f"| {'-' * 40} | " + " | ".join("-" * 8 + ":" for _ in SPARSITIES) + " |"]

    def row(name: str, cells: list[str]) -> None:
        lines.append(f"| {name:<40} | " + " | ".join(f"{cell:>9}" for cell in cells) + " |")

    for what in ("file", "memory"):
        small = "packed" if what == "file" else "csr"
        dense = results["sizes"][0][f"{what}_dense"] / 1e6
        cells = [f"{size[f'{what}_{small}'] / 1e6:.1f} MB" for size in results["sizes"]]
        row(f"{what}, {small} (dense: {dense:.1f} MB)", cells)
    for name, times in results["times"].items():
        dense = statistics.median(time["dense"]["median_seconds"] for time in times) * 1e3
        row(f"{name}, CSR (dense: {dense:.1f} ms)", [f"{time['speedup']:.2f}x" for time in times])
    about = results["machine"]
    lines += [
        "",
        f"Batch {BATCH}, float32; nx means n times as fast as dense. {about['cpu']}, {about['instructions']}, "
        f"{about['threads']} threads, torch {about['torch']}, commit {about['commit']}.",
    ]
    return "\n".join(lines)


@torch.inference_mode()
def main() -> None:
    """Measure, print the table, write the JSON file."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=HERE / "deployment.json", help="file to write")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)")
    densities = [1 - sparsity for sparsity in SPARSITIES]
    torch.manual_seed(0)
    times = {name: [layer_times(name, density) for density in densities] for name in LAYERS}
    times["ResNet50, all layers"] = [network_times(density) for density in densities]
    results = {
        "machine": machine(),
        "batch": BATCH,
        "sparsities": SPARSITIES,
        "sizes": [sizes(density) for density in densities],
        "times": times,
    }
    write_json(args.json, results)
    print(table(results))


if __name__ == "__main__":
    main()
