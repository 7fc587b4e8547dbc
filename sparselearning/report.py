"""Tables, pictures and a page for a browser of runs, from the files that they left: nothing is trained again.

python -m sparselearning.report RUN [RUN …] [--out DIR]

RUN is a run's folder, or a folder under which runs lie. The same files give the same bytes.
"""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from sparselearning.process.arguments import Parser, path
from sparselearning.process.errors import UsageError
from sparselearning.process.files import check_output, write_text
from sparselearning.process.script import run_script
from sparselearning.reporting.page import MARK, html_report
from sparselearning.reporting.runs import find_runs, group_runs, read_run
from sparselearning.reporting.tables import DRAWN_BY, csv_of_runs, csv_table, latex_table, markdown_report
from sparselearning.training.progress import run_table

PICTURES = ("curves", "schedules", "layers", "comparison")
MARKS = {
    "results.md": "ran on (commits): ",
    "results.csv": "method,n,",
    "results.tex": r"% \usepackage{booktabs}",
    "runs.csv": "method,seed,",
    "report.html": MARK,
    **{f"{name}.{kind}": DRAWN_BY for name in PICTURES for kind in ("png", "svg")},
}
"""Every file that a report may write, and what ``files.check_output`` knows it by."""


def main(argv: Sequence[str] | None = None) -> None:
    """Read runs, print their table, write tables and pictures.

    Raises:
        UsageError: if a path is no run, or matplotlib is missing.
        FaultError: if a file is damaged or cannot be written.
    """
    parser = Parser(__doc__)
    parser.prog = "python -m sparselearning.report"
    parser.add_argument(
        "runs", nargs="+", type=path, metavar="RUN", help="a run's folder, or a folder under which runs lie"
    )
    parser.add_argument(
        "--out", type=path, metavar="DIR", help="where tables and pictures go, in place of RUN/report or ./report"
    )
    parser.add_argument("--no-plots", action="store_true", help="tables only; needs no matplotlib")
    args = parser.parse_args(argv)
    plots = None if args.no_plots else drawing()
    runs = [read_run(path) for path in find_runs(args.runs)]
    single = runs[0] if len(runs) == 1 else None
    out = args.out or (single.folder.path / "report" if single else Path("report"))
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file: name a folder")
    check_out(out)

    groups, left_out = group_runs(runs)
    if not groups and not single:
        raise UsageError(f"none of these {len(runs)} runs is finished: there is nothing to compare yet")
    if not groups and not plots:
        raise UsageError(f"{left_out[0]}: no tables yet, and --no-plots leaves out the pictures")
    tables = {}
    if groups:
        tables = {
            "results.md": markdown_report(groups, left_out),
            "results.csv": csv_table(groups),
            "results.tex": latex_table(groups),
            "runs.csv": csv_of_runs(groups),
        }
    for name, text in tables.items():
        write_text(out / name, text)
    pictures: dict[str, str] = {}
    if plots:
        figures = plots.run_figures(single) if single else {"comparison": plots.comparison(groups)}
        pictures = {name: plots.save(figure, out / name) for name, figure in figures.items()}
    write_text(out / "report.html", html_report(runs, groups, left_out, pictures))

    if single and single.summary:
        print(run_table(single.summary, single.folder.path))
    else:
        print(tables.get("results.md") or f"{left_out[0]}; pictures, but no tables yet")
    print(f"written to {out}")


def check_out(folder: Path) -> None:
    """Check that a report there replaces nothing but an earlier one.

    Raises:
        UsageError: if something else is where one of the files in :data:`MARKS` may go.
    """
    for name, mark in MARKS.items():
        check_output(folder / name, mark)


def drawing() -> ModuleType:
    """The module that draws, ``reporting.plots``.

    Raises:
        UsageError: without matplotlib.
    """
    try:
        from sparselearning.reporting import plots
    except ModuleNotFoundError as error:
        raise UsageError(
            f"pictures need {error.name}: pip install 'sparselearning[plots]', or give --no-plots for tables alone"
        ) from error
    return plots


if __name__ == "__main__":
    run_script(main)
