"""The README keeps its promises: it names every flag, and its library example runs as printed."""

import json
import os
import re
import runpy
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparselearning import report

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SCRIPTS = [
    str(path)
    for folder in ("CIFAR", "ImageNet", "benchmarks", "experiments")
    for path in sorted((ROOT / folder).glob("*.py"))
    if path.read_text().startswith("#!")
]


@pytest.mark.parametrize("script", ["CIFAR/main_suptickets.py", "ImageNet/main.py"])
def test_names_every_flag(script, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    flags = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", capsys.readouterr().out)) - {"--help"}
    flags = {flag for flag in flags if not flag.startswith("--no-") or flag == "--no-cuda"}
    assert len(flags) > 40
    assert {flag for flag in flags if f"`{flag}" not in README} == set()


def test_every_script_of_a_clone_finds_the_library_without_an_installation(tmp_path):
    code = """
import runpy, sys
root, *scripts = sys.argv[1:]
packages = [*sys.path]
for script in scripts:
    sys.path[:] = [script.rpartition("/")[0], *packages]
    for name in [name for name, module in sys.modules.items() if str(getattr(module, "__file__", "")).startswith(root)]:
        del sys.modules[name]
    runpy.run_path(script, run_name="not called")
    assert sys.modules["sparselearning"].__file__.startswith(root)
"""
    # -S: packages installed in place are invisible, those of PYTHONPATH are not.
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, str(ROOT), *SCRIPTS],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")},
        capture_output=True,
        text=True,
    )
    assert len(SCRIPTS) >= 10
    assert done.returncode == 0, done.stderr


def test_library_example_runs():
    code = re.search(r"## The library in ten lines.*?```python\n(.*?)```", README, re.DOTALL).group(1)
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


@pytest.mark.parametrize("number", [0, 1])
def test_own_model_examples_run(number, capsys):
    section = README[README.index("## Bring your own model") : README.index("## What a run leaves behind")]
    code = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[number]
    torch.manual_seed(0)
    exec(code, {"__name__": "example"})
    printed = capsys.readouterr().out.splitlines()[-1]
    assert ("density 0.1000" in printed) if number == 0 else (float(re.search(r"([\d.]+)%", printed)[1]) > 90)


def test_sweep_line_is_a_sweep(monkeypatch, capsys, tmp_path):
    import sweep

    monkeypatch.chdir(tmp_path)
    line = re.search(r"^python CIFAR/sweep.py (.*)$", README, re.MULTILINE)[1]
    flags, rest = line.split(" -- ")
    sweep.main([*flags.split(), "--dry-run", "--", *rest.split()])
    assert (
        capsys.readouterr().out.count("main_suptickets.py") == 18
    )  # three methods, three seeds, each with its control


def test_the_kept_demo_can_be_reported_and_is_what_the_readme_says(tmp_path):
    folder = ROOT / "results" / "demo"
    report.main([str(folder), "--out", str(tmp_path), "--no-plots"])
    summary, config = (json.loads((folder / name).read_text()) for name in ("summary.json", "config.json"))
    said = re.search(r"demo --seed 2.*?results/demo/curves", README, re.DOTALL)[0]
    assert f"{summary['final_acc']:.1%} against {summary['ticket_acc'][-1]:.1%}" in said.replace(" %", "%")
    assert f"PyTorch {config['versions']['torch'][:4]}, commit {config['commit']}" in said
    assert config["command"] == "python CIFAR/main_suptickets.py --demo --seed 2"
