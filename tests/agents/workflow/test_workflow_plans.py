"""The workflow follows a plan: who is asked, when it stops, what it answers and what it costs."""

from __future__ import annotations

from pathlib import Path

import pytest
from workflow_client import ScriptedModel, row, scripted_catalogue

from viaticum import Viaticum
from viaticum.errors import BudgetExceeded
from viaticum.outcomes import read_outcomes
from viaticum.routers.query import Plan, PlanRow, QueryRouter
from viaticum.types import Pair, Query, RoutingTable

NAMES = ("one", "two", "three")
PAIRS = tuple(Pair(name, "cot") for name in NAMES)


class PlannedRow(QueryRouter):
    """One plan for every question, and its pairs alone as cheaper and worse ways."""

    def __init__(self, need: int, pairs: tuple[Pair, ...] = PAIRS, cost: int = 30_000) -> None:
        self.row = PlanRow(Plan(pairs, need), 0.9, cost, cost)

    def table(self, query: Query) -> RoutingTable:
        return RoutingTable(tuple(row(pair.model, 0.5, 10_000) for pair in PAIRS))

    def plans_for(self, query: Query) -> list[PlanRow]:
        return [self.row, *super().plans_for(query)]


def ask(
    folder: Path, texts: tuple[str, ...], router: QueryRouter, budget: str = "0.01"
) -> tuple[Viaticum, dict[str, ScriptedModel]]:
    models = {name: ScriptedModel(name, text) for name, text in zip(NAMES, texts, strict=True)}
    client = Viaticum(
        budget, folder=folder, router=router, models=dict(models), catalogue=scripted_catalogue(NAMES)
    )
    return client, models


@pytest.mark.parametrize(
    ("texts", "need", "value", "calls"),
    [
        (("The answer is 5.", "The answer is 5.0.", "The answer is 7."), 2, "5", 2),
        (("The answer is 5.", "The answer is 6.", "The answer is 6."), 2, "6", 3),
        (("The answer is 6.", "The answer is 5.", "The answer is 6."), 2, "6", 3),
        (("The answer is 5.", "The answer is 6.", "The answer is 7."), 2, "7", 3),  # no two agree: the last
        (("The answer is 5.", "The answer is 5.", "The answer is 7."), 3, "5", 3),
        (("The answer is 5.", "who knows", "The answer is 5."), 2, "5", 3),
        (("who knows", "who knows", "The answer is 5."), 2, "5", 3),
        (("who knows", "who knows", "who knows"), 2, None, 3),
    ],
)
def test_pairs_are_asked_until_enough_agree(
    tmp_path: Path, texts: tuple[str, ...], need: int, value: str | None, calls: int
) -> None:
    client, models = ask(tmp_path, texts, PlannedRow(need))
    with client:
        answer = client.solve("How many are left?", kind="number")
        assert (None if answer.value is None else f"{float(answer.value):g}") == value
        assert [model.calls for model in models.values()] == [1] * calls + [0] * (3 - calls)
        assert [route.pair for route in answer.routes] == list(PAIRS[:calls])
        assert answer.cost == calls * 12_000  # 120 tokens at 0.1 dollars a million
        assert client.budget().posted_nanousd == answer.cost


def test_the_reasons_tell_the_plan(tmp_path: Path) -> None:
    client, _ = ask(tmp_path, ("The answer is 5.", "The answer is 6.", "The answer is 6."), PlannedRow(2))
    with client:
        why = [route.why for route in client.solve("How many?", kind="number").routes]
    assert why[0].endswith("90%, of the 4 ways that fit: one+cot, two+cot, three+cot until two agree")
    assert why[1:] == ["1 answers so far, and no 2 agree", "2 answers so far, and no 2 agree"]


def test_what_was_answered_stands_where_the_rest_of_the_plan_cannot_be_paid_for(tmp_path: Path) -> None:
    """Worst cases are held: with 50,000 nano-dollars one call fits at a time, and only two in all."""
    client, models = ask(
        tmp_path, ("The answer is 5.", "The answer is 6.", "The answer is 7."), PlannedRow(2), "0.00006"
    )
    with client:
        answer = client.solve("How many?", kind="number")
        budget = client.budget()
    asked = sum(model.calls for model in models.values())
    assert 1 <= asked < 3
    assert answer.value == ("5", "6")[asked - 1]
    assert budget.posted_nanousd == answer.cost == asked * 12_000
    assert budget.held_nanousd == 0


def test_a_plan_whose_models_are_not_here_is_left_out(tmp_path: Path) -> None:
    far = PlannedRow(2, (PAIRS[0], Pair("elsewhere", "cot")))
    client, models = ask(tmp_path, ("The answer is 5.",) * 3, far)
    with client:
        answer = client.solve("How many?", kind="number")
    assert len(answer.routes) == 1
    assert sum(model.calls for model in models.values()) == 1


def test_a_plan_that_does_not_fit_is_not_begun(tmp_path: Path) -> None:
    expensive = PlannedRow(2, cost=10**9)
    client, models = ask(tmp_path, ("The answer is 5.",) * 3, expensive, "0.0001")
    with client:
        assert len(client.solve("How many?", kind="number").routes) == 1
    client, models = ask(tmp_path / "other", ("The answer is 5.",) * 3, expensive, "0.00001")
    with client, pytest.raises(BudgetExceeded, match="no pair fits"):
        client.solve("How many?", kind="number")
    assert not any(model.calls for model in models.values())


def test_feedback_becomes_an_outcome(tmp_path: Path) -> None:
    client, _ = ask(tmp_path, ("The answer is 5.", "The answer is 6.", "The answer is 6."), PlannedRow(2))
    with client:
        answer = client.solve("How many are left?", kind="number")
        path = client.feedback("How many are left?", answer, True)
        client.feedback("How many are left?", answer, True)
        single, _ = ask(tmp_path, ("The answer is 5.",) * 3, PlannedRow(2, PAIRS[:1]))
        with single:
            alone = single.solve("And now?", kind="number")
            single.feedback("And now?", alone, False)
    rows = read_outcomes(path)
    assert [(row.pair, row.correct, row.answer) for row in rows] == [
        (PAIRS[2], True, "6"),
        (PAIRS[2], True, "6"),
        (PAIRS[0], False, "5"),
    ]
    assert rows[0].cost_nanousd is None, "other pairs had a part in it"
    assert (rows[2].cost_nanousd, rows[2].output_tokens) == (12_000, 20)
