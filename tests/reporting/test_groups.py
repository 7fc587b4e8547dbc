"""Which runs are one group, which is whose control, and what groups are called."""

import csv
import io
import os
from pathlib import Path

import pytest

from helpers.written_runs import FLAGS, groups_of, write_run
from sparselearning.process.errors import FaultError
from sparselearning.reporting.runs import LONGEST_LABEL, find_runs, legend, read_run
from sparselearning.reporting.tables import csv_table, latex_table, markdown_report
from sparselearning.training import flags


def test_labels_name_the_method_and_only_what_tells_groups_apart(tmp_path):
    folders = [
        write_run(tmp_path / "1", method="DST", growth="random"),
        write_run(tmp_path / "2", method="DST", growth="momentum"),
        write_run(tmp_path / "3", fix=True),
        write_run(tmp_path / "4", sparse=False, method="GMP"),
        write_run(tmp_path / "5", indicate_method="mine", lr_2=0.5),
        write_run(tmp_path / "6", indicate_method="mine", re_explore=True),
        write_run(tmp_path / "7", indicate_method="mine", re_explore=False),
    ]
    labels = [group.label for group in groups_of(*folders)[0]]
    assert labels[:4] == ["SET", "DST/momentum", "static", "dense"]
    assert labels[4:] == ["mine, lr_2 0.5", "mine, lr_2 0.01, re_explore on", "mine, lr_2 0.01, re_explore off"]


def test_long_labels_leave_out_flags_and_are_explained(tmp_path):
    long = {"pre_train": False, "large_death_rate": 0.5}
    folders = [
        write_run(tmp_path / "1", resume="study/main/seed1/checkpoint.pth", update_frequency=1000, **long),
        write_run(tmp_path / "2", resume="study/other/seed1/checkpoint.pth", update_frequency=10, **long),
        write_run(tmp_path / "3", tickets=0, final_density=0.2, update_frequency=10),
        write_run(tmp_path / "4", indicate_method="other", tickets=0, final_density=0.2),
    ]
    groups, _ = groups_of(*folders)
    assert [group.label for group in groups] == [
        "GraNet, final_density 0.1, update_frequency 1000",  # resume … would be too much, and tells nothing new
        "GraNet, final_density 0.1, update_frequency 10",
        "GraNet, plain, final_density 0.2, update_frequency 10",
        "other",
    ]
    assert legend(groups) == [
        "GraNet, final_density 0.1, update_frequency 1000: resume …/main/…",
        "GraNet, final_density 0.1, update_frequency 10: resume …/other/…",
    ]
    report = markdown_report(groups)
    assert all(f"- {sentence}\n" in report for sentence in legend(groups))
    assert f"% {legend(groups)[1]}\n" in latex_table(groups)
    assert [row["method"] for row in csv.DictReader(io.StringIO(csv_table(groups)))] == [g.full_label for g in groups]


def test_labels_that_are_too_long_even_so_are_numbered(tmp_path):
    folders = [
        write_run(tmp_path / "1", indicate_method="short"),
        *(write_run(tmp_path / str(rate), indicate_method="a" * 300, lr_2=rate) for rate in (0.1, 0.2)),
    ]
    groups, _ = groups_of(*folders)
    assert [group.label for group in groups] == ["short", *("a" * (LONGEST_LABEL - 4) + f"… #{n}" for n in (2, 3))]
    assert legend(groups) == [f"{groups[n].label}: lr_2 {rate}" for n, rate in ((1, 0.1), (2, 0.2))]


def test_groups_that_look_alike_are_numbered(tmp_path):
    folders = [
        write_run(tmp_path / "1", tickets=0),
        write_run(tmp_path / "2", tickets=0, final_update_epoch=50),  # which the first one has not
        write_run(tmp_path / "3"),
        write_run(tmp_path / "4", indicate_method="GraNet, plain", tickets=0),
    ]
    groups, _ = groups_of(*folders)
    assert [group.label for group in groups] == ["GraNet, plain #1", "GraNet, plain #2", "GraNet", "GraNet, plain #4"]
    assert len({group.full_label for group in groups}) == 4


def test_a_name_of_several_lines_breaks_no_table(tmp_path):
    groups, _ = groups_of(write_run(tmp_path / "1", indicate_method="two\nlines\t|", device="cpu\n| x"))
    assert groups[0].label == "two lines |"
    table = markdown_report(groups).splitlines()
    assert table[2].startswith("| two lines \\| |")
    assert table[-1] == "- ran on (commits): cpu | x, PyTorch 2.11"
    assert latex_table(groups).splitlines()[5].startswith("two lines | & $1$")


def test_flags_that_took_no_effect_part_no_runs(tmp_path):
    folders = [
        write_run(tmp_path / "1", tickets=0, seed=1, save="here", lr_2=0.5),
        write_run(tmp_path / "2", tickets=0, seed=2, save="there", lr_2=0.6),
        write_run(tmp_path / "3", tickets=0, seed=1, sparse=False, final_density=0.2),
        write_run(tmp_path / "4", tickets=0, seed=2, sparse=False, final_density=0.3),
    ]
    groups, _ = groups_of(*folders)
    assert [(group.label, group.seeds) for group in groups] == [("GraNet", [1, 2]), ("dense", [1, 2])]


@pytest.mark.parametrize(
    ("flag", "on", "off"),
    [
        ("large_death_rate", {"re_explore": True}, {"re_explore": False}),
        ("CIMA_factor", {"superposing_method": "CIMA"}, {"superposing_method": "CAA"}),
        ("lr_1", {"cyc_lr": True}, {"cyc_lr": False}),
        ("lr_2", {"cyc_lr": True}, {"cyc_lr": False}),
        ("final_prune_epoch", {"method": "GMP"}, {"method": "DST"}),
        ("init_prune_epoch", {"method": "GraNet"}, {"method": "DST"}),
        ("pruning_rate", {"sparse_init": "prune_global", "resume": "x"}, {"sparse_init": "resume", "resume": "x"}),
    ],
)
def test_flags_that_others_switch_off_part_no_runs(tmp_path, flag, on, off):
    for switch, seeds in ((on, [[1], [2]]), (off, [[1, 2]])):
        folders = [
            write_run(tmp_path / f"{len(seeds)}/{seed}", seed=seed, **switch, **{flag: seed / 10}) for seed in (1, 2)
        ]
        assert [group.seeds for group in groups_of(*folders)[0]] == seeds


def test_what_a_script_says_of_its_own_flags_counts(tmp_path):
    marks = {flags.NO_EFFECT: ["hue"], flags.ABOUT_MASKS: ["grain"], flags.ABOUT_TICKETS: ["pause"]}
    values = [{"hue": 1, "grain": 1, "pause": 1}, {"hue": 2, "grain": 2, "pause": 2}]
    folders = [
        write_run(tmp_path / str(seed), tickets=0, seed=seed, sparse=False, marks=marks, **own)
        for seed, own in enumerate(values)
    ]
    assert [group.seeds for group in groups_of(*folders)[0]] == [[0, 1]]
    for seed, own in enumerate(values, start=2):
        folders.append(write_run(tmp_path / str(seed), tickets=0, seed=seed, sparse=False, **own))
    assert [group.seeds for group in groups_of(*folders)[0]] == [[0, 1], [2], [3]]


@pytest.mark.parametrize(
    "start",
    [
        "main/granet/seed{}/tickets/ticket_0.pth",
        "saved/M=3/seed{}/checkpoints/epoch_3.pth",
        "main/granet/seed{}",
        "main/granet/seed1/model_current.pth",
        "weights_10.pth",
    ],
)
def test_cycles_alone_are_one_group_whatever_the_seeds_in_the_paths_of_their_starts(tmp_path, start):
    seeds = [0, 1, 2, 3, 10]
    folders = [write_run(tmp_path / str(s), seed=s, pre_train=False, resume=start.format(s)) for s in seeds]
    groups, left_out = groups_of(*folders)
    assert ([group.seeds for group in groups], left_out) == ([seeds], [])


def test_cycles_alone_are_one_group_only_from_the_pretrained_networks_of_one_run(tmp_path):
    cycles = {"pre_train": False, "save": "cycles"}
    folders = [
        write_run(tmp_path / "1", seed=41, resume="main/seed41/tickets/ticket_0.pth", **cycles),
        write_run(tmp_path / "2", seed=42, resume="main/seed42/tickets/ticket_0.pth", **cycles),
        write_run(tmp_path / "3", seed=41, resume="other/seed41/tickets/ticket_0.pth", **cycles),
        write_run(tmp_path / "4", seed=41, resume="main/seed41", save="stopped"),
        write_run(tmp_path / "5", seed=42),
        write_run(tmp_path / "6", seed=41, tickets=0),
    ]
    groups, left_out = groups_of(*folders)
    assert left_out == []
    assert [group.seeds for group in groups] == [[41, 42], [41], [41, 42], [41]]
    assert [group.control is groups[3] for group in groups] == [True, True, True, False]


@pytest.mark.parametrize("sparse_init", ["resume", "prune_global"])
def test_masks_of_trained_weights_part_runs_by_these_weights(tmp_path, sparse_init):
    folders = [
        write_run(tmp_path / name, sparse_init=sparse_init, tickets=tickets, resume=name[0])
        for name, tickets in (("a1", 2), ("b1", 2), ("a2", 0))
    ]
    groups, _ = groups_of(*folders)
    assert [group.control for group in groups] == [groups[2], None, None]


@pytest.mark.parametrize("difference", [{"lr": 0.2}, {"final_density": 0.2}, {"epochs": 3}, {"model": "lenet-300-100"}])
def test_plain_training_is_a_control_only_if_all_else_is_equal(tmp_path, difference):
    tickets = write_run(tmp_path / "tickets")
    plain = write_run(tmp_path / "plain", tickets=0, **difference)
    groups, left_out = groups_of(tickets, plain)
    assert groups[0].control is None
    [name] = difference
    here = {**FLAGS, "epochs": 4}[name]
    sentence = (
        f"has no plain training to compare with: {groups[1].label} differs in {name} ({difference[name]} there, {here}"
    )
    assert sentence in markdown_report(groups, left_out)


def test_unfinished_and_repeated_runs_are_named_and_left_out_of_means(tmp_path):
    write_run(tmp_path / "a", 0.9)
    write_run(tmp_path / "b", 0.5, save="elsewhere")
    write_run(tmp_path / "c", seed=2, finished=False)
    groups, left_out = groups_of(*find_runs([tmp_path]))
    assert [group.seeds for group in groups] == [[1]]
    assert left_out == [
        f"{tmp_path / 'b'}: has the flags and the seed of {tmp_path / 'a'}, which counts",
        f"{tmp_path / 'c'}: unfinished, epochs done: 4",
    ]
    assert f"- left out: {left_out[1]}\n" in markdown_report(groups, left_out)


def test_a_folder_that_cannot_be_searched_is_not_left_out_in_silence(tmp_path, monkeypatch):
    def scandir(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return look(path)

    write_run(tmp_path / "a")
    write_run(tmp_path / "locked" / "b")
    look = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(FaultError, match="locked cannot be searched for runs: Permission denied"):
        find_runs([tmp_path])


def test_runs_are_found_once_and_those_moved_aside_only_by_name(tmp_path):
    run = write_run(tmp_path / "deep/seed1")
    aside = write_run(tmp_path / "deep/seed1.old-1")
    assert find_runs([tmp_path, run]) == [run]
    assert find_runs([aside]) == [aside]


def test_tickets_are_read_from_the_summary_where_their_file_was_not_kept(tmp_path):
    folder = write_run(tmp_path / "run")
    kept = read_run(folder).tickets
    (folder / "tickets.jsonl").unlink()
    assert read_run(folder).tickets == kept
