"""Two gloo processes on the CPU against one process with the same global batch.

What makes one and two processes comparable: no BatchNorm in training mode (each rank normalises by its own half of the
batch, as everywhere in data-parallel training), no dropout, and the same global batches. Where masks must agree to
the bit the networks compute in float64, so that the other order of summation cannot swap two scores that nearly tie.
"""

import contextlib
import itertools
import os
import random
import re
import signal
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cifar_data import Augmentation, TensorLoader
from torch import nn

from helpers.comparing import without_times
from helpers.ranks import CPU, Ranks, as_numpy, assert_same_arrays
from sparselearning import Masking, update_bn
from sparselearning.process import distributed
from sparselearning.process.errors import FaultError, UsageError
from sparselearning.process.seeding import seed_everything
from sparselearning.process.signals import Stopped
from sparselearning.sparse.superpose import AVERAGING
from sparselearning.sparse.topology import GROWTH, PRUNE, REDISTRIBUTION
from sparselearning.training import experiment
from sparselearning.training.data import Batch, Sources
from sparselearning.training.engine import Trainer
from sparselearning.training.plan import EpochBudget, Plan
from sparselearning.training.run_folder import RunFolder
from sparselearning.training.runtime import Runtime

# ------------------------------------------------------------------------------------------------- masks and weights

STEPS, GLOBAL_BATCH = 20, 8


def small_model(seed=0):
    """A network without BatchNorm and dropout, for images of 2 x 6 x 6 and 5 classes."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 5)]
    return nn.Sequential(*layers).double()


def global_batches():
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(STEPS, GLOBAL_BATCH, 2, 6, 6, generator=generator, dtype=torch.float64)
    return zip(images, torch.randint(5, (STEPS, GLOBAL_BATCH), generator=generator), strict=True)


def seed_ranks_differently():
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(1000 + distributed.rank())


def masking_of(model, optimizer=None, **options):
    settings = {"update_frequency": 4, "init_density": 0.4, "final_density": 0.2, "prune_end_step": 12}
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    return Masking(optimizer, seed=17 + distributed.rank(), **(settings | options))  # rank 0's seed counts


def train_steps(network, masking, batches):
    rank, world = distributed.rank(), distributed.world_size()
    share = slice(rank * GLOBAL_BATCH // world, (rank + 1) * GLOBAL_BATCH // world)
    for images, labels in batches:
        masking.optimizer.zero_grad()
        F.cross_entropy(network(images[share]), labels[share]).backward()
        masking.step()


def train(options, adam=False, wrap_first=False):
    """20 steps on the ranks' shares of the same global batches, then one exploration; masks and weights."""
    model = small_model()
    masking = masking_of(model, torch.optim.Adam(model.parameters(), lr=0.01) if adam else None, **options)
    seed_ranks_differently()
    if wrap_first:
        network = distributed.wrap(model, CPU)
        masking.add_module(network)
    else:
        masking.add_module(model)
        network = distributed.wrap(model, CPU)
    first_masks = as_numpy(masking.masks)
    train_steps(network, masking, global_batches())
    masking.truncate_weights(0.5)
    return {"first": first_masks, "last": as_numpy(masking.masks), "weights": as_numpy(model.state_dict())}


MODES = [
    *({"growth": growth, "method": method} for growth in GROWTH for method in ("DST", "GraNet")),
    *({"prune": prune} for prune in PRUNE if prune != "magnitude"),
    *({"redistribution": mode, "growth": "random"} for mode in REDISTRIBUTION if mode != "none"),
    {"method": "GraNet_uniform"},
    {"method": "GMP"},
]


@pytest.mark.parametrize("options", MODES, ids=lambda options: "-".join(options.values()))
def test_two_processes_equal_one(ranks, options):
    alone, (ours, theirs) = train(options), ranks(train, options)
    for masks in ("first", "last"):
        assert_same_arrays(ours[masks], theirs[masks])
        assert_same_arrays(ours[masks], alone[masks])
    assert_same_arrays(ours["weights"], theirs["weights"])
    for name, weight in alone["weights"].items():
        np.testing.assert_allclose(ours["weights"][name], weight, rtol=0, atol=1e-10, err_msg=name)
    assert any((alone["first"][name] != mask).any() for name, mask in alone["last"].items())  # updates did happen


@pytest.mark.parametrize("growth", GROWTH)
def test_two_processes_equal_one_with_adam(ranks, growth):
    alone, (ours, theirs) = train({"growth": growth}, adam=True), ranks(train, {"growth": growth}, True)
    assert_same_arrays(ours["last"], theirs["last"])
    assert_same_arrays(ours["last"], alone["last"])


def gradients_of_two_passes():
    """Of one batch, each rank's own, twice."""
    model = small_model()
    network, (batch, labels) = distributed.wrap(model, CPU), next(global_batches())
    mine = slice(distributed.rank(), None, distributed.world_size())
    gradients = []
    for _ in range(2):
        model.zero_grad()
        F.cross_entropy(network(batch[mine]), labels[mine]).backward()
        gradients.append(as_numpy({name: weight.grad for name, weight in model.named_parameters()}))
    return gradients


def test_the_first_pass_of_three_processes_adds_up_as_later_ones_do():
    """A resumed run has a first pass where the uninterrupted one has a later one."""
    with contextlib.closing(Ranks(3)) as three:
        for first, second in three(gradients_of_two_passes):
            assert_same_arrays(first, second)


def test_it_does_not_matter_whether_masks_or_the_wrapper_come_first(ranks):
    masks_first, wrapper_first = (ranks(train, {}, False, order)[0] for order in (False, True))
    for part in masks_first:
        assert_same_arrays(wrapper_first[part], masks_first[part])


def grow_on_unlike_devices():
    """One update by random growth on ranks that draw differently from one seed, as unlike GPUs do."""
    rand = torch.rand
    with pytest.MonkeyPatch.context() as patch:
        if distributed.rank() == 1:
            patch.setattr(torch, "rand", lambda *args, **kwargs: 1 - rand(*args, **kwargs))
        return train({"growth": "random"})


def test_random_growth_is_rank_0s(ranks):
    ours, theirs = ranks(grow_on_unlike_devices)
    assert_same_arrays(theirs["last"], ours["last"])
    assert_same_arrays(theirs["weights"], ours["weights"])
    assert_same_arrays(ours["last"], train({"growth": "random"})["last"])


def draw_masks(sparse_init):
    """Masks drawn on ranks whose seeds, weights and gradients all differ."""
    model = small_model(seed=distributed.rank())
    images = torch.randn(4, 2, 6, 6, dtype=torch.float64)
    F.cross_entropy(model(images), torch.randint(5, (4,))).backward()
    masking = masking_of(model)
    masking.add_module(model, sparse_init)
    return as_numpy(masking.masks)


@pytest.mark.parametrize("sparse_init", ["ERK", "uniform", "snip", "prune_global", "prune_and_grow_uniform"])
def test_rank_0_draws_the_masks(ranks, sparse_init):
    ours, theirs = ranks(draw_masks, sparse_init)
    assert_same_arrays(ours, draw_masks(sparse_init))  # this process draws as rank 0 does
    assert_same_arrays(theirs, ours)


def tamper(move, by_training):
    """Spoil rank 1's first mask at equal count; the step at which this rank stops, and what it says."""
    model = small_model()
    masking = masking_of(model, prune_rate=0.1)
    masking.add_module(model)
    network = distributed.wrap(model, CPU)
    batches = global_batches()
    train_steps(network, masking, itertools.islice(batches, 5))  # one update, which is fine
    if distributed.rank() == 1:
        move(next(iter(masking.masks.values())).view(-1), model[0].weight.detach().view(-1))
    try:
        if by_training:
            train_steps(network, masking, batches)
        else:
            masking.truncate_weights(0.0)  # changes nothing, and looks
    except FaultError as fault:
        return masking.steps, str(fault)
    return masking.steps, "no complaint"


def move_the_largest(mask, weight):
    """One active weight, that no update would remove, gives its place to an inactive one."""
    mask[weight.abs().argmax()], mask[(~mask).nonzero()[0]] = False, True


def move_two_in_opposite_directions(mask, weight):
    """Neither the count nor the sum of the active positions changes."""
    up = (mask[:-1] & ~mask[1:]).nonzero()[0]
    down = next(p for p in (mask[1:] & ~mask[:-1]).nonzero() + 1 if abs(p - up) > 2)
    for old, new in ((up, up + 1), (down, down - 1)):
        mask[old], mask[new] = False, True


@pytest.mark.parametrize("move", [move_the_largest, move_two_in_opposite_directions])
def test_masks_that_differ_between_ranks_stop_all_of_them(ranks, move):
    for step, message in ranks(tamper, move, False):
        assert step == 5
        assert re.match(r"the ranks' masks differ after the topology update at step 5\b", message)


def test_masks_that_differ_between_ranks_stop_training_at_the_next_update(ranks):
    for step, message in ranks(tamper, move_the_largest, True):
        assert step == 8
        assert re.match(r"the ranks' masks differ after the topology update at step 8\b", message)


# --------------------------------------------------------------------------------------------- what ranks share


def agreed(raised_by, at_step):
    flag = distributed.AgreedFlag()
    seen = [flag.exchange(15 if (distributed.rank(), step) == (raised_by, at_step) else 0) for step in range(7)]
    flag.collect()
    return seen


@pytest.mark.parametrize("raised_by", [0, 1])
def test_a_flag_raised_on_one_rank_is_seen_at_the_same_step_on_both(ranks, raised_by):
    assert ranks(agreed, raised_by, 3) == [[0, 0, 0, 0, 15, 15, 15]] * 2


def test_a_single_process_sees_its_flag_at_once():
    assert agreed(0, 3) == [0, 0, 0, 15, 0, 0, 0]


def pooled_bn(wrapped):
    """BatchNorm statistics after one pass over 5 batches, which two ranks share 3 to 2."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2))
    for norm in (model[1], model[4]):
        norm.running_mean += 100 * (1 + distributed.rank())  # must be forgotten
    batches = [torch.randn(size, 2, 7, 7) * (1 + size) for size in (4, 2, 5, 3, 4)]
    own = batches[distributed.rank() :: distributed.world_size()]
    update_bn(own, distributed.wrap(model, CPU) if wrapped else model)
    return as_numpy(dict(model.named_buffers()))


@pytest.mark.parametrize("wrapped", [False, True])
def test_batchnorm_is_re_estimated_over_the_batches_of_all_ranks(ranks, wrapped):
    alone, (ours, theirs) = pooled_bn(False), ranks(pooled_bn, wrapped)
    assert_same_arrays(ours, theirs)
    assert alone["1.num_batches_tracked"] == ours["1.num_batches_tracked"] == 5
    for name in alone:
        np.testing.assert_allclose(ours[name], alone[name], rtol=1e-5, err_msg=name)


def averaged_buffers():
    norm = nn.BatchNorm1d(2)
    norm.running_mean += torch.tensor([1.0, 2.0]) + 4 * distributed.rank()
    distributed.average_buffers(norm)
    return norm.running_mean.tolist()


def test_buffers_are_averaged_over_the_ranks(ranks):
    assert ranks(averaged_buffers) == [[3.0, 4.0]] * 2


def enter_after_main(path):
    with distributed.main_first():
        there = path.exists()
        if distributed.rank() == 0:
            time.sleep(0.2)
            path.touch()
    return there


def test_one_process_goes_first_where_files_are_downloaded(ranks, tmp_path):
    assert ranks(enter_after_main, tmp_path / "downloaded") == [False, True]


# --------------------------------------------------------------------------------------------------- the engine


NUMBERS = np.random.default_rng(5)
IMAGES = NUMBERS.integers(0, 256, (25, 6, 6, 1), dtype=np.uint8)
LABELS = NUMBERS.integers(0, 4, 25)


class Shares:
    """A set of 25 images of which each rank has batches of its own, not equally many."""

    num_samples = len(IMAGES)

    def __init__(self, *shares):
        self.batches = shares[distributed.rank()] if distributed.world_size() > 1 else list(itertools.chain(*shares))

    def __len__(self):
        return len(self.batches)

    def epoch(self, epoch, start=0):
        for low, high in self.batches[start:]:
            images = torch.from_numpy(IMAGES[low:high]).permute(0, 3, 1, 2).float() / 128 - 1
            yield Batch(images, torch.from_numpy(LABELS[low:high]))


UNEVEN = [(0, 4), (4, 9), (9, 16)], [(16, 25)]
ONE_SIDED = [(0, 12), (12, 25)], []


def toy(folder, *, resume=None, shares=UNEVEN, dropout=0.3, execution="masked"):
    """A run of the whole method, small: 2 epochs of pre-training, 2 cycles of 2, with BatchNorm and dropout."""
    seed_everything(3)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(96, 4)
    )
    train = TensorLoader(
        IMAGES, LABELS, mean=np.array([128.0]), std=np.array([64.0]), batch_size=7, seed=3,
        augmentation=Augmentation("constant", flip=True, pad=1),
        rank=distributed.rank(), world_size=distributed.world_size(),
    )  # fmt: skip
    plan = Plan(
        EpochBudget(2, 2, 2), lambda epoch: 0.05, AVERAGING["CAA"](0.5), cycle_lr=(0.01, 0.1), explore_rate=0.5,
        update_bn=True, final_density=0.3,
    )  # fmt: skip
    masking = {
        "method": "GraNet", "init_density": 0.6, "final_density": 0.3, "prune_end_step": 8, "update_frequency": 3,
        "seed": 3,
    }  # fmt: skip
    return (
        experiment.Setup(
            model,
            torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
            Sources(train, train_once=train, evaluation=Shares(*shares)),
            sample_shape=(1, 6, 6),
            class_balanced_batch=lambda: train.class_balanced_batch(7, 3),
        ),
        plan,
        experiment.SparseTraining(masking),
        Runtime(use_cuda=False, amp="off", execution=execution),
        experiment.Output(RunFolder(folder), {}, resume=resume),
    )


def toy_trainer(folder, *, stop_signal=lambda: 0, **settings):
    return experiment.prepare(*toy(folder, **settings), stop_signal)


def evaluated(shares, folder, is_test_set):
    trainer = toy_trainer(folder, shares=UNEVEN if is_test_set else shares)
    return trainer.evaluate(Shares(*shares)) if is_test_set else trainer.evaluate()


@pytest.mark.parametrize("is_test_set", [False, True])
@pytest.mark.parametrize("shares", [UNEVEN, ONE_SIDED], ids=["uneven", "one_sided"])
def test_evaluation_counts_each_sample_once(ranks, shares, is_test_set, tmp_path):
    alone = evaluated(shares, tmp_path, is_test_set)
    ours, theirs = ranks(evaluated, shares, tmp_path, is_test_set)
    assert ours == theirs
    assert ours[1] == alone[1]
    assert ours[0] == pytest.approx(alone[0], rel=1e-6)


def run_toy(folder, stop_after=None, stopper=1):
    """Run, stopped by a signal that only one rank gets, after so many looks; then go on. Where each was stopped."""
    looks = itertools.count()

    def stop_signal():
        return signal.SIGTERM if distributed.rank() == stopper and next(looks) >= stop_after else 0

    position = None
    if stop_after is not None:
        trainer = toy_trainer(folder, stop_signal=stop_signal)
        try:
            trainer.run()
        except Stopped as stop:
            position = stop.exit_code, trainer.at.epoch, trainer.at.batch, trainer.at.trained
        distributed.barrier()  # the other rank's checkpoint must be there before it is read
    trainer = toy_trainer(folder, resume=folder if position else None)
    trainer.run()
    outcome = as_numpy(trainer.model.state_dict())
    outcome |= {f"superposed {name}": array for name, array in as_numpy(trainer.superposition.state).items()}
    outcome |= {f"mask {name}": array for name, array in as_numpy(trainer.masking.masks).items()}
    rows = (
        [row.as_dict() for row in rows]
        for rows in (trainer.measurements.results.metrics, trainer.measurements.results.tickets)
    )
    return position, outcome, *([*map(without_times, part)] for part in rows)


@pytest.fixture(scope="module")
def undisturbed_toy(ranks, tmp_path_factory):
    return ranks(run_toy, tmp_path_factory.mktemp("toy"))


# The run looks 40 times: an epoch at its 4 training batches and 1 evaluation batch, a superposition at 4 batches for
# BatchNorm and 1 of evaluation (looks 20 to 24 and 35 to 39).
@pytest.mark.parametrize("stop_after", [0, 4, 9, 12, 18, 19, 21, 24, 31, 38])
def test_a_stop_on_one_rank_stops_both_at_the_same_batch_and_resumes_exactly(
    ranks, undisturbed_toy, stop_after, tmp_path
):
    stopped = ranks(run_toy, tmp_path, stop_after, stop_after % 2)
    assert stopped[0][0] == stopped[1][0]
    assert stopped[0][0][0] == 143
    for after, undisturbed in zip(stopped, undisturbed_toy, strict=True):
        assert_same_arrays(after[1], undisturbed[1])
        assert after[2:] == undisturbed[2:]


def run_with_a_late_signal(folder):
    """Run, of which one rank gets a signal after its last look; with which exit code this rank ends."""
    summary_of = Trainer._summary

    def summary_under_fire(self):
        if distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return summary_of(self)

    with pytest.MonkeyPatch.context() as context:
        context.setattr(Trainer, "_summary", summary_under_fire)
        try:
            experiment.run(*toy(folder))
        except Stopped as stop:
            return stop.exit_code


def test_a_stop_that_comes_too_late_for_a_run_starts_no_other_on_any_rank(ranks, tmp_path):
    assert ranks(run_with_a_late_signal, tmp_path / "run") == [143, 143]
    assert (tmp_path / "run" / "summary.json").exists()


def test_the_ranks_of_a_run_end_with_the_same_networks_and_metrics(undisturbed_toy):
    (_, ours, *our_rows), (_, theirs, *their_rows) = undisturbed_toy
    assert_same_arrays(ours, theirs)
    assert our_rows == their_rows


def losses(folder, execution):
    trainer = toy_trainer(folder, dropout=0, execution=execution)  # dropout draws in the order of memory
    trainer.run()
    return [loss for row in trainer.measurements.results.metrics for loss in (row.train_loss, row.eval_loss)]


def test_two_processes_compute_with_active_weights_as_with_masks(ranks, tmp_path):
    pytest.importorskip("numba")
    sparse, masked = (ranks(losses, tmp_path / execution, execution)[0] for execution in ("sparse", "masked"))
    assert sparse == pytest.approx(masked, rel=1e-5)
    assert sparse != masked  # they do compute in another order


def test_a_checkpoint_of_two_processes_is_refused_by_one(ranks, tmp_path):
    ranks(run_toy, tmp_path)
    with pytest.raises(UsageError, match=r"2 process.* not 1"):
        toy_trainer(tmp_path, resume=tmp_path)


def refused_on_main(folder):
    """What both ranks make of a folder that is in use: rank 0 opens it for both."""
    try:
        distributed.on_main(RunFolder(folder).in_use().__enter__)
    except FaultError as error:
        return str(error)
    except SystemExit as end:
        return end.code


def test_what_the_main_rank_refuses_ends_all(ranks, tmp_path):
    with RunFolder(tmp_path / "run").in_use():
        ours, theirs = ranks(refused_on_main, tmp_path / "run")
    assert "is in use by another run" in ours
    assert theirs == FaultError.exit_code
    assert ranks(refused_on_main, tmp_path / "other") == [None, None]
