"""Data sets left out of the fit in turn, on synthetic questions with known rules."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from synthetic_outcomes import PAIRS, Words, outcomes

from viaticum.errors import InputError
from viaticum.routers.query.leave_out import evaluate_leaving_out
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
