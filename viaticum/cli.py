"""The command line: wires the commands together, and turns errors into messages and exit codes.

Results go to stdout, progress to stderr. An error that Viaticum raises on purpose ends as one line and exit
code 1.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from viaticum.commands import budget, keys, models, router, sandbox, tokens
from viaticum.commands.batch import batch
from viaticum.commands.chat import chat
from viaticum.commands.progress import ProgressBar
from viaticum.commands.report import report
from viaticum.commands.serve import serve
from viaticum.commands.solve import solve
from viaticum.commands.token_policy import policy, policy_evaluate
from viaticum.errors import ViaticumError, WeightsError
from viaticum.money import format_usd
from viaticum.types import Pair

app = typer.Typer(
    no_args_is_help=True, help="An allowance for every question.", pretty_exceptions_enable=False
)
app.add_typer(models.app, name="models")
app.add_typer(router.app, name="router")
app.add_typer(tokens.app, name="tokens")
app.add_typer(sandbox.app, name="sandbox")
app.add_typer(budget.app, name="budget")
app.add_typer(keys.app, name="keys")
app.command()(batch)
app.command()(chat)
app.command()(serve)
tokens.app.command()(policy)
tokens.app.command()(policy_evaluate)
app.command()(report)
app.command()(solve)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


@app.command()
def profile(
    questions: Annotated[Path, typer.Argument(help="JSONL with question and answer.")],
    out: Annotated[Path, typer.Option(help="The outcome table: .parquet or .jsonl")],
    model: Annotated[list[str] | None, typer.Option(help="Models; all local ones by default.")] = None,
    strategy: Annotated[list[str] | None, typer.Option(help="Strategies; all by default.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many questions.", min=1)] = None,
    dataset: Annotated[str | None, typer.Option(help="What the table calls them; else the file.")] = None,
    slots: Annotated[int, typer.Option(help="Texts written at once.", min=1)] = 32,
    text: Annotated[bool, typer.Option(help="Keep the questions' texts in the table.")] = True,
    completions: Annotated[Path | None, typer.Option(help="JSONL for what the models wrote.")] = None,
    as_json: JsonFlag = False,
    catalogue: models.CatalogueFile = None,
) -> None:
    """Run local models with every strategy on questions with known answers; goes on after a kill."""
    from viaticum import strategies
    from viaticum.agents.batch.profile import profile as run
    from viaticum.catalogue import Catalogue
    from viaticum.outcomes import accuracy_interval
    from viaticum.questions import read_questions
    from viaticum.routers.query import StaticRouter

    loaded = Catalogue.load(catalogue)
    names = dict.fromkeys(model or [spec.name for spec in loaded.local() if spec.default])
    graded = [each for each in strategies.names() if strategies.get(each).graded]
    asks = dict.fromkeys(strategy or graded)
    pairs = [Pair(loaded[name].name, strategies.get(each).name) for name in names for each in asks]
    asked = read_questions(questions, limit=limit)
    with ProgressBar(lines=False) as bar:
        outcomes = run(
            asked,
            pairs,
            out,
            catalogue=loaded,
            dataset=dataset or questions.stem,
            slots=slots,
            with_text=text,
            completions=completions,
            progress=partial(_report_profile, bar),
        )
    rows = []
    for row in StaticRouter.fit(outcomes).rows:
        own = [each for each in outcomes if each.pair == row.pair]
        low, high = accuracy_interval(sum(each.correct for each in own), len(own))
        unread = sum(each.answer is None for each in own)
        rows.append(
            asdict(row) | {"pair": str(row.pair), "accuracy_95": [low, high], "without_answer": unread}
        )
    if as_json:
        typer.echo(json.dumps({"path": str(out), "outcomes": len(outcomes), "rows": rows}))
        return
    table = Table("pair", "right", "95%", "no answer", "tokens p50/p90", "cost p50", box=None, pad_edge=False)
    for column in table.columns:
        column.no_wrap, column.overflow = True, "fold"
    for told in rows:
        low, high = told["accuracy_95"]
        table.add_row(
            told["pair"],
            f"{told['accuracy']:.1%}",
            f"{low:.0%} to {high:.0%}",
            str(told["without_answer"]),
            f"{told['tokens_p50']}/{told['tokens_p90']}",
            format_usd(told["cost_p50"]),
        )
    Console(width=max(100, Console().width)).print(table)
    typer.echo(f"{len(outcomes)} outcomes in {out}")


def _report_profile(
    bar: ProgressBar, pair: Pair, of_pair: int, done: int, total: int, accuracy: float
) -> None:
    """One bar over all rows; where stderr is no terminal, a line for every twentieth row of a pair."""
    text = f"{pair} {accuracy:.0%} right"
    bar.update(text, done, total)
    if of_pair % 20 == 0:
        bar.line(f"{done}/{total} {text} of {of_pair}")


def _first_steps(error: ViaticumError) -> str:
    """What to do on a machine where nothing is set up yet."""
    if isinstance(error, WeightsError) and "not on this machine" in str(error):
        return " (`viaticum models pull` without a name fetches all that is used by default)"
    return ""


def main() -> None:
    """Run the `viaticum` command.

    Exit codes: 0 done, 1 an error with its message, 2 wrong usage, 130 interrupted.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars would break our lines
    try:
        app()
    except ViaticumError as error:
        sys.stderr.write(f"error: {error}{_first_steps(error)}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
