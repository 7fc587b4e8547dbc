"""Sparse training with masks, cheap tickets, and their superposition (Sup-tickets, Yin et al. 2022)."""

from sparselearning.process import interrupts  # noqa: F401  first: from here on Ctrl-C ends without a traceback

# isort: split
from sparselearning.execution import sparse_execution, sparse_inference
from sparselearning.process.errors import FaultError, UsageError
from sparselearning.sparse.distributions import erk_densities
from sparselearning.sparse.masking import Masking
from sparselearning.sparse.schedules import cyclic_lr, gradual_density
from sparselearning.sparse.superpose import caa_factor, prune_to_density, superpose, update_bn

__all__ = [
    "FaultError",
    "Masking",
    "UsageError",
    "caa_factor",
    "cyclic_lr",
    "erk_densities",
    "gradual_density",
    "prune_to_density",
    "sparse_execution",
    "sparse_inference",
    "superpose",
    "update_bn",
]

__version__ = "0.2.0"
