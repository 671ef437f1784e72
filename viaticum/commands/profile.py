"""`viaticum profile`: the outcome table of local models, and its texts read again.

Leaves out the work: see `viaticum.agents.batch.profile` and `rereading`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from viaticum.commands.generation import with_generation_options
from viaticum.commands.local import with_local_options
from viaticum.commands.models import CatalogueFile
from viaticum.commands.progress import ProgressBar, loading_shown
from viaticum.commands.table import print_table
from viaticum.errors import InputError
from viaticum.generation import NO_SETTINGS, GenerationSettings
from viaticum.local_settings import NO_LOCAL_SETTINGS, LocalSettings
from viaticum.money import format_usd
from viaticum.types import Outcome, Pair

SHOWN = 20  # rows that are read otherwise, where JSON is not asked for

if TYPE_CHECKING:
    from viaticum.agents.batch.profile_verdicts import VerdictPlan
    from viaticum.agents.batch.rereading import Change, Rereading
    from viaticum.catalogue import Catalogue


@with_local_options
@with_generation_options
def profile(
    questions: Annotated[Path, typer.Argument(help="CSV, JSONL or Parquet with question and answer.")],
    out: Annotated[Path, typer.Option(help="The outcome table: .parquet or .jsonl")],
    model: Annotated[list[str] | None, typer.Option(help="Models; all local ones by default.")] = None,
    strategy: Annotated[
        list[str] | None, typer.Option(help="Strategies, MODULE:NAME for your own; all by default.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many questions.", min=1)] = None,
    dataset: Annotated[str | None, typer.Option(help="What the table calls them; else the file.")] = None,
    verifier: Annotated[
        list[str] | None, typer.Option(help="Models that say of every answer whether it is right.")
    ] = None,
    text: Annotated[bool, typer.Option(help="Keep the questions' texts in the table.")] = True,
    completions: Annotated[Path | None, typer.Option(help="JSONL for what the models wrote.")] = None,
    reread: Annotated[
        bool, typer.Option("--reread", help="Read the --completions of --out again; asks no model.")
    ] = False,
    generation: GenerationSettings = NO_SETTINGS,
    local: LocalSettings = NO_LOCAL_SETTINGS,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
    catalogue: CatalogueFile = None,
) -> None:
    """Run local models with every strategy on questions with known answers; goes on after a kill.

    With --verifier, a finished --out is given the verdicts that it lacks, and nothing else is asked.
    """
    if reread:
        if model or strategy or dataset or verifier:
            raise InputError(
                "--reread takes all rows of the table; leave out --model, --strategy, --dataset, --verifier"
            )
        _reread(questions, out, completions, catalogue, limit=limit, text=text, as_json=as_json)
        return
    from viaticum.agents.batch.profile import is_finished
    from viaticum.agents.batch.profile import profile as run
    from viaticum.agents.batch.profile_verdicts import add_verdicts
    from viaticum.catalogue import Catalogue
    from viaticum.outcomes import checked_pair
    from viaticum.questions import read_questions

    loaded, known = Catalogue.load(catalogue).with_local(local), read_questions(questions, limit=limit)
    verifiers = [loaded[name].name for name in dict.fromkeys(verifier or ())]
    plans: list[VerdictPlan] = []  # one where the table is finished
    with ProgressBar(lines=False) as bar, loading_shown():
        if verifiers and is_finished(out):
            outcomes = add_verdicts(
                known,
                out,
                catalogue=loaded,
                verifiers=verifiers,
                dataset=dataset,
                pairs=_pairs(loaded, model, strategy) if model or strategy else (),
                with_text=text,
                completions=completions,
                plan=partial(_tell_plan, out, plans),
                progress=partial(_report_profile, bar),
            )
        else:
            outcomes = run(
                known,
                _pairs(loaded, model, strategy),
                out,
                catalogue=loaded,
                dataset=dataset or questions.stem,
                with_text=text,
                completions=completions,
                settings=generation,
                verifiers=verifiers,
                progress=partial(_report_profile, bar),
            )
    answers = [row for row in outcomes if checked_pair(row) is None]
    verdicts = [row for row in outcomes if checked_pair(row) is not None]
    rows = [] if plans else _summary(answers)  # a table of another tool may know no tokens
    if as_json:
        found = {"path": str(out), "outcomes": len(answers), "rows": rows}
        more = {"verdicts": len(verdicts), "verifiers": _verifiers(outcomes)} if verifier else {}
        asked = {"asked": asdict(plans[0])} if plans else {}
        typer.echo(json.dumps(found | more | asked))
        return
    if not plans:
        _print_table(rows)
    if verifier:
        _print_verifiers(_verifiers(outcomes))
        typer.echo(f"{len(answers)} outcomes and {len(verdicts)} verdicts in {out}")
    else:
        typer.echo(f"{len(answers)} outcomes in {out}")


def _tell_plan(out: Path, plans: list[VerdictPlan], plan: VerdictPlan) -> None:
    plans.append(plan)
    passed = f"; {plan.unanswered} of the questions have no answer there" if plan.unanswered else ""
    typer.echo(
        f"{out} is finished and its answers stay: of {plan.answers} verdicts {plan.there} are there, "
        f"{plan.calls} calls give the others{passed}",
        err=True,
    )


def _reread(
    questions: Path,
    out: Path,
    completions: Path | None,
    catalogue: Path | None,
    *,
    limit: int | None,
    text: bool,
    as_json: bool,
) -> None:
    from viaticum.agents.batch.rereading import reread
    from viaticum.catalogue import Catalogue
    from viaticum.questions import read_questions

    with ProgressBar() as bar:
        read = reread(
            read_questions(questions, limit=limit),
            out,
            catalogue=Catalogue.load(catalogue),
            completions=completions,
            with_text=text,
            progress=partial(bar.report, "reading"),
        )
    right = sum(each.newly_right for each in read.changes)
    wrong = sum(each.newly_wrong for each in read.changes)
    rows = _summary(read.outcomes)
    if as_json:
        result = {
            "path": str(out),
            "outcomes": len(read.outcomes),
            "unfinished": read.unfinished,
            "newly_right": right,
            "newly_wrong": wrong,
            "changes": [_change(each) for each in read.changes],
            "rows": rows,
        }
        typer.echo(json.dumps(result, ensure_ascii=False))
        return
    _print_changes(read)
    _print_table(rows)
    typer.echo(
        f"{len(read.outcomes)} outcomes in {out}: {len(read.changes)} read otherwise, {right} newly right, "
        f"{wrong} newly wrong"
    )
    if read.unfinished:
        typer.echo(f"The run has not ended: these are the rows of {out}.journal. Read again when it has.")


def _change(change: Change) -> dict[str, Any]:
    return {
        "pair": str(change.after.pair),
        "question_id": change.after.question_id,
        "before": change.before.answer,
        "after": change.after.answer,
        "newly_right": change.newly_right,
        "newly_wrong": change.newly_wrong,
    }


def _print_changes(read: Rereading) -> None:
    """Print the first rows that are read otherwise, those whose verdict changed before the others."""
    if not read.changes:
        return
    rows = []
    for each in sorted(read.changes, key=lambda change: change.before.correct == change.after.correct)[
        :SHOWN
    ]:
        verdict = "newly right" if each.newly_right else "newly wrong" if each.newly_wrong else ""
        answers = (_short(each.before.answer), _short(each.after.answer))
        rows.append((str(each.after.pair), each.after.question_id, *answers, verdict))
    print_table(("pair", "question", "before", "after", "verdict"), rows)
    if len(read.changes) > SHOWN:
        typer.echo(f"... and {len(read.changes) - SHOWN} more: --json has all")


def _short(answer: str | None) -> str:
    text = "no answer" if answer is None else " ".join(answer.split())
    return text if len(text) <= 24 else text[:23] + "…"


def _pairs(catalogue: Catalogue, models: list[str] | None, named: list[str] | None) -> list[Pair]:
    from viaticum import strategies

    models = models or [spec.name for spec in catalogue.local() if spec.default]
    strategies.load(*catalogue.strategies, *(named or ()))
    named = named or [name for name in strategies.names() if strategies.get(name).graded]
    return [
        Pair(catalogue[model].name, strategy)
        for model in dict.fromkeys(models)
        for strategy in dict.fromkeys(named)
    ]


def _summary(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """A row of the routing table for each pair, with its interval and how many texts had no answer."""
    from viaticum.outcomes import accuracy_interval
    from viaticum.routers.query import StaticRouter

    rows = []
    for row in StaticRouter.fit(outcomes).rows:
        own = [each for each in outcomes if each.pair == row.pair]
        interval = accuracy_interval(sum(each.correct for each in own), len(own))
        without_answer = sum(each.answer is None for each in own)
        rows.append(
            asdict(row)
            | {"pair": str(row.pair), "accuracy_95": list(interval), "without_answer": without_answer}
        )
    return rows


def _verifiers(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """How often each verifier says yes to right and to wrong answers of each pair."""
    from viaticum.outcomes import checked_pair
    from viaticum.routers.query.outcome_matrix import OutcomeMatrix
    from viaticum.routers.query.verdicts import verifier_facts

    verdicts = [row for row in outcomes if checked_pair(row) is not None]
    answers = [row for row in outcomes if checked_pair(row) is None]
    matrix = OutcomeMatrix.from_outcomes(answers, verdicts=verdicts, live=True)  # costs may be unknown
    return [] if matrix.verdicts is None else verifier_facts(matrix.verdicts, matrix.pairs, matrix.correct)


def _print_verifiers(rows: Sequence[dict[str, Any]]) -> None:
    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.0%}"

    cells = []
    for each in rows:
        shares = share(each["yes_if_right"]), share(each["yes_if_wrong"])
        cost = "-" if each["cost"] is None else f"${each['cost']:.2g}"
        cells.append((each["verifier"], each["pair"], str(each["answers"]), *shares, cost))
    print_table(("verifier", "answers of", "verdicts", "yes if right", "yes if wrong", "cost mean"), cells)


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    cells = []
    for row in rows:
        low, high = row["accuracy_95"]
        shares = (f"{row['accuracy']:.1%}", f"{low:.0%} to {high:.0%}", str(row["without_answer"]))
        tokens = f"{row['tokens_p50']}/{row['tokens_p90']}"
        cells.append((row["pair"], *shares, tokens, format_usd(row["cost_p50"])))
    columns = ("pair", "right", "95%", "no answer", "tokens p50/p90", "cost p50")
    print_table(columns, cells, spare=("no answer", "tokens p50/p90"))


def _report_profile(
    bar: ProgressBar, pair: Pair, of_pair: int, done: int, total: int, accuracy: float
) -> None:
    """One bar over all rows; where stderr is no terminal, a line for every twentieth row of a pair."""
    text = f"{pair} {accuracy:.0%} right"
    bar.update(text, done, total)
    if of_pair % 20 == 0:
        bar.line(f"{done}/{total} {text} of {of_pair}")
