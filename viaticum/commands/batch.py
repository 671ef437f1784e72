"""`viaticum batch`: a file of questions within a budget.

Leaves out errors and exit codes: see `viaticum.cli`.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from viaticum.commands.budget import Where
from viaticum.commands.generation import Load, MaxSeconds, Model, Only, Strategy, with_generation_options
from viaticum.commands.local import with_local_options
from viaticum.commands.models import CatalogueFile
from viaticum.commands.progress import LINE_SECONDS, StatusLine, loading_shown
from viaticum.commands.shadow import with_shadow_options
from viaticum.commands.soft_limits import with_soft_limit_options
from viaticum.commands.table import print_table
from viaticum.errors import InputError, ViaticumError
from viaticum.generation import NO_SETTINGS, GenerationSettings
from viaticum.local_settings import NO_LOCAL_SETTINGS, LocalSettings
from viaticum.money import format_usd
from viaticum.signals import SignalHandler

EXIT_DRAINED = 3  # exit code of a job that is not through: --resume goes on
_SPAN = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?")


Source = Annotated[
    Path,
    typer.Argument(
        metavar="INPUT",
        help="JSONL, OpenAI's batch format, CSV or Parquet; the results alone where --resume goes on.",
    ),
]
Dollars = Annotated[str | None, typer.Option("--budget", help="Dollars that all of it may cost at most.")]
Out = Annotated[Path | None, typer.Option(help="The results: .jsonl, .csv or .parquet.")]
Policy = Annotated[
    str,
    typer.Option(
        help="paced (most right answers for the money), within:DISTANCE, best, cheapest:ACCURACY, "
        "fastest:ACCURACY or weighted:PER_DOLLAR"
    ),
]
Deadline = Annotated[
    str | None,
    typer.Option(help="No row is begun after it: 2h, or 24h for half-price batches."),
]
Engine = Annotated[str, typer.Option(help="local, or ray for several machines.")]
ClusterAddress = Annotated[
    str | None,
    typer.Option(
        help="With --engine ray: the address of a cluster, or auto. [default: begin one on this machine]"
    ),
]
Workers = Annotated[int, typer.Option(help="With --engine ray: workers, each with its own models.", min=1)]
Gpus = Annotated[float, typer.Option(help="With --engine ray: GPUs of each worker, such as 0.5.", min=0)]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with a job that was interrupted or has more money.")
]
NoWait = Annotated[
    bool,
    typer.Option(
        "--no-wait", help="End when all is sent that waits for providers' batches; --resume collects."
    ),
]
Cancel = Annotated[
    bool, typer.Option("--cancel", help="With --resume: cancel the batches at providers, and end the job.")
]
Force = Annotated[bool, typer.Option("--force", help="Start over, whatever is there.")]
DryRunFlag = Annotated[
    bool, typer.Option("--dry-run", help="Show what several budgets would buy; ask nothing.")
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out rows that cannot be used.")]
Skip = Annotated[int, typer.Option(help="Leave out the first so many rows.", min=0)]
Limit = Annotated[int | None, typer.Option(help="Take at most so many rows.", min=1)]
Format = Annotated[
    str | None,
    typer.Option("--format", help="jsonl, openai, csv or parquet, where the suffix does not say."),
]
Router = Annotated[Path | None, typer.Option(help="The folder of a fitted router.", metavar="DIR")]
CacheFile = Annotated[
    Path | None,
    typer.Option(help="Answers to share between jobs. [default: the job's own]", metavar="FILE"),
]
KeepTexts = Annotated[bool, typer.Option("--keep-texts", help="Keep what the models wrote.")]
Concurrency = Annotated[int, typer.Option(help="Calls at once.", min=1)]
Timeout = Annotated[float | None, typer.Option(help="Seconds that one call may take.")]
Grace = Annotated[
    float, typer.Option(help="Seconds that running calls have to end after SIGTERM or Ctrl-C.", min=0)
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print events as JSON lines on stdout.")]


@with_local_options
@with_generation_options
@with_shadow_options
@with_soft_limit_options
def batch(
    invocation: typer.Context,
    source: Source,
    dollars: Dollars = None,
    out: Out = None,
    policy: Policy = "paced",
    deadline: Deadline = None,
    engine: Engine = "local",
    cluster: ClusterAddress = None,
    workers: Workers = 2,
    gpus: Gpus = 0.0,
    resume: Resume = False,
    force: Force = False,
    no_wait: NoWait = False,
    cancel: Cancel = False,
    dry_run: DryRunFlag = False,
    skip_bad: SkipBad = False,
    skip: Skip = 0,
    limit: Limit = None,
    form: Format = None,
    router: Router = None,
    model: Model = None,
    strategy: Strategy = None,
    only: Only = None,
    max_seconds: MaxSeconds = None,
    load: Load = None,
    cache: CacheFile = None,
    keep_texts: KeepTexts = False,
    concurrency: Concurrency = 32,
    timeout: Timeout = None,
    grace: Grace = 30.0,
    generation: GenerationSettings = NO_SETTINGS,
    local: LocalSettings = NO_LOCAL_SETTINGS,
    shadow: Any = None,
    soft_limits: Any = None,
    where: Where = None,
    as_json: JsonFlag = False,
    catalogue: CatalogueFile = None,
) -> None:
    """Answer a file of questions: as many right as the budget buys, and never more spent.

    Killed or interrupted, `viaticum batch --resume RESULTS` goes on as it began and pays for nothing twice.
    Exit code 3: it was told to end before it was through, or rows wait for a provider's batch.
    """
    rows = {"skip": skip, "limit": limit, "format": form}
    routing = {"router": router, "model": model, "strategy": strategy, "strategies": load or (), "only": only}
    common = (
        rows
        | routing
        | {
            "budget": dollars,
            "policy": policy,
            "deadline": None if deadline is None else seconds_of(deadline),
            "catalogue": catalogue,
            "concurrency": concurrency,
            "generation": generation,
            "local": local,
        }
    )
    if dry_run:
        return _dry_run(source, as_json, common)
    flags = {"resume": resume, "force": force, "skip_bad": skip_bad, "keep_texts": keep_texts}
    flags |= {"wait": not no_wait, "cancel": cancel}
    calls = {"cache": cache, "timeout": timeout, "drain_seconds": grace, "ledger": where}
    calls |= {"max_seconds": max_seconds, "shadow": shadow, "soft_limits": soft_limits}
    job = common | _engine_settings(engine, cluster, workers, gpus) | flags | calls
    if not resume:
        return _run(source, out, as_json, job)
    if out is None:  # viaticum batch --resume RESULTS
        return _run(None, source, as_json, _given(invocation, job))
    return _run(source, out, as_json, _given(invocation, job))


def _engine_settings(engine: str, address: str | None, workers: int, gpus: float) -> dict[str, Any]:
    from viaticum.agents.batch.workers import Cluster

    if engine == "ray":
        return {"engine": engine, "cluster": Cluster(address, workers, gpus=gpus)}
    if (address, workers, gpus) != (None, 2, 0.0):
        raise InputError(
            "--cluster, --workers and --gpus are for --engine ray; give that too, or leave them out"
        )
    return {"engine": engine, "cluster": None}


# The parameters of this command whose settings have another name.
_PARAMETERS = {
    "budget": "dollars",
    "format": "form",
    "strategies": "load",
    "drain_seconds": "grace",
    "ledger": "where",
    "wait": "no_wait",
}


def _given(invocation: typer.Context, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that stand on the command line: the job that goes on remembers the others."""

    def is_default(parameter: str) -> bool:
        source = invocation.get_parameter_source(parameter)
        return source is None or source.name.startswith("DEFAULT")

    unset = {"generation": NO_SETTINGS, "local": NO_LOCAL_SETTINGS, "shadow": None, "soft_limits": None}
    return {
        name: value
        for name, value in settings.items()
        if (value != unset[name] if name in unset else not is_default(_PARAMETERS.get(name, name)))
    }


def _run(source: Path | None, out: Path | None, as_json: bool, settings: dict[str, Any]) -> None:
    """Run the job; on a signal let running calls end. Exits with `EXIT_DRAINED` after that."""
    from viaticum.agents.batch import run_batch

    if out is None:
        raise InputError("say where the results go: --out RESULTS.jsonl")
    stop = threading.Event()

    def drain(number: int) -> None:
        stop.set()
        sys.stderr.write("\nending: running calls are finished and settled; once more ends at once\n")

    with SignalHandler(drain, once=True), _EventPrinter(as_json) as printer, loading_shown():
        ended = run_batch(source, out, stop=stop, tell=printer.print, **settings)
    if ended.job.ending in ("drained", "waiting"):
        raise typer.Exit(EXIT_DRAINED)


def seconds_of(text: str) -> float:
    """Parse a span of time as seconds: 2h, 90m, 1h30m, 45s or 45. Raises `InputError` for anything else."""
    found = _SPAN.fullmatch(text.strip().lower())
    parts = [float(part or 0) for part in found.groups()] if found else []
    seconds = sum(part * unit for part, unit in zip(parts, (86_400, 3_600, 60, 1), strict=False))
    if not seconds > 0:
        raise InputError(f"not a span of time: {text!r}; write 2h, 90m or 45s")
    return seconds


class _EventPrinter:
    """Prints the events of a job: one line that is overwritten on a terminal, lines elsewhere, or JSON."""

    def __init__(self, as_json: bool) -> None:
        self._json, self._line = as_json, StatusLine()
        self._last, self._started = 0.0, False

    def __enter__(self) -> _EventPrinter:
        return self

    def __exit__(self, *error: object) -> None:
        self._line.close()
        if self._started and isinstance(error[1], ViaticumError) and "--resume" not in str(error[1]):
            sys.stderr.write("stopped by an error; what was done is kept: go on with --resume\n")

    def print(self, event: dict[str, Any]) -> None:
        self._started |= event["event"] == "started"
        if self._json:
            sys.stdout.write(json.dumps(event) + "\n")
            sys.stdout.flush()
            return
        kind = event["event"]
        if kind == "reading":
            self._line.write(f"reading {event['input']}", last=True)
        elif kind == "shadow":
            self._line.write(f"asking a sample again of {event['model']}; the results are written", last=True)
        elif kind == "ended":
            self._end(event)
        elif self._line.terminal or kind == "started" or time.monotonic() - self._last >= LINE_SECONDS:
            from viaticum.agents.batch.progress import progress_line, waiting_line

            self._last = time.monotonic()
            line = progress_line(event)
            if kind == "waiting":
                line = f"{waiting_line(event['batches'])} · {line} · Ctrl-C leaves, --resume collects"
            self._line.write(line, last=not self._line.terminal)

    def _end(self, event: dict[str, Any]) -> None:
        from viaticum.agents.batch.progress import progress_line, waiting_line

        self._line.write(progress_line(event), last=True)
        ending, batches = event["ending"].replace("_", " "), event.get("batches", ())
        more = f"; results in {event['results']}"
        if event["ending"] in ("drained", "waiting"):
            more = f" (go on with: viaticum batch --resume {event['results']})"
        if batches:
            typer.echo(waiting_line(batches))
            for batch in batches:
                name, rows = batch["id"] or "not sent yet", f"{batch['rows']} rows of {batch['model']}"
                typer.echo(f"  {name}: {rows}, {batch['status']}")
        typer.echo(
            f"{ending}: {event['answered']} answered, {event['failed']} failed, "
            f"{event['skipped']} skipped{more}"
        )


def _dry_run(source: Path, as_json: bool, settings: dict[str, Any]) -> None:
    from viaticum.agents.batch import preview_batch

    if settings["budget"] is None:
        raise InputError("say which budget to look around: --budget 20")
    found = preview_batch(source, **settings)
    if as_json:
        previews = [asdict(each) for each in found.previews]
        typer.echo(
            json.dumps(
                {
                    "rows": found.rows,
                    "bad": found.bad,
                    "problems": found.problems,
                    "previews": previews,
                    "routes": found.routes,
                    "origins": found.origins,
                }
            )
        )
        return
    rows = [
        (
            format_usd(each.budget_nanousd),
            f"{each.accuracy:.1%}",
            format_usd(each.cost_p50),
            format_usd(each.cost_p90),
        )
        for each in found.previews
    ]
    print_table(("budget", "right", "$ p50", "$ p90"), rows)
    planned = sum(found.routes.values())
    for route, count in found.routes.items():
        typer.echo(f"{count / planned:.0%} {route}")
    for origin in found.origins:
        typer.echo(f"estimates: {origin}")
    typer.echo(f"{found.rows} rows" + (f", {found.bad} of them cannot be used" if found.bad else ""))
    for problem in found.problems:
        typer.echo(problem)
    if not found.previews:
        typer.echo(
            "the rows name their models, or the policy chooses each alone: there is nothing to foretell"
        )
