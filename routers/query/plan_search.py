"""The plans of a router: searched for on its outcome table, and by how much they look better than they are.

Plans with a check have to be worth their cost on questions that they were not chosen by.

The best of thousands of plans on a hundred questions is in part the luckiest. How much is learned by
searching without a fifth of the questions: what the best plan gains over the best single pair there, and what
is left of the gain on that fifth. Simulation and search are in `viaticum.routers.query.plans`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from viaticum.routers.query.heads import NEIGHBOURS, NeighboursHead, log_odds
from viaticum.routers.query.outcome_matrix import MIN_QUESTIONS, Array, OutcomeMatrix
from viaticum.routers.query.plans import BY_CHECK, COST_WEIGHTS, IndexedPlan, search, simulate

MAX_CLUSTERS = 8  # clusters of questions with alike outcomes
ENOUGH_QUESTIONS = 1_000  # from which the best plan is hardly a matter of luck
MIN_FOLD = 20  # questions that are left for a search
CHECK_ERRORS = 3.0  # standard errors by which a plan with a check has to be worth more than others


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


def search_checks(
    matrix: OutcomeMatrix, others: Sequence[IndexedPlan], groups: Array, folds: Tensor
) -> list[IndexedPlan]:
    """Plans with a check that are worth more than all others at some value of a dollar, beyond noise.

    For each fold the best plan with a check and the best other one are chosen without it, and compared on it:
    the mean gain, cost taken off, has to be `CHECK_ERRORS` standard errors above 0. A verifier counts that
    was asked about every answer, of questions that every pair was asked; where the costs of verdicts are
    unknown, on the other questions.

    Args:
        matrix: the outcome table.
        others: the pairs, and plans of several pairs.
        groups: of questions that are alike [Q].
        folds: of whole groups [Q].
    """
    found: list[IndexedPlan] = []
    for rows, columns in _columns_by_questions(matrix):
        found += _worth_their_cost(matrix.select(rows), columns, others, groups[rows], folds.numpy()[rows])
    return list(dict.fromkeys(found))


def _columns_by_questions(matrix: OutcomeMatrix) -> list[tuple[Array, list[int]]]:
    """The verdicts that count, by the questions on which their costs are known: a mask [Q] and columns."""
    found: dict[bytes, tuple[Array, list[int]]] = {}
    columns = () if matrix.verdicts is None else matrix.verdicts.columns
    for column in range(len(matrix.pairs), len(matrix.pairs) + len(columns)):
        rows = matrix.complete & matrix.verdict_priced(column)
        if matrix.verdict_known(column)[matrix.complete].all() and rows.sum() >= MIN_QUESTIONS:
            found.setdefault(rows.tobytes(), (rows, []))[1].append(column)
    return list(found.values())


def _worth_their_cost(
    matrix: OutcomeMatrix, columns: Sequence[int], others: Sequence[IndexedPlan], groups: Array, folds: Array
) -> list[IndexedPlan]:
    """The plans of `search_checks` with the verdicts of these columns, on questions where all is known."""
    known, candidates = matrix.with_verdicts(), _check_candidates(matrix, columns)
    if not candidates:
        return []
    checked, usual = (_results(plans, known) for plans in (candidates, others))
    of_group = np.unique(groups, return_inverse=True)[1]
    found = []
    for weight in COST_WEIGHTS:
        values = [correct - weight * cost for correct, cost in (checked, usual)]
        gains = _gains_outside(values[0], values[1], folds)
        error = np.sqrt((np.bincount(of_group, gains - gains.mean()) ** 2).sum()) / len(gains)
        if gains.mean() > CHECK_ERRORS * error:
            found.append(candidates[int(values[0].mean(0).argmax())])
    return found


def _check_candidates(matrix: OutcomeMatrix, columns: Sequence[int]) -> list[IndexedPlan]:
    """Each of these verdicts with each pair that costs more than the one checked."""
    assert matrix.verdicts is not None
    dollars, checked = matrix.cost.mean(0), matrix.verdicts.columns
    return [
        ((pair, column, last), BY_CHECK)
        for column in columns
        for pair in [checked[column - len(matrix.pairs)][0]]
        for last in np.flatnonzero(dollars > dollars[pair]).tolist()
    ]


def _results(plans: Sequence[IndexedPlan], known: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    """Correct and dollars of each plan on each question [Q, plans]."""
    correct, cost = zip(*(simulate(plan, *known)[:2] for plan in plans), strict=True)
    return np.stack(correct, 1), np.stack(cost, 1)


def _gains_outside(ours: Array, theirs: Array, folds: Array) -> Array:
    """By how much our best plan is worth more than theirs, each chosen without the question's fold [Q].

    ours, theirs: value of each plan [Q, plans].
    """
    gains = np.zeros(len(folds))
    for fold in np.unique(folds).tolist():
        inside = folds != fold
        mine, other = (int(values[inside].mean(0).argmax()) for values in (ours, theirs))
        gains[~inside] = ours[~inside, mine] - theirs[~inside, other]
    return gains
