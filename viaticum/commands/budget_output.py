"""How `viaticum budget` prints budgets, holds and entries: tables, JSON and CSV.

Leaves out the commands: see `budget`.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer

from viaticum.commands.table import print_table
from viaticum.errors import ViaticumError
from viaticum.money import format_usd
from viaticum.records import field_text

if TYPE_CHECKING:
    from viaticum.budgets import Budget, Entry, Hold

# Names that are made up where a caller gives none.
_MADE_UP = re.compile(r"(run|code|agent|chat|batch)-[0-9a-f]{8,12}")
ENTRY_FIELDS = (
    "id",
    "at",
    "budget",
    "key",
    "kind",
    "nanousd",
    "tokens",
    "overrun",
    "models",
    "strategy",
    "prices",
    "note",
    "root",
    "number",
    "hash",
)


def budget_json(budget: Budget) -> dict[str, Any]:
    return asdict(budget) | {
        "window": None if budget.window is None else str(budget.window),
        "left_nanousd": budget.left_nanousd,
        "left_tokens": budget.left_tokens,
    }


def hold_json(hold: Hold) -> dict[str, Any]:
    from viaticum.budgets.serialization import price_json

    return asdict(hold) | {"prices": {model: price_json(price) for model, price in hold.prices.items()}}


def entry_json(entry: Entry) -> dict[str, Any]:
    from viaticum.budgets.serialization import price_json

    row = asdict(entry)
    row["prices"] = {model: price_json(price) for model, price in entry.prices.items()}
    row["models"] = row.pop("usage")
    row["strategy"] = entry.note.get("tags", {}).get("strategy")
    return {name: row[name] for name in ENTRY_FIELDS}


def print_budgets(budgets: list[Budget], as_json: bool, *, one: bool = False) -> None:
    if as_json:
        rows = [budget_json(each) for each in budgets]
        print_json(rows[0] if one else rows)
        return
    cells = [_budget_cells(each, depth) for each, depth in _as_tree(budgets)]
    columns = ("budget", "limit", "spent", "held", "left", "per", "state")
    print_table(columns, cells, spare=("per", "limit", "held", "state"))


def _budget_cells(each: Budget, depth: int) -> tuple[str, ...]:
    return (
        "  " * depth + each.name,
        _format_amounts(each.limit_nanousd, each.limit_tokens),
        _format_used(each, each.posted_nanousd, each.posted_tokens),
        _format_used(each, each.held_nanousd, each.held_tokens),
        _format_amounts(each.left_nanousd, each.left_tokens),
        str(each.window or "-"),
        each.state,
    )


def print_list(budgets: list[Budget], times: Mapping[str, tuple[str, str]], *, group: bool) -> None:
    """Print budgets with their dates and a total; where `group` is set, one line for each kind of run.

    times: by budget, of its first and last entry.
    """
    lines = list(_grouped(budgets) if group else (([each], depth) for each, depth in _as_tree(budgets)))
    cells = []
    for members, depth in lines:
        known = [times[each.name] for each in members if each.name in times]
        began = min((first for first, _ in known), default="-")[:10]
        last = max((end for _, end in known), default="-")[:10]
        cells.append((*_list_cells(members, depth), began, last))
    columns = ("budget", "limit", "spent", "held", "left", "per", "state", "began", "last")
    print_table(columns, cells, spare=("per", "state", "limit", "held", "began", "left", "last"))
    if budgets:
        typer.echo(total_line(budgets))
    if any(len(members) > 1 for members, _ in lines):
        typer.echo("each run: viaticum budget list --all")


def _list_cells(members: list[Budget], depth: int) -> tuple[str, ...]:
    if len(members) == 1:
        return _budget_cells(members[0], depth)
    kind = members[0].name.partition("-")[0]
    spent = sum(each.posted_nanousd + each.earlier_nanousd for each in members)
    held = sum(each.held_nanousd for each in members)
    name = f"{'  ' * depth}{kind}-... ({len(members):,})"
    return (name, "-", format_usd(spent), format_usd(held), "-", "-", "-")


def _grouped(budgets: list[Budget]) -> Iterator[tuple[list[Budget], int]]:
    """The tree; runs of a kind under one parent, with nothing below them, stand together after the others."""
    parents = {each.parent for each in budgets}
    runs: dict[tuple[str | None, str], list[Budget]] = {}
    for each in budgets:
        if (made := _MADE_UP.fullmatch(each.name)) and each.name not in parents:
            runs.setdefault((each.parent, made[1]), []).append(each)
    together = {each.name: group for group in runs.values() if len(group) > 1 for each in group}
    rest = []
    for each, depth in _as_tree(budgets):
        group = together.get(each.name)
        if group is None:
            yield [each], depth
        elif each.name == group[0].name and each.parent is None:
            rest.append((group, depth))
        elif each.name == group[0].name:
            yield group, depth
    yield from rest


def total_line(budgets: list[Budget]) -> str:
    """What all budgets spent, earlier windows included, and hold; a budget below another is in that one's."""
    roots = [each for each in budgets if each.parent is None]
    spent = sum(each.posted_nanousd + each.earlier_nanousd for each in roots)
    held = sum(each.held_nanousd for each in roots)
    return f"{len(budgets):,} budgets: {format_usd(spent)} spent, {format_usd(held)} held"


def _as_tree(budgets: list[Budget]) -> Iterator[tuple[Budget, int]]:
    """Each budget after its parent, with its depth; a budget whose parent is not shown has depth 0."""
    names = {each.name for each in budgets}
    below: dict[str | None, list[Budget]] = {}
    for each in budgets:
        below.setdefault(each.parent if each.parent in names else None, []).append(each)

    def walk(parent: str | None, depth: int) -> Iterator[tuple[Budget, int]]:
        for each in below.get(parent, ()):
            yield each, depth
            yield from walk(each.name, depth + 1)

    yield from walk(None, 0)


def print_holds(holds: list[Hold]) -> None:
    rows = [
        (
            hold.key,
            hold.budget,
            hold.state,
            format_usd(hold.held_nanousd),
            str(hold.held_tokens),
            hold.created[:19],
            hold.until[:19],
        )
        for hold in holds
    ]
    columns = ("call", "budget", "state", "held", "tokens", "since", "lease until")
    print_table(columns, rows, spare=("lease until", "budget", "tokens", "since"))


def print_entries(entries: Iterable[Entry]) -> None:
    rows = [
        (
            str(entry.id),
            entry.at[:19],
            entry.budget,
            entry.key or "-",
            entry.kind,
            format_usd(entry.nanousd),
            str(entry.tokens),
            format_usd(entry.overrun) if entry.overrun else "",
        )
        for entry in entries
    ]
    columns = ("id", "at", "budget", "call", "kind", "amount", "tokens", "overrun")
    print_table(columns, rows, spare=("tokens", "budget", "at", "overrun"))


def _format_amounts(nanousd: int | None, tokens: int | None) -> str:
    dollars = None if nanousd is None else format_usd(nanousd)
    return (
        ", ".join(part for part in (dollars, None if tokens is None else f"{tokens} tokens") if part) or "-"
    )


def _format_used(budget: Budget, nanousd: int, tokens: int) -> str:
    return _format_amounts(nanousd, tokens if budget.limit_tokens is not None else None)


def format_count(number: int | None) -> str:
    return "no limit" if number is None else str(number)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value))


def write_csv(file: TextIO, fields: Iterable[str], rows: Iterable[dict[str, Any]]) -> None:
    writer = csv_writer(file, fields)
    for row in rows:
        writer.writerow(csv_cells(row))


def csv_writer(file: TextIO, fields: Iterable[str]) -> csv.DictWriter[str]:
    writer = csv.DictWriter(file, list(fields), lineterminator="\n")
    writer.writeheader()
    return writer


def csv_cells(row: dict[str, Any]) -> dict[str, Any]:
    """Nested values as JSON, and no text that is a formula to a spreadsheet."""
    return {name: field_text(value) for name, value in row.items()}


@contextmanager
def open_output(out: Path | None) -> Iterator[TextIO]:
    if out is None:
        yield sys.stdout
        return
    try:
        with out.open("w", encoding="utf-8", newline="") as file:
            yield file
    except OSError as error:
        raise ViaticumError(f"cannot write {out}: {error.strerror}; give another path") from error
