"""An optimizer's step, what it keeps for every weight, and the momentum that dense training would keep."""

import copy
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

from sparselearning.process.errors import UsageError
from sparselearning.process.schema import FlagValue, Mismatch
from sparselearning.process.tensor_schema import (
    Check,
    Kind,
    all_of,
    empty_or,
    exactly,
    inside,
    like,
    mapping,
    optional,
    record,
    sequence,
    tensor,
)

NON_NEGATIVE = {"step", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "sum", "square_avg", "acc_delta"}
"""State that counts, or adds up squares or magnitudes."""

KEEPS_ZEROS = {
    torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop,
    torch.optim.Adagrad, torch.optim.Adadelta,
}  # fmt: skip
"""Optimizers, not their subclasses, whose step leaves a weight at zero if its gradient and state are."""


def keeps_zeros(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step leaves a weight at zero if its gradient and state are zero now; a hook may change its gradient."""
    return type(optimizer) in KEEPS_ZEROS and not (optimizer._optimizer_step_pre_hooks or _global_optimizer_pre_hooks)


def per_weight_state(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> Iterator[tuple[str, Tensor]]:
    """State tensors of the weight's shape, by name."""
    for key, value in optimizer.state.get(weight, {}).items():
        if isinstance(value, Tensor) and value.shape == weight.shape:
            yield key, value


def has_momentum(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer keeps momentum, as :class:`DenseMomentum` knows it, for any of its parameters."""
    return any(_decay(group) for group in optimizer.param_groups)


def take_step(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> None:
    """Step the optimizer, by way of the loss scaler if there is one."""
    if scaler is None:
        optimizer.step()
    else:
        _begin_fused_momentum(optimizer)
        scaler.step(optimizer)
        scaler.update()


def _begin_fused_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Let the momentum of fused SGD start at zero.

    PyTorch (2.14) allocates it and leaves the first values to a kernel that writes nothing when gradients overflow.
    """
    for group in optimizer.param_groups:
        if not (group.get("fused") and group.get("momentum")):
            continue
        for weight in group["params"]:
            if weight.grad is not None and optimizer.state[weight].get("momentum_buffer") is None:
                optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's ``state_dict``, with None for every parameter that it keeps nothing for yet."""
    saved = optimizer.state_dict()
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    return saved | {"state": {number: saved["state"].get(number) for number in numbers}}


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Load what :func:`optimizer_state` returned; the optimizer keeps its own settings."""
    state = {number: kept for number, kept in saved["state"].items() if kept}
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    for parameter, kept in optimizer.state.items():
        for key, value in kept.items():
            # Fused steps read memory in order: state needs the memory layout of its parameter.
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                kept[key] = torch.empty_like(parameter).copy_(value)


OPTIMIZER = record({"state": record({}), "param_groups": list[dict[str, Any]]})
"""What :func:`optimizer_state` makes of any optimizer."""


def optimizer_schema(optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]) -> Check:
    """What :func:`optimizer_state` makes of an optimizer of this kind over these very parameters.

    Args:
        optimizer: its present state does not matter.
        names: of its parameters, for messages.
    """
    states, labels, groups = {}, {}, []
    for group, saved in zip(optimizer.param_groups, optimizer.state_dict()["param_groups"], strict=True):
        kept = _kept_for_a_weight(optimizer, group)
        groups.append(record({"params": all_of(list[int], exactly(saved["params"]))}))
        for number, parameter in zip(saved["params"], group["params"], strict=True):
            states[number] = _state_schema(kept, parameter)
            labels[number] = names[parameter]
    return record(
        {"state": record(states, exact=True, label=labels.__getitem__), "param_groups": sequence(list, *groups)}
    )


def _kept_for_a_weight(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    """What an optimizer keeps for a weight of shape [2, 3], found by letting a copy of it take one step."""
    weight = nn.Parameter(torch.zeros(2, 3))
    weight.grad = torch.zeros(2, 3)
    trial = copy.copy(optimizer)
    trial.state = defaultdict(dict)
    trial.param_groups = [{**group, "params": [weight], "fused": False, "foreach": False}]
    trial.step()
    return trial.state[weight]


def _state_schema(kept: Mapping[str, Any], parameter: nn.Parameter) -> Check:
    """None, or all that is kept for a parameter: tensors of its shape, scalars such as the step, and settings."""

    def entry(name: str, example: Any) -> Kind:
        if not isinstance(example, Tensor):
            return FlagValue
        low = 0 if name in NON_NEGATIVE else -math.inf
        shapes: dict[torch.Size, Any] = {torch.Size([2, 3]): parameter.shape, torch.Size([]): ()}
        dtype = parameter.dtype if example.dim() else example.dtype
        return tensor(shapes.get(example.shape), dtype, low=low)

    whole = record({name: entry(name, example) for name, example in kept.items()}, exact=True)
    return optional(whole)


class DenseMomentum:
    """The momentum that dense training would hold.

    For SGD it is the momentum buffer; for Adam m / (√v + 1e-8), without bias correction; for Adamax, which has no v, m.

    The optimizer's own buffers are zero wherever a weight is inactive, which would leave growth by momentum nothing to
    rank. So the rest is kept here: :meth:`keep` moves in what masking is about to zero, :meth:`age` lets it shrink as
    the optimizer lets its buffers shrink. A weight that grows starts without momentum. If neither is called,
    momentum is the buffer alone, which is complete for active weights.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._off_mask: dict[str, dict[str, Tensor]] = {}  # parameter name, state name

    def age(self, parameters: Mapping[str, nn.Parameter], skipped: Tensor | None = None) -> None:
        """Let the momentum of inactive weights shrink; call it after an optimizer step, before :meth:`keep`.

        Args:
            parameters: by name.
            skipped: one number on their device, above 0 if the loss scaler skipped the step; None: it did not.
        """
        decays = self._decays()
        shrinking: dict[float, list[Tensor]] = {}
        for name, weight in parameters.items():
            kept = self._off_mask.setdefault(name, {})
            for key, state in per_weight_state(self.optimizer, weight):
                if key in decays[weight]:
                    if key not in kept:
                        kept[key] = torch.zeros_like(state)
                    shrinking.setdefault(decays[weight][key], []).append(kept[key])
        for decay, states in shrinking.items():
            torch._foreach_mul_(states, decay if skipped is None else torch.where(skipped > 0, 1.0, decay))

    def keep(self, name: str, weight: nn.Parameter, mask: Tensor) -> None:
        """Take over the optimizer's momentum where ``mask`` is false, and forget what was kept of active weights."""
        for key, kept in self._off_mask.get(name, {}).items():
            kept.add_(self.optimizer.state[weight][key]).masked_fill_(mask, 0)

    def of(self, name: str, weight: nn.Parameter) -> Tensor:
        """Momentum of every weight, in its shape; zero if the weight is not trained.

        Raises:
            UsageError: if the optimizer has not taken a step yet.
        """
        if not self.optimizer.state:
            raise UsageError("the chosen modes read momentum, and there is none before the first optimizer step")
        state = dict(per_weight_state(self.optimizer, weight))
        for key, kept in self._off_mask.get(name, {}).items():
            state[key] = state[key] + kept
        if "momentum_buffer" in state:
            return state["momentum_buffer"]
        if "exp_avg_sq" in state:
            return state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8)
        return state.get("exp_avg", torch.zeros_like(weight))

    def state_dict(self) -> dict[str, Any]:
        """A copy of what is kept beside the optimizer's own state."""
        return {name: {key: state.clone() for key, state in kept.items()} for name, kept in self._off_mask.items()}

    @staticmethod
    def schema(parameters: Mapping[str, nn.Parameter]) -> Check:
        """What :meth:`state_dict` holds for these parameters: the same states for each, or nothing at all."""

        def states(weight: nn.Parameter) -> Check:
            def check_states(value: Any, where: str) -> None:
                mapping(like(weight))(value, where)
                record(dict.fromkeys(NON_NEGATIVE & value.keys(), tensor(low=0)))(value, where)

            return check_states

        def check_alike(value: Mapping[str, Any], where: str) -> None:
            kinds = {name: sorted(kept) for name, kept in value.items() if kept}
            for name, kind in kinds.items():
                if others := [other for other in kinds.values() if other != kind]:
                    raise Mismatch(f"{inside(where, name)} holds {', '.join(kind)}, and others {', '.join(others[0])}")

        return empty_or(
            all_of(record({name: states(weight) for name, weight in parameters.items()}, exact=True), check_alike)
        )

    def load_state_dict(self, saved: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> None:
        """Load a :meth:`state_dict`; momentum of another kind of optimizer is dropped."""
        decays = self._decays()
        self._off_mask = {
            name: {
                key: torch.empty_like(parameters[name]).copy_(kept)
                for key, kept in states.items()
                if key in decays[parameters[name]]
            }
            for name, states in saved.items()
        }

    def _decays(self) -> dict[Tensor, dict[str, float]]:
        """Per parameter, the momentum-like states that its optimizer keeps and what they shrink by at a step."""
        groups = self.optimizer.param_groups
        return {parameter: _decay(group) for group in groups for parameter in group["params"]}


def _decay(group: Mapping[str, Any]) -> dict[str, float]:
    if "betas" in group:  # Adam's two: which averages others are for differs from optimizer to optimizer
        names = ("exp_avg", "exp_avg_sq")
        return dict(zip(names, group["betas"], strict=True)) if len(group["betas"]) == len(names) else {}
    return {"momentum_buffer": group["momentum"]} if group.get("momentum") else {}
