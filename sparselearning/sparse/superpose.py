"""From tickets to one network: average, prune back to the budget, re-estimate BatchNorm (Sup-tickets, sec. 3.3).

Networks travel as state dicts, in memory, on whatever device they are.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparselearning.process import distributed
from sparselearning.process.schema import Density, Share, check_option
from sparselearning.sparse.distributions import active_count
from sparselearning.sparse.selection import select_largest

State = dict[str, Tensor]


def caa_factor(n: int) -> float:
    """Cumulative arithmetic average: ticket ``n`` = 1, 2, … enters with 1/(n+1), so that all members weigh the same."""
    return 1 / (n + 1)


GREEDY_FACTORS = (0.0, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95)
"""Factors that a greedy average tries, the smallest first; 0 leaves the ticket out (Lottery Pools, Yin et al. 2023)."""

Averaging = Callable[[int], Sequence[float]]
"""Ticket number 1, 2, … → factors that it may be averaged in with; the first one with the best result is taken."""

AVERAGING: dict[str, Callable[[float], Averaging]] = {
    "CIMA": lambda factor: lambda n: (factor,),
    "CAA": lambda factor: lambda n: (caa_factor(n),),
    "greedy": lambda factor: lambda n: GREEDY_FACTORS,
}
"""Name to a function from the user's constant factor to the average."""


def chooses(average: str) -> bool:
    """Whether a named average picks factors by accuracy, for which images have to be held out."""
    return len(AVERAGING[average](0.5)(1)) > 1


def differing_entries(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    """Names of the entries that one of two networks lacks or has in another shape."""
    shapes, others = ({name: entry.shape for name, entry in state.items()} for state in (a, b))
    return [name for name in shapes | others if shapes.get(name) != others.get(name)]


@torch.no_grad()
def superpose(previous: Mapping[str, Tensor], ticket: Mapping[str, Tensor], factor: float) -> State:
    """Average two networks: ``(1 - factor) · previous + factor · ticket``.

    Args:
        previous: state dict of the superposition so far.
        ticket: state dict of the new ticket, with the same names and shapes.
        factor: weight of the ticket, in [0, 1].

    Returns:
        A new state dict; neither input is changed. Floating-point entries are averaged, others (BatchNorm's batch
        counter) are the ticket's. Entries that are one tensor in the ticket (tied weights) are one here, provided
        that they are equal in the other network.

    Raises:
        ValueError: if names or shapes differ.
        UsageError: if the factor lies outside [0, 1].
    """
    check_option("the factor of a ticket", factor, Share)
    if differing := differing_entries(previous, ticket):
        raise ValueError(f"only networks of the same architecture superpose; these differ in {differing[:3]}")
    averaged: State = {}
    firsts: dict[tuple, str] = {}
    for name, entry in ticket.items():
        first = firsts.setdefault(_memory(entry), name)
        if first != name and torch.equal(previous[first], previous[name]):
            averaged[name] = averaged[first]
        else:
            floating = entry.is_floating_point()
            averaged[name] = (1 - factor) * previous[name] + factor * entry if floating else entry.clone()
    return averaged


@torch.no_grad()
def prune_to_density(
    state: Mapping[str, Tensor], names: Iterable[str], density: float
) -> tuple[State, dict[str, Tensor]]:
    """Keep exactly ``round(size · density)`` of the named weights, those of largest magnitude over all of them.

    Args:
        state: state dict of a network; not changed.
        names: entries that the budget covers.
        density: share of their weights to keep, in (0, 1].

    Returns:
        A new state dict whose other entries are shared with ``state``, and the boolean masks of the named entries.
        Entries that are one tensor (tied weights) count once, and are pruned together.

    Raises:
        ValueError: if ``state`` has no entry of some name.
        UsageError: if the density lies outside (0, 1].
    """
    check_option("density", density, Density)
    names = list(names)
    if missing := [name for name in names if name not in state]:
        raise ValueError(
            f"the state has no entry {missing[0]!r}: take the state dict of the model itself, not of its compiled or "
            "data-parallel wrapper"
        )
    weights = {_memory(state[name]): state[name] for name in names}
    flat = [(weight.flatten(),) for weight in weights.values()]
    chosen = select_largest(torch.abs, flat, active_count(sum(values.numel() for (values,) in flat), density))
    masks = {key: mask.view(weights[key].shape) for key, mask in zip(weights, chosen, strict=True)}
    pruned = {key: weights[key].masked_fill(~mask, 0) for key, mask in masks.items()}
    return (
        {name: pruned.get(_memory(entry), entry) for name, entry in state.items()},
        {name: masks[_memory(state[name])] for name in names},
    )


def floating_entries(model: nn.Module) -> State:
    """What averages are made of: the model's own weights and statistics, no counters; tied ones by their first name."""
    firsts: dict[tuple, tuple[str, Tensor]] = {}
    for name, entry in model.state_dict().items():
        if entry.is_floating_point():
            firsts.setdefault(_memory(entry), (name, entry))
    return dict(firsts.values())


class MovingAverage:
    """Exponential moving average of a network's weights, A ← decay · A + (1 - decay) · W, from the first step's on.

    Args:
        model: whose floating-point entries are averaged; its others are taken as they are.
        decay: in (0, 1).

    Attributes:
        entries: what is averaged, the model's own.
        average: of them so far, by name; empty before the first step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = model
        self.decay = decay
        self.entries = floating_entries(model)
        self.average: State = {}

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights that a step has left into the average."""
        if self.average:
            torch._foreach_lerp_(list(self.average.values()), list(self.entries.values()), 1 - self.decay)
        else:
            self.average = {name: entry.clone() for name, entry in self.entries.items()}

    def load(self, average: Mapping[str, Tensor]) -> None:
        """Load an earlier :attr:`average`, from any device."""
        entries = self.entries.items() if average else ()
        self.average = {name: torch.empty_like(entry).copy_(average[name]) for name, entry in entries}

    def state(self) -> State:
        """State dict of the averaged network."""
        averaged = {_memory(self.entries[name]): entry for name, entry in self.average.items()}
        return {name: averaged.get(_memory(entry), entry) for name, entry in self.model.state_dict().items()}


def _memory(tensor: Tensor) -> tuple:
    """A key that two tensors share if they are one in memory."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def batchnorms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The layers that :func:`update_bn` re-estimates: every BatchNorm that keeps running statistics."""
    norms = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    return [norm for norm in norms if norm.track_running_stats]


@torch.no_grad()
def update_bn(loader: Iterable, model: nn.Module, device: torch.device | str | None = None) -> None:
    """Re-estimate all BatchNorm statistics: the mean over the loader's batches, on all ranks together.

    Equals ``torch.optim.swa_utils.update_bn`` in one process. Each rank passes its own share of the batches through
    its model; every batch of every rank then counts the same.

    Args:
        loader: yields batches, or tuples that start with one.
        model: any module; left alone if it has no BatchNorm with running statistics. Its mode, its BatchNorms'
            momenta, and gradients are as before.
        device: where to move the batches; None: they are there already.

    Raises:
        ValueError: if there is no batch on any rank; the statistics are as before then.
    """
    model = distributed.without_data_parallel(model)  # ranks may have different numbers of batches
    norms = batchnorms(model)
    if not norms:
        return
    modes = {module: module.training for module in model.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    before = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    for norm in norms:
        norm.reset_running_stats()
    batches = 0
    counting = [norm.register_forward_pre_hook(_average_cumulatively()) for norm in norms]
    model.train()
    try:
        for batch in loader:
            images = batch[0] if isinstance(batch, list | tuple) else batch
            model(images if device is None else images.to(device, non_blocking=True))
            batches += 1
        if distributed.max_over_ranks(batches) == 0:
            for buffer, value in before:
                buffer.copy_(value)
            raise ValueError("there is no batch to estimate BatchNorm statistics on: is the loader exhausted?")
        for norm in norms:
            _pool_over_ranks(norm)
    finally:
        for hook in counting:
            hook.remove()
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode


def _average_cumulatively() -> Callable[[nn.modules.batchnorm._BatchNorm, Any], None]:
    """Hook that gives a BatchNorm's n-th forward pass the momentum 1/n.

    PyTorch does the same for a momentum of None, but reads its counter from the device, which waits for a GPU.
    """
    numbers = itertools.count(1)

    def hook(norm: nn.modules.batchnorm._BatchNorm, inputs: Any) -> None:
        norm.momentum = 1 / next(numbers)

    return hook


def _pool_over_ranks(norm: nn.modules.batchnorm._BatchNorm) -> None:
    """Weigh each rank's averages by its number of batches."""
    if distributed.world_size() == 1:
        return
    batches, mean, variance = norm.num_batches_tracked, norm.running_mean, norm.running_var
    assert batches is not None
    assert mean is not None
    assert variance is not None
    for statistic in (mean, variance):
        distributed.sum_over_ranks(statistic.mul_(batches))
    distributed.sum_over_ranks(batches)
    for statistic in (mean, variance):
        statistic.div_(batches)
