"""Tables for terminals and notebooks: what `__str__` and `_repr_html_` of results are made of.

Every text is escaped: answers are written by models, and a notebook would run their HTML. No style and no
script, so that a notebook shows them as it shows its other tables. Standard library only. Leaves out reports
(`viaticum.reports`) and what the commands print.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

LONG = 2000  # characters of a text beside a table


def text_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows under their columns, the first aligned left, the others right."""
    lines = [tuple(columns), *(tuple(" ".join(cell.split()) for cell in row) for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def html_table(columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> str:
    """A table with a head. caption: above it, where it is not empty."""
    head = "".join(f"<th>{_escaped(each)}</th>" for each in columns)
    body = "".join(f"<tr>{''.join(f'<td>{_escaped(cell)}</td>' for cell in row)}</tr>" for row in rows)
    title = f"<caption>{_escaped(caption)}</caption>" if caption else ""
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def html_facts(facts: Iterable[tuple[str, str]], *texts: tuple[str, str]) -> str:
    """A table of names and values; below it texts that a click unfolds, each with its heading."""
    rows = "".join(
        f"<tr><th>{_escaped(name)}</th><td>{_escaped(value)}</td></tr>" for name, value in facts if value
    )
    folded = "".join(
        f"<details><summary>{_escaped(name)}</summary><pre>{_escaped(text)}</pre></details>"
        for name, text in texts
        if text
    )
    return f"<table><tbody>{rows}</tbody></table>{folded}"


def _escaped(text: str) -> str:
    """The text for a page, cut, without half characters, which cannot be sent."""
    return html.escape(cut(text).encode(errors="replace").decode())


def cut(text: str, most: int = LONG) -> str:
    """The text, or its beginning and an ellipsis."""
    return text if len(text) <= most else f"{text[: most - 1]}…"
