"""Outcome tables that hold every pair's answer to every question: questions and best pair.

Leaves out runs: `frontier` compares them with it. Costs are nano-dollars a question.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from viaticum.errors import DataError
from viaticum.money import NANOUSD_PER_USD
from viaticum.routers.query.outcome_matrix import OutcomeMatrix
from viaticum.types import Outcome, Pair

Array = np.ndarray[Any, Any]
ENOUGH = 0.9  # of the questions a pair must have answered to be drawn


@dataclass(frozen=True)
class SharedOutcomes:
    """Outcomes of the questions that all kept pairs were given.

    Attributes:
        rows: index [questions] of each question among the rows of the run, or of the table.
        pairs: the pairs that were given most of the questions.
        correct: 0 or 1, [questions, pairs].
        cost: nano-dollars, [questions, pairs].
        left_out: the other pairs.
    """

    rows: Array
    pairs: tuple[Pair, ...]
    correct: Array
    cost: Array
    left_out: tuple[str, ...]


def best_pair(outcomes: Iterable[Outcome]) -> Pair:
    """The pair that is right most often, of equals the cheapest, on questions all kept pairs were given."""
    known = complete_outcomes(OutcomeMatrix.from_outcomes(outcomes))
    accuracy, cost = known.correct.mean(0), known.cost.mean(0)
    return known.pairs[best_index(accuracy, cost)]


def complete_outcomes(matrix: OutcomeMatrix, rows: Array | None = None) -> SharedOutcomes:
    """The pairs that were given most of the questions, on the questions that all of those were given.

    Args:
        rows: index [questions] to keep for each question; by default its index in the matrix.

    Raises:
        DataError: no question was given to all of these pairs.
    """
    given = ~np.isnan(matrix.correct) & ~np.isnan(matrix.cost)
    enough = given.mean(0) >= ENOUGH * given.mean(0).max()
    whole = given[:, enough].all(1)
    if not whole.any():
        raise DataError("no question of the outcome table was given to all of its pairs; profile them alike")
    kept = np.flatnonzero(enough)
    left_out = tuple(str(pair) for pair, keep in zip(matrix.pairs, enough, strict=True) if not keep)
    rows = np.arange(len(matrix)) if rows is None else rows
    return SharedOutcomes(
        rows[whole],
        tuple(matrix.pairs[n] for n in kept),
        matrix.correct[whole][:, kept],
        matrix.cost[whole][:, kept] * NANOUSD_PER_USD,
        left_out,
    )


def cheapest_right(known: SharedOutcomes) -> Array:
    """What an oracle pays for each question, [questions]: the cheapest right pair, else the cheapest pair."""
    right = np.where(known.correct > 0, known.cost, np.inf).min(1)
    return np.asarray(np.where(np.isfinite(right), right, known.cost.min(1)))


def best_index(accuracy: Array, cost: Array) -> int:
    """Index of the most accurate pair, of equals the cheapest."""
    return int(np.lexsort((cost, -accuracy))[0])
