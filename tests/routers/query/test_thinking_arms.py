"""Budgets of a thought as arms: which one is worth it changes with the price and the question."""

from __future__ import annotations

import numpy as np
import pytest
from synthetic_outcomes import Words, a_question

from viaticum.budgets.allocate import allocate
from viaticum.routers.query import StaticRouter, Weighted, choose
from viaticum.routers.query.fit import fit
from viaticum.routers.query.outcome_matrix import OutcomeMatrix
from viaticum.routers.query.parameters import RTRSettings
from viaticum.types import Outcome, Query

pytestmark = pytest.mark.usefixtures("one_thread")
ARMS = {"think:0": 20, "think:512": 400, "think:2k": 1500, "think:8k": 6000, "think:32k": 24_000}
RIGHT = {
    "sums": (0.90, 0.92, 0.93, 0.93, 0.93),
    "games": (0.30, 0.70, 0.85, 0.87, 0.88),
    "kin": (0.05, 0.15, 0.40, 0.75, 0.92),
}


def five_budgets(count: int, seed: int = 0) -> list[Outcome]:
    """Sums need no thought, kin questions a long one; a dollar a million tokens."""
    rng, rows = np.random.default_rng(seed), []
    for number in range(count):
        kind = ("sums", "kin", "games")[number % 3]
        text = a_question(kind, rng)
        for (arm, usual), right in zip(ARMS.items(), RIGHT[kind], strict=True):
            tokens = round(usual * float(np.exp(0.3 * rng.standard_normal())))
            rows.append(
                Outcome(
                    kind,
                    str(number),
                    text,
                    "m",
                    arm,
                    None,
                    bool(rng.random() < right),
                    10,
                    tokens,
                    1000 * tokens,
                )
            )
    return rows


def test_the_best_budget_shrinks_as_the_price_of_a_token_rises() -> None:
    table = StaticRouter.fit(five_budgets(600)).rows
    picks = [choose(table, None, Weighted(weight)).pair.strategy for weight in (0, 8, 60, 400, 50_000)]
    lengths = [list(ARMS).index(pick) for pick in picks]
    assert lengths == sorted(lengths, reverse=True)
    assert (picks[0], picks[-1]) == ("think:32k", "think:0")
    assert len(set(picks)) >= 4


def test_the_allowance_of_a_batch_buys_longer_thoughts_for_harder_questions() -> None:
    matrix = OutcomeMatrix.from_outcomes(five_budgets(360))
    router = fit(matrix, Words(), settings=RTRSettings(plans=False))  # type: ignore[arg-type]
    rng = np.random.default_rng(7)
    kinds = np.array(["sums", "kin", "games"] * 40)
    tables = [router.table(Query(a_question(kind, rng))) for kind in kinds]
    worth = np.array([[row.accuracy for row in table] for table in tables])
    cost = np.array([[float(row.expected_cost) for row in table] for table in tables])
    chosen = allocate(worth, cost, budget=3_000_000.0 * len(kinds)).chosen
    spent = cost[np.arange(len(kinds)), chosen]
    means = {kind: spent[kinds == kind].mean() for kind in ("sums", "games", "kin")}
    assert means["kin"] > 2 * means["games"] > 2 * means["sums"]
