"""Reports as a page: it says what the other files say, loads nothing, and no name in it is more than a name."""

import base64
import csv
import hashlib
import re
from html.parser import HTMLParser

from helpers.written_runs import save_networks, write_analysis, write_run
from sparselearning.report import main

VOID = {"meta", "link", "img", "input", "br", "hr"}


class Page(HTMLParser):
    """What a page holds; its elements are closed in the order in which they were opened."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text, self.tables = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open or "script" in self.open:
            return
        self.text.append(data)
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data


def page_of(folder):
    return Page((folder / "report.html").read_text())


def test_a_page_has_every_figure_and_note_of_the_other_files(study, tmp_path, capsys):
    for seed, shift in ((1, 0.0), (2, 0.02)):
        write_analysis(study / f"a_tickets/seed{seed}", shift)
    main([str(study), "--no-plots", "--out", str(tmp_path / "out")])
    page = page_of(tmp_path / "out")
    lines = (tmp_path / "out/results.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]
    rows = [row for row in rows if set(row[0]) != {"-"}]
    assert len(rows) == 4 + 11 + 2 + 5
    shown = [row for table in page.tables for row in table]
    assert [row for row in rows if row not in shown] == []
    notes = [line.removeprefix("- ") for line in lines if line.startswith("- ")]
    assert len(notes) == 5
    assert [note for note in notes if note not in page.text] == []
    with (tmp_path / "out/runs.csv").open() as file:
        runs = list(csv.reader(file))[1:]
    assert [row for row in runs if row not in shown] == []


def test_a_page_folds_away_the_flags_of_every_run(study, tmp_path, capsys):
    write_run(study / "unfinished", finished=False, lr=0.125)
    main([str(study), "--no-plots", "--out", str(tmp_path / "out")])
    page = page_of(tmp_path / "out")
    flags = [dict(table) for table in page.tables if ["growth", "gradient"] in table]
    assert [row["lr"] for row in flags] == ["0.1"] * 5 + ["0.125"]
    assert flags[0]["folder"] == str(study / "a_tickets/seed1")
    assert flags[0]["sparse"] == "true"
    assert page.tags.count("details") == page.tags.count("summary") == 6


def test_a_page_of_one_run_lists_its_tickets(tmp_path, capsys):
    main([str(write_run(tmp_path / "run", 0.9)), "--no-plots"])
    rows = [["1", "85.00", "88.00", "-", "-"], ["2", "85.00", "90.00", "-", "-"]]
    assert rows in [table[1:] for table in page_of(tmp_path / "run/report").tables]


def test_a_page_is_one_file_that_loads_nothing(plots, tmp_path, capsys):
    folder = write_run(tmp_path / "run")
    save_networks(folder)
    main([str(folder)])
    text, page = (folder / "report/report.html").read_text(), page_of(folder / "report")
    assert page.tags.count("figure") == page.tags.count("svg") == 3
    names = [value for name, value in page.attributes if name == "id"]
    assert len(names) == len(set(names)) > 100
    used = [value for name, value in page.attributes if name in ("href", "xlink:href")]
    used += re.findall(r"url\((.*?)\)", text)
    assert {name for name in used if not name.startswith("#") or name[1:] not in names} == set()
    loading = {"src", "srcset", "data", "poster", "action", "formaction", "background"}
    assert [name for name, _ in page.attributes if name in loading or name.startswith("on")] == []
    assert not {"link", "iframe", "object", "embed", "img", "image", "base"} & set(page.tags)
    assert "@import" not in text


def test_a_browser_runs_the_script_of_the_page_alone(tmp_path, capsys):
    main([str(write_run(tmp_path / "run")), "--no-plots"])
    (policy,) = [value for _, value in page_of(tmp_path / "run/report").attributes if value and "default-src" in value]
    (script,) = re.findall(r"<script>(.*?)</script>", (tmp_path / "run/report/report.html").read_text(), re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_names_are_text_whatever_they_hold(plots, tmp_path, capsys):
    evil = '--></svg></title></td><script>alert("&amp;")</script><img src=x onerror=alert(1)>'
    for seed in (1, 2):
        write_run(tmp_path / f"{seed}", seed=seed, indicate_method=evil, device=evil, data=evil, **{"<b>": evil})
    write_run(tmp_path / "plain", tickets=0, indicate_method=evil)
    main([str(tmp_path), "--out", str(tmp_path / "many")])
    main([str(tmp_path / "1"), "--out", str(tmp_path / "one")])
    for folder in ("many", "one"):
        page = page_of(tmp_path / folder)
        assert (page.tags.count("script"), page.tags.count("title"), page.tags.count("img")) == (1, 1, 0)
        assert "b" not in page.tags
        flags = next(dict(table) for table in page.tables if ["growth", "gradient"] in table)
        assert flags["data"] == flags["<b>"] == evil
    assert f"{evil}, seed 1" in page.text
