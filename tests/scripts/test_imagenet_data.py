import contextlib
import multiprocessing
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
from itertools import chain
from pathlib import Path

import imagenet_data
import numpy as np
import pytest
import torch
from imagenet_data import (
    FolderLoader,
    ImageFiles,
    evaluation_view,
    load_imagenet,
    load_rgb,
    rank_share,
    training_view,
)
from PIL import Image
from torch.utils.data import DistributedSampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from helpers.processes import marked_processes, on_linux, wait_until
from sparselearning.process.errors import FaultError, UsageError

CLASSES, PER_CLASS = ("ant", "bee", "cat", "dog"), 8
SIZE = 24


def write_images(folder, classes=CLASSES, per_class=PER_CLASS):
    rng = np.random.default_rng(len(classes))
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            corners = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
            corners.resize((40, 30)).save(folder / name / f"{number}.jpg")


def write_same(root, image):
    """Two classes, each with this one picture for training and evaluation."""
    for split in ("train", "val"):
        for name in ("one", "other"):
            (root / split / name).mkdir(parents=True)
            image.save(root / split / name / "0.png")


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    root = tmp_path_factory.mktemp("imagenet")
    write_images(root / "train")
    write_images(root / "val", per_class=5)
    return root


@pytest.fixture
def folder(clean, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(clean, tmp_path / "data")


def load(root, **options):
    defaults = {
        "batch_size": 6,
        "workers": 0,
        "seed": 3,
        "device": "cpu",
        "image_size": SIZE,
        "resize": 28,
        "val_image_size": SIZE,
    }
    return load_imagenet(root, **(defaults | options))


def collect(batches):
    """All images and labels of some batches."""
    images, labels = zip(*[(batch.images, batch.labels) for batch in batches], strict=True)
    return torch.cat(images), torch.cat(labels)


def flat(lists):
    return list(chain.from_iterable(lists))


def assert_same(batches, expected):
    for tensor, other in zip(collect(batches), collect(expected), strict=True):
        assert torch.equal(tensor, other)


# --- what a batch looks like


def test_normalisation_of_one_colour(tmp_path):
    write_same(tmp_path, Image.new("RGB", (30, 30), (255, 0, 51)))
    # (1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225
    expected = torch.tensor([2.248908, -2.035714, -0.915556]).view(1, 3, 1, 1).expand(2, 3, SIZE, SIZE)
    data = load(tmp_path)
    for loader in (data.train, data.train_once, data.evaluation):
        (batch,) = loader.epoch(0)
        torch.testing.assert_close(batch.images, expected, atol=1e-5, rtol=0, check_stride=False)
        assert sorted(batch.labels.tolist()) == [0, 1]
        assert batch.weight == 1.0


def test_evaluation_is_the_centre_of_the_resized_image(tmp_path):
    # 16 x 8: five columns of 10, six of 20, five of 30. Resized to itself, the centre 8 x 8 has columns 4 to 11.
    columns = np.repeat([10, 20, 30], [5, 6, 5]).astype(np.uint8)
    write_same(tmp_path, Image.fromarray(np.tile(columns, (8, 1))))
    (batch,) = load(tmp_path, val_image_size=8, resize=8).evaluation.host_batches(0)
    assert batch.images[0, 0, 0].tolist() == [10, 20, 20, 20, 20, 20, 20, 30]
    assert (batch.images == batch.images[:, :1, :1]).all()  # grey became RGB, all rows alike


def test_pictures_of_16_bits_keep_their_upper_8(tmp_path):
    levels = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.png")
    (tmp_path / "a.pgm").write_bytes(b"P5 5 1 65535\n" + levels.astype(">u2").tobytes())
    for name in ("a.png", "a.pgm"):
        image = load_rgb(tmp_path / name)
        assert image.mode == "RGB"
        assert np.asarray(image)[0].tolist() == [[level] * 3 for level in (0, 0, 1, 128, 255)]


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_pixels_of_an_unknown_range_are_damage(folder, kind, capfd):
    (folder / "val" / "ant" / "0.jpg").unlink()
    Image.fromarray(np.full((30, 30), 200, kind)).save(folder / "val" / "ant" / "0.tif")
    assert len(collect(load(folder).evaluation.epoch(0))[1]) == 19
    assert "0.tif (pixels of 32 bits, whose range it does not say)" in capfd.readouterr().err


@pytest.mark.parametrize("size", [(40, 30), (30, 30), (8, 64), (400, 26), (1, 41), (2, 998), (1000, 4)])
def test_evaluation_views_are_torchvisions(size):
    """The last three are so long that their ends are cut off first; their sides divide, or it would round otherwise."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    plain = v2.Compose([v2.Resize(28), v2.CenterCrop(24), v2.PILToTensor()])
    assert torch.equal(evaluation_view(24, 28)(picture), plain(picture))


def test_a_very_long_picture_is_not_resized_whole():
    assert evaluation_view(224, 256)(Image.new("RGB", (1, 60_000))).shape == (3, 224, 224)  # not through 4 GB


def test_default_sizes_are_imagenets(clean):
    data = load_imagenet(clean, batch_size=2, workers=0, seed=0, device="cpu")
    assert next(data.train.epoch(0)).images.shape == (2, 3, 224, 224)
    assert next(data.evaluation.epoch(0)).images.shape == (2, 3, 224, 224)
    assert (data.num_classes, data.channels, data.image_size, data.val_image_size) == (4, 3, 224, 224)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_travel_as_channels_last_bytes(clean, workers):
    batch = next(load(clean, workers=workers).train.host_batches(0))
    assert batch.images.dtype == torch.uint8
    assert batch.images.shape == (6, 3, SIZE, SIZE)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.labels.dtype == torch.int64


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_batches_arrive_as_float_in_the_asked_memory_format(clean, memory_format):
    data = load(clean)
    data.use_memory_format(memory_format)
    batch = next(data.train.epoch(0))
    assert batch.images.dtype == torch.float32
    assert batch.images.is_contiguous(memory_format=memory_format)
    assert_same([batch], [next(load(clean).train.epoch(0))])


@pytest.mark.parametrize("workers", [0, 2])
def test_names_of_folders_and_images_may_be_of_any_script(tmp_path, workers):
    for split in ("train", "val"):
        write_images(tmp_path / "bilder-ä" / split, ("käfer", "蜂"), per_class=2)
        (tmp_path / "bilder-ä" / split / "蜂" / "0.jpg").rename(tmp_path / "bilder-ä" / split / "蜂" / "längst.jpg")
    data = load(tmp_path / "bilder-ä", workers=workers)
    assert collect(data.evaluation.epoch(0))[1].tolist() == [0, 0, 1, 1]
    assert data.evaluation.damaged == {}


def test_labels_are_the_classes_of_the_images(clean):
    data = load(clean)
    files = ImageFiles(clean / "train")
    assert files.classes == list(CLASSES)
    for indices, batch in zip(data.train.batches(0), data.train.epoch(0), strict=True):
        names = [os.path.basename(os.path.dirname(files[index].path)) for index in indices]
        assert [CLASSES[label] for label in batch.labels] == names


def test_images_come_in_the_order_of_torchvisions_folder(clean, tmp_path):
    root = shutil.copytree(clean / "train", tmp_path / "train")
    for name in ("ant/b", "ant/a/c", "bee/0.jpg.d"):
        (root / name).mkdir(parents=True)
        for image in ("9.jpg", "10.PNG", "notes.txt"):
            (root / name / image).touch()
    files = ImageFiles(root)
    assert [(file.path, file.label) for file in files] == ImageFolder(root).samples


# --- determinism


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [0, 2, 5, 6])
def test_batches_depend_on_neither_workers_nor_start(clean, workers, start):
    whole = list(load(clean).train.epoch(4))
    assert len(whole) == 6
    torch.manual_seed(start)  # whatever the state of the global generator
    rest = list(load(clean, workers=workers).train.epoch(4, start))
    assert len(rest) == 6 - start
    if rest:
        assert_same(rest, whole[start:])


def test_epochs_and_seeds_differ(clean):
    orders = [str(load(clean, seed=seed).train.batches(epoch)) for seed in (3, 4) for epoch in range(5)]
    assert len(set(orders)) == 10
    # The same image looks different in another epoch and under another seed.
    views = [
        imagenet_data._Views(training_view(SIZE), seed, epoch)[ImageFiles(clean / "train")[0]][0]
        for seed, epoch in ((3, 0), (3, 1), (4, 0))
    ]
    assert not any(torch.equal(views[a], views[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    # Evaluation is the same always.
    assert_same(load(clean).evaluation.epoch(0), load(clean, seed=4).evaluation.epoch(9))


def test_images_look_the_same_on_any_number_of_ranks(clean):
    def by_index(world_size):
        seen = {}
        for rank in range(world_size):
            loader = load(clean, rank=rank, world_size=world_size).train
            for indices, batch in zip(loader.batches(1), loader.host_batches(1), strict=True):
                seen |= dict(zip(indices, batch.images, strict=True))
        return seen

    alone, shared = by_index(1), by_index(3)
    assert alone.keys() == shared.keys() == set(range(32))
    assert all(torch.equal(alone[index], shared[index]) for index in alone)


@pytest.mark.parametrize("workers", [0, 2])
def test_global_generators_are_left_alone(clean, workers):
    data = load(clean, workers=workers)
    before = torch.get_rng_state(), random.getstate()
    for loader in (data.train, data.evaluation):
        list(loader.epoch(0))
    data.train.class_balanced_batch(8, seed=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_batches_before_the_start_are_not_decoded(clean, monkeypatch):
    read = []
    decode = imagenet_data.load_rgb
    monkeypatch.setattr(imagenet_data, "load_rgb", lambda path: read.append(path) or decode(path))
    list(load(clean).train.epoch(0, start=4))
    assert len(read) == 32 - 4 * 6


# --- sharing among ranks


def test_rank_share_by_hand():
    order = torch.tensor([7, 3, 9, 1])
    assert [rank_share(order, rank, 3, padded=True).tolist() for rank in range(3)] == [[7, 1], [3, 7], [9, 3]]
    assert [rank_share(order, rank, 3, padded=False).tolist() for rank in range(3)] == [[7, 1], [3], [9]]


@pytest.mark.parametrize("count", [1, 2, 5, 8, 9])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_padded_shares_are_distributed_samplers(count, world_size):
    for rank in range(world_size):
        sampler = DistributedSampler(range(count), world_size, rank, shuffle=False)
        assert rank_share(torch.arange(count), rank, world_size, padded=True).tolist() == list(sampler)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_training_gives_every_rank_the_same_number_of_images(clean, world_size):
    loaders = [load(clean, rank=rank, world_size=world_size).train for rank in range(world_size)]
    batches = [loader.batches(0) for loader in loaders]
    sizes = [[len(batch) for batch in share] for share in batches]
    assert all(len(loader) == len(share) for loader, share in zip(loaders, batches, strict=True))
    assert all(size == sizes[0] for size in sizes)
    assert sizes[0][:-1] == [6] * (len(loaders[0]) - 1)
    # Read across the ranks, the shares are one order of all images and then its start again.
    order = flat(zip(*map(flat, batches), strict=True))
    assert sorted(order[:32]) == list(range(32))
    assert order[32:] == order[: len(order) - 32]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("part", ["train_once", "evaluation"])
def test_exact_passes_give_each_image_once_over_all_ranks(clean, part, world_size):
    # 32 and 20 images in batches of at most 5: the ranks' shares differ, the number of their batches must not.
    loaders = [getattr(load(clean, batch_size=5, rank=rank, world_size=world_size), part) for rank in range(world_size)]
    batches = [loader.batches(2) for loader in loaders]
    assert sorted(flat(flat(batches))) == list(range(loaders[0].num_samples))
    assert {len(share) for share in batches} == {len(loaders[0])}
    for share in batches:
        sizes = {len(batch) for batch in share}
        assert max(sizes) <= 5
        assert max(sizes) - min(sizes) <= 1
    labels = torch.cat([collect(loader.epoch(2))[1] for loader in loaders])
    assert labels.bincount().tolist() == [loaders[0].num_samples // 4] * 4


@pytest.mark.parametrize("part", ["train", "train_once"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 7, 100])
def test_the_smallest_batch_is_known_beforehand(clean, part, world_size, batch_size):
    for rank in range(world_size):
        loader = getattr(load(clean, batch_size=batch_size, rank=rank, world_size=world_size), part)
        assert loader.smallest_batch == min(map(len, loader.batches(0)))


def test_exact_batches_of_one_image_cannot_be_equally_many(clean):
    for rank, count in enumerate((7, 7, 6)):  # of 20 images
        loader = load(clean, batch_size=1, rank=rank, world_size=3).evaluation
        assert len(loader) == len(loader.batches(0)) == count


def test_the_exact_pass_over_training_images_shuffles_and_augments(clean):
    data = load(clean)
    assert data.train_once.num_samples == data.train.num_samples == 32
    assert flat(data.train_once.batches(1)) == flat(data.train.batches(1))
    assert_same(data.train_once.epoch(1), data.train.epoch(1))


def test_a_rank_without_images_has_empty_passes(tmp_path):
    write_same(tmp_path, Image.new("RGB", (30, 30)))
    data = load(tmp_path, rank=2, world_size=3)
    assert len(data.evaluation) == 0
    assert list(data.evaluation.epoch(0)) == []
    assert [len(batch.labels) for batch in data.train.epoch(0)] == [1]


# --- damaged images


def truncate(path):
    path.write_bytes(path.read_bytes()[:300])


def empty(path):
    path.write_bytes(b"")


def scramble(path):
    path.write_bytes(b"no image at all")


def unlink_target(path):
    path.unlink()
    path.symlink_to("nowhere.jpg")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", [truncate, empty, scramble, unlink_target])
def test_a_damaged_image_is_named_once_left_out_and_counted(folder, damage, workers, capfd):
    bad = folder / "train" / "bee" / "2.jpg"  # image 10 of 32
    damage(bad)
    data = load(folder, workers=workers)
    for loader in (data.train, data.train, data.train_once):
        _, labels = collect(loader.epoch(0))
        assert labels.bincount().tolist() == [8, 7, 8, 8]
    assert list(data.train.damaged) == list(data.train_once.damaged) == [str(bad)]
    assert data.evaluation.damaged == {}
    message = capfd.readouterr().err
    assert message.count(str(bad)) == 1
    assert "left out damaged image" in message
    assert message.endswith("1 so far\n")
    # All others are where they would be without it.
    position = [10 in batch for batch in data.train.batches(0)].index(True)
    sizes = [len(batch.labels) for batch in data.train.epoch(0)]
    assert sizes == [6 - (number == position) for number in range(5)] + [2 - (position == 5)]


@pytest.mark.parametrize("workers", [0, 2])
def test_strict_data_stops_at_a_damaged_image(folder, workers):
    bad = folder / "val" / "cat" / "1.jpg"
    scramble(bad)
    data = load(folder, workers=workers, strict_data=True)
    list(data.train.epoch(0))
    with pytest.raises(FaultError) as caught:
        list(data.evaluation.epoch(0))
    assert str(caught.value) == (
        f"damaged image {bad} (not an image of a known format): mend or remove it, or run without --strict-data"
    )
    del caught
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_of_damaged_images_is_left_out(folder, workers):
    for name in ("bee", "dog"):
        for number in range(5):
            scramble(folder / "val" / name / f"{number}.jpg")
    evaluation = load(folder, batch_size=5, workers=workers).evaluation  # one batch per class
    for start, classes in enumerate(([[0], [2]], [[2]], [[2]], [])):
        assert [batch.labels.unique().tolist() for batch in evaluation.epoch(0, start)] == classes
    assert len(evaluation.damaged) == 10


def test_a_damaged_batch_among_ranks_is_a_fault(folder):
    scramble(folder / "train" / "ant" / "0.jpg")
    loaders = [load(folder, batch_size=1, rank=rank, world_size=2).train for rank in range(2)]
    (hit,) = [loader for loader in loaders if [0] in loader.batches(0)]
    with pytest.raises(FaultError, match=r"a whole batch is damaged.*ant/0\.jpg"):
        list(hit.epoch(0))


def test_nothing_readable_is_a_fault(folder):
    for path in (folder / "train").rglob("*.jpg"):
        scramble(path)
    with pytest.raises(FaultError, match=r"not one image could be read from .*train"):
        list(load(folder).train.epoch(0))


# --- worker processes


def test_workers_end_with_the_pass_also_when_it_is_abandoned(clean):
    batches = load(clean, workers=2).train.epoch(0)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert multiprocessing.active_children() == []


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="this system cannot tell who sent a signal")
def test_workers_leave_signals_to_the_main_process(clean, tmp_path):
    def answer(signal_number, frame):  # the main process's; a worker must not run it
        (tmp_path / str(os.getpid())).touch()

    previous = signal.signal(signal.SIGTERM, answer)
    try:
        loader = load(clean, batch_size=1, workers=2).train
        batches = loader.epoch(0)
        seen = [next(batches), next(batches)]  # one from each worker: both are up
        workers = multiprocessing.active_children()
        for name in ("INT", "TERM"):  # from a process that is not their parent
            subprocess.run(["sh", "-c", f"kill -{name} {workers[0].pid} {workers[1].pid}"], check=True)
        seen += batches
        assert_same(seen, load(clean, batch_size=1).train.epoch(0))

        batches = loader.epoch(0)
        next(batches), next(batches)
        workers = multiprocessing.active_children()
        for worker in workers:
            worker.terminate()
            worker.join(10)
        assert [worker.exitcode for worker in workers] == [0, 0]
        assert list(tmp_path.iterdir()) == []
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_workers_are_not_forked_from_a_process_that_may_have_threads(clean, monkeypatch):
    """They would inherit the locks that gloo's or CUDA's threads hold at that moment, and wait for them forever."""
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("forked"))
    assert_same(load(clean, workers=2).train.epoch(0), load(clean).train.epoch(0))


PASS = """
import signal, sys
from test_imagenet_data import load
received = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, _: received.append(number))
batches = load(sys.argv[1], batch_size=1, workers=2).train.epoch(0)
next(batches)
print("under way", flush=True)
sys.stdin.readline()
print(1 + len(list(batches)), len(received))
"""


@contextlib.contextmanager
def pass_under_way(root):
    """A process in a session of its own that has taken one of 32 batches, and takes the others when told."""
    command, pipe = [sys.executable, "-c", PASS, str(root)], subprocess.PIPE
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "MARK": str(root)}
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, start_new_session=True) as process:
        try:
            assert select.select([process.stdout], [], [], 60)[0], "not under way after a minute"
            assert process.stdout.readline() == b"under way\n"
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_a_pass_outlives_signals_to_all_of_its_processes(clean):
    with pass_under_way(clean) as process:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.killpg(process.pid, number)
        assert process.communicate(b"\n", timeout=60)[0] == b"32 3\n"
        assert process.returncode == 0


@on_linux
def test_workers_end_when_the_main_process_is_killed(clean):
    with pass_under_way(clean) as process:
        assert len(marked_processes(clean)) > 2
        process.kill()
        process.wait()
        wait_until(lambda: not marked_processes(clean), 30)


def die(image):
    os.kill(os.getpid(), signal.SIGKILL)


def fill_shared_memory(image):
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # that of this worker is full
    return torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)


def raise_anything(image):
    raise RuntimeError("a mistake of one's own")


def loader_of(clean, view, device="cpu"):
    return FolderLoader(
        ImageFiles(clean / "train"),
        view,
        batch_size=4,
        workers=1,
        seed=0,
        device=torch.device(device),
        shuffle=True,
        padded=True,
    )


@pytest.mark.parametrize("view", [die, fill_shared_memory])
def test_a_worker_that_dies_or_has_no_room_is_a_fault(clean, view):
    with pytest.raises(FaultError, match="a process that decodes images died or cannot send them, as a rule because"):
        list(loader_of(clean, view).epoch(0))


def test_pinning_that_ends_early_is_a_fault(gpu, clean, monkeypatch):
    # What a worker that dies while it hands a batch over does to the thread that pins batches for a GPU.
    monkeypatch.setattr("torch.utils.data._utils.pin_memory._pin_memory_loop", lambda *arguments: None)
    with pytest.raises(FaultError, match=r"a process that decodes images died.*\(Pin memory thread exited"):
        list(loader_of(clean, raise_anything, "cuda").epoch(0))


def test_other_errors_of_a_worker_come_as_they_are(clean):
    with pytest.raises(RuntimeError, match="a mistake of one's own"):
        list(loader_of(clean, raise_anything).epoch(0))


# --- one batch for saliency


def test_class_balanced_batch(clean):
    train = load(clean).train
    batch = train.class_balanced_batch(10, seed=5)
    assert batch.images.shape == (10, 3, SIZE, SIZE)
    assert sorted(batch.labels.bincount(minlength=4).tolist()) == [2, 2, 3, 3]
    assert_same([batch], [load(clean, seed=9, rank=1, world_size=2, workers=2).train.class_balanced_batch(10, seed=5)])
    assert not torch.equal(batch.images, train.class_balanced_batch(10, seed=6).images)
    everything = train.class_balanced_batch(32, seed=5)
    assert everything.labels.bincount().tolist() == [8] * 4
    assert len(everything.images.flatten(1).unique(dim=0)) == 32
    with pytest.raises(UsageError, match="cannot draw 33 images from the 32"):
        train.class_balanced_batch(33, seed=5)


# --- wrong calls and damaged folders


def no_root(root):
    shutil.rmtree(root)


def no_train(root):
    shutil.rmtree(root / "train")


def val_is_a_file(root):
    shutil.rmtree(root / "val")
    (root / "val").touch()


def flat_val(root):
    for path in (root / "val").rglob("*.jpg"):
        path.rename(root / "val" / f"{path.parent.name}{path.name}")
    for name in CLASSES:
        (root / "val" / name).rmdir()


def empty_class(root):
    (root / "train" / "elk").mkdir()
    (root / "train" / "elk" / "readme.txt").touch()


def no_images(root):
    for path in (root / "val").rglob("*.jpg"):
        path.unlink()


def other_classes(root):
    (root / "val" / "ant").rename(root / "val" / "ape")


def one_class(root):
    for name in CLASSES[1:]:
        shutil.rmtree(root / "train" / name)
        shutil.rmtree(root / "val" / name)


def loop(root):
    (root / "train" / "bee" / "again").symlink_to(root / "train" / "bee")
    (root / "train" / "bee" / "and_again").symlink_to(root / "train" / "bee")


def class_of_two_names(root):
    (root / "train" / "wasp").symlink_to("bee")


def many_missing(root):
    for number in range(7):
        shutil.copytree(root / "train" / "ant", root / "train" / f"ant{number}")


@pytest.mark.parametrize(
    ("spoil", "error", "sentence"),
    [
        (no_root, UsageError, r"data is not a folder: .* DIR/train/CLASS/NAME.JPEG and DIR/val/"),
        (no_train, UsageError, r"there is no folder .*data/train: .* DIR/train/CLASS/NAME.JPEG"),
        (val_is_a_file, UsageError, r"there is no folder .*data/val: "),
        (flat_val, UsageError, r"data/val holds no class folders: .* DIR/val/CLASS/NAME.JPEG"),
        (empty_class, FaultError, r"no images in elk under .*data/train: "),
        (no_images, FaultError, r"no images in ant, bee, cat, dog under .*data/val: "),
        (
            other_classes,
            FaultError,
            r"same class folders, but .*val has no folder ant while .*train has; "
            r".*train has no folder ape while .*val has$",
        ),
        (one_class, FaultError, r"data/train has one class alone, ant: there is nothing to learn"),
        (loop, FaultError, r"train/bee/(and_)?again is .*train/bee once more"),
        (class_of_two_names, FaultError, r"train/wasp is .*train/bee once more, by a symbolic link: remove"),
        (many_missing, FaultError, r"val has no folder ant0, ant1, ant2, ant3, ant4 and 2 more while .*train has$"),
    ],
)
def test_a_spoilt_folder_is_refused_with_a_sentence(folder, spoil, error, sentence):
    spoil(folder)
    with pytest.raises(error, match=sentence):
        load(folder)


@pytest.mark.parametrize("locked", ["train", "train/bee"])
def test_a_folder_without_permission_is_no_folder_without_images(folder, monkeypatch, locked):
    def scandir(path):
        if Path(path) == folder / locked:
            raise PermissionError(13, "Permission denied", str(path))
        return look(path)

    look = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)  # tests may run as root, who may look everywhere
    with pytest.raises(FaultError, match=rf"{locked} cannot be read: Permission denied"):
        load(folder)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"batch_size": 0}, "batch size 0"),
        ({"workers": -1}, "-1 workers"),
        ({"val_image_size": 32}, "a centre of 32 pixels cannot be cut out of images resized to 28"),
        ({"val_image_size": 0}, "a centre of 0 pixels"),
        ({"image_size": 0}, "images of 0 pixels"),
    ],
)
def test_arguments_out_of_range(clean, options, sentence):
    with pytest.raises(UsageError, match=sentence):
        load(clean, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_on_a_gpu_are_the_same(gpu, clean, workers):
    loader = load(clean, workers=workers, device="cuda").train
    assert next(loader.host_batches(0)).images.is_pinned()
    assert next(loader.host_batches(0)).images.is_contiguous(memory_format=torch.channels_last)
    for batch, expected in zip(loader.epoch(0), load(clean).train.epoch(0), strict=True):
        assert batch.images.is_cuda
        assert batch.labels.is_cuda
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(batch.images.cpu(), expected.images)
        assert torch.equal(batch.labels.cpu(), expected.labels)
