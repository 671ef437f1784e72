"""Quality of a router on kinds of questions that it never saw: each data set is left out of the fit in turn.

Beside it the static mixture that was best on the same training questions, which is what one has without a
router. Near-duplicates of the questions left out are left out of the fit too. Intervals are over questions;
those of all data sets together also over data sets, of which there are few, and where asked over fits on
training questions that were drawn anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from viaticum.errors import InputError
from viaticum.routers.query.encoder import Encoder
from viaticum.routers.query.evaluate import (
    BOOTSTRAP_SAMPLES,
    BUDGETS,
    MARGIN,
    best_mixture,
    cheapest_pair,
    check_budgets,
    column_outcomes,
)
from viaticum.routers.query.fit import fit
from viaticum.routers.query.out_of_fold import Report
from viaticum.routers.query.outcome_matrix import MIN_QUESTIONS, Array, OutcomeMatrix, near_duplicates
from viaticum.routers.query.parameters import RTRSettings
from viaticum.routers.query.shared_text import without_shared

MIN_DATASETS = 2
Results = tuple[Array, Array]  # correct and dollars of each question [Q]
Fits = list[list[tuple[Results, Results]]]  # by fit and budget, of the router and of the static mixture


def evaluate_leaving_out(
    matrix: OutcomeMatrix,
    encoder: Encoder,
    descriptions: Mapping[str, str] | None = None,
    *,
    budgets: Sequence[float] = BUDGETS,
    settings: RTRSettings = RTRSettings(),  # noqa: B008 (it is frozen)
    refits: int = 0,
    report: Report = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Fit a router without each data set and evaluate it there; what `--leave-out dataset --json` prints.

    Args:
        matrix: outcomes; questions that were not given to every pair are left out.
        encoder: embeds questions and descriptions.
        descriptions: of models and strategies by name.
        budgets: mean dollars a question.
        settings: of every fit.
        refits: further fits without each data set, on training questions drawn with replacement, whole
            groups of near-duplicates at a time; they widen intervals and change no point.
        report: called with the progress.

    Returns:
        `cheapest`: the cheapest pair, and the budgets below what it costs. `kinds`: for each data set, and
        `pooled`: for all of their questions, the points by budget. Each has accuracy and dollars of the
        router and of the static mixture, and the paired difference with its 95% interval (`low`, `high`);
        those of `pooled` also one over data sets (`low_kinds`, `high_kinds`).

    Raises:
        InputError: fewer than two data sets, too few questions beside one of them, or a budget that is not
            above zero, or not finite.
    """
    check_budgets(budgets)
    matrix = matrix.select(matrix.complete).without_partial_verdicts()
    names = np.unique(matrix.datasets)
    if len(names) < MIN_DATASETS:
        raise InputError(
            f"the table has {len(names)} data set; to leave one out it needs {MIN_DATASETS} or more, named in"
            " the column dataset"
        )
    groups = near_duplicates(without_shared(matrix.texts))
    found: dict[str, Fits] = {}
    rng = np.random.default_rng(settings.seed)
    for number, name in enumerate(map(str, names)):
        test = matrix.datasets == name
        train = ~test & ~np.isin(groups, groups[test])
        if train.sum() < MIN_QUESTIONS:
            raise InputError(
                f"without {name} and near-duplicates of its questions {int(train.sum())} are left, and a fit "
                f"needs {MIN_QUESTIONS}; profile more data sets"
            )
        found[name] = fits = []
        for again in range(1 + refits):
            report(f"without {name}", number * (1 + refits) + again, len(names) * (1 + refits))
            rows = np.flatnonzero(train) if again == 0 else _drawn(train, groups, rng)
            one = replace(settings, seed=settings.seed + again)
            fits.append(
                _of_kind(matrix.select(rows), matrix.select(test), encoder, descriptions, budgets, one)
            )
    report("done", 1, 1)
    return {
        "questions": len(matrix),
        "cheapest": cheapest_pair(matrix, budgets),
        "kinds": [
            {"dataset": name, "questions": len(each[0][0][0][0]), "points": _points(budgets, [each])}
            for name, each in found.items()
        ],
        "pooled": _points(budgets, list(found.values())),
    }


def _drawn(train: Array, groups: Array, rng: np.random.Generator) -> Array:
    """Rows of training questions [n], whole groups drawn with replacement. train: mask [Q]."""
    names = np.unique(groups[train])
    rows = {name: np.flatnonzero(train & (groups == name)) for name in names}
    return np.concatenate([rows[name] for name in rng.choice(names, len(names))])


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


def _points(budgets: Sequence[float], kinds: Sequence[Fits]) -> list[dict[str, Any]]:
    """The points by budget over all questions of some kinds."""
    points = []
    for number, budget in enumerate(budgets):
        ours, static = (
            [np.concatenate([fits[0][number][who][part] for fits in kinds]) for part in (0, 1)]
            for who in (0, 1)
        )
        gaps = [[fit[number][0][0] - fit[number][1][0] for fit in fits] for fits in kinds]
        points.append(
            {
                "budget": budget,
                "accuracy": float(ours[0].mean()),
                "cost": float(ours[1].mean()),
                "static_accuracy": float(static[0].mean()),
                "static_cost": float(static[1].mean()),
                **_interval(gaps, over_kinds=False),
                **(_interval(gaps, over_kinds=True) if len(kinds) > 1 else {}),
            }
        )
    return points


def _interval(gaps: Sequence[Sequence[Array]], *, over_kinds: bool) -> dict[str, float]:
    """The mean difference over all questions and its 95% interval, by a percentile bootstrap.

    A draw takes one fit of each kind, and questions of it with replacement; with `over_kinds` it takes kinds
    with replacement first, and deviations are widened by (K / (K - 1)) ** 0.5 for K kinds, as in the standard
    error of a mean of few.

    Args:
        gaps: by kind and by fit, the differences of its questions [Q of the kind].
    """
    mean = float(np.concatenate([fits[0] for fits in gaps]).mean())
    rng, drawn, count = np.random.default_rng(0), [], len(gaps)
    for _ in range(BOOTSTRAP_SAMPLES):
        taken = rng.integers(0, count, count).tolist() if over_kinds else range(count)
        total = questions = 0.0
        for kind in taken:
            values = gaps[kind][int(rng.integers(len(gaps[kind])))]
            total += values[rng.integers(0, len(values), len(values))].sum()
            questions += len(values)
        drawn.append(total / questions)
    low, high = np.quantile(drawn, (0.025, 0.975))
    if not over_kinds:
        return {"difference": mean, "low": float(low), "high": float(high)}
    few = (count / (count - 1)) ** 0.5
    return {"low_kinds": float(mean + few * (low - mean)), "high_kinds": float(mean + few * (high - mean))}
