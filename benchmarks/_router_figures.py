"""Figures of the routers benchmark: means over seeds, differences with intervals, gaps to the hull."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from _baselines import Curve, Results, Split, planned

from viaticum.routers.query.evaluate import BUDGETS, best_mixture, column_outcomes
from viaticum.routers.query.outcome_matrix import Array
from viaticum.routers.query.prediction import Prediction
from viaticum.routers.query.rtr import RTRRouter

BOOTSTRAP_SAMPLES = 1_000
SCALARS = (
    "cost_at_best_single_accuracy",
    "cost_at_99_percent_of_it",
    "ece",
    "token_coverage_p90",
    "largest_share",
    "oracle",
    "trust",
)


@dataclass(frozen=True)
class Evaluated:
    """The learned router on a split's test questions; correct and cost of all its columns [Q, M]."""

    router: RTRRouter
    prediction: Prediction
    correct: Array
    cost: Array

    @classmethod
    def on(cls, router: RTRRouter, split: Split) -> Evaluated:
        correct, cost, _ = column_outcomes(router, split.test)
        return cls(router, router.predict(torch.from_numpy(split.x_test)), correct, cost)

    def at(self, dollars: float) -> Results:
        """Results of the columns chosen for an expected mean cost."""
        chosen = self.router.choose_within(self.prediction, dollars).numpy()
        rows = np.arange(len(chosen))
        return self.correct[rows, chosen], self.cost[rows, chosen]

    def curve(self, budgets: Sequence[float] = BUDGETS) -> Curve:
        return [self.at(planned(budget)) for budget in budgets]


def paired(differences: Sequence[Array], numbers: Sequence[Array]) -> dict[str, float]:
    """The mean and its 95% interval, a percentile bootstrap; all seeds of a question are drawn together.

    differences, numbers: for each seed the differences [Q] and the numbers of the questions in the table [Q].
    """
    values = np.concatenate(differences)
    index = np.unique(np.concatenate(numbers), return_inverse=True)[1]
    sums, counts = np.bincount(index, values), np.bincount(index)
    drawn = np.random.default_rng(0).integers(0, len(sums), (BOOTSTRAP_SAMPLES, len(sums)))
    low, high = np.quantile(sums[drawn].sum(1) / counts[drawn].sum(1), (0.025, 0.975))
    return {"difference": float(values.mean()), "low": float(low), "high": float(high)}


def points(
    curves: Sequence[Curve], reference: Sequence[Curve] | None, splits: Sequence[Split]
) -> list[dict[str, Any]]:
    """For each budget the means over seeds, and the reference minus them; None where nothing is so cheap."""
    result: list[dict[str, Any]] = []
    for index, budget in enumerate(splits[0].budgets):
        results = [curve[index] for curve in curves]
        point: dict[str, Any] = {"budget": budget, "accuracy": None, "cost": None}
        known = [each for each in results if each is not None]
        if len(known) == len(results):
            point["accuracy"] = float(np.mean([correct.mean() for correct, _ in known]))
            point["cost"] = float(np.mean([cost.mean() for _, cost in known]))
            own = [curve[index] for curve in reference or ()]
            if own and all(each is not None for each in own):
                gaps = [mine[0] - other[0] for mine, other in zip(own, known, strict=True) if mine]
                point["ours_minus"] = paired(gaps, [split.numbers for split in splits])
        result.append(point)
    return result


def same_cost(
    singles: Sequence[tuple[Results, float]], own: Sequence[Evaluated], splits: Sequence[Split]
) -> dict[str, Any]:
    """A router with one operating point, and the learned router at the cost that was expected of it."""
    ours = [each.at(expected) for each, (_, expected) in zip(own, singles, strict=True)]
    gaps = [mine[0] - theirs[0] for mine, (theirs, _) in zip(ours, singles, strict=True)]
    return {
        "accuracy": float(np.mean([results[0].mean() for results, _ in singles])),
        "cost": float(np.mean([results[1].mean() for results, _ in singles])),
        "ours": float(np.mean([correct.mean() for correct, _ in ours])),
        "our_cost": float(np.mean([cost.mean() for _, cost in ours])),
        "ours_minus": paired(gaps, [split.numbers for split in splits]),
    }


def means(facts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds of the figures of `evaluate`; None where any seed has none."""
    result: dict[str, Any] = {
        name: None if any(each[name] is None for each in facts) else float(np.mean([e[name] for e in facts]))
        for name in SCALARS
    }
    best = [each["best_single"] for each in facts]
    result["best_single"] = {
        "pair": ", ".join(sorted({each["pair"] for each in best})),
        "accuracy": float(np.mean([each["accuracy"] for each in best])),
        "cost": float(np.mean([each["cost"] for each in best])),
    }
    return result


def beyond_hull(split: Split, results: Results | None) -> dict[str, Any] | None:
    """Accuracy, cost, and accuracy minus that of the hull of the test questions at that cost."""
    if results is None:
        return None
    correct, cost = results
    spent = float(cost.mean())
    return {
        "accuracy": float(correct.mean()),
        "cost": spent,
        "minus_hull_at_cost": minus_hull(split, results, spent),
    }


def minus_hull(split: Split, results: Results, budget: float) -> dict[str, float] | None:
    """Accuracy minus that of the hull of the test questions at the budget, whatever was spent."""
    shares = best_mixture(split.test.correct, split.test.cost, budget)
    return None if shares is None else paired([results[0] - split.test.correct @ shares], [split.numbers])
