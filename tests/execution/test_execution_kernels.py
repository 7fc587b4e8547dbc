"""Kernels over active weights, held against numbers worked out by hand and against PyTorch's dense functions."""

import runpy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("numba")

from sparselearning.execution import active_weights, threads, vectors
from sparselearning.execution.active_weights import ActiveWeights, Shape
from sparselearning.execution.functions import BatchNorm, Gate, Relu, SparseConvolution
from sparselearning.execution.kernels import contraction, correlate
from sparselearning.execution.layout import empty_activations, image_last
from sparselearning.execution.lists import Grid, choose_tile
from sparselearning.execution.vectors import BLOCK, HERE, LANES


def convolve(inputs: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0) -> Tensor:
    shape = Shape(*weight.shape[:2], tuple(weight.shape[2:]), (stride, stride), (padding, padding))
    active = ActiveWeights(shape, weight.detach() != 0, weight.stride())
    return SparseConvolution.apply(inputs, weight, bias, active, False, None)[0]


def convolve_block(inputs: Tensor, weight: Tensor, bias: Tensor | None = None, **shape: int) -> tuple[Tensor, Tensor]:
    """As a residual block begins: a ReLU, read by the block's first convolution and by the sum at its end."""
    gate = Gate()
    positive = Relu.apply(inputs, gate)
    sizes = (shape["stride"],) * 2, (shape["padding"],) * 2
    active = ActiveWeights(Shape(*weight.shape[:2], tuple(weight.shape[2:]), *sizes), weight != 0, weight.stride())
    return SparseConvolution.apply(positive, weight, bias, active, False, gate)


def dense_block(inputs: Tensor, weight: Tensor, bias: Tensor | None = None, **shape: int) -> tuple[Tensor, Tensor]:
    positive = F.relu(inputs)
    return F.conv2d(positive, weight, bias, **shape), positive


def test_one_active_weight_shifts_and_scales_by_hand() -> None:
    inputs = torch.arange(9.0).view(1, 1, 3, 3)
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, 0, 2] = 2.0  # the upper right neighbour, twice
    expected = torch.tensor([[0.0, 0, 0], [2, 4, 0], [8, 10, 0]])
    assert torch.equal(convolve(inputs, weight, padding=1)[0, 0], expected)


def test_gradients_of_one_active_weight_by_hand() -> None:
    inputs = torch.tensor([[[[1.0, 2], [3, 4]]]], requires_grad=True)
    weight = torch.zeros(1, 1, 2, 2)
    weight[0, 0, 1, 0] = 3.0  # the pixel below
    weight.requires_grad_()
    outputs = convolve(inputs, weight)
    assert outputs.item() == 9
    outputs.backward(torch.full((1, 1, 1, 1), 5.0))
    assert torch.equal(inputs.grad, torch.tensor([[[[0.0, 0], [15, 0]]]]))
    assert torch.equal(weight.grad, torch.tensor([[[[0.0, 0], [15, 0]]]]))


def test_stride_two_reads_every_second_pixel_by_hand() -> None:
    inputs = torch.arange(16.0).view(1, 1, 4, 4)
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, 1, 1] = 1.0
    assert torch.equal(convolve(inputs, weight, stride=2, padding=1)[0, 0], torch.tensor([[0.0, 2], [8, 10]]))


def test_a_linear_layer_is_a_convolution_of_one_pixel_by_hand() -> None:
    weight = torch.tensor([[1.0, 0, 2], [0, 0, 0]]).view(2, 3, 1, 1)
    inputs = torch.tensor([[1.0, 2, 3], [4, 5, 6]]).view(2, 3, 1, 1)
    outputs = convolve(inputs, weight, bias=torch.tensor([0.5, -1]))
    assert torch.equal(outputs.flatten(1), torch.tensor([[7.5, -1], [16.5, -1]]))


SHAPES = st.fixed_dictionaries(
    {
        "images": st.sampled_from([1, 16, 65]),
        "channels": st.sampled_from([1, 3, 20, 70]),
        "outputs": st.sampled_from([1, 5, 18]),
        "size": st.sampled_from([1, 6]),
        "kernel": st.sampled_from([1, 2, 3, 5]),
        "stride": st.sampled_from([1, 2, 3]),
        "padding": st.integers(0, 2),
        "density": st.sampled_from([0.0, 0.03, 0.3, 1.0]),
        "bias": st.booleans(),
        "threads": st.sampled_from([1, 2]),
        "channels_last": st.booleans(),
        "past_caches": st.booleans(),
        "block": st.booleans(),
    }
)


# Registers read what follows a channel in the scratch buffer, where nothing but zeros may stand.
AFTER_A_CHANNEL = dict(
    images=1, channels=3, outputs=5, size=12, kernel=5, stride=1, padding=2, density=1.0, bias=False, threads=1,
    channels_last=False, past_caches=False, block=False,
)  # fmt: skip


@settings(max_examples=30, deadline=None)
@example(AFTER_A_CHANNEL, 0)
@given(SHAPES, st.integers(0, 2**31))
def test_equals_pytorchs_convolution(case: dict, seed: int) -> None:
    size, kernel, stride, padding = (case[name] for name in ("size", "kernel", "stride", "padding"))
    if size + 2 * padding < kernel:
        return
    torch.manual_seed(seed)
    threads._work(1 << 22)
    threads._scratch.fill_(torch.nan)  # what other layers left there is nobody's business
    before = torch.get_num_threads()
    torch.set_num_threads(case["threads"])
    large = vectors.LEAST_STREAMED
    vectors.LEAST_STREAMED = 1 if case["past_caches"] else large
    try:
        inputs = torch.randn(case["images"], case["channels"], size, size)
        weight = torch.randn(case["outputs"], case["channels"], kernel, kernel)
        weight *= torch.rand_like(weight) < case["density"]
        if case["channels_last"]:
            weight = weight.contiguous(memory_format=torch.channels_last)
        bias = torch.randn(case["outputs"]) if case["bias"] else None
        active = weight != 0
        results = []
        for function in (convolve_block, dense_block) if case["block"] else (convolve, F.conv2d):
            leaves = [t.clone().requires_grad_() for t in (inputs, weight, bias) if t is not None]
            outputs = function(*leaves, stride=stride, padding=padding)
            outputs = [outputs] if isinstance(outputs, Tensor) else [*outputs]
            torch.manual_seed(seed)
            torch.autograd.backward(outputs, [torch.randn(each.shape) for each in outputs])
            results.append([outputs[0].detach(), *(leaf.grad for leaf in leaves)])
    finally:
        torch.set_num_threads(before)
        vectors.LEAST_STREAMED = large
    mine, dense = results
    assert not mine[2][~active].any()
    dense[2] = dense[2] * active
    for got, expected in zip(mine, dense, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("channels", [3, 300])  # one block of channels, and several
@pytest.mark.parametrize("images", [3, 64])  # registers that reach outside of tiles, and that do not
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("relu", [False, True])
def test_another_tensor_is_added_and_relu_follows_in_the_same_pass(
    channels: int, images: int, kernel: int, relu: bool
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(10, channels, kernel, kernel) * (torch.rand(10, channels, kernel, kernel) < 0.3)
    inputs, added, bias = torch.randn(images, channels, 5, 5), torch.randn(images, 10, 5, 5), torch.randn(10)
    padding = kernel // 2
    shape = Shape(10, channels, (kernel, kernel), (1, 1), (padding, padding))
    outputs = empty_activations(images, 10, 5, 5)
    kernel_of_layer = ActiveWeights(shape, weight != 0, weight.stride()).forward(Grid(5, 5, images))
    kernel_of_layer.correlate(image_last(inputs), outputs, 0, weight, bias, image_last(added), relu)
    expected = F.conv2d(inputs, weight, bias, padding=padding) + added
    torch.testing.assert_close(outputs, expected.relu() if relu else expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 300), st.integers(0, 4), st.integers(0, 4), st.booleans())
def test_tiles_fit_the_registers_and_hold_what_they_cover(
    rows: int, columns: int, images: int, down: int, right: int, is_contiguous: bool
) -> None:
    tile = choose_tile(Grid(rows, columns, images), (down, right), is_contiguous)
    assert tile.vectors <= BLOCK
    assert 1 <= tile.rows <= rows
    assert 1 <= tile.columns <= columns
    assert 1 <= tile.images <= images
    last = (tile.rows - 1) * tile.place[0] + (tile.columns - 1) * tile.place[1] + tile.images
    assert last <= tile.vectors * LANES


def test_results_do_not_depend_on_who_does_which_share(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 30, 3, 3) * (torch.rand(40, 30, 3, 3) < 0.2)
    inputs = torch.randn(16, 30, 8, 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)

    def results() -> list[Tensor]:
        leaves = [inputs.clone().requires_grad_(), weight.clone().requires_grad_()]
        outputs = convolve(*leaves, padding=1)
        outputs.square().sum().backward()
        return [outputs.detach(), *(leaf.grad for leaf in leaves)]

    by_openmp = results()
    monkeypatch.setattr(threads, "_starter", lambda: threads._threads)
    for _ in range(3):
        for a, b in zip(by_openmp, results(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("past_caches", [True, False])
def test_batch_norm_equals_pytorchs(
    training: bool, affine: bool, past_caches: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    images = 5
    if past_caches:  # whole registers alone, and more than are written at a time
        images = 128
        monkeypatch.setattr(vectors, "LEAST_STREAMED", 1)
    inputs = 3 * torch.randn(images, 7, 4, 6) + 20
    parameters = [torch.randn(7), torch.randn(7)] if affine else [None, None]
    mean, variance = torch.randn(7), torch.rand(7) + 0.5
    gradient = torch.randn(images, 7, 4, 6)
    results = []
    for is_mine in (True, False):
        x = inputs.clone().requires_grad_()
        leaves = [None if p is None else p.clone().requires_grad_() for p in parameters]
        if is_mine:
            norms: list = []
            known = (None, None) if training else (mean, variance)
            outputs = BatchNorm.apply(x, *leaves, *known, 1e-5, lambda *norm, found=norms: found.extend(norm))
            norms[0].write(outputs, relu=False)
        else:
            outputs = F.batch_norm(x, mean.clone(), variance.clone(), *leaves, training=training)
        outputs.backward(gradient)
        results.append([outputs.detach(), x.grad, *(leaf.grad for leaf in leaves if leaf is not None)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_kernels_of_other_widths_are_cached_under_other_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    other = runpy.run_path(vectors.__file__)
    assert other["LANES"] == 4
    assert (other["HERE"] == HERE) == (other["LANES"] == LANES)


def test_activations_lie_image_innermost() -> None:
    activations = empty_activations(5, 3, 2, 4)
    assert activations.shape == (5, 3, 2, 4)
    assert activations.stride() == (1, 40, 20, 5)
    assert image_last(activations).data_ptr() == activations.data_ptr()


def test_lists_of_the_last_few_sizes_of_batches_are_kept() -> None:
    weight = torch.ones(2, 3, 1, 1)
    active = ActiveWeights(Shape(2, 3, (1, 1)), weight != 0, weight.stride())
    first, second, *_ = [active.forward(Grid(4, 4, images)) for images in range(1, active_weights.MOST_SIZES + 1)]
    assert active.forward(Grid(4, 4, 1)) is first  # the last one used
    active.forward(Grid(4, 4, 99))
    assert active.forward(Grid(4, 4, 1)) is first
    assert active.forward(Grid(4, 4, 2)) is not second


def test_kernels_share_no_index_on_disk() -> None:
    """Numba does not lock the index of its cache: processes that write one at a time would load other kernels."""
    kernels = correlate(1, 1, 1), correlate(1, 1, 2), contraction(1, 1, 1), contraction(1, 1, 2)
    assert len({kernel._cache._cache_file._index_path for kernel in kernels}) == len(kernels)
