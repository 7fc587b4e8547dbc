"""The speed benchmark runs, its references compute what the library does, and verdicts follow from figures."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparselearning.process.errors import FaultError, UsageError
from sparselearning.process.files import check_output
from sparselearning.sparse.superpose import prune_to_density
from sparselearning.sparse.topology import Layer, shrink_globally

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import references
import sparse
import speed
from comparison import COMMAND, Bar, Row, Side, alternate, plot

TINY = speed.Setting(
    model="cifar_resnet_8",
    classes=4,
    batch_size=4,
    density=0.1,
    images=8,
    repeats=1,
    compile=False,
    device=torch.device("cpu"),
)


def test_one_command_measures_everything(tmp_path, capsys):
    out, plot = tmp_path / "speed.json", tmp_path / "speed.png"
    argv = ["--model", "cifar_resnet_8", "--classes", "4", "--batch-size", "4", "--images", "8", "--repeats", "1"]
    argv += ["--device", "cpu", "--no-compile"]
    argv += ["--out", str(out)]
    if importlib.util.find_spec("matplotlib"):
        argv += ["--plot", str(plot)]
    speed.main(argv)

    report, table = json.loads(out.read_text()), capsys.readouterr().out
    rows = {row["what"]: row for row in report["rows"]}
    assert rows.keys() >= {what for what in speed.BARS if "compiled" not in what}
    for what, row in rows.items():
        assert what in table
        assert len(row["this"]) == len(row["reference"]) == 1
        assert row["ratio"]["median"] == row["this"][0] / row["reference"][0] > 0
        assert row["bars"] == []  # they are ResNet50's
    assert report["machine"]["versions"]["torch"] == torch.__version__
    assert plot.exists() == ("--plot" in argv)

    speed.main(["--show", str(out)])
    shown = capsys.readouterr().out
    assert f"| {report['rows'][0]['what']} | " in shown
    assert report["title"] in shown
    out.write_text('{"rows": [{}], "title": "none"}')
    with pytest.raises(FaultError, match=r"speed\.json is damaged"):
        speed.main(["--show", str(out)])


@pytest.mark.parametrize("flag", ["--out", "--plot"])
def test_no_other_file_is_replaced(tmp_path, flag):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UsageError, match="mine exists, and is no earlier output"):
        speed.main(["--device", "cpu", flag, str(tmp_path / "mine")])


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="needs matplotlib")
def test_a_picture_may_be_replaced_by_a_later_one(tmp_path):
    path = tmp_path / "speed.png"
    for _ in range(2):
        check_output(path, COMMAND)
        plot([Row("a", "ms", [1.0], [2.0])], "title", path)


def test_a_row_survives_its_file():
    row = Row("x", "ms", [1.0, 2.0], [4.0, 4.0], [Bar(0.5, stretch=0.4), Bar(9, of_figure=True)])
    assert Row.from_json(json.loads(json.dumps(row.as_json()))) == row


def test_the_page_about_speed_shows_the_measured_table():
    root = Path(__file__).parents[1]
    assert speed.markdown_of(root / "results/speed/cpu.json") in (root / "docs" / "speed.md").read_text()


def test_bars_name_rows_of_resnet50():
    resnet50 = replace(TINY, **speed.BARS_HOLD_FOR)
    assert speed.bars(resnet50, "mask application") == [Bar(0.25)]
    assert speed.bars(resnet50, "BatchNorm pass") == []
    for other in (TINY, replace(resnet50, density=0.9), replace(resnet50, batch_size=1)):
        assert speed.bars(other, "mask application") == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_is_refused():
    with pytest.raises(UsageError, match="--device cpu"):
        speed.main(["--device", "cuda"])


class TestReferences:
    def test_apply_as_the_library_does(self):
        ours, theirs = speed.SparseNetwork(TINY), speed.SparseNetwork(TINY)
        masks = theirs.float_masks()
        for network in (ours, theirs):
            network.optimizer.step()
        ours.masking.apply_masks()
        masks.apply()
        for name, weight in ours.weights.items():
            assert torch.equal(weight, theirs.weights[name])
            momenta = [n.optimizer.state[n.weights[name]]["momentum_buffer"] for n in (ours, theirs)]
            assert torch.equal(*momenta)

    def test_prune_and_grow_as_the_library_does(self):
        ours, theirs = speed.SparseNetwork(TINY), speed.SparseNetwork(TINY)
        masks = theirs.float_masks()
        ours.masking.truncate_weights()
        masks.prune_and_grow(speed.PRUNE_RATE, "gradient")
        for name, mask in ours.masking.masks.items():
            assert torch.equal(mask.float(), masks.masks[name])
            assert torch.equal(ours.weights[name], theirs.weights[name])

    def test_grow_at_random_as_many_as_were_removed(self):
        network = speed.SparseNetwork(TINY)
        masks = network.float_masks()
        masks.prune_and_grow(speed.PRUNE_RATE, "random")
        for name, mask in network.masking.masks.items():
            assert masks.masks[name].sum() == mask.sum()
            assert not torch.equal(masks.masks[name], mask.float()) or mask.all()

    def test_prune_as_the_library_does(self):
        network = speed.SparseNetwork(TINY)
        state, names = network.model.state_dict(), list(network.weights)
        ours, masks = prune_to_density(state, names, 0.05)
        theirs = references.prune_to_density(state, names, 0.05)
        assert all(torch.equal(ours[name], theirs[name]) for name in state)

        weights = [state[name] for name in names]
        layers = [
            Layer(weight.flatten(), network.masking.masks[name].flatten().clone())
            for name, weight in zip(names, weights, strict=True)
        ]
        shrink_globally(layers, 0.05)
        kept = references.gradual_prune(weights, list(network.masking.masks.values()), 0.05)
        for layer, mask, name in zip(layers, kept, names, strict=True):
            assert torch.equal(layer.mask, mask.flatten())
            assert torch.equal(mask, masks[name])


class TestComparison:
    def test_sides_take_turns_after_a_round_that_is_not_counted(self):
        log = []
        sides = [
            Side(lambda: log.append("a"), prepare=lambda: log.append("prepare a")),
            Side(lambda: log.append("b"), work=10),
        ]
        seconds = alternate(sides, 2, torch.device("cpu"))
        assert log == ["prepare a", "a", "b"] * 3
        assert [len(samples) for samples in seconds] == [2, 2]

    def test_ratios_are_taken_round_by_round(self):
        row = Row.of_times("x", [0.001, 0.002, 0.003], [0.002, 0.004, 0.003])
        assert row.this == [1, 2, 3]
        assert row.ratios == [0.5, 0.5, 1]
        assert row.as_json()["ratio"] == {"median": 0.5, "min": 0.5, "max": 1}

    @pytest.mark.parametrize(
        ("bar", "verdict"),
        [
            (Bar(0.5), "pass"),
            (Bar(0.49), "FAIL"),
            (Bar(0.6, stretch=0.5), "stretch"),
            (Bar(0.6, stretch=0.4), "pass"),
            (Bar(20, of_figure=True), "pass"),
            (Bar(9, of_figure=True), "FAIL"),
        ],
    )
    def test_of_times_less_is_better(self, bar, verdict):
        assert Row("x", "ms", [10.0], [20.0]).verdict(bar) == verdict

    @pytest.mark.parametrize(
        ("bar", "verdict"),
        [(Bar(2), "pass"), (Bar(2.1), "FAIL"), (Bar(1, stretch=2), "stretch"), (Bar(41, of_figure=True), "FAIL")],
    )
    def test_of_rates_more_is_better(self, bar, verdict):
        row = Row("x", "images/s", [40.0], [20.0], [bar])
        assert row.verdict(bar) == verdict
        assert verdict in row.cells()[-1]


def test_sparse_steps_memory_prediction_and_kernels_are_measured_beside_their_references(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sparse, "LAYERS", [(5, 7, 3, 4, 0.5), (9, 4, 1, 4, 0.5)])
    of_a_process = sparse.peak_megabytes  # which takes seconds to start: one is enough
    monkeypatch.setattr(
        sparse, "peak_megabytes", lambda side, *case: of_a_process(side, *case) if side == "sparse" else 1
    )
    threads = torch.get_num_threads()
    try:
        sparse.main(["--quick", "--out", str(tmp_path / "steps.json")])
        table = capsys.readouterr().out.splitlines()
        sparse.main(["--quick", "--kernels", "--out", str(tmp_path / "kernels.json")])
    finally:
        torch.set_num_threads(threads)
    steps, kernels = (json.loads((tmp_path / f"{name}.json").read_text())["rows"] for name in ("steps", "kernels"))
    (case,) = {row["what"].partition(": ")[0] for row in steps}
    assert case.startswith("cifar_resnet_8, density 0.1, 0.")
    whats = ["step beside dense", "step beside masked"]
    whats += ["memory beside masked"] * Path("/proc/self/status").exists()
    whats += ["prediction beside onnxruntime"] * (importlib.util.find_spec("onnxruntime") is not None)
    assert [row["what"].partition(": ")[2] for row in steps] == whats
    assert all(line.strip().startswith(what) for line, what in zip(table[3:], [case, *whats], strict=True))
    assert all(row["this"][0] > 0 < row["reference"][0] for row in steps)
    assert [row["unit"] for row in kernels] == ["GFLOP/s"] * 2


def test_the_table_of_sparse_steps_names_bars_and_fits_100_columns():
    what = "cifar_resnet_20, density 0.05, 0.084 of the FLOPs, batch 128, 2 threads: "
    slow = Row(what + "step beside compiled", "ms", [11234.5, 12345.6], [22345.6, 23456.7], [Bar(0.45, 0.3)])
    rate = Row(what + "prediction beside onnxruntime", "images/s", [40000.0], [10000.0], [Bar(3, 5)])
    lines = [*sparse.lines_of(slow, None), *sparse.lines_of(rate, slow)]
    assert len(lines) == 3
    assert lines[0] == what[:-2]
    assert lines[1].endswith("≤ 0.45: FAIL")
    assert lines[2].endswith("≥ 3: pass")
    assert max(map(len, lines)) <= 100


def test_only_bars_of_their_own_size_are_held(monkeypatch):
    monkeypatch.setattr(sparse, "alternate", lambda sides, repeats, device: [[1.0], [2.0]])
    for name, batch, limits in (("cifar_resnet_20", 64, [0.45]), ("lenet5", 64, [0.4]), ("lenet5", 2, [])):
        (row,) = sparse.training_rows(name, 0.05, batch, ["dense"], 1)
        assert [bar.limit for bar in row.bars] == limits
