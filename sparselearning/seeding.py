"""Independent random streams from one seed, and the state of the generators that all code shares."""

import hashlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """Mix a run's seed with what it is used for (a purpose, a step, an epoch) into a seed of its own, in [0, 2⁶³).

    Equal parts give equal seeds on every machine; streams of different parts are unrelated.
    """
    plain = tuple(part if isinstance(part, str) else int(part) for part in parts)  # of NumPy's integers, too
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def rng_state(device: torch.device) -> dict[str, Any]:
    """State of the random generators of Python, NumPy and PyTorch, as plain values and tensors."""
    name, keys, *numpy_rest = np.random.get_state(legacy=True)  # noqa: NPY002  the generator that models share
    return {
        "python": random.getstate(),
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), *map(float, numpy_rest)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Go back to a state of :func:`rng_state`."""
    random.setstate(state["python"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), int(position), int(has_gauss), cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def seed_everything(seed: int) -> None:
    """Seed the random generators of Python, NumPy and PyTorch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  the generator that models and transforms share
    torch.manual_seed(seed)
