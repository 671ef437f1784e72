"""The knapsack behind a batch: against linear programming and against trying everything."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from viaticum.budgets.allocate import SKIPPED, Allocation, allocate, choose_at, with_reserve
from viaticum.errors import InputError


def table(questions: int, options: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Worth that tends to rise with cost, as accuracy does."""
    rng = np.random.default_rng(seed)
    cost = rng.lognormal(0, 1, (questions, options)) * np.geomspace(1, 100, options)
    worth = np.clip(
        rng.beta(2, 2, (questions, 1)) + 0.1 * np.log(cost) * rng.random((questions, options)), 0, 1
    )
    return worth, cost


def relaxed(worth: np.ndarray, cost: np.ndarray, budget: float, others: list | None = None) -> float:
    """The optimum of the linear programme: shares of ways, at most one way a question in all."""
    questions, options = worth.shape
    one_each = np.kron(np.eye(questions), np.ones(options))
    above = np.vstack([one_each, cost.ravel()[None], *[row.ravel()[None] for row, _ in others or []]])
    limits = np.concatenate([np.ones(questions), [budget], [most for _, most in others or []]])
    found = linprog(-worth.ravel(), A_ub=above, b_ub=limits, bounds=(0, 1))
    assert found.status == 0
    return float(-found.fun)


@pytest.mark.parametrize("share", [0.001, 0.02, 0.1, 0.3, 0.7, 1.5])
def test_all_but_one_question_of_the_linear_programme(share: float) -> None:
    worth, cost = table(60, 8)
    budget = share * cost.max(1).sum()
    found = allocate(worth, cost, budget)
    best = relaxed(worth, cost, budget)
    assert found.cost <= budget
    assert found.bound == pytest.approx(best, rel=1e-6)
    assert best - 1 <= found.worth <= best + 1e-9, "a question is worth at most 1"


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_never_over_budget_and_one_question_from_the_best(data: st.DataObject) -> None:
    questions, options = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    numbers = st.lists(st.integers(0, 9), min_size=questions * options, max_size=questions * options)
    worth, cost = (np.array(data.draw(numbers), dtype=float).reshape(questions, options) for _ in range(2))
    budget = data.draw(st.integers(1, 30))
    found = allocate(worth, cost, budget)
    best = 0.0
    for chosen in itertools.product(range(-1, options), repeat=questions):
        spent = sum(cost[row, option] for row, option in enumerate(chosen) if option >= 0)
        if spent <= budget:
            best = max(best, sum(worth[row, option] for row, option in enumerate(chosen) if option >= 0))
    assert found.cost <= budget
    assert found.worth <= best + 1e-9 <= found.bound + 1e-6
    assert found.worth >= best - worth.max() - 1e-9
    spent = sum(cost[row, option] for row, option in enumerate(found.chosen) if option != SKIPPED)
    assert found.cost == pytest.approx(spent)


def test_a_second_budget_in_seconds() -> None:
    worth, cost = table(60, 6, seed=3)
    seconds = np.random.default_rng(4).random(worth.shape) * 10
    budget, deadline = 0.3 * cost.max(1).sum(), 60.0
    alone = allocate(worth, cost, budget)
    found = allocate(worth, cost, budget, seconds=seconds, deadline=deadline)
    assert found.seconds <= deadline < float(seconds[np.arange(60), alone.chosen].sum())
    assert found.cost <= budget
    best = relaxed(worth, cost, budget, [(seconds, deadline)])
    assert best - 2 <= found.worth <= best + 1e-9, "two budgets cost two questions at most"
    assert found.bound >= best - 1e-6
    free = allocate(worth, cost, budget, seconds=seconds, deadline=1e9)
    assert (free.chosen == alone.chosen).all()


def test_chance_seldom_breaks_the_budget() -> None:
    worth, cost = table(400, 5, seed=5)
    spread = 0.8 * cost
    budget = 0.2 * cost.max(1).sum()
    found = allocate(worth, cost, budget, spread=spread, risk=0.05)
    plain = allocate(worth, cost, budget)
    assert 0 < found.reserve < 0.2 * budget
    assert found.cost <= budget - found.reserve

    def breaks(chosen: Allocation) -> float:
        rng = np.random.default_rng(6)
        rows = np.arange(400)
        mean, deviation = cost[rows, chosen.chosen], spread[rows, chosen.chosen]
        drawn = mean + deviation * rng.standard_normal((4000, 400))
        return float((drawn.sum(1) > budget).mean())

    assert breaks(found) <= 0.06
    assert breaks(plain) > 0.3


def test_room_for_chance_is_that_of_what_is_chosen_in_the_end() -> None:
    """All of the risky way would need more room than there is money."""
    worth, cost = np.tile([0.5, 0.9], (100, 1)), np.tile([1.0, 3.0], (100, 1))
    found = allocate(worth, cost, 320, spread=np.tile([0.0, 30.0], (100, 1)))
    risky = int((found.chosen == 1).sum())
    assert 6 <= risky <= 8, "100 + 2 n + 2.33 * 30 * sqrt(n) comes to 320 at n = 7.7"
    assert (found.chosen == 0).sum() == 100 - risky
    assert found.cost + found.reserve <= 320


@pytest.mark.parametrize("grows", [0.5, 0.99, 1.2])
def test_room_is_found_where_less_money_means_more_chance(grows: float) -> None:
    """As where it is given to fewer questions that cost more each."""
    tried: list[float] = []

    def find(reserve: float) -> tuple[float, float]:
        tried.append(reserve)
        return reserve, min(100 + grows * reserve, 400)

    found, reserve = with_reserve(find, 1000)
    least = 400 if grows > 0.75 else 100 / (1 - grows)
    assert least <= found == reserve <= least + 60
    assert len(tried) <= 11


def test_few_and_many_questions_are_chosen_alike() -> None:
    rng = np.random.default_rng(9)
    worth, cost = (rng.integers(0, 6, (20_000, 5)).astype(float) for _ in range(2))
    worth[rng.random(worth.shape) < 0.1] = -np.inf
    for price in (0.0, 0.5, 1.0, 2.0, 1e30):
        many = choose_at(worth, cost, price)
        few = np.concatenate(
            [choose_at(worth[at : at + 500], cost[at : at + 500], price) for at in range(0, 20_000, 500)]
        )
        assert (many == few).all()


def test_ways_that_a_question_does_not_have_are_never_taken() -> None:
    worth = np.array([[0.9, np.nan], [np.nan, np.nan], [0.5, 0.8]])
    cost = np.array([[np.nan, 1.0], [1.0, 1.0], [1.0, 2.0]])
    assert allocate(worth, cost, 100).chosen.tolist() == [SKIPPED, SKIPPED, 1]


def test_a_free_way_is_taken_even_where_nothing_else_fits() -> None:
    found = allocate(np.array([[0.2, 0.9]] * 3), np.array([[0.0, 10.0]] * 3), 15)
    assert sorted(found.chosen.tolist()) == [0, 0, 1]
    assert allocate(np.array([[0.2, 0.9]]), np.array([[3.0, 10.0]]), 1).chosen.tolist() == [SKIPPED]


def test_single_precision_is_good_enough() -> None:
    worth, cost = table(500, 10, seed=7)
    budget = 0.1 * cost.max(1).sum()
    double, single = allocate(worth, cost, budget), allocate(worth.astype("f4"), cost.astype("f4"), budget)
    assert single.worth == pytest.approx(double.worth, rel=1e-4)
    assert single.cost <= budget


def test_no_questions() -> None:
    found = allocate(np.empty((0, 3)), np.empty((0, 3)), 1)
    assert (len(found.chosen), found.worth, found.cost) == (0, 0.0, 0.0)


ONE = np.ones((2, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ONE, np.ones((2, 3)), 1), "as worth"),
        ((np.ones(2), ONE, 1), "questions, ways"),
        ((-ONE, ONE, 1), "negative or infinite"),
        ((ONE, ONE * np.inf, 1), "negative or infinite"),
        ((ONE, ONE, 0), "above zero"),
        ((ONE, ONE, float("nan")), "above zero"),
    ],
)
def test_bad_input(arguments: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        allocate(*arguments)
    with pytest.raises(InputError, match="or neither"):
        allocate(ONE, ONE, 1, seconds=ONE)
    with pytest.raises(InputError, match="risk"):
        allocate(ONE, ONE, 1, spread=ONE, risk=1.0)
