"""Follow the steps of an optimizer, also those of a loop that knows nothing of the follower."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

FOLLOWED: weakref.WeakKeyDictionary[torch.optim.Optimizer, weakref.finalize] = weakref.WeakKeyDictionary()
"""Optimizer to the function that removes the hooks of its follower."""


def follow(
    optimizer: torch.optim.Optimizer,
    follower: object,
    after_step: Callable[[], None],
    after_loading: Callable[[], None],
) -> None:
    """Call one method after every step of an optimizer, and another after state was loaded into it.

    This ends when the follower is collected, which the optimizer does not keep alive, or another one takes its place.

    Args:
        optimizer: any of ``torch.optim``.
        follower: when it is collected, the hooks are removed.
        after_step: bound method of the follower, or of what it holds.
        after_loading: likewise.
    """
    if remove_earlier := FOLLOWED.pop(optimizer, None):
        remove_earlier()
    hooks = (
        optimizer.register_step_post_hook(_weak(after_step)),
        optimizer.register_load_state_dict_post_hook(_weak(after_loading)),
    )
    FOLLOWED[optimizer] = weakref.finalize(follower, _remove, hooks)


def _weak(method: Callable[[], None]) -> Callable[..., None]:
    """A hook that calls a bound method as long as its object is there."""
    held = weakref.WeakMethod(method)

    def call(*_: Any) -> None:
        if (still := held()) is not None:
            still()

    return call


def _remove(hooks: Iterable[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()
