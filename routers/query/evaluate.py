"""How good a router is on questions with known outcomes, against every pair, their mixtures, and the oracle.

The operating point for a budget is chosen from predictions alone; true cost and correctness are only looked at
afterwards. The hull is the non-decreasing convex hull of single pairs on the very questions asked, the "zero router"
of RouterBench (arXiv 2403.12031): a mixture that nobody could have picked beforehand, so that it is hard to beat.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from viaticum.routers.query.fit import calibration_error
from viaticum.routers.query.outcome_matrix import Array, OutcomeMatrix
from viaticum.routers.query.plans import Steps, simulate
from viaticum.routers.query.rtr import Prediction, RTRRouter

BUDGETS = (0.0001, 0.0003, 0.001, 0.002, 0.004, 0.006, 0.012)  # mean dollars a question
MIDDLE = 0.002
MARGIN = 0.04  # of a budget is not planned with: a mean of 1,500 questions strays by about as much
DRAWS = 1_000


def evaluate(
    router: RTRRouter, grid: OutcomeMatrix, *, budgets: Sequence[float] = BUDGETS, seed: int = 0
) -> dict[str, Any]:
    """One object with what `viaticum router evaluate --json` prints; every question must have been given to every pair.

    Costs are mean dollars a question. curve_minus_hull has 95% intervals of a paired bootstrap over questions.
    """
    grid = grid.select(grid.complete)
    told = router.predict_texts(grid.texts)
    right, cost, calls = outcomes(router, grid)
    best = int(grid.correct.mean(0).argmax())
    accuracy, dollars = float(grid.correct[:, best].mean()), float(grid.cost[:, best].mean())
    curve: list[dict[str, Any]] = []
    hull: list[dict[str, Any]] = []
    gaps: list[dict[str, Any]] = []
    rows = np.arange(len(grid))
    for budget in budgets:
        chosen = router.choose_within(told, budget * (1 - MARGIN)).numpy()
        ours = right[rows, chosen]
        curve.append(_point(budget, ours, cost[rows, chosen]))
        shares = mixture(grid.correct, grid.cost, budget)
        if shares is None:
            hull.append({"budget": budget, "accuracy": None, "cost": None})
            gaps.append({"budget": budget, "difference": None, "low": None, "high": None})
            continue
        theirs = grid.correct @ shares
        hull.append(_point(budget, theirs, grid.cost @ shares))
        gaps.append({"budget": budget} | _paired(ours - theirs, seed))
    enough, nearly = (cost_to_reach(router, told, right, cost, share * accuracy) for share in (1, 0.99))
    half = MIDDLE if MIDDLE in budgets else sorted(budgets)[len(budgets) // 2]
    middle = router.choose_within(told, half * (1 - MARGIN)).numpy()
    known = grid.tokens > 0
    return {
        "questions": len(grid),
        "best_single": {"pair": str(grid.pairs[best]), "accuracy": accuracy, "cost": dollars},
        "curve": curve,
        "hull": hull,
        "curve_minus_hull": gaps,
        "cost_at_best_single_accuracy": None if enough is None else enough / dollars,
        "cost_at_99_percent_of_it": None if nearly is None else nearly / dollars,
        "ece": calibration_error(
            told.accuracy[:, router.pair_columns], torch.from_numpy(grid.correct).float()
        ),
        "token_coverage_p90": float((grid.tokens <= told.tokens[..., 1].numpy() + 0.5)[known].mean()),
        "largest_share": _largest_share(router, grid, middle, calls),
        "oracle": float(grid.correct.max(1).mean()),
        "trust": float(told.trust.mean()),
    }


def outcomes(router: RTRRouter, grid: OutcomeMatrix) -> tuple[Array, Array, Array]:
    """What each column of the router did on these questions: right or not, dollars, calls, each [Q, M]."""
    played = [simulate(steps, grid.correct, grid.cost, grid.answers) for steps in steps_of(router, grid)]
    right, cost, calls = (np.stack(each, 1) for each in zip(*played, strict=True))
    return right, cost, calls


def steps_of(router: RTRRouter, grid: OutcomeMatrix) -> list[Steps]:
    numbers = {pair: number for number, pair in enumerate(grid.pairs)}
    return [(tuple(numbers[pair] for pair in plan.pairs), plan.need) for plan in router.plans]


def mixture(correct: Array, cost: Array, budget: float) -> Array | None:
    """Shares of the columns [P] whose mixture is right most often at a mean cost of at most `budget`; None: none is so cheap."""
    from scipy.optimize import linprog

    accuracy, dollars = correct.mean(0), cost.mean(0)
    found = linprog(
        -accuracy, A_ub=[dollars], b_ub=[budget], A_eq=[np.ones(len(accuracy))], b_eq=[1], bounds=(0, 1)
    )
    return np.asarray(found.x) if found.status == 0 else None


def cost_to_reach(
    router: RTRRouter, told: Prediction, right: Array, cost: Array, accuracy: float
) -> float | None:
    """The least mean cost among operating points that reach an accuracy; None where none does.

    The points are fixed beforehand, each a worth of a dollar; which of them is read off is chosen by the outcomes, as
    it is for every such figure in the literature.
    """
    rows, reached = np.arange(len(right)), []
    for worth in np.geomspace(0.3, 3000, 60):
        chosen = router.choose_columns(told, float(worth)).numpy()
        if right[rows, chosen].mean() >= accuracy:
            reached.append(float(cost[rows, chosen].mean()))
    return min(reached) if reached else None


def _point(budget: float, right: Array, cost: Array) -> dict[str, float]:
    return {"budget": budget, "accuracy": float(right.mean()), "cost": float(cost.mean())}


def _paired(difference: Array, seed: int) -> dict[str, float]:
    """The mean and its 95% interval by a percentile bootstrap over questions."""
    dice = np.random.default_rng(seed)
    means = difference[dice.integers(0, len(difference), (DRAWS, len(difference)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return {"difference": float(difference.mean()), "low": float(low), "high": float(high)}


def _largest_share(router: RTRRouter, grid: OutcomeMatrix, chosen: Array, calls: Array) -> float:
    """The share of calls that goes to the pair that gets most of them."""
    asked = np.zeros(len(grid.pairs))
    plans = steps_of(router, grid)
    for row, column in enumerate(chosen):
        for pair in plans[column][0][: calls[row, column]]:
            asked[pair] += 1
    return float(asked.max() / asked.sum())
