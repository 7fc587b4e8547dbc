"""Masking against the same training written plainly, with full sorts and dense momentum."""

import copy
import math

import pytest
import torch

from helpers.masked_networks import NAMES, SIZE, SmallNet, backward, same, sgd, snapshot
from sparselearning import Masking, gradual_density


class Reference:
    """The same training, spelled out with full sorts: a twin model, its own masks, its own dense momentum."""

    def __init__(self, model, optimizer, masks, growth, rate):
        self.model, self.optimizer = copy.deepcopy(model), None
        self.optimizer = optimizer(self.model.parameters())
        self.masks = {name: mask.clone() for name, mask in masks.items()}
        self.growth, self.rate = growth, rate
        self.first = {name: torch.zeros(mask.shape, dtype=torch.float64) for name, mask in masks.items()}
        self.second = {name: value.clone() for name, value in self.first.items()}

    def apply(self):
        for name, mask in self.masks.items():
            weight = self.model.get_parameter(name)
            weight.data *= mask
            for state in self.optimizer.state[weight].values():
                if torch.is_tensor(state) and state.shape == mask.shape:
                    state *= mask

    def step(self, number, update, density=None):
        backward(self.model, number, torch.float64)
        for name in self.masks:
            gradient = self.model.get_parameter(name).grad
            if isinstance(self.optimizer, torch.optim.SGD):
                self.first[name] = 0.9 * self.first[name] + gradient
            else:
                self.first[name] = 0.9 * self.first[name] + 0.1 * gradient
                self.second[name] = 0.999 * self.second[name] + 0.001 * gradient**2
        self.optimizer.step()
        self.apply()
        if update:
            before = {name: mask.clone() for name, mask in self.masks.items()}
            if density is not None:
                self.prune(density)
            self.prune_and_grow()
            for name, mask in self.masks.items():
                self.first[name][mask & ~before[name]] = 0
                self.second[name][mask & ~before[name]] = 0
            self.apply()

    def prune(self, density):
        magnitudes = [
            (abs(self.model.get_parameter(name).flatten()[i].item()), name, i)
            for name, mask in self.masks.items()
            for i in mask.flatten().nonzero().flatten().tolist()
        ]
        for _, name, i in sorted(magnitudes)[: len(magnitudes) - round(SIZE * density)]:
            self.masks[name].view(-1)[i] = False

    def prune_and_grow(self):
        for name, mask in self.masks.items():
            flat, weight = mask.view(-1), self.model.get_parameter(name)
            magnitude = weight.detach().flatten().abs()
            smallest = sorted(flat.nonzero().flatten().tolist(), key=lambda i: magnitude[i].item())
            removed = smallest[: math.ceil(self.rate * len(smallest))]
            flat[removed] = False
            score = self.score(name, weight).flatten().abs()
            largest = sorted((~flat).nonzero().flatten().tolist(), key=lambda i: -score[i].item())
            flat[largest[: len(removed)]] = True

    def score(self, name, weight):
        if self.growth == "gradient":
            return weight.grad
        if isinstance(self.optimizer, torch.optim.SGD):
            return self.first[name]
        return self.first[name] / (self.second[name].sqrt() + 1e-8)


REFERENCE_OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
}


@pytest.mark.parametrize("method", ["DST", "GraNet"])
@pytest.mark.parametrize("growth", ["gradient", "momentum"])
@pytest.mark.parametrize("optimizer", REFERENCE_OPTIMIZERS)
def test_training_equals_the_reference(optimizer, growth, method):
    model = SmallNet().double()
    make = REFERENCE_OPTIMIZERS[optimizer]
    masking = Masking(
        make(model.parameters()), method=method, growth=growth, prune_rate=0.4, update_frequency=2,
        init_density=0.5, final_density=0.2, prune_end_step=8,
    )  # fmt: skip
    masking.add_module(model, "ERK")
    reference = Reference(model, make, masking.masks, growth, 0.4)
    for number in range(1, 15):
        backward(model, number, torch.float64)
        masking.step()
        density = gradual_density(number, 0, 8, 0.5, 0.2) if method == "GraNet" else None
        reference.step(number, number % 2 == 0, density)
        assert same(reference.masks, masking.masks)
        for (name, found), expected in zip(model.named_parameters(), reference.model.parameters(), strict=True):
            assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12), name
            for key, state in reference.optimizer.state[expected].items():
                assert torch.allclose(masking.optimizer.state[found][key], state, rtol=1e-9, atol=1e-12), (name, key)


def test_momentum_neuron_growth_takes_the_top_of_each_neuron():
    model = SmallNet().double()
    masking = Masking(sgd(model), growth="momentum_neuron", prune_rate=0.5, update_frequency=3, init_density=0.4)
    masking.add_module(model, "uniform")
    dense = {name: torch.zeros_like(model.get_parameter(name)) for name in NAMES}
    for number in range(1, 4):
        before = snapshot(masking)
        backward(model, number, torch.float64)
        for name in NAMES:
            dense[name] = 0.9 * dense[name] + model.get_parameter(name).grad
        masking.step()
    for name in NAMES:
        new, off = masking.masks[name] & ~before[name], ~masking.masks[name]
        for momentum, grown, left in zip(dense[name].abs().flatten(1), new.flatten(1), off.flatten(1), strict=True):
            assert not grown.any() or not left.any() or momentum[grown].min() >= momentum[left].max()
