"""The tables of RESULTS.md, its appendix and README.md, and their picture, made from the records in results/."""

import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from sparselearning import report
from sparselearning.process.files import write_text
from sparselearning.reporting.measured import differences_cells
from sparselearning.reporting.runs import Group, Run, find_runs, group_runs, legend, read_run
from sparselearning.reporting.tables import headline_table, markdown, markdown_report

Read = Callable[[Path], Run]

DRAWN = Path("RESULTS.md")
PAGES = [DRAWN, Path("README.md"), Path("docs/results-appendix.md")]


def publish(results: Path) -> None:
    """Write the tables of the pages in the working folder, and their picture into the folder of the records."""
    read = cache(read_run)  # several tables show the same runs
    for page in filter(Path.is_file, PAGES):
        write_text(page, filled(page.read_text(), read))
    drawn = groups_by_heading(DRAWN.read_text(), read) if DRAWN.is_file() else {}
    if with_control := {title: groups for title, groups in drawn.items() if any(group.control for group in groups)}:
        plots = report.drawing()
        plots.save(plots.gains(with_control), results / "gains")


def filled(text: str, read: Read = read_run) -> str:
    """Put below a comment ``report FOLDER…`` what the report says of these runs, and end it with a comment ``end``.

    Other comments get a part of it alone, see :data:`KINDS`.
    """

    def table(match: re.Match[str]) -> str:
        folders = [Path(word) for word in match["folders"].split()]
        there = [folder for folder in folders if folder.is_dir()]
        missing = "".join(f"- not run yet: {folder}\n" for folder in folders if folder not in there)
        shown = KINDS[match["kind"]](*_groups(there, read)) if there else ""
        return f"<!-- {match['command']} -->\n\n{shown}{missing}\n<!-- end -->"

    command = rf"(?P<command>(?P<kind>{'|'.join(KINDS)}) (?P<folders>[^>]*?))"
    return re.sub(f"<!-- {command} -->.*?<!-- end -->", table, text, flags=re.DOTALL)


def groups_by_heading(text: str, read: Read = read_run) -> dict[str, list[Group]]:
    """What the picture of a page shows: the runs of each ``headline``, or else of a heading's first ``differences``."""
    settings: dict[str, list[Group]] = {}
    title = ""
    narrow = r"^#+ (?P<title>.*)$|<!-- (?P<kind>headline|differences) (?P<folders>[^>]*?) -->"
    for match in re.finditer(narrow, text, re.MULTILINE):
        title = match["title"] or title
        there = [path for path in map(Path, (match["folders"] or "").split()) if path.is_dir()]
        if there and (match["kind"] == "headline" or title not in settings):
            settings.setdefault(title, []).extend(_groups(there, read)[0])
    return settings


def _explained(groups: Sequence[Group]) -> str:
    """What labels that leave something out stand for, below a table."""
    sentences = [f"- {sentence}\n" for sentence in legend(groups)]
    return "\n" + "".join(sentences) if sentences else ""


def _groups(folders: Sequence[Path], read: Read) -> tuple[list[Group], list[str]]:
    return group_runs([read(path) for path in find_runs(folders)])


KINDS: dict[str, Callable[[Sequence[Group], Sequence[str]], str]] = {
    "report": markdown_report,
    "headline": lambda groups, _: headline_table(groups) + _explained(groups),
    "differences": lambda groups, _: markdown(differences_cells(groups)) + _explained(groups),
}
"""Tables of groups of runs: all that ``python -m sparselearning.report`` writes; those with tickets, each beside its
control; their last superpositions over others."""
