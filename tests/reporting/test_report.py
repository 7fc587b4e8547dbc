"""The command that reports on runs: its files, its wrong calls, what it never replaces."""

import sys

import pytest

import sparselearning.reporting
from helpers.written_runs import save_networks, write_run
from sparselearning.process.errors import UsageError
from sparselearning.report import MARKS, main


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_one_run_gets_pictures_and_tables_in_its_folder(plots, tmp_path, capsys):
    folder = write_run(tmp_path / "run", 0.9)
    save_networks(folder)
    main([str(folder)])
    pictures = {f"{name}.{kind}" for name in ("curves", "schedules", "layers") for kind in ("png", "svg")}
    tables = {"results.md", "results.csv", "results.tex", "runs.csv"}
    assert files_of(folder / "report").keys() == pictures | tables | {"report.html"}
    assert "superposition 2           90.00%" in capsys.readouterr().out


def test_the_same_files_give_the_same_bytes(plots, study, monkeypatch, capsys):
    monkeypatch.chdir(study)
    for out in ("one", "two"):
        main(["a_tickets", "b_plain", "c_rigl", "--out", f"out/{out}"])
        main(["c_rigl", "--out", f"out/{out}"])
    assert files_of(study / "out/one") == files_of(study / "out/two")
    assert {"comparison.png", "comparison.svg", "curves.svg"} <= files_of(study / "out/one").keys()
    assert "93.00 ± 1.41" in capsys.readouterr().out


def test_an_unfinished_run_gets_pictures_and_a_page(plots, tmp_path, capsys):
    folder = write_run(tmp_path / "run", tickets=0, epochs=1, finished=False)
    main([str(folder)])
    pictures = {"curves.png", "curves.svg", "schedules.png", "schedules.svg"}
    assert files_of(folder / "report").keys() == pictures | {"report.html"}
    assert "unfinished, epochs done: 1" in (folder / "report/report.html").read_text()
    assert "unfinished, epochs done: 1; pictures, but no tables yet" in capsys.readouterr().out


def test_without_matplotlib_tables_remain(study, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "sparselearning.reporting.plots", raising=False)
    monkeypatch.delattr(sparselearning.reporting, "plots", raising=False)
    monkeypatch.chdir(study)
    with pytest.raises(UsageError, match=r"pictures need matplotlib: pip install 'sparselearning\[plots\]'"):
        main([str(study)])
    assert not (study / "report").exists()
    main([str(study), "--no-plots"])
    assert (study / "report/results.md").exists()


def test_an_unfinished_run_without_pictures_is_a_wrong_call(tmp_path):
    folder = write_run(tmp_path / "run", tickets=0, epochs=1, finished=False)
    with pytest.raises(UsageError, match="unfinished, epochs done: 1: no tables yet, and --no-plots"):
        main([str(folder), "--no-plots", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_wrong_calls_are_told_in_a_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="missing is not a folder"):
        main([str(tmp_path / "missing"), "--no-plots"])
    with pytest.raises(UsageError, match="empty holds no run"):
        main([str(tmp_path / "empty"), "--no-plots"])
    for seed in (1, 2):
        write_run(tmp_path / f"{seed}", seed=seed, finished=False)
    with pytest.raises(UsageError, match="none of these 2 runs is finished"):
        main([str(tmp_path), "--no-plots"])
    with pytest.raises(UsageError, match="is a file: name a folder"):
        main([str(tmp_path / "1"), "--no-plots", "--out", str(tmp_path / "1/config.json")])


@pytest.mark.parametrize(
    "name", ["results.md", "results.csv", "results.tex", "runs.csv", "report.html", "curves.png", "schedules.svg"]
)
def test_no_other_file_is_replaced(tmp_path, name):
    folder, out = write_run(tmp_path / "run"), tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(UsageError, match=f"{name} exists, and is no earlier output"):
        main([str(folder), "--no-plots", "--out", str(out)])
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [(name, "mine")]


def test_a_report_may_be_replaced_by_a_later_one(tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    for seed in (1, 2):
        write_run(tmp_path / f"{seed}", seed=seed)
    for folder in (tmp_path / "1", tmp_path, tmp_path / "2"):
        main([str(folder), "--out", str(out)])
    assert {path.name for path in out.iterdir()} <= MARKS.keys()
