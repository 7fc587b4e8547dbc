"""Batches of an ImageNet folder: what they look like, their order, each rank's share."""

import os
import random
import shutil

import imagenet_data
import numpy as np
import pytest
import torch
from imagenet_data import ImageFiles, evaluation_view, load_imagenet, load_rgb, rank_share, training_view
from PIL import Image
from torch.utils.data import DistributedSampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from helpers.imagenet import CLASSES, SIZE, assert_same, collect, flat, load, write_images, write_same
from sparselearning.process.errors import UsageError

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


@pytest.mark.parametrize("size", [(40, 30), (30, 30), (8, 64), (400, 26), (1, 41), (2, 998), (1000, 4)])
def test_evaluation_views_are_torchvisions(size):
    """The last three are so long that their ends are cut off first; their sides divide, or it would round otherwise."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    plain = v2.Compose([v2.Resize(28), v2.CenterCrop(24), v2.PILToTensor()])
    assert torch.equal(evaluation_view(24, 28)(picture), plain(picture))


def test_a_very_long_picture_is_not_resized_whole():
    assert evaluation_view(224, 256)(Image.new("RGB", (1, 60_000))).shape == (3, 224, 224)  # not through 4 GB


def test_default_sizes_are_imagenets(image_folder):
    data = load_imagenet(image_folder, batch_size=2, workers=0, seed=0, device="cpu")
    assert next(data.train.epoch(0)).images.shape == (2, 3, 224, 224)
    assert next(data.evaluation.epoch(0)).images.shape == (2, 3, 224, 224)
    assert (data.num_classes, data.channels, data.image_size, data.val_image_size) == (4, 3, 224, 224)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_travel_as_channels_last_bytes(image_folder, workers):
    batch = next(load(image_folder, workers=workers).train.host_batches(0))
    assert batch.images.dtype == torch.uint8
    assert batch.images.shape == (6, 3, SIZE, SIZE)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.labels.dtype == torch.int64


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_batches_arrive_as_float_in_the_asked_memory_format(image_folder, memory_format):
    data = load(image_folder)
    data.use_memory_format(memory_format)
    batch = next(data.train.epoch(0))
    assert batch.images.dtype == torch.float32
    assert batch.images.is_contiguous(memory_format=memory_format)
    assert_same([batch], [next(load(image_folder).train.epoch(0))])


@pytest.mark.parametrize("workers", [0, 2])
def test_names_of_folders_and_images_may_be_of_any_script(tmp_path, workers):
    for split in ("train", "val"):
        write_images(tmp_path / "bilder-ä" / split, ("käfer", "蜂"), per_class=2)
        (tmp_path / "bilder-ä" / split / "蜂" / "0.jpg").rename(tmp_path / "bilder-ä" / split / "蜂" / "längst.jpg")
    data = load(tmp_path / "bilder-ä", workers=workers)
    assert collect(data.evaluation.epoch(0))[1].tolist() == [0, 0, 1, 1]
    assert data.evaluation.damaged == {}


def test_labels_are_the_classes_of_the_images(image_folder):
    data = load(image_folder)
    files = ImageFiles(image_folder / "train")
    assert files.classes == list(CLASSES)
    for indices, batch in zip(data.train.batches(0), data.train.epoch(0), strict=True):
        names = [os.path.basename(os.path.dirname(files[index].path)) for index in indices]
        assert [CLASSES[label] for label in batch.labels] == names


def test_images_come_in_the_order_of_torchvisions_folder(image_folder, tmp_path):
    root = shutil.copytree(image_folder / "train", tmp_path / "train")
    for name in ("ant/b", "ant/a/c", "bee/0.jpg.d"):
        (root / name).mkdir(parents=True)
        for image in ("9.jpg", "10.PNG", "notes.txt"):
            (root / name / image).touch()
    files = ImageFiles(root)
    assert [(file.path, file.label) for file in files] == ImageFolder(root).samples


# --- determinism


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [0, 2, 5, 6])
def test_batches_depend_on_neither_workers_nor_start(image_folder, workers, start):
    whole = list(load(image_folder).train.epoch(4))
    assert len(whole) == 6
    torch.manual_seed(start)  # whatever the state of the global generator
    rest = list(load(image_folder, workers=workers).train.epoch(4, start))
    assert len(rest) == 6 - start
    if rest:
        assert_same(rest, whole[start:])


def test_epochs_and_seeds_differ(image_folder):
    orders = [str(load(image_folder, seed=seed).train.batches(epoch)) for seed in (3, 4) for epoch in range(5)]
    assert len(set(orders)) == 10
    # The same image looks different in another epoch and under another seed.
    views = [
        imagenet_data._Views(training_view(SIZE), seed, epoch)[ImageFiles(image_folder / "train")[0]][0]
        for seed, epoch in ((3, 0), (3, 1), (4, 0))
    ]
    assert not any(torch.equal(views[a], views[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    # Evaluation is the same always.
    assert_same(load(image_folder).evaluation.epoch(0), load(image_folder, seed=4).evaluation.epoch(9))


def test_images_look_the_same_on_any_number_of_ranks(image_folder):
    def by_index(world_size):
        seen = {}
        for rank in range(world_size):
            loader = load(image_folder, rank=rank, world_size=world_size).train
            for indices, batch in zip(loader.batches(1), loader.host_batches(1), strict=True):
                seen |= dict(zip(indices, batch.images, strict=True))
        return seen

    alone, shared = by_index(1), by_index(3)
    assert alone.keys() == shared.keys() == set(range(32))
    assert all(torch.equal(alone[index], shared[index]) for index in alone)


@pytest.mark.parametrize("workers", [0, 2])
def test_global_generators_are_left_alone(image_folder, workers):
    data = load(image_folder, workers=workers)
    before = torch.get_rng_state(), random.getstate()
    for loader in (data.train, data.evaluation):
        list(loader.epoch(0))
    data.train.class_balanced_batch(8, seed=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_batches_before_the_start_are_not_decoded(image_folder, monkeypatch):
    read = []
    decode = imagenet_data.load_rgb
    monkeypatch.setattr(imagenet_data, "load_rgb", lambda path: read.append(path) or decode(path))
    list(load(image_folder).train.epoch(0, start=4))
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
def test_training_gives_every_rank_the_same_number_of_images(image_folder, world_size):
    loaders = [load(image_folder, rank=rank, world_size=world_size).train for rank in range(world_size)]
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
def test_exact_passes_give_each_image_once_over_all_ranks(image_folder, part, world_size):
    # 32 and 20 images in batches of at most 5: the ranks' shares differ, the number of their batches must not.
    loaders = [
        getattr(load(image_folder, batch_size=5, rank=rank, world_size=world_size), part) for rank in range(world_size)
    ]
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
def test_the_smallest_batch_is_known_beforehand(image_folder, part, world_size, batch_size):
    for rank in range(world_size):
        loader = getattr(load(image_folder, batch_size=batch_size, rank=rank, world_size=world_size), part)
        assert loader.smallest_batch == min(map(len, loader.batches(0)))


def test_exact_batches_of_one_image_cannot_be_equally_many(image_folder):
    for rank, count in enumerate((7, 7, 6)):  # of 20 images
        loader = load(image_folder, batch_size=1, rank=rank, world_size=3).evaluation
        assert len(loader) == len(loader.batches(0)) == count


def test_the_exact_pass_over_training_images_shuffles_and_augments(image_folder):
    data = load(image_folder)
    assert data.train_once.num_samples == data.train.num_samples == 32
    assert flat(data.train_once.batches(1)) == flat(data.train.batches(1))
    assert_same(data.train_once.epoch(1), data.train.epoch(1))


def test_a_rank_without_images_has_empty_passes(tmp_path):
    write_same(tmp_path, Image.new("RGB", (30, 30)))
    data = load(tmp_path, rank=2, world_size=3)
    assert len(data.evaluation) == 0
    assert list(data.evaluation.epoch(0)) == []
    assert [len(batch.labels) for batch in data.train.epoch(0)] == [1]


# --- one batch for saliency


def test_class_balanced_batch(image_folder):
    train = load(image_folder).train
    batch = train.class_balanced_batch(10, seed=5)
    assert batch.images.shape == (10, 3, SIZE, SIZE)
    assert sorted(batch.labels.bincount(minlength=4).tolist()) == [2, 2, 3, 3]
    assert_same(
        [batch], [load(image_folder, seed=9, rank=1, world_size=2, workers=2).train.class_balanced_batch(10, seed=5)]
    )
    assert not torch.equal(batch.images, train.class_balanced_batch(10, seed=6).images)
    everything = train.class_balanced_batch(32, seed=5)
    assert everything.labels.bincount().tolist() == [8] * 4
    assert len(everything.images.flatten(1).unique(dim=0)) == 32
    with pytest.raises(UsageError, match="cannot draw 33 images from the 32"):
        train.class_balanced_batch(33, seed=5)


# --- wrong calls and damaged folders


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_on_a_gpu_are_the_same(gpu, image_folder, workers):
    loader = load(image_folder, workers=workers, device="cuda").train
    assert next(loader.host_batches(0)).images.is_pinned()
    assert next(loader.host_batches(0)).images.is_contiguous(memory_format=torch.channels_last)
    for batch, expected in zip(loader.epoch(0), load(image_folder).train.epoch(0), strict=True):
        assert batch.images.is_cuda
        assert batch.labels.is_cuda
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(batch.images.cpu(), expected.images)
        assert torch.equal(batch.labels.cpu(), expected.labels)
