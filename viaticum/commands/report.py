"""`viaticum report`: what runs got for their money, as a file to open, to paste or to read by machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from viaticum.errors import InputError


def report(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Folders of jobs (RESULTS.jsonl.job), their RESULTS, or outcome tables; with --all, folders "
            "in which jobs are looked for, by default this one.",
            metavar="RUN",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="The file to write; by default report.html, or as the format ends; with --all, a folder.",
        ),
    ] = None,
    every: Annotated[
        bool,
        typer.Option(
            "--all", help="A folder of pages: a report on each job, an index with trends, and the spending."
        ),
    ] = False,
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
    force: Annotated[
        bool, typer.Option("--force", help="Write over a file that is there; with --all, every page anew.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Report on runs: one file that opens offline; several runs are compared with the first.

    With --all, reports on all jobs below some folders, with an index: viaticum report --all -o site/
    """
    if every:
        if format is not None or title is not None:
            raise InputError("--all writes pages of its own titles; leave --format and --title out")
        _write_site(runs or [Path()], out or Path("site"), outcomes, ledger, force, as_json)
        return
    if not runs:
        raise typer.BadParameter("name a run, or write a page for each with --all", param_hint="RUN")
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


def _write_site(
    folders: list[Path],
    out: Path,
    outcomes: list[Path] | None,
    ledger: str | None,
    force: bool,
    as_json: bool,
) -> None:
    from viaticum.commands.progress import ProgressBar
    from viaticum.reports.site import build_site

    with ProgressBar("reports", lines=False) as bar:
        site = build_site(folders, out, outcomes=outcomes, ledger=ledger, force=force, report=bar.report)
    if as_json:
        typer.echo(json.dumps({"path": str(site.index), "runs": site.runs, "made": site.made}))
        return
    for warning in site.warnings:
        typer.echo(warning, err=True)
    runs = f"{len(site.runs):,} run{'s' * (len(site.runs) != 1)}"
    typer.echo(f"{runs}, {site.made:,} of them new or changed; index in {site.index}")
