"""Where a run computes: the memory format of networks and images, kept from a fault of oneDNN."""

import itertools
import os
import subprocess
import sys

import imagenet_resnet
import main_suptickets
import numpy as np
import pytest
import torch
from cifar_models import MODELS
from torch import nn

from sparselearning.process import distributed
from sparselearning.training.provenance import cpu_name
from sparselearning.training.runtime import Runtime

LAST, FIRST = torch.channels_last, torch.contiguous_format


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Conv2d(7, 8, 1, stride=2), FIRST),
        (nn.Conv2d(1, 24, 1, stride=(1, 2)), FIRST),
        (nn.Conv2d(15, 16, 1, stride=2), FIRST),
        (nn.Conv2d(16, 16, 1, stride=2), LAST),
        (nn.Conv2d(4, 8, 1), LAST),
        (nn.Conv2d(4, 8, 3, stride=2, padding=1), LAST),
        (nn.Conv1d(4, 8, 1, stride=2), LAST),
    ],
)
def test_only_networks_with_narrow_strided_1x1_convolutions_are_kept_from_channels_last(layer, expected):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(layer))
    assert Runtime().memory_format(model) == expected
    assert Runtime(channels_last=False).memory_format(model) == FIRST


NARROW = [f"cifar_resnet_8_{width}" for width in (1, 3, 4, 8, 15, 16)]


@pytest.mark.parametrize(
    ("name", "channels"),
    [*itertools.product(NARROW, [1, 3]), ("lenet5", 1), *((name, 3) for name in ("wrn-10-1", *MODELS))],
)
def test_no_network_for_small_images_computes_a_narrow_strided_1x1_convolution_in_channels_last(
    tmp_path, name, channels
):
    rng = np.random.default_rng(0)
    shape = (4, 16, 16, channels)
    images, labels = rng.integers(0, 256, shape, dtype=np.uint8), np.arange(4)
    np.savez(tmp_path / "set.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    args = main_suptickets.parse(["--data", str(tmp_path / "set.npz"), "--model", name, "--no-cuda"])
    data, model = main_suptickets.load(args, Runtime(), torch.device("cpu"))

    convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    strided = [layer for layer in convolutions if layer.kernel_size == (1, 1) and max(layer.stride) > 1]
    narrow = [layer for layer in strided if layer.in_channels < 16]
    seen = []
    for layer in narrow:
        layer.register_forward_hook(lambda layer, inputs, output: seen.extend([*inputs, output]))
    passes = [
        data.train.epoch(0),
        data.evaluation.epoch(0),
        data.test.epoch(0),
        [data.train.class_balanced_batch(4, 0)],
    ]
    with torch.no_grad():
        for batch in (next(iter(batches)) for batches in passes):
            # Channels are neighbours in memory if and only if the layout is channels-last.
            assert batch.images.stride(1) == (256 if narrow else 1)
            if narrow:
                model(batch.images)
    assert len(seen) == 2 * len(passes) * len(narrow)
    assert all(tensor.stride(1) == tensor.shape[2] * tensor.shape[3] > 1 for tensor in seen)


@pytest.mark.parametrize("arch", imagenet_resnet.RESNETS)
def test_imagenets_networks_are_channels_last(arch):
    with torch.device("meta"):
        assert Runtime().memory_format(imagenet_resnet.build_model(arch)) == LAST


AVX2_ALONE = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
STEP = """
import main_suptickets, torch
from sparselearning.training.runtime import Runtime
args = main_suptickets.parse("--data set.npz --model cifar_resnet_8_WIDTH --batch-size 32".split())
data, model = main_suptickets.load(args, Runtime(), torch.device("cpu"))
(batch,) = data.train.epoch(0)
torch.nn.functional.cross_entropy(model(batch.images), batch.labels).backward()
"""


@pytest.mark.parametrize(("width", "size", "processor"), [(4, 32, AVX2_ALONE), (8, 64, {})])
def test_a_narrow_network_trains(tmp_path, width, size, processor):
    images, labels = np.random.default_rng(0).integers(0, 256, (32, size, size, 3), dtype=np.uint8), np.arange(32) % 4
    np.savez(tmp_path / "set.npz", x_train=images, y_train=labels, x_test=images[:8], y_test=labels[:8])
    # glibc's debugging allocator aborts when a block comes back that was written past.
    checked = {"LD_PRELOAD": "libc_malloc_debug.so.0", "MALLOC_CHECK_": "3", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", STEP.replace("WIDTH", str(width))],
        cwd=tmp_path,
        env={**os.environ, **processor, **checked, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_a_run_says_where_it_computes_and_is_deterministic_before_it_joins_the_others(monkeypatch):
    # NCCL's choice of algorithms is made when the process group is.
    found = []

    def start(use_cuda):
        found.append(torch.are_deterministic_algorithms_enabled())
        return torch.device("cpu")

    monkeypatch.setattr(distributed, "start", start)
    device, runtime = Runtime(use_cuda=False, deterministic=True, channels_last=False).start()
    torch.use_deterministic_algorithms(False)
    assert found == [True]
    assert runtime.description(device) == f"computing on cpu: {cpu_name()}: float32, 1 thread"


@pytest.mark.parametrize(("has_units", "amp"), [(True, "bf16"), (False, "off")])
def test_bf16_is_not_chosen_where_it_is_emulated(gpu, monkeypatch, has_units, amp):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or has_units
    )
    assert Runtime().resolved(torch.device("cuda", 0)).amp == amp
