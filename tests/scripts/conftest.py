"""Fixtures of the tests of the scripts."""

import multiprocessing
import signal

import main_suptickets
import numpy as np
import pytest
from PIL import Image

from helpers.cifar import SPARSE, WHOLE_METHOD, run_cifar, small_call, stop_in, write_npz
from helpers.imagenet import NUM_CLASSES, SCRIPTS, TRAIN_IMAGES, VAL_IMAGES, write_images


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    write_npz(path)
    return path


@pytest.fixture
def script(data, workplace):
    """Run the script in this process; returns its exit code."""

    def run(*words):
        return run_cifar(small_call(data, *words))

    return run


@pytest.fixture(scope="session")
def base(data, tmp_path_factory):
    """A trained sparse network to start from."""
    folder = tmp_path_factory.mktemp("base") / "run"
    call = small_call(data, "--pre_train --epochs 2", SPARSE, "--growth random --update-frequency 4 --save", folder)
    main_suptickets.main(call.split())
    return folder


@pytest.fixture(scope="session")
def undisturbed(data, tmp_path_factory):
    """Optimizer to the folder of a run that nothing stopped."""
    folders = {}
    for optimizer in ("sgd", "adam"):
        folders[optimizer] = tmp_path_factory.mktemp("undisturbed") / optimizer
        call = small_call(data, WHOLE_METHOD, "--optimizer", optimizer, "--save", folders[optimizer])
        main_suptickets.main(call.split())
    return folders


@pytest.fixture(scope="session")
def stopped(data, tmp_path_factory):
    """The checkpoint of a run with all of the method, after its third epoch."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    call = small_call(data, WHOLE_METHOD, "--save", folder)
    with pytest.MonkeyPatch.context() as context:
        stop_in(context, 8, signal.SIGTERM)
        with pytest.raises(Exception, match="SIGTERM"):
            main_suptickets.main(call.split())
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """32 images to train on and 20 to evaluate on, in four classes."""
    root = tmp_path_factory.mktemp("imagenet")
    write_images(root / "train")
    write_images(root / "val", per_class=5)
    return root


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A folder with imagenet2012/ and a clone's ImageNet/, where the published lines expect them."""
    home = tmp_path_factory.mktemp("home")
    numbers = np.random.default_rng(0)
    for split, count in (("train", TRAIN_IMAGES), ("val", VAL_IMAGES)):
        for label in range(NUM_CLASSES):
            folder = home / "imagenet2012" / split / f"n{label}"
            folder.mkdir(parents=True)
            for number in range(count // NUM_CLASSES):
                pixels = numbers.integers(0, 120, (36, 48, 3), dtype=np.uint8) + np.uint8(30 * label)
                Image.fromarray(pixels).save(folder / f"{number}.JPEG")
    scripts = home / "clone" / "ImageNet"
    scripts.mkdir(parents=True)
    for name in ("multiproc.py", "main.py"):
        (scripts / name).symlink_to(SCRIPTS / name)
    return home


@pytest.fixture
def children():
    """Processes that this one has started during the test: ranks that tests share may run on."""
    others = set(multiprocessing.active_children())
    return lambda: [process for process in multiprocessing.active_children() if process not in others]
