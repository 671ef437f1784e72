"""`viaticum report`: what runs got for their money, as a file to open, to paste or to read by machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Folders of jobs (RESULTS.jsonl.job), their RESULTS, or outcome tables.", metavar="RUN"
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The file to write; by default report.html, or as the format ends."),
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="html, md, json or png; by default what the file's name ends in.")
    ] = None,
    outcomes: Annotated[
        list[Path] | None,
        typer.Option(help="Outcome tables of the same questions: single pairs, hull and oracle."),
    ] = None,
    ledger: Annotated[
        str | None, typer.Option(help="Where the ledger is, if not where the job says.", metavar="WHERE")
    ] = None,
    title: Annotated[str | None, typer.Option(help="By default the runs' names.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Report on runs: one file that opens offline; several runs are compared with the first."""
    from viaticum.reports import build
    from viaticum.reports.formatting import verdict
    from viaticum.reports.overview import notices

    out = out or Path(f"report.{format or 'html'}")
    made = build(runs, out, format=format, outcomes=outcomes, ledger=ledger, title=title, force=force)  # type: ignore[arg-type]
    summaries = [
        {"name": each.run.name, "verdict": verdict(each), "notices": list(notices(each))}
        for each in made.numbers.runs
    ]
    if as_json:
        typer.echo(
            json.dumps({"path": str(made.path), "format": made.format, "runs": summaries}, ensure_ascii=False)
        )
        return
    for each in summaries:
        typer.echo(f"{each['name']}: {each['verdict']}")
        for line in each["notices"]:
            typer.echo(line, err=True)
    typer.echo(f"report in {made.path}")
