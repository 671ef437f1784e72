"""Plans: simulated results against a slow reference, and the plans that a search finds."""

from __future__ import annotations

import random

import numpy as np
import pytest
from synthetic_outcomes import outcomes

from viaticum.errors import InputError
from viaticum.routers.query.outcome_matrix import Array, OutcomeMatrix
from viaticum.routers.query.plans import COST_WEIGHTS, IndexedPlan, Plan, search, simulate
from viaticum.types import Pair


def reference(plan: IndexedPlan, correct: Array, cost: Array, answers: Array) -> tuple[float, float, int]:
    """The result on one question, read literally from the docstring of `viaticum.routers.query.plans`."""
    order, need = plan
    given: list[int] = []
    for calls, pair in enumerate(order, 1):
        given.append(pair)
        votes = [sum(answers[a] == answers[b] for b in given) for a in given]
        if max(votes) >= need or calls == len(order):
            best = max(i for i, vote in enumerate(votes) if vote == max(votes))
            return correct[given[best]], sum(cost[p] for p in given), calls
    raise AssertionError


def test_simulating_a_plan_follows_its_rule() -> None:
    rng, numpy_rng = random.Random(0), np.random.default_rng(0)
    for _ in range(60):
        pairs = rng.randint(1, 6)
        answers = numpy_rng.integers(0, 3, (25, pairs))
        correct = (answers == 0).astype(float)
        cost = numpy_rng.random((25, pairs))
        order = tuple(rng.sample(range(pairs), rng.randint(1, pairs)))
        plan = (order, rng.choice([2, 3]))
        results, spent, calls = simulate(plan, correct, cost, answers)
        for row in range(25):
            wanted = reference(plan, correct[row], cost[row], answers[row])
            assert (results[row], pytest.approx(spent[row]), calls[row]) == wanted


def test_answers_that_agree_are_the_same_answer_so_either_counts() -> None:
    """`simulate` takes the last of the answers that agree; equal answers are judged alike in the table."""
    matrix = OutcomeMatrix.from_outcomes(outcomes(90))
    one, two = simulate(((0, 1), 2), matrix.correct, matrix.cost, matrix.answers)[:2]
    agree = matrix.answers[:, 0] == matrix.answers[:, 1]
    assert np.array_equal(one[agree], matrix.correct[agree, 0])
    assert np.array_equal(two, matrix.cost[:, 0] + matrix.cost[:, 1])


def test_a_search_finds_what_an_exhaustive_search_finds() -> None:
    """With few pairs every plan of the same lengths can be tried: for each cost weight the best is found."""
    from itertools import permutations

    matrix = OutcomeMatrix.from_outcomes(outcomes(200))
    table = matrix.correct, matrix.cost, matrix.answers
    clusters = np.zeros(len(matrix), dtype=np.int64)
    plans = search(*table, clusters)
    every = [
        (order, need)
        for need in (2, 3)
        for length in range(1, 5)
        for order in permutations(range(4), length)
        if length == 1 or length >= need
    ]

    def best(plans: list[IndexedPlan], weight: float) -> float:
        return max(
            float((correct - weight * cost).mean())
            for correct, cost, _ in (simulate(plan, *table) for plan in plans)
        )

    for weight in COST_WEIGHTS:
        assert best(plans, weight) == pytest.approx(best(every, weight), abs=1e-9)


def test_a_search_covers_each_cluster_of_questions() -> None:
    rows = outcomes(300)
    matrix = OutcomeMatrix.from_outcomes(rows)
    clusters = np.array([["sums", "kin", "games"].index(dataset) for dataset, _ in matrix.ids])
    plans = search(matrix.correct, matrix.cost, matrix.answers, clusters)
    named = [Plan(tuple(matrix.pairs[n] for n in order), need) for order, need in plans]
    assert len(set(named)) == len(named)
    assert any(len(plan.pairs) > 1 and plan.pairs[0].model == "tiny" for plan in named)
    assert any(plan.pairs[0].model in ("mid", "big") for plan in named)


def test_plans_are_validated_and_printed() -> None:
    a, b, c = Pair("a", "x"), Pair("b", "x"), Pair("c", "y")
    assert str(Plan((a,))) == "a+x"
    assert str(Plan((a, b, c))) == "a+x, b+x, c+y until two agree"
    assert str(Plan((a, b, c), 3)) == "a+x, b+x, c+y until three agree"
    for pairs, need in (((), 2), ((a, a), 2), ((a, b), 1)):
        with pytest.raises(InputError):
            Plan(pairs, need)
