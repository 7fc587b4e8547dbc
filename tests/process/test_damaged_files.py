"""Files of tensors with any one entry removed, or of another type, shape or range: told in one sentence."""

import copy
import math
import signal
from collections.abc import Mapping
from pathlib import Path

import main_suptickets
import pytest
import torch
from cifar_models import MODELS
from torch import nn

from helpers.cifar import small_call, stop_in, write_npz
from helpers.damage import is_drawn
from sparselearning.process import distributed
from sparselearning.process.errors import FaultError, UsageError
from sparselearning.process.files import load_torch
from sparselearning.process.signals import Stopped
from sparselearning.process.tensor_schema import check
from sparselearning.training.checkpoint import HEAD
from sparselearning.training.engine import Trainer
from sparselearning.training.networks import SavedNetwork, load_weights

# Four epochs of three steps: two of pre-training, then two cycles of one.
BOTH = "--pre_train --cyclic_train --epochs 4 --cycle 1 --cycle_rate 0.5 --cyc_lr --update_bn --keep-tickets"
SPARSE = "--sparse --init-density 0.6 --final-density 0.3 --update-frequency 2 --final-prune-epoch 2 --re_explore"
MOMENTUM = "--sparse --method DST --init-density 0.3 --final-density 0.3 --update-frequency 2 --growth momentum"

# Of each run: its flags, and the step that it stops after.
STOPPED = {
    "in pre-training": (f"{BOTH} {SPARSE}", 5),
    "before a cycle, with the gradients that it explores by": (f"{BOTH} {SPARSE} --prune threshold", 9),
    "in a cycle, with Adam and momentum growth": (f"{BOTH} {MOMENTUM} --optimizer adam", 8),
    "in a dense cycle": (BOTH, 8),
}


pytestmark = pytest.mark.usefixtures("workplace")


@pytest.fixture(scope="module", autouse=True)
def smallest():
    """A network with one layer of each kind, under the name ``smallest``."""

    def build(num_classes, in_channels, image_size):
        convolution = [nn.Conv2d(in_channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]
        return nn.Sequential(*convolution, nn.Flatten(), nn.Linear(4 * (image_size - 2) ** 2, num_classes))

    with pytest.MonkeyPatch.context() as context:
        context.setitem(MODELS, "smallest", build)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    write_npz(path)
    return path


def words(data, flags):
    return small_call(data, "--execution masked", flags, model="smallest").split()


@pytest.fixture(scope="module")
def saved(data, tmp_path_factory):
    """The checkpoint of each of STOPPED."""
    found = {}
    for name, (flags, step) in STOPPED.items():
        folder = tmp_path_factory.mktemp("run") / "run"
        with pytest.MonkeyPatch.context() as context:
            stop_in(context, step, signal.SIGTERM)
            with pytest.raises(Stopped):
                main_suptickets.main(words(data, f"{flags} --save {folder}"))
        found[name] = load_torch(folder / "checkpoint.pth")
    return found


# --------------------------------------------------------------------------------------------------- what is damaged

MISSING = object()
FORM = {"text": "text", "list": [], "none": None, "named values": {}, "tensor": torch.zeros(3, 3)}


def kind_of(value):
    if isinstance(value, torch.Tensor):
        return value.dtype, value.dim()
    return frozenset(value) if isinstance(value, Mapping) else type(value)


def entries(value, path=()):
    """Paths to all entries; of tensors, numbers and dictionaries that are alike in one container, to the first."""
    inside = (
        enumerate(value) if isinstance(value, list | tuple) else value.items() if isinstance(value, Mapping) else ()
    )
    seen = set()
    for key, entry in inside:
        plain = isinstance(key, str) and not isinstance(entry, torch.Tensor) and path[:1] != ("config",)
        if plain or kind_of(entry) not in seen:
            seen.add(kind_of(entry))
            yield (*path, key)
            if key != "param_groups":
                yield from entries(entry, (*path, key))


def replacements(value):
    """What may stand in a value's place, by what it is called."""
    yield "missing", MISSING
    yield from FORM.items()
    yield "number", "0.5" if isinstance(value, float) else 0.5
    if isinstance(value, torch.Tensor):
        yield "other shape", torch.zeros(*value.shape, 1, dtype=value.dtype)
        yield "other type", value.to(torch.int16)
        yield "without numbers", value.to("meta")
        if value.is_floating_point():
            yield "NaN", torch.full_like(value, torch.nan)
            yield "beyond float32", torch.full_like(value, 1e300, dtype=torch.float64)
        if value.dtype == torch.bool:
            yield "inverted", ~value
    elif isinstance(value, bool):
        yield "integer", 1
    elif isinstance(value, int | float):
        yield from {"negative": -1, "huge": 10**400, "NaN": math.nan, "infinite": math.inf, "true": True}.items()
    elif isinstance(value, Mapping):
        yield "with another entry", {**value, "another": torch.zeros(1)}
    elif isinstance(value, list | tuple):
        yield "longer", type(value)([*value, *value[:1], 0])


def damaged(content, path, change):
    """A copy of ``content`` with another entry, or none, at ``path``."""
    key, *rest = path
    entry = damaged(content[key], rest, change) if rest else change
    pairs = content.items() if isinstance(content, Mapping) else enumerate(content)
    left = {k: entry if k == key else v for k, v in pairs if k != key or entry is not MISSING}
    return left if isinstance(content, Mapping) else type(content)(left.values())


def at(content, path):
    for key in path:
        content = content[key]
    return content


def damages(content, paths=None):
    """(path to the entry, what is wrong with it, the damaged content), for every entry in a third of all ways, or
    for those at ``paths`` in all.
    """
    for path in entries(content) if paths is None else paths:
        for name, change in replacements(at(content, path)):
            if paths is None and not is_drawn(path, name):
                continue
            value = at(content, path)
            if type(change) is not type(value) or isinstance(value, torch.Tensor) or change != value:
                yield path, name, damaged(content, path, change)


def is_alike(content, path, value):
    """Whether there is an entry at ``path`` of the same kind as ``value``: the same code reads it."""
    try:
        return kind_of(at(content, path)) == kind_of(value)
    except (KeyError, IndexError, TypeError):
        return False


def new_entries(saved, name):
    """Paths to the entries of one of STOPPED's checkpoints that those before it do not have."""
    names, content = list(STOPPED), saved[name]
    before = [saved[other] for other in names[: names.index(name)]]
    return [path for path in entries(content) if not any(is_alike(one, path, at(content, path)) for one in before)]


def harmless(path, name):
    """Whether nobody reads the entry, or what stands there is as good as what stood there."""
    match path:
        case ("config", *_):
            return True  # compared with the flags before anything is loaded
        case ("scaler",) | ("optimizer", "param_groups", *_) | (*_, "rng", "cuda") | ("masking", "seed"):
            return True  # for other precisions, devices, or settings than this run's
        case ("optimizer", "state", _):
            return name == "none"  # of a parameter that has had no gradient yet
        case ("masking", "prune_state", "threshold") | (*_, "python", 2):
            return name in ("none", "number")  # which both may be
        case ("masking", "prune_state") if name == "none":
            return True  # as before the first update
        case ("gradients", _):
            return name in ("none", "NaN")  # explored after another look at gradients
        case ("metrics", 0, "train_loss" | "eval_loss"):
            return name == "negative"
        case ("metrics", 0, _) | ("tickets", 0, _):
            return name == "none"
    # Each dictionary's own rule says whether other entries may be there; nobody reads those that may.
    return name == "with another entry" or (name == "named values" and path[0] in ("masking", "superposition_masks"))


@pytest.fixture(scope="module")
def trainer_of(data):
    """A trainer that is about to go on from a checkpoint of STOPPED."""

    class Prepared(Exception):
        pass

    def prepare(name, path):
        def run(trainer):
            raise Prepared(trainer)

        with pytest.MonkeyPatch.context() as context:
            context.setattr(Trainer, "run", run)
            with pytest.raises(Prepared) as prepared:
                main_suptickets.main(words(data, f"{STOPPED[name][0]} --save other --resume {path}"))
        return prepared.value.args[0]

    return prepare


def fault(call):
    """What a call raises as a FaultError, if it does."""
    try:
        call()
    except FaultError as error:
        return str(error)
    return None


def badly_told(told, path, keys):
    named = [key for key in keys if isinstance(key, str)][-1]
    return not (told.startswith(f"{path} is damaged: ") and named in told and "\n" not in told and len(told) < 400)


@pytest.mark.parametrize("name", STOPPED)
def test_no_damaged_entry_of_a_checkpoint_is_believed(saved, trainer_of, name):
    path = Path("checkpoint.pth")
    torch.save(saved[name], path)
    trainer = trainer_of(name, path)
    before = copy.deepcopy([trainer.model.state_dict(), trainer.optimizer.state_dict()["state"]])

    def go_on(content):
        check(content, HEAD, path)
        trainer.checkpoint.load(content, path)

    paths = new_entries(saved, name)
    found = damages(saved[name], paths)
    ends = [(keys, what, fault(lambda c=content: go_on(c))) for keys, what, content in found]
    assert [(keys, what) for keys, what, told in ends if told is None and not harmless(keys, what)] == []
    assert [end for end in ends if end[2] and badly_told(end[2], path, end[0])] == []
    assert len([told for *_, told in ends if told]) > (100 if name == next(iter(STOPPED)) else 10)
    trainer.checkpoint.load(saved[name], path)
    after = [trainer.model.state_dict(), trainer.optimizer.state_dict()["state"]]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_a_checkpoint_of_no_process_is_damaged(saved):
    with pytest.raises(FaultError, match=r"checkpoint\.pth is damaged: ranks is empty"):
        check(saved["in a dense cycle"] | {"ranks": []}, HEAD, Path("checkpoint.pth"))


def test_no_damaged_entry_of_another_rank_is_believed(saved, trainer_of, monkeypatch):
    name, path = "in pre-training", Path("checkpoint.pth")
    torch.save(saved[name], path)
    trainer = trainer_of(name, path)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    (rank,) = saved[name]["ranks"]
    trainer.checkpoint.check(saved[name] | {"ranks": [rank, rank]}, path)
    untold = [
        (keys, what)
        for keys, what, content in damages(rank)
        if not harmless(("ranks", 1, *keys), what)
        and fault(lambda c=content: trainer.checkpoint.check(saved[name] | {"ranks": [rank, c]}, path)) is None
    ]
    assert untold == []


def test_no_damaged_entry_of_a_network_is_believed(saved, trainer_of):
    """Masks may be fewer, or none: a layer without one is dense."""
    name, path = "in pre-training", Path("model.pth")
    torch.save(saved[name], path)
    model = trainer_of(name, path).model
    network = {entry: saved[name][entry] for entry in ("state_dict", "masks", "epoch")}

    def told(content):
        torch.save(content, path)
        try:
            load_weights(model, vars(SavedNetwork.read(path)), path)
        except (FaultError, UsageError) as error:
            return str(error)
        return None

    assert told(network) is None
    ends = [(keys, what, told(content)) for keys, what, content in damages(network)]
    fewer = {(("masks",), "named values"), *((keys, "missing") for keys, *_ in ends if keys[:-1] == ("masks",))}
    converted = {(("state_dict", "1.num_batches_tracked"), "other type")}  # one whole number for another
    assert {(keys, what) for keys, what, sentence in ends if sentence is None} - fewer - converted == set()
    assert all("model.pth" in sentence and "\n" not in sentence for *_, sentence in ends if sentence)
