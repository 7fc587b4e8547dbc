"""Predict with a trained network, on a CPU, with its active weights alone.

python -m sparselearning.predict RUN IMAGES --out predictions.csv
python -m sparselearning.predict FILE.safetensors IMAGES --time

RUN is a run's folder, for its last superposition, or any .pth file in it; FILE a packed file of
``sparselearning.export``, whose weights go straight to the kernels' lists. IMAGES is an ``.npz`` file with ``x_test``
or ``x`` (uint8, N x H x W or N x H x W x C), or a folder of images. The CSV has a line for each: its number or file
name, the class, and the probability that the network gives it. With labels (``y_test`` or ``y``) stderr gets the
accuracy.
"""

import csv
import io
import statistics
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn

from sparselearning.execution import check_available, sparse_inference
from sparselearning.execution.folding import fold_batchnorms
from sparselearning.export import Packed, read_network, read_packed
from sparselearning.process import arguments
from sparselearning.process.errors import FaultError, UsageError
from sparselearning.process.files import check_output, write_text
from sparselearning.process.schema import Between, Ordinal, read
from sparselearning.process.script import run_script
from sparselearning.training.builders import build_empty, build_network

HEADER = ("image", "class", "probability")
ARRAYS = {"x_test": "y_test", "x": "y"}
"""Names of the images in an ``.npz`` file, the first that is there, and of their labels, if it has any."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff")
BATCH = 32  # images at a time
TIMED_SECONDS = 2.0  # for each size of batch


def main(argv: Sequence[str] | None = None) -> None:
    """Predict the class of every image.

    Raises:
        UsageError: if the network or the images cannot be used, or another file is where the output goes.
        FaultError: if a file is damaged or cannot be written.
    """
    parser = arguments.Parser(__doc__)
    parser.prog = "python -m sparselearning.predict"
    parser.add_argument(
        "network",
        type=arguments.path,
        metavar="RUN_OR_FILE",
        help="a run's folder, a .pth file in it, or a packed file",
    )
    parser.add_argument(
        "images", type=arguments.path, metavar="IMAGES", help="an .npz file with x_test or x, or a folder of images"
    )
    parser.add_argument("--out", type=arguments.path, metavar="FILE.csv", help="CSV file to write, in place of stdout")
    parser.add_argument("--batch-size", type=arguments.positive, default=BATCH, metavar="N", help="images at a time")
    parser.add_argument("--threads", type=arguments.positive, metavar="N", help="threads (by default PyTorch's choice)")
    parser.add_argument("--time", action="store_true", help="print images/s at batch 1 and at --batch-size to stderr")
    args = parser.parse_args(argv)
    if args.out:
        check_output(args.out, ",".join(HEADER))
    if args.threads:
        torch.set_num_threads(args.threads)
    images = open_images(args.images)
    network, preparation = load_network(args.network)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(HEADER)
    batch = torch.empty(0)
    predicted: list[int] = []
    for numbers, batch in batches(images, preparation, args.batch_size):
        probabilities, classes = network(batch).softmax(dim=1).max(dim=1)
        predicted += classes.tolist()
        for i, number, share in zip(numbers, classes.tolist(), probabilities.tolist(), strict=True):
            table.writerow((images.name(i), number, f"{share:.6f}"))
    if args.out:
        write_text(args.out, text.getvalue())
    else:
        sys.stdout.write(text.getvalue())
    if images.labels is not None:
        hits = int((images.labels == predicted).sum())
        print(accuracy_line(hits, len(predicted)), file=sys.stderr)
    if args.time:
        for size in sorted({1, args.batch_size}):
            repeated = batch[torch.arange(size) % len(batch)]
            print(f"batch {size}: {size / seconds(network, repeated):.1f} images/s", file=sys.stderr)


def accuracy_line(hits: int, images: int) -> str:
    """What is said of images with labels."""
    return f"accuracy {100 * hits / images:.2f} % of {images:,} images"


def seconds(network: nn.Module, images: Tensor) -> float:
    """Median time of a batch, after a warm-up."""
    for _ in range(3):
        network(images)
    times: list[float] = []
    while len(times) < 5 or sum(times) < TIMED_SECONDS:
        begin = time.perf_counter()
        network(images)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


# ------------------------------------------------------------------------------------------- networks


@dataclass(frozen=True)
class Preparation:
    """What was done with images before the network saw them, as ``config.json`` and packed files record it.

    Attributes:
        input_shape: channels, rows, columns.
        mean, std: of each channel, in raw pixel values from 0 to 255.
        resize: what the shorter side is scaled to, before the centre is cut out; None: images are of the right size.
    """

    input_shape: list[Ordinal]
    mean: list[float]
    std: list[Annotated[float, Between(1e-6)]]
    resize: Ordinal | None = None

    def prepare(self, image: Any, name: Any) -> Tensor:
        """Make float32 [C, H, W] of a uint8 array [H, W, C] or a Pillow image."""
        channels, rows, columns = self.input_shape
        if not isinstance(image, np.ndarray):
            image = self._array(image)
        if image.shape != (rows, columns, channels):
            raise UsageError(
                f"image {name} has {' x '.join(map(str, image.shape))} numbers, and the network takes "
                f"{rows} x {columns} x {channels}"
            )
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (torch.from_numpy(image).permute(2, 0, 1) - mean) / std

    def _array(self, image: Any) -> np.ndarray:
        channels, rows, columns = self.input_shape
        image = image.convert("L" if channels == 1 else "RGB")
        if self.resize is not None:
            from torchvision.transforms import v2

            image = v2.CenterCrop((rows, columns))(v2.Resize(self.resize)(image))
        array = np.array(image)
        return array[:, :, None] if array.ndim == 2 else array


def load_network(path: Path) -> tuple[nn.Module, Preparation]:
    """Load a run's network, or a packed file's, for prediction.

    Raises:
        UsageError: if there is none, or it is not known how it is built or what its images went through.
        FaultError: if it is damaged.
    """
    check_available()
    if path.suffix == ".safetensors":
        entries, metadata = read_packed(path)
        record = _network_record(metadata, path)
        network = _from_packed(entries, metadata, path)
    else:
        source, state, config = read_network(path)
        record = _network_record(config, source)
        network = sparse_inference(build_network(record, state, source))
    preparation = read(Preparation, record, str(path))
    if len(preparation.input_shape) != 3 or {len(preparation.mean), len(preparation.std)} != {
        preparation.input_shape[0]
    }:
        raise FaultError(f"{path} is damaged: input_shape, mean and std are not of as many channels")
    return network, preparation


def load_packed(path: Path) -> nn.Module:
    """Load a packed file's network for prediction: what ``sparse_inference`` makes of the model that was exported.

    Active weights go straight to the kernels' lists: of layers with a kernel no dense weight is ever made.

    Args:
        path: file of ``sparselearning.export``.

    Raises:
        UsageError: if there is none, it does not say how its network is built, or a package is missing.
        FaultError: if it is damaged.
    """
    check_available()
    entries, metadata = read_packed(path)
    if not isinstance(metadata.get("network"), dict):
        raise UsageError(
            f"{path} does not say how its network is built: load_sparse of sparselearning.export gives its weights for "
            "a model of your own, and sparse_inference takes that"
        )
    return _from_packed(entries, metadata, path)


def _network_record(known: Any, source: Path) -> dict[str, Any]:
    record = known.get("network")
    if not isinstance(record, dict) or "mean" not in record or "std" not in record:
        raise UsageError(
            f"{source} does not say how its network is built and its images were normalised (network, with mean and "
            "std, in config.json): train, or export, with this version"
        )
    return record


def _from_packed(entries: dict[str, Tensor | Packed], metadata: dict[str, Any], path: Path) -> nn.Module:
    """Build a packed file's network around lists of its active weights.

    Raises:
        UsageError: if the weights are of another network than the metadata say.
        FaultError: if they are not finite.
    """
    from sparselearning.execution.inference import Active, SparseInference, kernel_shape

    is_folded = bool(metadata.get("folded_batchnorms"))
    network = build_empty(metadata["network"], path)
    network = fold_batchnorms(network) if is_folded else network
    own = network.state_dict()
    if {name: list(entry.shape) for name, entry in own.items()} != metadata["shapes"]:
        raise UsageError(f"{path} holds weights of another model than its metadata name")
    layers = {f"{name}.weight" if name else "weight": layer for name, layer in network.named_modules()}
    state = {}
    for name, entry in entries.items():
        values = entry.values if isinstance(entry, Packed) else entry
        if values.is_floating_point() and not values.isfinite().all():
            raise FaultError(f"{path} is damaged: {name} holds numbers that are not finite")
        layer = layers.get(name)
        if isinstance(entry, Packed) and layer is not None and kernel_shape(layer) is not None:
            positions = entry.stored.nonzero().squeeze(1).numpy()
            layer.active = Active(positions, values.float())
        else:
            state[name] = (entry.dense() if isinstance(entry, Packed) else entry).to(own[name].dtype)
    network.load_state_dict(state, strict=False, assign=True)
    try:
        fast = SparseInference.of(network)
        is_whole = not any(entry.is_meta for entry in (*fast.parameters(), *fast.buffers()))
    except UsageError:
        is_whole = False
    if not is_whole:  # some layer, or all, cannot do without its dense weight
        for layer in layers.values():
            layer.__dict__.pop("active", None)
        dense = {name: entry.dense() if isinstance(entry, Packed) else entry for name, entry in entries.items()}
        network.load_state_dict({name: entry.to(own[name].dtype) for name, entry in dense.items()}, assign=True)
        fast = SparseInference.of(network)
    return fast


# ------------------------------------------------------------------------------------------- images


class ImageArray:
    """Images of an ``.npz`` file, uint8 [N, H, W, C], named by their numbers from 0, and their labels [N], if known."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray | None = None) -> None:
        self.pixels = pixels
        self.labels = labels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, number: int) -> np.ndarray:
        return self.pixels[number]

    def name(self, number: int) -> str:
        """Name of an image in the output."""
        return str(number)


class ImageFolder:
    """Images of a folder, in the order of their names."""

    labels = None

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> Any:
        from PIL import Image

        path = self.files[number]
        try:
            with Image.open(path) as image:
                image.load()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise FaultError(f"cannot read the image {path}: {error}") from error
        if image.mode.startswith(("I", "F")):
            raise UsageError(f"the image {path} has more than 8 bits per channel")
        return image

    def name(self, number: int) -> str:
        """Name of an image in the output."""
        return self.files[number].name


def batches(
    images: ImageArray | ImageFolder, preparation: Preparation, size: int = BATCH
) -> Iterator[tuple[range, Tensor]]:
    """The images as a network takes them, so many at a time, and their numbers."""
    for start in range(0, len(images), size):
        numbers = range(start, min(start + size, len(images)))
        yield numbers, torch.stack([preparation.prepare(images[i], images.name(i)) for i in numbers])


def open_images(path: Path) -> ImageArray | ImageFolder:
    """Open an ``.npz`` file or a folder of images.

    Raises:
        UsageError: if there is none, or no images in it.
        FaultError: if it cannot be read.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not files:
            raise UsageError(f"the folder {path} holds no images ({', '.join(SUFFIXES)})")
        return ImageFolder(files)
    if not path.is_file():
        raise UsageError(f"there is no file or folder {path}")
    if path.suffix != ".npz":
        raise UsageError(f"{path} is neither an .npz file nor a folder of images")
    try:
        with np.load(path) as arrays:
            names = next(((x, y) for x, y in ARRAYS.items() if x in arrays), None)
            pixels, labels = (arrays.get(name) for name in names or (None, None))
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise FaultError(f"{path} is damaged or no .npz file") from error
    if names is None or pixels is None:
        raise UsageError(f"{path} holds neither {' nor '.join(ARRAYS)}")
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or not len(pixels):
        raise UsageError(
            f"{names[0]} of {path} is {pixels.dtype} {list(pixels.shape)}, not uint8 [N, H, W] or [N, H, W, C] of an "
            "image at least"
        )
    if labels is not None and (labels.shape != (len(pixels),) or labels.dtype.kind not in "iu"):
        raise UsageError(
            f"{names[1]} of {path} is {labels.dtype} {list(labels.shape)}, not one integer for each of "
            f"{len(pixels)} images"
        )
    return ImageArray(pixels if pixels.ndim == 4 else pixels[..., None], labels)


if __name__ == "__main__":
    run_script(main)
