"""ImageNet, or any data set laid out like it: ``DIR/train/CLASS/*`` and ``DIR/val/CLASS/*``.

Worker processes decode and augment; images travel as uint8 in channels-last memory and are normalised on the
device. What an image looks like depends on (seed, epoch, its index) alone: neither on the number of workers nor on
where an epoch is resumed.
"""

import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple, NoReturn
from warnings import catch_warnings, simplefilter

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from tqdm import tqdm

from sparselearning.process.errors import FaultError, UsageError
from sparselearning.process.schema import Count, Ordinal, check_option
from sparselearning.process.seeding import derive_seed
from sparselearning.process.signals import STOP_SIGNALS
from sparselearning.training.data import Batch, class_balanced

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's pixels in [0, 1], per channel R, G, B
STD = (0.229, 0.224, 0.225)
# Modules that workers need, imported once by the process that they are forked from. Many Pythons ignore "__main__"
# here: the last entry brings what the script imports.
PRELOADED = ["__main__", "torchvision.datasets", "torchvision.transforms.v2", "sparselearning.training.experiment"]
LOST_WORKER = ("DataLoader worker", "Pin memory thread")  # how PyTorch's sentences about a worker that died begin
LAYOUT = "images as DIR/train/CLASS/NAME.JPEG and DIR/val/CLASS/NAME.JPEG"
LONGEST_SIDE = 16  # in shorter sides: of a longer image, evaluation leaves out both ends before it is resized

View = Callable[[Image.Image], Tensor]  # RGB image -> uint8, 3 x H x W


def training_view(size: int) -> View:
    """Return the map from an RGB image to a random crop of it, 3 x size x size uint8, flipped half of the time."""
    return v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor()])


def evaluation_view(size: int, resize: int) -> View:
    """Return the map from an RGB image, its shorter side scaled to ``resize``, to its centre 3 x size x size uint8."""
    return v2.Compose([_without_far_ends, v2.Resize(resize), v2.CenterCrop(size), v2.PILToTensor()])


def check_centre(size: int, resize: int, names: tuple[str, str] = ("val_image_size", "resize")) -> None:
    """Refuse a centre, of ``size`` pixels, larger than images whose shorter side is ``resize``; ``names`` for messages.

    Raises:
        UsageError: if it is.
    """
    if size > resize:
        raise UsageError(f"{names[0]} {size} cannot be cut out of images that {names[1]} scales to {resize}")


def _without_far_ends(image: Image.Image) -> Image.Image:
    """Shorten a very long image about its centre: resized whole, one of 1 x 20,000 pixels would fill the memory."""
    longest = LONGEST_SIDE * min(image.size)
    left, top = (max(0, (side - longest) // 2) for side in image.size)
    return image.crop((left, top, image.width - left, image.height - top)) if left or top else image


def load_rgb(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image as RGB with 8 bits per channel: of 16 the upper 8, which Pillow keeps of colours but not of grey.

    Raises:
        Exception: of a dozen kinds, if it is damaged; ValueError, if its pixels are of 32 bits.
    """
    with open(path, "rb") as file:
        image = Image.open(file)
        if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
            raise ValueError("pixels of 32 bits, whose range it does not say")
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return image.convert("RGB")


class ImageFiles:
    """The images of one split: their paths and labels, their classes, and which of them turned out damaged.

    Attributes:
        classes: folder names in sorted order; a label is a position in this list.
        labels: int64, N, on the CPU.
        damaged: path -> reason, of the files that could not be read so far.

    Raises:
        UsageError: ``folder`` is no folder, or holds no class folders.
        FaultError: ``folder`` cannot be read, a class folder holds no image, or links lead to one folder twice.
    """

    def __init__(self, folder: Path) -> None:
        seen: dict[str, str] = {}
        try:
            with os.scandir(folder) as entries:
                self.classes = sorted(entry.name for entry in entries if entry.is_dir())
            found = [_images_under(os.path.join(folder, name), seen) for name in self.classes]
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UsageError(f"there is no folder {error.filename}: an ImageNet data set holds {LAYOUT}") from error
        except OSError as error:
            raise FaultError(f"{error.filename} cannot be read: {error.strerror}") from error
        if not self.classes:
            raise UsageError(f"{folder} holds no class folders: an ImageNet data set holds {LAYOUT}")
        empty = [name for name, paths in zip(self.classes, found, strict=True) if not paths]
        if empty:
            raise FaultError(
                f"no images in {_listed(empty)} under {folder}: add some ({', '.join(IMG_EXTENSIONS)}) or remove "
                "the folders from train/ and val/ alike"
            )
        self.folder = folder
        self.labels = torch.arange(len(found)).repeat_interleave(torch.tensor([len(paths) for paths in found]))
        self.damaged: dict[str, str] = {}
        self._paths = np.array([os.fsencode(path) for paths in found for path in paths])  # not a million strings

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> "ImageFile":
        return ImageFile(index, os.fsdecode(self._paths[index]), int(self.labels[index]))


def _images_under(folder: str, seen: dict[str, str]) -> list[str]:
    """Return the paths of all images in a folder and those below it, in the order of torchvision's ImageFolder.

    Args:
        folder: of one class.
        seen: what each folder that was walked before, by its real path, was found as; those walked now are added.

    Raises:
        FaultError: if symbolic links lead to a folder twice, or around in a circle.
        OSError: if a folder cannot be read.
    """

    def fail(error: OSError) -> NoReturn:
        raise error

    found = []
    for place, _, names in os.walk(folder, followlinks=True, onerror=fail):
        real = os.path.realpath(place)
        if real in seen:
            raise FaultError(f"{place} is {seen[real]} once more, by a symbolic link: remove one of them")
        seen[real] = place
        found.append((place, sorted(name for name in names if name.lower().endswith(IMG_EXTENSIONS))))
    return [os.path.join(place, name) for place, names in sorted(found) for name in names]


class ImageFile(NamedTuple):
    """One image of a split, as workers are told of it: they hold no list of their own."""

    index: int  # position in the split
    path: str
    label: int


class Damage(NamedTuple):
    """Why an image could not be read."""

    path: str
    reason: str


class HostBatch(NamedTuple):
    """One batch as it leaves a worker."""

    images: Tensor  # uint8, B x 3 x H x W in channels-last memory
    labels: Tensor  # int64, B
    damaged: list[Damage]  # what was left out


@dataclass(frozen=True)
class _Views(Dataset):
    """What the workers do: make one epoch's view of an image, or say why there is none."""

    view: View
    seed: int
    epoch: int

    def __getitem__(self, file: ImageFile) -> tuple[Tensor, int] | Damage:
        try:
            with catch_warnings():
                simplefilter("ignore")  # a few ImageNet files have damaged EXIF data around sound pixels
                image = load_rgb(file.path)
        except Exception as error:  # Pillow's decoders raise a dozen kinds
            return Damage(file.path, _reason(error))
        with torch.random.fork_rng(devices=[]):
            # v2 transforms draw from the CPU's global generator; torch.manual_seed would re-seed the GPUs' too.
            torch.default_generator.manual_seed(derive_seed(self.seed, "view", self.epoch, file.index))
            return self.view(image), file.label


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _collate(views: list[tuple[Tensor, int] | Damage]) -> HostBatch:
    sound = [view for view in views if not isinstance(view, Damage)]
    # Pillow's pixels are stored H x W x 3: stacked like this they are copied as they lie.
    pixels = [image.permute(1, 2, 0) for image, _ in sound]
    images = torch.stack(pixels) if pixels else torch.empty(0, 0, 0, 3, dtype=torch.uint8)
    if get_worker_info() is not None:
        try:
            images.share_memory_()  # as sending would do, which cannot tell the main process that it failed
        except RuntimeError as error:
            raise MemoryError(f"no shared memory: {error}") from error
    return HostBatch(
        images=images.permute(0, 3, 1, 2),
        labels=torch.tensor([label for _, label in sound], dtype=torch.int64),
        damaged=[view for view in views if isinstance(view, Damage)],
    )


def _worker_context() -> BaseContext:
    """How workers are started: forked from a server process, which this starts if it is not running.

    Forked from this process, a worker could wait forever for a lock that another thread, gloo's or CUDA's, held at
    that moment (CPython's issue 112275 is one such lock). The server runs no such threads. It costs each rank a second
    import of torch: some seconds, once, and a few hundred MiB.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:  # what starts here never gets these signals, nor do workers until they ask
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # once more: starting the tracker unblocks some
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def _leave_signals_to_main(_worker: int) -> None:
    """Make this worker outlive the signals that are sent to a whole job, but not the main process.

    Ctrl-C, a closed terminal, torchrun and Slurm signal every process. The main process answers: it finishes its
    step, for which it may need one more batch, and ends its workers. So they ignore all but its own SIGTERM.
    """
    main_process = multiprocessing.parent_process()
    assert main_process is not None
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # as they are, unless something else started the server
    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=_exit_when_told_by, args=(main_process.pid,), daemon=True).start()
    else:  # macOS cannot tell who sent a signal
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    threading.Thread(target=_exit_after, args=(main_process,), daemon=True).start()


def _exit_when_told_by(sender: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != sender:
        pass
    os._exit(0)


def _exit_after(process: BaseProcess) -> None:
    process.join()
    os._exit(0)


def rank_share(order: Tensor, rank: int, world_size: int, padded: bool) -> Tensor:
    """Return the part of ``order`` that process ``rank`` takes: every ``world_size``-th element from ``rank`` on.

    ``padded`` first repeats elements from the start until all ranks get equally many, as torch's
    DistributedSampler does; otherwise every element goes to exactly one rank, and some get one less.
    """
    if padded:
        total = math.ceil(len(order) / world_size) * world_size
        order = order[torch.arange(total) % len(order)]
    return order[rank::world_size]


class FolderLoader:
    """One process's passes over the images of a split: a :class:`sparselearning.training.data.BatchSource`.

    Images arrive on ``device`` as B x 3 x H x W float32, channels-last at first, normalised by ImageNet's mean and
    standard deviation; labels as int64, B. A damaged image is named on stderr once, noted in ``damaged`` and left
    out of its batch; a batch of nothing but damaged images is left out whole by the only process of an exact pass.

    Args:
        files: the split.
        view: what is made of each image; all that is random in it must come from torch's CPU generator.
        batch_size: the most images that this process gets at a time.
        workers: processes that decode; 0 decodes in this one. They end with the pass, also with an abandoned one.
        seed: of the order and the augmentation; the same on all ranks.
        device: where batches arrive.
        shuffle: whether each epoch has a random order of its own.
        padded: whether all ranks get equally many full batches, a few images twice (training); or each image comes
            exactly once over all ranks, in ``len(self)`` batches that are as equal as can be (whatever is measured).
        rank: number of this process.
        world_size: number of processes that share the images.
        strict_data: whether a damaged image is an error.
    """

    def __init__(
        self,
        files: ImageFiles,
        view: View,
        *,
        batch_size: int,
        workers: int,
        seed: int,
        device: torch.device,
        shuffle: bool,
        padded: bool,
        rank: int = 0,
        world_size: int = 1,
        strict_data: bool = False,
    ) -> None:
        self._files, self._view = files, view
        self._batch_size, self._workers, self._seed = batch_size, workers, seed
        self._shuffle, self._padded, self._strict_data = shuffle, padded, strict_data
        self._rank, self._world_size = rank, world_size
        self._device, self._memory_format = device, torch.channels_last
        # pixel * scale + shift = (pixel / 255 - mean) / std, in one fused pass from uint8 to float32
        mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))
        self._scale, self._shift = 1 / (255 * std), -mean / std
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def use_memory_format(self, memory_format: torch.memory_format) -> None:
        """Let images have this layout on the device from now on."""
        self._memory_format = memory_format

    @property
    def num_samples(self) -> int:
        """Images of the split, over all processes."""
        return len(self._files)

    @property
    def damaged(self) -> dict[str, str]:
        """Path -> reason, of the images that this process has failed to read so far, in any pass over the split."""
        return self._files.damaged

    def __len__(self) -> int:
        """Batches per epoch, the same number on every process.

        (An exact pass gives a process one less where no image is left for it: batches of one, or fewer images than
        processes.)
        """
        largest = math.ceil(self.num_samples / self._world_size)
        own = largest if self._padded else len(range(self._rank, self.num_samples, self._world_size))
        return min(own, math.ceil(largest / self._batch_size))

    @property
    def smallest_batch(self) -> int:
        """Images of this process's smallest batch."""
        largest = math.ceil(self.num_samples / self._world_size)
        if self._padded:
            return largest % self._batch_size or self._batch_size
        own = len(range(self._rank, self.num_samples, self._world_size))
        return own // max(1, len(self))

    def batches(self, epoch: int) -> list[list[int]]:
        """Return the images of this process's batches in ``epoch``, as positions in the split."""
        order = torch.arange(self.num_samples)
        if self._shuffle:
            generator = torch.Generator().manual_seed(derive_seed(self._seed, "order", epoch))
            order = torch.randperm(self.num_samples, generator=generator)
        share = rank_share(order, self._rank, self._world_size, self._padded)
        if len(share) == 0:
            return []
        chunks = share.split(self._batch_size) if self._padded else share.tensor_split(len(self))
        return [chunk.tolist() for chunk in chunks]

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield batches ``start``, ``start + 1``, … of an epoch; those before are not decoded.

        Raises:
            FaultError: an image is damaged and ``strict_data`` is set; not one image could be read; a worker died;
                or a batch is damaged whole that is a step of training, or while other processes take theirs.
        """
        yielded = 0
        for images, labels, damaged in self.host_batches(epoch, start):
            self._note(damaged)
            if len(labels) > 0:
                yielded += 1
                yield self._on_device(images, labels)
            elif self._padded or self._world_size > 1:  # training counts its steps, and processes keep step
                raise FaultError(
                    f"a whole batch is damaged, and cannot be left out here: is {self._files.folder} still there? If "
                    f"so, mend or remove {_listed([path for path, _ in damaged])}"
                )
        if yielded == 0 and start == 0 and len(self) > 0:
            raise FaultError(f"not one image could be read: is {self._files.folder} still there?")

    def host_batches(self, epoch: int, start: int = 0) -> Iterator[HostBatch]:
        """Yield the same batches as they come from the workers, in main memory, pinned if they go to a GPU.

        Raises:
            FaultError: a worker died, or has no memory to send batches in.
        """
        batches = self.batches(epoch)[start:]
        workers = min(self._workers, len(batches))
        loader = DataLoader(
            _Views(self._view, self._seed, epoch),
            batch_sampler=([self._files[index] for index in batch] for batch in batches),
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=self._device.type == "cuda",
            multiprocessing_context=_worker_context() if workers else None,
            worker_init_fn=_leave_signals_to_main,
            generator=torch.Generator(),  # or each pass would draw from the global one
        )
        try:
            yield from loader
        except (RuntimeError, MemoryError, EOFError, ConnectionError) as error:
            if isinstance(error, RuntimeError) and not str(error).startswith(LOST_WORKER):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[-1]  # a worker's traceback comes before it
            raise FaultError(
                "a process that decodes images died or cannot send them, as a rule because memory or /dev/shm is full: "
                f"fewer workers need less of both ({reason})"
            ) from error

    def class_balanced_batch(self, size: int, seed: int) -> Batch:
        """Draw ``size`` images without replacement, the classes in equal numbers as far as they go.

        The classes' counts differ by at most one, but for classes that have no more images to give. All processes
        draw the same batch, whole, and it is a function of (split, size, seed) alone; damaged images are left out.

        Raises:
            UsageError: the split has fewer than ``size`` images.
            FaultError: an image is damaged and ``strict_data`` is set, or all are.
        """
        if not 1 <= size <= self.num_samples:
            raise UsageError(f"cannot draw {size} images from the {self.num_samples} of {self._files.folder}")
        generator = torch.Generator().manual_seed(derive_seed(seed, "class-balanced"))
        chosen = class_balanced(self._files.labels, size, generator).tolist()
        views = _Views(self._view, seed, epoch=0)
        images, labels, damaged = _collate([views[self._files[index]] for index in chosen])
        self._note(damaged)
        if len(labels) == 0:
            raise FaultError(f"not one of {size} images could be read from {self._files.folder}")
        return self._on_device(images, labels)

    def _note(self, damaged: list[Damage]) -> None:
        for path, reason in damaged:
            if self._strict_data:
                raise FaultError(f"damaged image {path} ({reason}): mend or remove it, or run without --strict-data")
            if path not in self.damaged:
                self.damaged[path] = reason
                # tqdm's, so that a progress bar stays whole.
                tqdm.write(f"left out damaged image {path} ({reason}); {len(self.damaged)} so far", sys.stderr)

    def _on_device(self, images: Tensor, labels: Tensor) -> Batch:
        if self._copies is not None:
            images, labels = _copied_aside(self._copies, images, labels)
        else:
            images, labels = images.to(self._device), labels.to(self._device)
        images = images.contiguous(memory_format=self._memory_format)
        return Batch(torch.addcmul(self._shift, images, self._scale), labels)


def _copied_aside(stream: torch.cuda.Stream, *tensors: Tensor) -> list[Tensor]:
    """Copy to the GPU on ``stream``, beside the computation that is still under way for the batch before."""
    with torch.cuda.stream(stream):
        copies = [tensor.to(stream.device, non_blocking=True) for tensor in tensors]
    computation = torch.cuda.current_stream(stream.device)
    computation.wait_stream(stream)
    for copy in copies:
        copy.record_stream(computation)  # its memory is not given away before the computation is done with it
    return copies


@dataclass(frozen=True)
class ImageNetData:
    """What a run needs to know of its data. ``train`` and ``train_once`` hold the same augmented images."""

    train: FolderLoader  # equally many batches on all ranks, a few images twice
    train_once: FolderLoader  # each training image exactly once over all ranks: BatchNorm re-estimation
    evaluation: FolderLoader  # each validation image exactly once over all ranks
    num_classes: int
    image_size: int  # pixels per side of a training image
    val_image_size: int  # of a validation image
    channels: int = 3

    def use_memory_format(self, memory_format: torch.memory_format) -> None:
        """Let all images have this layout on the device from now on (at first they are channels-last)."""
        for loader in (self.train, self.train_once, self.evaluation):
            loader.use_memory_format(memory_format)


def load_imagenet(
    root: str | os.PathLike[str],
    *,
    batch_size: int,
    workers: int,
    seed: int,
    device: torch.device | str,
    rank: int = 0,
    world_size: int = 1,
    strict_data: bool = False,
    image_size: int = 224,
    resize: int = 256,
    val_image_size: int = 224,
) -> ImageNetData:
    """Open the folder ``root``, laid out as ``train/CLASS/*`` and ``val/CLASS/*``.

    Args:
        root: the folder.
        batch_size: images per batch and process, in every pass.
        workers: decoding processes per process and pass; 0 decodes in the process itself.
        seed: of the order and the augmentation; the same on all ranks.
        device: where batches arrive.
        rank: number of this process.
        world_size: number of processes that share the data.
        strict_data: whether a damaged image stops the run; else it is named, left out and counted.
        image_size: height and width of what the model sees in training, in pixels.
        resize: shorter side of a validation image before its centre is cut out, at least ``val_image_size`` pixels.
        val_image_size: height and width of that centre, in pixels.

    Raises:
        UsageError: a folder is missing or laid out differently, or an argument is out of range.
        FaultError: a folder cannot be read, a class has no images, there is but one, or train and val disagree on them.
    """
    check_option("batch_size", batch_size, Ordinal)
    check_option("workers", workers, Count)
    check_option("image_size", image_size, Ordinal)
    check_option("val_image_size", val_image_size, Ordinal)
    check_centre(val_image_size, resize)
    root = Path(root)
    if not root.is_dir():
        raise UsageError(f"{root} is not a folder: an ImageNet data set holds {LAYOUT}")
    train_files, val_files = ImageFiles(root / "train"), ImageFiles(root / "val")
    _check_classes(train_files, val_files)
    if workers:
        _worker_context()  # the server's imports take seconds, in which this process continues

    def loader(files: ImageFiles, view: View, shuffle: bool, padded: bool) -> FolderLoader:
        return FolderLoader(
            files,
            view,
            shuffle=shuffle,
            padded=padded,
            batch_size=batch_size,
            workers=workers,
            seed=seed,
            device=torch.device(device),
            rank=rank,
            world_size=world_size,
            strict_data=strict_data,
        )

    augmented = training_view(image_size)
    return ImageNetData(
        train=loader(train_files, augmented, shuffle=True, padded=True),
        train_once=loader(train_files, augmented, shuffle=True, padded=False),
        evaluation=loader(val_files, evaluation_view(val_image_size, resize), shuffle=False, padded=False),
        num_classes=len(train_files.classes),
        image_size=image_size,
        val_image_size=val_image_size,
    )


def _check_classes(train: ImageFiles, val: ImageFiles) -> None:
    if len(train.classes) == 1:
        raise FaultError(f"{train.folder} has one class alone, {train.classes[0]}: there is nothing to learn")
    differences = [
        f"{there.folder} has no folder {_listed(missing)} while {here.folder} has"
        for here, there in ((train, val), (val, train))
        if (missing := sorted(set(here.classes) - set(there.classes)))
    ]
    if differences:
        raise FaultError(f"both splits must have the same class folders, but {'; '.join(differences)}")


def _listed(names: list[str], at_most: int = 5) -> str:
    rest = len(names) - at_most
    return ", ".join(names[:at_most]) + (f" and {rest} more" if rest > 0 else "")
