"""Files to deploy a trained run with: its non-zero weights, packed, and the network as ONNX.

python -m sparselearning.export RUN OUT.safetensors
python -m sparselearning.export RUN OUT.safetensors --fold-bn --onnx OUT.onnx

The packed file, version 1, is a safetensors file. Each entry of the state dict that is then smaller is stored
as two tensors: ``NAME.values``, its non-zero values in row-major order, and ``NAME.positions`` (uint8), one bit per
weight in the same order, lowest bit first, set where a value is stored. All others are stored as they are. The
metadata are texts in JSON: ``format_version``, ``shapes`` (every entry's, in the order of the state dict),
``densities`` (of the packed entries) and, as far as known, ``model``, ``data``, ``network`` and ``folded_batchnorms``.

ONNX has no sparse weights that its runtimes compute with: the ONNX file is as large and as fast as a dense network's.
"""

import importlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparselearning.execution.folding import fold_batchnorms
from sparselearning.process import arguments
from sparselearning.process.errors import FaultError, UsageError
from sparselearning.process.files import check_output, load_torch, write_bytes
from sparselearning.process.schema import Count, Share
from sparselearning.process.script import run_script
from sparselearning.process.tensor_schema import check, mapping, record
from sparselearning.training.builders import build_network
from sparselearning.training.networks import saved_state
from sparselearning.training.run_folder import RunFolder

FORMAT_VERSION = 1
PRODUCER = "sparselearning.export"
"""Name in ONNX files."""
TOLERANCE = 1e-4  # of logits, where the largest logit is 1 or less; else of logits over the largest one

# ------------------------------------------------------------------------------------------------- packed files


def save_sparse(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a state dict, with only the non-zero values of every entry that is then smaller.

    Args:
        path: written atomically.
        state: tensors of any type and device; not changed.
        metadata: anything that JSON holds, to come back from :func:`load_sparse`.

    Raises:
        UsageError: if safetensors is not installed.
        FaultError: if the disk refuses.
    """
    (safetensors,) = _optional("a packed file", "safetensors.torch")
    tensors: dict[str, Tensor] = {}
    densities = {}
    for name, entry in state.items():
        dense = entry.detach().cpu().clone(memory_format=torch.contiguous_format)
        values, positions = _pack(dense.view(-1))
        if values.nbytes + positions.nbytes < dense.nbytes:
            tensors[f"{name}.values"], tensors[f"{name}.positions"] = values, positions
            densities[name] = values.numel() / dense.numel()
        else:
            tensors[name] = dense
    shapes = {name: list(entry.shape) for name, entry in state.items()}
    everything = {**metadata, "format_version": FORMAT_VERSION, "shapes": shapes, "densities": densities}
    content = safetensors.save(tensors, {key: json.dumps(value) for key, value in everything.items()})
    write_bytes(path, content)


def load_sparse(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of :func:`save_sparse`: the state dict, dense, and the metadata.

    Every value is equal to the bit, but for negative zeros: in a packed entry they come back as zeros.

    Raises:
        UsageError: if there is no such file, or safetensors is not installed.
        FaultError: if it is damaged, or was not written by :func:`save_sparse`.
    """
    entries, metadata = read_packed(path)
    return {name: entry.dense() if isinstance(entry, Packed) else entry for name, entry in entries.items()}, metadata


@dataclass(frozen=True)
class Packed:
    """A tensor as a packed file stores it.

    Attributes:
        values: its non-zero values, row by row.
        stored: bool, flat: where a value is stored.
        shape: of the tensor.
    """

    values: Tensor
    stored: Tensor
    shape: tuple[int, ...]

    def dense(self) -> Tensor:
        """The tensor itself."""
        flat = torch.zeros(len(self.stored), dtype=self.values.dtype)
        return flat.masked_scatter_(self.stored, self.values).view(self.shape)


def read_packed(path: Path) -> tuple[dict[str, Tensor | Packed], dict[str, Any]]:
    """Read a file of :func:`save_sparse`, which raises what :func:`load_sparse` does, without making anything dense."""
    (safetensors,) = _optional("a packed file", "safetensors")
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            texts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dictionary
    except (OSError, safetensors.SafetensorError) as error:
        raise FaultError(f"{path} is truncated or not a safetensors file") from error
    if texts.get("format_version") != str(FORMAT_VERSION):
        raise FaultError(
            f"{path} is no packed file of format version {FORMAT_VERSION}: write it with sparselearning.export"
        )
    try:
        metadata = {key: json.loads(text) for key, text in texts.items()}
    except (ValueError, RecursionError) as error:
        raise FaultError(f"{path} is damaged: its metadata are no JSON") from error
    check(metadata, record({"shapes": mapping(list[Count]), "densities": mapping(Share)}), path)
    name = ""
    state: dict[str, Tensor | Packed] = {}
    try:
        for name, shape in metadata["shapes"].items():
            if name in metadata["densities"]:
                values, positions = tensors[f"{name}.values"], tensors[f"{name}.positions"]
                state[name] = _unpack(values, positions, tuple(shape))
            else:
                state[name] = tensors[name].view(shape)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise FaultError(f"{path} is damaged: its tensors do not fit its metadata: {name}") from error
    return state, metadata


def _pack(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Split a tensor [n] into its non-zero values [k] and a bitmap of where they are, uint8 [ceil(n / 8)]."""
    stored = flat != 0
    return flat[stored], torch.from_numpy(np.packbits(stored.numpy(), bitorder="little"))


def _unpack(values: Tensor, positions: Tensor, shape: tuple[int, ...]) -> Packed:
    """Read what :func:`_pack` made of a tensor. Raises ValueError if the bitmap has another size or count."""
    size = math.prod(shape)
    if positions.numel() != math.ceil(size / 8):
        raise ValueError(f"a bitmap of {positions.numel()} bytes for {size} weights")
    stored = torch.from_numpy(np.unpackbits(positions.numpy(), count=size, bitorder="little")).bool()
    if stored.sum() != values.numel():
        raise ValueError(f"{values.numel()} values for {stored.sum()} positions")
    return Packed(values, stored, shape)


# ------------------------------------------------------------------------------------------------- networks


@torch.no_grad()
def check_folded(folded: nn.Module, network: nn.Module, input_shape: Sequence[int]) -> None:
    """Compare a folded network with the original on a random batch, both in evaluation mode.

    Raises:
        FaultError: if their outputs differ by more than ``TOLERANCE``.
    """
    images = _random_images(2, input_shape)
    _check_equal("the network with folded BatchNorms", folded(images), network(images))


@torch.no_grad()
def to_onnx(network: nn.Module, input_shape: Sequence[int]) -> bytes:
    """Convert a network to ONNX, for batches of any size, and compare the two on a random batch with onnxruntime.

    Args:
        network: in evaluation mode, on the CPU.
        input_shape: of one input, without the batch: C, H, W.

    Returns:
        The content of an ONNX file with input ``images`` and output ``logits``.

    Raises:
        UsageError: if onnx, onnxscript or onnxruntime is not installed.
        FaultError: if the conversion fails, or outputs differ by more than ``TOLERANCE``.
    """
    *_, onnxruntime = _optional("ONNX", "onnx", "onnxscript", "onnxruntime")
    images = _random_images(3, input_shape)
    try:
        program = torch.onnx.export(
            network,
            (images[:2],),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
        assert program is not None  # only the old exporter returns nothing
        model = program.model_proto
        for node in model.graph.node:
            del node.metadata_props[:]  # stack traces, with paths of this machine
        model.producer_name = PRODUCER
        content = model.SerializeToString()
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        logits = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    except Exception as error:  # PyTorch, onnxscript and onnxruntime raise errors of many kinds
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise FaultError(f"the network cannot be converted to ONNX: {reason}") from error
    _check_equal("the ONNX file, run by onnxruntime,", logits, network(images))
    return content


def _random_images(count: int, shape: Sequence[int]) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))


def _check_equal(what: str, found: Tensor, expected: Tensor) -> None:
    difference = (found - expected).abs().max().item()
    allowed = TOLERANCE * max(1.0, expected.abs().max().item())
    if not difference <= allowed:  # so that NaN fails, too
        raise FaultError(f"{what} differs from PyTorch's network by {difference:.1e}, where {allowed:.1e} is allowed")


# ------------------------------------------------------------------------------------------------- command


def main(argv: Sequence[str] | None = None) -> None:
    """Export one run or one saved network."""
    parser = arguments.Parser("Write a trained network's non-zero weights to a packed file, and the network as ONNX.")
    parser.prog = "python -m sparselearning.export"
    parser.add_argument(
        "run",
        type=arguments.path,
        metavar="RUN",
        help="a run's folder, for its last superposition, or any .pth file in it",
    )
    parser.add_argument("output", type=arguments.path, metavar="OUT.safetensors", help="packed file to write")
    parser.add_argument("--fold-bn", action="store_true", help="fold BatchNorms into the convolutions before them")
    parser.add_argument(
        "--onnx", type=arguments.path, metavar="OUT.onnx", help="also write the network, dense, for ONNX runtimes"
    )
    args = parser.parse_args(argv)
    for path, suffix, mark in ((args.output, ".safetensors", '"format_version"'), (args.onnx, ".onnx", PRODUCER)):
        if path and path.suffix != suffix:
            raise UsageError(f"{path}: give it a name that ends in {suffix}")
        if path:
            check_output(path, mark)

    source, state, config = read_network(args.run)
    record = config.get("network", {})
    metadata = _describe(config)
    onnx = None
    if args.fold_bn or args.onnx:
        if not record:
            raise UsageError(
                f"no config.json beside {source} says how to build its network, which --fold-bn and --onnx need: "
                "export a run of this version, or call fold_batchnorms and to_onnx with your own network"
            )
        network = build_network(record, state, source)
        if args.fold_bn:
            folded = fold_batchnorms(network)
            check_folded(folded, network, record["input_shape"])
            metadata["folded_batchnorms"] = _count_batchnorms(network) - _count_batchnorms(folded)
            network, state = folded, folded.state_dict()
        onnx = to_onnx(network, record["input_shape"]) if args.onnx else None

    save_sparse(args.output, state, metadata)
    dense = sum(entry.nbytes for entry in state.values())
    print(f"{args.output}: {_megabytes(args.output.stat().st_size)}, dense {_megabytes(dense)}")
    if args.fold_bn:
        print(f"folded BatchNorms: {metadata['folded_batchnorms']}, left: {_count_batchnorms(network)}")
    if onnx:
        write_bytes(args.onnx, onnx)
        print(f"{args.onnx}: {_megabytes(len(onnx))}, agrees with PyTorch within {TOLERANCE:g}")


def read_network(path: Path) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """Read the last superposition of a run's folder, or any file of weights in it.

    Returns:
        The file, its state dict, and the run's ``config.json``, empty if there is none.

    Raises:
        UsageError: if there is no such file, or it holds no network.
        FaultError: if it is damaged.
    """
    source = RunFolder(path).previous if path.is_dir() else path
    return source, _read_state(source), _read_config(source)


def _read_state(source: Path) -> dict[str, Tensor]:
    """State dict of any saved ``.pth``: a run's file, or a bare state dict, data-parallel or not."""
    if source.name == "model_previous.pth" and not source.exists() and source.parent.is_dir():
        raise UsageError(f"{source.parent} has no model_previous.pth, which a run writes when its pre-training ends")
    return saved_state(load_torch(source), source)


def _read_config(source: Path) -> dict[str, Any]:
    """``config.json`` of the run that a network belongs to; empty if there is none."""
    for folder in source.parents[:2]:  # a ticket lies in a folder of the run's
        run = RunFolder(folder)
        if run.config.is_file():
            return run.read_config()
    return {}


def _describe(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a packed file says about its network."""
    known = {
        "model": config.get("model", config.get("arch")),
        "data": Path(config["data"]).stem if "data" in config else None,
        "network": config.get("network"),
    }
    return {key: value for key, value in known.items() if value}


def _count_batchnorms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"


def _optional(what: str, *modules: str) -> list[Any]:
    """Import modules that not every user has.

    Raises:
        UsageError: if one is missing, with the command that brings it.
    """
    try:
        return [importlib.import_module(module) for module in modules]
    except ImportError as error:
        packages = " ".join(module.split(".")[0] for module in modules)
        raise UsageError(f"{what} needs packages that are not installed: pip install {packages}") from error


if __name__ == "__main__":
    run_script(main)
