"""The report as one HTML page and one Markdown file, each with its pictures inside.

Owns how rows look. No script, no outside file: the HTML opens from a disk without a network, in light and in dark.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from launch.report_rows import Row

TITLE = "Longroll: requirements and figures"
LEGEND = (
    "“measured” was run on the hardware named in its row; “planned” is computed from data sheets, shapes and published "
    "figures and was not run; “missing” has no figure yet."
)
MARKS = {True: "✓", False: "✗", None: "–"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A PNG with what it shows."""

    caption: str
    png: bytes

    @property
    def uri(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


def sections(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Rows by section, in their order."""
    for name, group in groupby(rows, key=lambda row: row.section):
        yield name, list(group)


def summary_line(rows: Sequence[Row]) -> str:
    """How many rows there are of each kind, and how many hold."""
    parts = []
    for kind in ("measured", "planned"):
        mine = [row for row in rows if row.kind == kind]
        parts.append(f"{len(mine)} {kind}, {sum(row.holds is True for row in mine)} of them hold")
    missing = sum(row.kind == "missing" for row in rows)
    return "; ".join(parts) + f"; {missing} without a figure."


def markdown(rows: Sequence[Row], pictures: Sequence[Picture], made: str) -> str:
    """One table a section. `made` says when and where it was made."""
    lines = [f"# {TITLE}", "", f"{made}. {summary_line(rows)}", "", LEGEND]
    for name, mine in sections(rows):
        lines += ["", f"## {name}", "", "| requirement | target | figure | | verdict | hardware | source |"]
        lines.append("|---|---|---|---|---|---|---|")
        for row in mine:
            cells = (
                row.requirement,
                row.target,
                row.figure,
                row.kind,
                f"{MARKS[row.holds]} {row.verdict}",
                row.hardware,
                f"`{row.source}`",
            )
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    for picture in pictures:
        lines += ["", f"## {picture.caption}", "", f"![{picture.caption}]({picture.uri})"]
    return "\n".join(lines) + "\n"


STYLE = """
:root { color-scheme: light dark; --line: #d9dce1; --soft: #6b7280; --good: #2e7d4f; --bad: #b3382c; }
@media (prefers-color-scheme: dark) {
  :root { --line: #3a3f47; --soft: #9aa2ad; --good: #6ac08f; --bad: #ee8277; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; } p { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; min-width: 52rem; }
th, td { text-align: left; vertical-align: top; padding: .4rem .6rem; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); font-size: .85rem; }
td.kind { color: var(--soft); } td.yes { color: var(--good); } td.no { color: var(--bad); }
code { font-size: .8rem; color: var(--soft); } figure { margin: 1rem 0; }
img { max-width: 100%; background: #fff; border-radius: 6px; } figcaption { color: var(--soft); }
"""


def page(rows: Sequence[Row], pictures: Sequence[Picture], made: str) -> str:
    """The same as HTML."""
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(TITLE)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{html.escape(TITLE)}</h1><p>{html.escape(made)}. {html.escape(summary_line(rows))}</p>",
        f"<p>{html.escape(LEGEND)}</p>",
    ]
    for name, mine in sections(rows):
        parts.append(f'<h2>{html.escape(name)}</h2><div class="scroll"><table><thead><tr>')
        parts += [f"<th>{head}</th>" for head in ("requirement", "target", "figure", "kind", "verdict", "hardware")]
        parts.append("</tr></thead><tbody>")
        parts += [_table_row(row) for row in mine]
        parts.append("</tbody></table></div>")
    for picture in pictures:
        caption = html.escape(picture.caption)
        parts.append(f'<figure><img src="{picture.uri}" alt="{caption}"><figcaption>{caption}</figcaption></figure>')
    return "".join(parts) + "</body></html>\n"


def _table_row(row: Row) -> str:
    colour = {True: "yes", False: "no", None: ""}[row.holds]
    e = html.escape
    return (
        f"<tr><td>{e(row.requirement)}<br><code>{e(row.source)}</code></td><td>{e(row.target)}</td>"
        f'<td>{e(row.figure)}</td><td class="kind">{e(row.kind)}</td>'
        f'<td class="{colour}">{MARKS[row.holds]} {e(row.verdict)}</td><td>{e(row.hardware)}</td></tr>'
    )
