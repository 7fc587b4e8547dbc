"""Every entry of every JSON file of a run, damaged in every way: one sentence that names file and entry, or no harm."""

import contextlib
import io
import json

import main_suptickets
import pytest
import sweep
import torch

from helpers.damage import damages, names
from helpers.written_runs import save_networks, write_analysis, write_run
from sparselearning.process.errors import FaultError, UsageError
from sparselearning.process.files import write_json
from sparselearning.report import main
from sparselearning.reporting.runs import group_runs, masked_weights, read_run
from sparselearning.reporting.tables import csv_of_runs, csv_table, latex_table, markdown_report
from sparselearning.training import kept_flags, opening
from sparselearning.training.progress import run_table
from sparselearning.training.run_folder import RunFolder

EXTREME = {"minus", "float32", "tiny"}
"""What a picture may have no room for."""
UNREADABLE = {"thousands of digits", "nested too deep"}
"""What no JSON parser takes in: no entry can be named then."""


def write_whole_run(folder):
    """A finished run with all that reports read; returns its JSON files."""
    environment = {"commit": "abc1234", "versions": {"torch": "2.11"}, "device": "cpu: Fast", "threads": 2}
    write_run(
        folder, explored=0.4, summary={"test_acc": 0.8, "training_flops_of_dense": 0.3}, resume=None, sparse_init="ERK",
        **environment, world_size=1, resumed=[environment | {"commit": "def5678"}],
    )  # fmt: skip
    write_analysis(
        folder, 0.0, more=lambda accuracy: {"ece": 0.1, "corrupted": {"blur": 0.5}, "held_out_accuracy": 0.6}
    )
    save_networks(folder)
    return [folder / name for name in ("config.json", "metrics.jsonl", "tickets.jsonl", "summary.json")] + [
        folder / "analysis" / "analysis.json"
    ]


def refusal(look, *arguments):
    """The sentence that something ends with; None if it does not mind."""
    try:
        look(*arguments)
    except FaultError as fault:
        return str(fault)
    return None


def tables(folder):
    """All that a report writes and prints but pictures."""
    run = read_run(folder)
    groups, left_out = group_runs([run])
    if run.summary:
        run_table(run.summary, folder)
    texts = [markdown_report(groups, left_out), csv_table(groups), latex_table(groups), csv_of_runs(groups)]
    "".join(texts).encode()
    return run


@pytest.mark.parametrize("number", range(5), ids=["config", "metrics", "tickets", "summary", "analysis"])
def test_damaged_entries_are_named_or_harmless(tmp_path, number):
    plots = pytest.importorskip("sparselearning.reporting.plots")
    folder = tmp_path / "run"
    path = write_whole_run(folder)[number]
    text, drawn = path.read_text(), set()

    def report(extreme=False):
        run = tables(folder)
        shown = repr((run.metrics, run.tickets, run.config.cycle_lr))
        for figure in (plots.curves(run), plots.schedules(run)) if extreme and shown not in drawn else ():
            figure.savefig(io.BytesIO(), format="png", dpi=30)
        drawn.add(shown)

    assert refusal(report) is None
    for place, damage, damaged in damages(text, lines=path.suffix == ".jsonl"):
        path.write_text(damaged)
        if sentence := refusal(report, damage in EXTREME):
            assert str(path) in sentence, (place, damage, sentence)
            assert len(sentence) < 600, (place, damage)
            assert damage in UNREADABLE or names(sentence, place), (place, damage, sentence)
        assert path.read_text() == damaged


def test_a_damaged_run_ends_the_command_with_one_sentence(tmp_path):
    path = write_whole_run(tmp_path / "run")[1]
    path.write_text(path.read_text().replace('"lr": 0.1', '"lr": [0.1]', 1))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(
        FaultError, match=r"metrics\.jsonl, line 1, is damaged or no run's: lr is \[0\.1\], not a number"
    ):
        main([str(tmp_path / "run"), "--no-plots"])
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_damaged_configurations_stop_a_sweep_and_a_resumed_run_or_do_no_harm(tmp_path):
    """A sweep compares flags with those of the folder; a run that goes on adds where it does."""
    folder = RunFolder(tmp_path / "rigl" / "seed7")
    words = ["--pre_train", "--cyclic_train", "--data", "digits", "--model", "lenet-300-100", "--final-density", "0.1"]
    environment = {"commit": "abc1234", "versions": {"torch": "2.11"}, "device": "cpu: Fast", "threads": 2}
    args = main_suptickets.parse(sweep.planned("rigl", 7, words, tmp_path, control=False).flags)
    content = kept_flags.values(args) | environment | {"resumed": [environment | {"commit": "def5678"}]}
    refused = 0
    write_json(folder.config, content)
    for place, damage, damaged in damages(folder.config.read_text(), lines=False):
        folder.config.write_text(damaged)
        sentence = refusal(opening._note_environment, folder, environment | {"commit": "def5678"})
        if sentence:
            refused += 1
            assert str(folder.config) in sentence, (place, damage, sentence)
            assert damage in UNREADABLE or names(sentence, place), (place, damage, sentence)
            assert folder.config.read_text() == damaged
        if place[0] in ("lr", "seed", "versions", "resumed"):  # one of each kind: this takes longer
            with contextlib.suppress(UsageError):  # as the flags of another run have it
                again = refusal(sweep.planned, "rigl", 7, words, tmp_path, False)
                assert (again is None) == (sentence is None), (place, damage, again)
    assert refused > 200


def ticket_line(number):
    return json.dumps({"ticket": number, "ticket_acc": 0.85, "superposed_acc": 0.88}) + "\n"


@pytest.mark.parametrize(
    ("file", "text", "sentence"),
    [
        ("config.json", "{", "config.json is damaged: "),
        ("config.json", "{}", "config.json is damaged or no run's: seed is missing"),
        ("metrics.jsonl", "", "metrics.jsonl holds no finished epoch"),
        ("metrics.jsonl", "[1]\n", "metrics.jsonl, line 1, is damaged: it holds no named values"),
        ("metrics.jsonl", '{"epoch": "one"}\n', "line 1, is damaged or no run's: epoch is 'one'"),
        (
            "tickets.jsonl",
            '{"ticket": 9, "ticket_acc": 1, "superposed_acc": 1}\n',
            "line 1, is damaged: ticket is 9, not 1",
        ),
        (
            "tickets.jsonl",
            "".join(map(ticket_line, (1, 2, 3))),
            "metrics.jsonl is damaged: it has no epoch of ticket 3",
        ),
        ("summary.json", '{"pretrain_acc": 0.5}', "summary.json is damaged or no run's: ticket_acc is missing"),
    ],
)
def test_damaged_files_are_named(tmp_path, file, text, sentence):
    folder = write_run(tmp_path / "run")
    (folder / file).write_text(text)
    with pytest.raises(FaultError) as caught:
        read_run(folder)
    assert sentence in str(caught.value)


def test_damaged_networks_are_named(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "model.pth")
    with pytest.raises(FaultError, match=r"model\.pth is damaged: masks is missing"):
        masked_weights(tmp_path / "model.pth")
