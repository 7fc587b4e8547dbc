import re
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from urllib.error import URLError

import cifar_data
import numpy as np
import pytest
import torch
from cifar_data import DATASETS, Augmentation, TensorLoader, channel_statistics, data_help, load_data

from sparselearning.process.errors import FaultError, UsageError

CROP_AND_FLIP = Augmentation("constant", flip=True)
RAW = {"mean": np.zeros(1), "std": np.ones(1)}  # images come out as their raw pixel values
PADDED = {  # [[1, 2], [3, 4]] with one pixel around it
    "constant": [[0, 0, 0, 0], [0, 1, 2, 0], [0, 3, 4, 0], [0, 0, 0, 0]],
    "reflect": [[4, 3, 4, 3], [2, 1, 2, 1], [4, 3, 4, 3], [2, 1, 2, 1]],
}


def numbered(count, size=6, channels=1, seed=0):
    """Random images whose label is their position, so that a batch tells which samples it holds."""
    images = np.random.default_rng(seed).integers(1, 256, (count, size, size, channels), dtype=np.uint8)
    return images, np.arange(count)


def make_loader(count=22, *, batch_size=8, augmentation=CROP_AND_FLIP, **options):
    return TensorLoader(*numbered(count), **RAW, batch_size=batch_size, augmentation=augmentation, **options)


def assert_equal_batches(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
        assert one.weight == other.weight


def write_npz(path, **changes):
    """A small valid file, with the arrays in `changes` replaced, or left out where None."""
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8),
        "y_train": np.arange(20) % 5,
        "x_test": rng.integers(0, 256, (10, 8, 8, 3), dtype=np.uint8),
        "y_test": (np.arange(10) % 5)[:, None],
    } | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return str(path)


def load(name, **options):
    settings = {"data_dir": "unused", "batch_size": 8, "test_batch_size": 4, "seed": 0, "device": "cpu"}
    return load_data(name, **(settings | options))


# Crops, mirror images, normalisation


@pytest.mark.parametrize(("shape", "flip"), [((20, 8, 8), False), ((20, 8, 8, 3), True)])
def test_only_colour_images_of_a_file_are_mirrored(tmp_path, shape, flip):
    test = (10, *shape[1:])
    path = write_npz(tmp_path / "some.npz", x_train=np.zeros(shape, np.uint8), x_test=np.zeros(test, np.uint8))
    assert load(path).train._augmentation == Augmentation("constant", flip=flip)


@pytest.mark.parametrize("padding", PADDED)
@pytest.mark.parametrize("flip", [False, True])
def test_augmentation_draws_every_hand_worked_crop_and_nothing_else(padding, flip):
    images = np.tile(np.array([[1, 2], [3, 4]], np.uint8)[None, :, :, None], (600, 1, 1, 1))
    loader = TensorLoader(
        images, np.zeros(600, np.int64), **RAW, batch_size=600, augmentation=Augmentation(padding, flip, pad=1)
    )
    (batch,) = loader.epoch(0)
    padded = np.array(PADDED[padding])
    crops = [padded[y : y + 2, x : x + 2] for y in range(3) for x in range(3)]
    expected = {tuple(crop.ravel()) for crop in crops}
    if flip:
        expected |= {tuple(crop[:, ::-1].ravel()) for crop in crops}
    assert {tuple(image.flatten().tolist()) for image in batch.images} == expected


@pytest.mark.parametrize("padding", PADDED)
def test_batches_match_a_slow_per_image_reference(padding):
    images, labels = numbered(200, size=10, channels=3)
    mean, std = channel_statistics(images)
    loader = TensorLoader(
        images, labels, mean=mean, std=std, batch_size=64, augmentation=Augmentation(padding, flip=True)
    )
    seen = {"crop": set(), "flips": 0}
    for batch in loader.epoch(3):
        for image, label in zip(batch.images.numpy(), batch.labels.tolist(), strict=True):
            padded = np.pad(images[label], ((4, 4), (4, 4), (0, 0)), mode=padding)
            normalised = ((padded - mean) / std).transpose(2, 0, 1)
            matches = []
            for top, left, mirrored in np.ndindex(9, 9, 2):
                crop = normalised[:, top : top + 10, left : left + 10]
                if np.abs(image - (crop[..., ::-1] if mirrored else crop)).max() < 1e-5:
                    matches.append((top, left, mirrored))
            assert len(matches) == 1
            seen["crop"].add(matches[0][:2])
            seen["flips"] += matches[0][2]
    assert len(seen["crop"]) > 65  # 200 draws leave about 7 of the 81 crops unseen
    assert 72 < seen["flips"] < 128  # 100 expected, 4 standard deviations either way


def test_zero_padding_is_black_before_normalisation():
    images = np.full((50, 6, 6, 1), 200, np.uint8)
    loader = TensorLoader(
        images,
        np.zeros(50, np.int64),
        mean=np.array([72.0]),
        std=np.array([64.0]),
        batch_size=50,
        augmentation=CROP_AND_FLIP,
    )
    (batch,) = loader.epoch(0)
    assert batch.images.unique().tolist() == [-72 / 64, 2.0]


def test_evaluation_is_in_stored_order_and_untouched():
    images, labels = numbered(11)
    loader = TensorLoader(images, labels, **RAW, batch_size=4)
    batches = list(loader.epoch(5))
    assert [len(batch.labels) for batch in batches] == [4, 4, 3]
    assert torch.cat([batch.labels for batch in batches]).tolist() == list(range(11))
    assert torch.equal(
        torch.cat([batch.images for batch in batches]), torch.from_numpy(images).permute(0, 3, 1, 2).float()
    )


def test_channel_statistics_by_hand():
    images = np.array([[[[0, 7], [10, 7]]], [[[20, 7], [30, 7]]]], np.uint8)  # two 1x2 images, two channels
    mean, std = channel_statistics(images)
    assert mean.tolist() == [15, 7]
    assert std.tolist() == [pytest.approx(125**0.5, rel=1e-15), 1]


def test_training_images_come_out_with_mean_0_and_deviation_1(tmp_path):
    images = np.random.default_rng(0).integers(0, 90, (20, 8, 8, 3), dtype=np.uint8)
    data = load(write_npz(tmp_path / "set.npz", x_train=images, x_test=images, y_test=np.arange(20) % 5))
    whole = torch.cat([batch.images for batch in data.test.epoch(0)])
    assert torch.allclose(whole.mean((0, 2, 3)), torch.zeros(3), atol=1e-6)
    assert torch.allclose(whole.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-6)


@pytest.mark.parametrize("augmentation", [None, CROP_AND_FLIP])
def test_both_layouts_hold_the_same_images(augmentation):
    images, labels = numbered(20, channels=3)

    def batches(memory_format):
        loader = TensorLoader(
            images,
            labels,
            mean=np.full(3, 120.0),
            std=np.full(3, 60.0),
            batch_size=8,
            augmentation=augmentation,
        )
        loader.use_memory_format(memory_format)
        every = [*loader.epoch(0), loader.class_balanced_batch(6, seed=0)]
        assert all(batch.images.is_contiguous(memory_format=memory_format) for batch in every)
        assert all(batch.images.dtype == torch.float32 for batch in every)
        assert all(batch.labels.dtype == torch.int64 for batch in every)
        return every

    assert_equal_batches(batches(torch.channels_last), batches(torch.contiguous_format))


# Order, resuming, data-parallel shares


def test_every_sample_once_per_epoch_in_a_new_order():
    loader = make_loader()
    orders = [torch.cat([batch.labels for batch in loader.epoch(epoch)]).tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(22)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != list(range(22))


def test_an_epoch_depends_on_seed_and_epoch_alone():
    first = list(make_loader(seed=5).epoch(2))
    torch.manual_seed(123)
    state = torch.get_rng_state()
    loader = make_loader(seed=5)
    list(loader.epoch(7))
    assert_equal_batches(list(loader.epoch(2)), first)
    assert torch.equal(torch.get_rng_state(), state)
    for other in (make_loader(seed=6).epoch(2), make_loader(seed=5).epoch(3)):
        assert not torch.equal(next(other).labels, first[0].labels)


@pytest.mark.parametrize("augmentation", [None, Augmentation("reflect", flip=True)])
@pytest.mark.parametrize("start", range(4))
def test_starting_late_gives_the_same_batches(augmentation, start):
    loader = make_loader(augmentation=augmentation)
    assert len(loader) == 3
    assert_equal_batches(list(loader.epoch(1, start)), list(loader.epoch(1))[start:])


@pytest.mark.parametrize("augmentation", [None, CROP_AND_FLIP])
@pytest.mark.parametrize(("count", "world_size"), [(24, 2), (22, 2), (22, 3), (19, 3), (22, 8)])
def test_shares_of_all_processes_are_the_batches_of_one(augmentation, count, world_size):
    one = list(make_loader(count, augmentation=augmentation).epoch(4))
    loaders = [
        make_loader(count, augmentation=augmentation, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    shares = list(zip(*(loader.epoch(4) for loader in loaders), strict=True))
    assert len(shares) == len(loaders[0])
    # Leftovers that do not go round join the batch before: compare the epoch as a whole, and each full batch.
    assert torch.equal(
        torch.cat([share.images for batch in shares for share in batch]), torch.cat([batch.images for batch in one])
    )
    for batch, shared in list(zip(one, shares, strict=False))[: len(shares) - 1]:
        assert torch.equal(torch.cat([share.labels for share in shared]), batch.labels)
    for shared in shares:
        sizes = [len(share.labels) for share in shared]
        assert 1 <= min(sizes) <= max(sizes) <= min(sizes) + 1
        assert [share.weight for share in shared] == [world_size * size / sum(sizes) for size in sizes]


def test_leftovers_that_do_not_go_round_join_the_batch_before():
    loaders = [make_loader(18, rank=rank, world_size=3) for rank in range(3)]
    assert [[len(batch.labels) for batch in loader.epoch(0)] for loader in loaders] == [[2, 3], [3, 3], [3, 4]]
    assert len(loaders[0]) == 2
    assert len(make_loader(18)) == 3


def test_weighted_mean_over_processes_is_the_mean_over_the_batch():
    shares = [next(make_loader(rank=rank, world_size=3).epoch(0)) for rank in range(3)]
    whole = next(make_loader().epoch(0))
    mean = sum(share.weight * share.images.mean().item() for share in shares) / 3
    assert mean == pytest.approx(whole.images.mean().item(), rel=1e-6)


@pytest.mark.parametrize("options", [{"batch_size": 2, "world_size": 3}, {"batch_size": 0}, {"count": 0}])
def test_each_process_needs_an_image(options):
    with pytest.raises(UsageError, match="each needs one at least"):
        make_loader(**options)


# Class-balanced batches


def test_class_balanced_batch():
    images, _ = numbered(60)
    labels = np.repeat([0, 1, 2, 4], [30, 20, 8, 2])  # class 3 has no images
    loader = TensorLoader(images, labels, **RAW, batch_size=10, augmentation=CROP_AND_FLIP, seed=1)
    assert loader.class_balanced_batch(8, seed=0).labels.bincount().tolist() == [2, 2, 2, 0, 2]
    assert loader.class_balanced_batch(20, seed=0).labels.bincount().tolist() == [6, 6, 6, 0, 2]
    counts = loader.class_balanced_batch(10, seed=0).labels.bincount().tolist()
    assert counts[4] == 2
    assert sorted(counts[:3]) == [2, 3, 3]

    batch = loader.class_balanced_batch(60, seed=0)
    stored = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    drawn = [(stored == image).flatten(1).all(1).nonzero().item() for image in batch.images]
    assert sorted(drawn) == list(range(60))  # unaugmented, without replacement
    assert torch.equal(batch.labels, torch.from_numpy(labels)[drawn])
    assert batch.weight == 1

    again, other = loader.class_balanced_batch(12, seed=3), loader.class_balanced_batch(12, seed=4)
    assert_equal_batches([again], [loader.class_balanced_batch(12, seed=3)])
    assert not torch.equal(again.images, other.images)


@pytest.mark.parametrize("size", [0, 23])
def test_class_balanced_batch_that_cannot_be_drawn(size):
    with pytest.raises(UsageError, match=f"cannot draw {size} images"):
        make_loader().class_balanced_batch(size, seed=0)


# Data sets


def test_digits_split_is_stratified_and_fixed():
    data, other = load("digits"), load("digits", seed=9)
    assert (data.name, data.num_classes, data.channels, data.image_size) == ("digits", 10, 3, 32)
    assert (data.train.num_samples, data.test.num_samples) == (1198, 599)
    assert data.evaluation is data.test
    test_labels = torch.cat([batch.labels for batch in data.test.epoch(0)])
    train_labels = torch.cat([batch.labels for batch in data.train.epoch(0)])
    assert (train_labels.bincount() - 2 * test_labels.bincount()).abs().max() <= 2
    assert_equal_batches(list(data.test.epoch(0)), list(other.test.epoch(0)))


def test_digits_use_the_whole_range_of_pixels():
    arrays = DATASETS["digits"].load(None)
    assert arrays.x_train.shape == (1198, 32, 32, 3)
    assert arrays.x_train.dtype == np.uint8
    assert (arrays.x_train.min(), arrays.x_train.max()) == (0, 255)
    assert (arrays.x_train == arrays.x_train[..., :1]).all()


def test_npz(tmp_path):
    data = load(write_npz(tmp_path / "small.npz", classes=np.array(["a", "b"])))
    assert (data.name, data.num_classes, data.channels, data.image_size) == ("small", 5, 3, 8)
    assert (data.train.num_samples, data.test.num_samples) == (20, 10)
    assert next(data.train.epoch(0)).images.shape == (8, 3, 8, 8)
    assert next(data.test.epoch(0)).labels.tolist() == [0, 1, 2, 3]


def test_grey_npz_has_one_channel(tmp_path):
    grey = np.zeros((20, 8, 8), np.uint8)
    data = load(write_npz(tmp_path / "grey.npz", x_train=grey, x_test=grey[:10, ..., None]))
    assert data.channels == 1
    assert next(data.train.epoch(0)).images.shape == (8, 1, 8, 8)


def test_valid_split_holds_out_the_end_of_the_training_set(tmp_path):
    images = np.zeros((20, 8, 8, 3), np.uint8)
    images[15:] = 250
    data = load(write_npz(tmp_path / "set.npz", x_train=images), valid_split=0.26)
    assert (data.train.num_samples, data.evaluation.num_samples, data.test.num_samples) == (15, 5, 10)
    assert torch.cat([batch.labels for batch in data.evaluation.epoch(0)]).tolist() == [0, 1, 2, 3, 4]
    # Statistics of the images trained on, all black here: mean 0, and deviation 1 instead of 0.
    assert all((batch.images == 250).all() for batch in data.evaluation.epoch(0))
    assert all((batch.images == 0).all() for batch in data.train.epoch(0))


@pytest.mark.parametrize("valid_split", [-0.1, 1.0, 1.5, 0.001, 0.99, float("nan")])
def test_impossible_valid_split(tmp_path, valid_split):
    with pytest.raises(UsageError, match=re.escape(str(valid_split))):
        load(write_npz(tmp_path / "set.npz"), valid_split=valid_split)


@pytest.mark.parametrize("name", ["cifar11", "no/such/file.npz", ""])
def test_unknown_data_set(name):
    with pytest.raises(UsageError, match=r"choose cifar10, cifar100, mnist, digits, or the path of an \.npz file"):
        load(name)


BLACK = np.zeros((20, 8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None, "x_train": None}, "lacks x_train, y_test"),
        ({"x_train": BLACK.astype(np.float32)}, "x_train must hold square uint8 images.*float32"),
        ({"x_train": BLACK[0, 0]}, r"x_train must hold square uint8 images.*\(8, 3\)"),
        ({"x_train": BLACK.transpose(0, 3, 1, 2)}, r"x_train must hold .*\(20, 3, 8, 8\)"),
        ({"x_train": BLACK[..., :2]}, "x_train must hold"),
        ({"x_test": BLACK[:10, :4]}, "x_test must hold square"),
        ({"x_test": BLACK[:10, :4, :4]}, r"one shape.*\(8, 8, 3\) and \(4, 4, 3\)"),
        ({"x_test": BLACK[:10, ..., 0]}, r"one shape.*\(8, 8, 3\) and \(8, 8, 1\)"),
        ({"y_train": np.zeros(20)}, "y_train must hold integer labels.*float64"),
        ({"y_train": np.zeros(20, bool)}, "y_train must hold integer labels.*bool"),
        ({"y_train": np.eye(20, dtype=int)}, r"y_train must hold integer labels.*\(20, 20\)"),
        ({"y_train": np.array(3)}, "y_train must hold integer labels"),
        ({"y_train": np.arange(19)}, "x_train has 20 images, but y_train has 19 labels"),
        ({"x_test": BLACK[:0], "y_test": np.arange(0)}, "x_test has no images"),
        ({"x_train": BLACK[:, :0, :0]}, "x_train has no images"),
        ({"y_train": np.arange(20) - 1}, "y_train holds the negative label -1"),
        ({"y_test": np.arange(10)}, "y_test holds the label 9, outside the training set's class range 0 to 4"),
        ({"y_test": np.full(10, 2**64 - 1, np.uint64)}, "y_test holds the label 18446744073709551615, outside"),
        ({"y_train": np.arange(20) % 5 + 10**6}, r"1000000 of .* no image \(0, 1, 2, 3, 4 and 999995 more"),
        ({"y_train": np.arange(20) % 2 * (2**63 - 1)}, r"9223372036854775806 of .* no image \(1, 2, 3, 4, 5 and"),
        ({"y_train": np.arange(20, dtype=np.uint64) + 2**63}, r"9223372036854775808 of .* \(0, 1, 2, 3, 4 and"),
        ({"y_train": np.full(20, 3)}, "all training images are of one class, 3"),
        ({"y_train": np.array([None] * 20)}, "cannot be read"),
    ],
)
def test_bad_npz(tmp_path, changes, message):
    with pytest.raises(FaultError, match=message) as caught:
        load(write_npz(tmp_path / "bad.npz", **changes))
    assert "bad.npz" in str(caught.value)


def damaged_files(tmp_path):
    good, array = tmp_path / "good.npz", tmp_path / "array.npy"
    write_npz(good)
    np.save(array, BLACK)
    whole = good.read_bytes()
    with zipfile.ZipFile(tmp_path / "header.npz", "w") as archive:
        for name in ("x_train", "y_train", "x_test", "y_test"):
            archive.writestr(f"{name}.npy", array.read_bytes().replace(b"}", b" "))
    return {
        "empty": b"",
        "text": b"hello",
        "cut off": whole[: len(whole) // 2],
        "flipped bits": whole[:500] + bytes([whole[500] ^ 255]) + whole[501:],
        "bare array": array.read_bytes(),
        "unreadable header": (tmp_path / "header.npz").read_bytes(),
    }


def test_some_classes_may_have_no_image(tmp_path):
    """As in a part of a larger set: the letters of EMNIST count from 1, ten classes of ImageNet from anywhere."""
    labels = np.arange(20) % 2 * cifar_data.MOST_EMPTY_CLASSES + 1
    data = load(write_npz(tmp_path / "part.npz", y_train=labels, y_test=labels[:10]))
    assert data.num_classes == cifar_data.MOST_EMPTY_CLASSES + 2
    with pytest.raises(FaultError, match=r"1001 of .* no image \(0, 2, 3, 4, 5 and 996 more"):
        load(write_npz(tmp_path / "more.npz", y_train=labels + (labels > 1)))


@pytest.mark.parametrize("damage", ["empty", "text", "cut off", "flipped bits", "bare array", "unreadable header"])
def test_file_that_is_no_npz(tmp_path, damage):
    path = tmp_path / "bad.npz"
    path.write_bytes(damaged_files(tmp_path)[damage])
    with pytest.raises(FaultError, match=r"bad\.npz cannot be read as an \.npz file") as caught:
        load(str(path))
    assert "\n" not in str(caught.value)


def fake_torchvision(monkeypatch, class_name, images, labels):
    def data_set(root, train, download):
        assert download
        count = len(images) if train else len(images) // 2
        return SimpleNamespace(data=images[:count], targets=labels[:count])

    monkeypatch.setattr(f"torchvision.datasets.{class_name}", data_set)


@pytest.mark.parametrize(
    ("name", "class_name", "num_classes"), [("cifar10", "CIFAR10", 10), ("cifar100", "CIFAR100", 100)]
)
def test_cifar_pads_and_counts_classes_as_published(monkeypatch, tmp_path, name, class_name, num_classes):
    fake_torchvision(monkeypatch, class_name, np.full((8, 32, 32, 3), 9, np.uint8), [0, 1, 2, 3] * 2)
    data = load(name, data_dir=tmp_path)
    assert (data.num_classes, data.channels, data.image_size) == (num_classes, 3, 32)
    (batch,) = data.train.epoch(0)  # one grey: only zero padding shows, as 0 - 9
    assert batch.images.unique().tolist() == ([0.0] if name == "cifar10" else [-9.0, 0.0])


def test_mnist_keeps_its_size_and_is_never_mirrored(monkeypatch, tmp_path):
    images = torch.zeros(64, 28, 28, dtype=torch.uint8)
    images[:, 8:20, 8:14], images[:, 8:20, 14:20] = 100, 200  # the right half is the brighter one
    fake_torchvision(monkeypatch, "MNIST", images, torch.arange(64) % 10)
    data = load("mnist", data_dir=tmp_path)
    assert (data.num_classes, data.channels, data.image_size) == (10, 1, 28)
    for batch in data.train.epoch(0):
        assert batch.images.shape[1:] == (1, 28, 28)
        for columns in batch.images.amax((1, 2)):
            lit = columns[columns > columns.min()]
            assert len(lit) == 12
            assert lit[0] < lit[-1]


def test_labels_outside_a_named_set_are_damage(monkeypatch, tmp_path):
    fake_torchvision(monkeypatch, "CIFAR10", np.zeros((8, 32, 32, 3), np.uint8), [0, 1, 2, 10] * 2)
    with pytest.raises(FaultError, match=r"cifar10: y_train holds the label 10, outside .* 0 to 9"):
        load("cifar10", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "class_name", "files"),
    [
        ("cifar10", "CIFAR10", "cifar-10-python.tar.gz"),
        ("cifar100", "CIFAR100", "cifar-100-python.tar.gz"),
        ("mnist", "MNIST", "MNIST/raw"),
    ],
)
def test_failed_download_says_what_is_missing(monkeypatch, tmp_path, name, class_name, files):
    def offline(root, train, download):
        raise URLError("Name or service\nnot known")

    monkeypatch.setattr(f"torchvision.datasets.{class_name}", offline)
    with pytest.raises(FaultError, match=re.escape(files)) as caught:
        load(name, data_dir=tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "Name or service not known" in message
    assert "\n" not in message


def test_runs_download_to_one_folder_one_after_the_other(monkeypatch, tmp_path):
    events = []

    def data_set(root, train, download):
        events.append((train, threading.get_ident()))
        time.sleep(0.05)
        return SimpleNamespace(data=np.zeros((8, 32, 32, 3), np.uint8), targets=[0, 1] * 4)

    monkeypatch.setattr("torchvision.datasets.CIFAR10", data_set)
    monkeypatch.setattr(cifar_data, "SECONDS_BETWEEN_LOOKS", 0.01)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda _: load("cifar10", data_dir=tmp_path / "new"), range(3)))
    parts, threads = zip(*events, strict=True)
    assert parts == (True, False) * 3
    assert threads[::2] == threads[1::2]


def test_help_names_every_data_set():
    text = data_help()
    assert all(name in text for name in (*DATASETS, ".npz"))
    assert "%" not in text  # argparse would read it as a format


def test_every_data_set_is_complete():
    for data_set in (*DATASETS.values(), cifar_data.NPZ_FILE):
        assert data_set.augmentation.padding in PADDED
        assert data_set.augmentation.pad == 4
    assert [name for name, data_set in DATASETS.items() if not data_set.augmentation.flip] == ["mnist", "digits"]
