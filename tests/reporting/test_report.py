"""Reports: three runs whose figures can be checked in the head, then files, pictures, and damaged input."""

import csv
import io
import itertools
import json
import os
import sys
from pathlib import Path

import pytest
import torch

import sparselearning.reporting
from sparselearning.process.errors import FaultError, UsageError
from sparselearning.report import MARKS, main
from sparselearning.reporting.runs import LONGEST_LABEL, find_runs, group_runs, legend, masked_weights, read_run
from sparselearning.reporting.tables import (
    averages_table,
    csv_of_runs,
    csv_table,
    differences_table,
    latex_table,
    markdown_report,
    markdown_table,
)
from sparselearning.sparse.schedules import cyclic_lr
from sparselearning.training.records import EpochRow

FIGURES = ("train_loss", "train_acc", "eval_loss", "eval_acc", "density")
FLAGS = {
    "indicate_method": "Results", "seed": 1, "data": "digits", "model": "lenet5", "epochs": 4, "lr": 0.1,
    "sparse": True, "fix": False, "method": "GraNet", "growth": "gradient", "final_density": 0.1,
    "pre_train": True, "cyclic_train": True, "cycle": 1, "cycle_rate": 0.5, "cyc_lr": True, "lr_1": 0.001,
    "lr_2": 0.01, "save": "somewhere",
}  # fmt: skip


def write_run(folder, final=0.9, tickets=2, epochs=4, finished=True, explored=None, summary=(), **flags):
    """Pre-training to 80 %, then tickets of one epoch and 85 % each; what they superpose into ends at ``final``."""
    folder.mkdir(parents=True)
    plain = {} if tickets else {"cycle_rate": 0.0}
    config = FLAGS | plain | {"device": "cpu", "versions": {"torch": "2.11"}} | flags
    (folder / "config.json").write_text(json.dumps(config))
    first_cycle = epochs - tickets
    rows = [
        {
            "phase": "pretrain" if epoch < first_cycle else "cycle", "epoch": epoch,
            "ticket": None if epoch < first_cycle else epoch - first_cycle + 1, "lr": 0.1,
            "train_loss": 2.0 / (epoch + 1), "train_acc": 0.7, "eval_loss": 1.0, "eval_acc": 0.8, "density": 0.1,
            **({} if explored is None else {"explored": explored}),
        }
        for epoch in range(epochs)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    superposed = [0.88] * (tickets - 1) + [final] * (tickets > 0)
    ends = [{"ticket": n, "ticket_acc": 0.85, "superposed_acc": s} for n, s in enumerate(superposed, start=1)]
    if tickets:
        (folder / "tickets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ends))
    if finished:
        pretrained = 0.8 if tickets else final
        content = {
            "pretrain_acc": pretrained, "ticket_acc": [0.85] * tickets, "superposed_acc": superposed,
            "final_acc": final, "density": 0.1, "gain": 100 * (final - pretrained),
            "gain_over_ticket": 100 * (final - 0.85) if tickets else None, "total_seconds": 90.0,
        }  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(content | dict(summary)))
    return folder


def groups_of(*folders):
    return group_runs([read_run(folder) for folder in folders])


def rows_of(text):
    return {row.pop("method"): row for row in csv.DictReader(io.StringIO(text))}


@pytest.fixture
def study(tmp_path):
    """Seeds 1 and 2: 92 and 94 % with tickets, 91 and 91 % without; seed 1 of RigL: 90 %."""
    for seed, final, plain in ((1, 0.92, 0.91), (2, 0.94, 0.91)):
        write_run(tmp_path / f"a_tickets/seed{seed}", final, seed=seed)
        write_run(tmp_path / f"b_plain/seed{seed}", plain, tickets=0, seed=seed)
    write_run(tmp_path / "c_rigl/seed1", 0.90, method="DST")
    return tmp_path


# ------------------------------------------------------------------------------------------------------- figures


def test_means_deviations_and_gains_by_hand(study):
    groups, left_out = groups_of(*find_runs([study]))
    assert left_out == []
    assert markdown_table(groups) == (
        "| method        |   n | density | pre-trained [%] | last ticket [%] |    final [%] "
        "| gain over pre-training [points] | over last ticket [points] | over plain training [points] | time [min] |\n"
        "| ------------- | --: | ------: | --------------: | --------------: | -----------: "
        "| ------------------------------: | ------------------------: | ---------------------------: | ---------: |\n"
        "| GraNet        |   2 |  0.1000 |    80.00 ± 0.00 |    85.00 ± 0.00 | 93.00 ± 1.41 "
        "|                   +13.00 ± 1.41 |              +8.00 ± 1.41 |                 +2.00 ± 1.41 |  1.5 ± 0.0 |\n"
        "| GraNet, plain |   2 |  0.1000 |               - |               - | 91.00 ± 0.00 "
        "|                               - |                         - |                            - |  1.5 ± 0.0 |\n"
        "| RigL          |   1 |  0.1000 |           80.00 |           85.00 |        90.00 "
        "|                          +10.00 |                     +5.00 |                            - |        1.5 |\n"
    )


def write_analysis(folder, shift, tickets=(0, 1, 2), share=0.5):
    """Tickets of 80, 85 and 84 %, an ensemble of 90 %, and two averages, all of them higher by ``shift``."""
    far = 0.3 + 3 * shift
    accuracies = {"ticket 0": 0.80, "ticket 1": 0.85, "ticket 2": 0.84, "superposition 1": 0.9, "logit ensemble": 0.90}
    content = {
        "run": str(folder),
        "settings": {
            "tickets": list(tickets), "superposing_method": "CIMA", "CIMA_factor": 0.5, "final_density": 0.1,
            "update_bn": True, "line_bn": False,
        },
        "same_as_run": True,
        "evaluated_on": {"part": "test set", "images": 100},
        "networks": [
            {"name": name, "accuracy": accuracy + shift, "loss": 1.0, "density": 0.1, "forward_passes": 1}
            for name, accuracy in accuracies.items()
        ],
        "grid": [
            {
                "superposing_method": method, "CIMA_factor": factor,
                "bn_re_estimated": {"accuracy": accuracy + shift, "loss": 1.0},
                "bn_averaged": {"accuracy": accuracy - 0.1, "loss": float("nan")},  # a network that overflows
            }
            for method, factor, accuracy in (("CAA", None, 0.88), ("CIMA", 0.25, 0.87))
        ],
        "pairs": {
            "names": ["ticket 0", "ticket 1", "ticket 2", "superposition 1"],
            "disagreement": [[0, 0.1, 0.2, 1], [0.1, 0, far, 1], [0.2, far, 0, 1], [1, 1, 1, 0]],
            "overlap": [[1, 0.5, 0.25, 0], [0.5, 1, 0.75, 0], [0.25, 0.75, 1, 0], [0, 0, 0, 1]],
            "kl": [[0.0] * 4] * 4,
        },
        "layers": [
            {
                "name": "fc.weight", "weights": 10, "densities": [0.1] * 3, "overlap": [[1.0] * 3] * 3,
                "mean_overlap": 1.0, "chance": 0.1,
            }
        ],
        "lines": [
            {
                "from": a, "to": b, "share": [0.0, share, 1.0], "accuracy": accuracy, "loss": [1.0] * 3,
                "accuracy_barrier": barrier, "loss_barrier": 0.0,
            }
            for a, b, accuracy, barrier in (
                ("ticket 0", "ticket 1", [0.80, 0.86, 0.85], 0.0),
                ("ticket 1", "ticket 2", [0.85, 0.82 + shift, 0.84], 0.025 - shift),
                ("ticket 0", "ticket 2", [0.80, 0.2, 0.84], 0.62),
                ("ticket 2", "superposition 1", [0.84, 0.1, 0.9], 0.77),
            )
        ],
    }  # fmt: skip
    (folder / "analysis").mkdir()
    (folder / "analysis" / "analysis.json").write_text(json.dumps(content))


@pytest.fixture
def analysed(study):
    """The groups of ``study``, the tickets of GraNet analysed: those of seed 2 are 2 points better."""
    write_analysis(study / "a_tickets/seed1", 0.0)
    write_analysis(study / "a_tickets/seed2", 0.02)
    return groups_of(*find_runs([study]))[0]


def test_other_averages_of_the_same_tickets_by_hand(analysed):
    assert averages_table(analysed) == (
        "| accuracy on the test set [%]        |       GraNet |\n"
        "| ----------------------------------- | -----------: |\n"
        "| pre-trained                         | 81.00 ± 1.41 |\n"
        "| tickets, their mean                 | 85.50 ± 1.41 |\n"
        "| last ticket                         | 85.00 ± 1.41 |\n"
        "| best ticket, chosen on these images | 86.00 ± 1.41 |\n"
        "| ensemble of all (mean of logits)    | 91.00 ± 1.41 |\n"
        "| CAA, BatchNorm re-estimated         | 89.00 ± 1.41 |\n"
        "| CAA, BatchNorm averaged             | 78.00 ± 0.00 |\n"
        "| CIMA 0.25, BatchNorm re-estimated   | 88.00 ± 1.41 |\n"
        "| CIMA 0.25, BatchNorm averaged       | 77.00 ± 0.00 |\n"
    )
    assert averages_table(analysed) in markdown_report(analysed)


def test_how_far_tickets_are_apart_by_hand(analysed):
    assert differences_table(analysed) == (
        "| between tickets, the first network included                    |        GraNet |\n"
        "| -------------------------------------------------------------- | ------------: |\n"
        "| images predicted unlike, mean over pairs [%]                   |  21.00 ± 1.41 |\n"
        "| overlap of masks (Jaccard), mean over pairs                    | 0.500 ± 0.000 |\n"
        "| middle between successive ones, over the better, mean [points] |  -0.50 ± 0.71 |\n"
        "| accuracy barrier between successive ones, largest [points]     |   1.50 ± 1.41 |\n"
    )
    assert differences_table(analysed) in markdown_report(analysed)


def test_lines_without_a_point_in_the_middle_have_no_middle(study):
    for seed in (1, 2):
        write_analysis(study / f"a_tickets/seed{seed}", 0.0, share=0.4)
    table = differences_table(groups_of(*find_runs([study]))[0])
    assert "middle" not in table
    assert "barrier" in table


def test_reports_name_every_machine_and_commit(tmp_path):
    first = {"device": "cpu: Fast", "threads": 2, "commit": "abc1234", "versions": {"torch": "2.11"}}
    write_run(tmp_path / "seed1", **first, resumed=[first | {"commit": "def5678"}])
    write_run(tmp_path / "seed2", seed=2, device="H200", threads=8, commit=None)
    write_run(tmp_path / "seed3", seed=3, device=None, versions={})
    groups, _ = groups_of(*find_runs([tmp_path]))
    assert len(groups) == 1
    assert markdown_report(groups).splitlines()[-1] == (
        "- ran on (commits): H200, PyTorch 2.11; an unknown device, PyTorch of unknown version; "
        "cpu: Fast, threads: 2, PyTorch 2.11 (abc1234, def5678)"
    )


@pytest.mark.parametrize("other", [None, {"tickets": (0, 1)}, {"share": 0.4}])
def test_averages_need_every_run_analysed_alike(study, other):
    write_analysis(study / "a_tickets/seed1", 0.0)
    if other:
        write_analysis(study / "a_tickets/seed2", 0.0, **other)
    assert averages_table(groups_of(*find_runs([study]))[0]) == ""


def test_csv_keeps_mean_and_deviation_apart_and_leaves_unknown_cells_empty(study):
    groups, _ = groups_of(*find_runs([study]))
    rows = rows_of(csv_table(groups))
    assert (rows["GraNet"]["n"], rows["GraNet"]["final_acc_percent_mean"]) == ("2", "93")
    assert rows["GraNet"]["final_acc_percent_std"] == "1.41421"
    assert rows["RigL"]["final_acc_percent_std"] == ""
    assert rows["GraNet, plain"]["gain_points_mean"] == ""


def test_every_run_has_a_row_with_its_own_figures(study):
    groups, _ = groups_of(*find_runs([study]))
    rows = list(csv.DictReader(io.StringIO(csv_of_runs(groups))))
    assert [(row["seed"], row["final_acc_percent"], row["gain_over_plain_points"]) for row in rows[:2]] == [
        ("1", "92", "1"),
        ("2", "94", "3"),
    ]
    assert rows[4]["folder"] == str(study / "c_rigl/seed1")


def test_latex_escapes_labels_and_sets_figures_as_mathematics(tmp_path):
    folders = [
        write_run(tmp_path / f"{seed}", f, seed=seed, indicate_method="a_b&c") for seed, f in ((1, 0.9), (2, 0.8))
    ]
    lines = latex_table(groups_of(*folders)[0]).splitlines()
    assert lines[1:3] == [r"\begin{tabular}{lrrrrrrrr}", r"\toprule"]
    assert r" & final [\%] & " in lines[3]
    assert lines[5].startswith(r"a\_b\&c & $2$ & $0.1000$ & ")
    assert r" & $85.00 \pm 7.07$ & " in lines[5]
    assert lines[-2:] == [r"\bottomrule", r"\end{tabular}"]


def test_other_seeds_are_compared_by_their_means_without_a_deviation(tmp_path):
    folders = [write_run(tmp_path / f"{seed}", 0.9 + seed / 100, seed=seed) for seed in (1, 3)]
    folders.append(write_run(tmp_path / "plain", 0.91, tickets=0, seed=7))
    row = rows_of(csv_table(groups_of(*folders)[0]))["GraNet"]
    assert (row["gain_over_plain_points_mean"], row["gain_over_plain_points_std"]) == ("1", "")


def test_a_held_back_test_set_decides_over_plain_training(tmp_path):
    folders = [
        write_run(tmp_path / "tickets", 0.9, summary={"test_acc": 0.7}),
        write_run(tmp_path / "plain", 0.9, tickets=0, summary={"test_acc": 0.65}),
    ]
    row = rows_of(csv_table(groups_of(*folders)[0]))["GraNet"]
    assert (row["test_acc_percent_mean"], row["gain_over_plain_points_mean"]) == ("70", "5")


def test_costs_are_shown_if_every_run_of_a_group_has_them(tmp_path):
    costs = {"inference_flops_of_dense": 0.25}
    folders = [write_run(tmp_path / "1", seed=1, summary=costs), write_run(tmp_path / "2", seed=2, summary=costs)]
    folders += [write_run(tmp_path / f"{seed}", seed=seed, lr=0.2) for seed in (3, 4)]
    rows = rows_of(csv_table(groups_of(*folders)[0]))
    assert rows["GraNet, lr 0.1"]["inference_flops_of_dense_mean"] == "0.25"
    assert rows["GraNet, lr 0.2"]["inference_flops_of_dense_mean"] == ""
    assert "training_flops_of_dense_mean" not in rows["GraNet, lr 0.1"]


# ------------------------------------------------------------------------------------------------------ grouping


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


def test_long_labels_are_numbered_and_explained(tmp_path):
    long = {"pre_train": False, "large_death_rate": 0.5}
    folders = [
        write_run(tmp_path / "1", resume="study/main/seed1/checkpoint.pth", update_frequency=1000, **long),
        write_run(tmp_path / "2", resume="study/other/seed1/checkpoint.pth", update_frequency=10, **long),
        write_run(tmp_path / "3", indicate_method="a" * 300),
        write_run(tmp_path / "4", tickets=0, final_density=0.2, update_frequency=10),
    ]
    groups, _ = groups_of(*folders)
    assert [group.label for group in groups][:2] == ["GraNet #1", "GraNet #2"]
    assert groups[2].label == "a" * (LONGEST_LABEL - 4) + "… #3"
    assert groups[3].label == "GraNet, plain, final_density 0.2, update_frequency 10"
    assert max(len(group.label) for group in groups) <= LONGEST_LABEL
    assert legend(groups)[:2] == [
        "GraNet #1: final_density 0.1, update_frequency 1000, resume …/main/…",
        "GraNet #2: final_density 0.1, update_frequency 10, resume …/other/…",
    ]
    report = markdown_report(groups)
    assert all(f"- {sentence}\n" in report for sentence in legend(groups))
    assert f"% {legend(groups)[1]}\n" in latex_table(groups)
    assert [row["method"] for row in csv.DictReader(io.StringIO(csv_table(groups)))] == [g.full_label for g in groups]


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


# ------------------------------------------------------------------------------------------------------ pictures


def save_networks(folder):
    """Two layers of 4 and 16 weights: the ticket has 2 and 2 of them, the superposition 1 and 3."""
    for name, active in (("model_current.pth", (2, 2)), ("model_previous.pth", (1, 3))):
        state = {}
        for layer, (shape, count) in zip(
            ("a.weight", "b.weight"), (((2, 2), active[0]), ((4, 4), active[1])), strict=True
        ):
            state[layer] = torch.zeros(shape)
            state[layer].view(-1)[:count] = 1.5
        torch.save({"state_dict": state, "masks": {k: v != 0 for k, v in state.items()}, "epoch": 4}, folder / name)


def lines(axes):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


@pytest.fixture
def plots():
    pytest.importorskip("matplotlib")
    from sparselearning.reporting import plots

    return plots


def test_curves_stand_at_the_ends_of_epochs_and_mark_tickets(plots, tmp_path):
    figure = plots.curves(read_run(write_run(tmp_path / "run", 0.9)))
    loss, accuracy, enlarged = figure.axes
    assert lines(loss)["training"] == ([1, 2, 3, 4], [2.0, 1.0, 2 / 3, 0.5])
    for axes in (accuracy, enlarged):
        assert lines(axes)["ticket"] == ([3, 4], [85.0, 85.0])
        assert lines(axes)["superposition"] == ([3, 4], [88.0, 90.0])
        assert lines(axes)["pre-trained"][1] == [80.0, 80.0]
    assert [patch.get_x() for patch in accuracy.patches] == [2, 3]
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "loss [nats per sample]",
        "accuracy [%]",
        "evaluation accuracy [%]",
    ]


def test_the_cyclic_rate_is_drawn_at_every_step(plots, tmp_path):
    rate = plots.schedules(read_run(write_run(tmp_path / "run"))).axes[0]
    cycle = next(line for line in rate.lines if len(line.get_xdata()) > 100)
    assert (cycle.get_xdata()[0], cycle.get_xdata()[-1]) == (2, 3)
    assert (cycle.get_ydata()[0], cycle.get_ydata()[100], cycle.get_ydata()[-1]) == (0.001, 0.01, 0.001)


@pytest.mark.parametrize(("epoch", "step"), [(10, 3), (11, 7), (12, 11)])
def test_the_last_step_of_an_epoch_is_drawn_where_it_was(plots, epoch, step):
    """A cycle of three epochs of four steps each, from epoch 10 on; the middle is in the second epoch."""
    rate = cyclic_lr(step / 12, 0.001, 0.01)
    row = EpochRow(epoch=epoch, ticket=1, lr=rate, **dict.fromkeys(FIGURES, 0.5))
    assert plots._place_of_rate(row, 10, 13, 0.001, 0.01) == pytest.approx(10 + step / 4)


@pytest.mark.parametrize("last", [0.1, 0.09])
def test_dips_of_the_density_are_explained_where_there_are_any(plots, tmp_path, last):
    folder = write_run(tmp_path / "run")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows[2]["density"] = last
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    density = plots.schedules(read_run(folder)).axes[-1]
    assert ("dips" in density.get_xlabel()) == (last < 0.1)


@pytest.mark.parametrize(("explored", "panels"), [(None, 2), (0.4, 3)])
def test_explored_weights_have_a_panel_where_they_were_recorded(plots, tmp_path, explored, panels):
    figure = plots.schedules(read_run(write_run(tmp_path / "run", explored=explored)))
    assert len(figure.axes) == panels
    assert explored is None or list(figure.axes[2].lines[0].get_ydata()) == [explored] * 4


def test_layer_densities_before_and_after_superposing(plots, tmp_path):
    folder = write_run(tmp_path / "run")
    assert plots.layer_figure(read_run(folder)) is None
    save_networks(folder)
    [axes] = plots.layer_figure(read_run(folder)).axes
    drawn = {label: densities for label, (densities, _) in lines(axes).items()}
    assert drawn["last ticket (0.2000 overall)"] == [0.5, 0.125]
    assert drawn["superposition (0.2000 overall)"] == [0.25, 0.1875]
    # ERK by hand: raw values 4/4 and 8/16, so ε · (4 · 1 + 16 · 0.5) = 4, ε = 1/3
    assert drawn["ERK (0.2000 overall)"] == pytest.approx([1 / 3, 1 / 6])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a (4)", "b (16)"]


def test_the_comparison_has_a_bar_where_there_is_a_deviation(plots, study):
    groups, _ = groups_of(*find_runs([study]))
    [axes] = plots.comparison(groups).axes
    assert [label.get_text().replace("\N{NO-BREAK SPACE}", " ") for label in axes.get_yticklabels()] == [
        "GraNet (n = 2)",
        "GraNet, plain (n = 2)",
        "RigL (n = 1)",
    ]
    assert [bar.has_xerr for bar in axes.containers] == [True, False, True, False, True, True, False]


def test_labels_of_many_groups_keep_apart_and_within_the_picture(plots, tmp_path):
    folders = [
        write_run(tmp_path / str(i), indicate_method="my $name$ " + "x" * i, data=f"data/{i}/" + "y" * 50, seed=i)
        for i in range(5)
    ]
    figure = plots.comparison(groups_of(*folders)[0])
    figure.draw_without_rendering()
    [axes] = figure.axes
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert all(lower.y1 < upper.y0 for upper, lower in itertools.pairwise(boxes))
    for box in [*boxes, axes.xaxis.label.get_window_extent()]:
        assert 0 <= box.x0 < box.x1 <= figure.bbox.width


# ----------------------------------------------------------------------------------------------------- the program


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_one_run_gets_pictures_and_tables_in_its_folder(plots, tmp_path, capsys):
    folder = write_run(tmp_path / "run", 0.9)
    save_networks(folder)
    main([str(folder)])
    pictures = {f"{name}.{kind}" for name in ("curves", "schedules", "layers") for kind in ("png", "svg")}
    assert files_of(folder / "report").keys() == pictures | {"results.md", "results.csv", "results.tex", "runs.csv"}
    assert "superposition 2           90.00%" in capsys.readouterr().out


def test_the_same_files_give_the_same_bytes(plots, study, monkeypatch, capsys):
    monkeypatch.chdir(study)
    for out in ("one", "two"):
        main(["a_tickets", "b_plain", "c_rigl", "--out", f"out/{out}"])
        main(["c_rigl", "--out", f"out/{out}"])
    assert files_of(study / "out/one") == files_of(study / "out/two")
    assert {"comparison.png", "comparison.svg", "curves.svg"} <= files_of(study / "out/one").keys()
    assert "93.00 ± 1.41" in capsys.readouterr().out


def test_an_unfinished_run_gets_pictures_alone(plots, tmp_path, capsys):
    folder = write_run(tmp_path / "run", tickets=0, epochs=1, finished=False)
    main([str(folder)])
    assert files_of(folder / "report").keys() == {"curves.png", "curves.svg", "schedules.png", "schedules.svg"}
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
    "name", ["results.md", "results.csv", "results.tex", "runs.csv", "curves.png", "schedules.svg"]
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
        folder = write_run(tmp_path / f"{seed}", seed=seed)
        main([str(folder), "--out", str(out)])
        main([str(tmp_path), "--out", str(out)])
    assert {path.name for path in out.iterdir()} <= MARKS.keys()


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
