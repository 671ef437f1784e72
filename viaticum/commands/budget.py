"""`viaticum budget`: create and list budgets, show their entries, reconcile unknown calls, verify and export.

Results go to stdout. Leaves out errors and exit codes: `viaticum.cli` turns a `ViaticumError` into one line
and exit code 1.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from viaticum.commands.budget_input import heads_from, opened_ledger, reported_usage, settle_one, window_from
from viaticum.commands.budget_output import (
    ENTRY_FIELDS,
    budget_json,
    csv_cells,
    csv_writer,
    entry_json,
    format_count,
    hold_json,
    open_output,
    print_budgets,
    print_entries,
    print_holds,
    print_json,
    print_list,
    write_csv,
)
from viaticum.commands.table import print_table
from viaticum.errors import InputError, UnknownName
from viaticum.money import budget_nanousd, format_usd

if TYPE_CHECKING:
    from viaticum.budgets import Entry

app = typer.Typer(
    no_args_is_help=True, help="Create and list budgets, reconcile calls, verify and export the ledger."
)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
CsvFlag = Annotated[bool, typer.Option("--csv", help="Print CSV on stdout.")]
Where = Annotated[
    str | None,
    typer.Option(
        "--ledger",
        help="An SQLite file or a postgresql:// address; default: this user's ledger.",
        metavar="WHERE",
        envvar="VIATICUM_LEDGER",
    ),
]
Name = Annotated[str, typer.Argument(help="A budget.")]
AnyName = Annotated[str | None, typer.Argument(help="One budget; all by default.")]
ReadOnly = Annotated[
    bool, typer.Option("--read-only", help="For a file that must not be written, or is damaged.")
]
Dollars = Annotated[str | None, typer.Option("--limit", help="Upper bound in dollars.", metavar="USD")]
Tokens = Annotated[int | None, typer.Option("--tokens", help="Upper bound in tokens.")]
Per = Annotated[
    str | None, typer.Option("--per", help="Apply the limit per hour, day or month.", metavar="WINDOW")
]
Rolling = Annotated[
    bool, typer.Option("--rolling", help="The last hour, day or 30 days instead of the calendar's.")
]
Zone = Annotated[str, typer.Option("--zone", help="Time zone of the calendar, such as Europe/Berlin.")]


@app.command()
def create(
    name: Name,
    limit: Dollars = None,
    tokens: Tokens = None,
    parent: Annotated[str | None, typer.Option(help="The parent budget.")] = None,
    per: Per = None,
    rolling: Rolling = False,
    zone: Zone = "UTC",
    only: Annotated[
        str | None,
        typer.Option(
            "--only",
            help="Labels of models, a,b,c: calls of others are not paid from it, here and below. It never "
            "changes.",
        ),
    ] = None,
    as_json: JsonFlag = False,
    where: Where = None,
) -> None:
    """Create a budget. Below a parent, whose limits apply as well, its own limit is optional."""
    from viaticum.budgets import Ledger

    with Ledger(where) as ledger:
        created = ledger.create(
            name,
            limit_nanousd=None if limit is None else budget_nanousd(limit),
            limit_tokens=tokens,
            parent=parent,
            window=window_from(per, rolling, zone),
            only=only,
        )
    print_budgets([created], as_json, one=True)


@app.command("set")
def set_terms(
    name: Name,
    limit: Dollars = None,
    tokens: Tokens = None,
    per: Per = None,
    rolling: Rolling = False,
    zone: Zone = "UTC",
    no_window: Annotated[bool, typer.Option("--no-window", help="Apply the limit to all time.")] = False,
    pause: Annotated[bool, typer.Option("--pause", help="Refuse new calls until resumed.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Accept calls again.")] = False,
    close: Annotated[bool, typer.Option("--close", help="Refuse new calls for good.")] = False,
    reason: Annotated[str, typer.Option(help="Stored with the entry.")] = "",
    as_json: JsonFlag = False,
    where: Where = None,
) -> None:
    """Change the limits or the window; pause, resume or close. Each change is an entry."""
    terms: dict[str, Any] = {}
    if limit is not None:
        terms["limit_nanousd"] = budget_nanousd(limit)
    if tokens is not None:
        terms["limit_tokens"] = tokens
    if per is not None or no_window:
        terms["window"] = None if no_window else window_from(per, rolling, zone)
    if pause + resume + close > 1 or not (terms or pause or resume or close):
        raise InputError(
            "say what to change: --limit, --tokens, --per or one of --pause, --resume and --close"
        )
    with opened_ledger(where) as ledger:
        if terms:
            ledger.set_limit(name, **terms)
        for wanted, change in (
            (pause, ledger.pause),
            (resume, ledger.resume),
            (close, ledger.close_budget),
        ):
            if wanted:
                change(name, reason)
        print_budgets([ledger.budget(name)], as_json, one=True)


@app.command("list")
def list_budgets(
    every: Annotated[
        bool,
        typer.Option("--all", help="Each run on a line of its own, instead of one line for all of a kind."),
    ] = False,
    as_json: JsonFlag = False,
    as_csv: CsvFlag = False,
    read_only: ReadOnly = False,
    where: Where = None,
) -> None:
    """List budgets below their parents: limit, spent, held, left, and the days of the first and last entry.

    Runs, batches and other budgets with names that were made up are one line for each kind; JSON and CSV have
    every budget.
    """
    with opened_ledger(where, read_only=read_only) as ledger:
        budgets, times = ledger.budgets(), ledger.times()
    if as_csv or as_json:
        rows = [
            budget_json(each) | dict(zip(("began", "last"), times.get(each.name, ("", "")), strict=True))
            for each in budgets
        ]
        if as_json:
            print_json(rows)
        else:
            write_csv(sys.stdout, list(rows[0]) if rows else ["name"], rows)
        return
    print_list(budgets, times, group=not every)


@app.command()
def show(
    name: AnyName = None, as_json: JsonFlag = False, read_only: ReadOnly = False, where: Where = None
) -> None:
    """Show limit, spent, held and left; for one budget also its parents and its open calls."""
    with opened_ledger(where, read_only=read_only) as ledger:
        if name is None:
            print_budgets(ledger.budgets(), as_json)
            return
        lineage = ledger.lineage(name)
        states = ("reserved", "dispatched", "unknown")
        holds = [hold for state in states for hold in ledger.holds(name, state)]  # type: ignore[arg-type]
    if as_json:
        parents = [budget_json(each) for each in lineage[:-1]]
        print_json(budget_json(lineage[-1]) | {"above": parents, "open": [hold_json(hold) for hold in holds]})
        return
    print_budgets(lineage, as_json)
    if holds:
        print_holds(holds)


@app.command("entries")
def list_entries(
    name: AnyName = None,
    key: Annotated[str | None, typer.Option(help="Only those of one call.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only those of one kind, such as post.")] = None,
    last: Annotated[int, typer.Option(help="Only this many of the newest; 0 for all.", min=0)] = 50,
    as_json: JsonFlag = False,
    as_csv: CsvFlag = False,
    read_only: ReadOnly = False,
    where: Where = None,
) -> None:
    """List the entries, oldest first. --json prints one object per line."""
    from viaticum.budgets.records import EntryKind

    if kind is not None and kind not in get_args(EntryKind):
        raise UnknownName("kind of entry", kind, get_args(EntryKind))
    entries: deque[Entry] = deque(maxlen=last or None)
    with opened_ledger(where, read_only=read_only) as ledger:
        ledger.each_entry(
            lambda entry: entries.append(entry) if kind in (None, entry.kind) else None, name, key
        )
    if as_json:
        for entry in entries:
            print_json(entry_json(entry))
    elif as_csv:
        write_csv(sys.stdout, ENTRY_FIELDS, (entry_json(entry) for entry in entries))
    else:
        print_entries(entries)


@app.command()
def forecast(
    name: Name,
    model: Annotated[str | None, typer.Option(help="Use calls of this model or pair.")] = None,
    strategy: Annotated[str | None, typer.Option(help="Use calls with this strategy.")] = None,
    last: Annotated[int, typer.Option(help="Use this many of the newest calls.", min=1)] = 1000,
    as_json: JsonFlag = False,
    read_only: ReadOnly = False,
    where: Where = None,
) -> None:
    """Show p50 and p90 of the cost of settled calls, and how many more calls the limits allow."""
    from viaticum.budgets import forecast as forecast_calls

    tags = {name: value for name, value in (("model", model), ("strategy", strategy)) if value is not None}
    with opened_ledger(where, read_only=read_only) as ledger:
        found = forecast_calls(ledger, name, tags, last)
    if as_json:
        print_json({"budget": name, "tags": tags} | asdict(found))
        return
    rows = (
        ("p50", format_usd(found.cost_p50), str(found.tokens_p50), format_count(found.calls_p50)),
        ("p90", format_usd(found.cost_p90), str(found.tokens_p90), format_count(found.calls_p90)),
    )
    print_table(("", "cost", "tokens", "calls left"), rows)
    typer.echo(f"from {found.past_calls} settled calls")


@app.command()
def reconcile(
    key: Annotated[str | None, typer.Argument(help="One call; without it, list the unknown calls.")] = None,
    used: Annotated[
        list[str] | None, typer.Option(help="Tokens it used: MODEL=INPUT,OUTPUT.", metavar="USAGE")
    ] = None,
    void: Annotated[bool, typer.Option("--void", help="It was not charged.")] = False,
    worst: Annotated[bool, typer.Option("--worst", help="Usage unknown: post all that is held.")] = False,
    file: Annotated[
        Path | None,
        typer.Option(help='JSONL from a provider: {"key", "usage": {MODEL: {"input_tokens", ...}} or null}.'),
    ] = None,
    crashed: Annotated[
        bool, typer.Option("--crashed", help="No process uses this ledger now: end every lease.")
    ] = False,
    as_json: JsonFlag = False,
    where: Where = None,
) -> None:
    """End expired leases, then list the calls whose outcome is unknown, or settle one or many of them."""
    with opened_ledger(where) as ledger:
        expired = ledger.expire_leases(datetime(9998, 1, 1, tzinfo=UTC) if crashed else None)
        settled: list[Entry] = []
        if key is not None:
            settled = [settle_one(ledger, key, used or [], void, worst)]
        elif used or void or worst:
            raise InputError("name the call: viaticum budget reconcile KEY ...")
        if file is not None:
            settled += [
                ledger.void(each) if usage is None else ledger.settle(each, usage)
                for each, usage in reported_usage(file)
            ]
        unknown = ledger.holds(state="unknown")
    if as_json:
        print_json(
            {
                "expired": [entry.key for entry in expired if entry.kind == "expire"],
                "settled": [entry_json(entry) for entry in settled],
                "unknown": [hold_json(hold) for hold in unknown],
            }
        )
        return
    for entry in settled:
        typer.echo(f"{entry.key}: {entry.kind} {format_usd(entry.nanousd)}, {entry.tokens} tokens")
    for entry in expired:
        if entry.kind == "expire":
            typer.echo(f"{entry.key}: expired, {format_usd(entry.nanousd)} is free again")
    if unknown:
        print_holds(unknown)
    else:
        typer.echo("no call is unknown")


@app.command()
def verify(
    name: AnyName = None,
    head: Annotated[
        Path | None,
        typer.Option(help="What an earlier `verify --json` printed: the entries of then must be the same."),
    ] = None,
    as_json: JsonFlag = False,
    read_only: ReadOnly = False,
    where: Where = None,
) -> None:
    """Replay all entries and compare every row; exit code 1 if one was altered or a limit was exceeded."""
    kept = None if head is None else heads_from(head)
    with opened_ledger(where, read_only=read_only) as ledger:
        findings = ledger.check(name, heads=kept)
        heads = {} if findings else ledger.chain_heads()
        if heads and name is not None:  # the tree that was checked, and no other
            root = ledger.lineage(name)[0].name
            heads = {root: heads[root]}
    if as_json:
        ends = {root: {"entries": count, "head": last} for root, (count, last) in heads.items()}
        print_json({"ok": not findings, "findings": findings, "heads": ends})
    else:
        for finding in findings:
            typer.echo(finding)
        for root, (count, last) in heads.items():
            typer.echo(f"ok: {root}: {count} entries, the last with hash {last}")
    if findings:
        raise typer.Exit(1)


@app.command()
def clock(
    name: Name,
    reason: Annotated[str, typer.Option(help="Stored with the entry.")] = "",
    as_json: JsonFlag = False,
    where: Where = None,
) -> None:
    """Let a budget's tree go on at this machine's time, after a clock that ran ahead. It is an entry."""
    with opened_ledger(where) as ledger:
        entry = ledger.restart_clock(name, reason)
    if as_json:
        print_json(None if entry is None else entry_json(entry))
    elif entry is None:
        typer.echo(f"nothing to do: no entry of {name} is later than now")
    else:
        typer.echo(f"{entry.budget}: goes on at {entry.at}; it had reached {entry.note['was']}")


@app.command()
def backup(file: Annotated[Path, typer.Argument(help="A new file.")], where: Where = None) -> None:
    """Copy a ledger file into a new one, consistently, while it is in use."""
    with opened_ledger(where, read_only=True) as ledger:
        ledger.backup(file)
    typer.echo(f"{file}: verify it with viaticum budget verify --ledger {file}")


@app.command()
def export(
    name: AnyName = None,
    out: Annotated[Path | None, typer.Option(help="A .csv or .jsonl file; default: CSV on stdout.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False,
    read_only: ReadOnly = False,
    where: Where = None,
) -> None:
    """Write every entry with all its columns, as CSV or JSON lines."""
    if out is not None and out.suffix not in (".csv", ".jsonl"):
        raise InputError(f"cannot tell the format of {out}; name it .csv or .jsonl")
    as_lines = as_json or (out is not None and out.suffix == ".jsonl")
    with opened_ledger(where, read_only=read_only) as ledger, open_output(out) as file:
        if as_lines:
            ledger.each_entry(lambda entry: file.write(json.dumps(entry_json(entry)) + "\n"), name)
        else:
            writer = csv_writer(file, ENTRY_FIELDS)
            ledger.each_entry(lambda entry: writer.writerow(csv_cells(entry_json(entry))), name)
