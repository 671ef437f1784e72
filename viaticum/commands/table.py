"""Tables on a terminal: where it is too narrow, columns are left out, never a part of a number.

Leaves out tables of results in code and notebooks: see `viaticum.display`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from viaticum.commands.terminal import literal
from viaticum.money import NANOUSD_PER_USD, short_usd

_NUMBER = re.compile(r"[-+−~$]{0,2}\d.*|-|")
_GAP = 2
_SHORTEST = 8  # letters of a text that stay on one line


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, spare: Sequence[str] = ()) -> None:
    """Print rows under their columns, columns of numbers aligned right.

    On a terminal that is too narrow the spare columns are left out and named below the table; if that is not
    enough, texts are broken, numbers never. Files and pipes get all columns.

    Args:
        columns: names.
        rows: a cell a column; cells are taken literally, controls as escapes.
        spare: names of columns that may be left out, the first ones first.
    """
    console, kept = Console(), list(range(len(columns)))
    cells = [[literal(cell) for cell in row] for row in rows]
    widths = [max(map(cell_len, each)) for each in zip([*columns], *cells, strict=True)]
    width = sum(widths) + _GAP * len(widths) if not console.is_terminal else console.width
    left_out = []
    for name in spare:
        if sum(widths[n] for n in kept) + _GAP * (len(kept) - 1) <= width:
            break
        kept.remove(columns.index(name))
        left_out.append(name)
    numbers = {n for n in kept if cells and all(_NUMBER.fullmatch(row[n]) for row in cells)}
    least = sum((widths[n] if n in numbers else min(widths[n], _SHORTEST)) + _GAP for n in kept) - _GAP
    width = max(width, least)  # a column that is narrower than its numbers would cut them
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
    for n in kept:
        table.add_column(
            Text(columns[n]),
            justify="right" if n in numbers else "left",
            no_wrap=n in numbers,
            overflow="fold",
        )
    for row in cells:
        table.add_row(*(Text(row[n]) for n in kept))
    Console(width=max(width, 1)).print(table)
    if left_out:
        typer.echo(f"left out, for the terminal is narrow: {', '.join(left_out)}")


def usd(dollars: float) -> str:
    """Dollars for display: `usd(0.00001545) == "$0.00001545"`, `usd(1234.5) == "$1,234.50"`."""
    return short_usd(dollars * NANOUSD_PER_USD)
