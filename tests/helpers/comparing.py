"""Comparing what runs leave behind, to the bit."""

import json
from pathlib import Path

import torch


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else None


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
