"""What the commands of `viaticum router` read: outcome tables with prices, and descriptions of models."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from viaticum.routers.query.outcome_matrix import OutcomeMatrix
    from viaticum.types import Pair

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


def read_matrix(
    paths: list[Path], prices: Path | None, pairs: tuple[Pair, ...] | None = None, *, live: bool = False
) -> OutcomeMatrix:
    """The outcomes of tables and the verdicts on them, with the prices of a file where one is given."""
    from viaticum.outcomes import read_outcomes, read_verdicts
    from viaticum.routers.query.outcome_matrix import OutcomeMatrix, read_prices

    return OutcomeMatrix.from_outcomes(
        read_outcomes(*paths),
        read_prices(prices) if prices is not None else None,
        pairs,
        live=live,
        verdicts=read_verdicts(*paths),
    )


def descriptions(catalogue: Path | None, pairs: Iterable[Pair]) -> dict[str, str]:
    """Of all models and the strategies of these pairs, among them those with a budget or samples."""
    from viaticum import strategies
    from viaticum.catalogue import Catalogue

    models = {spec.name: spec.description for spec in Catalogue.load(catalogue).values()}
    named = {pair.strategy for pair in pairs if strategies.is_known(pair.strategy)}
    return models | {name: strategies.get(name).description for name in named}
