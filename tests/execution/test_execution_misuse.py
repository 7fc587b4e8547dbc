"""What users may do with a network that computes sparsely, and PyTorch's answer where it is a mistake."""

import copy
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("numba")

from helpers.watched_networks import Layers, images, plainly, sparse
from sparselearning.execution import sparse_network


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------------- wrong inputs


def mistaken(model: nn.Module, x: Tensor) -> str:
    network = sparse(model)
    with pytest.raises((RuntimeError, ValueError)) as expected:
        model(x)
    with pytest.raises(type(expected.value)) as told:
        network(x)
    assert str(told.value) == str(expected.value)
    return str(told.value)


def test_inputs_of_other_shapes_and_types_are_left_to_pytorch() -> None:
    mistaken(Layers(plainly), images(4, 2, 8, 8))
    mistaken(Layers(plainly), images().double())
    mistaken(nn.Conv2d(3, 4, 5), images(4, 3, 2, 2))
    mistaken(nn.Linear(600, 600), images(4, 500))
    wrong = Layers(plainly).eval()
    wrong.norm = nn.BatchNorm2d(4)
    mistaken(wrong, images())


def test_no_image_at_all_gives_no_output() -> None:
    model = Layers(plainly).eval()
    assert sparse(model)(images(0, 3, 8, 8)).shape == (0, 6, 8, 8)


def test_a_network_made_double_later_computes_in_double() -> None:
    model = Layers(plainly)
    network = sparse(model)
    model.double().eval()
    x = images().double()
    torch.testing.assert_close(network(x), model(x))


def test_not_a_number_reaches_the_output() -> None:
    model = Layers(plainly)
    network = sparse(model)
    x = images()
    x[1, 2, 3, 4] = torch.nan
    for training in (True, False):
        model.train(training)
        assert network(x).isnan().any()
        assert torch.equal(network(x).isnan(), model(x).isnan())


def test_outputs_beyond_sixteen_bits_are_told_apart() -> None:
    model = nn.Linear(8, (1 << 16) + 100)
    network = sparse(model, density=0.2)
    x = images(3, 8)
    torch.testing.assert_close(network(x), model(x), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------- how it is called


def changes_what_was_added(m: nn.Module, x: Tensor) -> Tensor:
    added = m.conv(x)
    y = m.norm(m.conv(x))
    y += added
    added.mul_(2)
    return F.relu(y)


def changes_what_was_normalised(m: nn.Module, x: Tensor) -> Tensor:
    c = m.conv(x)
    y = m.norm(c)
    F.relu(c, inplace=True)
    return F.relu(y) + c


def adds_to_what_was_normalised(m: nn.Module, x: Tensor) -> Tensor:
    c = m.conv(x)
    y = m.norm(c)
    c += 1
    return F.relu(y) + c


def adds_halves(m: nn.Module, x: Tensor) -> Tensor:
    half = torch.ones(4, 6, 8, 8, dtype=torch.float16)
    y = m.norm(m.conv(x))
    y += half
    return F.relu(y)


def calls_by_keyword(m: nn.Module, x: Tensor) -> Tensor:
    y = F.conv2d(input=x, weight=m.conv.weight, bias=m.conv.bias, padding=1)
    y = F.batch_norm(input=y, running_mean=m.norm.running_mean, running_var=m.norm.running_var, training=m.training)
    return F.max_pool2d(input=F.relu(input=y), kernel_size=2)


def asks_for_places(m: nn.Module, x: Tensor) -> Tensor:
    values, places = nn.AdaptiveMaxPool2d(2, return_indices=True)(m.conv(x))
    return values + places


@pytest.mark.parametrize(
    "use",
    [
        changes_what_was_added, changes_what_was_normalised, adds_to_what_was_normalised, adds_halves,
        calls_by_keyword, asks_for_places,
    ],
)  # fmt: skip
@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_any_way_of_calling_gives_the_models_own_output(use: Callable, training: bool) -> None:
    model = Layers(use).train(training)
    reference = copy.deepcopy(model)
    network = sparse(model)
    reference.load_state_dict(model.state_dict())
    x = images()
    torch.testing.assert_close(network(x), reference(x), rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_networks_made_in_inference_mode_predict() -> None:
    model = Layers(plainly).eval()
    network = sparse_network(model, {"conv.weight": model.conv.weight})
    x = images()
    for _ in range(2):
        torch.testing.assert_close(network(x), model(x), rtol=1e-4, atol=1e-5)
        model.conv.weight.mul_(2)


# ------------------------------------------------------------------------------------------------- who writes weights


def average(model: nn.Module) -> None:
    """As swapping in an average of weights does it: they are others, and others are zero."""
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data.flip(0) * 0.5)


def load_dense(model: nn.Module) -> None:
    model.load_state_dict({name: torch.randn(entry.shape) for name, entry in model.state_dict().items()})


@pytest.mark.parametrize("write", [average, load_dense])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
def test_whatever_weights_there_are_are_computed_with(write: Callable, trained: bool, gradients: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 1300))
    network, x = sparse(model), images()
    if trained:
        network(x).sum().backward()
        network.masking.step()
    model.eval()
    for _ in range(2):
        with torch.set_grad_enabled(gradients):
            network(x)
            write(model)
            expected = model(x)
            assert (network(x) - expected).abs().max() <= 1e-4 * expected.abs().max()


@torch.no_grad()
def test_an_evaluation_takes_weights_from_the_last_one_that_had_the_same() -> None:
    model = nn.Sequential(nn.Conv2d(3, 60, 3)).eval()  # more weights than are summed up at a time
    network, x = sparse(model), images()
    weight = model[0].weight

    def reads_weights() -> bool:
        with torch.autograd.profiler.profile() as profile:
            outputs = network(x)
        torch.testing.assert_close(outputs, model(x), rtol=1e-4, atol=1e-5)
        return any(event.name == "aten::index_select" for event in profile.function_events)

    assert reads_weights()
    assert not reads_weights()
    for changed in (
        weight * 2,
        weight.flip(3),
        weight.flip(0),
        -weight,
        weight.clone().index_fill_(0, torch.tensor(59), 1),
    ):
        weight.data.copy_(changed)
        assert reads_weights()
        assert not reads_weights()
    weight.data[3, 1] = torch.inf
    assert not network(x).isfinite().all()
    weight.data[3, 1] = 0
    assert reads_weights()


def test_weights_loaded_in_training_are_computed_with_and_have_gradients() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3))
    network, x = sparse(model), images()
    network(x).sum().backward()
    network.masking.step()
    load_dense(model)
    model.zero_grad()
    network(x).square().sum().backward()
    mine = model[0].weight.grad.clone()
    model.zero_grad()
    model(x).square().sum().backward()
    torch.testing.assert_close(mine, model[0].weight.grad, rtol=1e-3, atol=1e-3)


def test_active_weights_that_are_zero_have_gradients() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3))
    network = sparse(model)
    model[0].weight.data.zero_()
    network(images()).sum().backward()
    assert torch.equal(model[0].weight.grad != 0, network.masking.masks["0.weight"])


# ------------------------------------------------------------------------------------------------- copies and threads


def test_copies_hold_no_address_of_the_original() -> None:
    model = Layers(plainly).eval()
    network = sparse(model)
    x = images()
    expected = network(x)
    assert any(network._lists.values())
    for copied in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert not any(copied._lists.values())
        assert torch.equal(copied(x), expected)
        assert torch.equal(network(x), expected)


def test_second_derivatives_are_refused() -> None:
    network = sparse(Layers(plainly))
    x = images().requires_grad_()
    (gradient,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_threads_do_not_disturb_each_other() -> None:
    model = Layers(plainly).eval()
    network = sparse(model)
    batches = [images(64, 3, 16, 16) for _ in range(4)]
    with torch.no_grad():
        expected = [network(batch) for batch in batches]
    disturbed = []

    def predict(number: int) -> None:
        with torch.no_grad():
            disturbed.extend(number for _ in range(60) if not torch.equal(network(batches[number]), expected[number]))

    threads = [threading.Thread(target=predict, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert disturbed == []
