"""What is installed: every module, one version everywhere, and commands that run outside of a clone."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch
from cifar_models import build_model

import sparselearning
from sparselearning.__main__ import main

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what the wheel holds, built from the files that a wheel is made of."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(
        ROOT / "sparselearning", folder / "clone" / "sparselearning", ignore=shutil.ignore_patterns("*.pyc")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE", "requirements.txt"):
        shutil.copy(ROOT / name, folder / "clone")
    build = "from setuptools.build_meta import build_wheel; build_wheel('..')"
    subprocess.run([sys.executable, "-c", build], cwd=folder / "clone", check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    assert wheel.name == f"sparselearning-{sparselearning.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def python(*words, installed, cwd):
    # -S: packages installed in place are invisible, those of PYTHONPATH are not.
    path = os.pathsep.join([str(installed), sysconfig.get_path("purelib")])
    command = [sys.executable, "-S", *words]
    return subprocess.run(command, cwd=cwd, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)


def test_the_wheel_holds_every_module(installed):
    there = {path.relative_to(ROOT) for path in (ROOT / "sparselearning").rglob("*.py")}
    assert {path.relative_to(installed) for path in installed.rglob("*.py")} == there
    assert (installed / "sparselearning" / "py.typed").exists()


COMMANDS = ["report", "analyze", "export", "predict"]
VERSION_AND_HELP = """
import runpy, sys
for module, flag in [("", "--version"), *((f".{command}", "--help") for command in sys.argv[1:])]:
    sys.argv = [module, flag]
    try:
        runpy.run_module(f"sparselearning{module}", run_name="__main__")
    except SystemExit as end:
        assert not end.code
"""


def test_commands_run_outside_of_a_clone(installed, tmp_path):
    done = python("-c", VERSION_AND_HELP, *COMMANDS, installed=installed, cwd=tmp_path)
    assert done.stderr == ""
    version, *usages = [line for line in done.stdout.splitlines() if line.startswith(("sparselearning ", "usage: "))]
    assert version == f"sparselearning {sparselearning.__version__}"
    for usage, command in zip(usages, COMMANDS, strict=True):
        assert usage.startswith(f"usage: python -m sparselearning.{command} [-h]")


@pytest.mark.parametrize(("cwd", "own", "code"), [("CIFAR", False, 0), ("tests", True, 0), ("tests", False, 2)])
def test_where_networks_are_built_again(installed, tmp_path, cwd, own, code):
    """By a clone's own library, and beside one in the folder of the script that trained the network; nowhere else."""
    run, out = tmp_path / "run", tmp_path / "out.safetensors"
    run.mkdir()
    torch.save(build_model("lenet5", 10, 1, 28).state_dict(), run / "model_previous.pth")
    arguments = {"name": "lenet5", "num_classes": 10, "in_channels": 1, "image_size": 28}
    network = {"builder": "cifar_models:build_model", "arguments": arguments, "input_shape": [1, 28, 28]}
    (run / "config.json").write_text(json.dumps({"network": network}))
    done = python(
        "-m", "sparselearning.export", str(run), str(out), "--fold-bn",
        installed=ROOT if own else installed, cwd=ROOT / cwd,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert out.exists() == (code == 0)
    assert ("put the folder of the code that trained it on PYTHONPATH" in done.stderr) == (code == 2)


def test_the_library_knows_no_folder_of_the_repository(installed):
    for path in installed.rglob("*.py"):
        assert not re.search(r"sys\.path|cifar|imagenet", path.read_text(), re.IGNORECASE), path


def test_one_version_everywhere():
    citation, changes = ((ROOT / name).read_text() for name in ("CITATION.cff", "CHANGELOG.md"))
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE)[1] == sparselearning.__version__
    assert re.search(r"^## ([\d.]+)", changes, re.MULTILINE)[1] == sparselearning.__version__


def test_a_wrong_flag_is_told(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--versoin"])
    assert end.value.code == 2
    told = (
        "python -m sparselearning: error: unrecognized arguments: --versoin; did you mean --version? (--help lists all"
    )
    assert told in capsys.readouterr().err
