"""What an update of masks draws and removes: growth at random, exploring by call, prune rates, thresholds."""

import io
import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from helpers.masked_networks import NAMES, SmallNet, active, counts, eight, random_gradients, same, sgd, snapshot, step
from sparselearning import Masking
from sparselearning.process.seeding import derive_seed
from sparselearning.sparse.topology import GROWTH

# ----------------------------------------------------------------------------------- growth at random


def test_random_growth_does_not_look_at_the_gradient():
    def trajectory(gradient_seed, scale):
        model = SmallNet()
        masking = Masking(sgd(model, lr=0.0), growth="random", update_frequency=1, init_density=0.3, seed=5)
        masking.add_module(model, "ERK")
        masks = [snapshot(masking)]
        for number in range(6):
            random_gradients(model, gradient_seed + number)
            for p in model.parameters():
                p.grad *= scale
            masking.step()
            masks.append(snapshot(masking))
        return masks

    first = trajectory(0, 1.0)
    assert not any(same(before, after) for before, after in itertools.pairwise(first))
    for other in (trajectory(500, 1.0), trajectory(0, 0.0), trajectory(0, -1e6)):
        assert all(same(a, b) for a, b in zip(first, other, strict=True))


def test_random_growth_is_uniform_over_seeds_and_updates():
    # 1 is removed; one of 0 4 5 6 7 grows. The gradient shouts for 4.
    hits, draws = Counter(), 0
    for seed in range(300):
        model, masking = eight([1.0, 2, 3, 4, 0, 0, 0, 0], growth="random", prune_rate=0.25, seed=seed)
        for _ in range(3):
            masking.masks["weight"].copy_(torch.tensor([1, 1, 1, 1, 0, 0, 0, 0]).view(2, 4))
            model.weight.data = torch.tensor([[1.0, 2, 3, 4], [0, 0, 0, 0]])
            step(model, masking, [0.0, 0, 0, 0, 1000, 0, 0, 0])
            (grown,) = set(active(masking)) - {1, 2, 3}
            hits[grown] += 1
            draws += 1
    assert set(hits) == {0, 4, 5, 6, 7}
    assert all(abs(n - draws / 5) < 4 * math.sqrt(draws * 0.2 * 0.8) for n in hits.values())


def test_layers_and_updates_draw_from_different_places():
    model = nn.Sequential(nn.Linear(20, 20, bias=False), nn.Linear(20, 20, bias=False))
    start = torch.zeros(20, 20)
    start[:5] = torch.arange(1, 101).view(5, 20)
    for p in model.parameters():
        p.data.copy_(start)
    masking = Masking(sgd(model, lr=0.0), growth="random", prune_rate=0.5, seed=1)
    masking.add_module(model, "resume")
    grown = []
    for _ in range(2):
        for p, mask in zip(model.parameters(), masking.masks.values(), strict=True):
            p.data.copy_(start)
            mask.copy_(start != 0)
        masking.truncate_weights()
        grown += [mask & (start == 0) for mask in masking.masks.values()]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(grown, 2))


@pytest.mark.parametrize("growth", GROWTH)
def test_masking_leaves_the_global_random_state_alone(growth):
    model = SmallNet()
    masking = Masking(sgd(model), growth=growth, update_frequency=1, init_density=0.3)
    random_gradients(model, 0)
    state = torch.get_rng_state()
    masking.add_module(model)
    masking.step()
    masking.truncate_weights(0.5)
    assert torch.equal(state, torch.get_rng_state())


def test_derived_seeds_are_reproducible_distinct_and_in_range():
    assert derive_seed(17, "growth", 3) == derive_seed(17, "growth", 3)
    seeds = {derive_seed(seed, use, n) for seed in range(20) for use in ("growth", "masks") for n in range(20)}
    assert len(seeds) == 800
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert derive_seed("1") != derive_seed(1)


def test_numpys_integers_are_seeds_as_pythons_are():
    assert derive_seed(np.int64(3), "growth") == derive_seed(3, "growth")
    model, file = SmallNet(), io.BytesIO()
    masking = Masking(sgd(model), seed=np.int64(3))
    masking.add_module(model)
    torch.save(masking.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["seed"] == 3


# ------------------------------------------------------------------------------------ exploring by call


def test_truncate_weights_explores_now_and_counts_nothing():
    model = SmallNet()
    masking = Masking(sgd(model, lr=0.0), method="GraNet", init_density=0.5, final_density=0.1, prune_end_step=100)
    masking.add_module(model, "ERK")
    masking.updates_enabled = False
    random_gradients(model, 0)
    masking.step()
    before, found = snapshot(masking), counts(masking)
    weights = {name: model.get_parameter(name).detach().clone() for name in NAMES}
    masking.truncate_weights(prune_rate=0.8)
    assert masking.steps == 1
    assert counts(masking) == found
    for name, mask in masking.masks.items():
        k = math.ceil(0.8 * found[name])
        kept = weights[name][before[name]].abs().sort().values[k:]
        candidates = ~before[name] | (weights[name].abs() < kept.min() if len(kept) else True)
        top = model.get_parameter(name).grad[candidates].abs().sort(descending=True).values[:k]
        grown = mask & candidates
        assert int(grown.sum()) == k
        assert model.get_parameter(name).grad[grown].abs().min() == top[-1]
        assert torch.equal(model.get_parameter(name), weights[name] * mask)


@pytest.mark.parametrize("decay_schedule", ["constant", "cosine", "linear"])
def test_the_prune_rate_follows_its_schedule(decay_schedule):
    model = SmallNet()
    masking = Masking(sgd(model), prune_rate=0.4, decay_schedule=decay_schedule, total_steps=4, init_density=0.3)
    masking.add_module(model)
    rates = [masking.current_prune_rate()]
    for number in range(5):
        random_gradients(model, number)
        masking.step()
        rates.append(masking.current_prune_rate())
    expected = {
        "constant": [0.4] * 6,
        "cosine": [0.005 + 0.395 * (1 + math.cos(math.pi * n / 4)) / 2 for n in (0, 1, 2, 3, 4, 4)],
        "linear": [0.4, 0.3, 0.2, 0.1, 0.0, 0.0],
    }
    assert rates == pytest.approx(expected[decay_schedule])


def removed_shares(updates, weights_of, prune_rate=0.3):
    """Share of active weights that each update of threshold pruning removes, with fresh weights for every one."""
    model = nn.Linear(100, 60, bias=False)
    masking = Masking(
        sgd(model, lr=0.0), prune="threshold", prune_rate=prune_rate, init_density=0.5, update_frequency=1
    )
    masking.add_module(model, "uniform")
    model.weight.grad = torch.zeros_like(model.weight)
    shares = []
    for number in range(updates):
        before = masking.masks["weight"].clone()
        generator = torch.Generator().manual_seed(number)
        model.weight.data = before * weights_of(number, torch.randn(60, 100, generator=generator))
        # Growth takes what it lost from where the gradient is not: what was removed stays away.
        model.weight.grad = torch.where(before, 0.0, 1.0)
        masking.step()
        shares.append(1 - (masking.masks["weight"] & before).sum().item() / before.sum().item())
    return shares


def test_threshold_pruning_tracks_the_prune_rate():
    assert removed_shares(12, lambda n, w: w) == pytest.approx([0.3] * 12, abs=0.06)


@pytest.mark.parametrize("scale", [20.0, 0.05])
def test_threshold_pruning_follows_weights_that_change_their_scale(scale):
    shares = removed_shares(20, lambda n, w: w * (scale if n >= 5 else 1.0))
    assert shares[5] == pytest.approx(0.0 if scale > 1 else 1.0, abs=0.05)
    assert shares[-5:] == pytest.approx([0.3] * 5, abs=0.06)


def test_threshold_pruning_recovers_from_a_first_update_among_zeros():
    # Most weights are exactly zero at first, so that the threshold starts at zero; it must not stay there.
    shares = removed_shares(40, lambda n, w: w * (w > 1) if n == 0 else w)
    assert shares[-5:] == pytest.approx([0.3] * 5, abs=0.06)
