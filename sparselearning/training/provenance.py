"""What a result depends on besides its flags: code, versions and hardware."""

import platform
import re
import subprocess
from dataclasses import fields
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparselearning.process import distributed
from sparselearning.training.records import Environment

ENVIRONMENT = tuple(entry.name for entry in fields(Environment))
"""Names of the entries that :func:`environment` returns."""


def environment(device: torch.device) -> dict[str, Any]:
    """Commit, versions, device, threads and processes, as in ``config.json`` and the benchmarks' files."""
    return {
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": version("torchvision"),
            "numpy": np.__version__,
        },
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "world_size": distributed.world_size(),
    }


def device_name(device: torch.device) -> str:
    """Name of the device, for people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu: {cpu_name()}"


@cache
def commit() -> str | None:
    """Short hash of the checkout that this code belongs to, ``-dirty`` if its code changed since; else None.

    Changes to documents and to kept results do not count, nor do any once this process has asked: its code is loaded.
    """
    try:
        _git("ls-files", "--error-unmatch", __file__)  # fails for an installed copy that merely lies in some checkout
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/*.py")
        return _git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*command: str) -> str:
    folder = Path(__file__).parent
    return subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def cpu_name() -> str:
    """Model name of the processor, with what it has for bfloat16: that decides whether bf16 pays on it."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    entries = dict(re.findall(r"^(\S[^\t:]*)\s*: (.+)$", text, re.MULTILINE))
    name = entries.get("model name") or platform.processor() or platform.machine()
    units = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in entries.get("flags", "").split()]
    return f"{name} ({', '.join(units) or 'no bf16 units'})"
