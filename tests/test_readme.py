"""README and docs/ keep their promises: links resolve, flags and figures are current, examples run as printed."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.commands import not_imported
from sparselearning import Masking, report

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / folder) for folder in ("docs", "ImageNet", "CIFAR")]

import main as imagenet  # noqa: E402  found once their folders are on the path
import main_suptickets as cifar  # noqa: E402
import make_flags  # noqa: E402

README = (ROOT / "README.md").read_text()
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))}
FOLDERS = ("CIFAR", "ImageNet", "benchmarks", "docs", "experiments")
SCRIPTS = [
    str(path.relative_to(ROOT))
    for folder in FOLDERS
    for path in sorted((ROOT / folder).glob("*.py"))
    if path.read_text().startswith("#!")
]
assert len(SCRIPTS) >= 10  # or tests with each of them would be skipped without a word
OF_OTHER_PROGRAMS = {"--max_restarts", "--log_dir", "--gpu", "--help"}
"""Flags of torchrun and pytest, and the one that every command has."""


def anchors(page):
    """The anchors that a page's headings get."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (ROOT / page).parent / path if path else ROOT / page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked.read_text()), target


def test_every_page_of_docs_is_one_click_from_the_readme():
    linked = set(re.findall(r"\]\((docs/[^)#]+)", README))
    assert {page for page in PAGES if page.startswith("docs/")} <= linked


def test_the_readme_is_short_and_its_commands_come_first():
    lines = README.splitlines()
    assert len(lines) <= 160
    for command in ("pip install -r requirements.txt", "python CIFAR/main_suptickets.py --demo"):
        assert lines.index(command) < 40
        assert command.split()[-1] in (ROOT / ".ci" / "run").read_text()


def test_the_page_of_flags_is_what_the_parsers_say():
    assert PAGES["docs/flags.md"] == make_flags.page(), "call python docs/make_flags.py"


@pytest.mark.parametrize("page", ["README.md", *(page for page in PAGES if page.startswith("docs/"))])
def test_flags_in_the_text_are_flags(page):
    folders = ("benchmarks", "examples", "experiments")
    scripts = (path.read_text() for folder in folders for path in (ROOT / folder).glob("*.py"))
    known = set(re.findall(r"--[a-zA-Z][\w-]*", PAGES["docs/flags.md"] + "".join(scripts))) | OF_OTHER_PROGRAMS
    named = re.findall(r"`(--[a-zA-Z][\w-]*)", PAGES[page])
    assert set(named) <= known


def command_lines(page):
    """The command lines of both training scripts that can be pasted as they are: script and flags."""
    lines = re.findall(r"^python3? (?:\$1multiproc\.py .*?\$1)?(main(?:_suptickets)?)\.py (.*)$", page, re.MULTILINE)
    return [(name, shlex.split(line.replace("$2 ", ""))) for name, line in lines if "…" not in line]


@pytest.mark.parametrize(("page", "number"), [("README.md", 2), ("docs/command-lines.md", 3), ("docs/imagenet.md", 4)])
def test_published_lines_are_flags_that_fit_together(page, number):
    lines = command_lines(PAGES[page])
    assert len(lines) == number
    for name, words in lines:
        script = {"main_suptickets": cifar, "main": imagenet}[name]
        args = script.parse(words)
        assert args.pre_train
        assert args.cyclic_train


def test_the_readmes_changes_to_its_line_make_the_published_lines():
    ((_, granet), _) = command_lines(README)
    published = [cifar.parse(words) for _, words in command_lines(PAGES["docs/command-lines.md"])]
    changes = [shlex.split(flags) for flags in re.findall(r"^\| (?:RigL|SET) \| `(.*)` \|$", README, re.MULTILINE)]
    assert [cifar.parse(granet + change) for change in ([], *changes)] == published


@pytest.fixture
def not_installed(monkeypatch):
    """As if nobody had installed the library: no file of the clone is imported, and none would be found."""
    finders = [finder for finder in sys.meta_path if not finder.__module__.startswith("__editable__")]
    monkeypatch.setattr(sys, "meta_path", finders)
    with not_imported([ROOT / folder for folder in (*FOLDERS, "sparselearning")], [ROOT, ROOT / "tests"]):
        yield


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_of_a_clone_finds_the_library_without_an_installation(not_installed, script):
    sys.path.insert(0, str((ROOT / script).parent))  # as Python does
    runpy.run_path(str(ROOT / script), run_name="not called")
    assert Path(sys.modules["sparselearning"].__file__).parents[1] == ROOT


def python_blocks(page):
    return re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/library.md"])
def test_library_example_runs(page):
    code = python_blocks(page)[0]
    assert len(code.splitlines()) <= 15
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
    batch = torch.randn(8, 3, 6, 6), torch.randint(4, (8,))
    model(batch[0])
    names = {
        "F": F,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "loader": [batch] * 3,
        "device": "cpu",
        "previous": {name: entry.clone() for name, entry in model.state_dict().items()},
    }
    exec(code, names)
    weights = [model.state_dict()[name] for name in names["masking"].masks]
    total = sum(weight.numel() for weight in weights)
    assert sum(int(weight.count_nonzero()) for weight in weights) == round(0.05 * total)


def test_sparse_execution_in_a_loop_of_ones_own_runs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    masking = Masking(torch.optim.SGD(model.parameters(), lr=0.1), init_density=0.5)
    masking.add_module(model)
    names = {"model": model, "masking": masking}
    exec(python_blocks("docs/speed.md")[0], names)
    images = torch.randn(8, 3, 6, 6)
    torch.testing.assert_close(names["network"](images), model(images))


def test_the_line_about_single_layers_runs():
    (line,) = [code for code in python_blocks("docs/library.md") if code.startswith("masking.add_module")]
    model = nn.ModuleDict(
        {"layer4": nn.ModuleDict({"a": nn.Linear(40, 50)}), "b": nn.Linear(60, 50), "fc": nn.Linear(9, 9)}
    )
    masking = Masking(torch.optim.SGD(model.parameters(), lr=0.1), init_density=0.5)
    exec(line, {"masking": masking, "model": model})
    assert {name: int(mask.sum()) for name, mask in masking.masks.items()} == {
        "layer4.a.weight": 40,
        "b.weight": 2500 - 40,  # half of all 5,000 weights but fc's, which has no mask
    }


@pytest.mark.parametrize("number", [0, 1])
def test_own_model_examples_run(number, capsys):
    code = [code for code in python_blocks("docs/library.md") if "import torch\n" in code][number]
    torch.manual_seed(0)
    exec(code, {"__name__": "example"})
    printed = capsys.readouterr().out.splitlines()[-1]
    assert ("density 0.1000" in printed) if number == 0 else (float(re.search(r"([\d.]+)%", printed)[1]) > 90)


def test_sweep_line_is_a_sweep(monkeypatch, capsys, tmp_path):
    import sweep

    monkeypatch.chdir(tmp_path)
    line = re.search(r"^python CIFAR/sweep.py (.*)$", PAGES["docs/runs.md"], re.MULTILINE)[1]
    flags, rest = line.split(" -- ")
    sweep.main([*flags.split(), "--dry-run", "--", *rest.split()])
    assert (
        capsys.readouterr().out.count("main_suptickets.py") == 18
    )  # three methods, three seeds, each with its control


def test_the_kept_demo_can_be_reported_and_is_what_the_text_says(tmp_path):
    folder = ROOT / "results" / "demo"
    report.main([str(folder), "--out", str(tmp_path), "--no-plots"])
    summary, config = (json.loads((folder / name).read_text()) for name in ("summary.json", "config.json"))
    said = re.search(r"demo --seed 2.*?results/demo/curves", PAGES["docs/runs.md"], re.DOTALL)[0]
    assert f"{summary['final_acc']:.1%} against {summary['ticket_acc'][-1]:.1%}" in said.replace(" %", "%")
    assert f"PyTorch {config['versions']['torch'][:4]}, commit {config['commit']}" in said
    assert config["command"] == "python CIFAR/main_suptickets.py --demo --seed 2"
    accuracy = f"{summary['final_acc']:.1%}".replace("%", " %")
    assert f"`--seed 2`, ended at {accuracy}, as its pre-training had" in README.replace("\n", " ")
    assert summary["pretrain_acc"] == summary["final_acc"]


def test_what_masks_save_is_what_was_measured():
    """The table of docs/speed.md, and the figure that README quotes from it."""
    cells: dict[str, list[str]] = {}
    for row in json.loads((ROOT / "results/speed/sparse-1-thread.json").read_text())["rows"]:
        network, flops = re.match(r"(\S+), density \S+, (\S+) of the FLOPs", row["what"]).groups()
        cells.setdefault(network, []).append(f"{row['ratio']['median']:.2f} ({flops})")
    for network, ratios in cells.items():
        assert f"| {network} | {' | '.join(ratios)} |" in PAGES["docs/speed.md"]
    assert f"ResNet18 at density 0.05 takes {cells['ResNet18'][1].split()[0]} of" in README.replace("\n", " ")


def test_what_masks_save_beside_others_is_what_was_measured():
    """The second table of docs/speed.md, and prediction."""
    medians = {
        (path.stem, row["what"].split(",")[0], row["what"].partition(": ")[2]): row["ratio"]["median"]
        for path in sorted((ROOT / "results/speed").glob("sparse-*.json"))
        for row in json.loads(path.read_text())["rows"]
        if "density 0.05" in row["what"] and "batch 1," not in row["what"]
    }
    page = PAGES["docs/speed.md"]
    for name, what, files in (
        ("the masked step", "step beside masked", ("references", "compiled", "compiled")),
        ("the dense one in bfloat16", "step beside bf16", ("references", "compiled", "compiled")),
        ("the dense one, compiled", "step beside compiled", ("references", "compiled", "compiled")),
        ("the dense one, both on two threads", "step beside dense", ("2-threads",) * 3),
        ("the dense one, both with AVX2 alone", "step beside dense", ("avx2",) * 3),
        ("the masked one: memory", "memory beside masked", ("references", "compiled", "compiled")),
    ):
        keys = zip(files, ("ResNet50", "ResNet18", "cifar_resnet_20"), strict=True)
        cells = [medians.get((f"sparse-{file}", network, what)) for file, network in keys]
        assert f"| {name} | {' | '.join('-' if x is None else f'{x:.2f}' for x in cells)} |" in page
    of_32 = medians["sparse-references", "ResNet50", "prediction beside onnxruntime"]
    assert f"and {of_32:.2f} times at batch 32" in page.replace("\n", " ")
