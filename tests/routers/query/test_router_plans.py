"""Plans: what they do on known answers, against a slow reading of their rule; and which of them a search finds."""

from __future__ import annotations

import random

import numpy as np
import pytest
from question_grids import outcomes

from viaticum.errors import InputError
from viaticum.routers.query.outcome_matrix import Array, OutcomeMatrix
from viaticum.routers.query.plans import WEIGHTS, Plan, Steps, search, simulate
from viaticum.types import Pair


def slowly(steps: Steps, correct: Array, cost: Array, answers: Array) -> tuple[float, float, int]:
    """One question, as the docstring has it."""
    order, need = steps
    given: list[int] = []
    for calls, pair in enumerate(order, 1):
        given.append(pair)
        votes = [sum(answers[a] == answers[b] for b in given) for a in given]
        if max(votes) >= need or calls == len(order):
            best = max(i for i, vote in enumerate(votes) if vote == max(votes))
            return correct[given[best]], sum(cost[p] for p in given), calls
    raise AssertionError


def test_playing_a_plan_follows_its_rule() -> None:
    dice, numbers = random.Random(0), np.random.default_rng(0)
    for _ in range(60):
        pairs = dice.randint(1, 6)
        answers = numbers.integers(0, 3, (25, pairs))
        correct = (answers == 0).astype(float)
        cost = numbers.random((25, pairs))
        order = tuple(dice.sample(range(pairs), dice.randint(1, pairs)))
        steps = (order, dice.choice([2, 3]))
        right, spent, calls = simulate(steps, correct, cost, answers)
        for row in range(25):
            wanted = slowly(steps, correct[row], cost[row], answers[row])
            assert (right[row], pytest.approx(spent[row]), calls[row]) == wanted


def test_answers_that_agree_are_the_same_answer_so_either_is_right() -> None:
    """`simulate` takes the last of those that agree; a table in which equal answers are judged alike makes no difference."""
    grid = OutcomeMatrix.from_outcomes(outcomes(90))
    one, two = simulate(((0, 1), 2), grid.correct, grid.cost, grid.answers)[:2]
    agree = grid.answers[:, 0] == grid.answers[:, 1]
    assert np.array_equal(one[agree], grid.correct[agree, 0])
    assert np.array_equal(two, grid.cost[:, 0] + grid.cost[:, 1])


def test_a_search_finds_what_trying_everything_finds() -> None:
    """With few pairs every plan of the same lengths can be tried: for each worth of a dollar the best is found."""
    from itertools import permutations

    grid = OutcomeMatrix.from_outcomes(outcomes(200))
    table = grid.correct, grid.cost, grid.answers
    kinds = np.zeros(len(grid), dtype=np.int64)
    found = search(*table, kinds)
    every = [
        (order, need)
        for need in (2, 3)
        for length in range(1, 5)
        for order in permutations(range(4), length)
        if length == 1 or length >= need
    ]

    def best(plans: list[Steps], worth: float) -> float:
        return max(
            float((right - worth * cost).mean())
            for right, cost, _ in (simulate(plan, *table) for plan in plans)
        )

    for worth in WEIGHTS:
        assert best(found, worth) == pytest.approx(best(every, worth), abs=1e-9)


def test_a_search_looks_at_each_kind_of_question() -> None:
    rows = outcomes(300)
    grid = OutcomeMatrix.from_outcomes(rows)
    kinds = np.array([["sums", "kin", "games"].index(dataset) for dataset, _ in grid.ids])
    found = search(grid.correct, grid.cost, grid.answers, kinds)
    lines = [Plan(tuple(grid.pairs[n] for n in order), need) for order, need in found]
    assert len(set(lines)) == len(lines)
    assert any(len(plan.pairs) > 1 and plan.pairs[0].model == "tiny" for plan in lines)
    assert any(plan.pairs[0].model in ("mid", "big") for plan in lines)


def test_plans_are_checked_and_read_well() -> None:
    a, b, c = Pair("a", "x"), Pair("b", "x"), Pair("c", "y")
    assert str(Plan((a,))) == "a+x"
    assert str(Plan((a, b, c))) == "a+x, b+x, c+y until two agree"
    assert str(Plan((a, b, c), 3)) == "a+x, b+x, c+y until three agree"
    for pairs, need in (((), 2), ((a, a), 2), ((a, b), 1)):
        with pytest.raises(InputError):
            Plan(pairs, need)
