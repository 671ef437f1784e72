"""`viaticum router`: fit and evaluate the learned query router, show its predictions, add pairs, fit again.

Results go to stdout, progress to stderr. Errors and exit codes are in `viaticum.cli`, which turns a
`ViaticumError` into one line and exit code 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from viaticum.commands.models import CatalogueFile, JsonFlag
from viaticum.commands.progress import ProgressBar
from viaticum.commands.table import print_table, usd
from viaticum.money import NANOUSD_PER_USD, format_usd

if TYPE_CHECKING:
    from viaticum.routers.query.outcome_matrix import OutcomeMatrix
    from viaticum.routers.query.rtr import RTRRouter
    from viaticum.types import Pair, Row

FEW_QUESTIONS = 100  # below which what a router gains is uncertain

app = typer.Typer(no_args_is_help=True, help="Fit, evaluate and query the learned query router.")

Folder = Annotated[Path, typer.Argument(help="The folder of a router.")]
Outcomes = Annotated[
    list[Path], typer.Argument(help="Outcome tables: .parquet or .jsonl, as `viaticum profile` writes them.")
]
Prices = Annotated[
    Path | None,
    typer.Option(
        help='JSON: {"model": {"input": 0.5, "output": 1.5}}, dollars a million tokens; by default the costs '
        "in the table."
    ),
]


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

    matrix = _matrix(outcomes, prices)
    with ProgressBar("reading", lines=False) as bar:
        router = run(
            matrix,
            Encoder(encoder),
            _descriptions(catalogue, matrix.pairs),
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
    typer.echo(f"router in {out}")


@app.command()
def evaluate(
    folder: Folder,
    outcomes: Outcomes,
    prices: Prices = None,
    budget: Annotated[
        list[float] | None, typer.Option(help="Mean dollars a question; 0.0001 to 0.012 by default.", min=0.0)
    ] = None,
    leave_out: Annotated[
        str | None,
        typer.Option(
            help="`dataset`: instead, fit anew without each data set of the table in turn and evaluate "
            "there, beside the static mixture fitted on the same questions."
        ),
    ] = None,
    as_json: JsonFlag = False,
    catalogue: CatalogueFile = None,
) -> None:
    """Accuracy by mean cost on held-out questions, beside the best mixtures of single pairs.

    Operating points are chosen from predictions; actual costs and correctness are read afterwards. "Paced" is
    what a batch does with the same money: real costs correct its plan on the way.
    """
    from viaticum.budgets.paced_run import paced_choices
    from viaticum.routers.query.evaluate import BUDGETS, MIDDLE_BUDGET
    from viaticum.routers.query.evaluate import evaluate as run
    from viaticum.routers.query.rtr import RTRRouter

    router = RTRRouter.load(folder)
    matrix = _matrix(outcomes, prices, router.pairs)
    if leave_out is not None:
        _evaluate_leaving_out(leave_out, router, matrix, budget or BUDGETS, catalogue, as_json)
        return
    result = run(router, matrix, budgets=budget or BUDGETS, paced=paced_choices)
    if result["learned_from"]:
        typer.echo(
            f"warning: the router was fitted on {result['learned_from']} of the {result['questions']} "
            "questions, so that these figures promise too much; evaluate on questions that it has not seen "
            "(`viaticum outcomes split` keeps some aside)",
            err=True,
        )
    if as_json:
        typer.echo(json.dumps(result))
        return
    rows = [
        (
            usd(point["budget"]),
            f"{point['accuracy']:.1%}",
            usd(point["cost"]),
            f"{paced['accuracy']:.1%}",
            usd(paced["cost"]),
            "-" if hull["accuracy"] is None else f"{hull['accuracy']:.1%}",
            "-" if gap["difference"] is None else _interval(gap),
        )
        for point, paced, hull, gap in zip(
            result["curve"], result["paced"], result["hull"], result["curve_minus_hull"], strict=True
        )
    ]
    columns = ("a question", "router", "spent", "paced", "spent, paced", "hull", "router - hull, 95%")
    print_table(columns, rows, spare=("spent, paced", "paced"))
    cheapest = result["cheapest"]
    if cheapest["budgets_below"]:
        typer.echo(
            f"note: {', '.join(map(usd, cheapest['budgets_below']))} a question is less than the cheapest "
            f"pair costs here, {cheapest['pair']} at {usd(cheapest['cost'])}; the router spends more than "
            "that, and a batch skips questions",
            err=True,
        )
    best = result["best_single"]
    tied = f" (the cheapest of the most accurate: {', '.join(best['ties'])} too)" if best["ties"] else ""
    typer.echo(
        f"best single pair: {best['pair']}{tied}, {best['accuracy']:.1%} at {usd(best['cost'])}; reached at "
        + _times(result["cost_at_best_single_accuracy"])
        + ", 99% of it at "
        + _times(result["cost_at_99_percent_of_it"])
        + " its cost"
    )
    middle = sorted(budget)[len(budget) // 2] if budget else MIDDLE_BUDGET
    covered = result["token_coverage_p90"]
    tokens = "" if covered is None else f"tokens within p90 {covered:.1%}; "
    typer.echo(
        f"{result['questions']} questions; oracle {result['oracle']:.1%}; "
        f"calibration error {result['ece']:.3f}; {tokens}"
        f"most used pair has {result['largest_share']:.0%} of the calls at {usd(middle)}"
    )


@app.command()
def show(
    folder: Folder,
    question: Annotated[str, typer.Argument(help="The question.")],
    as_json: JsonFlag = False,
) -> None:
    """The routing table of one question, and the plans on the frontier of accuracy and cost."""
    from viaticum.agents.workflow.serialization import row_to_json
    from viaticum.routers.query.rtr import RTRRouter
    from viaticum.types import Query

    router, query = RTRRouter.load(folder), Query(question)
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
            }
            for row in plans
        ]
        typer.echo(json.dumps({"trust": trust, "table": table_rows, "plans": plan_rows}))
        return
    pairs = [
        (
            str(row.pair),
            f"{row.accuracy:.0%}",
            f"{_tokens(row, row.tokens_p50)}/{_tokens(row, row.tokens_p90)}",
            format_usd(row.cost_p50),
            format_usd(row.cost_p90),
        )
        for row in sorted(rows, key=lambda row: -row.accuracy)
    ]
    print_table(("pair", "right", "tokens p50/p90", "$ p50", "$ p90"), pairs, spare=("tokens p50/p90",))
    if any(row.cut_at is not None and row.tokens_p90 > row.cut_at for row in rows):
        typer.echo("~: extrapolated; so long outputs were cut where the table was made")
    typer.echo("")
    choices = [
        (str(row.plan), f"{row.accuracy:.0%}", format_usd(row.cost_p50), format_usd(row.cost_p90))
        for row in plans
    ]
    print_table(("plan", "right", "$ expected", "$ p90"), choices)
    typer.echo(f"\ntrust in this: {trust:.0%}; the rest comes from the means over all data sets")


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
        router = run(router, pair, _descriptions(catalogue, [pair]), dollars, known)
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
    known = _matrix(outcomes, prices)
    with ProgressBar("reading", lines=False) as bar:
        result = run(
            router,
            known,
            _matrix(live, prices, known.pairs, live=True),
            router.encoder,
            _descriptions(catalogue, known.pairs),
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


def _evaluate_leaving_out(
    column: str,
    router: RTRRouter,
    matrix: OutcomeMatrix,
    budgets: Sequence[float],
    catalogue: Path | None,
    as_json: bool,
) -> None:
    from viaticum.errors import UnknownName
    from viaticum.routers.query.leave_out import evaluate_leaving_out

    if column != "dataset":
        raise UnknownName("column to leave out by", column, ("dataset",))
    with ProgressBar("reading", lines=False) as bar:
        result = evaluate_leaving_out(
            matrix,
            router.encoder,
            _descriptions(catalogue, matrix.pairs),
            budgets=budgets,
            settings=router.parameters.settings,
            report=bar.report,
        )
    if as_json:
        typer.echo(json.dumps(result))
        return
    parts = [
        (f"fitted without {kind['dataset']}", kind["questions"], kind["points"]) for kind in result["kinds"]
    ]
    for title, questions, points in (*parts, ("all of these", result["questions"], result["pooled"])):
        typer.echo(f"{title} ({questions} questions)")
        rows = [
            (
                usd(point["budget"]),
                f"{point['accuracy']:.1%}",
                usd(point["cost"]),
                f"{point['static_accuracy']:.1%}",
                usd(point["static_cost"]),
                _interval(point),
            )
            for point in points
        ]
        columns = ("a question", "router", "spent", "static", "spent, static", "router - static, 95%")
        print_table(columns, rows, spare=("spent, static",))
        typer.echo("")


def _interval(gap: Mapping[str, float]) -> str:
    """A difference in points and its interval."""
    return f"{100 * gap['difference']:+.1f} ({100 * gap['low']:+.1f} to {100 * gap['high']:+.1f})"


def _tokens(row: Row, tokens: int) -> str:
    return f"~{tokens}" if row.cut_at is not None and tokens > row.cut_at else str(tokens)


def _frontier(rows: Iterable[Any]) -> list[Any]:
    """Rows that are more accurate than every cheaper one, the cheapest first."""
    frontier: list[Any] = []
    for row in sorted(rows, key=lambda row: (row.cost_p50, -row.accuracy)):
        if not frontier or row.accuracy > frontier[-1].accuracy:
            frontier.append(row)
    return frontier


def _matrix(
    paths: list[Path], prices: Path | None, pairs: tuple[Pair, ...] | None = None, *, live: bool = False
) -> OutcomeMatrix:
    from viaticum.outcomes import read_outcomes
    from viaticum.routers.query.outcome_matrix import OutcomeMatrix, read_prices

    return OutcomeMatrix.from_outcomes(
        read_outcomes(*paths), read_prices(prices) if prices is not None else None, pairs, live=live
    )


def _descriptions(catalogue: Path | None, pairs: Iterable[Pair]) -> dict[str, str]:
    """Of all models and the strategies of these pairs, among them those with a budget or samples."""
    from viaticum import strategies
    from viaticum.catalogue import Catalogue

    models = {spec.name: spec.description for spec in Catalogue.load(catalogue).values()}
    named = {pair.strategy for pair in pairs if strategies.is_known(pair.strategy)}
    return models | {name: strategies.get(name).description for name in named}


def _times(share: float | None) -> str:
    return "no" if share is None else f"{share:.2f} times"
