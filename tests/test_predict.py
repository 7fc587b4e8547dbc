"""Networks for prediction say what the model says, from memory, from a run's folder and from packed files."""

import copy
import csv
import json
import operator
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cifar_models import build_model
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils import prune

pytest.importorskip("numba")

from sparselearning import FaultError, Masking, UsageError, export, predict, sparse_inference
from sparselearning.execution.inference import Active, ScaledPlanes, SparseInference, SparseLayer
from sparselearning.execution.network import SparseNetwork

NETWORKS = ["ResNet18", "vgg11", "vgg-like", "wrn-10-1", "cifar_resnet_8", "lenet5", "lenet-300-100"]


def trained(model: nn.Module, density: float = 0.1) -> nn.Module:
    """Masked, with statistics, scales and shifts as training might leave them."""
    masking = Masking(torch.optim.SGD(model.parameters(), lr=0.1), init_density=density, final_density=density)
    masking.add_module(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return model.eval()


@torch.no_grad()
def assert_equal(fast: nn.Module, model: nn.Module, *inputs: Tensor) -> None:
    for one in inputs:
        expected, logits = model(one.clone()), fast(one.clone())
        assert logits.shape == expected.shape
        assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_equal_those_of_the_model(name: str) -> None:
    torch.manual_seed(0)
    size, channels = (28, 1) if name.startswith("lenet") else (32, 3)
    model = trained(build_model(name, 10, channels, size))
    counts = (1, 3) if name in ("ResNet18", "vgg11", "vgg-like") else (1, 3, 17)
    before = {entry: tensor.clone() for entry, tensor in model.state_dict().items()}
    fast = sparse_inference(model)
    assert_equal(fast, model, *(torch.randn(count, channels, size, size) for count in counts))
    assert all(torch.equal(tensor, before[entry]) for entry, tensor in model.state_dict().items())


def test_a_sum_and_relu_by_hand() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x[:, :1] + self.conv(x))

    model = Net()
    with torch.no_grad():
        model.conv.weight.copy_(torch.tensor([0.0, 2.0]).view(1, 2, 1, 1))
        model.conv.bias.fill_(-1)  # type: ignore[union-attr]
    fast = sparse_inference(model)
    pixels = torch.tensor([[3.0, 1.0], [-9.0, 0.5]]).view(2, 2, 1, 1)
    assert fast(pixels).flatten().tolist() == [3 + 2 * 1 - 1, 0]
    (layer,) = (node for node in fast.network.graph.nodes if node.op == "call_module")
    assert layer.args[2] is True
    assert "add" not in str(fast.network.graph)


class Wired(nn.Module):
    """Two convolutions, a BatchNorm, a grouped convolution, and a forward pass that decides how they are wired."""

    def __init__(self, wiring) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding="same", bias=False)
        self.norm, self.grouped = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=2, padding=1)
        self.linear = nn.Linear(4, 70_000)
        self.wiring = wiring

    def forward(self, x: Tensor) -> Tensor:
        return self.wiring(self, x)


WIRINGS = {
    "sum of two": lambda m, x: F.relu(m.a(x) + m.b(x)),
    "sum in place": lambda m, x: m.a(x).add_(m.b(x)).relu_(),
    "sum in place of what is used again": lambda m, x: (lambda y: (y.__iadd__(m.b(x)), y.relu())[1])(m.a(x)),
    "added to what is used again": lambda m, x: (lambda y: (y + m.b(y)) * y)(m.a(x)),
    "of another shape": lambda m, x: F.relu(x.mean(dim=(2, 3), keepdim=True) + m.a(x)),
    "a number": lambda m, x: F.relu(m.a(x) + 1),
    "a share": lambda m, x: torch.add(x, m.a(x), alpha=0.5).relu(),
    "twice the same": lambda m, x: (lambda y: F.relu(y + y))(m.a(x)),
    "called twice": lambda m, x: F.relu(m.a(F.relu(m.a(x)))),
    "relu used beside": lambda m, x: (lambda y: y.relu() + y)(m.a(x)),
    "norm with a sum": lambda m, x: F.relu(x + m.norm(x)),
    "norm folded": lambda m, x: F.relu(m.norm(m.a(x))),
    "grouped": lambda m, x: m.b(F.relu(m.norm(m.grouped(x)))),
    "poolings": lambda m, x: F.adaptive_avg_pool2d(F.max_pool2d(m.a(x), 2), 1) + F.avg_pool2d(m.b(x), 3).mean(),
    "pooling with indices": lambda m, x: F.max_pool2d(m.a(x), 2, return_indices=True)[0],
    "concatenation": lambda m, x: torch.cat([m.a(x), m.b(x)], dim=1)[:, 2:6].flip(3),
    "large linear": lambda m, x: m.linear(m.a(x).permute(0, 2, 3, 1)).relu(),
    "added to a part": lambda m, x: (lambda y: (operator.iadd(y.narrow(1, 0, 4), m.b(x)), y)[1])(m.a(x)),
    "a part scaled": lambda m, x: (lambda y: (operator.imul(y[:, 1:], 2), y.relu())[1])(m.a(x)),
    "weights read elsewhere": lambda m, x: F.conv_transpose2d(F.relu(m.norm(m.a(x))), m.a.weight, padding=1),
    "norm read elsewhere": lambda m, x: m.norm(m.a(x)) * m.norm.weight.view(-1, 1, 1),
    "heads": lambda m, x: m.a(x).view(len(x) * 2, 2, -1),
    "branches": lambda m, x: m.b(m.a(x)) if x.sum() > 1e9 else m.norm(m.a(x)).relu(),
}


@pytest.mark.parametrize("wiring", WIRINGS.values(), ids=WIRINGS.keys())
def test_any_wiring_equals_the_model(wiring) -> None:
    torch.manual_seed(0)
    model = trained(Wired(wiring), density=0.4)
    assert_equal(sparse_inference(model), model, torch.randn(1, 4, 6, 6), torch.randn(5, 4, 6, 6))


def mixes_images(module: nn.Module, inputs: tuple[Tensor], outputs: Tensor) -> Tensor:
    return outputs - outputs.mean(dim=0)


@pytest.mark.parametrize("hooked", ["a", "norm", "relu", "pool"])
@pytest.mark.parametrize("before", [True, False])
def test_hooks_run(hooked: str, before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparselearning.execution.inference.IMAGES_AT_ONCE", 2)
    model = trained(Wired(lambda m, x: m.pool(m.relu(m.norm(m.a(x))))))
    model.relu, model.pool = nn.ReLU(), nn.MaxPool2d(2)
    module = model.get_submodule(hooked)
    if before:
        module.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    else:
        module.register_forward_hook(mixes_images)
    assert_equal(sparse_inference(model), model, torch.randn(5, 4, 6, 6))


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("after_a_pass", [True, False])
@pytest.mark.parametrize("change", [lambda conv: prune.l1_unstructured(conv, "weight", 0.8), nn.utils.weight_norm])
def test_weights_may_be_computed_in_every_pass(change, after_a_pass: bool) -> None:
    model = Wired(WIRINGS["norm folded"]).eval()
    change(model.a)
    if after_a_pass:
        with torch.no_grad():
            model(torch.randn(1, 4, 6, 6))
    assert_equal(sparse_inference(model), model, torch.randn(5, 4, 6, 6))


class ByKeyword(nn.Sequential):
    """Calls its layers by the name of their argument."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(input=x)
        return x


def test_layers_may_be_called_by_keyword() -> None:
    layers = (nn.Conv2d(3, 6, 3), nn.ReLU(), nn.BatchNorm2d(6), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 4))
    model = trained(ByKeyword(*layers))
    assert_equal(sparse_inference(model), model, torch.randn(5, 3, 8, 8))


class WithOptions(nn.Module):
    """Arguments with defaults decide what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor, labels: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        logits = self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))
        if scale > 1:
            logits = logits * scale
        return logits if labels is None else F.cross_entropy(logits, labels)


@torch.no_grad()
def test_arguments_with_defaults_may_be_given_or_not() -> None:
    torch.manual_seed(0)
    model = trained(WithOptions())
    fast = copy.deepcopy(sparse_inference(model))
    assert fast.by_image
    assert {nn.BatchNorm2d, ScaledPlanes}.isdisjoint(type(module) for module in fast.network.modules())
    x, labels = torch.randn(3, 3, 8, 8), torch.arange(3)
    for args, named in (
        ((x,), {}),
        ((), {"x": x}),
        ((x, labels), {}),
        ((x,), {"labels": labels}),
        ((x,), {"scale": 2}),
    ):
        torch.testing.assert_close(fast(*args, **named), model(*args, **named), rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="wrong"):
        fast(x, wrong=1)


@torch.no_grad()
def test_active_weights_alone_are_kept_where_the_dense_ones_are_not_there() -> None:
    torch.manual_seed(0)
    model = trained(WithOptions())
    packed = copy.deepcopy(model)
    packed.conv.active = Active.of(packed.conv)
    packed.conv.weight = nn.Parameter(packed.conv.weight.to("meta"))
    fast = SparseInference.of(packed)
    assert not any(entry.is_meta for entry in (*fast.parameters(), *fast.buffers()))
    assert_equal(fast, model, torch.randn(3, 3, 8, 8))
    with pytest.raises(UsageError, match="labels, scale"):
        fast(torch.randn(3, 3, 8, 8), torch.arange(3), scale=2)


def test_what_is_folded_and_fused_is_gone() -> None:
    fast = sparse_inference(trained(build_model("cifar_resnet_8", 10)))
    kinds = [type(module) for module in fast.network.modules()]
    assert kinds.count(SparseLayer) == 1 + 3 * 2 + 2
    assert not {nn.BatchNorm2d, nn.ReLU, nn.Conv2d, ScaledPlanes}.intersection(kinds)
    assert "add" not in str(fast.network.graph)


@pytest.mark.parametrize("name", ["cifar_resnet_8", "vgg-like", "wrn-10-1"])
def test_large_batches_go_through_in_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparselearning.execution.inference.IMAGES_AT_ONCE", 2)
    torch.manual_seed(0)
    model = trained(build_model(name, 10))
    fast = sparse_inference(model)
    assert fast.by_image
    assert_equal(fast, model, torch.randn(5, 3, 32, 32))


def test_a_network_that_mixes_images_gets_them_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparselearning.execution.inference.IMAGES_AT_ONCE", 2)
    model = trained(Wired(lambda m, x: m.a(x) - m.a(x).mean()))
    assert_equal(sparse_inference(model), model, torch.randn(5, 4, 6, 6))


def test_a_network_that_branches_on_data_is_not_folded() -> None:
    model = trained(Wired(WIRINGS["branches"]))
    assert isinstance(sparse_inference(model).network, SparseNetwork)


def test_later_changes_of_the_model_do_not_show_and_it_stays_in_evaluation_mode() -> None:
    torch.manual_seed(0)
    model = trained(build_model("cifar_resnet_8", 10))
    fast, twin = sparse_inference(model.train()), copy.deepcopy(model).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    images = torch.randn(2, 3, 32, 32)
    assert_equal(fast.train(), twin, images)
    assert not fast.training
    assert not fast(images).requires_grad


def test_a_copy_outlives_the_original() -> None:
    torch.manual_seed(0)
    model = trained(build_model("cifar_resnet_8", 10))
    fast = sparse_inference(model)
    images = torch.randn(2, 3, 32, 32)
    fast(images)
    twin = copy.deepcopy(fast)
    del fast
    assert_equal(twin, model, images)


def test_many_sizes_of_batches_take_no_more_memory() -> None:
    fast = sparse_inference(nn.Sequential(nn.Conv2d(2, 2, 1)))
    for count in range(1, 12):
        fast(torch.ones(count, 2, 3, 3))
    (layer,) = (module for module in fast.modules() if isinstance(module, SparseLayer))
    assert len(layer._kernels) == 4


@pytest.mark.parametrize(
    "inputs",
    [torch.ones(1, 3, 4, 4), torch.ones(2, 4, 4), torch.ones(1, 2, 2, 2), torch.ones(1, 2, 4, 4).double()],
    ids=["channels", "no batch", "too small", "float64"],
)
def test_inputs_that_do_not_fit_are_told(inputs: Tensor) -> None:
    with pytest.raises(UsageError):
        sparse_inference(nn.Sequential(nn.Conv2d(2, 2, 3)))(inputs)


def test_other_types_are_refused() -> None:
    with pytest.raises(UsageError, match=r"float32 on CPUs; 0\.weight is torch\.float64"):
        sparse_inference(nn.Sequential(nn.Conv2d(2, 2, 3)).double())


# ------------------------------------------------------------------------------------------- command

MEAN, STD = [120.0, 110.0, 100.0], [60.0, 50.0, 40.0]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder, as far as prediction reads it."""
    torch.manual_seed(0)
    folder = tmp_path / "run"
    folder.mkdir()
    model = trained(build_model("cifar_resnet_8", 10))
    torch.save({"state_dict": model.state_dict(), "masks": {}, "epoch": 3}, folder / "model_previous.pth")
    arguments = {"name": "cifar_resnet_8", "num_classes": 10, "in_channels": 3, "image_size": 32}
    write_record(folder, builder="cifar_models:build_model", arguments=arguments)
    return folder


def write_record(run: Path, **changes: object) -> None:
    known = {"input_shape": [3, 32, 32], "mean": MEAN, "std": STD}
    if (run / "config.json").exists():
        known = json.loads((run / "config.json").read_text())["network"]
    record = {name: value for name, value in {**known, **changes}.items() if value is not None}
    (run / "config.json").write_text(json.dumps({"model": "cifar_resnet_8", "data": "x", "network": record}))


@pytest.fixture
def pixels(tmp_path: Path) -> np.ndarray:
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", x_train=images[:1], x_test=images)
    (tmp_path / "folder").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "folder" / f"image{number}.png")
    return images


def expected_rows(run: Path, pixels: np.ndarray) -> tuple[list[int], Tensor]:
    model = build_model("cifar_resnet_8", 10)
    model.load_state_dict(torch.load(run / "model_previous.pth", weights_only=True)["state_dict"])
    images = (torch.from_numpy(pixels).float() - torch.tensor(MEAN)) / torch.tensor(STD)
    with torch.no_grad():
        shares, classes = model.eval()(images.permute(0, 3, 1, 2)).softmax(1).max(1)
    return classes.tolist(), shares


def assert_rows(path: Path, names: list[str], classes: list[int], shares: Tensor) -> None:
    rows = list(csv.DictReader(path.open()))
    assert [row["image"] for row in rows] == names
    assert [int(row["class"]) for row in rows] == classes
    assert [float(row["probability"]) for row in rows] == pytest.approx(shares.tolist(), abs=2e-5)


@pytest.mark.parametrize("flags", [None, [], ["--fold-bn"]], ids=["run", "packed", "packed and folded"])
@pytest.mark.parametrize("batch_size", [2, 32])
def test_predicts_what_the_model_does(run: Path, pixels: np.ndarray, flags: list[str] | None, batch_size: int) -> None:
    source = run
    if flags is not None:
        pytest.importorskip("safetensors")
        source = run.parent / "packed.safetensors"
        export.main([str(run), str(source), *flags])
    out = run.parent / "out.csv"
    for images, names in (("images.npz", [*"01234"]), ("folder", [f"image{i}.png" for i in range(5)])):
        predict.main([str(source), str(run.parent / images), "--out", str(out), "--batch-size", str(batch_size)])
        assert_rows(out, names, *expected_rows(run, pixels))


def test_a_packed_file_is_never_made_dense(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("safetensors")
    packed = run.parent / "packed.safetensors"
    export.main([str(run), str(packed)])
    made = []
    monkeypatch.setattr(export.Packed, "dense", lambda entry: made.append(entry.shape) or torch.zeros(entry.shape))
    predict.load_packed(packed)
    assert all(len(shape) < 4 for shape in made)  # the classifier is too small for a kernel


@pytest.mark.parametrize("flags", [[], ["--fold-bn"]], ids=["packed", "packed and folded"])
def test_a_packed_network_needs_no_record_of_images(run: Path, flags: list[str]) -> None:
    pytest.importorskip("safetensors")
    packed = run.parent / "packed.safetensors"
    write_record(run, mean=None)
    export.main([str(run), str(packed), *flags])
    model = build_model("cifar_resnet_8", 10)
    model.load_state_dict(torch.load(run / "model_previous.pth", weights_only=True)["state_dict"])
    assert_equal(predict.load_packed(packed), model.eval(), torch.randn(3, 3, 32, 32))
    with pytest.raises(UsageError, match="images were normalised"):
        predict.load_network(packed)


def test_a_packed_file_that_does_not_say_how_its_network_is_built_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    export.save_sparse(tmp_path / "own.safetensors", nn.Linear(2, 2).state_dict(), {})
    with pytest.raises(UsageError, match="load_sparse"):
        predict.load_packed(tmp_path / "own.safetensors")


def test_without_out_the_table_goes_to_stdout(run: Path, pixels: np.ndarray, capsys, monkeypatch) -> None:
    monkeypatch.setattr(predict, "TIMED_SECONDS", 0.0)
    predict.main([str(run), str(run.parent / "images.npz"), "--time", "--batch-size", "4"])
    shown = capsys.readouterr()
    assert shown.out.splitlines()[0] == "image,class,probability"
    assert len(shown.out.splitlines()) == 6
    assert [line.split(":")[0] for line in shown.err.splitlines()] == ["batch 1", "batch 4"]


def test_with_labels_the_accuracy_is_told(run: Path, pixels: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    classes, _ = expected_rows(run, pixels)
    labels = np.array(classes)
    labels[0] = (labels[0] + 1) % 10
    np.savez(run.parent / "images.npz", x_test=pixels, y_test=labels)
    predict.main([str(run), str(run.parent / "images.npz"), "--out", str(run.parent / "out.csv"), "--batch-size", "2"])
    assert capsys.readouterr().err == "accuracy 80.00 % of 5 images\n"


def test_images_are_resized_and_cut_as_in_evaluation(run: Path, pixels: np.ndarray) -> None:
    write_record(run, resize=32)
    large = np.pad(pixels[0], ((0, 0), (9, 9), (0, 0)))
    Image.fromarray(large).save(run.parent / "folder" / "image0.png")
    predict.main([str(run), str(run.parent / "folder"), "--out", str(run.parent / "out.csv")])
    assert_rows(run.parent / "out.csv", [f"image{i}.png" for i in range(5)], *expected_rows(run, pixels))


def save(**arrays: np.ndarray):
    return lambda folder: np.savez(folder / "images.npz", **arrays)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda folder: write_record(folder / "run", mean=None), UsageError, "mean and std"),
        (lambda folder: write_record(folder / "run", std=[1, 0, 1]), FaultError, "std"),
        (lambda folder: write_record(folder / "run", mean=[1.0]), FaultError, "as many channels"),
        (lambda folder: write_record(folder / "run", builder="os:system"), UsageError, "none of"),
        (lambda folder: (folder / "run" / "config.json").unlink(), UsageError, "how its network is built"),
        (lambda folder: (folder / "run" / "model_previous.pth").unlink(), UsageError, "pre-training"),
        (lambda folder: (folder / "images.npz").unlink(), UsageError, "there is no file"),
        (lambda folder: (folder / "images.npz").write_bytes(b"PK"), FaultError, "damaged"),
        (save(y=np.zeros(3)), UsageError, "neither x_test nor x"),
        (save(x=np.zeros((2, 32, 32, 3))), UsageError, "float64"),
        (save(x=np.zeros((0, 32, 32, 3), np.uint8)), UsageError, "at least"),
        (save(x=np.zeros((2, 28, 28), np.uint8)), UsageError, "28 x 28 x 1 numbers"),
        (save(x=np.zeros((2, 32, 32, 3), np.uint8), y=np.zeros(3, int)), UsageError, "one integer for each of 2"),
        (lambda folder: (folder / "out.csv").write_text("mine"), UsageError, "exists"),
    ],
)
def test_wrong_calls_write_nothing(run: Path, pixels: np.ndarray, change, error, message: str) -> None:
    change(run.parent)
    with pytest.raises(error, match=message):
        predict.main([str(run), str(run.parent / "images.npz"), "--out", str(run.parent / "out.csv")])
    out = run.parent / "out.csv"
    assert not out.exists() or out.read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda folder: [file.unlink() for file in folder.iterdir()], UsageError, "no images"),
        (lambda folder: (folder / "image3.png").write_bytes(b"no"), FaultError, "image3"),
        (lambda folder: Image.fromarray(np.ones((32, 32), np.int32)).save(folder / "a.tif"), UsageError, "8 bits"),
        (lambda folder: Image.new("RGB", (30, 32)).save(folder / "a.png"), UsageError, "32 x 30 x 3"),
    ],
)
def test_folders_that_do_not_serve_are_told(run: Path, pixels: np.ndarray, change, error, message: str) -> None:
    change(run.parent / "folder")
    with pytest.raises(error, match=message):
        predict.main([str(run), str(run.parent / "folder"), "--out", str(run.parent / "out.csv")])
    assert not (run.parent / "out.csv").exists()


def test_without_numba_the_user_is_told_what_to_install(run: Path, pixels: np.ndarray, monkeypatch) -> None:
    monkeypatch.setattr("sparselearning.execution.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install numba"):
        predict.main([str(run), str(run.parent / "images.npz")])


def test_importing_the_library_and_the_script_loads_no_compiler() -> None:
    """Which would double the time until a command answers."""
    import subprocess

    code = "import sys, main_suptickets; print(*sys.modules.keys() & {'numba', 'torch._dynamo', 'torchvision'})"
    path = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=path, check=True, capture_output=True).stdout == b"\n"
