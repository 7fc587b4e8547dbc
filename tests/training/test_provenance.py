"""What a run says about the code and the machine that made it."""

import subprocess
from pathlib import Path

import pytest
import torch

from sparselearning.training import provenance


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository whose only code is a copy of the module."""
    module = tmp_path / "package" / "provenance.py"
    module.parent.mkdir()
    module.write_text("# code\n")
    (tmp_path / "NOTES.md").write_text("notes\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "-c", "user.name=n", "-c", "user.email=e", "commit", "--quiet", "-m", "first")
    monkeypatch.setattr(provenance, "__file__", str(module))
    yield tmp_path
    provenance.commit.cache_clear()


def git(folder, *words):
    return subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_is_named_and_marked_if_code_changed(checkout):
    head = git(checkout, "rev-parse", "--short", "HEAD")
    assert provenance.commit.__wrapped__() == head
    (checkout / "NOTES.md").write_text("others\n")
    (checkout / "package" / "new.txt").write_text("untracked\n")
    assert provenance.commit.__wrapped__() == head
    (checkout / "package" / "provenance.py").write_text("# other code\n")
    assert provenance.commit.__wrapped__() == f"{head}-dirty"


def test_code_that_no_checkout_tracks_has_no_commit(checkout, tmp_path_factory, monkeypatch):
    installed = checkout / "site-packages" / "provenance.py"
    installed.parent.mkdir()
    installed.write_text("")
    outside = tmp_path_factory.mktemp("outside") / "provenance.py"
    for path in (installed, outside):
        monkeypatch.setattr(provenance, "__file__", str(path))
        assert provenance.commit.__wrapped__() is None
    monkeypatch.setenv("PATH", "")
    assert provenance.commit.__wrapped__() is None


def test_a_process_asks_once_for_its_commit(checkout):
    provenance.commit.cache_clear()
    head = provenance.commit()
    (checkout / "package" / "provenance.py").write_text("# code that this process has not loaded\n")
    assert provenance.commit() == head == git(checkout, "rev-parse", "--short", "HEAD")


def test_a_cpu_is_named_with_its_bfloat16_units(monkeypatch):
    text = "processor\t: 0\nmodel name\t: Fast CPU\nflags\t\t: fpu amx_bf16 avx512_bf16\n"
    monkeypatch.setattr(Path, "read_text", lambda path: text)
    assert provenance.cpu_name() == "Fast CPU (avx512_bf16, amx_bf16)"
    monkeypatch.setattr(Path, "read_text", lambda path: text.replace("amx_bf16 avx512_bf16", "sse"))
    assert provenance.cpu_name() == "Fast CPU (no bf16 units)"


def test_an_environment_has_all_its_entries():
    here = provenance.environment(torch.device("cpu"))
    assert set(here) == set(provenance.ENVIRONMENT)
    assert here["device"].startswith("cpu: ")
    assert here["versions"]["torch"] == torch.__version__
