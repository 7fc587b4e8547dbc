"""Memory of activations is used anew once nobody reads it, and kept no longer than it serves."""

import errno
import mmap
from collections.abc import Iterator

import pytest
import torch
from torch import nn

pytest.importorskip("numba")

from helpers.masked_networks import masked
from sparselearning import sparse_execution, sparse_inference
from sparselearning.execution import memory
from sparselearning.execution.layout import empty_activations


def free() -> list[torch.Tensor]:
    return [block for blocks in memory._free.values() for _, block in blocks]


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(memory, "LEAST", 8)
    memory._free.clear()
    yield
    memory._free.clear()


def test_memory_is_used_anew_once_no_tensor_is_left_of_it() -> None:
    first = empty_activations(2, 3, 4, 5)
    place, view = first.data_ptr(), first[1:]
    del first
    assert empty_activations(2, 3, 4, 5).data_ptr() != place  # the view still reads it
    assert not any(block.data_ptr() == place for block in free())
    del view
    assert empty_activations(2, 3, 4, 5).data_ptr() == place


def test_autograd_holds_memory_for_its_backward_pass() -> None:
    leaf = torch.ones(2, 3, 4, 5, requires_grad=True)
    saved = empty_activations(2, 3, 4, 5).fill_(3)
    product = leaf * saved
    del saved
    empty_activations(2, 3, 4, 5).fill_(7)
    product.sum().backward()
    assert torch.equal(leaf.grad, torch.full((2, 3, 4, 5), 3.0))


@pytest.mark.parametrize(("numbers", "fits"), [(10, True), (16, True), (20, True), (9, False), (21, False)])
def test_a_block_serves_what_is_not_less_than_half_of_it(numbers: int, fits: bool) -> None:
    place = memory.empty([20], [1]).data_ptr()
    again = memory.empty([numbers], [1])
    assert (again.data_ptr() == place) == fits
    assert again.shape == (numbers,)


def test_the_smallest_block_that_fits_is_taken() -> None:
    held = [memory.empty([numbers], [1]) for numbers in (20, 12, 16)]
    place = held[2].data_ptr()
    del held
    assert memory.empty([14], [1]).data_ptr() == place


def test_blocks_of_earlier_passes_make_room_for_other_sizes() -> None:
    memory.empty([20], [1])
    memory.empty([100], [1])
    assert [block.numel() for block in free()] == [20, 100]  # one pass may need both again
    memory.begin_pass()
    memory.empty([100], [1])  # given back in this pass
    memory.empty([50000], [1])
    assert [block.numel() for block in free()] == [100, 50000]


def test_no_more_blocks_are_dropped_than_make_room_and_those_first_that_wait_longest() -> None:
    used = [memory.empty([numbers], [1]) for numbers in (100, 60, 200)]
    while used:
        memory.begin_pass()
        del used[0]
    memory.begin_pass()
    held = [memory.empty([10], [1])]  # none is small enough
    assert [block.numel() for block in free()] == [60, 200]
    held.append(memory.empty([1000], [1]))
    assert not free()


def test_predictions_of_other_sizes_make_room_for_each_other() -> None:
    fast = sparse_inference(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 2, 3)))
    for rows in (6, 60, 10, 100, 14, 140):
        fast(torch.ones(1, 2, rows, rows))
    largest = 4 * 138 * 138 + 2 * 136 * 136
    assert largest <= sum(block.numel() for block in free()) < 1.5 * largest


@pytest.mark.parametrize("training", [True, False])
def test_without_gradients_activations_are_let_go_as_the_next_layer_has_read_them(training: bool) -> None:
    layers = [[nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()] for _ in range(6)]
    model = nn.Sequential(*(layer for block in layers for layer in block)).train(training)
    _, masking = masked(model, density=0.5)
    with torch.no_grad():
        sparse_execution(model, masking)(torch.randn(2, 4, 6, 6))
    assert sum(block.numel() for block in free()) <= 3 * 2 * 4 * 6 * 6


def test_small_tensors_are_left_to_pytorch() -> None:
    memory.empty([7], [1])
    assert not free()


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="systems that are asked for large pages")
def test_more_memory_than_there_is_is_a_memory_error_and_large_pages_need_not_be_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(MemoryError, match="no memory for 1,152,921,504,606,846,976 numbers"):
        memory.empty([1 << 60], [1])

    class SmallPages(mmap.mmap):
        def madvise(self, *_: object) -> None:
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", SmallPages)
    monkeypatch.setattr(memory, "HUGE", 8)
    assert memory.empty([20], [1]).fill_(3).sum() == 60
