"""Tables as HTML by great-tables, and as Markdown. Cells are plain text in either: both escape them.

great-tables brings a style sheet with every table; it is left out, because the page has one that knows light, dark and
paper. What it leaves out is added: the roles that a phone's cards would lose, and each cell's heading.
"""

from __future__ import annotations

import html
import re
import warnings

from viaticum.errors import MissingExtra
from viaticum.reports.parts import Table

_INTERVAL = re.compile(r"\([^()]*\)$")


def to_html(table: Table, name: str) -> str:
    """A `<table>`; name: of the table, unlike any other's on the page."""
    try:
        import pyarrow as pa
        from great_tables import GT
        from great_tables import html as as_html
    except ImportError as error:
        raise MissingExtra(error.name or "great-tables", "reports") from None
    keys = [f"{name}-{n}" for n in range(len(table.columns))]
    values = list(zip(*(_kept_together(row) for row in table.rows), strict=True)) or [()] * len(keys)
    data = pa.table({key: pa.array(column, pa.string()) for key, column in zip(keys, values, strict=True)})
    labels = {key: as_html(html.escape(label)) for key, (label, _) in zip(keys, table.columns, strict=True)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "PyArrow Table support", UserWarning)
        made = GT(data, rowname_col=keys[0], id=name).cols_label(labels).tab_stubhead(labels[keys[0]])  # type: ignore[arg-type, unused-ignore]
        made = made.cols_align("left", columns=keys).cols_align(
            "right", columns=[key for key, (_, number) in zip(keys, table.columns, strict=True) if number]
        )
        text = made.as_raw_html()
    found = re.search(r"<table.*</table>", text, re.DOTALL)
    assert found is not None
    return _accessible(found[0], table, name)


def _kept_together(row: tuple[str, ...]) -> list[str]:
    """Where a number has to break, it breaks before its interval: not within, nor after a minus."""
    return [row[0], *(_INTERVAL.sub(_unbroken, cell).replace("−", "−\N{WORD JOINER}") for cell in row[1:])]


def _unbroken(interval: re.Match[str]) -> str:
    return interval[0].replace(" ", "\N{NO-BREAK SPACE}")


def _accessible(text: str, table: Table, name: str) -> str:
    """With a caption, roles, and each cell's heading beside it, which a phone shows."""
    text = re.sub(
        r"<table[^>]*>", f'<table role="table"><caption>{html.escape(table.caption)}</caption>', text, count=1
    )
    for tag, role in (("thead", "rowgroup"), ("tbody", "rowgroup"), ("tr", "row"), ("td", "cell")):
        text = re.sub(rf"<{tag}(?=[\s>])", f'<{tag} role="{role}"', text)
    for number, (label, _) in enumerate(table.columns):
        cell = f'headers="[^"]*{re.escape(name)}-{number}"'
        text = re.sub(cell, f'data-label="{html.escape(label, quote=True)}"', text)
    head, body = text.split("</thead>", 1)
    head = re.sub(r'<th ([^>]*?)id="[^"]*"', r'<th role="columnheader" \1', head)
    body = re.sub(
        r'<th [^>]*class="gt_row ([a-z_]+) gt_stub"[^>]*>',
        r'<th role="rowheader" scope="row" class="\1">',
        body,
    )
    return f"{head}</thead>{body}"


def to_markdown(table: Table) -> str:
    lines = [
        [label for label, _ in table.columns],
        ["---:" if number else "---" for _, number in table.columns],
    ]
    lines = [
        [markdown_text(cell) for cell in lines[0]],
        lines[1],
        *([markdown_text(cell) for cell in row] for row in table.rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is: no mark-up, no HTML, no end of a table's cell."""
    text = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", text)
