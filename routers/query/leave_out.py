"""Quality of a router on kinds of questions that it never saw: each data set is left out of the fit in turn.

Beside it the static mixture that was best on the same training questions, which is what one has without a
router. Near-duplicates of the questions left out are left out of the fit too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from viaticum.errors import InputError
from viaticum.routers.query.encoder import Encoder
from viaticum.routers.query.evaluate import BUDGETS, MARGIN, best_mixture, column_outcomes, paired_bootstrap
from viaticum.routers.query.fit import fit
from viaticum.routers.query.out_of_fold import Report
from viaticum.routers.query.outcome_matrix import MIN_QUESTIONS, Array, OutcomeMatrix, near_duplicates
from viaticum.routers.query.parameters import RTRSettings

MIN_DATASETS = 2
Results = tuple[Array, Array]  # correct and dollars of each question [Q]


def evaluate_leaving_out(
    matrix: OutcomeMatrix,
    encoder: Encoder,
    descriptions: Mapping[str, str] | None = None,
    *,
    budgets: Sequence[float] = BUDGETS,
    settings: RTRSettings = RTRSettings(),  # noqa: B008 (it is frozen)
    report: Report = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Fit a router without each data set and evaluate it there; what `--leave-out dataset --json` prints.

    Args:
        matrix: outcomes; questions that were not given to every pair are left out.
        encoder: embeds questions and descriptions.
        descriptions: of models and strategies by name.
        budgets: mean dollars a question.
        settings: of every fit.
        report: called with the progress.

    Returns:
        `kinds`: for each data set, and `pooled`: for all of their questions, the points by budget. Each has
        accuracy and dollars of the router and of the static mixture, and the paired difference with its 95%
        interval.

    Raises:
        InputError: fewer than two data sets, or too few questions beside one of them.
    """
    matrix = matrix.select(matrix.complete)
    names = np.unique(matrix.datasets)
    if len(names) < MIN_DATASETS:
        raise InputError(
            f"the table has {len(names)} data set; to leave one out it needs {MIN_DATASETS} or more, named in"
            " the column dataset"
        )
    groups = near_duplicates(matrix.texts)
    found: dict[str, list[tuple[Results, Results]]] = {}
    for number, name in enumerate(map(str, names)):
        report(f"without {name}", number, len(names))
        test = matrix.datasets == name
        train = ~test & ~np.isin(groups, groups[test])
        if train.sum() < MIN_QUESTIONS:
            raise InputError(
                f"without {name} and near-duplicates of its questions {int(train.sum())} are left, and a fit "
                f"needs {MIN_QUESTIONS}; profile more data sets"
            )
        found[name] = _of_kind(
            matrix.select(train), matrix.select(test), encoder, descriptions, budgets, settings
        )
    report("done", 1, 1)
    return {
        "questions": len(matrix),
        "kinds": [
            {"dataset": name, "questions": len(each[0][0][0]), "points": _points(budgets, [each])}
            for name, each in found.items()
        ],
        "pooled": _points(budgets, list(found.values())),
    }


def _of_kind(
    train: OutcomeMatrix,
    test: OutcomeMatrix,
    encoder: Encoder,
    descriptions: Mapping[str, str] | None,
    budgets: Sequence[float],
    settings: RTRSettings,
) -> list[tuple[Results, Results]]:
    """Results of router and static mixture at each budget."""
    router = fit(train, encoder, descriptions, settings=settings)
    prediction = router.predict_texts(test.texts)
    correct, cost, _ = column_outcomes(router, test)
    rows, results = np.arange(len(test)), []
    for budget in budgets:
        chosen = router.choose_within(prediction, budget * (1 - MARGIN)).numpy()
        shares = best_mixture(train.correct, train.cost, budget * (1 - MARGIN))
        if shares is None:  # nothing is so cheap: the cheapest pair
            shares = np.eye(len(train.pairs))[train.cost.mean(0).argmin()]
        results.append(
            ((correct[rows, chosen], cost[rows, chosen]), (test.correct @ shares, test.cost @ shares))
        )
    return results


def _points(budgets: Sequence[float], kinds: list[list[tuple[Results, Results]]]) -> list[dict[str, Any]]:
    """The points by budget over all questions of some kinds."""
    points = []
    for number, budget in enumerate(budgets):
        ours, static = (
            [np.concatenate([each[number][who][part] for each in kinds]) for part in (0, 1)] for who in (0, 1)
        )
        points.append(
            {
                "budget": budget,
                "accuracy": float(ours[0].mean()),
                "cost": float(ours[1].mean()),
                "static_accuracy": float(static[0].mean()),
                "static_cost": float(static[1].mean()),
                **paired_bootstrap(ours[0] - static[0]),
            }
        )
    return points
