"""`viaticum trace`: a run in the terminal. Leaves out reading it (`reports.trace`)."""

from __future__ import annotations

import dataclasses

import typer

from viaticum.commands.budget import JsonFlag, Name, ReadOnly, Where
from viaticum.commands.budget_input import opened_ledger
from viaticum.commands.budget_output import print_json
from viaticum.commands.table import print_table
from viaticum.money import format_usd

_BAR = 10  # characters of what is left
_EIGHTHS = " ▏▎▍▌▋▊▉"
SPARE = ("key", "held", "read", "wrote", "at", "took")


def trace(name: Name, as_json: JsonFlag = False, read_only: ReadOnly = False, where: Where = None) -> None:
    """Draw a run: each call of a budget and of those below it, what it cost, and what was left.

    The budget is that of a client, an agent, `viaticum run` or a batch job; `viaticum budget list` names all.
    """
    from viaticum.reports.trace import Trace, TracedCall, read_trace

    with opened_ledger(where, read_only=read_only) as ledger:
        run: Trace = read_trace(ledger, name)
    if as_json:
        calls = [dataclasses.asdict(call) for call in run.calls]
        print_json({"budget": name, "seconds": run.seconds, "calls": calls})
        return
    limit = run.budget.limit_nanousd

    def row(call: TracedCall) -> tuple[str, ...]:
        what = call.tags.get("tool") or call.tags.get("strategy") or call.tags.get("door") or "-"
        return (
            "+".join(call.models),
            what if call.state == "done" else f"{what}, {call.state}",
            f"{call.started:.1f} s",
            "-" if call.seconds is None else f"{call.seconds:.1f} s",
            str(call.used.input_tokens),
            str(call.used.output_tokens),
            format_usd(call.held),
            format_usd(call.cost),
            _bar(call.left, limit),
            call.key,
        )

    columns = ("model", "what", "at", "took", "read", "wrote", "held", "cost", "left", "key")
    print_table(columns, map(row, run.calls), spare=SPARE)
    of = "" if limit is None else f" of {format_usd(limit)}"
    total = len(run.calls)
    typer.echo(
        f"{name}: {format_usd(sum(call.cost for call in run.calls))}{of} in {total} call"
        f"{'s' * (total != 1)}, {run.seconds:.1f} s"
    )
    for models, (number, cost) in run.by_model().items():
        typer.echo(f"  {models}: {number} call{'s' * (number != 1)}, {format_usd(cost)}")


def _bar(left: int | None, limit: int | None) -> str:
    """What is left of a budget, as a bar of `_BAR` characters."""
    if left is None or not limit:
        return ""
    eighths = max(0, round(left / limit * _BAR * 8))
    whole, rest = divmod(eighths, 8)
    return ("█" * whole + (_EIGHTHS[rest] if rest else "")).ljust(_BAR, "·")
