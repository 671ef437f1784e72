"""What the routers of a benchmark came to: means over seeds, differences with intervals, gaps to the hull."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from _baselines import Curve, Played, Split, planned

from viaticum.routers.query.evaluate import BUDGETS, mixture, outcomes
from viaticum.routers.query.outcome_matrix import Array
from viaticum.routers.query.rtr import Prediction, RTRRouter

DRAWS = 1_000
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
class Ours:
    """The learned router on a split's test questions; right and cost of all its columns [Q, M]."""

    router: RTRRouter
    told: Prediction
    right: Array
    cost: Array

    @classmethod
    def on(cls, router: RTRRouter, split: Split) -> Ours:
        right, cost, _ = outcomes(router, split.test)
        return cls(router, router.predict(torch.from_numpy(split.asked)), right, cost)

    def at(self, dollars: float) -> Played:
        chosen = self.router.choose_within(self.told, dollars).numpy()
        rows = np.arange(len(chosen))
        return self.right[rows, chosen], self.cost[rows, chosen]

    def curve(self) -> Curve:
        return [self.at(planned(budget)) for budget in BUDGETS]


def paired(differences: Sequence[Array], numbers: Sequence[Array]) -> dict[str, float]:
    """The mean and its 95% interval: a percentile bootstrap over questions, with all that the seeds say of each."""
    values = np.concatenate(differences)
    place = np.unique(np.concatenate(numbers), return_inverse=True)[1]
    sums, counts = np.bincount(place, values), np.bincount(place)
    drawn = np.random.default_rng(0).integers(0, len(sums), (DRAWS, len(sums)))
    low, high = np.quantile(sums[drawn].sum(1) / counts[drawn].sum(1), (0.025, 0.975))
    return {"difference": float(values.mean()), "low": float(low), "high": float(high)}


def points(
    curves: Sequence[Curve], ours: Sequence[Curve] | None, splits: Sequence[Split]
) -> list[dict[str, Any]]:
    """For each budget the means over seeds, and ours minus it; None where a seed has nothing so cheap."""
    found: list[dict[str, Any]] = []
    for place, budget in enumerate(BUDGETS):
        played = [curve[place] for curve in curves]
        point: dict[str, Any] = {"budget": budget, "accuracy": None, "cost": None}
        theirs = [each for each in played if each is not None]
        if len(theirs) == len(played):
            point["accuracy"] = float(np.mean([right.mean() for right, _ in theirs]))
            point["cost"] = float(np.mean([cost.mean() for _, cost in theirs]))
            own = [curve[place] for curve in ours or ()]
            if own and all(each is not None for each in own):
                gaps = [mine[0] - other[0] for mine, other in zip(own, theirs, strict=True) if mine]
                point["ours_minus"] = paired(gaps, [split.numbers for split in splits])
        found.append(point)
    return found


def same_cost(
    singles: Sequence[tuple[Played, float]], own: Sequence[Ours], splits: Sequence[Split]
) -> dict[str, Any]:
    """A router with one operating point, and ours told to cost what that was expected to."""
    ours = [each.at(expected) for each, (_, expected) in zip(own, singles, strict=True)]
    gaps = [mine[0] - theirs[0] for mine, (theirs, _) in zip(ours, singles, strict=True)]
    return {
        "accuracy": float(np.mean([played[0].mean() for played, _ in singles])),
        "cost": float(np.mean([played[1].mean() for played, _ in singles])),
        "ours": float(np.mean([right.mean() for right, _ in ours])),
        "our_cost": float(np.mean([cost.mean() for _, cost in ours])),
        "ours_minus": paired(gaps, [split.numbers for split in splits]),
    }


def means(facts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the figures of `evaluate` over seeds; None where any seed has none."""
    found: dict[str, Any] = {
        name: None if any(each[name] is None for each in facts) else float(np.mean([e[name] for e in facts]))
        for name in SCALARS
    }
    best = [each["best_single"] for each in facts]
    found["best_single"] = {
        "pair": ", ".join(sorted({each["pair"] for each in best})),
        "accuracy": float(np.mean([each["accuracy"] for each in best])),
        "cost": float(np.mean([each["cost"] for each in best])),
    }
    return found


def beyond_hull(split: Split, played: Played | None) -> dict[str, Any] | None:
    """Accuracy, cost, and accuracy less that of the hull of the test questions at that very cost."""
    if played is None:
        return None
    right, cost = played
    spent = float(cost.mean())
    shares = mixture(split.test.correct, split.test.cost, spent)
    gap = None if shares is None else paired([right - split.test.correct @ shares], [split.numbers])
    return {"accuracy": float(right.mean()), "cost": spent, "minus_hull_at_cost": gap}


def minus_hull(split: Split, played: Played, budget: float) -> dict[str, float] | None:
    """Accuracy less that of the hull of the test questions at the budget, whatever was spent."""
    shares = mixture(split.test.correct, split.test.cost, budget)
    return None if shares is None else paired([played[0] - split.test.correct @ shares], [split.numbers])
