"""Pictures of runs: what is drawn, and where."""

import itertools
import json

import pytest

from helpers.written_runs import FIGURES, groups_of, save_networks, write_run
from sparselearning.reporting.runs import find_runs, read_run
from sparselearning.sparse.schedules import cyclic_lr
from sparselearning.training.records import EpochRow


def lines(axes):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


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


def test_gains_over_plain_training_by_hand(plots, tmp_path):
    """90 and 80 % against 80 and 76 %: 10 and 4 points, 7 on average, with a standard error of 3, 12.706 of them."""
    for seed, final, plain in ((1, 0.9, 0.8), (2, 0.8, 0.76)):
        write_run(tmp_path / f"tickets{seed}", final, seed=seed)
        write_run(tmp_path / f"plain{seed}", plain, tickets=0, seed=seed)
    alone = write_run(tmp_path / "alone", method="DST")
    groups, _ = groups_of(*find_runs([tmp_path]))
    [axes] = plots.gains({"digits": groups, "others": groups_of(alone)[0]}).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["digits", "GraNet (n = 2)", "others"]
    (bar,) = [container for container in axes.containers if container.get_label() != "mean, 95 % confidence interval"]
    ((start, _), (end, _)) = bar[2][0].get_segments()[0]
    assert (start, end) == pytest.approx((7 - 38.118, 7 + 38.118), abs=1e-3)
    assert list(axes.lines[3].get_xdata()) == pytest.approx([10, 4])


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
