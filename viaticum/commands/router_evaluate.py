"""`viaticum router evaluate`: a router on questions that it has not seen, or without each data set in turn.

Results go to stdout, notes and progress to stderr.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from viaticum.commands.model_entries import CatalogueFile, JsonFlag
from viaticum.commands.progress import ProgressBar
from viaticum.commands.router_inputs import Folder, Outcomes, Prices, descriptions, read_matrix
from viaticum.commands.table import print_table, usd

if TYPE_CHECKING:
    from viaticum.routers.query.outcome_matrix import OutcomeMatrix
    from viaticum.routers.query.rtr import RTRRouter


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
    refits: Annotated[
        int,
        typer.Option(
            help="With --leave-out: further fits on training questions drawn anew, which widen intervals.",
            min=0,
        ),
    ] = 0,
    page: Annotated[
        Path | None, typer.Option(help="Write the figures and their chart to this HTML file too.")
    ] = None,
    as_json: JsonFlag = False,
    catalogue: CatalogueFile = None,
) -> None:
    """Accuracy by mean cost on held-out questions, beside the best mixtures of single pairs.

    Operating points are chosen from predictions; actual costs and correctness are read afterwards. "Paced" is
    what a batch does with the same money: real costs correct its plan on the way.
    """
    from viaticum.budgets.paced_run import paced_choices
    from viaticum.commands.router_page import write_evaluation_page
    from viaticum.errors import InputError
    from viaticum.routers.query.evaluate import BUDGETS, MIDDLE_BUDGET
    from viaticum.routers.query.evaluate import evaluate as run
    from viaticum.routers.query.rtr import RTRRouter

    router = RTRRouter.load(folder)
    matrix = read_matrix(outcomes, prices, router.pairs)
    if leave_out is not None:
        if page is not None:
            raise InputError("--page draws held-out questions, not --leave-out; leave one of them out")
        _evaluate_leaving_out(leave_out, router, matrix, budget or BUDGETS, refits, catalogue, as_json)
        return
    if refits:
        raise InputError("--refits is about the fits of --leave-out dataset; add that, or leave it out")
    result = run(router, matrix, budgets=budget or BUDGETS, paced=paced_choices)
    if result["learned_from"]:
        typer.echo(
            f"warning: the router was fitted on {result['learned_from']} of the {result['questions']} "
            "questions, so that these figures promise too much; evaluate on questions that it has not seen "
            "(`viaticum outcomes split` keeps some aside)",
            err=True,
        )
    if page is not None:
        write_evaluation_page(page, folder.name, result)
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
    _note_cheapest(result["cheapest"])
    best = result["best_single"]
    tied = f" (the cheapest of the most accurate: {', '.join(best['ties'])} too)" if best["ties"] else ""
    typer.echo(
        f"best single pair: {best['pair']}{tied}, {best['accuracy']:.1%} at {usd(best['cost'])}; reached at "
        + _times(result["cost_at_best_single_accuracy"])
        + ", 99% of it at "
        + _times(result["cost_at_99_percent_of_it"])
        + " its cost"
    )
    area = result["area"]
    typer.echo(
        f"mean accuracy over the logarithm of the cost, from {usd(area['from'])} to {usd(area['to'])}: "
        f"router {area['router']:.1%}, mixtures of pairs {area['pairs']:.1%}; "
        f"router - pairs, 95%: {_interval(area)}"
    )
    middle = sorted(budget)[len(budget) // 2] if budget else MIDDLE_BUDGET
    covered = result["token_coverage_p90"]
    tokens = "" if covered is None else f"tokens within p90 {covered:.1%}; "
    typer.echo(
        f"{result['questions']} questions; oracle {result['oracle']:.1%}; "
        f"calibration error {result['ece']:.3f}; {tokens}"
        f"most used pair has {result['largest_share']:.0%} of the calls at {usd(middle)}"
    )


def _evaluate_leaving_out(
    column: str,
    router: RTRRouter,
    matrix: OutcomeMatrix,
    budgets: Sequence[float],
    refits: int,
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
            descriptions(catalogue, matrix.pairs),
            budgets=budgets,
            settings=router.parameters.settings,
            refits=refits,
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
                *([_interval(point, "_kinds")] if "low_kinds" in point else []),
            )
            for point in points
        ]
        columns = ["a question", "router", "spent", "static", "spent, static", "router - static, 95%"]
        columns += ["over data sets too"] if "low_kinds" in points[0] else []
        print_table(columns, rows, spare=("spent, static",))
        typer.echo("")
    _note_cheapest(result["cheapest"])


def _note_cheapest(cheapest: Mapping[str, Any]) -> None:
    """Tell of budgets that no choice can keep to."""
    if cheapest["budgets_below"]:
        typer.echo(
            f"note: {', '.join(map(usd, cheapest['budgets_below']))} a question is less than the cheapest "
            f"pair costs here, {cheapest['pair']} at {usd(cheapest['cost'])}; the router spends more than "
            "that, and a batch skips questions",
            err=True,
        )


def _interval(gap: Mapping[str, float], which: str = "") -> str:
    """A difference in points and its interval. which: the ending of the interval's names."""
    low, high = gap[f"low{which}"], gap[f"high{which}"]
    return f"{100 * gap['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def _times(share: float | None) -> str:
    return "no" if share is None else f"{share:.2f} times"
