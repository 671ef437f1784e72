"""Data sets left out of the fit in turn, on synthetic questions with known rules."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from synthetic_outcomes import PAIRS, Words, outcomes

from viaticum.errors import InputError
from viaticum.routers.query.leave_out import _drawn, _interval, evaluate_leaving_out
from viaticum.routers.query.outcome_matrix import OutcomeMatrix
from viaticum.types import Pair

pytestmark = pytest.mark.usefixtures("one_thread")
BUDGETS = (0.00005, 0.0005)


def test_each_data_set_is_evaluated_by_a_router_that_never_saw_it() -> None:
    matrix = OutcomeMatrix.from_outcomes(outcomes(180))
    result = evaluate_leaving_out(matrix, Words(), budgets=BUDGETS)  # type: ignore[arg-type]
    assert [(kind["dataset"], kind["questions"]) for kind in result["kinds"]] == [
        (name, 60) for name in ("games", "kin", "sums")
    ]
    for number, pooled in enumerate(result["pooled"]):
        points = [kind["points"][number] for kind in result["kinds"]]
        for name in ("accuracy", "cost", "static_accuracy", "static_cost", "difference"):
            assert pooled[name] == pytest.approx(np.mean([point[name] for point in points]))
        assert pooled["low"] <= pooled["difference"] <= pooled["high"]
        assert pooled["low_kinds"] <= pooled["difference"] <= pooled["high_kinds"]
        assert "low_kinds" not in points[0], "one data set says nothing about others"
        assert pooled["difference"] == pytest.approx(pooled["accuracy"] - pooled["static_accuracy"])


def test_the_static_mixture_is_that_of_the_other_data_sets() -> None:
    """Where all of the money goes to one pair, its accuracy and cost on the questions left out are told."""
    matrix = OutcomeMatrix.from_outcomes(outcomes(180))
    big = PAIRS.index(Pair("big", "cot"))
    result = evaluate_leaving_out(matrix, Words(), budgets=(1.0,))  # type: ignore[arg-type]
    for kind in result["kinds"]:
        rows = matrix.datasets == kind["dataset"]
        (point,) = kind["points"]
        assert point["static_accuracy"] == pytest.approx(matrix.correct[rows, big].mean())
        assert point["static_cost"] == pytest.approx(matrix.cost[rows, big].mean())


def test_near_duplicates_of_the_questions_left_out_are_left_out_too() -> None:
    """A data set of copies alone leaves nothing to fit on."""
    matrix = OutcomeMatrix.from_outcomes(outcomes(90))
    copies = replace(matrix, ids=tuple(("copies", each) for _, each in matrix.ids))
    with pytest.raises(InputError, match="near-duplicates of its questions 0 are left"):
        evaluate_leaving_out(matrix.concat(copies), Words(), budgets=BUDGETS)  # type: ignore[arg-type]


def test_one_data_set_cannot_be_left_out() -> None:
    matrix = OutcomeMatrix.from_outcomes(outcomes(60, kinds=("kin",)))
    with pytest.raises(InputError, match="the table has 1 data set"):
        evaluate_leaving_out(matrix, Words(), budgets=BUDGETS)  # type: ignore[arg-type]


def a_gap(rng: np.random.Generator, means: tuple[float, ...], questions: int = 60) -> list[list[np.ndarray]]:
    """Differences of kinds whose means differ, a fit each."""
    return [[mean + 0.3 * rng.standard_normal(questions)] for mean in means]


def test_an_interval_over_kinds_covers_kinds_to_come() -> None:
    """Kinds differ more than questions of one: the interval over questions alone misses the mean of kinds."""
    covered = {True: 0, False: 0}
    for seed in range(60):
        rng = np.random.default_rng(seed)
        gaps = a_gap(rng, tuple(0.1 * rng.standard_normal(7)))
        kinds, questions = _interval(gaps, over_kinds=True), _interval(gaps, over_kinds=False)
        covered[True] += kinds["low_kinds"] <= 0 <= kinds["high_kinds"]
        covered[False] += questions["low"] <= 0 <= questions["high"]
    assert covered[True] >= 50
    assert covered[False] <= 40


def test_kinds_that_are_alike_have_an_interval_as_of_their_questions() -> None:
    rng = np.random.default_rng(1)
    gaps = a_gap(rng, (0.05,) * 7, questions=400)
    kinds, questions = _interval(gaps, over_kinds=True), _interval(gaps, over_kinds=False)
    widths = kinds["high_kinds"] - kinds["low_kinds"], questions["high"] - questions["low"]
    assert 0.7 < widths[0] / widths[1] < 2.2
    assert questions["difference"] == pytest.approx(float(np.concatenate([each[0] for each in gaps]).mean()))


def test_refits_that_differ_widen_the_interval_and_move_no_point() -> None:
    rng = np.random.default_rng(2)
    one = a_gap(rng, (0.05, 0.05, 0.05))
    several = [[fits[0], *(fits[0] + shift for shift in (-0.2, 0.2))] for fits in one]
    before, after = _interval(one, over_kinds=False), _interval(several, over_kinds=False)
    assert after["difference"] == before["difference"]
    assert after["high"] - after["low"] > 1.5 * (before["high"] - before["low"])


def test_refits_draw_groups_of_training_questions() -> None:
    train, groups = np.array([True] * 6 + [False] * 2), np.array([0, 0, 1, 1, 2, 3, 4, 4])
    rng = np.random.default_rng(0)
    for _ in range(20):
        rows = _drawn(train, groups, rng)
        assert train[rows].all()
        counts = np.bincount(rows, minlength=8)
        assert counts[0] == counts[1]
        assert counts[2] == counts[3], "near-duplicates come together"
    matrix = OutcomeMatrix.from_outcomes(outcomes(150))
    words: object = Words()
    plain, again = (
        evaluate_leaving_out(matrix, words, budgets=BUDGETS[1:], refits=each)  # type: ignore[arg-type]
        for each in (0, 1)
    )
    assert again["pooled"][0]["difference"] == plain["pooled"][0]["difference"]
    assert again["pooled"][0]["low"] != plain["pooled"][0]["low"]
