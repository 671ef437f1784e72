"""`viaticum budget`: make scopes, see what they hold and spent, settle what is unknown, check and export.

Results go to stdout. Leaves out errors and exit codes: `viaticum.cli` turns a `ViaticumError` into one line and
exit code 1.
"""

from __future__ import annotations

import csv
import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.table import Table

from viaticum.errors import InputError, ViaticumError
from viaticum.money import format_usd, nanousd
from viaticum.types import TokenCount

if TYPE_CHECKING:
    from viaticum.budgets import Budget, Entry, Hold, Ledger, Window

app = typer.Typer(
    no_args_is_help=True, help="Make budgets, see what they hold and spent, settle, check and export."
)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
CsvFlag = Annotated[bool, typer.Option("--csv", help="Print CSV on stdout.")]
Where = Annotated[
    str | None,
    typer.Option(
        "--ledger",
        help="An SQLite file or a postgresql:// address; yours by default.",
        metavar="WHERE",
        envvar="VIATICUM_LEDGER",
    ),
]
Name = Annotated[str, typer.Argument(help="A budget.")]
AnyName = Annotated[str | None, typer.Argument(help="One budget; all by default.")]
ReadOnly = Annotated[
    bool, typer.Option("--read-only", help="For a file that may not be written, or is damaged.")
]
Dollars = Annotated[str | None, typer.Option("--limit", help="Dollars it may cost at most.", metavar="USD")]
Tokens = Annotated[int | None, typer.Option("--tokens", help="Tokens it may use at most.")]
Per = Annotated[
    str | None, typer.Option("--per", help="The limit holds for each hour, day or month.", metavar="WINDOW")
]
Rolling = Annotated[
    bool, typer.Option("--rolling", help="The last hour, day or 30 days, not the calendar's.")
]
Zone = Annotated[str, typer.Option("--zone", help="The calendar's time zone, such as Europe/Berlin.")]

_NO_LIMIT = 10_000  # columns

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


@app.command()
def create(
    name: Name,
    limit: Dollars = None,
    tokens: Tokens = None,
    parent: Annotated[str | None, typer.Option(help="The budget it lies below.")] = None,
    per: Per = None,
    rolling: Rolling = False,
    zone: Zone = "UTC",
    as_json: JsonFlag = False,
    where: Where = None,
) -> None:
    """Make a budget; below a parent, whose limits hold as well, it may do without a limit of its own."""
    with _ledger(where) as ledger:
        made = ledger.create(
            name,
            limit_nanousd=None if limit is None else nanousd(limit),
            limit_tokens=tokens,
            parent=parent,
            window=_window(per, rolling, zone),
        )
    _print_budgets([made], as_json, one=True)


@app.command("set")
def set_terms(
    name: Name,
    limit: Dollars = None,
    tokens: Tokens = None,
    per: Per = None,
    rolling: Rolling = False,
    zone: Zone = "UTC",
    no_window: Annotated[bool, typer.Option("--no-window", help="The limit holds for good.")] = False,
    pause: Annotated[bool, typer.Option("--pause", help="Take no new calls until resumed.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Take calls again.")] = False,
    close: Annotated[bool, typer.Option("--close", help="Take no new calls, for good.")] = False,
    reason: Annotated[str, typer.Option(help="Kept with the entry.")] = "",
    as_json: JsonFlag = False,
    where: Where = None,
) -> None:
    """Change limits or the window; pause, resume or close. Each change is an entry."""
    terms: dict[str, Any] = {}
    if limit is not None:
        terms["limit_nanousd"] = nanousd(limit)
    if tokens is not None:
        terms["limit_tokens"] = tokens
    if per is not None or no_window:
        terms["window"] = None if no_window else _window(per, rolling, zone)
    if pause + resume + close > 1 or not (terms or pause or resume or close):
        raise InputError(
            "say what to change: --limit, --tokens, --per or one of --pause, --resume and --close"
        )
    with _ledger(where) as ledger:
        if terms:
            ledger.set_limit(name, **terms)
        for wanted, change in (
            (pause, ledger.pause),
            (resume, ledger.resume),
            (close, ledger.close_budget),
        ):
            if wanted:
                change(name, reason)
        _print_budgets([ledger.budget(name)], as_json, one=True)


@app.command("list")
def list_budgets(
    as_json: JsonFlag = False, as_csv: CsvFlag = False, read_only: ReadOnly = False, where: Where = None
) -> None:
    """Every budget, those below another indented: limit, spent, held and left."""
    with _ledger(where, read_only) as ledger:
        budgets = ledger.budgets()
    if as_csv:
        rows = [_budget_json(each) for each in budgets]
        _write_csv(sys.stdout, list(rows[0]) if rows else ["name"], rows)
        return
    _print_budgets(budgets, as_json)


@app.command()
def show(
    name: AnyName = None, as_json: JsonFlag = False, read_only: ReadOnly = False, where: Where = None
) -> None:
    """Limit, spent, held and left; of one budget also those above it and the calls that are open."""
    with _ledger(where, read_only) as ledger:
        if name is None:
            _print_budgets(ledger.budgets(), as_json)
            return
        lineage = ledger.lineage(name)
        states = ("reserved", "dispatched", "unknown")
        holds = [hold for state in states for hold in ledger.holds(name, state)]  # type: ignore[arg-type]
    if as_json:
        above = [_budget_json(each) for each in lineage[:-1]]
        _print_json(
            _budget_json(lineage[-1]) | {"above": above, "open": [_hold_json(hold) for hold in holds]}
        )
        return
    _print_budgets(lineage, as_json)
    if holds:
        _print_holds(holds)


@app.command("entries")
def list_entries(
    name: AnyName = None,
    key: Annotated[str | None, typer.Option(help="Those of one call.")] = None,
    kind: Annotated[str | None, typer.Option(help="Those of one kind, such as post.")] = None,
    last: Annotated[int, typer.Option(help="Only the newest so many; 0 for all.", min=0)] = 50,
    as_json: JsonFlag = False,
    as_csv: CsvFlag = False,
    read_only: ReadOnly = False,
    where: Where = None,
) -> None:
    """What happened, oldest first. --json prints one object a line."""
    entries: deque[Entry] = deque(maxlen=last or None)
    with _ledger(where, read_only) as ledger:
        ledger.each_entry(
            lambda entry: entries.append(entry) if kind in (None, entry.kind) else None, name, key
        )
    if as_json:
        for entry in entries:
            _print_json(_entry_json(entry))
    elif as_csv:
        _write_csv(sys.stdout, ENTRY_FIELDS, (_entry_json(entry) for entry in entries))
    else:
        _print_entries(entries)


@app.command()
def forecast(
    name: Name,
    model: Annotated[str | None, typer.Option(help="From calls of this model or pair.")] = None,
    strategy: Annotated[str | None, typer.Option(help="From calls with this strategy.")] = None,
    last: Annotated[int, typer.Option(help="From the newest so many calls.", min=1)] = 1000,
    as_json: JsonFlag = False,
    read_only: ReadOnly = False,
    where: Where = None,
) -> None:
    """What a call costs, p50 and p90 of those settled so far, and how many more the limits allow."""
    from viaticum.budgets import forecast as look_ahead

    tags = {name: value for name, value in (("model", model), ("strategy", strategy)) if value is not None}
    with _ledger(where, read_only) as ledger:
        found = look_ahead(ledger, name, tags, last)
    if as_json:
        _print_json({"budget": name, "tags": tags} | asdict(found))
        return
    table = _table("", "cost", "tokens", "calls left")
    table.add_row("p50", format_usd(found.cost_p50), str(found.tokens_p50), _count(found.calls_p50))
    table.add_row("p90", format_usd(found.cost_p90), str(found.tokens_p90), _count(found.calls_p90))
    _print(table)
    typer.echo(f"from {found.past_calls} settled calls")


@app.command()
def reconcile(
    key: Annotated[str | None, typer.Argument(help="One call; without it, unknown calls are listed.")] = None,
    used: Annotated[
        list[str] | None, typer.Option(help="What it used: MODEL=INPUT,OUTPUT.", metavar="USAGE")
    ] = None,
    void: Annotated[bool, typer.Option("--void", help="Nobody is charged for it.")] = False,
    worst: Annotated[bool, typer.Option("--worst", help="Nobody can say: post all that is held.")] = False,
    file: Annotated[
        Path | None,
        typer.Option(help='JSONL of a provider: {"key", "usage": {MODEL: {"input_tokens", ...}} or null}.'),
    ] = None,
    crashed: Annotated[
        bool, typer.Option("--crashed", help="Nobody uses this ledger now: end every lease.")
    ] = False,
    as_json: JsonFlag = False,
    where: Where = None,
) -> None:
    """End leases that ran out, then list the calls whose outcome is unknown, or settle one or many of them."""
    with _ledger(where) as ledger:
        lapsed = ledger.expire_leases(datetime(9998, 1, 1, tzinfo=UTC) if crashed else None)
        settled: list[Entry] = []
        if key is not None:
            settled = [_settle_one(ledger, key, used or [], void, worst)]
        elif used or void or worst:
            raise InputError("name the call: viaticum budget reconcile KEY ...")
        if file is not None:
            settled += [
                ledger.void(each) if usage is None else ledger.settle(each, usage)
                for each, usage in _reported(file)
            ]
        unknown = ledger.holds(state="unknown")
    if as_json:
        _print_json(
            {
                "expired": [entry.key for entry in lapsed if entry.kind == "expire"],
                "settled": [_entry_json(entry) for entry in settled],
                "unknown": [_hold_json(hold) for hold in unknown],
            }
        )
        return
    for entry in settled:
        typer.echo(f"{entry.key}: {entry.kind} {format_usd(entry.nanousd)}, {entry.tokens} tokens")
    for entry in lapsed:
        if entry.kind == "expire":
            typer.echo(f"{entry.key}: expired, {format_usd(entry.nanousd)} is free again")
    if unknown:
        _print_holds(unknown)
    else:
        typer.echo("no call is unknown")


@app.command()
def verify(
    name: AnyName = None, as_json: JsonFlag = False, read_only: ReadOnly = False, where: Where = None
) -> None:
    """Play all entries again and compare every row; exit code 1 where one was altered or a limit was exceeded."""
    with _ledger(where, read_only) as ledger:
        findings = ledger.check(name)
        heads = {} if findings else ledger.chain_heads()
    if as_json:
        ends = {root: {"entries": count, "head": head} for root, (count, head) in heads.items()}
        _print_json({"ok": not findings, "findings": findings, "heads": ends})
    else:
        for finding in findings:
            typer.echo(finding)
        for root, (count, head) in heads.items():
            typer.echo(f"ok: {root}: {count} entries, the last with hash {head}")
    if findings:
        raise typer.Exit(1)


@app.command()
def export(
    name: AnyName = None,
    out: Annotated[Path | None, typer.Option(help="A .csv or .jsonl file; else CSV on stdout.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    read_only: ReadOnly = False,
    where: Where = None,
) -> None:
    """Every entry with all its columns, as CSV or JSON lines."""
    if out is not None and out.suffix not in (".csv", ".jsonl"):
        raise InputError(f"cannot tell the format of {out}; name it .csv or .jsonl")
    as_lines = as_json or (out is not None and out.suffix == ".jsonl")
    with _ledger(where, read_only) as ledger, _opened(out) as file:
        if as_lines:
            ledger.each_entry(lambda entry: file.write(json.dumps(_entry_json(entry)) + "\n"), name)
        else:
            writer = _csv_writer(file, ENTRY_FIELDS)
            ledger.each_entry(lambda entry: writer.writerow(_cells(_entry_json(entry))), name)


# What is given


@contextmanager
def _ledger(where: str | None, read_only: bool = False) -> Iterator[Ledger]:
    from viaticum.budgets import Ledger

    with Ledger(where, read_only=read_only) as ledger:
        yield ledger


def _window(per: str | None, rolling: bool, zone: str) -> Window | None:
    from viaticum.budgets import Window

    if per is None:
        if rolling or zone != "UTC":
            raise InputError("--rolling and --zone go with --per hour, day or month")
        return None
    return Window(per, rolling, zone)  # type: ignore[arg-type]


def _settle_one(ledger: Ledger, key: str, used: list[str], void: bool, worst: bool) -> Entry:
    if bool(used) + void + worst != 1:
        raise InputError("say what became of the call: --used MODEL=INPUT,OUTPUT, --void or --worst")
    if void:
        return ledger.void(key)
    return ledger.settle(key, None if worst else dict(_usage(text) for text in used))


def _usage(text: str) -> tuple[str, TokenCount]:
    model, equals, counts = text.rpartition("=")
    try:
        if not equals:
            raise ValueError
        read, made = counts.split(",")
        return model, TokenCount(int(read), int(made))
    except ValueError:
        raise InputError(f"not a usage: {text!r}; write MODEL=INPUT,OUTPUT such as gpt-5=1200,80") from None


def _reported(file: Path) -> Iterator[tuple[str, dict[str, TokenCount] | None]]:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # not at U+2028, which JSON may hold as it is
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            usage = row["usage"]
            counts = None if usage is None else {name: TokenCount(**count) for name, count in usage.items()}
            yield row["key"], counts
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f'{file}, line {number}: not a call with its usage ({error!r}); write {{"key": ..., "usage": ...}}'
            ) from None


# What is shown


def _budget_json(budget: Budget) -> dict[str, Any]:
    return asdict(budget) | {
        "window": None if budget.window is None else str(budget.window),
        "left_nanousd": budget.left_nanousd,
        "left_tokens": budget.left_tokens,
    }


def _hold_json(hold: Hold) -> dict[str, Any]:
    from viaticum.budgets.records import price_json

    return asdict(hold) | {"prices": {model: price_json(price) for model, price in hold.prices.items()}}


def _entry_json(entry: Entry) -> dict[str, Any]:
    from viaticum.budgets.records import price_json

    row = asdict(entry)
    row["prices"] = {model: price_json(price) for model, price in entry.prices.items()}
    row["models"] = row.pop("usage")
    row["strategy"] = entry.note.get("tags", {}).get("strategy")
    return {name: row[name] for name in ENTRY_FIELDS}


def _print_budgets(budgets: list[Budget], as_json: bool, *, one: bool = False) -> None:
    if as_json:
        rows = [_budget_json(each) for each in budgets]
        _print_json(rows[0] if one else rows)
        return
    table = _table("budget", "limit", "spent", "held", "left", "per", "state")
    for each, depth in _as_tree(budgets):
        table.add_row(
            "  " * depth + each.name,
            _both(each.limit_nanousd, each.limit_tokens),
            _amount(each, each.posted_nanousd, each.posted_tokens),
            _amount(each, each.held_nanousd, each.held_tokens),
            _both(each.left_nanousd, each.left_tokens),
            str(each.window or "-"),
            each.state,
        )
    _print(table)


def _as_tree(budgets: list[Budget]) -> Iterator[tuple[Budget, int]]:
    """Each budget after its parent, with its depth; one whose parent is not shown stands at the left."""
    names = {each.name for each in budgets}
    below: dict[str | None, list[Budget]] = {}
    for each in budgets:
        below.setdefault(each.parent if each.parent in names else None, []).append(each)

    def walk(parent: str | None, depth: int) -> Iterator[tuple[Budget, int]]:
        for each in below.get(parent, ()):
            yield each, depth
            yield from walk(each.name, depth + 1)

    yield from walk(None, 0)


def _print_holds(holds: list[Hold]) -> None:
    table = _table("call", "budget", "state", "held", "tokens", "since", "lease until")
    for hold in holds:
        table.add_row(
            hold.key,
            hold.budget,
            hold.state,
            format_usd(hold.held_nanousd),
            str(hold.held_tokens),
            hold.created[:19],
            hold.until[:19],
        )
    _print(table)


def _print_entries(entries: Iterable[Entry]) -> None:
    table = _table("id", "at", "budget", "call", "kind", "amount", "tokens", "overrun")
    for entry in entries:
        table.add_row(
            str(entry.id),
            entry.at[:19],
            entry.budget,
            entry.key or "-",
            entry.kind,
            format_usd(entry.nanousd),
            str(entry.tokens),
            format_usd(entry.overrun) if entry.overrun else "",
        )
    _print(table)


def _both(nanousd: int | None, tokens: int | None) -> str:
    dollars = None if nanousd is None else format_usd(nanousd)
    return (
        ", ".join(part for part in (dollars, None if tokens is None else f"{tokens} tokens") if part) or "-"
    )


def _amount(budget: Budget, nanousd: int, tokens: int) -> str:
    return _both(nanousd, tokens if budget.limit_tokens is not None else None)


def _count(number: int | None) -> str:
    return "no limit" if number is None else str(number)


def _table(*columns: str) -> Table:
    table = Table(*columns, box=None, pad_edge=False)
    for column in table.columns:
        column.no_wrap, column.overflow = True, "fold"
    return table


def _print(table: Table) -> None:
    """As wide as it is where nobody looks, so that no line is cut."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_NO_LIMIT)
    console.print(table, markup=False)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value))


def _write_csv(file: TextIO, fields: Iterable[str], rows: Iterable[dict[str, Any]]) -> None:
    writer = _csv_writer(file, fields)
    for row in rows:
        writer.writerow(_cells(row))


def _csv_writer(file: TextIO, fields: Iterable[str]) -> csv.DictWriter[str]:
    writer = csv.DictWriter(file, list(fields), lineterminator="\n")
    writer.writeheader()
    return writer


def _cells(row: dict[str, Any]) -> dict[str, Any]:
    """Values that are tables themselves as JSON."""
    return {
        name: json.dumps(value) if isinstance(value, dict | list) else value for name, value in row.items()
    }


@contextmanager
def _opened(out: Path | None) -> Iterator[TextIO]:
    if out is None:
        yield sys.stdout
        return
    try:
        with out.open("w", encoding="utf-8", newline="") as file:
            yield file
    except OSError as error:
        raise ViaticumError(f"cannot write {out}: {error.strerror}; give another path") from error
