"""`viaticum tune`: from questions with answers and a budget to a router, in one command.

Leaves out the work: see `viaticum.agents.batch.tune` and `tune_report`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from viaticum.commands.batch import EXIT_DRAINED
from viaticum.commands.budget import Where
from viaticum.commands.generation import Only, with_generation_options
from viaticum.commands.local import with_local_options
from viaticum.commands.models import CatalogueFile
from viaticum.commands.progress import ProgressBar, loading_shown
from viaticum.commands.table import print_table
from viaticum.commands.tune_page import (
    judge_sentence,
    left_out_sentence,
    mark_sentence,
    why_sentence,
    write_tuning_page,
)
from viaticum.generation import NO_SETTINGS, GenerationSettings
from viaticum.local_settings import NO_LOCAL_SETTINGS, LocalSettings
from viaticum.money import short_usd
from viaticum.signals import SignalHandler

if TYPE_CHECKING:
    from viaticum.agents.batch.tune import Forecast
    from viaticum.agents.batch.tune_judge import Grading, Judged
    from viaticum.agents.batch.tune_report import Figure, Found
    from viaticum.agents.batch.tune_rounds import Bought
    from viaticum.routers.query.prior_screening import PriorScreen


@with_local_options
@with_generation_options
def tune(
    questions: Annotated[Path, typer.Argument(help="CSV, JSONL or Parquet with question and answer.")],
    budget: Annotated[str, typer.Option(help="Dollars that all calls together may cost at most.")],
    out: Annotated[Path, typer.Option(help="The folder to write the router to.", metavar="DIR")],
    models: Annotated[
        str | None, typer.Option(help="Models, a,b,c. [default: all of the catalogue that can be used here]")
    ] = None,
    strategies: Annotated[str, typer.Option(help="Strategies, MODULE:NAME for your own.")] = "direct,cot",
    judge: Annotated[
        str | None, typer.Option(help="A model that grades answers to questions without a known one.")
    ] = None,
    grading: Annotated[
        str | None,
        typer.Option(
            help="How answers without a known one are graded: rubric or pairwise, by the judge, or by "
            "agreement of the strongest pairs. [default: rubric with --judge]"
        ),
    ] = None,
    hours: Annotated[float | None, typer.Option(help="How long it may take.", min=0)] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many questions.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Seed of every random draw.", min=0)] = 0,
    encoder: Annotated[str, typer.Option(help="A sentence-transformers model.")] = "all-minilm-l6-v2",
    concurrency: Annotated[int, typer.Option(help="Calls at once.", min=1)] = 32,
    timeout: Annotated[float | None, typer.Option(help="Seconds that one call may take.")] = None,
    only: Only = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it will cost; ask nothing.")] = False,
    generation: GenerationSettings = NO_SETTINGS,
    local: LocalSettings = NO_LOCAL_SETTINGS,
    where: Where = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
    catalogue: CatalogueFile = None,
) -> None:
    """Buy answers of your models to your questions, fit a router on them, and say whether it pays.

    Killed or interrupted, the same command goes on and pays for nothing twice; with a larger --budget it buys
    more. Exit code 3: it was told to end before it was through.
    """
    from viaticum.agents.batch.tune import Tuning
    from viaticum.catalogue import Catalogue
    from viaticum.questions import read_questions

    tuning = Tuning.open(
        read_questions(questions, limit=limit),
        out,
        budget=budget,
        dataset=questions.stem,
        models=_names(models),
        strategies=_names(strategies),
        judge=judge,
        grading=cast("Grading | None", grading),
        seconds=None if hours is None else 3600 * hours,
        catalogue=Catalogue.load(catalogue).with_local(local),
        ledger=where,
        concurrency=concurrency,
        timeout=timeout,
        generation=generation,
        only=only,
        seed=seed,
    )
    forecast = tuning.forecast()
    if not as_json:
        _print_forecast(forecast)
    if dry_run:
        if as_json:
            typer.echo(json.dumps(_forecast_json(forecast)))
        return
    from viaticum.agents.batch.tune_report import conclude
    from viaticum.agents.batch.tune_rounds import buy
    from viaticum.commands.router_inputs import descriptions
    from viaticum.routers.query.encoder import Encoder

    def drain(number: int) -> None:
        tuning.stop.set()
        sys.stderr.write("\nending: running calls are finished and settled; once more ends at once\n")

    embed = Encoder(encoder, windows=True)
    try:
        with ProgressBar("embedding questions") as bar, loading_shown():
            embeddings = embed([each.query.text for each in tuning.questions[: tuning.learning]]).numpy()
            with SignalHandler(drain, once=True):
                bought = buy(tuning, forecast, embeddings, bar.report)
            if bought.stopped:
                raise KeyboardInterrupt
            texts = descriptions(catalogue, tuning.pairs)
            found = conclude(bought, out, embed, texts, seed=seed, report=bar.report)
    except KeyboardInterrupt:
        sys.stderr.write("ended early; the same command goes on, and pays for nothing twice\n")
        raise typer.Exit(EXIT_DRAINED) from None
    page = write_tuning_page(out, forecast, bought, found)
    if as_json:
        result = {
            "forecast": _forecast_json(forecast),
            "path": str(out) if out.exists() else None,
            "page": None if page is None else str(page),
            "outcomes": len(bought.outcomes),
            "cost_nanousd": bought.cost_nanousd,
            "unanswered": bought.unanswered,
            "left_out": [str(pair) for pair, _ in bought.left_out],
            "dropped": [str(tuning.pairs[each.pair]) for each in bought.dropped],
            "judge": None if bought.judged is None else _judge_json(bought.judged),
            "found": asdict(found),
        }
        typer.echo(json.dumps(result))
        return
    _print_bought(bought, out)
    _print_found(found)
    if bought.judged is not None:
        typer.echo(judge_sentence(bought.judged, bought.pairs))
    if page is not None:
        typer.echo(f"report page: {page}")


def _names(text: str | None) -> list[str]:
    return [each.strip() for each in (text or "").split(",") if each.strip()]


def _judge_json(judged: Judged) -> dict[str, object]:
    return {name: value for name, value in asdict(judged).items() if name != "questions"}


def _forecast_json(forecast: Forecast) -> dict[str, object]:
    return {
        "learning": forecast.learning,
        "held_out": forecast.held_out,
        "answers": forecast.answers,
        "cost_p50": forecast.cost_p50,
        "cost_p90": forecast.cost_p90,
        "budget_nanousd": forecast.budget_nanousd,
        "judge": None if forecast.judge is None else asdict(forecast.judge),
        "voters": [str(each) for each in forecast.voters],
        "pairs": [asdict(each) | {"pair": str(each.pair)} for each in forecast.pairs],
        "prior": _prior_json(forecast.screen),
    }


def _prior_json(screen: PriorScreen) -> list[dict[str, object]]:
    """The pairs in the order of the prior, with accuracy, its 90% interval, and the pair that beats each."""
    shares, hopeless = screen.shares(), screen.hopeless()
    return [
        {"pair": str(screen.pairs[each])}
        | dict(zip(("accuracy", "low", "high"), shares[each], strict=True))
        | {"beaten_by": str(screen.pairs[hopeless[each]]) if each in hopeless else None}
        for each in screen.order()
    ]


def _print_forecast(forecast: Forecast) -> None:
    screen, rows = forecast.screen, []
    shares, order, hopeless = screen.shares(), screen.order(), screen.hopeless()
    for each in (*(forecast.pairs[n] for n in order), *([] if forecast.judge is None else [forecast.judge])):
        prior = "-"
        if each.pair in screen.pairs:
            prior = "{:.0%} ({:.0%} to {:.0%})".format(*shares[screen.pairs.index(each.pair)])
        costs = (short_usd(cost) for cost in (each.cost_p50, each.cost_p90, each.cost_worst))
        rows.append((str(each.pair), *costs, prior))
    print_table(("pair", "an answer p50", "p90", "at most", "right, by the prior"), rows)
    for pair, other in hopeless.items():
        typer.echo(left_out_sentence(screen.pairs[pair], screen.pairs[other]))
    typer.echo(
        "the prior orders the pairs by public figures of their models"
        f"{'' if any(each.benchmarks for each in screen.models) else ', of which no entry has any'}"
        f"{'' if hopeless else '; it leaves none out'}"
    )
    if forecast.judge is not None and forecast.judge.pair.model in {
        each.pair.model for each in forecast.pairs
    }:
        typer.echo(
            f"{forecast.judge.pair.model} will grade its own answers too, which models favour (arXiv "
            "2404.13076); better name another judge, or leave it out: --model"
        )
    if forecast.voters:
        typer.echo(f"right is what most of these agree on: {', '.join(map(str, forecast.voters))}")
    p50, p90 = (min(each, forecast.budget_nanousd) for each in (forecast.cost_p50, forecast.cost_p90))
    typer.echo(
        f"{forecast.learning} questions to learn from, {forecast.held_out} held out, {len(forecast.pairs)} "
        f"pairs: at most {forecast.answers} answers, for {short_usd(p50)} (p50) to {short_usd(p90)} (p90); "
        f"never more than {short_usd(forecast.budget_nanousd)}"
    )


def _print_bought(bought: Bought, out: Path) -> None:
    from viaticum.agents.batch.tune_report import table_path

    for left_out, better in bought.left_out:
        typer.echo(left_out_sentence(left_out, better))
    for each in bought.dropped:
        pair, other = bought.pairs[each.pair], bought.pairs[each.by]
        typer.echo(
            f"dropped {pair}: {other} costs no more and is right on {each.difference:.0%} more "
            f"({each.low:.0%} to {each.high:.0%}) of {each.questions} questions"
        )
    for reason, count in bought.unanswered.items():
        typer.echo(f"{count} calls without an outcome: {reason}")
    typer.echo(f"{len(bought.outcomes)} outcomes for {short_usd(bought.cost_nanousd)} in {table_path(out)}")
    if out.exists():
        typer.echo(f"router in {out}; use it with: viaticum solve --router {out}")


def _print_found(found: Found) -> None:
    """Three lines: the best cheap pair, the router, the best single pair; or why routing does not pay.

    A * marks figures that rest on a judge, or on agreement.
    """
    mark = "*" if found.judged else ""

    def figure(each: Figure, interval: str = "") -> str:
        return f"{each.accuracy:.1%}{mark}{interval} at {short_usd(each.cost_nanousd)}"

    if found.cheap is not None:
        typer.echo(f"cheap: {found.cheap.name} answers {figure(found.cheap)}")
    if found.router is not None and found.interval is not None:
        low, high = found.interval
        gain = ""
        if found.gain is not None:
            points = [100 * found.gain[name] for name in ("difference", "low", "high")]
            gain = "; {:+.1f}{} points [{:+.1f}, {:+.1f}] against single pairs mixed at that cost".format(
                points[0], mark, *points[1:]
            )
        typer.echo(f"router: {figure(found.router, f' [{low:.1%}, {high:.1%}]')}{gain}")
    if found.best is not None:
        count = f"({found.questions} held-out questions)"
        typer.echo(f"best single pair: {found.best.name} has {figure(found.best)} {count}")
    if found.why:
        typer.echo(why_sentence(found))
    if found.judged:
        typer.echo(mark_sentence(found))
