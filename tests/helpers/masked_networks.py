"""Small networks with masks: eight weights whose gradient a test chooses, and three layers that train."""

import io
import math

import torch
from torch import nn

from sparselearning import Masking, gradual_density
from sparselearning.sparse.topology import METHODS

GRADUAL = [name for name in METHODS if name != "DST"]


class EightWeights(nn.Module):
    """One layer of eight weights, whose gradient is whatever a test says, and a bias."""

    def __init__(self, weights):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weights).view(2, 4))
        self.bias = nn.Parameter(torch.zeros(2))

    def loss(self, gradient, bias_gradient=0.0):
        return (self.weight * torch.tensor(gradient).view(2, 4)).sum() + (self.bias * bias_gradient).sum()


def eight(weights, lr=0.0, momentum=0.0, **options):
    """A network of eight weights whose non-zeros are its mask; lr 0 leaves the weights where they are."""
    model = EightWeights(weights)
    masking = Masking(torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum), update_frequency=1, **options)
    masking.add_module(model, "resume")
    return model, masking


def step(model, masking, gradient, bias_gradient=0.0, scaler=None):
    masking.optimizer.zero_grad()
    loss = model.loss(gradient, bias_gradient)
    (scaler.scale(loss) if scaler else loss).backward()
    masking.step(scaler) if scaler else masking.step()


def masked(model, density=0.2, **settings):
    """An optimizer and a Masking of a whole network."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    masking = Masking(optimizer, init_density=density, final_density=density, **{"update_frequency": 10**6, **settings})
    masking.add_module(model)
    return optimizer, masking


def active(masking, name="weight"):
    return masking.masks[name].flatten().nonzero().squeeze(1).tolist()


class SmallNet(nn.Module):
    """A convolution, a hidden layer and a classifier; smooth, so that no gradient is exactly zero."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.hidden = nn.Linear(16, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.hidden(torch.tanh(self.norm(self.conv(x))).flatten(1))))


NAMES = ["conv.weight", "hidden.weight", "head.weight"]
SIZES = {"conv.weight": 72, "hidden.weight": 192, "head.weight": 36}
SIZE = 300


def batch(number, dtype=torch.float32, samples=8):
    generator = torch.Generator().manual_seed(1000 + number)
    images = torch.randn(samples, 2, 4, 4, generator=generator, dtype=dtype)
    return images, torch.randint(3, (samples,), generator=generator)


def backward(model, number, dtype=torch.float32):
    model.zero_grad()
    images, labels = batch(number, dtype)
    nn.functional.cross_entropy(model(images), labels).backward()


def random_gradients(model, number):
    """Stand-in for a backward pass: different random gradients for every number."""
    generator = torch.Generator().manual_seed(number)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def sgd(model, momentum=0.9, lr=0.05):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)


def counts(masking):
    return {name: int(mask.sum()) for name, mask in masking.masks.items()}


def snapshot(masking):
    return {name: mask.clone() for name, mask in masking.masks.items()}


def same(masks, others):
    return masks.keys() == others.keys() and all(torch.equal(masks[name], others[name]) for name in masks)


def assert_zero_off_the_masks(model, masking):
    parameters = dict(model.named_parameters())
    seen = 0
    for name, mask in masking.masks.items():
        assert not parameters[name][~mask].any()
        for state in masking.optimizer.state[parameters[name]].values():
            if torch.is_tensor(state) and state.shape == mask.shape:
                assert not state[~mask].any()
                seen += 1
    return seen


OPTIMIZERS = {
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=5e-4),
    "SGD Nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=1e-2),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.1),
}


def scheduled(method, steps, frequency, window, init, final):
    """Density after ``steps`` steps, by the description: what the last update left."""
    last = steps // frequency * frequency
    if method == "DST" or last < max(window[0], 1):
        return init
    return gradual_density(last, *window, init, final)


def grad_scaler():
    return torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)


GROW_4 = [0.0, 0, 0, 0, 9, 1, 1, 1]
OVERFLOW = [0.0, 0, 0, 0, 1, 1, 1, math.inf]


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
