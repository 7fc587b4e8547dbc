"""Packed files come back to the bit, folding changes no output, ONNX agrees, and wrong calls are told so."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cifar_models import build_model
from torch import nn

from sparselearning import export
from sparselearning.export import check_folded, fold_batchnorms, load_sparse, save_sparse, to_onnx
from sparselearning.process.errors import FaultError, UsageError

safetensors_torch = pytest.importorskip("safetensors.torch")


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def sparse(*shape: int, density: float = 0.05, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < density) + 0.0


class TestPackedFile:
    def test_eight_weights_by_hand(self, tmp_path):
        weight = torch.tensor([[0.0, 3, 0, 0], [-1, 0, 0, 2]])
        save_sparse(tmp_path / "w.safetensors", {"w": weight}, {})
        stored = safetensors_torch.load_file(tmp_path / "w.safetensors")
        assert stored.keys() == {"w.values", "w.positions"}
        assert stored["w.values"].tolist() == [3, -1, 2]
        assert stored["w.positions"].tolist() == [2**1 + 2**4 + 2**7]

    @pytest.mark.parametrize(
        "entry",
        [
            sparse(7, 9),
            sparse(5, 3, 3, 3).to(memory_format=torch.channels_last),
            sparse(40, 3).bfloat16(),
            sparse(40, 3).double(),
            torch.tensor([0.0, float("nan"), float("inf"), -1e-45] + 100 * [0.0]),
            torch.zeros(33),
            torch.ones(33),
            torch.zeros(0, 4),
            torch.tensor(12345),
            torch.arange(100) // 99,
            torch.arange(100) == 50,
            nn.Parameter(sparse(8, 8)),
        ],
        ids=lambda entry: f"{entry.dtype}-{list(entry.shape)}",
    )
    def test_comes_back_to_the_bit(self, tmp_path, entry):
        before = entry.clone()
        save_sparse(tmp_path / "x.safetensors", {"x": entry}, {})
        loaded = load_sparse(tmp_path / "x.safetensors")[0]["x"]
        assert (loaded.dtype, loaded.shape) == (entry.dtype, entry.shape)
        assert bits(loaded) == bits(before.detach())
        assert bits(entry.detach()) == bits(before.detach())

    def test_negative_zeros_are_zeros(self, tmp_path):
        weight = sparse(50, 50) * -1.0
        save_sparse(tmp_path / "x.safetensors", {"x": weight}, {})
        loaded, metadata = load_sparse(tmp_path / "x.safetensors")
        assert metadata["densities"]["x"] == weight.count_nonzero().item() / weight.numel()
        assert torch.equal(loaded["x"], weight)

    def test_metadata_and_order_come_back(self, tmp_path):
        state = {"z.weight": sparse(20, 20), "a": torch.ones(3), "m.weight": sparse(30, 30)}
        save_sparse(tmp_path / "x.safetensors", state, {"model": "lenet", "network": {"arguments": {"n": 1}}})
        loaded, metadata = load_sparse(tmp_path / "x.safetensors")
        assert list(loaded) == list(state)
        assert metadata["model"] == "lenet"
        assert metadata["network"] == {"arguments": {"n": 1}}
        assert metadata["format_version"] == 1
        assert metadata["shapes"] == {"z.weight": [20, 20], "a": [3], "m.weight": [30, 30]}
        assert metadata["densities"] == {
            name: state[name].count_nonzero().item() / state[name].numel() for name in ("z.weight", "m.weight")
        }

    def test_tied_weights_are_stored_twice(self, tmp_path):
        weight = torch.ones(4)
        save_sparse(tmp_path / "x.safetensors", {"a": weight, "b": weight}, {})
        assert load_sparse(tmp_path / "x.safetensors")[0]["b"].tolist() == [1, 1, 1, 1]

    def test_costs_one_bit_per_weight_and_four_bytes_per_value(self, tmp_path):
        weight = torch.zeros(1_000_000)
        weight[:50_000] = 1
        save_sparse(tmp_path / "x.safetensors", {"x": weight}, {})
        assert 0 < (tmp_path / "x.safetensors").stat().st_size - (125_000 + 200_000) < 1000

    def test_dense_entries_stay_as_they_are(self, tmp_path):
        save_sparse(tmp_path / "x.safetensors", {"x": torch.ones(100)}, {})
        assert safetensors_torch.load_file(tmp_path / "x.safetensors").keys() == {"x"}

    def test_without_safetensors_the_user_is_told_what_to_install(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
        with pytest.raises(UsageError, match="pip install safetensors"):
            save_sparse(tmp_path / "x.safetensors", {"x": torch.ones(1)}, {})


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def damage_not_ours(path: Path) -> None:
    safetensors_torch.save_file({"x": torch.ones(2)}, path, {"format": "pt"})


def resaved(change: Callable[[dict, dict], None]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        tensors = safetensors_torch.load_file(path)
        change(tensors, metadata)
        safetensors_torch.save_file(tensors, path, metadata)

    return damage


DAMAGES = {
    "truncated": damage_truncate,
    "not ours": damage_not_ours,
    "newer version": resaved(lambda tensors, metadata: metadata.update(format_version="2")),
    "no values": resaved(lambda tensors, metadata: tensors.pop("x.values")),
    "a value too few": resaved(lambda tensors, metadata: tensors.update({"x.values": tensors["x.values"][1:].clone()})),
    "a short bitmap": resaved(lambda tensors, metadata: tensors.update({"x.positions": torch.zeros(1).byte()})),
    "other shape": resaved(lambda tensors, metadata: metadata.update(shapes='{"x": [1000000, 1000000]}')),
    "no JSON": resaved(lambda tensors, metadata: metadata.update(shapes="{")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_files_are_refused(tmp_path, damage):
    path = tmp_path / "x.safetensors"
    save_sparse(path, {"x": sparse(20, 20)}, {})
    damage(path)
    with pytest.raises(FaultError, match=r"x\.safetensors"):
        load_sparse(path)


def test_a_missing_file_is_a_wrong_call(tmp_path):
    with pytest.raises(UsageError, match="there is no file"):
        load_sparse(tmp_path / "x.safetensors")


def trained(network: nn.Module) -> nn.Module:
    """Half of the weights zero, and statistics, scales and shifts as training might leave them."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.masked_fill_(torch.rand_like(parameter) < 0.5, 0)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.normal_()
                module.bias.normal_()
                if module.running_mean is not None:
                    module.running_mean.normal_()
                    module.running_var.uniform_(0.5, 2)
    return network.eval()


def batchnorms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


class Graph(nn.Module):
    """Two convolutions, two BatchNorms, and a forward pass that decides how they are wired."""

    def __init__(self, wiring: Callable[["Graph", torch.Tensor], torch.Tensor], track: bool = True):
        super().__init__()
        self.conv, self.other = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.norm2 = nn.BatchNorm2d(4, track_running_stats=track), nn.BatchNorm2d(4)
        self.wiring = wiring

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wiring(self, x)


class TestFolding:
    def test_one_channel_by_hand(self):
        network = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1, eps=0))
        with torch.no_grad():
            network[0].weight.fill_(2)
            network[1].weight.fill_(3)
            network[1].bias.fill_(1)
            network[1].running_mean.fill_(4)
            network[1].running_var.fill_(9)
        folded = fold_batchnorms(network)
        assert folded.state_dict().keys() == {"0.weight", "0.bias"}
        assert folded.get_parameter("0.weight").item() == pytest.approx(2 * 3 / 3)
        assert folded.get_parameter("0.bias").item() == pytest.approx((0 - 4) * 3 / 3 + 1)
        assert network.training
        assert network[0].weight.item() == 2

    @pytest.mark.parametrize(
        ("name", "left"), [("cifar_resnet_8", 0), ("ResNet18", 0), ("vgg11", 0), ("wrn-10-1", 4), ("lenet5", 0)]
    )
    def test_networks_compute_what_they_did(self, name, left):
        network = trained(build_model(name, 10))
        folded = fold_batchnorms(network)
        assert batchnorms(folded) == left
        check_folded(folded, network, (3, 32, 32))

    def test_zeros_stay_zero(self):
        network = trained(build_model("cifar_resnet_8", 10))
        for name, parameter in fold_batchnorms(network).named_parameters():
            if parameter.dim() == 4:
                assert not parameter[network.get_parameter(name) == 0].any()

    @pytest.mark.parametrize(
        ("wiring", "left"),
        [
            (lambda m, x: m.norm2(m.other(m.norm(m.conv(x)))), 0),
            (lambda m, x: m.norm(m.conv(x)) + m.norm(m.other(x)), 0),
            (lambda m, x: m.norm(m.conv(x.relu()).relu()), 1),
            (lambda m, x: m.norm(x), 1),
            (lambda m, x: (lambda y: m.norm(y) + y)(m.conv(x)), 1),
            (lambda m, x: m.norm(m.conv(m.conv(x))), 1),
            (lambda m, x: (lambda y: m.norm(y) + m.norm2(y))(m.conv(x)), 2),
            (lambda m, x: F.conv2d(m.norm(m.conv(x)), m.conv.weight), 1),
        ],
        ids=[
            "chain",
            "shared norm",
            "relu between",
            "no conv",
            "output used twice",
            "conv used twice",
            "two norms",
            "weight read",
        ],
    )
    def test_only_what_is_unambiguous_is_folded(self, wiring, left):
        network = trained(Graph(wiring))
        folded = fold_batchnorms(network)
        assert batchnorms(folded) == left
        check_folded(folded, network, (4, 6, 6))

    def test_batch_statistics_cannot_be_folded(self):
        assert batchnorms(fold_batchnorms(Graph(lambda m, x: m.norm(m.conv(x)), track=False))) == 1

    def test_a_network_that_branches_on_data_is_refused(self):
        with pytest.raises(UsageError, match="cannot be folded"):
            fold_batchnorms(Graph(lambda m, x: m.conv(x) if x.sum() > 0 else x))

    def test_another_network_is_noticed(self):
        network = trained(build_model("cifar_resnet_8", 10))
        with pytest.raises(FaultError, match="folded BatchNorms differs"):
            check_folded(build_model("cifar_resnet_8", 10).eval(), network, (3, 32, 32))

    def test_a_packed_file_loads_into_a_newly_folded_network(self, tmp_path):
        network = trained(build_model("cifar_resnet_8", 10))
        save_sparse(tmp_path / "x.safetensors", fold_batchnorms(network).state_dict(), {})
        again = fold_batchnorms(build_model("cifar_resnet_8", 10))
        again.load_state_dict(load_sparse(tmp_path / "x.safetensors")[0])
        check_folded(again, network, (3, 32, 32))


@pytest.fixture
def onnx():
    for module in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(module)


class TestOnnx:
    def test_takes_batches_of_any_size(self, onnx):
        import onnxruntime

        network = trained(build_model("cifar_resnet_8", 10))
        session = onnxruntime.InferenceSession(to_onnx(network, (3, 32, 32)), providers=["CPUExecutionProvider"])
        for size in (1, 5):
            images = torch.randn(size, 3, 32, 32)
            (logits,) = session.run(["logits"], {"images": images.numpy()})
            torch.testing.assert_close(torch.from_numpy(logits), network(images), atol=1e-4, rtol=1e-4)

    def test_a_file_that_computes_something_else_is_refused(self, onnx):
        network = Graph(lambda m, x: m.conv(x) + torch.rand_like(x)).eval()
        with pytest.raises(FaultError, match="onnxruntime, differs"):
            to_onnx(network, (4, 6, 6))

    def test_what_cannot_be_converted_is_told(self, onnx):
        with pytest.raises(FaultError, match=r"cannot be converted to ONNX: .*data-dependent[^\n]*$"):
            to_onnx(Graph(lambda m, x: m.conv(x) if x.sum() > 0 else x).eval(), (4, 6, 6))

    def test_without_onnxruntime_the_user_is_told_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(UsageError, match="pip install onnx onnxscript onnxruntime"):
            to_onnx(nn.Identity(), (1,))


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A run's folder, as far as the exporter reads it, of a network whose code lies in a folder of its own."""
    code = tmp_path / "code"
    code.mkdir()
    (code / "tiny_network_to_export.py").write_text(
        "from torch import nn\n"
        "from sparselearning.training.builders import network_builder\n"
        "@network_builder\n"
        "def build(width):\n"
        "    body = nn.Sequential(nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU())\n"
        "    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))\n"
    )
    folder = tmp_path / "run"
    (folder / "tickets").mkdir(parents=True)
    monkeypatch.syspath_prepend(code)
    from tiny_network_to_export import build

    network = trained(build(16))
    saved = {"state_dict": network.state_dict(), "masks": {}, "epoch": 3}
    torch.save(saved, folder / "model_previous.pth")
    torch.save(saved, folder / "tickets" / "ticket_1.pth")
    write_config(folder)
    return folder


def write_config(run: Path, **changes: object) -> None:
    builder = "tiny_network_to_export:build"
    record = {"builder": builder, "arguments": {"width": 16}, "input_shape": [3, 8, 8], **changes}
    config = {"model": "tiny", "data": "somewhere/pictures.npz", "network": record}
    (run / "config.json").write_text(json.dumps(config))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "model_previous.pth", weights_only=True)["state_dict"]


class TestCommand:
    @pytest.mark.parametrize("source", [".", "model_previous.pth", "tickets/ticket_1.pth"])
    def test_exports_a_run_or_a_file_of_it(self, run, tmp_path, source, capsys):
        export.main([str(run / source), str(tmp_path / "out.safetensors")])
        state, metadata = load_sparse(tmp_path / "out.safetensors")
        expected = weights(run)
        assert list(state) == list(expected)
        assert all(bits(state[name]) == bits(expected[name]) for name in expected)
        assert metadata["model"] == "tiny"
        assert metadata["data"] == "pictures"
        assert metadata["network"]["arguments"] == {"width": 16}
        assert str(tmp_path) not in json.dumps(metadata)
        assert "out.safetensors: 0.00 MB" in capsys.readouterr().out

    def test_folds_and_converts(self, run, tmp_path, onnx, capsys):
        export.main([str(run), str(tmp_path / "out.safetensors"), "--fold-bn", "--onnx", str(tmp_path / "out.onnx")])
        state, metadata = load_sparse(tmp_path / "out.safetensors")
        assert metadata["folded_batchnorms"] == 1
        assert state.keys() == {"0.0.weight", "0.0.bias", "3.weight", "3.bias"}
        onnx_file = (tmp_path / "out.onnx").read_bytes()
        assert b"images" in onnx_file
        assert not any(str(folder).encode() in onnx_file for folder in (tmp_path, Path(torch.__file__).parent))
        assert "agrees with PyTorch" in capsys.readouterr().out

    def test_a_bare_state_dict_needs_no_config(self, run, tmp_path):
        (tmp_path / "elsewhere").mkdir()
        torch.save({f"module.{name}": entry for name, entry in weights(run).items()}, tmp_path / "elsewhere" / "w.pth")
        export.main([str(tmp_path / "elsewhere" / "w.pth"), str(tmp_path / "out.safetensors")])
        assert load_sparse(tmp_path / "out.safetensors")[0].keys() == weights(run).keys()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda run: (run / "config.json").unlink(), "no config.json"),
            (lambda run: (run / "config.json").write_text("{}"), "no config.json"),
            (lambda run: write_config(run, builder="os:system", arguments={"command": "touch called"}), "none of"),
            (lambda run: write_config(run, builder=None), "cannot be built"),
            (lambda run: write_config(run, builder="no_such_module:build"), "PYTHONPATH"),
            (lambda run: write_config(run, builder="json:no_such_function"), "none of"),
            (lambda run: write_config(run, builder="tiny_network_to_export:nn"), "none of"),
            (lambda run: write_config(run, arguments={"depth": 8}), "cannot be built"),
            (lambda run: write_config(run, arguments={"width": 8}), "another model"),
            (lambda run: (run / "model_previous.pth").unlink(), "pre-training"),
            (lambda run: torch.save({"epoch": 3}, run / "model_previous.pth"), "epoch is no tensor"),
        ],
    )
    def test_wrong_calls_write_nothing(self, run, tmp_path, change, message):
        change(run)
        with pytest.raises(UsageError, match=message):
            export.main([str(run), str(tmp_path / "out.safetensors"), "--fold-bn"])
        assert not (tmp_path / "out.safetensors").exists()

    @pytest.mark.parametrize("names", [("out.pth", "out.onnx"), ("out.safetensors", "out.pth")])
    def test_a_name_of_another_kind_is_refused(self, run, tmp_path, names):
        with pytest.raises(UsageError, match="ends in"):
            export.main([str(run), str(tmp_path / names[0]), "--onnx", str(tmp_path / names[1])])

    def test_a_fault_leaves_what_was_there(self, run, tmp_path, onnx, monkeypatch):
        export.main([str(run), str(tmp_path / "out.safetensors")])  # anything else would be refused at once
        earlier = (tmp_path / "out.safetensors").read_bytes()
        monkeypatch.setattr(export, "TOLERANCE", -1)
        with pytest.raises(FaultError, match="differs"):
            export.main([str(run), str(tmp_path / "out.safetensors"), "--onnx", str(tmp_path / "out.onnx")])
        assert (tmp_path / "out.safetensors").read_bytes() == earlier
        assert not (tmp_path / "out.onnx").exists()

    def test_a_damaged_config_is_a_fault(self, run, tmp_path):
        (run / "config.json").write_text("{")
        with pytest.raises(FaultError, match=r"config\.json"):
            export.main([str(run), str(tmp_path / "out.safetensors")])


DAMAGED_METADATA = [
    ("shapes", "3"), ("shapes", "[]"), ("shapes", '{"w": "many"}'), ("shapes", '{"w": [-8, -8]}'),
    ("shapes", '{"w": [2, 2]}'), ("shapes", '{"other": [8, 8]}'), ("densities", "null"), ("densities", '{"w": "1"}'),
    ("densities", '{"w": NaN}'), ("densities", "{}"), ("shapes", "no JSON"), ("shapes", "[" * 100_000),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text"), DAMAGED_METADATA, ids=[f"{n}: {t[:20]}" for n, t in DAMAGED_METADATA])
def test_damaged_metadata_are_told(tmp_path, name, text):
    path = tmp_path / "x.safetensors"
    save_sparse(path, {"w": sparse(8, 8)}, {})
    with safetensors_torch.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    safetensors_torch.save_file(safetensors_torch.load_file(path), path, metadata | {name: text})
    with pytest.raises(FaultError, match=r"x\.safetensors is damaged"):
        load_sparse(path)


def test_the_wrong_positions_are_told(tmp_path):
    path = tmp_path / "x.safetensors"
    save_sparse(path, {"w": sparse(8, 8)}, {})
    with safetensors_torch.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = safetensors_torch.load_file(path)
    safetensors_torch.save_file(tensors | {"w.positions": tensors["w.positions"].float()}, path, metadata)
    with pytest.raises(FaultError, match=r"x\.safetensors is damaged.*: w"):
        load_sparse(path)


def test_an_export_replaces_an_earlier_one_and_nothing_else(run, tmp_path):
    out = tmp_path / "out.safetensors"
    for _ in range(2):
        export.main([str(run), str(out)])
    out.write_text("mine")
    with pytest.raises(UsageError, match=r"out\.safetensors exists"):
        export.main([str(run), str(out)])
    assert out.read_text() == "mine"
