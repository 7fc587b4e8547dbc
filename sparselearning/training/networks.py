"""Networks as files: those that a run writes, and weights of any other program to start from."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparselearning.process.errors import UsageError
from sparselearning.process.files import load_torch, save_torch
from sparselearning.process.schema import Count, Mismatch
from sparselearning.process.tensor_schema import Check, all_of, check, inside, like, mapping, record, tensor
from sparselearning.sparse.superpose import State, differing_entries


@dataclass(frozen=True)
class SavedNetwork:
    """What ``model_current.pth``, ``model_previous.pth``, ``model_ema.pth`` and ``tickets/ticket_N.pth`` hold.

    Attributes:
        state_dict: the network's weights and statistics.
        masks: of its masked weights, which are zero where their mask is false; empty for a dense network.
        epoch: epochs that were trained.
    """

    state_dict: State
    masks: Mapping[str, Tensor]
    epoch: int

    def write(self, path: Path, made_by: str | None = None) -> None:
        """Write the file atomically; ``made_by`` is its mark for ``files.check_output``."""
        save_torch(path, ({"made_by": made_by} if made_by else {}) | vars(self))

    @classmethod
    def read(cls, path: Path) -> "SavedNetwork":
        """Read the file onto the CPU.

        Raises:
            UsageError: if there is none.
            FaultError: if it is damaged.
        """
        content = load_torch(path)
        check(content, NETWORK, path)
        return cls(content["state_dict"], content["masks"], content["epoch"])


def masked_zeros(weights: str, masks: str) -> Check:
    """Of a record: the entry ``weights`` is zero where the entry ``masks``, which has some of its names, is false."""

    def check_zeros(saved: Mapping[str, Any], where: str) -> None:
        state = saved[weights] or {}
        for name, mask in saved[masks].items():
            entry = inside(inside(where, masks), name)
            if name not in state:
                raise Mismatch(f"{entry} does not belong there: {weights} has no such entry")
            tensor(state[name].shape, torch.bool)(mask, entry)
            if state[name].masked_fill(mask, 0).any():
                raise Mismatch(f"{entry} leaves out weights that are not zero")

    return check_zeros


NETWORK = all_of(
    record({"state_dict": mapping(tensor()), "masks": mapping(tensor(dtype=torch.bool)), "epoch": Count}),
    masked_zeros("state_dict", "masks"),
)


def state_schema(state: Mapping[str, Tensor], *, convertible: bool = False) -> Check:
    """What a state dict has to hold to be loaded in place of this one; ``convertible`` as in ``tensor``."""
    return record(
        {name: like(entry, low=_least(name), convertible=convertible) for name, entry in state.items()}, exact=True
    )


def _least(name: str) -> float:
    """Least value of an entry of a state dict: BatchNorm has a variance and a counter."""
    return 0 if name.endswith(("running_var", "num_batches_tracked")) else -float("inf")


def saved_state(content: Mapping[str, Any], source: Path) -> State:
    """State dict in what ``load_torch`` read, by the names of the user's own model.

    Args:
        content: of a run's file, of another program's with a ``state_dict`` in it, or a bare state dict; of a plain, a
            data-parallel or a compiled model.
        source: for messages.

    Raises:
        UsageError: if there is none.
        FaultError: if it holds anything but plain tensors of finite numbers.
    """
    state = content.get("state_dict", content)
    if not isinstance(state, Mapping) or not state:
        raise UsageError(f"{source} is no saved network: its state_dict is empty or not a dictionary")
    has_none = "" if "state_dict" in content else "it has no state_dict, and "
    for name, entry in state.items():
        if not (isinstance(name, str) and isinstance(entry, Tensor)):
            raise UsageError(f"{source} is no saved network: {has_none}its entry {inside('', name)} is no tensor")
    check({"state_dict": state}, record({"state_dict": mapping(tensor())}), source)
    return {name.replace("_orig_mod.", "").removeprefix("module."): entry for name, entry in state.items()}


def load_weights(model: nn.Module, saved: Mapping[str, Any], source: Path) -> None:
    """Load the weights of any saved ``.pth``: a run's file, or a bare state dict, data-parallel or not.

    BatchNorm's counters, which files of PyTorch before 0.4.1 lack, stay as they are.

    Raises:
        UsageError: if they belong to another model, or are no weights.
        FaultError: if they are damaged.
    """
    own = model.state_dict()
    counters = {name: entry for name, entry in own.items() if name.endswith("num_batches_tracked")}
    state = counters | saved_state(saved, source)
    if differing := differing_entries(own, state):
        raise UsageError(f"{source} holds weights of another model: {differing[0]} does not fit")
    check(state, state_schema(own, convertible=True), source)
    model.load_state_dict(state)
