"""Independent random streams from one seed, and the state of the generators that all code shares."""

import hashlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from sparselearning.process.schema import Mismatch
from sparselearning.process.tensor_schema import Check, between, exactly, optional, record, sequence, tensor


def derive_seed(*parts: int | str) -> int:
    """Derive a seed in [0, 2⁶³) from a run's seed and what it is used for (a purpose, a step, an epoch).

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


def rng_schema(device: torch.device) -> Check:
    """What a state of :func:`rng_state` has to hold for generators on ``device`` to take it."""
    word, place = between(int, 0, 2**32 - 1), between(int, 0, 624)
    numpy_words = tensor((624,), torch.int64, low=0, high=2**32 - 1)
    numpy_place, has_normal = between(float, 0, 624), between(float, 0, 1)
    return record(
        {
            "python": sequence(tuple, exactly(3), sequence(tuple, *[word] * 624, place), float | None),
            "numpy": sequence(list, exactly("MT19937"), numpy_words, numpy_place, has_normal, float),
            "torch": _torch_generator(torch.device("cpu")),
            "cuda": optional(_torch_generator(device) if device.type == "cuda" else Any),
        }
    )


def _torch_generator(device: torch.device) -> Check:
    def check_state(value: Any, where: str) -> None:
        tensor(dtype=torch.uint8)(value, where)
        try:
            torch.Generator(device).set_state(value)
        except (RuntimeError, TypeError) as error:
            raise Mismatch(f"{where} is no state of PyTorch's random generator") from error

    return check_state


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
