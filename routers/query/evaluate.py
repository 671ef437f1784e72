"""Quality of a router on questions with known outcomes, beside every pair, their mixtures, and the oracle.

Operating points for a budget are chosen from predictions alone; actual cost and correctness are read
afterwards. A batch does more: it plans its rows block by block and lets real costs correct the plan; `paced`
shows that too. The hull is the non-decreasing convex hull of single pairs on the very questions evaluated,
the "zero router" of RouterBench (arXiv 2403.12031): nobody could have picked that mixture beforehand, so that
it is hard to beat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from viaticum.convex_hull import area_under_hull
from viaticum.errors import DataError, InputError
from viaticum.routers.query.calibration import calibration_error
from viaticum.routers.query.outcome_matrix import Array, OutcomeMatrix
from viaticum.routers.query.plans import IndexedPlan, simulate
from viaticum.routers.query.prediction import Prediction
from viaticum.routers.query.rtr import RTRRouter

BUDGETS = (0.0001, 0.0003, 0.001, 0.002, 0.004, 0.006, 0.012)  # mean dollars a question
MIDDLE_BUDGET = 0.002
MARGIN = 0.04  # share of a budget left unplanned: a mean of 1,500 questions varies by about as much
BOOTSTRAP_SAMPLES = 1_000
AREA_SAMPLES = 300
SWEEP = np.geomspace(0.3, 3000, 60)  # cost weights of `cost_to_reach`
# Expected accuracy, dollars, their deviation, real dollars, each [Q, M], and dollars for all questions -> the
# column of each question, -1 for none [Q].
Paced = Callable[[Array, Array, Array, Array, float], Array]


def evaluate(
    router: RTRRouter,
    matrix: OutcomeMatrix,
    *,
    budgets: Sequence[float] = BUDGETS,
    seed: int = 0,
    paced: Paced | None = None,
) -> dict[str, Any]:
    """Return what `viaticum router evaluate --json` prints; costs are mean dollars a question.

    Args:
        router: the router to evaluate.
        matrix: outcomes; questions that were not given to every pair are left out.
        budgets: mean dollars a question.
        seed: of the bootstrap; `curve_minus_hull` has 95% intervals, paired by question.
        paced: plans all questions as a batch does, for the points of `paced`
            (`viaticum.budgets.paced_run.paced_choices`).

    Raises:
        InputError: a budget is not above zero, or not finite.
        DataError: no question was given to every pair, or the questions' texts are left out.
    """
    check_budgets(budgets)
    matrix.check_texts()
    asked = len(matrix)
    matrix = matrix.select(simulated_rows(router, matrix))
    if not len(matrix):
        raise DataError(
            f"none of the {asked} questions was given to every pair of the router, so that its choices "
            "cannot be compared; profile the missing pairs"
        )
    prediction = router.predict_texts(matrix.texts)
    swept = [router.choose_columns(prediction, float(weight)).numpy() for weight in SWEEP]
    correct, cost, calls = column_outcomes(router, matrix)
    best, *ties = best_single_pairs(matrix)
    accuracy, dollars = float(matrix.correct[:, best].mean()), float(matrix.cost[:, best].mean())
    enough, nearly = (cost_to_reach(swept, correct, cost, share * accuracy) for share in (1, 0.99))
    middle_budget = MIDDLE_BUDGET if MIDDLE_BUDGET in budgets else sorted(budgets)[len(budgets) // 2]
    middle = router.choose_within(prediction, middle_budget * (1 - MARGIN)).numpy()
    return {
        "questions": len(matrix),
        "learned_from": int(prediction.seen.sum()),
        "best_single": {
            "pair": str(matrix.pairs[best]),
            "accuracy": accuracy,
            "cost": dollars,
            "ties": [str(matrix.pairs[each]) for each in ties],
        },
        "pairs": [
            {"pair": str(pair), "accuracy": float(right), "cost": float(spent)}
            for pair, right, spent in zip(
                matrix.pairs, matrix.correct.mean(0), matrix.cost.mean(0), strict=True
            )
        ],
        "cheapest": cheapest_pair(matrix, budgets),
        **_areas(swept, matrix, (correct, cost), dollars, seed),
        "paced": []
        if paced is None
        else [_paced_point(router, prediction, (correct, cost), budget, paced) for budget in budgets],
        **_curves(router, prediction, matrix, (correct, cost), budgets, seed),
        "cost_at_best_single_accuracy": _share(enough, dollars),
        "cost_at_99_percent_of_it": _share(nearly, dollars),
        "ece": calibration_error(
            prediction.accuracy[:, router.pair_columns], torch.from_numpy(matrix.correct).float()
        ),
        "token_coverage_p90": _token_coverage(prediction, matrix),
        "largest_share": _largest_share(router, matrix, middle, calls),
        "oracle": float(matrix.correct.max(1).mean()),
        "trust": float(prediction.trust.mean()),
    }


def check_budgets(budgets: Sequence[float]) -> None:
    """Raise `InputError` for mean dollars a question that are not above zero, or not finite, or for none."""
    wrong = [budget for budget in budgets if not 0 < budget < float("inf")]
    if wrong or not budgets:
        raise InputError(f"a budget is above zero dollars a question, and finite; got {wrong or 'none'}")


def _share(cost: float | None, of: float) -> float | None:
    """A cost in relation to another one; None where there is none, or the other one is nothing."""
    if cost is None or (of == 0 and cost > 0):
        return None
    return cost / of if of else 1.0


def best_single_pairs(matrix: OutcomeMatrix) -> list[int]:
    """The columns of the highest accuracy, the cheapest first. Needs every outcome."""
    right = matrix.correct.sum(0)
    return sorted(
        np.flatnonzero(right == right.max()).tolist(), key=lambda column: matrix.cost[:, column].mean()
    )


def cheapest_pair(matrix: OutcomeMatrix, budgets: Sequence[float]) -> dict[str, Any]:
    """The cheapest pair, and the budgets at which even this pair alone spends more than there is."""
    dollars = matrix.cost.mean(0)
    pair = int(dollars.argmin())
    return {
        "pair": str(matrix.pairs[pair]),
        "cost": float(dollars[pair]),
        "budgets_below": [budget for budget in budgets if budget < dollars[pair]],
    }


def _paced_point(
    router: RTRRouter, prediction: Prediction, outcomes: tuple[Array, Array], budget: float, paced: Paced
) -> dict[str, float]:
    """Accuracy, dollars and skipped questions of a batch with this budget; a skipped one counts as wrong."""
    correct, cost = outcomes
    expected = np.asarray(prediction.cost.double())
    chosen = paced(
        np.asarray(prediction.accuracy.double()),
        expected,
        np.asarray(router.cost_deviation(prediction).double()),
        cost,
        budget * len(cost),
    )
    rows, asked = np.arange(len(chosen)), chosen >= 0
    right, spent = (np.where(asked, each[rows, np.maximum(chosen, 0)], 0.0) for each in (correct, cost))
    return _point(budget, right, spent) | {"skipped": float(1 - asked.mean())}


def column_outcomes(router: RTRRouter, matrix: OutcomeMatrix) -> tuple[Array, Array, Array]:
    """Actual results of each column of the router: correct, dollars and calls, each [Q, M]."""
    known = matrix.with_verdicts()
    results = [simulate(plan, *known) for plan in indexed_plans(router, matrix)]
    correct, cost, calls = (np.stack(each, 1) for each in zip(*results, strict=True))
    return correct, cost, calls


def indexed_plans(router: RTRRouter, matrix: OutcomeMatrix) -> list[IndexedPlan]:
    """The router's plans by the columns of the matrix, and of its verdicts.

    Raises `DataError` where a plan has a check that the matrix has no verdicts of.
    """
    numbers = {pair: number for number, pair in enumerate(matrix.pairs)}
    checks = () if matrix.verdicts is None else matrix.verdicts.columns
    of_check = {column: number for number, column in enumerate(checks, len(matrix.pairs))}
    plans: list[IndexedPlan] = []
    for plan in router.plans:
        first = numbers[plan.pairs[0]]
        try:
            found = (of_check[first, pair.model] if pair.is_check else numbers[pair] for pair in plan.pairs)
            plans.append((tuple(found), plan.need))
        except KeyError as error:
            raise DataError(
                f"the router has the plan {plan}, and the table no verdicts for it ({error}); give a table "
                "that was profiled with --verifier, or fit without plans"
            ) from None
    return plans


def simulated_rows(router: RTRRouter, matrix: OutcomeMatrix) -> Array:
    """Mask of the questions that all plans of the router can be followed on, at known cost [Q]."""
    rows = matrix.complete
    for order, _ in indexed_plans(router, matrix):
        for column in order:
            if column >= len(matrix.pairs):
                rows = rows & matrix.verdict_priced(column)
    return rows


def best_mixture(correct: Array, cost: Array, budget: float) -> Array | None:
    """Shares of the columns [P] in the most accurate mixture within a mean cost; None: none is so cheap.

    correct, cost: [Q, P]. A linear program.
    """
    from scipy.optimize import linprog

    accuracy, dollars = correct.mean(0), cost.mean(0)
    solution = linprog(
        -accuracy, A_ub=[dollars], b_ub=[budget], A_eq=[np.ones(len(accuracy))], b_eq=[1], bounds=(0, 1)
    )
    return np.asarray(solution.x) if solution.status == 0 else None


def cost_to_reach(swept: Sequence[Array], correct: Array, cost: Array, accuracy: float) -> float | None:
    """The lowest mean cost among operating points that reach an accuracy; None where none does.

    The points are the cost weights of `SWEEP`, fixed beforehand; which of them counts is chosen by the
    outcomes, as for every such figure in the literature.

    swept: the columns chosen at each cost weight, each [Q].
    """
    rows, reached = np.arange(len(correct)), []
    for chosen in swept:
        if correct[rows, chosen].mean() >= accuracy:
            reached.append(float(cost[rows, chosen].mean()))
    return min(reached) if reached else None


def _areas(
    swept: Sequence[Array], matrix: OutcomeMatrix, outcomes: tuple[Array, Array], best: float, seed: int
) -> dict[str, Any]:
    """Operating points, and the area under their hull over log cost beside that of single pairs.

    From the cheapest pair to the most accurate one, with a paired 95% interval over questions. Both hulls are
    those of the questions evaluated, in hindsight.

    Args:
        swept: the columns chosen at each cost weight, each [Q].
        outcomes: correct and cost of all columns [Q, M].
        best: mean dollars of the most accurate pair.
    """
    rows, count = np.arange(len(matrix)), len(matrix)
    right, spent = (np.stack([each[rows, chosen] for chosen in swept], 1) for each in outcomes)
    low = float(matrix.cost.mean(0).min())

    def areas(weights: Array) -> tuple[float, float]:
        sides = (right, spent), (matrix.correct, matrix.cost)
        ours, theirs = (area_under_hull(weights @ a, weights @ c, low, best) for a, c in sides)
        return ours, theirs

    ours, theirs = areas(np.full(count, 1 / count))
    rng = np.random.default_rng(seed)
    draws = [np.bincount(rng.integers(0, count, count), minlength=count) / count for _ in range(AREA_SAMPLES)]
    gaps = [each[0] - each[1] for each in map(areas, draws)]
    interval = np.quantile(gaps, (0.025, 0.975))
    return {
        "sweep": [
            {"accuracy": float(a), "cost": float(c)}
            for a, c in zip(right.mean(0), spent.mean(0), strict=True)
        ],
        "area": {
            "from": low,
            "to": best,
            "router": ours,
            "pairs": theirs,
            "difference": ours - theirs,
            "low": float(interval[0]),
            "high": float(interval[1]),
        },
    }


def paired_bootstrap(
    differences: Array, *, samples: int = BOOTSTRAP_SAMPLES, seed: int = 0
) -> dict[str, float]:
    """The mean difference and its 95% interval, a percentile bootstrap over questions; differences: [Q]."""
    rng = np.random.default_rng(seed)
    means = differences[rng.integers(0, len(differences), (samples, len(differences)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return {"difference": float(differences.mean()), "low": float(low), "high": float(high)}


def _curves(
    router: RTRRouter,
    prediction: Prediction,
    matrix: OutcomeMatrix,
    outcomes: tuple[Array, Array],
    budgets: Sequence[float],
    seed: int,
) -> dict[str, list[dict[str, Any]]]:
    """Router, hull and their difference by budget; outcomes: correct and cost of all columns [Q, M]."""
    correct, cost = outcomes
    rows = np.arange(len(matrix))
    curve: list[dict[str, Any]] = []
    hull: list[dict[str, Any]] = []
    gaps: list[dict[str, Any]] = []
    for budget in budgets:
        chosen = router.choose_within(prediction, budget * (1 - MARGIN)).numpy()
        routed = correct[rows, chosen]
        curve.append(_point(budget, routed, cost[rows, chosen]))
        shares = best_mixture(matrix.correct, matrix.cost, budget)
        if shares is None:
            hull.append({"budget": budget, "accuracy": None, "cost": None})
            gaps.append({"budget": budget, "difference": None, "low": None, "high": None})
            continue
        mixed = matrix.correct @ shares
        hull.append(_point(budget, mixed, matrix.cost @ shares))
        gaps.append({"budget": budget} | paired_bootstrap(routed - mixed, seed=seed))
    return {"curve": curve, "hull": hull, "curve_minus_hull": gaps}


def _point(budget: float, correct: Array, cost: Array) -> dict[str, float]:
    return {"budget": budget, "accuracy": float(correct.mean()), "cost": float(cost.mean())}


def _token_coverage(prediction: Prediction, matrix: OutcomeMatrix) -> float | None:
    """The share of answers no longer than their predicted 90% quantile; None for a table without tokens."""
    known = matrix.tokens > 0
    if not known.any():
        return None
    return float((matrix.tokens <= prediction.tokens[..., 1].numpy() + 0.5)[known].mean())


def _largest_share(router: RTRRouter, matrix: OutcomeMatrix, chosen: Array, calls: Array) -> float:
    """The share of the calls that goes to the most called pair."""
    counts = np.zeros(matrix.with_verdicts()[0].shape[1])
    plans = indexed_plans(router, matrix)
    for row, column in enumerate(chosen):
        for pair in plans[column][0][: calls[row, column]]:
            counts[pair] += 1
    return float(counts.max() / counts.sum())
