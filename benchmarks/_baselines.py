"""Baseline routers on one split of an outcome table: random, static, neighbours, logistic, forest, cascade.

Each gets what the learned router gets: the training outcomes, the same embeddings and the same margin under a
budget. Parameters (cost weight, k, penalty) are tuned on training questions that the predictions were not
made from, by their outcomes; between two cost weights a budget is met by a mixture. Test outcomes are read
only to score the choices.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from viaticum.routers.query.evaluate import BUDGETS, MARGIN, best_mixture
from viaticum.routers.query.forest import lexical_counts
from viaticum.routers.query.outcome_matrix import Array, OutcomeMatrix
from viaticum.routers.query.plans import IndexedPlan, simulate

COST_WEIGHTS = np.geomspace(0.01, 1e5, 140).tolist()  # values of a dollar in units of accuracy
NEIGHBOURS = (5, 10, 25, 50, 100, 200, 400, 800)
LEAVES = (3, 10, 30)  # least questions of a forest's leaf
TREES, COMPONENTS = 100, 60
FIRST_PAIRS = 8  # of the cheapest pairs two begin a cascade
PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # scikit-learn's C
Results = tuple[Array, Array]  # correct or not [Q] (or the probability of it), dollars [Q]
Curve = list[Results | None]  # for each budget; None: nothing is so cheap
# embeddings [N, D] -> probabilities [N, P] and predicted costs [N, P]
Predict = Callable[[Array], tuple[Array, Array]]


@dataclass(frozen=True)
class Split:
    """One split of an outcome table.

    Args:
        train, test: outcomes of the training and the test questions.
        x_train, x_test: their embeddings [Q, D].
        inner: mask of the training questions that parameters are tuned on.
        numbers: of the test questions in the whole table, by which seeds that share a question are matched.
        seed: seed of the split.
        budgets: mean dollars a question.
    """

    train: OutcomeMatrix
    test: OutcomeMatrix
    x_train: Array
    x_test: Array
    inner: Array
    numbers: Array
    seed: int
    budgets: tuple[float, ...] = BUDGETS


def planned(budget: float) -> float:
    """The part of a budget that every router plans with."""
    return budget * (1 - MARGIN)


def choose_pairs(probabilities: Array, costs: Array, cost_weight: float) -> Array:
    """For each question the pair of the highest probability minus weighted cost [N]."""
    return np.asarray((probabilities - cost_weight * costs).argmax(1))


def results_of(matrix: OutcomeMatrix, chosen: Array) -> Results:
    rows = np.arange(len(matrix))
    return matrix.correct[rows, chosen], matrix.cost[rows, chosen]


def operating_points(
    probabilities: Array,
    costs: Array,
    matrix: OutcomeMatrix,
    cost_weights: Sequence[float],
    budgets: Sequence[float] = BUDGETS,
) -> list[tuple[Array, float] | None]:
    """For each budget the most accurate mixture of cost weights on these questions, by actual mean cost.

    Returns shares of the cost weights [W], at most two above 0, and the accuracy.
    """
    results = [results_of(matrix, choose_pairs(probabilities, costs, weight)) for weight in cost_weights]
    correct, cost = (np.stack(each, 1) for each in zip(*results, strict=True))
    shares = [best_mixture(correct, cost, planned(budget)) for budget in budgets]
    return [None if each is None else (each, float(correct.mean(0) @ each)) for each in shares]


def curve(
    predict: Predict,
    split: Split,
    chosen: Sequence[tuple[Array, float] | None],
    cost_weights: Sequence[float],
) -> Curve:
    """Results of these mixtures on the test questions."""
    probabilities, costs = predict(split.x_test)
    results = [results_of(split.test, choose_pairs(probabilities, costs, weight)) for weight in cost_weights]
    correct, cost = (np.stack(each, 1) for each in zip(*results, strict=True))
    return [None if point is None else (correct @ point[0], cost @ point[0]) for point in chosen]


def tuned(
    make: Callable[[Array, OutcomeMatrix, float], Predict], values: Sequence[float], split: Split
) -> tuple[Curve, float]:
    """Tune the parameter and the cost weights on the inner questions, then fit on all training questions."""
    inner = split.inner
    train, validation = split.train.select(~inner), split.train.select(inner)
    tried = {}
    for value in values:
        predictions = make(split.x_train[~inner], train, value)(split.x_train[inner])
        points = operating_points(*predictions, validation, COST_WEIGHTS, split.budgets)
        tried[value] = (np.mean([point[1] if point else 0.0 for point in points]), points)
    best = max(values, key=lambda value: tried[value][0])
    return curve(make(split.x_train, split.train, best), split, tried[best][1], COST_WEIGHTS), best


def neighbours(x: Array, matrix: OutcomeMatrix, k: float) -> Predict:
    """Plain means of the k nearest training questions."""
    from sklearn.neighbors import KNeighborsRegressor

    pairs = len(matrix.pairs)
    model = KNeighborsRegressor(min(int(k), len(x)), algorithm="brute")  # embeddings have length 1
    model.fit(x, np.hstack((matrix.correct, matrix.cost)))

    def predict(asked: Array) -> tuple[Array, Array]:
        means = model.predict(asked)
        return means[:, :pairs], means[:, pairs:]

    return predict


def logistic(x: Array, matrix: OutcomeMatrix, penalty: float) -> Predict:
    """One logistic regression a pair for its probability, one ridge regression a pair for its dollars."""
    from sklearn.linear_model import LogisticRegression, Ridge

    def fit_pair(correct: Array) -> Callable[[Array], Array]:
        if correct.min() == correct.max():
            return lambda asked: np.full(len(asked), correct[0])
        model = LogisticRegression(C=penalty, max_iter=300).fit(x, correct)
        return lambda asked: np.asarray(model.predict_proba(asked)[:, 1])

    models = [fit_pair(correct) for correct in matrix.correct.T]
    dollars = Ridge(1.0).fit(x, matrix.cost)
    lowest = matrix.cost.min(0)

    def predict(asked: Array) -> tuple[Array, Array]:
        return np.stack([each(asked) for each in models], 1), np.maximum(dollars.predict(asked), lowest)

    return predict


def with_lexical(split: Split) -> Split:
    """The split with lexical counts beside the embeddings."""
    train, test = (
        np.hstack((x, lexical_counts(matrix.texts).numpy()))
        for x, matrix in ((split.x_train, split.train), (split.x_test, split.test))
    )
    return replace(split, x_train=train, x_test=test)


def forest(x: Array, matrix: OutcomeMatrix, leaf: float) -> Predict:
    """Extremely randomised trees on principal components of the embedding and lexical counts.

    One forest for probabilities and costs of all pairs; x: `with_lexical` [Q, D + F].
    """
    from sklearn.decomposition import PCA
    from sklearn.ensemble import ExtraTreesRegressor

    pairs, counts = len(matrix.pairs), lexical_counts(("",)).shape[1]
    size = min(COMPONENTS, len(x) - 1)
    components = PCA(size, random_state=0).fit(x[:, :-counts])

    def features(asked: Array) -> Array:
        return np.hstack((components.transform(asked[:, :-counts]), asked[:, -counts:]))

    scale = matrix.cost.std(0) + 1e-12
    model = ExtraTreesRegressor(TREES, min_samples_leaf=int(leaf), max_features=0.3, random_state=0)
    model.fit(features(x), np.hstack((matrix.correct, 0.3 * matrix.cost / scale)))

    def predict(asked: Array) -> tuple[Array, Array]:
        means = model.predict(features(asked))
        return means[:, :pairs], means[:, pairs:] * scale / 0.3

    return predict


def random_pairs(split: Split) -> Curve:
    """A random pair among the cheapest, as many as the budget allows on average by their training cost."""
    order = np.argsort(split.train.cost.mean(0), kind="stable")
    means = np.cumsum(split.train.cost.mean(0)[order]) / np.arange(1, len(order) + 1)
    result: Curve = []
    for budget in split.budgets:
        among = order[: int((means <= planned(budget)).sum())]
        result.append(
            (split.test.correct[:, among].mean(1), split.test.cost[:, among].mean(1)) if len(among) else None
        )
    return result


def static_hull(split: Split) -> Curve:
    """The mixture of pairs that was best on the training outcomes, whatever the question."""
    shares = [
        best_mixture(split.train.correct, split.train.cost, planned(budget)) for budget in split.budgets
    ]
    return [None if each is None else (split.test.correct @ each, split.test.cost @ each) for each in shares]


def oracle(split: Split) -> Curve:
    """Knows which pairs are correct and what they cost; single pairs, no margin. An upper bound."""
    correct, cost = split.test.correct, split.test.cost
    lowest = cost.min(1)
    extra = (
        np.where(correct > 0, cost, np.inf).min(1) - lowest
    )  # dollars beyond the cheapest pair for a correct one
    order = np.argsort(extra, kind="stable")
    solvable = np.isfinite(extra)
    extra = np.where(solvable, extra, 0.0)
    spent = (lowest.sum() + np.cumsum(extra[order])) / len(cost)
    result: Curve = []
    for budget in split.budgets:
        if lowest.mean() > budget:
            result.append(None)
            continue
        chosen = np.zeros(len(cost))
        chosen[order[: int((spent <= budget).sum())]] = 1.0
        chosen *= solvable
        result.append((chosen, lowest + chosen * extra))
    return result


def cascade(split: Split, plan: IndexedPlan) -> tuple[Results, float]:
    """A fixed plan on the test questions, and its mean cost on the training questions."""
    test, train = split.test, split.train
    correct, cost, _ = simulate(plan, test.correct, test.cost, test.answers)
    return (correct, cost), float(simulate(plan, train.correct, train.cost, train.answers)[1].mean())


def best_cascade(train: OutcomeMatrix) -> IndexedPlan | None:
    """The cheapest cascade of three pairs that is as accurate as the best pair, on training questions.

    Two of the cheapest pairs, and where their answers differ a third. Where none is as accurate, the most
    accurate one; None for a table without answers.
    """
    if (train.answers < 0).all() or len(train.pairs) < 3:
        return None
    cheap = np.argsort(train.cost.mean(0), kind="stable")[:FIRST_PAIRS].tolist()
    found = []
    for first, second in itertools.permutations(cheap, 2):
        for third in set(range(len(train.pairs))) - {first, second}:
            correct, cost, _ = simulate(((first, second, third), 2), train.correct, train.cost, train.answers)
            found.append((float(correct.mean()), float(cost.mean()), (first, second, third)))
    aim = float(train.correct.mean(0).max())
    enough = [each for each in found if each[0] >= aim]
    order = min(enough, key=lambda each: each[1])[2] if enough else max(found, key=lambda each: each[0])[2]
    return order, 2


def fixed(results: Results, expected: float, budgets: Sequence[float] = BUDGETS) -> Curve:
    """A router with one operating point: its results at every budget that covers its expected cost."""
    return [results if expected <= planned(budget) else None for budget in budgets]
