"""What is installed: every module, one version everywhere, and commands that run outside of a clone."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("command", ["report", "export", "predict"])
def test_commands_run_outside_of_a_clone(installed, tmp_path, command):
    done = python("-m", f"sparselearning.{command}", "--help", installed=installed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


def test_version_of_what_is_installed(installed, tmp_path):
    done = python("-m", "sparselearning", "--version", installed=installed, cwd=tmp_path)
    assert done.stdout == f"sparselearning {sparselearning.__version__}\n"


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
