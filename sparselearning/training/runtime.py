"""Where and in which number formats a run computes."""

import ctypes
import os
import sys
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sparselearning import execution
from sparselearning.process import distributed
from sparselearning.process.errors import UsageError
from sparselearning.training import provenance
from sparselearning.training.passes import Precision

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Name to number format of forward passes."""


@dataclass(frozen=True)
class Runtime:
    """Where and in which number formats a run computes.

    Attributes:
        use_cuda: use a GPU if there is one.
        amp: number format of forward passes, a name in :data:`AMP`; ``auto``: bf16 on a GPU that has it, else off.
        channels_last: memory format of images and convolutions, where :meth:`memory_format` can grant it.
        compile: compile the network's forward and backward pass.
        tf32: let float32 products on a GPU round their inputs to TensorFloat-32.
        deterministic: only algorithms whose result repeats bit by bit on a GPU.
        static_loss_scale: fixed loss scale of fp16; None: adapted to the gradients.
        execution: whether a masked network multiplies by zeros (``masked``), computes with active weights alone on a
            CPU (``sparse``), or does what is faster (``auto``).
    """

    use_cuda: bool = True
    amp: str = "auto"
    channels_last: bool = True
    compile: bool = False
    tf32: bool = True
    deterministic: bool = False
    static_loss_scale: float | None = None
    execution: str = "auto"

    def start(self) -> tuple[torch.device, "Runtime"]:
        """Join the other ranks, if any, choose the device and set it up.

        Returns:
            The device, and this runtime :meth:`resolved` for it.

        Raises:
            UsageError: if the device cannot do what is asked.
        """
        if self.deterministic:  # first: the process group's NCCL reads it once
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        device = distributed.start(self.use_cuda and torch.cuda.is_available())
        if device.type == "cpu":
            _keep_freed_memory()
        if self.amp == "fp16" and device.type != "cuda":
            raise UsageError("float16 training needs a GPU, and none is in use here: try --amp bf16")
        if self.execution == "sparse" and device.type != "cpu":
            raise UsageError("--execution sparse is for CPUs: add --no-cuda, or leave it out")
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = self.tf32
        torch.backends.cudnn.benchmark = not self.deterministic
        return device, self.resolved(device)

    def resolved(self, device: torch.device) -> "Runtime":
        """The same with ``auto`` replaced by what suits the device."""
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        amp = self.amp if self.amp != "auto" else "bf16" if has_bf16 else "off"
        can_be_sparse = device.type == "cpu" and amp == "off" and not self.compile and execution.is_available()
        masked = self.execution == "auto" and not can_be_sparse
        return replace(self, amp=amp, execution="masked" if masked else self.execution)

    def description(self, device: torch.device) -> str:
        """One line about where and how a run computes; ``self`` is :meth:`resolved`."""
        numbers = {"off": "float32", "bf16": "bfloat16", "fp16": "float16"}[self.amp]
        threads = torch.get_num_threads()
        return f"computing on {provenance.device_name(device)}: {numbers}, {threads} thread{'s'[: threads != 1]}"

    def memory_format(self, model: nn.Module) -> torch.memory_format:
        """Memory format that the convolutions of a network are to have, and its images with them.

        It depends on the network alone, not on the processor, so that a run can be resumed on another.
        """
        if self.channels_last and not any(_breaks_in_channels_last(layer) for layer in model.modules()):
            return torch.channels_last
        return torch.contiguous_format

    def precision(self) -> Precision:
        """Number formats of the forward pass."""
        scaler = None
        if self.amp == "fp16":
            scaler = StaticScaler(self.static_loss_scale) if self.static_loss_scale else torch.amp.GradScaler()
        return Precision(AMP[self.amp], scaler)


def _breaks_in_channels_last(layer: nn.Module) -> bool:
    """Whether training a layer in channels-last memory can write outside its buffers.

    On x86 processors oneDNN's weight gradient of such a 1x1 convolution does: it packs the pixels that the stride keeps
    as many channels apart as a register holds, 8 with AVX2 and 16 with AVX-512, into space for no more than there are
    (https://github.com/uxlfoundation/oneDNN/issues/6035). PyTorch 2.11 to 2.15 have it; this rule can go with the last
    of those that pyproject.toml accepts.
    """
    return (
        isinstance(layer, nn.Conv2d)
        and layer.kernel_size == (1, 1)
        and layer.stride != (1, 1)
        and layer.in_channels < 16
    )


def _keep_freed_memory() -> None:
    """Have the C library keep memory that is freed, where it is glibc.

    By default it gives large blocks back to the system, which then clears every page again when the next activation
    asks for one: a fifth of a training step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold, largest = -1, -3, 2**31 - 1
        mallopt(trim_threshold, largest)
        mallopt(mmap_threshold, largest)


class StaticScaler(torch.amp.GradScaler):
    """Loss scaling with one fixed scale; steps whose gradients overflow are still skipped."""

    def __init__(self, scale: float) -> None:
        super().__init__(init_scale=scale)
        self._fixed = scale

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Stay at the fixed scale."""
        super().update(self._fixed)
