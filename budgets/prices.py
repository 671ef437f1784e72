"""Prices at which questions are expected to cost what there is: of a nano-dollar, and of a second.

At a price every question takes the way with the greatest worth less cost, alone, so that a price found on a
sample holds for all the questions that it stands for. Where two prices lie on both sides of the budget (many
questions with the same table), each is for a share of the questions. The relaxation of `budgets.allocate`,
without its last question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from viaticum.budgets.allocate import CHUNK, Array, bracket, checked, choose_at, of_chosen

HALVINGS = 30  # of the interval of prices of a second
GOLDEN = (5**0.5 - 1) / 2  # its multiples are spread evenly between 0 and 1


@dataclass(frozen=True, slots=True)
class Share:
    """A part of the questions, and what they are chosen at: the price of a nano-dollar, and of a second."""

    part: float
    price: float
    second: float = 0.0


@dataclass(frozen=True, slots=True)
class Expected:
    """What is expected of Q questions, by way [Q, W]. One that a question does not have is worth less than nothing."""

    worth: Array
    cost: Array
    spread: Array | None
    seconds: Array | None

    @classmethod
    def of(cls, worth: Array, cost: Array, spread: Array | None, seconds: Array | None) -> Expected:
        """Checked. Raises `InputError` as `allocate` does."""
        worth, cost = checked("worth", worth), checked("cost", cost, worth)
        spread = None if spread is None else np.nan_to_num(checked("spread", spread, worth))
        seconds = None if seconds is None else np.nan_to_num(checked("seconds", seconds, worth))
        missing = np.isnan(worth) | np.isnan(cost)
        if missing.any():
            worth, cost = np.where(missing, -np.inf, worth), np.where(missing, 0, cost)
        return cls(worth, cost, spread, seconds)

    def __len__(self) -> int:
        return len(self.worth)

    def part(self, rows: slice | Array) -> Expected:
        spread, seconds = (None if each is None else each[rows] for each in (self.spread, self.seconds))
        return Expected(self.worth[rows], self.cost[rows], spread, seconds)

    def corrected(self, ratio: Array, scatter: Array, pace: float) -> Expected:
        """With real over expected cost [W], deviation [W] and seconds multiplied in."""
        ratio, scatter = ratio.astype(self.cost.dtype), scatter.astype(self.cost.dtype)
        return Expected(
            self.worth,
            self.cost * ratio,
            None if self.spread is None else self.spread * (ratio * scatter),
            None if self.seconds is None else self.seconds * self.seconds.dtype.type(pace),
        )

    def without(self, ways: Array) -> Expected:
        """As if questions did not have these ways [Q, W, bool]."""
        if not ways.any():
            return self
        return replace(self, worth=np.where(ways, -np.inf, self.worth))

    def chosen(self, share: Share) -> Array:
        """The way of each question at these prices [Q]."""
        chosen = np.empty(len(self), dtype=np.int32)
        for start in range(0, len(self), CHUNK):
            some = slice(start, start + CHUNK)
            worth = self.worth[some]
            if share.second and self.seconds is not None:
                worth = worth - share.second * self.seconds[some]
            chosen[some] = choose_at(worth, self.cost[some], share.price)
        return chosen

    def sums(self, shares: Sequence[Share]) -> tuple[float, float, float, float]:
        """Worth, cost, variance of the cost, and seconds of all questions, each share of them at its prices."""
        sums = np.zeros(4)
        for share in shares:
            chosen = self.chosen(share)
            for place, values in enumerate((self.worth, self.cost, self.spread, self.seconds)):
                if values is not None:
                    each = of_chosen(values, chosen)
                    sums[place] += share.part * float((each**2 if place == 2 else each).sum())
        worth, cost, variance, seconds = sums.tolist()
        return worth, cost, variance, seconds


def shares_within(told: Expected, budget: float, limit: float | None = None) -> list[Share]:
    """The shares at which these questions are expected to cost `budget` and to take `limit` seconds, or less of either."""
    shares = _shares_at(told, budget)
    if limit is None or told.seconds is None or (slow := told.sums(shares)[3]) <= limit:
        return shares
    with np.errstate(divide="ignore", invalid="ignore"):
        dearest = np.where(told.seconds > 0, told.worth / told.seconds, 0.0).max(initial=0.0)
    low, high = 0.0, 2.0 * float(dearest) + 1e-30
    fast = _shares_at(told, budget, high)
    quick = told.sums(fast)[3]
    for _ in range(HALVINGS):
        second = 0.5 * (low + high)
        found = _shares_at(told, budget, second)
        took = told.sums(found)[3]
        if took > limit:
            low, shares, slow = second, found, took
        else:
            high, fast, quick = second, found, took
    part = max(0.0, (limit - quick) / (slow - quick))
    return _scaled(shares, part) + _scaled(fast, 1 - part)


def mixed(told: Expected, shares: Sequence[Share], turn: int = 0) -> tuple[Array, int]:
    """The way of each question, and the next turn: those that the shares disagree about take them in turn [Q]."""
    each = np.stack([told.chosen(share) for share in shares])
    rows = np.flatnonzero((each != each[0]).any(0))
    turns = ((turn + np.arange(len(rows))) * GOLDEN) % 1
    ends = np.cumsum([share.part for share in shares])
    which = np.minimum(np.searchsorted(ends, turns, side="right"), len(ends) - 1)
    chosen = each[0].copy()
    chosen[rows] = each[which, rows]
    return chosen, turn + len(rows)


def _shares_at(told: Expected, budget: float, second: float = 0.0) -> list[Share]:
    """The prices of a nano-dollar on both sides of a budget, in the shares that together cost it."""
    worth = told.worth - second * told.seconds if second and told.seconds is not None else told.worth
    ends = bracket(worth, told.cost, budget, until=1)
    dear = float(of_chosen(told.cost, ends.dear).sum())
    if ends.low == ends.high or dear <= ends.spent:
        return [Share(1.0, ends.high, second)]
    part = min(1.0, max(0.0, budget - ends.spent) / (dear - ends.spent))
    return [Share(part, ends.low, second), Share(1 - part, ends.high, second)]


def _scaled(shares: Sequence[Share], part: float) -> list[Share]:
    return [Share(part * each.part, each.price, each.second) for each in shares if part * each.part > 0]
