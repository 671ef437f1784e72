"""The report as Markdown, for a pull request: the verdict, the comparison and the tables, without charts."""

from __future__ import annotations

import html
import re

from viaticum import __version__
from viaticum.reports import overview
from viaticum.reports.formatting import verdict
from viaticum.reports.numbers import Numbers
from viaticum.reports.sections import Section, Table


def write_markdown(numbers: Numbers, title: str) -> str:
    lines = [f"# {markdown_text(title)}", ""]
    for each in numbers.runs:
        name = f"{each.run.name}: " if len(numbers.runs) > 1 else ""
        lines += [f"**{markdown_text(name + verdict(each))}**", ""]
        lines += [text for line in overview.notices(each) for text in (f"> {markdown_text(line)}", "")]
    shared = [overview.comparison_section(numbers)] if len(numbers.runs) > 1 else []
    for section in [*shared, overview.plane_section(numbers)]:
        lines += _section(section, 2)
    for part in overview.parts(numbers):
        several = len(numbers.runs) > 1
        lines += [f"## {markdown_text(part.name)}", ""] if several else []
        for section in part.sections:
            lines += _section(section, 3 if several else 2)
    lines.append(
        f"<sub>Intervals are 95% (Wilson; bootstrap over questions, seed {numbers.seed}). viaticum"
        f" {__version__}.</sub>"
    )
    return "\n".join(lines) + "\n"


def _section(section: Section, level: int) -> list[str]:
    lines = [
        f"{'#' * level} {markdown_text(section.title)}",
        "",
        f"<sub>from: {markdown_text(section.source)}</sub>",
        "",
    ]
    if section.empty:
        return [*lines, markdown_text(section.empty), ""]
    lines += [text for line in section.lead for text in (markdown_text(line), "")]
    for table in [*section.tables, *(section.data if section.name == "plane" else ())]:
        lines += [_table(table), ""]
    return lines + [text for line in section.notes for text in (markdown_text(line), "")]


def _table(table: Table) -> str:
    lines = [
        [markdown_text(label) for label, _ in table.columns],
        ["---:" if number else "---" for _, number in table.columns],
        *([markdown_text(cell) for cell in row] for row in table.rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is: no mark-up, no HTML, no end of a table's cell."""
    text = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", text)
