"""`viaticum budget spending`: what was spent by team, key, model, tag or time; a table, CSV or a page.

Leaves out counting: see `viaticum.reports.spending`.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from viaticum.commands.budget import AnyName, CsvFlag, JsonFlag, ReadOnly, Where, Zone
from viaticum.commands.budget_input import opened_ledger
from viaticum.commands.budget_output import open_output, print_json
from viaticum.commands.table import print_table
from viaticum.errors import InputError
from viaticum.money import format_usd

if TYPE_CHECKING:
    from viaticum.reports.spending import Spending

DEFAULT = ("team", "key", "model")


def spending(
    name: AnyName = None,
    by: Annotated[
        list[str] | None,
        typer.Option(
            help="team, key, model, budget, root, day, week, month or tag:NAME; may be given several times. "
            "By default team, key and model.",
            metavar="WHAT",
        ),
    ] = None,
    since: Annotated[
        str | None, typer.Option(help="Only from this day or time on, such as 2026-11-01.", metavar="TIME")
    ] = None,
    until: Annotated[
        str | None, typer.Option(help="Only before this day or time, such as 2026-12-01.", metavar="TIME")
    ] = None,
    zone: Zone = "UTC",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A .csv file, or a page: .html.", metavar="FILE")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    as_json: JsonFlag = False,
    as_csv: CsvFlag = False,
    read_only: ReadOnly = False,
    where: Where = None,
) -> None:
    """What was spent by team, key and model, or by other labels, for whoever charges it on.

    Counts what the ledger posted. Team and key are those of the server's API keys; code sets its own labels
    with viaticum.tagged(team="search"), a process with VIATICUM_TAGS=team=search.
    """
    from viaticum.reports.spending import checked_dimensions, read_spending

    dimensions = checked_dimensions(by or DEFAULT)
    times = _time(since, zone), _time(until, zone)
    if out is not None:
        _refuse(out, force)
    with opened_ledger(where, read_only=read_only) as ledger:
        if out is not None and out.suffix == ".html":
            from viaticum.reports.spending_page import write_spending_page

            write_spending_page(out, ledger, budget=name, since=times[0], until=times[1], zone=zone)
            typer.echo(f"spending in {out}")
            return
        found = read_spending(ledger, dimensions, budget=name, since=times[0], until=times[1], zone=zone)
    if as_json:
        print_json({"by": found.by, "lines": found.rows(), "calls": found.calls, "nanousd": found.nanousd})
    elif as_csv or out is not None:
        with open_output(out) as file:
            file.write(found.to_csv())
    else:
        _print(found)
    if found.unknown:
        calls = f"{found.unknown:,} call{'s' * (found.unknown != 1)}"
        typer.echo(
            f"not counted: {format_usd(found.unknown_nanousd)} held for {calls} whose end is not known "
            "(viaticum budget reconcile)",
            err=True,
        )


def _print(found: Spending) -> None:
    rows = [
        (
            *line.labels,
            f"{line.calls:,}",
            f"{line.input_tokens:,}",
            f"{line.output_tokens:,}",
            format_usd(line.nanousd),
        )
        for line in found.lines
    ]
    if rows:
        print_table((*found.by, "calls", "read", "wrote", "spent"), rows, spare=("read", "wrote", "calls"))
    calls = f"{found.calls:,} call{'s' * (found.calls != 1)}"
    typer.echo(f"{format_usd(found.nanousd)} spent in {calls}")


def _time(text: str | None, zone: str) -> datetime | None:
    """A day or a time, in the time zone where it names none."""
    if text is None:
        return None
    from zoneinfo import ZoneInfo

    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise InputError(f"not a day or time: {text!r}; write 2026-11-01 or 2026-11-01T08:00") from None
    try:
        return (moment if moment.tzinfo else moment.replace(tzinfo=ZoneInfo(zone))).astimezone(UTC)
    except (KeyError, ValueError, OSError):
        raise InputError(f"unknown time zone {zone!r}; use a name such as Europe/Berlin") from None


def _refuse(out: Path, force: bool) -> None:
    if out.suffix not in (".csv", ".html"):
        raise InputError(f"cannot tell the format of {out}; name it .csv or .html")
    if out.exists() and not force:
        raise InputError(f"{out} is there already; name another file, or write over it with --force")
