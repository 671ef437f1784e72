"""Choose an option for each of many questions within a budget: a multiple-choice knapsack.

Lagrangian relaxation (Sinha and Zoltners, 1979): at a given price of money, each question takes the option
with the greatest worth minus price * cost; the price is raised until the total cost fits. What is left over
at that price goes to the questions that gain most per unit of cost, so that the result is optimal but for one
question; `bound`, the value of the relaxation, limits the distance from the optimum.

Works on arrays [Q questions, K options] of expected worth and cost. Leaves out where these come from
(`routers.query`), and the ledger: an expectation is not a hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from statistics import NormalDist
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from viaticum.errors import InputError

Array = NDArray[Any]
Solution = TypeVar("Solution")
SKIPPED = -1
CHUNK = 1 << 16  # rows at a time: a few MB, which fit the CPU cache
SMALL_BATCH = 1 << 13  # up to this many rows, scoring all options at once is faster
BISECTIONS = 80  # of the interval of log prices
MIN_PRICE_RATIO = 1e-12  # of the highest price; lower prices count as zero
RESERVE_ROUNDS = 10  # of the search for the reserve, at most half of them fixed-point steps
RESERVE_TOLERANCE = 2e-3  # part of the budget by which the reserve may exceed what is needed


@dataclass(frozen=True, slots=True)
class Allocation:
    """The result of `allocate`.

    Attributes:
        chosen: option of each question, `SKIPPED` for none [Q].
        worth, cost, seconds: sums of the expectations of the chosen options.
        price: worth that one more unit of budget would add.
        bound: no allocation within the budget has more worth.
        reserve: part of the budget kept for cost variance.
        is_short_of_time: whether the deadline, and not the budget alone, decided.
    """

    chosen: Array
    worth: float
    cost: float
    seconds: float
    price: float
    bound: float
    reserve: float
    is_short_of_time: bool = False


def allocate(
    worth: Array,
    cost: Array,
    budget: float,
    *,
    spread: Array | None = None,
    risk: float = 0.01,
    seconds: Array | None = None,
    deadline: float | None = None,
    pending: float = 0.0,
) -> Allocation:
    """Choose an option for every question.

    Args:
        worth: value of an answer, such as the probability that it is right, >= 0; NaN where a question does
            not have the option [Q, K].
        cost: expected cost in the unit of the budget, >= 0; NaN like `worth` [Q, K].
        budget: upper bound of the total cost.
        spread: standard deviations of the costs [Q, K]; the probability that the total exceeds the budget is
            then at most `risk`, for independent errors.
        risk: see `spread`.
        seconds: expected duration [Q, K].
        deadline: upper bound of the total of `seconds`, in expectation; it changes nothing where the choice
            that the budget alone allows is in time.
        pending: variance of other costs still to be paid from the budget.

    Raises:
        InputError: shapes differ, a number is negative, or budget or deadline is not above zero.
    """
    worth, cost = checked("worth", worth), checked("cost", cost, worth)
    spread = None if spread is None else checked("spread", spread, worth)
    seconds = None if seconds is None else np.nan_to_num(checked("seconds", seconds, worth))
    check_terms(budget, seconds, deadline, risk)
    worth = np.where(np.isnan(worth) | np.isnan(cost), -np.inf, worth)
    cost = np.where(np.isnan(cost), 0.0, cost).astype(cost.dtype)

    def total_of(values: Array | None, found: _Relaxation) -> float:
        return 0.0 if values is None else float(take_chosen(values, found.chosen).sum())

    @cache
    def alone(reserve: float) -> _Relaxation:
        return _within(worth, cost, budget - reserve)

    def in_time(reserve: float) -> _Relaxation:
        assert seconds is not None
        assert deadline is not None
        return _in_time(alone(reserve), worth, cost, budget - reserve, seconds, deadline)

    def with_need(find: Callable[[float], _Relaxation], reserve: float) -> tuple[_Relaxation, float]:
        found = find(reserve)
        if spread is None:
            return found, 0.0
        variance = pending + float((take_chosen(spread, found.chosen) ** 2).sum())
        return found, NormalDist().inv_cdf(1 - risk) * math.sqrt(variance)

    found, reserve = with_reserve(partial(with_need, alone), budget)
    is_late = deadline is not None and total_of(seconds, found) > deadline
    if is_late:
        found, reserve = with_reserve(partial(with_need, in_time), budget)
    return Allocation(
        found.chosen,
        total_of(worth, found),
        total_of(cost, found),
        total_of(seconds, found),
        found.price,
        found.bound,
        reserve,
        is_late,
    )


def with_reserve(find: Callable[[float], tuple[Solution, float]], budget: float) -> tuple[Solution, float]:
    """Return the solution with the smallest sufficient reserve for cost variance, and that reserve.

    A smaller budget usually has less variance, so the variance of the unreserved solution may be far more
    than needed.

    Args:
        find: maps a reserve to a solution and to the reserve that the solution needs.
        budget: upper bound of the reserve.
    """
    found, needed = find(0.0)
    if needed <= 0:
        return found, 0.0
    low, high, enough = 0.0, 0.999 * budget, None
    near = RESERVE_TOLERANCE * budget
    for round_ in range(RESERVE_ROUNDS):
        # A step just past the need is enough while the need follows the reserve; bisection handles jumps.
        reserve = needed + near / 2
        if not low < reserve < high or round_ > RESERVE_ROUNDS // 2:
            reserve = 0.5 * (low + high)
        found, needed = find(reserve)
        if needed <= reserve:
            high, enough = reserve, found
            if reserve - needed <= near:
                break
        else:
            low = reserve
    return (find(high)[0] if enough is None else enough), high


@dataclass(frozen=True, slots=True)
class _Relaxation:
    chosen: Array
    price: float
    bound: float


@dataclass(frozen=True, slots=True)
class Bracket:
    """Two neighbouring prices and their choices: `cheap` [Q] is within the budget, `expensive` [Q] is not.

    Both are the same choice, at price 0, if the budget does not bind. spent: cost of `cheap`.
    """

    cheap: Array
    expensive: Array
    high: float
    low: float
    spent: float


def bracket(worth: Array, cost: Array, budget: float, *, until: int = 0) -> Bracket:
    """Bisect for the price at which the cost of the chosen options passes the budget.

    Only questions whose option differs between both ends of the interval are scored again: in between, no
    other question can differ, because the options that are ever chosen lie on a convex curve.

    Args:
        worth: may be negative, such as worth minus a penalty [Q, K].
        cost: [Q, K].
        budget: upper bound of the total cost.
        until: stop when no more questions than this differ.
    """
    low, high = 0.0, _highest_price(worth, cost)
    expensive = choose_at(worth, cost, low)
    total = float(take_chosen(cost, expensive).sum())
    if total <= budget:
        return Bracket(expensive, expensive, 0.0, 0.0, total)
    cheap = choose_at(worth, cost, high)
    spent = float(take_chosen(cost, cheap).sum())
    rows = np.flatnonzero(expensive != cheap)
    # Column-major, because numpy is slow along axes as short as K.
    some_worth, some_cost = np.asfortranarray(worth[rows]), np.asfortranarray(cost[rows])
    cheapest = take_chosen(some_cost, cheap[rows])
    for _ in range(BISECTIONS):
        price = math.sqrt(max(low, high * MIN_PRICE_RATIO) * high)
        if len(rows) <= until or not low < price < high:
            break
        middle = choose_at(some_worth, some_cost, price)
        costs = take_chosen(some_cost, middle)
        total = spent + float((costs - cheapest).sum())
        if total > budget:
            low = price
            expensive[rows] = middle
        else:
            high, spent = price, total
            cheap[rows], cheapest = middle, costs
        differ = expensive[rows] != cheap[rows]
        if not differ.all():
            rows, cheapest = rows[differ], cheapest[differ]
            some_worth, some_cost = (np.asfortranarray(each[differ]) for each in (some_worth, some_cost))
    return Bracket(cheap, expensive, high, low, spent)


def _within(worth: Array, cost: Array, budget: float, *, penalty: Array | None = None) -> _Relaxation:
    """Maximise worth minus `penalty` at a cost of at most `budget`."""
    net = worth if penalty is None else worth - penalty
    ends = bracket(net, cost, budget)
    bound = float(take_chosen(net, ends.cheap).sum())
    if not ends.high:
        return _Relaxation(ends.cheap, 0.0, bound)
    bound += ends.high * (budget - ends.spent)
    return _Relaxation(_fill_budget(net, cost, ends.cheap, ends.expensive, budget), ends.high, bound)


def _in_time(
    found: _Relaxation, worth: Array, cost: Array, budget: float, seconds: Array, deadline: float
) -> _Relaxation:
    """What `_within` found; where that takes too long, with a price of a second that keeps the deadline."""
    if take_chosen(seconds, found.chosen).sum() <= deadline:
        return found
    low, high = 0.0, _highest_price(worth, seconds)
    best = _Relaxation(np.full(len(worth), SKIPPED), high, math.inf)
    for _ in range(BISECTIONS // 2):
        price = 0.5 * (low + high)
        found = _within(worth, cost, budget, penalty=price * seconds)
        bound = min(best.bound, found.bound + price * deadline)
        if take_chosen(seconds, found.chosen).sum() > deadline:
            low, best = price, _Relaxation(best.chosen, best.price, bound)
        else:
            high, best = price, _Relaxation(found.chosen, found.price, bound)
        if high - low <= 1e-9 * high:
            break
    return best


def choose_at(worth: Array, cost: Array, price: float) -> Array:
    """The option of each question with the greatest worth minus price * cost; the cheapest of equals [Q]."""
    chosen = np.empty(len(worth), dtype=np.int32)
    if len(worth) <= SMALL_BATCH and worth.shape[1]:
        score = worth - price * cost
        best = score.max(1, initial=0.0)
        chosen[:] = np.where(score == best[:, None], cost, np.inf).argmin(1)
        chosen[best <= 0] = SKIPPED
        return chosen
    for start in range(0, len(worth), CHUNK):
        # One option at a time over many questions, because numpy is slow along axes as short as K.
        part = slice(start, start + CHUNK)
        options = zip(*(np.ascontiguousarray(each[part].T) for each in (worth, cost)), strict=True)
        best = np.zeros(min(CHUNK, len(worth) - start), dtype=worth.dtype)
        least = np.full(len(best), -1.0, dtype=cost.dtype)  # skipping is the cheapest
        taken = chosen[start : start + CHUNK]
        taken[:] = SKIPPED
        for option, (value, dollars) in enumerate(options):
            score = value - price * dollars
            better = (score > best) | ((score == best) & (dollars < least))
            for kept, new in ((best, score), (least, dollars), (taken, option)):
                np.copyto(kept, new, where=better)
    return chosen


def _highest_price(worth: Array, cost: Array) -> float:
    """A price at which only options without cost are chosen."""
    with np.errstate(divide="ignore", invalid="ignore"):
        most = max(
            (
                float(
                    np.where(
                        cost[at : at + CHUNK] > 0, worth[at : at + CHUNK] / cost[at : at + CHUNK], 0
                    ).max(initial=0.0)
                )
                for at in range(0, len(worth), CHUNK)
            ),
            default=0.0,
        )
    return 2.0 * most + 1e-30


def _fill_budget(worth: Array, cost: Array, cheap: Array, expensive: Array, budget: float) -> Array:
    """`cheap`, upgraded to `expensive` for the questions with the best gain per cost, within the budget."""
    rows = np.flatnonzero(expensive != cheap)
    gain = take_chosen(worth[rows], expensive[rows]) - take_chosen(worth[rows], cheap[rows])
    extra = take_chosen(cost[rows], expensive[rows]) - take_chosen(cost[rows], cheap[rows])
    order = np.argsort(-gain / np.maximum(extra, 1e-300), kind="stable")
    left = budget - float(take_chosen(cost, cheap).sum())
    fits = np.cumsum(extra[order]) <= left
    chosen = cheap.copy()
    taken = rows[order[fits]]
    chosen[taken] = expensive[taken]
    return chosen


def take_chosen(values: Array, chosen: Array) -> Array:
    """values [Q, K] of the chosen options, 0 for skipped questions; double precision, for sums."""
    picked = values[np.arange(len(chosen)), chosen].astype(np.float64)
    picked[chosen == SKIPPED] = 0.0
    return picked


def checked(name: str, values: Array, like: Array | None = None) -> Array:
    array = np.asarray(values)
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float64)
    if array.ndim != 2 or (like is not None and array.shape != like.shape):
        wanted = "[questions, ways]" if like is None else f"{like.shape}, as worth"
        raise InputError(f"{name} has the shape {array.shape}; give {wanted}")
    if np.isinf(array).any() or (array < 0).any():
        raise InputError(f"{name} has numbers that are negative or infinite; give 0 or more, NaN for none")
    return array


def check_terms(budget: float, seconds: Array | None, deadline: float | None, risk: float) -> None:
    """Raises `InputError` for a budget, deadline or risk out of range."""
    if not 0 < budget < math.inf or (deadline is not None and not deadline > 0):
        raise InputError(f"a budget and a deadline are above zero, got {budget} and {deadline}")
    if (seconds is None) != (deadline is None):
        raise InputError("give seconds and deadline, or neither")
    if not 0 < risk < 1:
        raise InputError(f"a risk is between 0 and 1, got {risk}")
