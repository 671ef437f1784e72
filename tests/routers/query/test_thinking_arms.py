"""Budgets of a thought as arms: which one is worth it changes with the price and the question."""

from __future__ import annotations

import numpy as np
import pytest
from synthetic_arms import ARMS, five_budgets
from synthetic_outcomes import Words, a_question

from viaticum.budgets.allocate import allocate
from viaticum.routers.query import StaticRouter, Weighted, choose
from viaticum.routers.query.fit import fit
from viaticum.routers.query.outcome_matrix import OutcomeMatrix
from viaticum.routers.query.parameters import RTRSettings
from viaticum.types import Query

pytestmark = pytest.mark.usefixtures("one_thread")


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
