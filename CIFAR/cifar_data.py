"""CIFAR-sized image classification data: CIFAR-10/100, MNIST, scikit-learn's digits, and any ``.npz`` file.

A data set lives on the device as one uint8 tensor. Shuffling, cropping, flipping and normalising are a few
whole-batch tensor operations, so there are no worker processes, and all randomness of an epoch is drawn at
its start from a generator that depends on nothing but (seed, epoch). A batch is therefore a pure function of
(seed, epoch, batch index), on every device: resuming in the middle of an epoch replays nothing, and the
processes of a data-parallel run draw the same global batches and each take their own part.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparselearning.process.errors import FaultError, UsageError
from sparselearning.process.files import lock_file
from sparselearning.process.schema import BelowOne, check_option
from sparselearning.process.seeding import derive_seed
from sparselearning.training.data import Batch, class_balanced

DIGITS_TEST_SIZE = 599  # a third of scikit-learn's 1,797 digits
SECONDS_BETWEEN_LOOKS = 1.0  # at a download of another run
MOST_EMPTY_CLASSES = 1000  # without a training image, in a file of one's own; more are a mistake that costs memory


class Arrays(NamedTuple):
    """A data set as Keras lays it out: uint8 images [N, H, W] or [N, H, W, C], integer labels [N] or [N, 1]."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


@dataclass(frozen=True)
class Augmentation:
    """Random crops of the image's own size after padding by ``pad`` pixels, mirrored half of the time."""

    padding: Literal["constant", "reflect"]  # constant: zeros, on the raw pixels
    flip: bool
    pad: int = 4


@dataclass(frozen=True)
class DataSet:
    """How a data set is read, described and augmented."""

    load: Callable[[Path], Arrays]  # takes the data folder, or the file itself for an .npz
    about: str
    augmentation: Augmentation
    num_classes: int | None  # None: one more than the largest training label


@dataclass(frozen=True)
class Data:
    """A data set on the device, ready to train and evaluate on."""

    name: str
    train: "TensorLoader"
    evaluation: "TensorLoader"  # after every epoch: the held-out part of the training set, or else the test set
    test: "TensorLoader"
    num_classes: int
    channels: int
    image_size: int  # height = width, in pixels
    mean: tuple[float, ...]  # of the images trained on, per channel, in raw pixel values from 0 to 255
    std: tuple[float, ...]

    def use_memory_format(self, memory_format: torch.memory_format) -> None:
        """Let all image batches have this layout from now on (at first they are channels-last)."""
        for loader in (self.train, self.evaluation, self.test):
            loader.use_memory_format(memory_format)


def load_data(
    name: str,
    *,
    data_dir: str | Path,
    batch_size: int,
    test_batch_size: int,
    valid_split: float = 0.0,
    seed: int,
    device: torch.device | str,
    rank: int = 0,
    world_size: int = 1,
) -> Data:
    """Load a data set onto the device.

    Args:
        name: a key of ``DATASETS``, or the path of an ``.npz`` file in the layout of ``Arrays``.
        data_dir: folder that torchvision's data sets are kept in and downloaded to. Two processes must not
            download to one folder at once: in a data-parallel run, one process per machine goes first.
        batch_size: training images per step, over all processes together.
        test_batch_size: the same for evaluation.
        valid_split: share in [0, 1) of the training set, taken from its end, that is held out for evaluation.
        seed: decides the order, crops and flips of training, and nothing else: all splits are fixed.
        device: where the images are kept and the batches are made.
        rank, world_size: this process and the number of processes that share each batch.

    The pixels are normalised by the per-channel mean and standard deviation of the images trained on.

    Raises:
        UsageError: no such data set or file; a split that leaves nothing to train or evaluate on; a batch
            that is smaller than the number of processes.
        FaultError: the data is damaged, wrongly shaped or incomplete, or cannot be downloaded.
    """
    arrays, num_classes = load_arrays(name, data_dir)
    kept = _kept_for_training(len(arrays.x_train), valid_split)
    mean, std = channel_statistics(arrays.x_train[:kept])

    loader = partial(
        TensorLoader,
        mean=mean,
        std=std,
        seed=seed,
        device=device,
        rank=rank,
        world_size=world_size,
    )
    *_, channels = arrays.x_train.shape
    augmentation = DATASETS.get(name, NPZ_FILE).augmentation
    if name not in DATASETS and channels == 1:  # digits and letters, as a rule: mirrored, they are others or none
        augmentation = replace(augmentation, flip=False)
    train = loader(arrays.x_train[:kept], arrays.y_train[:kept], batch_size=batch_size, augmentation=augmentation)
    test = loader(arrays.x_test, arrays.y_test, batch_size=test_batch_size)
    evaluation = test
    if valid_split > 0:
        evaluation = loader(arrays.x_train[kept:], arrays.y_train[kept:], batch_size=test_batch_size)
    image_size = arrays.x_train.shape[1]
    statistics = tuple(mean.tolist()), tuple(std.tolist())
    return Data(Path(name).stem, train, evaluation, test, num_classes, channels, image_size, *statistics)


def load_arrays(name: str, data_dir: str | Path) -> tuple[Arrays, int]:
    """Load a data set as it is, images uint8 [N, H, W, C] and labels int64 [N], and the number of its classes.

    The arguments and errors are those of :func:`load_data`.
    """
    data_set, source = _find(name, Path(data_dir))
    return _validated(data_set.load(source), name, data_set.num_classes)


def check_data_name(name: str) -> None:
    """Raise UsageError if ``name`` is no data set and no file; nothing is read or downloaded."""
    _find(name, Path())


def data_help() -> str:
    """Name every data set in one phrase, for the scripts' help."""
    named = ", ".join(f"{name} ({data_set.about})" for name, data_set in DATASETS.items())
    return f"{named}, or the path of {NPZ_FILE.about}"


class TensorLoader:
    """One part of a data set on one device, as a ``sparselearning.training.data.BatchSource``.

    With ``augmentation`` it is shuffled anew every epoch, cropped and flipped; without, it is untouched and in
    stored order. Over all processes, every sample of an epoch is seen exactly once. The last batch takes what
    is left; leftovers too few to give each process an image join the batch before.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        mean: np.ndarray,
        std: np.ndarray,
        batch_size: int,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Put images (uint8, [N, H, W, C]) and labels (int64, [N]) on the device.

        ``mean`` and ``std`` ([C], in raw pixel values) normalise the images; ``batch_size`` counts the images
        of all ``world_size`` processes. Raises UsageError if a batch or the set has fewer images than that.
        """
        for what, count in (("a batch", batch_size), ("a set", len(images))):
            if count < world_size:
                raise UsageError(
                    f"{what} of {count} images cannot be shared by {world_size} processes: each needs one at least"
                )
        self.num_samples, self._size = images.shape[:2]
        self._pad = augmentation.pad if augmentation else 0
        self._augmentation = augmentation
        self._batch_size, self._seed = batch_size, seed
        self._rank, self._world_size = rank, world_size

        margin = (self._pad, self._pad)
        mode = augmentation.padding if augmentation else "constant"
        padded = torch.from_numpy(np.pad(images, ((0, 0), margin, margin, (0, 0)), mode=mode))
        # Stored in the layout that batches leave in: indexing and arithmetic preserve it, at no extra pass.
        self._padded = padded.permute(0, 3, 1, 2).to(device=device, memory_format=torch.channels_last)
        self._labels = torch.from_numpy(labels).to(device)
        # pixel * scale + shift = (pixel - mean) / std, in one fused pass from uint8 to float32
        self._scale = torch.tensor(1 / std, dtype=torch.float32, device=device).view(-1, 1, 1)
        self._shift = torch.tensor(-mean / std, dtype=torch.float32, device=device).view(-1, 1, 1)

    def use_memory_format(self, memory_format: torch.memory_format) -> None:
        """Let image batches have this layout from now on."""
        self._padded = self._padded.to(memory_format=memory_format)  # strides that say so, with one channel too

    def __len__(self) -> int:
        """Batches per epoch, the same number on every process."""
        full, left = divmod(self.num_samples, self._batch_size)
        # BatchNorm cannot train on one image at 1x1 pixels: so few join the batch before.
        fewest = self._world_size * (1 if self._augmentation is None else 2)
        return full + (left >= fewest or full == 0)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield this process's share of batches ``start``, ``start + 1``, … of an epoch (both from 0)."""
        if self._augmentation is None:
            return self._stored_batches(start)
        return self._augmented_batches(self._augmentation, epoch, start)

    def class_balanced_batch(self, size: int, seed: int) -> Batch:
        """Draw ``size`` images without replacement, as many of each class as of any other, unaugmented.

        The counts of two classes differ by at most one, unless a class has no more images to give. All
        processes draw the same whole batch; it depends on the set, ``size`` and ``seed`` alone. Raises
        UsageError if the set has fewer than ``size`` images.
        """
        if not 1 <= size <= self.num_samples:
            raise UsageError(f"cannot draw {size} images from a training set of {self.num_samples}")
        generator = torch.Generator().manual_seed(derive_seed(seed, "class-balanced batch"))
        chosen = class_balanced(self._labels.cpu(), size, generator).to(self._labels.device)
        return Batch(self._normalised(self._unpadded()[chosen]), self._labels[chosen])

    def _stored_batches(self, start: int) -> Iterator[Batch]:
        images = self._unpadded()
        for batch in range(start, len(self)):
            mine, weight = self._share(batch)
            yield Batch(self._normalised(images[mine]), self._labels[mine], weight)

    def _augmented_batches(self, augmentation: Augmentation, epoch: int, start: int) -> Iterator[Batch]:
        count = self.num_samples
        generator = torch.Generator().manual_seed(derive_seed(self._seed, "data", epoch))
        order = torch.randperm(count, generator=generator)
        top, left = torch.randint(2 * self._pad + 1, (2, count), generator=generator)
        mirror = torch.randint(2, (count,), generator=generator)
        draws = torch.stack([order, top, left, mirror]).to(self._padded.device, non_blocking=True)
        order, top, left, mirror = draws
        labels, mirror = self._labels[order], mirror.bool().view(-1, 1, 1, 1)
        # Every possible crop of every image, as a view: [N, top, left, C, H, W].
        crops = self._padded.unfold(2, self._size, 1).unfold(3, self._size, 1).permute(0, 2, 3, 1, 4, 5)
        for batch in range(start, len(self)):
            mine, weight = self._share(batch)
            images = crops[order[mine], top[mine], left[mine]]
            if augmentation.flip:
                images = torch.where(mirror[mine], images.flip(-1), images)
            yield Batch(self._normalised(images), labels[mine], weight)

    def _share(self, batch: int) -> tuple[slice, float]:
        """Return this process's contiguous part of a global batch, and its weight (see ``Batch``)."""
        first = batch * self._batch_size
        size = self.num_samples - first if batch == len(self) - 1 else self._batch_size
        low = first + size * self._rank // self._world_size
        high = first + size * (self._rank + 1) // self._world_size
        return slice(low, high), self._world_size * (high - low) / size

    def _unpadded(self) -> Tensor:
        inner = slice(self._pad, self._pad + self._size)
        return self._padded[:, :, inner, inner]

    def _normalised(self, images: Tensor) -> Tensor:
        return torch.addcmul(self._shift, images, self._scale)


def channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and standard deviation (float64, [C]) of the raw pixel values of uint8 [N, H, W, C].

    Exact but for the last rounding, from the 256 counts of each channel. A channel that never varies gets
    standard deviation 1.
    """
    levels = np.arange(256)
    channels = [torch.from_numpy(channel.ravel()) for channel in np.moveaxis(images, -1, 0)]
    counts = np.stack([channel.bincount(minlength=256).numpy() for channel in channels])
    pixels = counts[0].sum()
    mean = counts @ levels / pixels
    variance = (counts * (levels - mean[:, None]) ** 2).sum(1) / pixels
    return mean, np.where(variance > 0, np.sqrt(variance), 1.0)


def _find(name: str, data_dir: Path) -> tuple[DataSet, Path]:
    if name in DATASETS:
        return DATASETS[name], data_dir.expanduser()
    path = Path(name).expanduser()
    if path.is_file():
        return NPZ_FILE, path
    raise UsageError(
        f"there is no data set or file {name!r}: choose {', '.join(DATASETS)}, or the path of an .npz file"
    )


def _kept_for_training(count: int, valid_split: float) -> int:
    check_option("valid_split", valid_split, BelowOne)
    held_out = round(valid_split * count)
    if held_out == count or (valid_split > 0 and held_out == 0):
        raise UsageError(
            f"holding out {valid_split} of {count} training images leaves none to "
            + ("train on" if held_out else "evaluate on")
        )
    return count - held_out


def _validated(arrays: Arrays, name: str, num_classes: int | None) -> tuple[Arrays, int]:
    """Return the arrays as uint8 [N, H, W, C] and int64 [N], and the number of classes; raise FaultError."""
    x_train, y_train = _validated_part(arrays.x_train, arrays.y_train, "train", name)
    x_test, y_test = _validated_part(arrays.x_test, arrays.y_test, "test", name)
    if x_train.shape[1:] != x_test.shape[1:]:
        raise FaultError(
            f"{name}: the images of x_train and x_test must have one shape, but they are "
            f"{x_train.shape[1:]} and {x_test.shape[1:]} (height, width, channels)"
        )
    present = np.unique(y_train)
    if len(present) == 1:
        raise FaultError(f"{name}: all training images are of one class, {present[0]}: there is nothing to learn")
    if num_classes is None:
        num_classes = int(present[-1]) + 1
        empty = num_classes - len(present)
        if empty > MOST_EMPTY_CLASSES:
            first = np.setdiff1d(np.arange(5 + len(present)), present)[:5]
            raise FaultError(
                f"{name}: {empty} of the classes 0 to {num_classes - 1} of y_train have no image "
                f"({', '.join(map(str, first))} and {empty - 5} more): number them without gaps"
            )
    for array, labels in (("y_train", y_train), ("y_test", y_test)):
        if labels.max() >= num_classes:
            raise FaultError(
                f"{name}: {array} holds the label {labels.max()}, "
                f"outside the training set's class range 0 to {num_classes - 1}"
            )
    return Arrays(x_train, y_train.astype(np.int64), x_test, y_test.astype(np.int64)), num_classes


def _validated_part(x: np.ndarray, y: np.ndarray, part: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    if x.ndim == 3:
        x = x[..., None]
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[-1] not in (1, 3) or x.shape[1] != x.shape[2]:
        raise FaultError(
            f"{name}: x_{part} must hold square uint8 images, N x H x H or N x H x H x 3, "
            f"but it is {x.dtype} of shape {x.shape}"
        )
    if y.dtype.kind not in "iu" or y.shape not in ((y.size,), (y.size, 1)):
        raise FaultError(
            f"{name}: y_{part} must hold integer labels, N or N x 1, but it is {y.dtype} of shape {y.shape}"
        )
    if len(x) != len(y):
        raise FaultError(f"{name}: x_{part} has {len(x)} images, but y_{part} has {len(y)} labels")
    if x.size == 0:
        raise FaultError(f"{name}: x_{part} has no images (shape {x.shape})")
    y = y.reshape(-1)  # still of its own type: not every label fits into int64
    if y.min() < 0:
        raise FaultError(f"{name}: y_{part} holds the negative label {y.min()}; classes count from 0")
    return x, y


def _load_torchvision(class_name: str, files: str, folder: str, data_dir: Path) -> Arrays:
    # Imported here, since it takes a second that the other data sets need not wait for.
    from torchvision import datasets

    data_set = getattr(datasets, class_name)
    try:
        with _downloading_alone(data_dir):
            train, test = (data_set(data_dir, train=part, download=True) for part in (True, False))
    # The reader unpickles what it finds: a damaged file can raise anything.
    except Exception as error:
        raise FaultError(
            f"{class_name} could not be read from {data_dir / folder} or downloaded to it ({_reason(error)}): "
            f"delete what is damaged there, and connect to the network or put {files} there yourself"
        ) from error
    return Arrays(*(np.asarray(array) for part in (train, test) for array in (part.data, part.targets)))


@contextmanager
def _downloading_alone(data_dir: Path) -> Iterator[None]:
    """Wait for other runs that may be downloading to the same folder, such as those of a sweep on other GPUs."""
    with ExitStack() as held:
        with suppress(OSError):  # a folder that cannot be written to holds all data already, or the download says so
            data_dir.mkdir(parents=True, exist_ok=True)
            file = held.enter_context((data_dir / ".downloading").open("a"))
            while not _locked(file):
                time.sleep(SECONDS_BETWEEN_LOOKS)
        yield


def _locked(file: IO[str]) -> bool:
    """Whether nothing else has locked a file now, as far as locks tell."""
    try:
        lock_file(file)
    except BlockingIOError:
        return False
    return True


def _reason(error: Exception) -> str:
    """Return what a library says of its failure, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _load_digits(_: Path) -> Arrays:
    """Return scikit-learn's 8x8 digits as 32x32 RGB, in a fixed split with equal shares of every class."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    small = torch.from_numpy(digits.images).unsqueeze(1) * (255 / 16)
    large = torch.nn.functional.interpolate(small, size=(32, 32), mode="bilinear").round().to(torch.uint8)
    images = large.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
    x_train, x_test, y_train, y_test = train_test_split(
        images, digits.target, test_size=DIGITS_TEST_SIZE, stratify=digits.target, random_state=0
    )
    return Arrays(x_train, y_train, x_test, y_test)


def _load_npz(path: Path) -> Arrays:
    try:
        file = np.load(path)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it holds one bare array")
        with file:
            missing = [name for name in Arrays._fields if name not in file]
            if not missing:
                return Arrays(*(np.asarray(file[name]) for name in Arrays._fields))
    # What damaged bytes raise has no common class: zip, zlib, tokenizer, memory errors and more.
    except Exception as error:
        raise FaultError(
            f"{path} cannot be read as an .npz file of plain arrays ({_reason(error)}): write it with numpy.savez"
        ) from error
    raise FaultError(f"{path} lacks {', '.join(missing)}: it must hold {', '.join(Arrays._fields)}")


DATASETS = {
    "cifar10": DataSet(
        load=partial(_load_torchvision, "CIFAR10", "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", ""),
        about="60,000 photos, 3x32x32, 10 classes, downloaded",
        augmentation=Augmentation(padding="reflect", flip=True),
        num_classes=10,
    ),
    "cifar100": DataSet(
        load=partial(_load_torchvision, "CIFAR100", "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", ""),
        about="60,000 photos, 3x32x32, 100 classes, downloaded",
        augmentation=Augmentation(padding="constant", flip=True),
        num_classes=100,
    ),
    "mnist": DataSet(
        load=partial(
            _load_torchvision,
            "MNIST",
            "the four .gz files of https://ossci-datasets.s3.amazonaws.com/mnist/",
            "MNIST/raw",
        ),
        about="70,000 digits, 1x28x28, 10 classes, downloaded",
        augmentation=Augmentation(padding="constant", flip=False),
        num_classes=10,
    ),
    "digits": DataSet(
        load=_load_digits,
        about="scikit-learn's 1,797 digits, shown as 3x32x32, 10 classes, no download",
        augmentation=Augmentation(padding="constant", flip=False),
        num_classes=10,
    ),
}

NPZ_FILE = DataSet(
    load=_load_npz,
    about="an .npz file (x_train, x_test: uint8, N x H x H, not flipped, or N x H x H x 3; y_train, y_test: integers)",
    augmentation=Augmentation(padding="constant", flip=True),
    num_classes=None,
)
