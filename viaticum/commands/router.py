"""`viaticum router`: fit and evaluate the learned query router, show its predictions, add pairs, fit again.

Results go to stdout, progress to stderr. Errors and exit codes are in `viaticum.cli`, which turns a
`ViaticumError` into one line and exit code 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from viaticum.commands.budget import Where
from viaticum.commands.models import CatalogueFile, JsonFlag
from viaticum.commands.progress import ProgressBar
from viaticum.commands.router_arena import arena
from viaticum.commands.router_evaluate import evaluate
from viaticum.commands.router_inputs import Folder, Outcomes, Prices, descriptions, read_matrix
from viaticum.commands.table import print_table
from viaticum.money import NANOUSD_PER_USD, format_usd

if TYPE_CHECKING:
    from viaticum.routers.query.change_detection import ModelChange
    from viaticum.routers.query.rtr import RTRRouter
    from viaticum.types import Row

FEW_QUESTIONS = 100  # below which what a router gains is uncertain

app = typer.Typer(no_args_is_help=True, help="Fit, evaluate and query the learned query router.")


@app.command()
def fit(
    outcomes: Outcomes,
    out: Annotated[Path, typer.Option(help="The folder to write the router to.")],
    prices: Prices = None,
    seed: Annotated[int, typer.Option(help="Seed of every random draw.", min=0)] = 0,
    encoder: Annotated[str, typer.Option(help="A sentence-transformers model.")] = "all-minilm-l6-v2",
    as_json: JsonFlag = False,
    catalogue: CatalogueFile = None,
) -> None:
    """Fit a router that predicts accuracy, tokens and cost of every pair and plan, on outcome tables."""
    from viaticum.routers.query.encoder import Encoder
    from viaticum.routers.query.fit import fit as run
    from viaticum.routers.query.parameters import RTRSettings

    matrix = read_matrix(outcomes, prices)
    with ProgressBar("reading", lines=False) as bar:
        router = run(
            matrix,
            Encoder(encoder, windows=True),
            descriptions(catalogue, matrix.pairs),
            settings=RTRSettings(seed=seed),
            report=bar.report,
        )
    router.save(out)
    facts = router.parameters.facts
    if facts["questions"] < FEW_QUESTIONS:
        typer.echo(
            f"warning: {facts['questions']} questions are few; below {FEW_QUESTIONS} it is uncertain what a "
            "router gains over a fixed mixture of pairs, so that its predictions stay near the averages",
            err=True,
        )
    if as_json:
        typer.echo(
            json.dumps(
                {"path": str(out), "pairs": len(router.pairs), "columns": len(router.plans), "facts": facts}
            )
        )
        return
    unseen = facts["unseen"]
    typer.echo(
        f"{facts['questions']} questions, {len(router.pairs)} pairs, "
        f"{len(router.plans) - len(router.pairs)} plans; on unseen questions: "
        f"log loss {unseen['log_loss']}, calibration error {unseen['ece']}"
    )
    if "verifiers" in facts:
        checks = sum(any(pair.is_check for pair in plan.pairs) for plan in router.plans)
        typer.echo(f"verdicts of {_verifiers(facts)}: {checks} plans with a check are worth their cost")
        if unknown := sum(each["without_cost"] for each in facts["verifiers"]):
            typer.echo(f"{unknown} verdicts of unknown cost count for how often verifiers are right alone")
    typer.echo(f"router in {out}")


def _verifiers(facts: Mapping[str, Any]) -> str:
    return ", ".join(dict.fromkeys(each["verifier"] for each in facts["verifiers"]))


app.command()(evaluate)


@app.command()
def show(
    folder: Folder,
    question: Annotated[str, typer.Argument(help="The question.")],
    as_json: JsonFlag = False,
    where: Where = None,
) -> None:
    """The routing table of one question, and the plans on the frontier of accuracy and cost."""
    from viaticum.agents.workflow.serialization import row_to_json
    from viaticum.routers.query.rtr import RTRRouter
    from viaticum.types import Query

    router, query = RTRRouter.load(folder), Query(question)
    changes = _changes_of(router, where)
    if changes:
        router = router.with_changes(changes)
    rows, plans = list(router.table(query)), _frontier(router.plans_for(query))
    trust = float(router.predict_texts([question]).trust[0])
    if as_json:
        table_rows = [row_to_json(row) for row in rows]
        plan_rows = [
            {
                "plan": str(row.plan),
                "pairs": [str(pair) for pair in row.plan.pairs],
                "need": row.plan.need,
                "accuracy": row.accuracy,
                "cost": row.cost_p50,
                "cost_p90": row.cost_p90,
                "seconds": row.seconds,
            }
            for row in plans
        ]
        noted = {name: {**change.to_json(), "why": change.why} for name, change in changes.items()}
        typer.echo(
            json.dumps({"trust": trust, "table": table_rows, "plans": plan_rows, "changed_models": noted})
        )
        return
    timed = any(row.seconds is not None for row in rows)
    pairs = [
        (
            str(row.pair),
            f"{row.accuracy:.0%}",
            f"{_tokens(row, row.tokens_p50)}/{_tokens(row, row.tokens_p90)}",
            format_usd(row.cost_p50),
            format_usd(row.cost_p90),
            *(("–" if row.seconds is None else f"{row.seconds:.1f}",) if timed else ()),
        )
        for row in sorted(rows, key=lambda row: -row.accuracy)
    ]
    columns = ("pair", "right", "tokens p50/p90", "$ p50", "$ p90", *(("seconds",) if timed else ()))
    print_table(columns, pairs, spare=("tokens p50/p90",))
    if any(row.cut_at is not None and row.tokens_p90 > row.cut_at for row in rows):
        typer.echo("~: extrapolated; so long outputs were cut where the table was made")
    typer.echo("")
    choices = [
        (str(row.plan), f"{row.accuracy:.0%}", format_usd(row.cost_p50), format_usd(row.cost_p90))
        for row in plans
    ]
    print_table(("plan", "right", "$ expected", "$ p90"), choices)
    typer.echo(f"\ntrust in this: {trust:.0%}; the rest comes from the means over all data sets")
    for name, change in changes.items():
        typer.echo(
            f"{name} has changed, noticed {change.at[:10]}: {change.why}; it is trusted half as much until "
            "it is profiled again and the router fitted with that"
        )


@app.command()
def add(
    folder: Folder,
    model: Annotated[str, typer.Option(help="A model of the catalogue that is new to the router.")],
    strategy: Annotated[
        list[str] | None, typer.Option(help="Strategies; by default those of the router.")
    ] = None,
    outcomes: Annotated[
        list[Path] | None,
        typer.Option(help="Outcomes of the model, if there are any; 20 to 100 improve predictions much."),
    ] = None,
    as_json: JsonFlag = False,
    catalogue: CatalogueFile = None,
) -> None:
    """Add a new model to a router by its description and its outcomes so far, without fitting again."""
    from viaticum.catalogue import Catalogue
    from viaticum.outcomes import read_outcomes
    from viaticum.routers.query.learn import add as run
    from viaticum.routers.query.outcome_matrix import OutcomeMatrix
    from viaticum.routers.query.rtr import RTRRouter
    from viaticum.types import Pair

    models = Catalogue.load(catalogue)
    priced = models[model].members[-1]
    price = models.prices([priced])[priced]
    dollars = (
        price.input_nanousd_per_million / NANOUSD_PER_USD,
        price.output_nanousd_per_million / NANOUSD_PER_USD,
    )
    router = RTRRouter.load(folder)
    pairs = [Pair(model, each) for each in strategy or sorted({pair.strategy for pair in router.pairs})]
    rows = [row for row in read_outcomes(*(outcomes or ())) if row.pair in pairs]
    matrix = OutcomeMatrix.from_outcomes(rows) if rows else None
    for pair in pairs:
        known = matrix if matrix is not None and pair in matrix.pairs else None
        router = run(router, pair, descriptions(catalogue, [pair]), dollars, known)
    router.save(folder)
    if as_json:
        typer.echo(
            json.dumps({"path": str(folder), "added": [str(pair) for pair in pairs], "outcomes": len(rows)})
        )
        return
    typer.echo(
        f"added {', '.join(map(str, pairs))}, with {len(rows)} outcomes; "
        f"the last version is in {folder / 'previous'}"
    )


@app.command()
def refit(
    folder: Folder,
    outcomes: Outcomes,
    live: Annotated[list[Path], typer.Option(help="Outcomes of live runs since.")],
    prices: Prices = None,
    as_json: JsonFlag = False,
    catalogue: CatalogueFile = None,
) -> None:
    """Fit again with live outcomes; keep the old router where the new one predicts live answers worse."""
    from viaticum.errors import DataError
    from viaticum.routers.query.learn import refit as run
    from viaticum.routers.query.rtr import RTRRouter

    router = RTRRouter.load(folder)
    known = read_matrix(outcomes, prices)
    with ProgressBar("reading", lines=False) as bar:
        result = run(
            router,
            known,
            read_matrix(live, prices, known.pairs, live=True),
            router.encoder,
            descriptions(catalogue, known.pairs),
            report=bar.report,
        )
    if result.router is None:
        raise DataError(
            f"the refit predicts live answers worse (log loss {result.after:.4f}, "
            f"before {result.before:.4f}); "
            f"the router in {folder} stays as it is"
        )
    result.router.save(folder)
    if as_json:
        typer.echo(
            json.dumps(
                {"path": str(folder), "before": result.before, "after": result.after, "live": result.live}
            )
        )
        return
    typer.echo(
        f"log loss of live answers {result.before:.4f} -> {result.after:.4f} ({result.live} outcomes); "
        f"the last version is in {folder / 'previous'}"
    )


@app.command()
def dismiss(
    folder: Folder,
    model: Annotated[str, typer.Argument(help="A model that is said to have changed.")],
    as_json: JsonFlag = False,
    where: Where = None,
) -> None:
    """Take back that a model has changed: it is trusted as before, and watched anew from now on."""
    from viaticum.agents.workflow.watched_router import append_change, folder_of, now
    from viaticum.errors import UnknownName
    from viaticum.routers.query.change_detection import DISMISSED, ModelChange
    from viaticum.routers.query.rtr import RTRRouter

    router = RTRRouter.load(folder)
    changes = _changes_of(router, where)
    if model not in changes:
        raise UnknownName("model that has changed", model, sorted(changes))
    append_change(folder_of(where), ModelChange(model, router.profiles()[model], now(), DISMISSED, 0))
    if as_json:
        typer.echo(json.dumps({"dismissed": model}))
        return
    typer.echo(f"{model} is trusted as before; it was: {changes[model].why}")


app.command()(arena)


def _changes_of(router: RTRRouter, where: str | None) -> dict[str, ModelChange]:
    """Changes of its models since it was fitted, that were noticed in calls of the ledger."""
    from viaticum.agents.workflow.watched_router import current_changes, folder_of

    return current_changes(folder_of(where), router.profiles())


def _tokens(row: Row, tokens: int) -> str:
    return f"~{tokens}" if row.cut_at is not None and tokens > row.cut_at else str(tokens)


def _frontier(rows: Iterable[Any]) -> list[Any]:
    """Rows that are more accurate than every cheaper one, the cheapest first."""
    frontier: list[Any] = []
    for row in sorted(rows, key=lambda row: (row.cost_p50, -row.accuracy)):
        if not frontier or row.accuracy > frontier[-1].accuracy:
            frontier.append(row)
    return frontier
