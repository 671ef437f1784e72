"""What other budgets would have bought, from the same outcomes: best mixtures of single pairs, an oracle.

A mixture asks a pair that is drawn at random for each question, or none: rows that the money does not reach
are skipped, and not right. It is the best one in hindsight on these very questions, which favours it. Costs
are nano-dollars. Leaves out the router, whose choices at another budget would need its predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from viaticum.convex_hull import hull
from viaticum.reports.intervals import Estimate, estimate, grouped, resamples
from viaticum.reports.outcome_table import SharedOutcomes
from viaticum.reports.runs import Run

Array = np.ndarray[Any, Any]
SHARES = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the limit, or of what was spent where that is far less
CURVE = 48


@dataclass(frozen=True, slots=True)
class OtherBudget:
    """Shares of right answers at one budget of the whole job; None where it is not known.

    Attributes:
        mixture: of the best mixture of single pairs and of no answer, with its interval.
        oracle: of the cheapest right answers, as many as the money buys.
        forecast: the planner's, before anything was spent.
        cut_off: of this run, had it ended when so much was spent; None from what it spent on.
    """

    nanousd: int
    mixture: Estimate | None
    oracle: float | None
    forecast: float | None
    cut_off: float | None


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """Shares of right answers at a budget of the whole job."""

    nanousd: float
    mixture: float
    oracle: float


@dataclass(frozen=True, slots=True)
class OtherBudgets:
    """Some budgets, and a curve through all between them; of: questions that the outcome table knows."""

    at: tuple[OtherBudget, ...]
    curve: tuple[CurvePoint, ...]
    of: int


def other_budgets(run: Run, costs: Array, known: SharedOutcomes | None, spent: int) -> OtherBudgets | None:
    """What other budgets would have bought; None for an outcome table and where nothing is known of any.

    Args:
        costs: nano-dollars of each row of the run.
        known: outcomes of the run's own questions.
        spent: nano-dollars of the whole run.
    """
    job = run.job
    base = spent if job is None else job.limit_nanousd or spent
    if job is None or base <= 0 or not len(run.rows):
        return None
    forecasts = {each.budget_nanousd: each.accuracy for each in job.previews}
    bound = job.limit_nanousd is not None and 2 * spent >= job.limit_nanousd
    shared = base if bound or spent <= 0 else spent  # where the limit did not bind, less money than was spent
    shares = {max(1, round(shared * share)) for share in SHARES}
    budgets = sorted((shares | forecasts.keys() | {base, spent}) - {0})
    asked = max(job.rows, len(run.rows))
    amounts = np.array(budgets, dtype=float) / asked
    mixtures: Sequence[Estimate | None] = [None] * len(budgets)
    oracles: Sequence[float | None] = [None] * len(budgets)
    curve: tuple[CurvePoint, ...] = ()
    if known is not None:
        mixtures, oracles = _mixtures(known, amounts), oracle_at(known, amounts).tolist()
        curve = _curve(known, np.geomspace(budgets[0], budgets[-1], CURVE), asked)
    cut_off = _cut_off(run, costs, np.array(budgets, dtype=float), spent)
    if known is None and not forecasts and all(each is None for each in cut_off):
        return None
    at = tuple(
        OtherBudget(budget, mixture, oracle, forecasts.get(budget), cut)
        for budget, mixture, oracle, cut in zip(budgets, mixtures, oracles, cut_off, strict=True)
    )
    return OtherBudgets(at, curve, 0 if known is None else len(known.correct))


def mixture_at(accuracy: Array, cost: Array, amounts: Array) -> Array:
    """Accuracy of the best mixture of pairs, each alone, and of no answer, at a mean cost of `amounts`."""
    accuracy, cost = np.append(accuracy, 0.0), np.append(cost, 0.0)
    corners = hull(accuracy, cost)
    return np.asarray(np.interp(amounts, cost[corners], accuracy[corners]))


def oracle_at(known: SharedOutcomes, amounts: Array) -> Array:
    """Share of questions whose cheapest right answer is bought, the cheapest first, at a mean cost."""
    price = np.where(known.correct > 0, known.cost, np.inf).min(1)
    paid = np.cumsum(np.sort(price[np.isfinite(price)]))
    return np.asarray(np.searchsorted(paid, amounts * len(price) * (1 + 1e-12), "right") / len(price))


def _mixtures(known: SharedOutcomes, amounts: Array) -> list[Estimate | None]:
    value = mixture_at(known.correct.mean(0), known.cost.mean(0), amounts)
    drawn = []
    correct, cost = grouped(known.correct), grouped(known.cost)
    for weights in resamples(len(correct)):
        pairs = zip(weights @ correct, weights @ cost, strict=True)
        drawn += [mixture_at(*each, amounts) for each in pairs]
    table = np.array(drawn)
    return [estimate(float(value[n]), table[:, n], len(known.correct)) for n in range(len(amounts))]


def _curve(known: SharedOutcomes, budgets: Array, asked: int) -> tuple[CurvePoint, ...]:
    amounts = budgets / asked
    mixture = mixture_at(known.correct.mean(0), known.cost.mean(0), amounts)
    points = zip(budgets.tolist(), mixture.tolist(), oracle_at(known, amounts).tolist(), strict=True)
    return tuple(CurvePoint(*each) for each in points)


def _cut_off(run: Run, costs: Array, budgets: Array, spent: int) -> list[float | None]:
    """Share of all graded rows that were right when so much was spent, in the order the rows ended."""
    graded = int(run.rows.graded.sum())
    if not graded:
        return [None] * len(budgets)
    right = np.cumsum(run.rows.right & run.rows.graded)
    rows = np.searchsorted(np.cumsum(costs), budgets, "right")
    return [
        None if budget >= spent else float(right[n - 1]) / graded if n else 0.0
        for budget, n in zip(budgets, rows, strict=True)
    ]
