"""Routers to compare with, each on one split of an outcome table: random, static, nearest neighbours, logistic, cascade.

Each gets what the learned router gets: the training outcomes, the same embeddings and the same margin under a budget.
Where one has a knob (the worth of a dollar, k, a penalty), the knob is set on a part of the training questions that
the predictions were not made from, by their outcomes; between two worths a budget is met by a mixture. Held-out outcomes are read only to say what a choice came to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from viaticum.routers.query.evaluate import BUDGETS, MARGIN, mixture
from viaticum.routers.query.outcome_matrix import Array, OutcomeMatrix
from viaticum.routers.query.plans import Steps, simulate

WORTHS = np.geomspace(0.1, 1e5, 120).tolist()  # accuracy that a dollar is worth
NEIGHBOURS = (5, 10, 25, 50, 100, 200, 400, 800)
PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # scikit-learn's C
Played = tuple[Array, Array]  # right or not [Q] (or the chance of it), dollars [Q]
Curve = list[Played | None]  # for each budget; None: nothing is so cheap
Predict = Callable[
    [Array], tuple[Array, Array]
]  # embeddings [N, D] -> chances [N, P], what a choice is charged [N, P]


@dataclass(frozen=True)
class Split:
    """train, test: with embeddings x and asked; inner: which training questions knobs are set on [bool]; numbers: of
    the test questions in the whole table, so that seeds can be told to share one."""

    train: OutcomeMatrix
    test: OutcomeMatrix
    x: Array
    asked: Array
    inner: Array
    numbers: Array
    seed: int


def planned(budget: float) -> float:
    """What is planned with under a budget, for every router alike."""
    return budget * (1 - MARGIN)


def pick(chances: Array, charge: Array, worth: float) -> Array:
    """For each question the pair with the greatest chance less `worth` times its charge [N]."""
    return np.asarray((chances - worth * charge).argmax(1))


def take(grid: OutcomeMatrix, chosen: Array) -> Played:
    rows = np.arange(len(grid))
    return grid.correct[rows, chosen], grid.cost[rows, chosen]


def operating_points(
    chances: Array, charge: Array, grid: OutcomeMatrix, worths: Sequence[float]
) -> list[tuple[Array, float] | None]:
    """For each budget shares of the worths [W], at most two above 0, whose mixture is right most often on these
    questions at a real mean cost within it; and how often that is."""
    played = [take(grid, pick(chances, charge, worth)) for worth in worths]
    right, cost = (np.stack(each, 1) for each in zip(*played, strict=True))
    shares = [mixture(right, cost, planned(budget)) for budget in BUDGETS]
    return [None if each is None else (each, float(right.mean(0) @ each)) for each in shares]


def curve(
    predict: Predict, split: Split, chosen: Sequence[tuple[Array, float] | None], worths: Sequence[float]
) -> Curve:
    """What those mixtures come to on the test questions."""
    chances, charge = predict(split.asked)
    played = [take(split.test, pick(chances, charge, worth)) for worth in worths]
    right, cost = (np.stack(each, 1) for each in zip(*played, strict=True))
    return [None if point is None else (right @ point[0], cost @ point[0]) for point in chosen]


def tuned(
    make: Callable[[Array, OutcomeMatrix, float], Predict], knobs: Sequence[float], split: Split
) -> tuple[Curve, float]:
    """Set the knob and the worths of a dollar on the inner questions, fit again on all training questions."""
    inner = split.inner
    fitted, asked = split.train.select(~inner), split.train.select(inner)
    tried = {}
    for knob in knobs:
        points = operating_points(*make(split.x[~inner], fitted, knob)(split.x[inner]), asked, WORTHS)
        tried[knob] = (np.mean([point[1] if point else 0.0 for point in points]), points)
    knob = max(knobs, key=lambda knob: tried[knob][0])
    return curve(make(split.x, split.train, knob), split, tried[knob][1], WORTHS), knob


def neighbours(x: Array, grid: OutcomeMatrix, k: float) -> Predict:
    """Plain means of the k nearest training questions."""
    known = torch.from_numpy(x)
    right, cost = torch.from_numpy(grid.correct), torch.from_numpy(grid.cost)

    def predict(asked: Array) -> tuple[Array, Array]:
        near = (torch.from_numpy(asked) @ known.T).topk(min(int(k), len(known))).indices
        return right[near].mean(1).numpy(), cost[near].mean(1).numpy()

    return predict


def logistic(x: Array, grid: OutcomeMatrix, penalty: float) -> Predict:
    """One logistic regression a pair for its chance, one ridge regression a pair for its dollars."""
    from sklearn.linear_model import LogisticRegression, Ridge

    def one(right: Array) -> Callable[[Array], Array]:
        if right.min() == right.max():
            return lambda asked: np.full(len(asked), right[0])
        model = LogisticRegression(C=penalty, max_iter=300).fit(x, right)
        return lambda asked: np.asarray(model.predict_proba(asked)[:, 1])

    chances = [one(right) for right in grid.correct.T]
    dollars = Ridge(1.0).fit(x, grid.cost)
    least = grid.cost.min(0)

    def predict(asked: Array) -> tuple[Array, Array]:
        return np.stack([each(asked) for each in chances], 1), np.maximum(dollars.predict(asked), least)

    return predict


def random_pairs(split: Split) -> Curve:
    """Any of the cheapest pairs, as many as the budget allows on average by their training cost."""
    order = np.argsort(split.train.cost.mean(0), kind="stable")
    means = np.cumsum(split.train.cost.mean(0)[order]) / np.arange(1, len(order) + 1)
    found: Curve = []
    for budget in BUDGETS:
        among = order[: int((means <= planned(budget)).sum())]
        found.append(
            (split.test.correct[:, among].mean(1), split.test.cost[:, among].mean(1)) if len(among) else None
        )
    return found


def static_hull(split: Split) -> Curve:
    """The mixture of pairs that was best on the training outcomes, asked without looking at the question."""
    shares = [mixture(split.train.correct, split.train.cost, planned(budget)) for budget in BUDGETS]
    return [None if each is None else (split.test.correct @ each, split.test.cost @ each) for each in shares]


def oracle(split: Split) -> Curve:
    """Knows which pairs are right and what they cost; single pairs, no margin. Nobody can have it."""
    correct, cost = split.test.correct, split.test.cost
    cheapest, gain = cost.argmin(1), np.where(correct > 0, cost, np.inf)
    rows = np.arange(len(cost))
    least = cost[rows, cheapest]
    extra = gain.min(1) - least  # dollars that being right costs beyond the cheapest answer
    order = np.argsort(extra, kind="stable")
    spent = (least.sum() + np.cumsum(np.where(np.isfinite(extra), extra, 0.0)[order])) / len(cost)
    found: Curve = []
    for budget in BUDGETS:
        if least.mean() > budget:
            found.append(None)
            continue
        right = np.zeros(len(cost))
        right[order[: int((spent <= budget).sum())]] = 1.0
        right *= np.isfinite(extra)
        found.append((right, least + np.where(right > 0, np.where(np.isfinite(extra), extra, 0.0), 0.0)))
    return found


def cascade(split: Split, steps: Steps) -> tuple[Played, float]:
    """A fixed plan on the test questions, and what it cost on the training questions."""
    test, train = split.test, split.train
    right, cost, _ = simulate(steps, test.correct, test.cost, test.answers)
    return (right, cost), float(simulate(steps, train.correct, train.cost, train.answers)[1].mean())


def fixed(played: Played, expected: float) -> Curve:
    """A router with one operating point: what it does wherever a budget covers what it is expected to cost."""
    return [played if expected <= planned(budget) else None for budget in BUDGETS]
