"""Predictions under the token limits of the calls that are made, which may differ from those of the outcomes.

Routers predict what an output would be if nothing cut it. Under a limit it is cut there: a quantile of
min(X, limit) is the quantile of X, at most the limit. Where outcomes were cut at a lower limit than calls are
now, the mean grows with what was hidden, which is extrapolated as log-normal (`Row.cut_at` says from where).
The price of a token is read from the row: its two quantiles of cost and tokens lie on one line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from viaticum.quantiles import moments
from viaticum.routers.query.plans import PlanRow
from viaticum.types import Pair, RoutingTable, Row

Limit = Callable[[Pair], int | None]  # most output tokens of a call of a pair; None where it is not known
UNCUT = 10  # where no outcome was cut, limits from this many 90% quantiles change nothing


def limit_table(table: RoutingTable, limit: Limit) -> RoutingTable:
    """The table under these limits; the same object where they change nothing."""
    rows = tuple(limit_row(row, limit(row.pair)) for row in table)
    return table if all(new is old for new, old in zip(rows, table, strict=True)) else RoutingTable(rows)


def by_pair(table: RoutingTable) -> dict[Pair, Row]:
    return {row.pair: row for row in table}


def limit_row(row: Row, limit: int | None) -> Row:
    """The row of a pair whose outputs end at `limit` tokens; the same object where that changes nothing."""
    if limit is None or row.tokens_p90 <= 0:
        return row
    hidden = row.cut_at is not None and limit > row.cut_at
    if not hidden and limit >= row.tokens_p90 and (row.cut_at is not None or limit >= UNCUT * row.tokens_p90):
        return row
    median, high = min(row.tokens_p50, limit), min(row.tokens_p90, limit)
    price = _token_price(row)
    mean = row.cost_mean
    if mean is not None:
        prompt = max(0.0, row.cost_p50 - price * row.tokens_p50)
        mean = round(min(prompt, mean) + max(0.0, mean - prompt) * _growth(row, limit))
    return replace(
        row,
        tokens_p50=median,
        tokens_p90=high,
        cost_p50=max(0, round(row.cost_p50 - price * (row.tokens_p50 - median))),
        cost_p90=max(0, round(row.cost_p90 - price * (row.tokens_p90 - high))),
        cost_mean=mean,
        seconds=None if row.seconds is None else row.seconds * _growth(row, limit),
    )


def limit_plans(
    plans: Sequence[PlanRow], before: Mapping[Pair, Row], after: Mapping[Pair, Row]
) -> list[PlanRow]:
    """The plans whose pairs have other rows under the limits than before.

    A plan of one pair has that pair's costs; those of several change by the ratio of their pairs' sums.
    """
    return [_limit_plan(plan, before, after) for plan in plans]


def _limit_plan(plan: PlanRow, before: Mapping[Pair, Row], after: Mapping[Pair, Row]) -> PlanRow:
    pairs = [pair for pair in plan.plan.pairs if pair in before]
    if all(after[pair] is before[pair] for pair in pairs):
        return plan
    if len(plan.plan.pairs) == 1:
        row = after[pairs[0]]
        costs = {name: getattr(row, name) for name in ("cost_p50", "cost_p90", "cost_mean")}
        return replace(plan, **costs, seconds=row.seconds)
    median, high, mean = (
        sum(getattr(after[pair], name) for pair in pairs)
        / max(1, sum(getattr(before[pair], name) for pair in pairs))
        for name in ("cost_p50", "cost_p90", "expected_cost")
    )
    return replace(
        plan,
        cost_p50=round(plan.cost_p50 * median),
        cost_p90=round(plan.cost_p90 * high),
        cost_mean=None if plan.cost_mean is None else round(plan.cost_mean * mean),
        seconds=None if plan.seconds is None else plan.seconds * mean,
    )


def _token_price(row: Row) -> float:
    """Nano-dollars of an output token; where the quantiles are equal, with the prompt's share."""
    if row.tokens_p90 > row.tokens_p50:
        return max(0.0, (row.cost_p90 - row.cost_p50) / (row.tokens_p90 - row.tokens_p50))
    return row.cost_p90 / row.tokens_p90


def _growth(row: Row, limit: int) -> float:
    """Mean tokens under the limit over those under the limit of the outcomes."""
    known = row.cut_at if row.cut_at is not None else UNCUT * row.tokens_p90
    p50, p90 = np.array(float(max(1, row.tokens_p50))), np.array(float(max(1, row.tokens_p90)))
    means = [float(moments(p50, p90, float(most))[0]) for most in (limit, known)]
    return means[0] / means[1] if means[1] > 0 else 1.0
