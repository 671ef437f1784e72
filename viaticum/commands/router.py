"""`viaticum router`: fit the learned query router, see how good it is, ask it, and let it learn on.

Results go to stdout, progress to stderr. Leaves out errors and exit codes: `viaticum.cli` turns a `ViaticumError` into
one line and exit code 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from viaticum.commands.models import CatalogueFile, JsonFlag
from viaticum.commands.progress import ProgressBar
from viaticum.money import NANOUSD_PER_USD, format_usd

if TYPE_CHECKING:
    from viaticum.routers.query.outcome_matrix import OutcomeMatrix
    from viaticum.types import Pair

app = typer.Typer(no_args_is_help=True, help="Fit, evaluate and ask the learned query router.")

Folder = Annotated[Path, typer.Argument(help="The folder of a router.")]
Outcomes = Annotated[
    list[Path], typer.Argument(help="Outcome tables: .parquet or .jsonl, as `viaticum profile` writes them.")
]
Prices = Annotated[
    Path | None,
    typer.Option(
        help='JSON: {"model": {"input": 0.5, "output": 1.5}}, dollars a million tokens; else what the table says.'
    ),
]


@app.command()
def fit(
    outcomes: Outcomes,
    out: Annotated[Path, typer.Option(help="The folder that the router is written to.")],
    prices: Prices = None,
    seed: Annotated[int, typer.Option(help="Of every draw.", min=0)] = 0,
    encoder: Annotated[str, typer.Option(help="A sentence-transformers model.")] = "all-minilm-l6-v2",
    as_json: JsonFlag = False,
    catalogue: CatalogueFile = None,
) -> None:
    """Learn from outcome tables which pair or plan answers which question, and what it costs."""
    from viaticum.routers.query.encoder import Encoder
    from viaticum.routers.query.fit import fit as run
    from viaticum.routers.query.rtr import RTRSettings

    grid = _grid(outcomes, prices)
    with ProgressBar("reading", lines=False) as bar:
        router = run(
            grid,
            Encoder(encoder),
            _descriptions(catalogue),
            settings=RTRSettings(seed=seed),
            report=bar.report,
        )
    router.save(out)
    facts = router.learned.facts
    if as_json:
        typer.echo(
            json.dumps(
                {"path": str(out), "pairs": len(router.pairs), "columns": len(router.plans), "facts": facts}
            )
        )
        return
    unseen = facts["unseen"]
    typer.echo(
        f"{facts['questions']} questions, {len(router.pairs)} pairs, {len(router.plans) - len(router.pairs)} plans; "
        f"of questions it had not seen: log loss {unseen['log_loss']}, calibration error {unseen['ece']}"
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
    as_json: JsonFlag = False,
) -> None:
    """Accuracy by mean cost on questions that were held out, beside every mixture of single pairs.

    Budgets are kept by predictions alone: what an answer cost and whether it was right is looked at afterwards.
    """
    from viaticum.routers.query.evaluate import BUDGETS, MIDDLE
    from viaticum.routers.query.evaluate import evaluate as run
    from viaticum.routers.query.rtr import RTRRouter

    router = RTRRouter.load(folder)
    told = run(router, _grid(outcomes, prices, router.pairs), budgets=budget or BUDGETS)
    if as_json:
        typer.echo(json.dumps(told))
        return
    table = Table("$ a question", "router", "spent", "hull", "router - hull, 95%", box=None, pad_edge=False)
    for ours, hull, gap in zip(told["curve"], told["hull"], told["curve_minus_hull"], strict=True):
        table.add_row(
            f"{ours['budget']:g}",
            f"{ours['accuracy']:.1%}",
            f"{ours['cost']:.6f}",
            "-" if hull["accuracy"] is None else f"{hull['accuracy']:.1%}",
            "-"
            if gap["difference"] is None
            else f"{100 * gap['difference']:+.1f} ({100 * gap['low']:+.1f} to {100 * gap['high']:+.1f})",
        )
    Console(width=max(90, Console().width)).print(table)
    best = told["best_single"]
    typer.echo(
        f"best single pair: {best['pair']}, {best['accuracy']:.1%} at ${best['cost']:.6f}; reached at "
        + _times(told["cost_at_best_single_accuracy"])
        + ", 99% of it at "
        + _times(told["cost_at_99_percent_of_it"])
        + " its cost"
    )
    typer.echo(
        f"{told['questions']} questions; oracle {told['oracle']:.1%}; calibration error {told['ece']:.3f}; "
        f"tokens within p90 {told['token_coverage_p90']:.1%}; most used pair has {told['largest_share']:.0%} of the "
        f"calls at ${sorted(budget)[len(budget) // 2] if budget else MIDDLE:g}"
    )


@app.command()
def show(
    folder: Folder,
    question: Annotated[str, typer.Argument(help="What the router is asked about.")],
    as_json: JsonFlag = False,
) -> None:
    """The routing table of one question, and the plans it would take, from the cheapest to the best."""
    from viaticum.routers.query.rtr import RTRRouter
    from viaticum.types import Query

    router, query = RTRRouter.load(folder), Query(question)
    rows, plans = list(router.table(query)), _frontier(router.plans_for(query))
    trust = float(router.predict_texts([question]).trust[0])
    if as_json:
        told = [
            {
                "pair": str(row.pair),
                "accuracy": row.accuracy,
                "tokens_p50": row.tokens_p50,
                "tokens_p90": row.tokens_p90,
                "cost_p50": row.cost_p50,
                "cost_p90": row.cost_p90,
            }
            for row in rows
        ]
        ways = [
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
        typer.echo(json.dumps({"trust": trust, "table": told, "plans": ways}))
        return
    table = Table("pair", "right", "tokens p50/p90", "$ p50", "$ p90", box=None, pad_edge=False)
    for row in sorted(rows, key=lambda row: -row.accuracy):
        table.add_row(
            str(row.pair),
            f"{row.accuracy:.0%}",
            f"{row.tokens_p50}/{row.tokens_p90}",
            format_usd(row.cost_p50),
            format_usd(row.cost_p90),
        )
    ways_table = Table("plan", "right", "$ expected", "$ p90", box=None, pad_edge=False)
    for way in plans:
        ways_table.add_row(
            str(way.plan), f"{way.accuracy:.0%}", format_usd(way.cost_p50), format_usd(way.cost_p90)
        )
    console = Console(width=max(110, Console().width))
    console.print(table)
    typer.echo("")
    console.print(ways_table)
    typer.echo(f"\ntrust in this: {trust:.0%}; what is missing is filled by the means of all data sets")


@app.command()
def add(
    folder: Folder,
    model: Annotated[str, typer.Option(help="A model of the catalogue that the router does not know.")],
    strategy: Annotated[
        list[str] | None, typer.Option(help="Strategies; by default those that the router knows.")
    ] = None,
    outcomes: Annotated[
        list[Path] | None, typer.Option(help="Outcomes of it, if there are any: 20 to 100 help much.")
    ] = None,
    as_json: JsonFlag = False,
    catalogue: CatalogueFile = None,
) -> None:
    """Let a router know a new model by its description, and by its outcomes so far, without fitting anew."""
    from viaticum.catalogue import Catalogue
    from viaticum.outcomes import read_outcomes
    from viaticum.routers.query.learn import add as run
    from viaticum.routers.query.outcome_matrix import OutcomeMatrix
    from viaticum.routers.query.rtr import RTRRouter
    from viaticum.types import Pair

    spec = Catalogue.load(catalogue)[model]
    price = Catalogue.load(catalogue).prices([spec.members[-1]])[spec.members[-1]]
    dollars = tuple(
        each / NANOUSD_PER_USD for each in (price.input_nanousd_per_million, price.output_nanousd_per_million)
    )
    router = RTRRouter.load(folder)
    pairs = [Pair(model, each) for each in strategy or sorted({pair.strategy for pair in router.pairs})]
    rows = [row for path in outcomes or [] for row in read_outcomes(path) if row.pair in pairs]
    seen = OutcomeMatrix.from_outcomes(rows) if rows else None
    for pair in pairs:
        known = seen if seen is not None and pair in seen.pairs else None
        router = run(router, pair, _descriptions(catalogue), (dollars[0], dollars[1]), known)
    router.save(folder)
    if as_json:
        typer.echo(
            json.dumps({"path": str(folder), "added": [str(pair) for pair in pairs], "outcomes": len(rows)})
        )
        return
    typer.echo(
        f"added {', '.join(map(str, pairs))}, with {len(rows)} outcomes; the last version is in {folder / 'previous'}"
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
    """Fit anew with live outcomes too; keep the old router where the new one foretells live answers worse."""
    from viaticum.errors import DataError
    from viaticum.routers.query.learn import refit as run
    from viaticum.routers.query.rtr import RTRRouter

    router = RTRRouter.load(folder)
    known = _grid(outcomes, prices)
    with ProgressBar("reading", lines=False) as bar:
        found = run(
            router,
            known,
            _grid(live, prices, known.pairs, live=True),
            router.encoder,
            _descriptions(catalogue),
            report=bar.report,
        )
    if found.router is None:
        raise DataError(
            f"the refit foretells live answers worse (log loss {found.after:.4f}, before {found.before:.4f}); "
            f"the router in {folder} stays as it is"
        )
    found.router.save(folder)
    if as_json:
        typer.echo(
            json.dumps(
                {"path": str(folder), "before": found.before, "after": found.after, "live": found.live}
            )
        )
        return
    typer.echo(
        f"log loss of live answers {found.before:.4f} -> {found.after:.4f} ({found.live} outcomes); "
        f"the last version is in {folder / 'previous'}"
    )


def _frontier(rows: Iterable[Any]) -> list[Any]:
    """Rows that no cheaper one equals in accuracy, from the cheapest up."""
    found: list[Any] = []
    for row in sorted(rows, key=lambda row: (row.cost_p50, -row.accuracy)):
        if not found or row.accuracy > found[-1].accuracy:
            found.append(row)
    return found


def _grid(
    paths: list[Path], prices: Path | None, pairs: tuple[Pair, ...] | None = None, *, live: bool = False
) -> OutcomeMatrix:
    from viaticum.outcomes import read_outcomes
    from viaticum.routers.query.outcome_matrix import OutcomeMatrix, read_prices

    rows = [row for path in paths for row in read_outcomes(path)]
    return OutcomeMatrix.from_outcomes(
        rows, read_prices(prices) if prices is not None else None, pairs, live=live
    )


def _descriptions(catalogue: Path | None) -> dict[str, str]:
    from viaticum import strategies
    from viaticum.catalogue import Catalogue

    told = {spec.name: spec.description for spec in Catalogue.load(catalogue).values()}
    return told | {name: strategies.get(name).description for name in strategies.names()}


def _times(share: float | None) -> str:
    return "no" if share is None else f"{share:.2f} times"
