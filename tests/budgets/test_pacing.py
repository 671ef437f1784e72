"""Pacing of a job's budget: simulated jobs with random real costs, against hard limits and the optimum."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from scipy.optimize import linprog

from viaticum.budgets.allocate import SKIPPED, allocate
from viaticum.budgets.pacing import Pacer, preview
from viaticum.errors import InputError
from viaticum.quantiles import moments

CV = 0.6  # of real costs around what is expected


def table(rows: int, options: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Worth that tends to rise with cost, as accuracy does; costs in nano-dollars."""
    rng = np.random.default_rng(seed)
    cost = rng.lognormal(0, 0.5, (rows, options)) * np.geomspace(1e5, 1e7, options)
    worth = np.clip(rng.beta(2, 2, (rows, 1)) + 0.08 * np.log(cost / 1e5) * rng.random((rows, options)), 0, 1)
    return worth, cost


def relaxed(worth: np.ndarray, cost: np.ndarray, budget: float) -> float:
    """The optimum of the linear programme: shares of ways, at most one way a question in all."""
    from scipy.sparse import coo_array, csr_array, vstack

    questions, options = worth.shape
    one_each = coo_array(
        (
            np.ones(questions * options),
            (np.repeat(np.arange(questions), options), np.arange(questions * options)),
        )
    )
    above = vstack([csr_array(one_each), csr_array(cost.ravel()[None] / budget)])
    limits = np.append(np.ones(questions), 1.0)
    found = linprog(-worth.ravel(), A_ub=above, b_ub=limits, bounds=(0, 1), method="highs")
    assert found.status == 0
    return float(-found.fun)


@dataclass
class Job:
    """A job run with a pacer: rows in flight, settled in the order in which they began, under a hard cap.

    real [Q, W]: what each way would really cost; worst [W]: what is held for it beforehand.
    """

    worth: np.ndarray
    cost: np.ndarray
    real: np.ndarray
    budget: float
    pacer: Pacer
    spread: np.ndarray | None = None
    seconds: np.ndarray | None = None
    in_flight: int = 16
    worst: np.ndarray | None = None
    options: list[int] = field(default_factory=list)
    spent: float = 0.0
    refused: int = 0

    def run(self, rows: int | None = None) -> Job:
        end = len(self.worth) if rows is None else len(self.options) + rows
        flight: list[tuple[int, int, int]] = []  # row, way planned, way taken
        while len(self.options) < end:
            first = len(self.options)
            block = slice(first, min(end, first + self.pacer.stride(64)))
            named = {
                name: None if (values := getattr(self, name)) is None else values[block]
                for name in ("spread", "seconds")
            }
            for row, option in enumerate(
                self.pacer.choose(self.worth[block], self.cost[block], **named).tolist(), first
            ):
                if len(flight) >= self.in_flight:
                    self.settle([flight.pop(0)])
                while (took := self.held(option, flight)) == SKIPPED and flight and option != SKIPPED:
                    self.settle([flight.pop(0)])
                self.refused += took == SKIPPED and option != SKIPPED
                flight.append((row, option, took))
                self.options.append(took)
        for each in flight:
            self.settle([each])
        return self

    def held(self, option: int, flight: list[tuple[int, int, int]]) -> int:
        """The way, or none where its worst case does not fit beside those in flight."""
        if self.worst is None or option == SKIPPED:
            return option
        holds = sum(self.worst[took] for _, _, took in flight if took != SKIPPED)
        return option if self.spent + holds + self.worst[option] <= self.budget else SKIPPED

    def settle(self, done: list[tuple[int, int, int]]) -> None:
        rows, options, took = (np.array(each) for each in zip(*done, strict=True))
        expected, actual = (
            np.where(which == SKIPPED, 0.0, values[rows, which])
            for values, which in ((self.cost, options), (self.real, took))
        )
        told: dict[str, Any] = {"learn": options == took}
        if self.spread is not None:
            told["spread"] = np.where(options == SKIPPED, 0.0, self.spread[rows, options])
        if self.seconds is not None:
            each = np.where(took == SKIPPED, 0.0, self.seconds[rows, took])
            told |= {"expected_seconds": each, "seconds": each}
        self.pacer.settle(options, expected, actual, **told)
        self.spent += float(actual.sum())

    @property
    def right(self) -> float:
        options = np.array(self.options)
        return float(np.where(options == SKIPPED, 0.0, self.worth[np.arange(len(options)), options]).sum())


def job(
    rows: int = 1500,
    *,
    bias: float | np.ndarray = 1.0,
    seed: int = 0,
    sample: int = 400,
    share: float = 0.25,
    **more: Any,
) -> Job:
    """Costs are expected right but for `bias`: real ones are that many times as high on average."""
    worth, cost = table(rows, seed=seed)
    rng = np.random.default_rng(seed + 1000)
    deviation = np.sqrt(np.log(1 + CV**2))
    real = cost * bias * rng.lognormal(-(deviation**2) / 2, deviation, cost.shape)
    budget = share * float((cost * bias).max(1).sum())
    at = np.sort(rng.choice(rows, sample, replace=False))
    pacer = Pacer(worth[at], cost[at], rows=rows, budget=budget, spread=CV * cost[at], at=at)
    return Job(worth, cost, real, budget, pacer, spread=CV * cost, **more)


@pytest.mark.parametrize("seed", range(6))
def test_what_is_spent_comes_close_to_the_budget_and_the_plan_to_the_best(seed: int) -> None:
    worst = 4 * table(1500, seed=seed)[1].mean(0)
    done = job(seed=seed, worst=worst).run()
    assert 0.97 * done.budget <= done.spent <= done.budget
    # The best with the costs that were expected: nobody knows the real ones.
    assert done.right >= 0.99 * relaxed(done.worth, done.cost, done.budget)
    assert done.refused <= 3


@pytest.mark.parametrize("bias", [1.5, 0.67])
def test_predictions_that_are_off_are_corrected(bias: float) -> None:
    done = job(bias=bias, seed=3).run()
    assert 0.97 * done.budget <= done.spent <= 1.005 * done.budget
    assert done.right >= 0.985 * relaxed(done.worth, bias * done.cost, done.budget)


def test_ways_are_corrected_one_by_one() -> None:
    bias = np.array([1, 1, 1, 1, 1, 2.0])
    done = job(bias=bias, seed=4, rows=3000).run()
    ratio = done.pacer.ratios
    assert ratio[5] > 1.6
    assert (np.abs(ratio[1:4] - 1) < 0.25).all()
    assert done.right >= 0.985 * relaxed(done.worth, done.cost * bias, done.budget)


def test_costs_that_scatter_more_than_was_expected_are_given_more_room() -> None:
    told = job(seed=11, rows=2000)
    told.spread = told.spread / 3
    done = told.run(1500)
    scatters = done.pacer._corrections.scatters
    assert 2 < scatters.min() < scatters.max() < 4


def test_a_sample_of_all_rows_makes_an_exact_plan_even_where_they_are_sorted() -> None:
    worth, cost = table(600, seed=5)
    order = np.argsort(worth.max(1))
    worth, cost = worth[order], cost[order]
    budget = 0.2 * float(cost.max(1).sum())
    pacer = Pacer(worth, cost, rows=600, budget=budget, at=np.arange(600))
    done = Job(worth, cost, cost, budget, pacer).run()
    assert done.spent <= budget
    assert done.right >= relaxed(worth, cost, budget) - 1.5


def test_money_is_kept_for_rows_to_come_that_make_more_of_it() -> None:
    worth, cost = np.tile([0.3, 0.4], (600, 1)), np.tile([1.0, 10.0], (600, 1))
    worth[300:, 1] = 0.8
    budget, at = 300 * 1.0 + 300 * 10.0 + 1.0, np.arange(0, 600, 2)
    pacer = Pacer(worth[at], cost[at], rows=600, budget=budget, at=at)
    done = Job(worth, cost, cost, budget, pacer).run()
    assert done.spent <= budget
    assert sum(option == 1 for option in done.options[300:]) >= 295
    assert done.right >= 0.99 * relaxed(worth, cost, budget)


def test_rows_with_one_and_the_same_table_are_given_two_ways_in_the_right_shares() -> None:
    worth, cost = np.tile([0.5, 0.9], (1000, 1)), np.tile([1e5, 1e7], (1000, 1))
    pacer = Pacer(worth[:50], cost[:50], rows=1000, budget=4e9)
    done = Job(worth, cost, cost, 4e9, pacer).run()
    assert 0.99 * 4e9 <= done.spent <= 4e9
    options = np.array(done.options)
    halves = [int((part == 1).sum()) for part in (options[:500], options[500:])]
    assert abs(halves[0] - halves[1]) < 20, "spread over the job, not taken by those who come first"


def test_a_deadline_holds_beside_the_budget() -> None:
    worth, cost = table(800, seed=6)
    seconds = np.random.default_rng(7).random(cost.shape) * 2
    budget = 0.4 * float(cost.max(1).sum())
    alone = allocate(worth, cost, budget)
    took = float(seconds[np.arange(800), np.maximum(alone.chosen, 0)].sum())
    pacer = Pacer(
        worth[::4],
        cost[::4],
        rows=800,
        budget=budget,
        seconds=seconds[::4],
        deadline=took / 2,
        at=np.arange(0, 800, 4),
    )
    done = Job(worth, cost, cost, budget, pacer, seconds=seconds).run()
    options = np.array(done.options)
    spent = float(np.where(options == SKIPPED, 0, seconds[np.arange(800), options]).sum())
    assert 0.97 * took / 2 <= spent <= 1.001 * took / 2
    assert done.spent <= budget
    best = allocate(worth, cost, budget, seconds=seconds, deadline=took / 2)
    assert done.right >= 0.985 * best.worth


@pytest.mark.parametrize("rows", [8, 200], ids=["the last rows", "a block of many"])
@pytest.mark.parametrize(
    ("budget", "deadline", "short"),
    [(1e6, 5.0, True), (1e6, 1e6, False), (5.0, 1e6, False), (5.0, 5.0, False), (5.0, 1.0, True)],
)
def test_whether_time_or_money_left_rows_out_is_known(
    rows: int, budget: float, deadline: float, short: bool
) -> None:
    """Rows of one option that costs 1 and takes a second: 8 planned of as many, or of 200."""
    ones = np.ones((rows, 1))
    pacer = Pacer(ones, ones, rows=rows, budget=budget, seconds=ones, deadline=deadline)
    chosen = pacer.choose(ones[:8], ones[:8], seconds=ones[:8], elapsed=0.0)
    assert pacer.is_short_of_time == short
    assert (SKIPPED in chosen) == (min(budget, deadline) < rows)


def test_the_last_rows_are_chosen_as_by_two_allocations() -> None:
    """The choice that the budget alone allows, where it is in time; else the one that keeps the deadline."""
    rng = np.random.default_rng(11)
    shorts = []
    for _ in range(150):
        shape = rows, _ = int(rng.integers(1, 30)), int(rng.integers(1, 5))
        worth, cost, seconds = rng.random(shape), rng.random(shape) * 10, rng.random(shape) * 3
        seconds[rng.random(shape) < 0.1] = np.nan
        spread = cost * rng.random(shape) if rng.random() < 0.7 else None
        budget, deadline = rows * 10 * float(rng.random()) + 0.1, rows * 3 * float(rng.random()) + 0.1
        terms: dict[str, Any] = {"spread": spread, "seconds": np.nan_to_num(seconds)}
        free = allocate(worth, cost, budget, **terms, deadline=math.inf)
        expected, short = free.chosen, free.seconds > deadline
        if short:
            expected = allocate(worth, cost, budget, **terms, deadline=deadline).chosen
        pacer = Pacer(
            worth, cost, rows=rows, budget=budget, spread=spread, seconds=seconds, deadline=deadline
        )
        chosen = pacer.choose(worth, cost, spread, seconds, elapsed=0.0)
        assert (chosen == expected).all()
        assert pacer.is_short_of_time == short
        took = np.where(chosen == SKIPPED, 0.0, terms["seconds"][np.arange(rows), chosen])
        assert took.sum() <= deadline * (1 + 1e-9)
        shorts.append(short)
    assert 30 < sum(shorts) < 120


def test_a_clock_that_runs_faster_than_expected_makes_rows_quicker() -> None:
    worth, seconds = np.tile([0.5, 0.9], (1000, 1)), np.tile([0.1, 1.0], (1000, 1))
    cost = np.tile([1.0, 2.0], (1000, 1))
    pacer = Pacer(worth[:10], cost[:10], rows=1000, budget=1e9, seconds=seconds[:10], deadline=800.0)
    clock, options = 0.0, []
    for first in range(0, 1000, 10):
        part = slice(first, first + 10)
        chosen = pacer.choose(worth[part], cost[part], seconds=seconds[part], elapsed=clock)
        expected = np.where(chosen == SKIPPED, 0.0, seconds[part][np.arange(10), chosen])
        clock += 2 * float(expected.sum())
        pacer.settle(chosen, cost[part][np.arange(10), chosen], np.ones(10), expected_seconds=expected)
        options += chosen.tolist()
    assert 0.95 * 800 <= clock <= 1.02 * 800
    assert options.count(SKIPPED) == 0


def test_a_job_that_was_killed_goes_on_with_what_it_knew() -> None:
    first = job(bias=1.5, seed=8).run(700)
    kept = json.loads(json.dumps(first.pacer.state()))
    again = job(bias=1.5, seed=8)
    again.options, again.spent = list(first.options), first.spent
    again.pacer.resume(kept)
    assert again.pacer.ratios == pytest.approx(first.pacer.ratios)
    assert again.pacer.spent == pytest.approx(first.spent)
    again.run()
    assert 0.97 * again.budget <= again.spent <= 1.005 * again.budget


def test_the_forecast_closes_in_on_what_is_spent() -> None:
    done = job(seed=9)
    before = done.pacer.forecast()
    for _ in range(3):
        done.run(500)
    assert before.cost_p50 <= before.cost_p90 <= before.budget_nanousd == round(done.budget)
    assert before.cost_p50 == pytest.approx(done.spent, rel=0.05)
    assert before.accuracy == pytest.approx(done.right / 1500, abs=0.03)
    after = done.pacer.forecast()
    assert after.cost_p50 == after.cost_p90 == pytest.approx(done.spent)
    assert after.accuracy == pytest.approx(done.right / 1500)


def test_more_money_than_is_needed_is_not_spent() -> None:
    done = job(seed=10, share=3.0)
    told = done.pacer.forecast()
    assert told.cost_p90 < told.budget_nanousd
    done.run()
    best = done.worth.max(1).sum()
    assert done.right == pytest.approx(best)
    assert told.cost_p50 == pytest.approx(done.spent, rel=0.15)


def test_previews_of_budgets_rise() -> None:
    worth, cost = table(300)
    whole = float(cost.max(1).sum()) * 10
    told = preview(worth, cost, [round(share * whole) for share in (0.02, 0.1, 0.5)], rows=3000)
    assert [each.accuracy for each in told] == sorted(each.accuracy for each in told)
    for each in told:
        assert each.cost_p50 <= each.cost_p90 <= each.budget_nanousd
    best = relaxed(worth, cost, 0.1 * whole / 10) / 300
    assert told[1].accuracy == pytest.approx(best, rel=0.01)


def test_nothing_left_leaves_what_is_free() -> None:
    worth, cost = np.tile([0.2, 0.9], (20, 1)), np.tile([0.0, 10.0], (20, 1))
    pacer = Pacer(worth, cost, rows=20, budget=100)
    first = pacer.choose(worth[:10], cost[:10])
    pacer.settle(first, np.where(first == 1, 10.0, 0.0), np.full(10, 30.0))
    assert pacer.choose(worth[:5], cost[:5]).tolist() == [0] * 5
    assert pacer.choose(worth[:5], cost[:5]).tolist() == [0] * 5
    assert pacer.rows_left == 0


def test_ways_that_a_row_does_not_have() -> None:
    worth = np.array([[0.9, np.nan], [np.nan, np.nan], [0.5, 0.8], [0.5, 0.8]])
    cost = np.array([[np.nan, 1.0], [1.0, 1.0], [1.0, 2.0], [1.0, 2.0]])
    assert Pacer(worth, cost, rows=4, budget=100).choose(worth, cost).tolist() == [SKIPPED, SKIPPED, 1, 1]
    pacer = Pacer(worth, cost, rows=4, budget=100)
    assert pacer.choose(worth[:3], cost[:3]).tolist() == [SKIPPED, SKIPPED, 1]
    pacer.settle(np.array([SKIPPED, SKIPPED, 1]), np.array([0, 0, 2.0]), np.array([0, 0, 2.0]))
    assert pacer.choose(worth[3:], cost[3:]).tolist() == [1]


@pytest.mark.parametrize("most", [None, 2.0, 5.0])
def test_moments_are_those_of_draws(most: float | None) -> None:
    draws = np.random.default_rng(0).lognormal(0.3, 0.8, 400_000)
    if most is not None:
        draws = np.minimum(draws, most)
    mean, spread = moments(np.exp(0.3), np.exp(0.3 + 0.8 * 1.2816), most)
    assert float(mean) == pytest.approx(draws.mean(), rel=0.01)
    assert float(spread) == pytest.approx(draws.std(), rel=0.02)


def test_moments_of_what_is_sure() -> None:
    mean, spread = moments(np.array([0.0, 3.0, 9.0]), np.array([0.0, 3.0, 9.0]), 5.0)
    assert mean.tolist() == [0.0, 3.0, 5.0]
    assert spread.tolist() == [0.0, 0.0, 0.0]


ONE = np.ones((4, 2))


def test_bad_input() -> None:
    with pytest.raises(InputError, match="sample has 1 to 3 rows"):
        Pacer(ONE, ONE, rows=3, budget=1)
    with pytest.raises(InputError, match="above zero"):
        Pacer(ONE, ONE, rows=4, budget=0)
    with pytest.raises(InputError, match="or neither"):
        Pacer(ONE, ONE, rows=4, budget=1, deadline=3)
    with pytest.raises(InputError, match="from 0 to 8"):
        Pacer(ONE, ONE, rows=9, budget=1, at=np.array([1, 2, 3, 9]))
    pacer = Pacer(ONE, ONE, rows=9, budget=1)
    with pytest.raises(InputError, match="2 ways, these rows 3"):
        pacer.choose(np.ones((4, 3)), np.ones((4, 3)))
    with pytest.raises(InputError, match="only 9 of 9"):
        pacer.choose(np.ones((10, 2)), np.ones((10, 2)))
    with pytest.raises(InputError, match="as they were given"):
        pacer.choose(ONE, ONE, spread=ONE)
    with pytest.raises(InputError, match="only 0 were planned"):
        pacer.settle(np.zeros(1, int), np.ones(1), np.ones(1))
    with pytest.raises(InputError, match="is another job"):
        pacer.resume(Pacer(ONE, ONE, rows=8, budget=1).state())
    with pytest.raises(InputError, match="belongs to another job"):
        pacer.resume(Pacer(np.ones((4, 3)), np.ones((4, 3)), rows=9, budget=1).state())
    with pytest.raises(InputError, match="no state"):
        pacer.resume({"rows": 9})
