"""A run among its baselines: every single pair, their best mixtures, a random pair, and an oracle.

Baselines come from an outcome table that holds every pair's answer to every question, on the questions of the
run where the table has them. Mixtures are the upper hull of the pairs in the cost-accuracy plane: the pair
for each question is drawn at random (the "zero router" of RouterBench, arXiv 2403.12031). The best single
pair and the hull are chosen in hindsight, on the same questions, which favours them over the run. Costs are
nano-dollars a question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from viaticum.convex_hull import hull
from viaticum.reports.intervals import Estimate, Share, estimate, grouped, mean, resamples, share
from viaticum.reports.outcome_table import SharedOutcomes, best_index, cheapest_right, complete_outcomes
from viaticum.reports.runs import Columns, Run, text_number
from viaticum.routers.query.outcome_matrix import OutcomeMatrix
from viaticum.types import Outcome

Array = np.ndarray[Any, Any]
FEWEST = 10  # questions in common, below which other questions are no worse


@dataclass(frozen=True, slots=True)
class Point:
    """A point of the plane: mean nano-dollars a question, accuracy, and the 95% interval of the accuracy."""

    name: str
    cost: float
    accuracy: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Saved:
    """Cost below a reference at equal accuracy, as a fraction of the reference's cost.

    Attributes:
        reference: "best single pair" where the run gets at least as many right; else "mixture", the cheapest
            mixture of single pairs that gets as many right as the run.
        cost: of the reference, nano-dollars a question.
    """

    share: Estimate
    reference: Literal["best single pair", "mixture"]
    name: str
    cost: float


@dataclass(frozen=True, slots=True)
class CostAccuracyPlane:
    """A run and its baselines on `of` questions.

    Attributes:
        asked: graded questions of the run.
        seen: of the `of` questions, how many the run's router was fitted on; None where it is not known.
        same_questions: the `of` questions are the run's own; else they are the table's, and nothing is
            paired.
        hull: corners of the best mixtures, from the cheapest to the most accurate.
        shuffled: the run's pairs in the run's shares, dealt to questions at random.
        more_right: accuracy of the run less that of the best single pair.
        less_cost: cost of the run less that of the best single pair.
        left_out: pairs that the table does not hold for most of the questions.
    """

    table: str
    of: int
    asked: int
    seen: int | None
    same_questions: bool
    run: Point | None
    singles: tuple[Point, ...]
    best: Point
    hull: tuple[Point, ...]
    random: Point
    oracle: Point
    shuffled: Point | None
    more_right: Estimate | None
    less_cost: Estimate | None
    saved: Saved | None
    left_out: tuple[str, ...]


def match_outcomes(rows: Columns, outcomes: Sequence[Outcome]) -> tuple[SharedOutcomes, bool]:
    """Outcomes of the graded questions of a run, and whether the table is about these questions at all.

    A row is matched by its question's text; by its id only where either side has no text. With fewer than
    `FEWEST` matches the outcomes of the whole table are returned.

    Raises:
        DataError: the table contradicts itself or does not say what its answers cost.
    """
    matrix = OutcomeMatrix.from_outcomes(outcomes)
    by_text = {text_number(text): n for n, text in enumerate(matrix.texts) if text}
    by_id: dict[str, int | None] = {}
    for n, (dataset, question) in enumerate(matrix.ids):
        by_id[question] = None if question in by_id else n
        by_id[f"{dataset}/{question}"] = n
    found: dict[int, int] = {}
    for index, (name, text) in enumerate(zip(rows.ids, rows.text, strict=True)):
        if not rows.graded[index]:
            continue
        at = by_text.get(int(text)) if text else None
        if (
            at is None
            and (candidate := by_id.get(name)) is not None
            and not (text and matrix.texts[candidate])
        ):
            at = candidate
        if at is not None:
            found.setdefault(at, index)
    if len(found) < FEWEST:
        whole = complete_outcomes(matrix)
        return whole, False
    return complete_outcomes(matrix.select(np.array(list(found))), np.array(list(found.values()))), True


def plane(
    run: Run, costs: Array, outcomes: Sequence[Outcome], table: str
) -> tuple[CostAccuracyPlane, SharedOutcomes | None]:
    """Place a run among its baselines.

    Args:
        costs: nano-dollars [rows].
        table: name of the outcome table.

    Returns the plane, and the outcomes of the run's own questions, for regrets; None where the table is about
    others.
    """
    known, same = match_outcomes(run.rows, outcomes)
    accuracy, cost = known.correct.mean(0), known.cost.mean(0)
    count, names = len(known.correct), [str(pair) for pair in known.pairs]
    singles = [
        _point(name, cost[n], share(int(known.correct[:, n].sum()), count)) for n, name in enumerate(names)
    ]
    best = best_index(accuracy, cost)
    corners = hull(accuracy, cost)
    here = right = mine = None
    more = less = saved = shuffled = seen = None
    if same:
        right, mine = run.rows.right[known.rows].astype(float), costs[known.rows].astype(float)
        here = _point(run.name, mine.mean(), share(int(right.sum()), count))
        more, less = mean(right - known.correct[:, best]), mean(mine - known.cost[:, best])
        saved = _saved(right, mine, known, best)
        shuffled = _shuffled(run, known)
        marks = run.rows.seen[known.rows]
        seen = int((marks == 1).sum()) if (marks >= 0).any() else None
    elif run.rows.graded.any():
        graded = run.rows.graded
        here = _point(
            run.name, costs[graded].mean(), share(int(run.rows.right[graded].sum()), int(graded.sum()))
        )
    any_right = known.correct.max(1)
    return CostAccuracyPlane(
        table=table,
        of=count,
        asked=int(run.rows.graded.sum()),
        seen=seen,
        same_questions=same,
        run=here,
        singles=tuple(singles),
        best=singles[best],
        hull=tuple(singles[n] for n in corners),
        random=Point("random pair", float(cost.mean()), float(accuracy.mean())),
        oracle=Point("oracle", float(cheapest_right(known).mean()), float(any_right.mean())),
        shuffled=shuffled,
        more_right=more,
        less_cost=less,
        saved=saved,
        left_out=known.left_out,
    ), (known if same else None)


def cost_at(wanted: float, accuracy: Array, cost: Array) -> float | None:
    """Cost of the cheapest mixture that gets a share `wanted` right; None where none does."""
    corners = hull(accuracy, cost)
    if wanted > accuracy[corners[-1]]:
        return None
    return float(np.interp(wanted, accuracy[corners], cost[corners]))


def _point(name: str, cost: float, share: Share | None) -> Point:
    if share is None:
        return Point(name, float(cost), float("nan"))
    return Point(name, float(cost), share.value, share.low, share.high)


def _saved(right: Array, mine: Array, known: SharedOutcomes, best: int) -> Saved | None:
    """The interval resamples questions and finds the reference again in each draw."""

    def reference(wanted: float, accuracy: Array, cost: Array) -> float:
        found = cost_at(wanted, accuracy, cost)
        return float(cost[best_index(accuracy, cost)]) if found is None else found

    accuracy, cost = known.correct.mean(0), known.cost.mean(0)
    enough = right.mean() >= accuracy[best]
    paid = float(cost[best]) if enough else reference(float(right.mean()), accuracy, cost)
    if paid <= 0:
        return None
    drawn: list[Array] = []
    parts = grouped(right), grouped(mine), grouped(known.correct), grouped(known.cost)
    for weights in resamples(len(parts[0])):
        rights, costs, accuracies, prices = (weights @ part for part in parts)
        paids = (
            prices[:, best]
            if enough
            else np.array([reference(*each) for each in zip(rights, accuracies, prices, strict=True)])
        )
        drawn.append(1 - costs / np.maximum(paids, 1e-9))
    kind: Literal["best single pair", "mixture"] = "best single pair" if enough else "mixture"
    return Saved(
        estimate(1 - float(mine.mean()) / paid, np.concatenate(drawn), len(right)),
        kind,
        str(known.pairs[best]) if enough else "the cheapest equally accurate mix of single pairs",
        paid,
    )


def _shuffled(run: Run, known: SharedOutcomes) -> Point | None:
    """The run's pairs in the run's shares, at random; None where one pair alone did not answer a row."""
    columns = {str(pair): n for n, pair in enumerate(known.pairs)}
    routes = [columns.get(run.routes[route]) for route in run.rows.route[known.rows]]
    if any(column is None for column in routes) or len(set(routes)) < 2:
        return None
    shares = np.bincount(np.array(routes, dtype=np.int64), minlength=len(columns)) / len(routes)
    return Point(
        "random, same shares", float(known.cost.mean(0) @ shares), float(known.correct.mean(0) @ shares)
    )
