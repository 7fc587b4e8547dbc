"""Damaged images, spoilt folders and wrong calls: left out and counted, or refused in a sentence."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.imagenet import CLASSES, collect, load
from sparselearning.process.errors import FaultError, UsageError

# --- damaged images


@pytest.fixture
def folder(image_folder, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(image_folder, tmp_path / "data")


def truncate(path):
    path.write_bytes(path.read_bytes()[:300])


def empty(path):
    path.write_bytes(b"")


def scramble(path):
    path.write_bytes(b"no image at all")


def unlink_target(path):
    path.unlink()
    path.symlink_to("nowhere.jpg")


@pytest.mark.parametrize(
    ("damage", "workers"), [(truncate, 0), (empty, 0), (scramble, 0), (unlink_target, 0), (truncate, 2)]
)
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
def test_strict_data_stops_at_a_damaged_image(folder, children, workers):
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
    assert children() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_of_damaged_images_is_left_out(folder, workers):
    for name in ("bee", "dog"):
        for number in range(5):
            scramble(folder / "val" / name / f"{number}.jpg")
    evaluation = load(folder, batch_size=5, workers=workers).evaluation  # one batch per class
    for start, classes in enumerate(([[0], [2]], [[2]], [[2]], [])):
        assert [batch.labels.unique().tolist() for batch in evaluation.epoch(0, start)] == classes
    assert len(evaluation.damaged) == 10


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_pixels_of_an_unknown_range_are_damage(folder, kind, capfd):
    (folder / "val" / "ant" / "0.jpg").unlink()
    Image.fromarray(np.full((30, 30), 200, kind)).save(folder / "val" / "ant" / "0.tif")
    assert len(collect(load(folder).evaluation.epoch(0))[1]) == 19
    assert "0.tif (pixels of 32 bits, whose range it does not say)" in capfd.readouterr().err


@pytest.mark.parametrize("world_size", [1, 2])
def test_no_step_of_training_is_left_out(folder, world_size):
    """Steps, checkpoints and schedules count on as many as there are batches."""
    scramble(folder / "train" / "ant" / "0.jpg")
    ranks = [load(folder, batch_size=1, rank=rank, world_size=world_size) for rank in range(world_size)]
    (hit,) = [data.train for data in ranks if [0] in data.train.batches(0)]
    with pytest.raises(FaultError, match=r"a whole batch is damaged.*ant/0\.jpg"):
        list(hit.epoch(0))


def test_a_damaged_batch_is_left_out_of_batchnorm_statistics(folder):
    scramble(folder / "train" / "ant" / "0.jpg")
    assert len(list(load(folder, batch_size=1).train_once.epoch(0))) == 31


@pytest.mark.parametrize("source", ["train", "train_once"])
def test_nothing_readable_is_a_fault(folder, source):
    for path in (folder / "train").rglob("*.jpg"):
        scramble(path)
    with pytest.raises(FaultError, match=r"is .*/train still there\?"):
        list(getattr(load(folder), source).epoch(0))


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
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, not 0"),
        ({"workers": -1}, "workers must be a whole number of at least 0, not -1"),
        ({"val_image_size": 32}, "val_image_size 32 cannot be cut out of images that resize scales to 28"),
        ({"val_image_size": 0}, "val_image_size must be a whole number of at least 1, not 0"),
        ({"image_size": 0}, "^image_size must be a whole number of at least 1, not 0"),
    ],
)
def test_arguments_out_of_range(image_folder, options, sentence):
    with pytest.raises(UsageError, match=sentence):
        load(image_folder, **options)
