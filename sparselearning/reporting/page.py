"""Reports as one page for a browser: tables that a click sorts, pictures, and the flags of every run.

The page is one file and loads nothing: its Content-Security-Policy forbids all but its own style and script.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from string import Template

from sparselearning.reporting.runs import Group, Run, one_line
from sparselearning.reporting.tables import (
    DRAWN_BY,
    Cells,
    cells_of_runs,
    machines,
    report_cells,
    report_notes,
    ticket_cells,
)

MARK = f'<meta name="generator" content="{DRAWN_BY}">'
"""Every page has it near its beginning."""

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fff; --faint: #6a6f76; --rule: #d9dce0; --hover: #f1f4f8 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e5e8; --paper: #15171a; --faint: #9aa0a8; --rule: #3a3f46; --hover: #22262b }
  figure svg { filter: invert(0.91) hue-rotate(180deg) }  /* the pictures have white paper of their own */
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 84rem; padding: 1.5rem 1rem 4rem; font: 15px/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--paper) }
h1 { font-size: 1.5rem; line-height: 1.25; overflow-wrap: anywhere }
h2 { font-size: 1.1rem; margin: 2.2rem 0 0.6rem }
.wide { overflow-x: auto; max-width: 100%; margin: 0.8rem 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: 0.3rem 0.7rem; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap;
  vertical-align: bottom }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper) }
@media (max-width: 45rem) {
  td:first-child { min-width: 8rem; max-width: 45vw; white-space: normal; overflow-wrap: break-word }
}
thead th { border-bottom-width: 2px; white-space: normal; min-width: 6rem }
tbody tr:hover > * { background: var(--hover) }
th button { all: unset; cursor: pointer; font-weight: 600 }
th button:focus-visible { outline: 2px solid; outline-offset: 2px }
th button::after { content: "\\a0\\2195"; color: var(--faint); font-weight: 400 }
th[aria-sort=ascending] button::after { content: "\\a0\\2191" }
th[aria-sort=descending] button::after { content: "\\a0\\2193" }
.flags td { text-align: left; white-space: normal; overflow-wrap: anywhere }
.flags td:first-child { white-space: nowrap; font-family: ui-monospace, monospace }
figure { margin: 1.2rem 0 }
figure svg { display: block; max-width: 100%; height: auto }
details { margin: 0.3rem 0 }
summary { cursor: pointer; overflow-wrap: anywhere }
li { overflow-wrap: anywhere }
"""

SCRIPT = """
const number = (row, column) => parseFloat(row.cells[column].textContent);
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, column = head.cellIndex, body = head.closest("table").tBodies[0];
    const sign = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const rows = [...body.rows].map((row) => [number(row, column), row.cells[column].textContent, row]);
    rows.sort(([a, aText], [b, bText]) =>
      isNaN(a) && isNaN(b) ? sign * aText.localeCompare(bText, undefined, { numeric: true })
        : isNaN(a) - isNaN(b) || sign * (a - b));  // what is no number comes last
    body.append(...rows.map(([, , row]) => row));
  });
}
"""

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
$mark
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-$digest'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<h1>$title</h1>
$body
<script>$script</script>
</body>
</html>
""")


def html_report(
    runs: Sequence[Run], groups: Sequence[Group], left_out: Sequence[str], pictures: Mapping[str, str]
) -> str:
    """The page as text.

    Args:
        runs: all that the report is about, at least one.
        groups: of those that are finished.
        left_out: a sentence about each run that is in no group.
        pictures: name to SVG.
    """
    tables, notes = (report_cells(groups), report_notes(groups, left_out)) if groups else ({}, left_out)
    if len(runs) > 1:
        title = f"{len(runs)} runs"
        tables["Every run"] = cells_of_runs(groups)
    else:
        title = f"{runs[0].name}, seed {runs[0].seed}"
        tables |= {"Tickets": ticket_cells(runs[0])} if runs[0].tickets else {}
    named = {f"{group.full_label}, seed {run.seed}": run for group in groups for run in group.runs}
    named |= {f"{run.name}, {run.folder.path}": run for run in runs if run not in named.values()}

    parts = [_table(heading, cells) for heading, cells in tables.items()]
    parts += ["<ul>", *(f"<li>{_text(note)}</li>" for note in notes), "</ul>"]
    parts += [_picture(name, svg) for name, svg in pictures.items()]
    parts += ["<h2>Flags of every run</h2>", *(_flags(name, run) for name, run in named.items())]
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return PAGE.substitute(
        mark=MARK, digest=digest, title=_text(title), style=STYLE, body="\n".join(parts), script=SCRIPT
    )


def _text(text: str) -> str:
    return escape(one_line(text))


def _row(cells: Iterable[str], before: str, after: str) -> str:
    return f"<tr>{''.join(f'{before}{_text(cell)}{after}' for cell in cells)}</tr>\n"


def _table(heading: str, cells: Cells) -> str:
    """A table in a box of its own, which scrolls sideways if the page is narrower."""
    header, *rows = cells
    head = _row(header, '<th scope="col"><button>', "</button></th>")
    body = "".join(_row(row, "<td>", "</td>") for row in rows)
    table = f"<table>\n<thead>{head}</thead>\n<tbody>\n{body}</tbody></table>"
    return f'<h2>{_text(heading)}</h2>\n<div class="wide" tabindex="0">{table}</div>'


def _picture(name: str, svg: str) -> str:
    """A picture as a part of the page, where no other picture has names like those inside of it."""
    drawing = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{_text(name)}"', 1)
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r'(\bid="|\bhref="#|\burl\(#)', rf"\g<1>{name}-", drawing)
    return f"<h2>{_text(name.capitalize())}</h2>\n<figure>{drawing.strip()}</figure>"


def _flags(name: str, run: Run) -> str:
    """The flags of a run and what it ran on, folded away."""
    values = {flag: value if isinstance(value, str) else json.dumps(value) for flag, value in run.flags.items()}
    values |= {"folder": str(run.folder.path), "ran on (commits)": machines(run.environments)}
    rows = "".join(_row(row, "<td>", "</td>") for row in values.items())
    return f'<details><summary>{_text(name)}</summary>\n<table class="flags"><tbody>\n{rows}</tbody></table></details>'
