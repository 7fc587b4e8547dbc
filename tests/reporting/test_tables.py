"""Tables of runs: means, deviations, gains and differences, by hand."""

import csv
import io
import math

import pytest

from helpers.written_runs import groups_of, rows_of, write_analysis, write_run
from sparselearning.reporting.columns import Spread
from sparselearning.reporting.measured import MEASURES
from sparselearning.reporting.runs import find_runs
from sparselearning.reporting.tables import (
    csv_of_runs,
    csv_table,
    latex_table,
    markdown,
    markdown_report,
    report_cells,
)


def markdown_table(groups):
    return markdown(report_cells(groups)["Results"])


def averages_table(groups):
    cells = report_cells(groups)
    return "\n".join(markdown(cells[measure.heading]) for measure in MEASURES if measure.heading in cells)


def differences_table(groups):
    return markdown(report_cells(groups).get("How far kept tickets are apart", []))


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
        "| last superposition                  | 90.00 ± 1.41 |\n"
        "| ensemble of all (mean of logits)    | 91.00 ± 1.41 |\n"
        "| CAA, BatchNorm re-estimated         | 89.00 ± 1.41 |\n"
        "| CAA, BatchNorm averaged             | 78.00 ± 0.00 |\n"
        "| CIMA 0.25, BatchNorm re-estimated   | 88.00 ± 1.41 |\n"
        "| CIMA 0.25, BatchNorm averaged       | 77.00 ± 0.00 |\n"
    )
    assert averages_table(analysed) in markdown_report(analysed)


def cells_of(table):
    """First column to second."""
    return dict([cell.strip() for cell in line.split("|")[1:3]] for line in table.splitlines())


def test_calibration_corruptions_and_choices_on_held_out_images_by_hand(study):
    def more(accuracy):  # held-out images find the worst best
        return {"ece": accuracy / 10, "corrupted": {"noise": accuracy / 2}, "held_out_accuracy": 1 - accuracy}

    write_analysis(study / "a_tickets/seed1", 0.0, more=more)
    write_analysis(study / "a_tickets/seed2", 0.02, more=more)
    tables = averages_table(groups_of(*find_runs([study]))[0]).split("\n\n")
    accuracy, likelihood, calibration, noise = map(cells_of, tables)
    assert accuracy["best ticket, chosen on held-out images"] == "85.00 ± 1.41"
    assert accuracy["best of these averages, chosen on held-out images"] == "78.00 ± 0.00"
    assert "best ticket, chosen on these images" not in accuracy
    assert likelihood["negative log-likelihood on the test set [nats]"] == "GraNet"
    assert likelihood["CAA, BatchNorm re-estimated"] == "1.0000 ± 0.0000"
    assert likelihood["CAA, BatchNorm averaged"] == "nan"
    assert calibration["expected calibration error on the test set [%]"] == "GraNet"
    assert calibration["last ticket"] == "8.50 ± 0.14"
    assert noise["accuracy on the test set, noise [%]"] == "GraNet"
    assert noise["tickets, their mean"] == "42.75 ± 0.71"


def test_plain_training_stands_beside_tickets_with_its_one_network(study):
    write_analysis(study / "a_tickets/seed1", 0.0)
    write_analysis(study / "a_tickets/seed2", 0.0)
    for seed in (1, 2):
        write_analysis(study / f"b_plain/seed{seed}", 0.02, tickets=(0,))
    groups = groups_of(*find_runs([study]))[0]
    assert "| plain training                      |            - |  82.00 ± 0.00 |" in averages_table(groups)
    assert "| pre-trained                         | 80.00 ± 0.00 |             - |" in averages_table(groups)
    assert "| last ticket                         | 84.00 ± 0.00 |             - |" in averages_table(groups)
    assert "| overlap of masks (Jaccard), mean over pairs                    | 0.500 ± 0.000 |             - |" in (
        differences_table(groups)
    )


@pytest.fixture
def compared(study):
    """GraNet analysed at two rates, and its plain training.

    Superpositions reach 89 and 91 %, at the other rate 90 and 90 %; plain training 80 and 81 %, its moving average 83
    and 84 %. A tenth of an accuracy is the calibration error, half of it the accuracy on noisy images.
    """
    for seed, shift, plain in ((1, 0.0, 0.0), (2, 0.02, 0.01)):
        write_run(study / f"d_rate/seed{seed}", 0.9, seed=seed, lr_2=0.05)
        for folder, higher, others in (
            ("a_tickets", shift, {}),
            ("b_plain", plain, {"tickets": (0,), "moving_average": 0.83}),
            ("d_rate", 0.01, {}),
        ):
            write_analysis(
                study / folder / f"seed{seed}", higher, **others,
                more=lambda accuracy: {"ece": accuracy / 10, "corrupted": {"noise": accuracy / 2}},
            )  # fmt: skip
    return groups_of(*find_runs([study]))[0]


def test_the_last_superposition_minus_others_by_hand(compared):
    """Over plain training 9 and 10 points: deviation 1/√2, standard error 1/2, so that t is 19.

    With one degree of freedom p = 1 - 2/π · atan t.
    """
    header, *rows = report_cells(compared)["The last superposition over others, seed by seed"]
    assert header == [
        "last superposition, accuracy on the test set", "n", "over plain training [points]",
        "over pre-trained [points]", "over last ticket [points]", "over that of the first setting [points]",
    ]  # fmt: skip
    assert rows == [
        [
            "GraNet, lr_2 0.01",
            "2",
            "+9.50 ± 0.50 (p 0.033, n 46)",
            "+9.00 ± 0.00 (p < 0.001, n 2)",
            "+5.00 ± 0.00 (p < 0.001, n 2)",
            "-",
        ],
        [
            "GraNet, lr_2 0.05",
            "2",
            "+9.50 ± 0.50 (p 0.033, n 46)",
            "+9.00 ± 0.00 (p < 0.001, n 2)",
            "+5.00 ± 0.00 (p < 0.001, n 2)",
            "+0.00 ± 1.00 (p 1, n 177)",
        ],
    ]


@pytest.mark.parametrize(("effect", "runs"), [(1.0, 10), (0.8, 15), (0.5, 34), (0.2, 199)])
def test_as_many_runs_show_an_effect_as_textbooks_say(effect, runs):
    """One-sample t-test, two-sided at 5 %, power 80 %; the effect in deviations (Cohen 1988)."""
    assert Spread(mean=9.0, std=1.0, n=3).runs_to_show(effect) == runs


def test_margin_and_p_of_a_mean_by_hand():
    spread = Spread(mean=4.303, std=math.sqrt(3), n=3)  # a standard error of 1, and t of two degrees of freedom
    assert spread.margin == pytest.approx(4.303, abs=1e-3)
    assert spread.p == pytest.approx(0.05, abs=1e-4)
    assert (Spread(1.0, None, 1).margin, Spread(1.0, None, 1).p) == (None, None)
    assert (Spread(1.0, 0.0, 2).p, Spread(0.0, 0.0, 2).p) == (0, 1)


def test_differences_in_all_measures_by_hand(compared):
    tables = report_cells(compared)
    header, *rows = tables["Differences, seed by seed: GraNet, lr_2 0.05"]
    assert header == [
        "GraNet, lr_2 0.05, n = 2, on the test set", "accuracy [points]", "negative log-likelihood [nats]",
        "calibration error [points]", "noise [points]",
    ]  # fmt: skip
    found = {title: figures for title, *figures in rows}
    assert found["last superposition over plain training"] == [
        "+9.50 ± 0.50 (p 0.033, n 46)", "+0.0000 ± 0.0000 (p 1)", "+0.95 ± 0.05 (p 0.033)", "+4.75 ± 0.25 (p 0.033)",
    ]  # fmt: skip
    assert found["last superposition over that of the first setting"][0] == "+0.00 ± 1.00 (p 1, n 177)"
    assert found["ensemble of all (mean of logits) over plain training"][0] == "+10.50 ± 0.50 (p 0.03, n 46)"
    assert found["CAA, BatchNorm averaged over plain training"][1] == "+nan"
    assert found["plain training's moving average of weights over plain training"][:3] == [
        "+3.00 ± 0.00 (p < 0.001, n 2)", "+0.0000 ± 0.0000 (p 1)", "+0.30 ± 0.00 (p < 0.001)",
    ]  # fmt: skip
    assert list(found)[:4] == [
        f"last superposition over {other}"
        for other in ("plain training", "pre-trained", "last ticket", "that of the first setting")
    ]
    assert markdown(tables["Differences, seed by seed: GraNet, lr_2 0.01"]) in markdown_report(compared)


def test_differences_need_every_seed_and_the_same_images(study):
    for seed in (1, 2):
        write_analysis(study / f"a_tickets/seed{seed}", 0.0)
        write_analysis(study / f"b_plain/seed{seed}", 0.0, tickets=(0,), part="other part")
    tables = report_cells(groups_of(*find_runs([study]))[0])
    assert [cell for cell in tables["The last superposition over others, seed by seed"][0] if "plain" in cell] == []
    assert not any(heading.startswith("Differences") for heading in tables)


def test_one_seed_has_no_standard_error(study):
    write_analysis(study / "c_rigl/seed1", 0.0)
    tables = report_cells(groups_of(*find_runs([study / "c_rigl"]))[0])
    assert tables["The last superposition over others, seed by seed"][1] == ["RigL", "1", "+9.00", "+5.00"]


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


@pytest.mark.parametrize("other", [None, {"tickets": (0, 1)}, {"share": 0.4}, {"part": "other part"}])
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


def test_seeds_that_plain_training_has_besides_count_for_nothing(tmp_path):
    folders = [write_run(tmp_path / f"{seed}", 0.9 + seed / 100, seed=seed) for seed in (1, 3)]
    folders += [write_run(tmp_path / f"plain{seed}", 0.9, tickets=0, seed=seed) for seed in (1, 3)]
    folders.append(write_run(tmp_path / "plain7", 0.5, tickets=0, seed=7))
    row = rows_of(csv_table(groups_of(*folders)[0]))["GraNet"]
    assert (row["gain_over_plain_points_mean"], row["gain_over_plain_points_std"]) == ("2", "1.41421")


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
