"""A paced job on known costs: the budget is kept, and wrong expectations are corrected on the way."""

from __future__ import annotations

import numpy as np
import pytest

from viaticum.budgets.paced_run import paced_choices

ROWS = 400
RIGHT = np.array([0.6, 0.9])
DOLLARS = np.array([0.001, 0.010])


def run(actual_over_expected: float, budget_a_row: float) -> tuple[float, np.ndarray]:
    """Mean dollars really spent, and the choices; costs vary by half."""
    rng = np.random.default_rng(0)
    cost = np.tile(DOLLARS, (ROWS, 1))
    actual = cost * actual_over_expected * rng.uniform(0.5, 1.5, (ROWS, 2))
    chosen = paced_choices(np.tile(RIGHT, (ROWS, 1)), cost, 0.3 * cost, actual, budget_a_row * ROWS)
    spent = np.where(chosen < 0, 0.0, actual[np.arange(ROWS), np.maximum(chosen, 0)])
    return float(spent.mean()), chosen


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
def test_the_budget_is_used_and_kept_whatever_the_expectations_were(ratio: float) -> None:
    spent, chosen = run(ratio, 0.005)
    assert 0.93 * 0.005 < spent <= 0.005
    assert set(chosen.tolist()) == {0, 1}


def test_answers_that_cost_less_than_expected_leave_money_for_better_ones() -> None:
    shares = [float((run(ratio, 0.005)[1] == 1).mean()) for ratio in (0.5, 1.0, 2.0)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] - shares[2] > 0.3


def test_too_little_money_skips_rows() -> None:
    spent, chosen = run(1.0, 0.0004)
    assert spent <= 0.0004
    assert 0.5 < float((chosen < 0).mean()) < 0.75
