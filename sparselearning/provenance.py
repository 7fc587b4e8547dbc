"""What a result depends on besides its flags: code, versions and hardware."""

import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparselearning import distributed


def environment(device: torch.device) -> dict[str, Any]:
    """Everything in this module, as a run's ``config.json`` and a benchmark's file hold it."""
    return {
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": version("torchvision"),
            "numpy": np.__version__,
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu: {cpu_name()}",
        "threads": torch.get_num_threads(),
        "world_size": distributed.world_size(),
    }


def commit() -> str | None:
    """Short hash of the checkout that this code belongs to, ``-dirty`` if tracked files changed since; else None."""
    try:
        _git("ls-files", "--error-unmatch", __file__)  # fails for an installed copy that merely lies in some checkout
        return _git("describe", "--always", "--dirty", "--exclude=*")
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
