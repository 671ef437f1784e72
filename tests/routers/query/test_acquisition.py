"""Which outcomes to buy next: spread out first, hopeless pairs dropped, then where the choice is open."""

from __future__ import annotations

import numpy as np
import pytest
from synthetic_outcomes import PAIRS, SKILLS, Words, outcomes

from viaticum.errors import InputError
from viaticum.routers.query.acquisition import (
    AcquisitionSettings,
    Cell,
    KnownOutcomes,
    acquire,
    find_hopeless,
    next_round,
    spread_out,
)
from viaticum.routers.query.outcome_matrix import Array, OutcomeMatrix

PRICES = np.array([SKILLS[pair][1] * SKILLS[pair][2] for pair in PAIRS])


def table(count: int = 240, seed: int = 0) -> tuple[OutcomeMatrix, Array]:
    matrix = OutcomeMatrix.from_outcomes(outcomes(count, seed))
    return matrix, Words()(matrix.texts).numpy()


def nothing_known(matrix: OutcomeMatrix, x: Array) -> KnownOutcomes:
    empty = np.full(matrix.correct.shape, np.nan)
    return KnownOutcomes(x, empty, empty.copy(), PRICES)


def test_questions_that_are_spread_out_cover_every_kind() -> None:
    centres = np.eye(8)[np.repeat(np.arange(8), (60, 20, 8, 4, 3, 2, 2, 1))]
    rng = np.random.default_rng(0)
    x = centres + 0.01 * rng.standard_normal(centres.shape)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    chosen = spread_out(x, 8, seed=3)
    assert len(set(centres[chosen].argmax(1).tolist())) == 8
    assert spread_out(x, 8, seed=3) == chosen
    assert sorted(spread_out(x, 1_000)) == list(range(100))
    same = np.tile(x[:1], (5, 1))
    assert sorted(spread_out(same, 5)) == list(range(5)), "equal texts are taken in the end"


def test_the_first_round_asks_every_pair_within_its_share() -> None:
    matrix, x = table()
    first = next_round(nothing_known(matrix, x), 1.0)
    assert first.dropped == ()
    asked = [cell.question for cell in first.cells]
    assert {asked.count(question) for question in asked} == {len(PAIRS)}
    assert len(set(asked)) == int(0.25 / PRICES.sum())
    assert first.dollars <= 0.25


def test_money_for_no_question_buys_nothing() -> None:
    matrix, x = table(30)
    assert next_round(nothing_known(matrix, x), 0.5 * float(PRICES.sum())).cells == ()


def known_rows(matrix: OutcomeMatrix, x: Array, rows: Array) -> KnownOutcomes:
    known = nothing_known(matrix, x)
    known.correct[rows], known.cost[rows] = matrix.correct[rows], matrix.cost[rows]
    return known


def test_a_pair_that_costs_more_and_does_less_everywhere_is_dropped() -> None:
    matrix, x = table()
    known = known_rows(matrix, x, np.arange(240))
    worse = PAIRS.index(next(pair for pair in PAIRS if str(pair) == "tiny+cot"))
    rng = np.random.default_rng(1)
    known.correct[:, worse] = known.correct[:, PAIRS.index(PAIRS[0])] * 0  # never right, and not the cheapest
    known.correct[rng.integers(0, 240, 6), worse] = 1
    (found,) = [each for each in find_hopeless(known) if each.pair == worse]
    assert found.low > 0
    assert found.low < found.difference < found.high
    few = known_rows(matrix, x, np.arange(4))
    few.correct[:4, worse] = 0
    assert find_hopeless(few) == [], "four questions are no proof"


def test_a_pair_that_is_better_somewhere_stays() -> None:
    """Worse on the whole, better on one kind of question: a router has a use for it."""
    rng = np.random.default_rng(0)
    x = np.repeat(np.eye(4), (60, 60, 60, 60), axis=0)
    skills = np.where(np.arange(240)[:, None] < 60, (0.1, 0.8), (0.9, 0.2))
    correct = (rng.random((240, 2)) < skills).astype(float)
    known = KnownOutcomes(x, correct, np.full((240, 2), (1.0, 2.0)), np.array([1.0, 2.0]))
    assert correct[:, 0].mean() > correct[:, 1].mean() + 0.2
    assert find_hopeless(known) == []
    never = np.stack((correct[:, 0], np.zeros(240)), 1)
    worse_everywhere = KnownOutcomes(x, never, known.cost, known.prices)
    assert [each.pair for each in find_hopeless(worse_everywhere)] == [1]


def test_further_questions_are_those_where_the_choice_is_open() -> None:
    """On one half the cheap pair is always right; on the other half either pair may be the better one."""
    rng = np.random.default_rng(0)
    side = np.repeat([0, 1], 200)
    x = np.eye(8)[side * 4 + rng.integers(0, 4, 400)] + 0.05 * rng.standard_normal((400, 8))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    empty = np.full((400, 2), np.nan)
    known = KnownOutcomes(x, empty, empty.copy(), np.array([1.0, 3.0]))
    start = np.concatenate((np.arange(0, 200, 5), np.arange(200, 400, 5)))
    known.correct[start] = np.where(side[start, None] == 0, 1.0, rng.random((80, 2)) < 0.5)
    known.cost[start] = (1.0, 3.0)
    found = next_round(known, 120.0)
    assert found.cells
    assert found.dollars <= 120.0
    assert np.mean([side[cell.question] for cell in found.cells]) > 0.8
    assert all(np.isnan(known.correct[cell.question, cell.pair]) for cell in found.cells)


def test_acquiring_never_spends_more_than_it_has() -> None:
    matrix, x = table()

    def ask(cell: Cell, left: float) -> tuple[float, float] | None:
        dollars = float(matrix.cost[cell[:2]])
        return None if dollars > left else (float(matrix.correct[cell[:2]]), dollars)

    money = 0.4 * float(matrix.cost.sum())
    bought = acquire(x, PRICES, money, ask)
    assert 0.8 * money < bought.known.spent <= money
    assert sum(bought.rounds) == bought.known.asked.sum()
    asked = bought.known.asked
    assert asked.sum() < asked.size
    assert (bought.known.correct[asked] == matrix.correct[asked]).all()
    again = acquire(x, PRICES, money, ask)
    assert (again.known.asked == asked).all(), "the same seed buys the same outcomes"
    everything = acquire(x, PRICES, 100.0, ask, AcquisitionSettings(contention=0.0, doubt=1e9))
    assert everything.known.asked.all()


def test_shapes_and_settings_are_checked() -> None:
    with pytest.raises(InputError, match="have the shape"):
        KnownOutcomes(np.eye(3), np.zeros((3, 2)), np.zeros((2, 3)), np.ones(2))
    with pytest.raises(InputError, match="first_share"):
        AcquisitionSettings(first_share=0)
