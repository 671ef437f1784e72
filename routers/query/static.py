"""The router that ignores the query: accuracy and quantiles of each pair, counted from outcomes.

The baseline that a learned router has to beat.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from viaticum.errors import DataError, InputError
from viaticum.quantiles import Array, censored_quantile
from viaticum.routers.query.base import Knowledge, QueryRouter
from viaticum.types import Outcome, Pair, Query, RoutingTable, Row


@dataclass(frozen=True)
class TableOrigin:
    """What a table was measured on: a data set, how many of its questions, and the day (YYYY-MM-DD)."""

    dataset: str
    questions: int
    date: str
    about: str = ""

    def __str__(self) -> str:
        about = f" ({self.about})" if self.about else ""
        day = f", {self.date}" if self.date else ""
        return f"measured on {self.questions:,} questions of {self.dataset}{about}{day}"


class StaticRouter(QueryRouter):
    """Returns the same table for every query: `rows`, with their origin where that is known."""

    def __init__(self, table: RoutingTable, origin: TableOrigin | None = None) -> None:
        self.rows, self.origin = table, origin
        self._table = table
        if origin is not None:
            self._table = RoutingTable(tuple(replace(row, origin=str(origin)) for row in table))

    def table(self, query: Query) -> RoutingTable:
        return self._table

    def knowledge(self) -> tuple[Knowledge, ...]:
        models = tuple(sorted({row.pair.model for row in self.rows}))
        if self.origin is None:
            return (Knowledge("table", models),)
        found = self.origin
        return (
            Knowledge(
                "table", models, {found.dataset: found.questions}, found.questions, found.date, found.about
            ),
        )

    @classmethod
    def fit(cls, outcomes: Iterable[Outcome]) -> StaticRouter:
        """Count accuracy, quantiles of tokens and cost, and the mean cost and seconds of each pair.

        Rows without tokens or cost count for the accuracy only. An output that was cut counts as longer; a
        quantile that no whole output reaches is extrapolated (`viaticum.quantiles.censored_quantile`).

        Raises:
            DataError: an empty table, or a pair with no row that has both.
        """
        groups: dict[Pair, list[Outcome]] = defaultdict(list)
        for outcome in outcomes:
            groups[outcome.pair].append(outcome)
        if not groups:
            raise DataError("the outcome table is empty; profile at least one question")
        return cls(RoutingTable(tuple(_row(pair, rows) for pair, rows in sorted(groups.items()))))

    @classmethod
    def default(cls) -> StaticRouter:
        """The table in the package: local models of the default catalogue on grade-school maths."""
        return cls._parse(
            (resources.files("viaticum.routers.query") / "static.json").read_bytes(), "static.json"
        )

    @classmethod
    def load(cls, path: str | Path) -> StaticRouter:
        try:
            return cls._parse(Path(path).read_bytes(), str(path))
        except OSError as error:
            raise InputError(f"cannot read the router {path}: {error.strerror or error}") from None

    def save(self, path: str | Path) -> None:
        rows = [asdict(row) | {"pair": str(row.pair)} for row in self.rows]
        document: dict[str, Any] = {"router": "static", "rows": rows}
        if self.origin is not None:
            document["origin"] = asdict(self.origin)
        Path(path).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def _parse(cls, text: bytes, origin: str) -> StaticRouter:
        try:
            document: dict[str, Any] = json.loads(text)
            rows = [_checked(Row(**(row | {"pair": Pair.parse(row["pair"])}))) for row in document["rows"]]
            if not rows:
                raise ValueError("it has no rows")
            measured = TableOrigin(**document["origin"]) if "origin" in document else None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{origin} is not a static router ({error}); fit it again") from None
        return cls(RoutingTable(tuple(rows)), measured)


def _checked(row: Row) -> Row:
    """The row. Raises `ValueError` for figures that are none of their kind."""
    counts = (row.tokens_p50, row.tokens_p90, row.cost_p50, row.cost_p90)
    if not all(type(each) is int and each >= 0 for each in (*counts, row.cost_mean or 0, row.cut_at or 0)):
        raise ValueError(f"tokens and costs of {row.pair} are whole numbers from 0")
    shares = [each for each in (row.accuracy_low, row.accuracy_high, row.average) if each is not None]
    if not all(type(each) in (int, float) and 0 <= each <= 1 for each in (row.accuracy, *shares)):
        raise ValueError(f"accuracies of {row.pair} are between 0 and 1")
    seconds = 0.0 if row.seconds is None else row.seconds
    if not (type(seconds) in (int, float) and 0 <= seconds < math.inf):
        raise ValueError(f"the seconds of {row.pair} are a number from 0")
    return row


def _row(pair: Pair, outcomes: Sequence[Outcome]) -> Row:
    counted = [row for row in outcomes if row.output_tokens is not None and row.cost_nanousd is not None]
    if not counted:
        raise DataError(f"{pair}: no outcome with output_tokens and cost_nanousd; profile it again")
    tokens = np.array([row.output_tokens for row in counted], dtype=np.float64)
    costs = np.array([row.cost_nanousd for row in counted], dtype=np.float64)
    cut = np.array([row.finish_reason == "length" for row in counted])
    seconds = [row.seconds for row in outcomes if row.seconds is not None]
    return Row(
        pair=pair,
        accuracy=sum(outcome.correct for outcome in outcomes) / len(outcomes),
        tokens_p50=_quantile(tokens, cut, 0.5),
        tokens_p90=_quantile(tokens, cut, 0.9),
        cost_p50=_quantile(costs, cut, 0.5),
        cost_p90=_quantile(costs, cut, 0.9),
        cost_mean=round(costs.mean()),
        cut_at=round(float(np.median(tokens[cut]))) if cut.any() else None,
        seconds=round(fmean(seconds), 3) if seconds else None,
    )


def _quantile(amounts: Array, cut: Array, share: float) -> int:
    """The smallest amount that at least `share` of the amounts do not exceed; cut ones are larger."""
    return round(math.expm1(censored_quantile(np.log1p(amounts), cut, share)))
