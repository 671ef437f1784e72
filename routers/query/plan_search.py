"""The plans of a router: searched for on its outcome table, and by how much they look better than they are.

The best of thousands of plans on a hundred questions is in part the luckiest. How much is learned by
searching without a fifth of the questions: what the best plan gains over the best single pair there, and what
is left of the gain on that fifth. Simulation and search are in `viaticum.routers.query.plans`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from viaticum.routers.query.heads import NEIGHBOURS, NeighboursHead, log_odds
from viaticum.routers.query.outcome_matrix import MIN_QUESTIONS, Array, OutcomeMatrix
from viaticum.routers.query.plans import COST_WEIGHTS, IndexedPlan, search, simulate

MAX_CLUSTERS = 8  # clusters of questions with alike outcomes
ENOUGH_QUESTIONS = 1_000  # from which the best plan is hardly a matter of luck
MIN_FOLD = 20  # questions that are left for a search


def search_plans(matrix: OutcomeMatrix, embeddings: Tensor, seed: int) -> list[IndexedPlan]:
    """Plans of several pairs that are among the best for some kind of question and value of a dollar.

    None where too few questions were given to every pair. embeddings: [Q, D].
    """
    complete = matrix.complete
    if complete.sum() < MIN_QUESTIONS or len(matrix.pairs) < 2:
        return []
    return _search(matrix.select(complete), embeddings[torch.from_numpy(complete)], seed)


def _search(known: OutcomeMatrix, embeddings: Tensor, seed: int) -> list[IndexedPlan]:
    from sklearn.cluster import KMeans

    head = NeighboursHead(embeddings, torch.from_numpy(known.correct).float())
    logits = log_odds(head.mean(*head.nearest(head.embeddings, NEIGHBOURS // 2))).numpy()
    count = min(MAX_CLUSTERS, max(1, len(known) // 50))
    clusters = KMeans(count, n_init=3, random_state=seed).fit_predict(logits)
    plans = search(known.correct, known.cost, known.answers, clusters)
    return [plan for plan in plans if len(plan[0]) > 1]


def plan_optimism(matrix: OutcomeMatrix, embeddings: Tensor, folds: Tensor, seed: int) -> float:
    """By how much the accuracy of plans found on this table is too high, beyond that of the best pairs.

    The mean over folds and values of a dollar; 0 on a table with many questions, where it is not measured.

    Args:
        matrix: the outcome table.
        embeddings: of its questions [Q, D].
        folds: of its questions [Q].
        seed: of the search.
    """
    complete = matrix.complete
    if not MIN_QUESTIONS <= complete.sum() <= ENOUGH_QUESTIONS:
        return 0.0
    known, rows = matrix.select(complete), torch.from_numpy(complete)
    embeddings, folds = embeddings[rows], folds[rows]
    excess: list[float] = []
    for fold in np.unique(folds.numpy()).tolist():
        inside = (folds != fold).numpy()
        if inside.sum() < MIN_FOLD or inside.all():
            continue
        plans = _search(known.select(inside), embeddings[torch.from_numpy(inside)], seed)
        if plans:
            excess += _excess(known, inside, plans)
    return max(0.0, float(np.mean(excess))) if excess else 0.0


def _excess(known: OutcomeMatrix, inside: Array, plans: list[IndexedPlan]) -> list[float]:
    """What the gain of the best plan over the best pair inside loses outside, by value of a dollar."""
    results = [simulate(plan, known.correct, known.cost, known.answers)[:2] for plan in plans]
    of_plans = [np.stack(each, 1) for each in zip(*results, strict=True)]
    found = []
    for weight in COST_WEIGHTS:
        gains = []
        for rows in (inside, ~inside):
            pairs, planned = (
                correct[rows].mean(0) - weight * cost[rows].mean(0)
                for correct, cost in ((known.correct, known.cost), of_plans)
            )
            if rows is inside:
                pair, plan = int(pairs.argmax()), int(planned.argmax())
            gains.append(planned[plan] - pairs[pair])
        if gains[0] > 0:  # a plan would be chosen
            found.append(float(gains[0] - gains[1]))
    return found
