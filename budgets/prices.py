"""Prices of a nano-dollar and of a second at which questions are expected to use up a budget and a time.

At a price, every question takes the option with the greatest worth minus cost, independently of the others,
so that a price found on a sample holds for all the questions that the sample represents. Where two prices lie
on both sides of the budget (many questions with the same table), each applies to a share of the questions.
This is the relaxation of `budgets.allocate` without its final filling step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from viaticum.budgets.allocate import CHUNK, Array, bracket, checked, choose_at, take_chosen

BISECTIONS = 30  # of the interval of prices of a second
GOLDEN_RATIO = (5**0.5 - 1) / 2  # its multiples are spread evenly between 0 and 1


@dataclass(frozen=True, slots=True)
class Share:
    """A fraction of the questions and their prices of a nano-dollar and of a second."""

    part: float
    price: float
    second: float = 0.0


@dataclass(frozen=True, slots=True)
class Estimates:
    """Expectations for Q questions and K options [Q, K]; a missing option has worth -inf."""

    worth: Array
    cost: Array
    spread: Array | None
    seconds: Array | None

    @classmethod
    def of(cls, worth: Array, cost: Array, spread: Array | None, seconds: Array | None) -> Estimates:
        """Validate the arrays; raises `InputError` as `allocate` does."""
        worth, cost = checked("worth", worth), checked("cost", cost, worth)
        spread = None if spread is None else np.nan_to_num(checked("spread", spread, worth))
        seconds = None if seconds is None else np.nan_to_num(checked("seconds", seconds, worth))
        missing = np.isnan(worth) | np.isnan(cost)
        if missing.any():
            worth, cost = np.where(missing, -np.inf, worth), np.where(missing, 0, cost)
        return cls(worth, cost, spread, seconds)

    def __len__(self) -> int:
        return len(self.worth)

    def part(self, rows: slice | Array) -> Estimates:
        spread, seconds = (None if each is None else each[rows] for each in (self.spread, self.seconds))
        return Estimates(self.worth[rows], self.cost[rows], spread, seconds)

    def corrected(self, ratio: Array, scatter: Array, pace: float) -> Estimates:
        """Scale costs by `ratio` [K], deviations by `ratio * scatter` [K] and seconds by `pace`."""
        ratio, scatter = ratio.astype(self.cost.dtype), scatter.astype(self.cost.dtype)
        return Estimates(
            self.worth,
            self.cost * ratio,
            None if self.spread is None else self.spread * (ratio * scatter),
            None if self.seconds is None else self.seconds * self.seconds.dtype.type(pace),
        )

    def without(self, options: Array) -> Estimates:
        """Remove these options of these questions [Q, K, bool]."""
        if not options.any():
            return self
        return replace(self, worth=np.where(options, -np.inf, self.worth))

    def chosen(self, share: Share) -> Array:
        """The option of each question at these prices [Q]."""
        chosen = np.empty(len(self), dtype=np.int32)
        for start in range(0, len(self), CHUNK):
            some = slice(start, start + CHUNK)
            worth = self.worth[some]
            if share.second and self.seconds is not None:
                worth = worth - share.second * self.seconds[some]
            chosen[some] = choose_at(worth, self.cost[some], share.price)
        return chosen

    def sums(self, shares: Sequence[Share]) -> tuple[float, float, float, float]:
        """Worth, cost, variance of the cost, and seconds of all questions, weighted by the shares."""
        sums = np.zeros(4)
        for share in shares:
            chosen = self.chosen(share)
            for index, values in enumerate((self.worth, self.cost, self.spread, self.seconds)):
                if values is not None:
                    each = take_chosen(values, chosen)
                    sums[index] += share.part * float((each**2 if index == 2 else each).sum())
        worth, cost, variance, seconds = sums.tolist()
        return worth, cost, variance, seconds


def prices_within(estimates: Estimates, budget: float, limit: float | None = None) -> list[Share]:
    """The shares at which these questions are expected to cost `budget` and take `limit` seconds, or less."""
    shares = _prices_at(estimates, budget)
    if limit is None or estimates.seconds is None or (slow_seconds := estimates.sums(shares)[3]) <= limit:
        return shares
    with np.errstate(divide="ignore", invalid="ignore"):
        highest = np.where(estimates.seconds > 0, estimates.worth / estimates.seconds, 0.0).max(initial=0.0)
    low, high = 0.0, 2.0 * float(highest) + 1e-30
    fast = _prices_at(estimates, budget, high)
    fast_seconds = estimates.sums(fast)[3]
    for _ in range(BISECTIONS):
        second = 0.5 * (low + high)
        found = _prices_at(estimates, budget, second)
        took = estimates.sums(found)[3]
        if took > limit:
            low, shares, slow_seconds = second, found, took
        else:
            high, fast, fast_seconds = second, found, took
    part = max(0.0, (limit - fast_seconds) / (slow_seconds - fast_seconds))
    return _scale_shares(shares, part) + _scale_shares(fast, 1 - part)


def choose_mixed(estimates: Estimates, shares: Sequence[Share], turn: int = 0) -> tuple[Array, int]:
    """The option of each question [Q], and the next turn.

    Questions on which the shares disagree are distributed over them by a low-discrepancy sequence that starts
    at `turn`.
    """
    each = np.stack([estimates.chosen(share) for share in shares])
    rows = np.flatnonzero((each != each[0]).any(0))
    turns = ((turn + np.arange(len(rows))) * GOLDEN_RATIO) % 1
    ends = np.cumsum([share.part for share in shares])
    which = np.minimum(np.searchsorted(ends, turns, side="right"), len(ends) - 1)
    chosen = each[0].copy()
    chosen[rows] = each[which, rows]
    return chosen, turn + len(rows)


def _prices_at(estimates: Estimates, budget: float, second: float = 0.0) -> list[Share]:
    """The neighbouring prices around a budget, in shares that together cost it."""
    worth = (
        estimates.worth - second * estimates.seconds
        if second and estimates.seconds is not None
        else estimates.worth
    )
    ends = bracket(worth, estimates.cost, budget, until=1)
    expensive = float(take_chosen(estimates.cost, ends.expensive).sum())
    if ends.low == ends.high or expensive <= ends.spent:
        return [Share(1.0, ends.high, second)]
    part = min(1.0, max(0.0, budget - ends.spent) / (expensive - ends.spent))
    return [Share(part, ends.low, second), Share(1 - part, ends.high, second)]


def _scale_shares(shares: Sequence[Share], part: float) -> list[Share]:
    return [Share(part * each.part, each.price, each.second) for each in shares if part * each.part > 0]
