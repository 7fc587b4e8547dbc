"""Which weights are masked, by the rule and by patterns of names, and the budgets of single layers."""

import math
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from sparselearning import Masking
from sparselearning.process.errors import UsageError
from sparselearning.sparse.layers import maskable_parameters, matching
from sparselearning.sparse.topology import GROWTH


class OwnModule(nn.Module):
    """A module of the user's own, with parameters of one to five dimensions."""

    def __init__(self):
        super().__init__()
        for dimensions in range(1, 6):
            setattr(self, f"of_{dimensions}d", nn.Parameter(torch.ones([2] * dimensions)))


LAYERS = {
    "linear": (nn.Linear(3, 2), ["weight"]),
    "conv1d": (nn.Conv1d(2, 3, 3), ["weight"]),
    "conv2d": (nn.Conv2d(2, 3, 3), ["weight"]),
    "conv3d": (nn.Conv3d(2, 3, 3), ["weight"]),
    "transposed1d": (nn.ConvTranspose1d(2, 3, 3), ["weight"]),
    "transposed2d": (nn.ConvTranspose2d(2, 3, 3), ["weight"]),
    "transposed3d": (nn.ConvTranspose3d(2, 4, 3, groups=2), ["weight"]),
    "attention": (nn.MultiheadAttention(4, 2, add_bias_kv=True), ["in_proj_weight", "out_proj.weight"]),
    "cross attention": (
        nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
        ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"],
    ),
    "LSTM": (
        nn.LSTM(3, 4, num_layers=2, proj_size=2),
        [f"weight_{kind}_l{layer}" for layer in (0, 1) for kind in ("ih", "hh", "hr")],
    ),
    "GRU": (
        nn.GRU(3, 4, bidirectional=True),
        ["weight_ih_l0", "weight_hh_l0", "weight_ih_l0_reverse", "weight_hh_l0_reverse"],
    ),
    "cell": (nn.RNNCell(3, 4), ["weight_ih", "weight_hh"]),
    "embedding": (nn.Embedding(5, 4), []),
    "bag": (nn.EmbeddingBag(5, 4), []),
    "layer norm": (nn.LayerNorm([3, 4]), []),
    "rms norm": (nn.RMSNorm([2, 3, 4, 5]), []),
    "batch norm": (nn.BatchNorm2d(3), []),
    "group norm": (nn.GroupNorm(2, 4), []),
    "prelu": (nn.PReLU(3), []),
    "own": (OwnModule(), ["of_2d", "of_4d"]),
}  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS)
def test_which_weights_of_a_layer_are_maskable(layer):
    module, expected = LAYERS[layer]
    assert list(maskable_parameters(module)) == expected
    inside = nn.Sequential(nn.ReLU(), nn.Sequential(module))
    found = maskable_parameters(inside)
    assert list(found) == [f"1.0.{name}" for name in expected]
    assert all(weight is module.get_parameter(name) for weight, name in zip(found.values(), expected, strict=True))


def random_gradients(model, number):
    generator = torch.Generator().manual_seed(number)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("growth", GROWTH)
@pytest.mark.parametrize("method", ["DST", "GraNet", "GMP_uniform"])
def test_layers_of_every_kind_train_sparsely(method, growth):
    torch.manual_seed(0)
    model = nn.ModuleDict({name.replace(" ", "_"): module for name, (module, _) in LAYERS.items()})
    masking = Masking(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), method=method, growth=growth, update_frequency=1,
        init_density=0.5, final_density=0.2, prune_end_step=3,
    )  # fmt: skip
    masking.add_module(model)
    assert len(masking.masks) == sum(len(expected) for _, expected in LAYERS.values())
    for number in range(4):
        random_gradients(model, number)
        masking.step(keep_gradients=False)
    size = sum(mask.numel() for mask in masking.masks.values())
    assert masking.density() == round(size * (0.5 if method == "DST" else 0.2)) / size
    assert not any(model.get_parameter(name)[~mask].any() for name, mask in masking.masks.items())


# ---------------------------------------------------------------------------------- embeddings and tied weights


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(6, 4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6)
        self.head.weight = self.tokens.weight


def test_an_embedding_is_masked_on_request_and_once():
    assert list(maskable_parameters(Tied())) == ["mix.weight"]
    assert list(maskable_parameters(Tied(), mask_embeddings=True)) == ["tokens.weight", "mix.weight"]
    model = Tied()
    masking = Masking(torch.optim.SGD(model.parameters(), lr=0.1), init_density=0.5)
    masking.add_module(model, mask_embeddings=True)
    assert masking.density() == 20 / 40
    assert not model.head.weight[~masking.masks["tokens.weight"]].any()


def test_linear_layers_with_one_weight_are_masked_under_its_first_name():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert list(maskable_parameters(model)) == ["0.weight"]


def with_embedding_last():
    model = nn.Module()
    model.hidden, model.head = nn.Linear(3, 4), nn.Linear(4, 2)
    model.tokens = nn.Embedding(6, 3)
    return model


@pytest.mark.parametrize(
    ("model", "options", "classifier"),
    [
        (nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(3, 4), nn.Linear(4, 2)), {}, "3.weight"),
        (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), {"dense_layers": ["1"]}, None),
        (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2).requires_grad_(False)), {}, None),
        (nn.Sequential(nn.Linear(3, 4), parametrizations.weight_norm(nn.Linear(4, 2))), {"dense_layers": ["1"]}, None),
        (nn.Conv2d(4, 2, 1), {}, None),
        (Tied(), {}, None),
        (Tied(), {"mask_embeddings": True}, "tokens.weight"),
        (with_embedding_last(), {"mask_embeddings": True}, "head.weight"),
    ],
)
@pytest.mark.filterwarnings("ignore:left alone")
def test_the_classifier_is_the_models_last_matrix_if_that_is_masked(model, options, classifier):
    for whole in (model, torch.compile(model, backend="eager")):
        masking = Masking(torch.optim.SGD(model.parameters(), lr=0.1), init_density=0.5)
        masking.add_module(whole, **options)
        assert masking.classifier == classifier


def hidden_layers_and_a_dense_head():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 4))


def test_uniform_pruning_takes_no_hidden_layer_for_the_classifier():
    model = hidden_layers_and_a_dense_head()
    masking = Masking(
        torch.optim.SGD(model.parameters(), lr=0.1), method="GMP_uniform", init_density=1.0, final_density=0.1,
        prune_end_step=0, update_frequency=1,
    )  # fmt: skip
    masking.add_module(model, "GMP", dense_layers=["4"])
    masking.step()
    assert masking.active_counts() == {"0.weight": 8, "2.weight": 10}


def test_structured_pruning_takes_no_hidden_layer_for_the_classifier():
    model = hidden_layers_and_a_dense_head()
    masking = Masking(torch.optim.SGD(model.parameters(), lr=0.1))
    masking.add_module(model, "prune_structured", pruning_rate=0.4, dense_layers=["4"])
    assert masking.active_counts() == {"0.weight": 6 * 8, "2.weight": 6 * 10}


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_masked_embeddings_with_sparse_gradients_are_refused(kind):
    model = nn.Sequential(kind(5, 4, sparse=True), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UsageError, match=r"^0 has sparse gradients.*sparse=False"):
        Masking(optimizer).add_module(model, mask_embeddings=True)
    Masking(optimizer, init_density=0.5).add_module(model)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("keep_gradients", [True, False])
def test_a_sparse_gradient_of_a_masked_weight_is_refused(keep_gradients, momentum):
    model = nn.Module()
    model.table = nn.Parameter(torch.ones(5, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    masking = Masking(optimizer, init_density=0.5)
    masking.add_module(model)
    nn.functional.embedding(torch.tensor([1]), model.table, sparse=True).sum().backward()
    with pytest.raises(UsageError, match="table has a sparse gradient"):
        masking.step(keep_gradients=keep_gradients)
    with pytest.raises(UsageError, match="table has a sparse gradient"):
        optimizer.step()


# ------------------------------------------------------------------------------------- what cannot be masked


def gains_beside(layer):
    with pytest.warns(FutureWarning):
        return weight_norm(layer)


def pruned_by_pytorch(layer):
    prune.random_unstructured(layer, "weight", amount=0.5)
    return layer


REPARAMETRISED = {
    "weight_norm": (parametrizations.weight_norm, "parametrizations.weight.original0"),
    "spectral_norm": (parametrizations.spectral_norm, "parametrizations.weight.original"),
    "old weight_norm": (gains_beside, "weight_g"),
    "old spectral_norm": (spectral_norm, "weight_orig"),
    "torch.nn.utils.prune": (pruned_by_pytorch, "weight_orig"),
}


@pytest.mark.parametrize(
    "make_layer", [lambda: nn.Linear(3, 2), lambda: nn.Conv1d(3, 2, 3), lambda: nn.Conv2d(3, 2, 3)]
)
@pytest.mark.parametrize("how", REPARAMETRISED)
def test_weights_that_are_made_from_others_are_refused_or_stay_dense(how, make_layer):
    reparametrise, maker = REPARAMETRISED[how]
    model = nn.Sequential(reparametrise(make_layer()), nn.Linear(2, 2))
    masking = Masking(torch.optim.SGD(model.parameters(), lr=0.1), init_density=0.5)
    with pytest.raises(UsageError, match=rf"^0\.{re.escape(maker)} .*weight_norm.*dense_layers"):
        masking.add_module(model)
    masking.add_module(model, dense_layers=["0"])
    assert list(masking.masks) == ["1.weight"]


def test_a_frozen_weight_that_is_made_from_others_is_left_alone():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 2)).requires_grad_(False), nn.Linear(2, 2))
    masking = Masking(torch.optim.SGD(model.parameters(), lr=0.1), init_density=0.5)
    with pytest.warns(UserWarning, match="left alone"):
        masking.add_module(model)
    assert list(masking.masks) == ["1.weight"]


def test_a_normalised_embedding_is_an_embedding():
    assert not maskable_parameters(nn.Sequential(parametrizations.weight_norm(nn.Embedding(3, 2))))


def test_a_plain_tensor_beside_a_parameter_makes_no_weight():
    model = nn.Module()
    model.pos = torch.zeros(2, 2)
    model.pos_embed = nn.Parameter(torch.ones(2, 2))
    assert list(maskable_parameters(model)) == ["pos_embed"]


def test_lazy_modules_without_shapes_are_refused():
    model = nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(2))
    with pytest.raises(UsageError, match=r"1\.weight has no shape yet"):
        Masking(torch.optim.SGD(model.parameters(), lr=0.1)).add_module(model)
    model(torch.zeros(1, 3))
    Masking(torch.optim.SGD(model.parameters(), lr=0.1), init_density=0.5).add_module(model)


def test_the_meta_device_is_refused():
    with torch.device("meta"):
        model = nn.Linear(3, 4)
    with pytest.raises(UsageError, match="weight has no values on the meta device"):
        Masking(torch.optim.SGD(model.parameters(), lr=0.1)).add_module(model)


# ------------------------------------------------------------------------------------------------- patterns

NAMES = ["conv1.weight", "layer1.0.conv.weight", "layer1.1.conv.weight", "layer10.conv.weight", "fc.weight", "fc.bias"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("fc", ["fc.weight", "fc.bias"]),
        ("fc.weight", ["fc.weight"]),
        ("layer1", ["layer1.0.conv.weight", "layer1.1.conv.weight"]),
        ("layer1.*", ["layer1.0.conv.weight", "layer1.1.conv.weight"]),
        ("layer1*", ["layer1.0.conv.weight", "layer1.1.conv.weight", "layer10.conv.weight"]),
        ("layer1.[12]", ["layer1.1.conv.weight"]),
        ("*.conv", ["layer1.0.conv.weight", "layer1.1.conv.weight", "layer10.conv.weight"]),
        ("*", NAMES),
    ],
)
def test_patterns_match_names_as_a_whole_or_up_to_a_dot(pattern, expected):
    assert matching(pattern, NAMES) == expected


@pytest.mark.parametrize(
    ("pattern", "near"),
    [("fcc", "fc"), ("layer2.*", "layer1"), ("conv1.wieght", "conv1.weight"), ("Fc", "fc")],
)
def test_a_pattern_that_matches_nothing_is_answered_with_near_names(pattern, near):
    with pytest.raises(
        UsageError, match=rf"no layer matches '{re.escape(pattern)}'; the nearest names are .*\b{near}\b"
    ):
        matching(pattern, NAMES)


class Net(nn.Module):
    """Two convolutions of 4·8 and 8·8 weights, and a classifier of 4·8."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 8, 1)
        self.deep = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.fc = nn.Linear(8, 4)


def masked(sparse_init="uniform", density=0.5, model=None, **options):
    model = Net() if model is None else model
    masking = Masking(torch.optim.SGD(model.parameters(), lr=0.1), init_density=density)
    masking.add_module(model, sparse_init, **options)
    return masking


@pytest.mark.parametrize(
    "wrap", [lambda model: model, lambda model: torch.compile(model, backend="eager"), nn.DataParallel]
)
def test_dense_layers_have_no_mask_and_stay_as_they_are(wrap):
    model = Net()
    before = model.fc.weight.clone()
    masking = masked(model=wrap(model), dense_layers=["fc"])
    assert list(masking.masks) == ["conv.weight", "deep.0.weight"]
    assert masking.density() == 48 / 96
    assert torch.equal(model.fc.weight, before)
    assert list(masked(dense_layers=["fc"], keep_first_dense=True).masks) == ["deep.0.weight"]
    assert list(masked(dense_layers=["conv*"], keep_first_dense=True).masks) == ["deep.0.weight", "fc.weight"]
    with pytest.raises(UsageError, match="no weight"):
        masked(dense_layers=["*"])


def test_layer_densities_by_hand():
    # 64 of 128 weights. deep: round(64 · 0.1) = 6, so that conv and fc, of 32 each, share 58.
    counts = masked(layer_densities={"deep.*": 0.1}).active_counts()
    assert counts == {"conv.weight": 29, "deep.0.weight": 6, "fc.weight": 29}
    # ERK among them, whose shapes add up to 14 and 12: 58 · 14/26 = 31.2 and 26.8.
    counts = masked("ERK", layer_densities={"deep.*": 0.1}).active_counts()
    assert counts == {"conv.weight": 31, "deep.0.weight": 6, "fc.weight": 27}
    # Given fc, conv (14) and deep (18) share 64 - 8 = 56: 24.5 and 31.5, and the earlier one is rounded up.
    counts = masked("ERK", layer_densities={"fc": 0.25}).active_counts()
    assert counts == {"conv.weight": 25, "deep.0.weight": 31, "fc.weight": 8}
    # All given: they have to meet the budget.
    assert list(masked(layer_densities={"conv": 1.0, "*.0": 0.25, "fc": 0.5}).active_counts().values()) == [32, 16, 16]


@pytest.mark.parametrize("sparse_init", ["ERK", "uniform"])
@pytest.mark.parametrize("density", [0.3, 1 / 3, 0.47, 0.6])
@pytest.mark.parametrize("given", [0.01, 1 / 7, 0.5, 1.0])
def test_the_total_is_exact_whatever_one_layer_has(sparse_init, density, given):
    counts = masked(sparse_init, density, layer_densities={"conv": given}).active_counts()
    assert counts["conv.weight"] == round(32 * given)
    assert sum(counts.values()) == round(128 * density)


def test_a_layer_keeps_its_density_where_none_is_shared_out_anew():
    model = Net()
    masking = Masking(torch.optim.SGD(model.parameters(), lr=0.1), init_density=0.4, update_frequency=1)
    masking.add_module(model, layer_densities={"fc": 0.25})
    for number in range(3):
        random_gradients(model, number)
        masking.step()
    assert masking.active_counts()["fc.weight"] == 8


CONTRADICTIONS = [
    ("no layer matches 'fcc'", {"layer_densities": {"fcc": 0.1}}),
    ("no layer matches 'fcc'", {"dense_layers": ["fc", "fcc"]}),
    (r"the density of 'fc' must be a number in \(0, 1\], not 1.5", {"layer_densities": {"fc": 1.5}}),
    (r"in \(0, 1\], not nan", {"layer_densities": {"fc": math.nan}}),
    ("fc.weight gets density 0.1 from 'fc' and 0.2 from '", {"layer_densities": {"fc": 0.1, "f*": 0.2}}),
    ("gives fc.weight density 0.1, and 'fc' keeps it dense", {"dense_layers": ["fc"], "layer_densities": {"f*": 0.1}}),
    ("'deep.1' gives a density to deep.1.weight, which has no mask", {"layer_densities": {"deep.1": 0.1}}),
    # The budget is 64 of 128.
    ("come to 64 active weights.*to 64", {"layer_densities": {"deep": 1.0}}),
    ("come to 96 active weights.*to 64", {"layer_densities": {"deep": 1.0, "conv": 1.0}}),
    ("come to 2 active weights.*to 64.*32 weights", {"layer_densities": {"deep": 0.01, "conv": 0.04}}),
    ("come to 65 active weights.*to 64", {"layer_densities": {"deep": 0.51, "conv": 0.5, "fc": 0.5}}),
    ("sparse_init ERK, uniform, not with GMP", {"sparse_init": "GMP", "layer_densities": {"fc": 0.1}}),
]  # fmt: skip


@pytest.mark.parametrize(("message", "options"), CONTRADICTIONS)
def test_impossible_layers_are_refused_before_anything_is_changed(message, options):
    model = Net()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(UsageError, match=message):
        masked(model=model, **options)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_like_densities_from_two_patterns_are_one():
    assert masked(layer_densities={"fc": 0.25, "f*": 0.25}).active_counts()["fc.weight"] == 8


def test_an_embedding_gets_a_density_only_if_it_is_masked():
    with pytest.raises(UsageError, match="mask_embeddings=True"):
        masked(model=Tied(), layer_densities={"tokens": 0.25})
    masking = masked(model=Tied(), layer_densities={"tokens": 0.25}, mask_embeddings=True)
    assert masking.active_counts() == {"tokens.weight": 6, "mix.weight": 14}
