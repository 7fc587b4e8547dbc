"""Comparing what runs leave behind, to the bit."""

import json
from pathlib import Path

import torch

from sparselearning.process.files import load_torch
from sparselearning.training.run_folder import RunFolder


def lines(path):
    """The objects of a JSON-lines file; none where there is no such file."""
    path = Path(path)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def without_times(row):
    return {k: v for k, v in row.items() if k not in ("seconds", "images_per_second", "total_seconds")}


def plain(value):
    """Nested containers with tensors as (dtype, values), so that == compares to the bit (and NaN to nothing)."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.tolist()
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def differing(one, other):
    return [name for name in one if one[name] != other[name]]


def tree(folder):
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def results(folder):
    """All that a run computed: networks, masks, momentum, metrics; nothing that tells the time."""
    folder = RunFolder(folder)
    found = {
        "metrics": [*map(without_times, lines(folder.metrics))],
        "tickets": [*map(without_times, lines(folder.tickets))],
    }
    for path in (folder.current, folder.previous):
        saved = load_torch(path)
        for kind in ("state_dict", "masks"):
            found |= {f"{path.name} {kind} {name}": tensor for name, tensor in saved[kind].items()}
    for number, state in load_torch(folder.checkpoint)["optimizer"]["state"].items():
        found |= {f"optimizer {number} {name}": value for name, value in (state or {}).items()}
    return found


def assert_identical(found, expected, place=""):
    """Nested containers with tensors are equal to the bit."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key, value in expected.items():
            assert_identical(found[key], value, f"{place} {key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), place
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_identical(one, other, f"{place} {number}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), place
    else:
        assert found == expected, place
