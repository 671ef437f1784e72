"""What a run of `tune` found: a router fitted on what it bought, and its figures on held-out questions.

The operating point is chosen from predictions alone; actual cost and correctness are read afterwards. Leaves
out buying (`agents.batch.tune`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from viaticum.agents.batch.tune_folder import mark_router
from viaticum.agents.batch.tune_rounds import Bought
from viaticum.errors import DataError
from viaticum.money import nanousd
from viaticum.outcomes import accuracy_interval, write_outcomes
from viaticum.routers.query.encoder import Encoder
from viaticum.routers.query.evaluate import (
    best_mixture,
    best_single_pairs,
    column_outcomes,
    paired_bootstrap,
)
from viaticum.routers.query.fit import fit
from viaticum.routers.query.out_of_fold import Report
from viaticum.routers.query.outcome_matrix import OutcomeMatrix
from viaticum.routers.query.parameters import RTRSettings
from viaticum.routers.query.rtr import RTRRouter

WITHIN = 0.01  # expected accuracy that the operating point may lie below the best
MIN_EVALUATED = 5  # questions
SWEEP = np.geomspace(0.001, 10, 60)  # accuracy that the mean cost of the dearest pair is worth


@dataclass(frozen=True)
class Figure:
    """Accuracy and mean nano-dollars a question, on the held-out questions."""

    name: str
    accuracy: float
    cost_nanousd: int


@dataclass(frozen=True)
class Found:
    """Figures on held-out questions; None for what could not be measured.

    pairs: each alone. curve: the router with money worth more or less, from the cheapest choice on.
    gain: accuracy of the router minus that of the best mixture of single pairs of the same cost, with its 95%
    interval. why: why there is no router, or why routing does not pay; "" where it does. judged: how many of
    the questions were graded by `grader`, a judge or agreement, for want of a known answer.
    """

    questions: int
    pairs: tuple[Figure, ...] = ()
    cheap: Figure | None = None
    router: Figure | None = None
    interval: tuple[float, float] | None = None
    best: Figure | None = None
    gain: Mapping[str, float] | None = None
    why: str = ""
    judged: int = 0
    grader: str = ""
    curve: tuple[Figure, ...] = ()


def table_path(out: Path) -> Path:
    """Where the outcome table of a run is."""
    return out.with_name(out.name + ".outcomes.parquet")


def conclude(
    bought: Bought,
    out: Path,
    encoder: Encoder,
    descriptions: Mapping[str, str],
    *,
    seed: int = 0,
    report: Report = lambda stage, done, total: None,
) -> Found:
    """Write the outcome table; fit a router, evaluate it, and write its folder.

    Args:
        bought: what was bought.
        out: the folder of the router; nothing is written there where there is nothing to choose from.
        encoder: embeds questions.
        descriptions: of models and strategies by name.
        seed: of the fit.
        report: called with the progress of the fit.
    """
    found, judged = _conclude(bought, out, encoder, descriptions, seed, report), bought.judged
    if judged is None or not found.questions:
        return found
    aside = [row.question_id for row in bought.outcomes if row.question_id in bought.held_out]
    share = len(judged.questions.intersection(aside)) / len(set(aside))
    return replace(found, judged=round(share * found.questions), grader=judged.grader)


def _conclude(
    bought: Bought, out: Path, encoder: Encoder, descriptions: Mapping[str, str], seed: int, report: Report
) -> Found:
    _write_table(bought, out)
    pairs = bought.remaining
    if not pairs:
        return Found(0, why="no call was answered")
    train = [row for row in bought.outcomes if row.question_id not in bought.held_out and row.pair in pairs]
    aside = [row for row in bought.outcomes if row.question_id in bought.held_out and row.pair in pairs]
    matrix = OutcomeMatrix.from_outcomes(aside, pairs=pairs) if aside else None
    matrix = matrix.select(matrix.complete) if matrix is not None else None
    if len(pairs) == 1:
        why = f"{pairs[0]} is the only pair left, nothing else is as good at its price"
        return _without_router(matrix, why)
    try:
        learned = OutcomeMatrix.from_outcomes(train, pairs=pairs)
        router = fit(learned, encoder, descriptions, settings=RTRSettings(seed=seed), report=report)
    except DataError as error:
        return _without_router(matrix, f"no router could be fitted: {error}")
    mark_router(out)
    router.save(out)
    if matrix is None or len(matrix) < MIN_EVALUATED:
        count = 0 if matrix is None else len(matrix)
        why = f"the money was enough for {count} held-out questions alone; give a larger --budget"
        return Found(count, why=why)
    return _figures(router, matrix, seed)


def _write_table(bought: Bought, out: Path) -> None:
    """The outcome table, with the side that a question is on and who graded its answers."""
    grader, judged = "", frozenset[str]()
    if bought.judged is not None:
        grader, judged = bought.judged.grader, bought.judged.questions
    sides: dict[str, dict[str, Any]] = {
        row.question_id: {
            "held_out": row.question_id in bought.held_out,
            "graded_by": grader if row.question_id in judged else "known answer",
        }
        for row in bought.outcomes
    }
    write_outcomes(table_path(out), bought.outcomes, sides)


def _figures(router: RTRRouter, matrix: OutcomeMatrix, seed: int) -> Found:
    prediction = router.predict_texts(matrix.texts)
    correct, cost, _ = column_outcomes(router, matrix)
    rows = np.arange(len(matrix))
    dearest = float(matrix.cost.mean(0).max())  # prices of a question differ by five orders of magnitude
    weights = SWEEP / dearest if dearest > 0 else SWEEP
    points = [router.choose_columns(prediction, float(weight)).numpy() for weight in weights]
    expected = [
        (
            float(prediction.accuracy.numpy()[rows, each].mean()),
            float(prediction.cost.numpy()[rows, each].mean()),
        )
        for each in points
    ]
    enough = max(accuracy for accuracy, _ in expected) - WITHIN
    chosen = min(
        (dollars, number) for number, (accuracy, dollars) in enumerate(expected) if accuracy >= enough
    )[1]
    routed, paid = correct[rows, points[chosen]], float(cost[rows, points[chosen]].mean())
    shares = best_mixture(matrix.correct, matrix.cost, paid)
    gain = None
    if shares is not None:
        gain = paired_bootstrap(routed - matrix.correct @ shares, seed=seed)
    why = ""
    if gain is not None and gain["low"] <= 0:
        why = "it cannot be told apart from single pairs mixed at the same cost"
        if gain["high"] <= 0 and gain["difference"] < 0:
            why = "single pairs mixed at the same cost are right more often"
    return Found(
        len(matrix),
        _alone(matrix),
        _cheap(matrix),
        Figure("router", float(routed.mean()), nanousd(paid)),
        accuracy_interval(int(routed.sum()), len(matrix)),
        _best(matrix),
        gain,
        why,
        curve=_curve(
            [(float(correct[rows, each].mean()), float(cost[rows, each].mean())) for each in points]
        ),
    )


def _curve(points: list[tuple[float, float]]) -> tuple[Figure, ...]:
    ordered = sorted(set(points), key=lambda point: (point[1], point[0]))
    return tuple(Figure("router", accuracy, nanousd(cost)) for accuracy, cost in ordered)


def _without_router(matrix: OutcomeMatrix | None, why: str) -> Found:
    if matrix is None or not len(matrix):
        return Found(0, why=why)
    return Found(len(matrix), _alone(matrix), cheap=_cheap(matrix), best=_best(matrix), why=why)


def _alone(matrix: OutcomeMatrix) -> tuple[Figure, ...]:
    return tuple(_figure(matrix, column) for column in range(len(matrix.pairs)))


def _figure(matrix: OutcomeMatrix, column: int) -> Figure:
    accuracy, cost = float(matrix.correct[:, column].mean()), float(matrix.cost[:, column].mean())
    return Figure(str(matrix.pairs[column]), accuracy, nanousd(cost))


def _best(matrix: OutcomeMatrix) -> Figure:
    return _figure(matrix, best_single_pairs(matrix)[0])


def _cheap(matrix: OutcomeMatrix) -> Figure:
    """The best of the cheapest model's pairs."""
    model = matrix.pairs[int(matrix.cost.mean(0).argmin())].model
    columns = [number for number, pair in enumerate(matrix.pairs) if pair.model == model]
    figures = [_figure(matrix, column) for column in columns]
    return max(figures, key=lambda each: (each.accuracy, -each.cost_nanousd))
