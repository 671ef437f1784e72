"""Which way to answer each of many questions, so that most are right and the budget holds: a multiple-choice knapsack.

Lagrangian relaxation (Sinha and Zoltners, 1979): at a price of a dollar each question takes the way with the
greatest worth less cost at that price, and the price is raised until the sum fits. What is left over at that
price goes to the questions that gain most a dollar, so that the result is exact but for one question;
`bound`, the relaxation's own value, says how far from the best it can be at most.

Works on arrays [questions, ways] of expected worth and cost. Leaves out where these come from
(`routers.query`), and the ledger: an expectation is not a hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from viaticum.errors import InputError

Array = NDArray[Any]
Found = TypeVar("Found")
SKIPPED = -1
CHUNK = 1 << 16  # rows at once: some MB, which stay near the core
FEW = 1 << 13  # rows for which all ways at once are quicker
STEPS = 80  # halvings of the interval of (the logarithm of) prices
SPAN = 1e-12  # of the highest price, below which a price is as good as none
ROUNDS = 10  # of making room for chance, half of them at most by steps
NEAR = 2e-3  # of the budget, by which the room may be more than is needed


@dataclass(frozen=True, slots=True)
class Allocation:
    """chosen: the way of each question, `SKIPPED` for none [Q]; worth, cost, seconds: sums of what is expected.

    price: worth that a further unit of budget would bring; bound: no allocation within the budget has more
    worth.
    reserve: what of the budget is left for chance.
    """

    chosen: Array
    worth: float
    cost: float
    seconds: float
    price: float
    bound: float
    reserve: float


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
    """Choose a way for every question. A way that a question does not have is NaN in worth or cost.

    worth [Q, W]: of an answer, 0 or more, such as the chance that it is right; cost [Q, W]: expected, 0 or
    more, in the budget's unit. spread [Q, W]: standard deviations of the costs; with them the chance that all
    comes to more than the budget is at most `risk`, errors being independent; pending: the variance of what
    else is still to be paid from it. seconds [Q, W] and deadline: a second budget, in expectation. Raises
    `InputError` for shapes that differ, negative numbers, or a budget or a deadline that is not above zero.
    """
    worth, cost = checked("worth", worth), checked("cost", cost, worth)
    spread = None if spread is None else checked("spread", spread, worth)
    seconds = None if seconds is None else checked("seconds", seconds, worth)
    check_terms(budget, seconds, deadline, risk)
    worth = np.where(np.isnan(worth) | np.isnan(cost), -np.inf, worth)
    cost = np.where(np.isnan(cost), 0.0, cost).astype(cost.dtype)

    def find(reserve: float) -> tuple[_Found, float]:
        if seconds is None or deadline is None:
            found = _within(worth, cost, budget - reserve)
        else:
            found = _within_both(worth, cost, budget - reserve, np.nan_to_num(seconds), deadline)
        if spread is None:
            return found, 0.0
        variance = pending + float((of_chosen(spread, found.chosen) ** 2).sum())
        return found, NormalDist().inv_cdf(1 - risk) * math.sqrt(variance)

    found, reserve = with_room(find, budget)
    return Allocation(
        found.chosen,
        float(of_chosen(worth, found.chosen).sum()),
        float(of_chosen(cost, found.chosen).sum()),
        0.0 if seconds is None else float(of_chosen(seconds, found.chosen).sum()),
        found.price,
        found.bound,
        reserve,
    )


def with_room(find: Callable[[float], tuple[Found, float]], budget: float) -> tuple[Found, float]:
    """What is found with as small a reserve as is enough for chance, and that reserve.

    find: what is chosen where so much is reserved, and what chance may add to its cost. The less there is to
    choose
    with, the less chance adds as a rule: what was needed for the best choice may be far more than is needed
    in the end.
    """
    found, chance = find(0.0)
    if chance <= 0:
        return found, 0.0
    low, high, enough = 0.0, 0.999 * budget, None
    near = NEAR * budget
    for round_ in range(ROUNDS):
        # Where chance follows the reserve, a step past it is enough; where it leaps, halves come near the
        # leap.
        reserve = chance + near / 2
        if not low < reserve < high or round_ > ROUNDS // 2:
            reserve = 0.5 * (low + high)
        found, chance = find(reserve)
        if chance <= reserve:
            high, enough = reserve, found
            if reserve - chance <= near:
                break
        else:
            low = reserve
    return (find(high)[0] if enough is None else enough), high


@dataclass(frozen=True, slots=True)
class _Found:
    chosen: Array
    price: float
    bound: float


@dataclass(frozen=True, slots=True)
class Bracket:
    """Two prices next to each other, and what is chosen at them: `cheap` [Q] is within the budget, `dear` [Q] is not.

    They are the same choice and price 0 where the budget binds nothing. spent: what `cheap` costs.
    """

    cheap: Array
    dear: Array
    high: float
    low: float
    spent: float


def bracket(worth: Array, cost: Array, budget: float, *, until: int = 0) -> Bracket:
    """Where the sum of what is chosen passes the budget. worth may be below zero, such as what is left after a toll.
    until: near enough where no more questions than these differ.

    Only questions whose way differs between the two ends of the interval of prices are looked at again:
    between them no other's can differ, for the ways that are ever chosen lie on a convex curve.
    """
    low, high = 0.0, _highest_price(worth, cost)
    dear = choose_at(worth, cost, low)
    total = float(of_chosen(cost, dear).sum())
    if total <= budget:
        return Bracket(dear, dear, 0.0, 0.0, total)
    cheap = choose_at(worth, cost, high)
    spent = float(of_chosen(cost, cheap).sum())
    rows = np.flatnonzero(dear != cheap)
    # Way by way in memory: numpy is slow over rows as short as these.
    some_worth, some_cost = np.asfortranarray(worth[rows]), np.asfortranarray(cost[rows])
    cheapest = of_chosen(some_cost, cheap[rows])
    for _ in range(STEPS):
        price = math.sqrt(max(low, high * SPAN) * high)
        if len(rows) <= until or not low < price < high:
            break
        middle = choose_at(some_worth, some_cost, price)
        costs = of_chosen(some_cost, middle)
        would = spent + float((costs - cheapest).sum())
        if would > budget:
            low = price
            dear[rows] = middle
        else:
            high, spent = price, would
            cheap[rows], cheapest = middle, costs
        differ = dear[rows] != cheap[rows]
        if not differ.all():
            rows, cheapest = rows[differ], cheapest[differ]
            some_worth, some_cost = (np.asfortranarray(each[differ]) for each in (some_worth, some_cost))
    return Bracket(cheap, dear, high, low, spent)


def _within(worth: Array, cost: Array, budget: float, *, toll: Array | None = None) -> _Found:
    """The greatest worth (less `toll`) at a cost of at most `budget`."""
    net = worth if toll is None else worth - toll
    ends = bracket(net, cost, budget)
    bound = float(of_chosen(net, ends.cheap).sum())
    if not ends.high:
        return _Found(ends.cheap, 0.0, bound)
    bound += ends.high * (budget - ends.spent)
    return _Found(_filled(net, cost, ends.cheap, ends.dear, budget), ends.high, bound)


def _within_both(worth: Array, cost: Array, budget: float, seconds: Array, deadline: float) -> _Found:
    """As `_within`, with a price of a second as well, which is raised until the deadline holds."""
    found = _within(worth, cost, budget)
    if of_chosen(seconds, found.chosen).sum() <= deadline:
        return found
    low, high = 0.0, _highest_price(worth, seconds)
    best = _Found(np.full(len(worth), SKIPPED), high, math.inf)
    for _ in range(STEPS // 2):
        price = 0.5 * (low + high)
        found = _within(worth, cost, budget, toll=price * seconds)
        bound = min(best.bound, found.bound + price * deadline)
        if of_chosen(seconds, found.chosen).sum() > deadline:
            low, best = price, _Found(best.chosen, best.price, bound)
        else:
            high, best = price, _Found(found.chosen, found.price, bound)
        if high - low <= 1e-9 * high:
            break
    return best


def choose_at(worth: Array, cost: Array, price: float) -> Array:
    """For each question the way with the greatest worth less cost at a price; the cheapest of equals [Q]."""
    chosen = np.empty(len(worth), dtype=np.int32)
    if len(worth) <= FEW and worth.shape[1]:
        score = worth - price * cost
        best = score.max(1, initial=0.0)
        chosen[:] = np.where(score == best[:, None], cost, np.inf).argmin(1)
        chosen[best <= 0] = SKIPPED
        return chosen
    for start in range(0, len(worth), CHUNK):
        # Way by way over many questions: numpy is slow over rows as short as these.
        part = slice(start, start + CHUNK)
        ways = zip(*(np.ascontiguousarray(each[part].T) for each in (worth, cost)), strict=True)
        best = np.zeros(min(CHUNK, len(worth) - start), dtype=worth.dtype)
        least = np.full(len(best), -1.0, dtype=cost.dtype)  # skipping is the cheapest
        taken = chosen[start : start + CHUNK]
        taken[:] = SKIPPED
        for way, (value, dollars) in enumerate(ways):
            score = value - price * dollars
            better = (score > best) | ((score == best) & (dollars < least))
            for kept, new in ((best, score), (least, dollars), (taken, way)):
                np.copyto(kept, new, where=better)
    return chosen


def _highest_price(worth: Array, cost: Array) -> float:
    """A price at which only ways that cost nothing are chosen."""
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


def _filled(worth: Array, cost: Array, cheap: Array, dear: Array, budget: float) -> Array:
    """`cheap`, with the ways of `dear` for the questions that gain most a unit of cost, as far as the budget goes."""
    rows = np.flatnonzero(dear != cheap)
    gain = of_chosen(worth[rows], dear[rows]) - of_chosen(worth[rows], cheap[rows])
    extra = of_chosen(cost[rows], dear[rows]) - of_chosen(cost[rows], cheap[rows])
    order = np.argsort(-gain / np.maximum(extra, 1e-300), kind="stable")
    left = budget - float(of_chosen(cost, cheap).sum())
    fits = np.cumsum(extra[order]) <= left
    chosen = cheap.copy()
    taken = rows[order[fits]]
    chosen[taken] = dear[taken]
    return chosen


def of_chosen(values: Array, chosen: Array) -> Array:
    """values [Q, W] of the chosen ways; 0 for what is skipped. In double precision, for sums."""
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
    """Raise `InputError` for a budget, a deadline or a risk that is none."""
    if not 0 < budget < math.inf or (deadline is not None and not deadline > 0):
        raise InputError(f"a budget and a deadline are above zero, got {budget} and {deadline}")
    if (seconds is None) != (deadline is None):
        raise InputError("give seconds and deadline, or neither")
    if not 0 < risk < 1:
        raise InputError(f"a risk is between 0 and 1, got {risk}")
