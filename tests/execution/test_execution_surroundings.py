"""What else of PyTorch users surround a network with that computes sparsely: compilers, checkpoints, hooks, views."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("numba")

from helpers.watched_networks import Layers, images, plainly, sparse
from sparselearning import UsageError
from sparselearning.execution import memory, sparse_execution, sparse_inference, threads
from sparselearning.execution.network import SparseNetwork


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def gradients(network: nn.Module, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    network(x).square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_gradients_equal_masked_ones(network: SparseNetwork, x: Tensor) -> None:
    reference = copy.deepcopy(network.model)
    mine, dense = gradients(network, network.model, x), gradients(reference, reference, x)
    for name, gradient in mine.items():
        mask = network.masking.masks.get(name, torch.ones(()))
        torch.testing.assert_close(gradient * mask, dense[name] * mask, rtol=1e-3, atol=1e-3)


@pytest.fixture
def _double_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_double_by_default")
@pytest.mark.parametrize("training", [True, False])
def test_the_default_type_of_tensors_does_not_matter(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LEAST", 8)
    monkeypatch.setattr(threads, "_scratch", torch.empty(0, dtype=torch.float32))
    memory._free.clear()
    model = Layers(plainly).float().train(training)
    network, x = sparse(model), images().float()
    assert_gradients_equal_masked_ones(network, x)
    with torch.no_grad():
        torch.testing.assert_close(network(x), model(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sparse_inference(model)(x), model.eval()(x), rtol=1e-4, atol=1e-5)


class Checkpointed(Layers):
    """With a block that is computed again in the backward pass, between others that are not."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__(plainly)
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1))
        self.last = nn.Conv2d(6, 4, 1)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        before = self.norm(self.conv(x))
        return self.last(F.relu(checkpoint(self.block, before, use_reentrant=self.use_reentrant)))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_blocks_may_be_computed_again_in_the_backward_pass(use_reentrant: bool) -> None:
    assert_gradients_equal_masked_ones(sparse(Checkpointed(use_reentrant)), images())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_is_saved_for_the_backward_pass_may_come_back_in_another_layout(layout: torch.memory_format) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).to(memory_format=layout)
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved.detach().contiguous().clone(), lambda kept: kept):
        assert_gradients_equal_masked_ones(sparse(model), images())
    assert model[0].weight.grad.stride() == model[0].weight.stride()


@pytest.mark.parametrize(
    "weight",
    [torch.randn(8, 6, 3, 3)[:, :3], torch.randn(3, 8, 3, 3).transpose(0, 1), torch.randn(3, 1, 3, 3).transpose(0, 1)],
)
def test_weights_may_lie_in_memory_as_they_like(weight: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, len(weight), 3))
    model[0].weight = nn.Parameter(weight)
    network, x = sparse(model), images()
    assert_gradients_equal_masked_ones(network, x)
    assert model[0].weight.grad.stride() == torch.empty_like(weight).stride()
    with torch.no_grad():
        torch.testing.assert_close(network(x), model(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sparse_inference(model)(x), model(x), rtol=1e-4, atol=1e-5)


def test_passes_in_evaluation_and_in_training_may_share_a_backward_pass() -> None:
    """PyTorch's own BatchNorm then takes the statistics after the pass in training for those of the other one."""
    model = Layers(plainly)
    network, x = sparse(model), images()
    reference = copy.deepcopy(model)
    (network.eval()(x).sum() + network.train()(x).square().sum()).backward()
    reference.eval()(x).sum().backward()
    reference.train()(x).square().sum().backward()
    for mine, dense in zip(model.parameters(), reference.parameters(), strict=True):
        mask = mine != 0
        torch.testing.assert_close(mine.grad * mask, dense.grad * mask, rtol=1e-3, atol=1e-3)


def merges_images_and_channels(m: nn.Module, x: Tensor) -> Tensor:
    y = m.conv(x)
    halves = y.view(len(y) * 2, 3, -1)
    halves += 1
    return y.view_as(y) + halves.mean()


@pytest.mark.parametrize("use", [plainly, merges_images_and_channels, lambda m, x: {"a": [m.conv(x)], "b": 3}])
def test_outputs_and_activations_can_be_viewed_as_the_models_can(use: Callable) -> None:
    model = Layers(use).eval()
    for network in (sparse(model), sparse_inference(model)):
        x = images()
        outputs, expected = (one["a"][0] if isinstance(one, dict) else one for one in (network(x), model(x)))
        torch.testing.assert_close(outputs.view(-1), expected.view(-1), rtol=1e-4, atol=1e-5)


WIDE = 768
"""Columns of a linear layer of 512 rows that is computed with active weights alone."""


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Sequential(nn.Flatten(), nn.Linear(WIDE, 512)),
    ],
)
def test_outputs_can_be_viewed_and_written_to_in_place_as_the_models_can(model: nn.Module) -> None:
    network, x = sparse(model), torch.randn(6, 3, 16, 16)
    reference = copy.deepcopy(model)
    weighted = torch.randn_like(model(x))
    for one in (network, reference):
        outputs = one(x)
        (outputs.mul_(2) * weighted + outputs.view(-1).square().mean()).sum().backward()
    for mine, dense in zip(model.parameters(), reference.parameters(), strict=True):
        mask = dense != 0
        torch.testing.assert_close(mine.grad * mask, dense.grad * mask, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        predicted = sparse_inference(model)(x)
        torch.testing.assert_close(predicted.view(-1), model.eval()(x).view(-1), rtol=1e-4, atol=1e-5)


class Tokens(nn.Module):
    """A wide linear layer of vectors, then of a vector, whose outputs are viewed; and a pooling called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.query, self.conv = nn.Linear(512, 512), nn.Parameter(torch.randn(512)), nn.Conv2d(3, 8, 3)

    def forward(self, vectors: Tensor, images: Tensor) -> Tensor:
        lines = F.relu(self.wide(vectors)).view(vectors.shape[0], -1) + self.wide(self.query).sum()
        return lines + F.avg_pool2d(input=self.conv(images), kernel_size=2).mean()


def test_predictions_are_of_vectors_of_any_dimension_and_take_arguments_by_name() -> None:
    model = Tokens().eval()
    sparse(model, density=0.05)
    vectors, x = torch.randn(2, 5, 512), images()
    with torch.no_grad():
        predicted = sparse_inference(model)(vectors, x)
        torch.testing.assert_close(predicted, model(vectors, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "shared", [lambda f: f[:, :3], lambda f: f.detach(), lambda f: f.detach()[:2], lambda f: f.split(2)]
)
@pytest.mark.parametrize("gradients", [True, False])
def test_activations_whose_memory_other_tensors_share_are_not_moved_for_a_view(
    shared: Callable, gradients: bool
) -> None:
    def use(m: nn.Module, x: Tensor) -> Tensor:
        feature = F.relu(m.conv(x))
        held = shared(feature)
        if not m.holds:
            held = ()
        return feature.view(-1) + 0 * len(held)

    model = Layers(use)
    with torch.set_grad_enabled(gradients):
        for model.holds in (True, False):
            network, x = sparse(model), images()
            if model.holds:
                with pytest.raises(RuntimeError, match="reshape"):
                    network(x)
            else:
                torch.testing.assert_close(network(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alias", [lambda f: f[:, :3], lambda f: f.detach()])
def test_predictions_move_no_shared_activations_either(alias: Callable) -> None:
    def changes_an_alias(m: nn.Module, x: Tensor) -> Tensor:
        feature = m.conv(x)
        other = alias(feature)
        lines = feature.view(-1)
        other.mul_(3)
        return lines

    pooled = Layers(lambda m, x: F.max_pool2d(plainly(m, x), 2).view(-1)).eval()
    x = images()
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="reshape"):
            sparse_inference(Layers(changes_an_alias))(x)
        torch.testing.assert_close(sparse_inference(pooled)(x), pooled(x), rtol=1e-4, atol=1e-5)


class Returning(Layers):
    """Returns a sum, what it was computed from, and what of the weights; keeps the feature, too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.kept = self.use(self, x)
        return self.kept.mean((2, 3)).square(), self.kept, self.conv.weight.flatten(1).t()


@pytest.mark.parametrize("use", [plainly, lambda m, x: m.conv(x), lambda m, x: F.max_pool2d(plainly(m, x), 2)])
def test_a_returned_feature_is_the_one_that_the_loss_was_computed_from(use: Callable) -> None:
    model = Returning(use)
    network, x = sparse(model), images()
    given = []
    for one in (network, model):
        loss, feature, weight = one(x)
        assert feature is model.kept
        assert weight.data_ptr() == model.conv.weight.data_ptr()
        assert feature.view(-1).shape == (feature.numel(),)
        (gradient,) = torch.autograd.grad(loss.sum(), feature, retain_graph=True)
        feature.retain_grad()
        loss.sum().backward()
        assert torch.equal(gradient, feature.grad)
        given.append(gradient)
    torch.testing.assert_close(*given, rtol=1e-3, atol=1e-5)


def test_parameters_and_inputs_that_are_returned_are_left_as_they_are() -> None:
    model = Layers(
        lambda m, x: {"sum": m.conv(x), "given": x, "own": m.weight, "turned": m.conv.weight.permute(1, 2, 3, 0)}
    )
    model.weight = nn.Parameter(images().movedim(-1, 0))
    network, x = sparse(model), images(8, 8, 3, 4).permute(3, 2, 0, 1)
    layouts = x.stride(), model.weight.stride()
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            outputs = network(x)
        assert outputs["given"] is x
        assert outputs["own"] is model.weight
        assert (x.stride(), model.weight.stride()) == layouts
        assert outputs["turned"].data_ptr() == model.conv.weight.data_ptr()


def test_compiled_around_it_runs_and_compiled_within_it_is_refused() -> None:
    model, x = Layers(plainly).eval(), images()
    trained = sparse(model)
    for network in (trained, sparse_inference(model)):
        compiled = torch.compile(nn.Sequential(network, nn.ReLU()), backend="eager")
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="compiled"):
        sparse_execution(torch.compile(model, backend="eager"), trained.masking)
    model.conv.compile(backend="eager")
    with pytest.raises(UsageError, match="compiled"):
        sparse_execution(model, trained.masking)


@pytest.mark.filterwarnings("ignore")
def test_traces_are_refused() -> None:
    model = Layers(plainly).eval()
    for network in (sparse(model), sparse_inference(model)):
        with pytest.raises(UsageError, match="cannot trace"):
            torch.jit.trace(network, images(), check_trace=False)
