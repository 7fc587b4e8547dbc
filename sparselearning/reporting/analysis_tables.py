"""The analysis of tickets as tables for people."""

from collections.abc import Sequence

from sparselearning.reporting.analysis import TEST_SET, Analysis, GridRow, LayerRow, Line, Pairs, Quality, Settings

ONE_BASIN = 0.02
"""Accuracy that may be lost on the way between two networks of one basin: the margin of Frankle et al. 2020, sec. 3."""


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text, the first column flush left and the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]
        for cells in rows
    ]
    return "".join("   ".join(cells).rstrip() + "\n" for cells in lines)


def networks_table(results: Analysis) -> str:
    """Quality and forward passes of each ticket, each superposition and the ensemble."""
    more = more_figures(results.networks)
    header = ("network", "accuracy", "loss", *more, "density", "forward passes")
    rows = [
        (row.name, *figures(row), *(column[place] for column in more.values()), f"{row.density:.4f}",
         str(row.forward_passes))
        for place, row in enumerate(results.networks)
    ]  # fmt: skip
    settings, evaluated_on = results.settings, results.evaluated_on
    budget = "not pruned" if settings.final_density is None else f"pruned to density {settings.final_density:g}"
    bn = "re-estimated" if settings.update_bn else "averaged"
    same = "bit for bit the run's own" if results.same_as_run else "not the run's own"
    how = f"superposed by {average_name(settings)}, {budget}, BatchNorm {bn}; the last superposition is {same}\n"
    return (
        f"{results.run}: {evaluated_on.images:,} images of the {evaluated_on.part}\n"
        f"{how if len(settings.tickets) > 1 else ''}\n"
    ) + columns([header, *rows])


def pairs_tables(pairs: Pairs) -> str:
    """One square table per measure."""
    tables = []
    for matrix, title, form in (
        (pairs.overlap, "mask overlap (Jaccard)", "{:.3f}"),
        (pairs.disagreement, "predictions differ", "{:.2%}"),
        (pairs.kl, "KL(row ‖ column) [nats]", "{:.4f}"),
    ):
        rows = [(name, *map(form.format, row)) for name, row in zip(pairs.names, matrix, strict=True)]
        tables.append(columns([(title, *pairs.names), *rows]))
    return "\n".join(tables)


def layers_table(layers: Sequence[LayerRow]) -> str:
    """Mask overlap of each layer, beside that of random masks."""
    header = ("mask overlap by layer, mean over pairs of tickets", "weights", "overlap", "random")
    rows = [(row.name, f"{row.weights:,}", f"{row.mean_overlap:.3f}", f"{row.chance:.3f}") for row in layers]
    return columns([header, *rows])


def lines_table(lines: Sequence[Line]) -> str:
    """Lowest accuracy and barriers of each line, and what the largest barrier means."""
    header = ("straight line", "lowest accuracy", "accuracy barrier [points]", "loss barrier [nats]")
    rows = [
        (
            f"{line.from_} to {line.to}",
            f"{min(line.accuracy):.2%}",
            f"{100 * line.accuracy_barrier:.2f}",
            f"{line.loss_barrier:.4f}",
        )
        for line in lines
    ]
    worst = max(line.accuracy_barrier for line in lines)
    verdict = "one low-loss basin" if worst <= ONE_BASIN else "not one basin"
    return (
        columns([header, *rows])
        + f"largest accuracy barrier {100 * worst:.2f} points: {verdict} (at most {100 * ONE_BASIN:g} points is one)\n"
    )


def grid_table(rows: Sequence[GridRow], part: str) -> str:
    """Quality of every average, with averaged and with re-estimated BatchNorm statistics."""
    tables = []
    for title, qualities in (
        ("average, BatchNorm averaged", [row.bn_averaged for row in rows]),
        ("average, BatchNorm re-estimated", [row.bn_re_estimated for row in rows]),
    ):
        more = more_figures(qualities)
        lines = [
            (average_name(row), *figures(quality), *(column[place] for column in more.values()))
            for place, (row, quality) in enumerate(zip(rows, qualities, strict=True))
        ]
        tables.append(columns([(title, "accuracy", "loss", *more), *lines]))
    note = "an average picked on the test set overstates its accuracy\n"
    return "\n".join(tables) + (note if part == TEST_SET else "")


def average_name(settings: Settings | GridRow) -> str:
    """Name of an average, for people."""
    factor = settings.CIMA_factor
    return settings.superposing_method + ("" if factor is None else f" with factor {factor:g}")


def figures(quality: Quality) -> tuple[str, str]:
    """Accuracy and loss, for people."""
    return f"{quality.accuracy:.2%}", f"{quality.loss:.4f}"


def more_figures(qualities: Sequence[Quality]) -> dict[str, list[str]]:
    """What else was measured of all of them, for people: title to a column."""
    found: dict[str, list[float | None]] = {"ECE": [quality.ece for quality in qualities]}
    for name in qualities[0].corrupted or ():
        found[f"accuracy, {name}"] = [(quality.corrupted or {}).get(name) for quality in qualities]
    found["accuracy, held-out"] = [quality.held_out_accuracy for quality in qualities]
    known = {title: [value for value in column if value is not None] for title, column in found.items()}
    return {
        title: [f"{value:.2%}" for value in column] for title, column in known.items() if len(column) == len(qualities)
    }
