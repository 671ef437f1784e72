"""Metrics of one run: its rows by state and by route, calibration, predicted and real use, tokens by model.

Each function turns columns into one frozen record, so that the page, the Markdown and the JSON show the same
numbers. Leaves out reading (`run_reader`, `ledger_history`), the cost-accuracy plane (`frontier`) and text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from viaticum.reports.intervals import Estimate, Share, mean, share
from viaticum.reports.ledger_history import LedgerHistory
from viaticum.reports.outcome_table import SharedOutcomes, cheapest_right
from viaticum.reports.runs import STATES, Columns, Run

Array = np.ndarray[Any, Any]
BINS = 10
MOST_LOSSES = 10
MOST_ROUTES = 15
MOST_DOTS = 400
ANSWERED, SKIPPED, FAILED = range(len(STATES))


@dataclass(frozen=True, slots=True)
class Loss:
    """A row that some single pair has right for less, or that is not right itself. Costs are nano-dollars.

    Attributes:
        pairs_right: how many single pairs are right on it.
        better: the cheapest of these.
    """

    id: str
    route: str
    right: bool
    pairs_right: int
    cost: float
    better: str
    better_cost: float


@dataclass(frozen=True, slots=True)
class Tally:
    """Rows by state. asked: rows of the input; missing: rows that are not finished."""

    asked: int
    answered: int
    skipped: int
    failed: int
    missing: int


@dataclass(frozen=True, slots=True)
class RouteMetrics:
    """Metrics of one route.

    Attributes:
        predicted: mean predicted accuracy of the rows whose calibration counts.
        cost: mean nano-dollars a row.
        seconds_p50, seconds_p95: of the rows that were tried.
        escalated: share of rows that took more than one call, checks of answers aside.
        regret: share of rows that were not right though some single pair is.
        overpaid: mean nano-dollars that right rows cost above the cheapest right pair.
    """

    route: str
    of: Share
    accuracy: Share | None
    predicted: float | None
    cost: float
    seconds_p50: float | None
    seconds_p95: float | None
    escalated: Share | None
    regret: Share | None
    overpaid: float | None


@dataclass(frozen=True, slots=True)
class Bin:
    """Rows whose predicted accuracy lies in [begin, end): its mean, and the share that was right."""

    begin: float
    end: float
    predicted: float
    right: Share


@dataclass(frozen=True, slots=True)
class Calibration:
    """Predicted against real accuracy.

    Attributes:
        error: expected calibration error, the mean distance of predicted from real over the bins, weighted by
            count.
        brier: mean squared distance of the prediction from 0 or 1.
        surplus: right less predicted, over all rows.
    """

    bins: tuple[Bin, ...]
    of: int
    error: float
    brier: float
    predicted: float
    right: float
    surplus: Estimate | None


@dataclass(frozen=True, slots=True)
class Coverage:
    """How often a row stayed within its predicted use.

    Attributes:
        within_p50, within_p90: share of rows at or below the predicted quantile.
        ratio: sum of real use by sum of predicted p50.
        dots: (predicted p50, real) of some rows, evenly picked.
    """

    within_p50: Share | None
    within_p90: Share | None
    ratio: float | None
    dots: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class ModelUsage:
    """Tokens of one model, and its share of all output tokens. nanousd is None without a ledger."""

    model: str
    input_tokens: int
    output_tokens: int
    share: float
    nanousd: int | None


@dataclass(frozen=True, slots=True)
class Writers:
    """Tokens by model.

    Attributes:
        large: the model with the most expensive output among those that wrote texts together; "" where not
            known.
    """

    models: tuple[ModelUsage, ...]
    large: str


def tally(run: Run) -> Tally:
    states = np.bincount(run.rows.state, minlength=len(STATES))
    asked = run.job.rows if run.job else len(run.rows)
    answered, skipped, failed = (int(states[state]) for state in (ANSWERED, SKIPPED, FAILED))
    return Tally(asked, answered, skipped, failed, max(0, asked - len(run.rows)))


def row_costs(run: Run, history: LedgerHistory | None) -> tuple[Array, bool]:
    """Nano-dollars [rows], and whether they are what the ledger posted for the rows' calls."""
    if history is None:
        return run.rows.cost, False
    costs = np.zeros(len(run.rows), dtype=np.int64)
    for key, (row, _, _) in run.calls.items():
        costs[row] += history.posted_for.get(key, 0)
    return costs, True


def accuracy(rows: Columns, answered_only: bool = False) -> Share | None:
    """Share of rows that are right, of those whose right answer is known; a failed row is not right."""
    of = rows.graded & (rows.state == ANSWERED) if answered_only else rows.graded
    return share(int((rows.right & of).sum()), int(of.sum()))


def by_route(run: Run, costs: Array, known: SharedOutcomes | None) -> list[RouteMetrics]:
    """Metrics by route, most rows first; routes past `MOST_ROUTES` are put together."""
    counts = np.bincount(run.rows.route, minlength=len(run.routes))
    order = [int(n) for n in np.argsort(-counts, kind="stable")]
    many = len(order) > MOST_ROUTES + 1
    groups = [(run.routes[n], run.rows.route == n) for n in (order[:MOST_ROUTES] if many else order)]
    if many:
        rest = np.isin(run.rows.route, order[MOST_ROUTES:])
        groups.append((f"{len(order) - MOST_ROUTES} other routes", rest))
    return [_route(name, in_route, run.rows, costs, known) for name, in_route in groups]


def in_all(run: Run, costs: Array, known: SharedOutcomes | None) -> RouteMetrics | None:
    """Metrics of all rows, as one route."""
    if not len(run.rows):
        return None
    return _route("all", np.ones(len(run.rows), dtype=bool), run.rows, costs, known)


def _route(
    name: str, in_route: Array, rows: Columns, costs: Array, known: SharedOutcomes | None
) -> RouteMetrics:
    tried = in_route & (rows.calls > 0)
    seconds = rows.seconds[tried]
    of = share(int(in_route.sum()), len(rows))
    assert of is not None
    regret, overpaid = _regret(in_route, rows, costs, known) if known else (None, None)
    graded = in_route & rows.graded
    counted = graded & (rows.calls > 0) & ~np.isnan(rows.accuracy)
    return RouteMetrics(
        name,
        of,
        share(int((rows.right & graded).sum()), int(graded.sum())),
        float(rows.accuracy[counted].mean()) if counted.any() else None,
        float(costs[in_route].mean()),
        float(np.quantile(seconds, 0.5)) if len(seconds) else None,
        float(np.quantile(seconds, 0.95)) if len(seconds) else None,
        share(int((rows.calls[tried] > 1).sum()), int(tried.sum())),
        regret,
        overpaid,
    )


def _regret(
    in_route: Array, rows: Columns, costs: Array, known: SharedOutcomes
) -> tuple[Share | None, float | None]:
    compared = in_route[known.rows]
    right = rows.right[known.rows] & compared
    possible = known.correct.max(1) > 0
    regret = share(int((possible & compared & ~right).sum()), int(compared.sum()))
    over = (costs[known.rows] - cheapest_right(known))[right & possible]
    return regret, float(over.mean()) if len(over) else None


def losses(run: Run, costs: Array, known: SharedOutcomes, most: int = MOST_LOSSES) -> list[Loss]:
    """The rows that lost most against the cheapest right pair.

    Rows that are not right come first, those that most pairs have right before others; then right rows, by
    what was paid too much.
    """
    mine = costs[known.rows]
    right, pairs_right = run.rows.right[known.rows], known.correct.sum(1).astype(int)
    cheapest, price = np.where(known.correct > 0, known.cost, np.inf).argmin(1), cheapest_right(known)
    lost = np.flatnonzero((pairs_right > 0) & (~right | (mine > price)))
    overpaid = mine[lost] - price[lost]
    order = np.lexsort((-overpaid, np.where(right[lost], 0, -pairs_right[lost]), right[lost]))
    return [
        Loss(
            run.rows.ids[known.rows[n]],
            run.routes[run.rows.route[known.rows[n]]],
            bool(right[n]),
            int(pairs_right[n]),
            float(mine[n]),
            str(known.pairs[cheapest[n]]),
            float(price[n]),
        )
        for n in lost[order][:most]
    ]


def calibration(rows: Columns) -> Calibration | None:
    """Calibration of the rows that were tried, are graded and have a predicted accuracy."""
    counted = rows.graded & (rows.calls > 0) & ~np.isnan(rows.accuracy)
    if not counted.any():
        return None
    chance, right = rows.accuracy[counted], rows.right[counted].astype(float)
    bin_of = np.minimum((chance * BINS).astype(int), BINS - 1)
    bins, error = [], 0.0
    for number in range(BINS):
        in_bin = bin_of == number
        in_bin_right = share(int(right[in_bin].sum()), int(in_bin.sum()))
        if in_bin_right is None:
            continue
        predicted = float(chance[in_bin].mean())
        error += in_bin_right.of / len(right) * abs(in_bin_right.value - predicted)
        bins.append(Bin(number / BINS, (number + 1) / BINS, predicted, in_bin_right))
    return Calibration(
        tuple(bins),
        len(right),
        error,
        float(((chance - right) ** 2).mean()),
        float(chance.mean()),
        float(right.mean()),
        mean(right - chance),
    )


def coverage(real: Array, p50: Array, p90: Array, rows: Columns) -> Coverage | None:
    """Coverage of the rows that were tried and not cached, where real and predicted use are known."""
    counted = (rows.calls > 0) & ~rows.cached & ~np.isnan(real) & ~(np.isnan(p50) & np.isnan(p90))
    if not counted.any():
        return None
    real, p50, p90 = real[counted], p50[counted], p90[counted]
    lower, upper = ~np.isnan(p50), ~np.isnan(p90)
    expected = float(p50[lower].sum())
    picked = np.flatnonzero(lower)
    picked = (
        picked[np.linspace(0, len(picked) - 1, min(MOST_DOTS, len(picked))).astype(int)]
        if len(picked)
        else picked
    )
    return Coverage(
        share(int((real <= p50)[lower].sum()), int(lower.sum())),
        share(int((real <= p90)[upper].sum()), int(upper.sum())),
        float(real[lower].sum()) / expected if expected else None,
        tuple((float(p50[n]), float(real[n])) for n in picked),
    )


def writers(run: Run, history: LedgerHistory | None) -> Writers | None:
    """Tokens by model: as the ledger posted them, where there is one, else as the rows say."""
    if history is not None:
        posted = {
            name: (each.input_tokens, each.output_tokens, each.nanousd)
            for name, each in history.models.items()
        }
        usage: dict[str, tuple[int, int, int | None]] = dict(posted)
        rates = {name: each.output_rate for name, each in history.models.items()}
    else:
        usage = {
            name: (input_tokens, output_tokens, None)
            for name, (input_tokens, output_tokens) in run.usage.items()
        }
        rates = {}
    if not usage:
        return None
    total = sum(output_tokens for _, output_tokens, _ in usage.values())
    models = [
        ModelUsage(name, input_tokens, output_tokens, output_tokens / total if total else 0.0, cost)
        for name, (input_tokens, output_tokens, cost) in sorted(usage.items(), key=lambda item: -item[1][1])
    ]
    mixed = [name for name in run.texts.parts if rates.get(name)]
    large = max(mixed, key=lambda name: rates[name]) if len({rates[name] for name in mixed}) > 1 else ""
    return Writers(tuple(models), large)
