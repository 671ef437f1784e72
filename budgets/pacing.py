"""A budget spread over the questions of a running job, as they come: prices that follow what is really spent.

A job knows a sample of its questions beforehand and the rest a block at a time. At every block the price of a
nano-dollar (and of a second, where there is a deadline) is set anew, so that the questions that are left are
expected to cost what is left: the relaxation of `budgets.allocate` on the sample, at most one row short of
it. The last block is allocated exactly. Memory does not depend on the number of rows.

Real costs come in by `settle`. They correct what is expected of every way, by a ratio that is held near 1
while few are known; and they take the place of what was set aside, so that room for chance is left for the
rows alone whose cost is still unknown. Amounts are nano-dollars. Leaves out the ledger, which has the last
word: a plan is not a hold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from viaticum.budgets.allocate import SKIPPED, Array, allocate, check_terms, of_chosen, with_room
from viaticum.budgets.corrections import Corrections
from viaticum.budgets.prices import Expected, Share, mixed, shares_within
from viaticum.budgets.quantiles import NORMAL_P90
from viaticum.errors import InputError
from viaticum.jobs import Preview

PACES = (0.1, 10.0)  # beyond which no pace is believed
NOTHING = 1e-9  # nano-dollars and seconds, when all is spent
# Rows of the sample, and the part of it, that are looked at even if they have passed.
FEWEST, FEWEST_PART = 64, 16
AGAIN = 128  # prices are set anew after this part of the rows that are left
STRIDE = 16  # part of the rows that are left which should be planned at once
PRIOR_ROWS = 16  # rows after which the time they took counts as much as what was expected


def preview(
    worth: Array,
    cost: Array,
    budgets: Sequence[int],
    *,
    rows: int,
    spread: Array | None = None,
    risk: float = 0.01,
    seconds: Array | None = None,
    deadline: float | None = None,
) -> list[Preview]:
    """What each of some budgets would buy: arrays [S, W] of a sample, as for `Pacer`, scaled to all `rows`."""
    return [
        Pacer(
            worth,
            cost,
            rows=rows,
            budget=budget,
            spread=spread,
            risk=risk,
            seconds=seconds,
            deadline=deadline,
        ).forecast()
        for budget in budgets
    ]


class Pacer:
    """Plans the rows of a job in the order in which they come."""

    def __init__(
        self,
        worth: Array,
        cost: Array,
        *,
        rows: int,
        budget: float,
        spread: Array | None = None,
        risk: float = 0.01,
        seconds: Array | None = None,
        deadline: float | None = None,
        at: Array | None = None,
        worst: Array | None = None,
    ) -> None:
        """worth, cost, spread, seconds [S, W] of a sample of the rows, as `allocate` takes them; every way of the job
        is a column. rows: of the whole job; deadline: seconds for all of it; seconds: what a row adds to them, its own
        divided by how many run at once. at [S]: the place of each sampled row, from 0, so that what has passed is
        left out; without it the sample stands for all rows, wherever they are. A sample of all rows makes an exact plan.
        worst [W]: what is held for a row beforehand; towards the end, a way for which no room is left is not planned.

        Raises `InputError` for what is no number, an empty sample, or a budget or a deadline that is not
        above zero.
        """
        check_terms(budget, seconds, deadline, risk)
        told = Expected.of(worth, cost, spread, seconds)
        if not 0 < len(worth) <= rows:
            raise InputError(f"a sample has 1 to {rows} rows, as many as the job at most; got {len(worth)}")
        if at is not None and (np.shape(at) != (len(worth),) or not (0 <= np.min(at) <= np.max(at) < rows)):
            raise InputError(f"at holds the place of each of {len(worth)} rows, from 0 to {rows - 1}")
        if worst is not None and np.shape(worst) != np.shape(worth)[1:]:
            raise InputError(
                f"worst is [W], one for each of {np.shape(worth)[1]} ways; got {np.shape(worst)}"
            )
        order = np.arange(len(worth)) if at is None else np.argsort(at, kind="stable")
        self.rows, self.budget, self.risk, self.deadline = rows, float(budget), risk, deadline
        self._at = None if at is None else np.asarray(at)[order]
        self._told = told.part(order)
        ways = told.worth.shape[1]
        self._worst = np.zeros(ways) if worst is None else np.asarray(worst, dtype=np.float64)
        self._planned = self._settled = 0  # rows
        self._worth = self._spent = 0.0  # of planned rows, of settled ones
        self._open = np.zeros(ways)  # cost expected of rows that are planned and not settled, by way
        self._open_variance = self._open_seconds = 0.0
        self._learned = Corrections(ways)
        self._known_seconds = self._elapsed = 0.0
        self._shares: list[Share] = []
        self._priced_at = -1
        self._turn = 0  # of rows that two prices disagree about

    # --- planning -------------------------------------------------------------------------------------------

    @property
    def rows_left(self) -> int:
        """How many rows are not planned yet."""
        return self.rows - self._planned

    @property
    def spent(self) -> float:
        return self._spent

    @property
    def price(self) -> float:
        """Worth that a nano-dollar has to bring, by the last prices: the highest of them; 0 before the first."""
        return max((share.price for share in self._shares), default=0.0)

    @property
    def ratios(self) -> Array:
        """Real over expected cost of each way, as far as it is known [W]."""
        return self._learned.ratios.copy()

    def stride(self, most: int = 1024) -> int:
        """How many rows to plan next: fewer towards the end, so that what is left can still be set right."""
        return max(1, min(most, self.rows_left // STRIDE, self.rows_left))

    def choose(
        self,
        worth: Array,
        cost: Array,
        spread: Array | None = None,
        seconds: Array | None = None,
        *,
        elapsed: float | None = None,
        left: float | None = None,
    ) -> Array:
        """The way of each of the next B rows, `SKIPPED` for none [B]; arrays [B, W] of these rows.

        elapsed: seconds since the job began, where there is a deadline (else the sum of what `settle` was
        told);
        left: what the ledger says has not been posted yet, where it knows better. Raises `InputError` for
        more rows than the job has, or arrays that are not those of the sample's ways.
        """
        told = Expected.of(worth, cost, spread, seconds)
        if told.worth.shape[1] != len(self._open):
            raise InputError(f"the sample has {len(self._open)} ways, these rows {told.worth.shape[1]}")
        if len(told) > self.rows_left:
            raise InputError(f"{len(told)} more rows, but only {self.rows_left} of {self.rows} are left")
        if (spread is None) != (self._told.spread is None) or (seconds is None) != (self.deadline is None):
            raise InputError("give spread and seconds as they were given of the sample")
        if elapsed is not None:
            self._elapsed = elapsed
        if left is not None:
            self._spent = self.budget - left
        told = self._corrected(told)
        if len(told) == self.rows_left:
            chosen = self._chosen_last(told)
        else:
            if self._priced_at < 0 or (self._planned - self._priced_at) * AGAIN >= self.rows_left:
                self._shares, self._priced_at = self._prices(), self._planned
            chosen, self._turn = mixed(told, self._shares, self._turn)
        self._note(told, np.asarray(cost), chosen)
        return chosen

    def settle(
        self,
        ways: Array,
        expected: Array,
        actual: Array,
        *,
        spread: Array | None = None,
        learn: Array | None = None,
        expected_seconds: Array | None = None,
        seconds: Array | None = None,
    ) -> None:
        """What R planned rows have really cost. ways [R]: as chosen; expected [R]: their cost as given to `choose`;
        actual [R]: what was charged; spread [R]: as given to `choose`, if it was. learn [R]: where a row went the way that was planned to its end, and tells what
        that way costs (default: all); a row that was refused or took a cheaper way tells nothing.

        expected_seconds, seconds [R]: where there is a deadline, as given to `choose` and as measured.
        """
        ways = np.asarray(ways)
        expected, actual = np.asarray(expected, dtype=np.float64), np.asarray(actual, dtype=np.float64)
        if not ways.shape == expected.shape == actual.shape or ways.ndim != 1:
            raise InputError(
                f"ways, expected and actual are [R]; got {ways.shape}, {expected.shape}, {actual.shape}"
            )
        if len(ways) + self._settled > self._planned:
            raise InputError(
                f"{self._settled + len(ways)} rows are settled, but only {self._planned} were planned"
            )
        took = ways != SKIPPED
        places = np.where(took, ways, 0)
        total = self._open.sum()
        self._open -= np.bincount(places, np.where(took, expected, 0.0), len(self._open))
        np.maximum(self._open, 0.0, out=self._open)
        share = self._open.sum() / total if total > 0 else 0.0
        self._settled += len(ways)
        if self._settled == self._planned:
            self._open[:], share = 0.0, 0.0  # what rounding left
        self._open_variance *= share
        self._spent += float(actual.sum())
        if expected_seconds is not None:
            self._open_seconds = max(0.0, self._open_seconds - float(np.sum(expected_seconds)))
            self._known_seconds += float(np.sum(expected_seconds))
        if seconds is not None:
            self._elapsed += float(np.sum(seconds))
        useful = took if learn is None else took & np.asarray(learn, dtype=bool)
        spread = None if spread is None else np.asarray(spread, dtype=np.float64)[useful]
        self._learned.learn(ways[useful], expected[useful], actual[useful], spread)

    def forecast(self) -> Preview:
        """What all rows come to if it goes on as planned: answers that are right, and cost at its median and at 90%."""
        told, scale = self._ahead()
        # Room for chance goes to later rows in the end, and is spent.
        shares = self._prices(room=False) if self.rows_left else []
        worth, cost, variance = (scale * each for each in told.sums(shares)[:3])
        ahead = cost + float((self._open * self._learned.ratios).sum())
        doubt = ahead * self._learned.doubt
        high = ahead + NORMAL_P90 * math.sqrt(variance + self._open_variance + doubt**2)
        middle = min(self._spent + ahead, max(self.budget, self._spent))
        return Preview(
            round(self.budget),
            (self._worth + worth) / self.rows,
            round(middle),
            round(max(middle, min(self._spent + high, self.budget))),
        )

    # --- going on after a kill ------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that was learned from settled rows, for JSON. Rows that are planned and not settled are planned again."""
        return {
            "rows": self.rows,
            "settled": self._settled,
            "worth": self._worth * self._settled / max(1, self._planned),
            "spent": self._spent,
            "learned": self._learned.state(),
            "known_seconds": self._known_seconds,
            "elapsed": self._elapsed,
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on with what another run knew. The rows that it settled do not come again; those in flight do.

        Raises `InputError` where the state is not one of a job with these ways and rows.
        """
        try:
            learned, settled = state["learned"], int(state["settled"])
            amounts = [float(state[name]) for name in ("worth", "spent", "known_seconds", "elapsed")]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"no state of a pacer ({error!r}); start the job's plan anew") from None
        if state.get("rows") != self.rows or not 0 <= settled <= self.rows:
            raise InputError(
                f"{settled} of {state.get('rows')} rows are settled, and this job has {self.rows}; it is "
                f"another job"
            )
        self._learned.resume(learned)
        self._settled = self._planned = settled
        self._worth, self._spent, self._known_seconds, self._elapsed = amounts
        self._open[:] = self._open_variance = self._open_seconds = 0.0
        self._priced_at = -1

    # --- parts ----------------------------------------------------------------------------------------------

    def _ahead(self) -> tuple[Expected, float]:
        """The sampled rows that stand for those not planned yet, corrected, and for how many rows each one does."""
        first = 0
        if self._at is not None:
            first = int(np.searchsorted(self._at, self._planned))
            # Few would be a bad guess; those that just passed are like the next.
            if len(self._at) < self.rows:
                first = max(0, min(first, len(self._at) - max(FEWEST, len(self._at) // FEWEST_PART)))
        told = self._told.part(slice(first, None))
        return self._corrected(told), self.rows_left / max(1, len(told))

    def _prices(self, *, room: bool = True) -> list[Share]:
        """At which the rows that are left are expected to cost what is left, room for chance set aside."""
        told, scale = self._ahead()
        money = max(NOTHING, self._money())
        limit = None if self.deadline is None else max(NOTHING, self._time()) / scale

        def find(reserve: float) -> tuple[list[Share], float]:
            shares = shares_within(told, (money - reserve) / scale, limit)
            if told.spread is None or not room:
                return shares, 0.0
            return shares, self._amounts_left(self._open_variance + scale * told.sums(shares)[2])

        return with_room(find, money)[0]

    def _chosen_last(self, told: Expected) -> Array:
        return allocate(
            np.where(np.isneginf(told.worth), np.nan, told.worth),
            told.cost,
            max(NOTHING, self._money()),
            spread=told.spread,
            risk=self.risk,
            seconds=told.seconds,
            deadline=None if self.deadline is None else max(NOTHING, self._time()),
            pending=self._open_variance,
        ).chosen

    def _note(self, told: Expected, cost: Array, chosen: Array) -> None:
        """told: as corrected; cost: as it was expected."""
        self._planned += len(chosen)
        self._worth += float(of_chosen(told.worth, chosen).sum())
        took = np.maximum(chosen, 0)
        self._open += np.bincount(took, of_chosen(cost, chosen), len(self._open))
        if told.spread is not None:
            self._open_variance += float((of_chosen(told.spread, chosen) ** 2).sum())
        if told.seconds is not None:
            self._open_seconds += float(of_chosen(told.seconds, chosen).sum()) / self._pace()

    def _money(self) -> float:
        """What is not spent and not expected to be by rows that are planned."""
        return self.budget - self._spent - float((self._open * self._learned.ratios).sum())

    def _time(self) -> float:
        assert self.deadline is not None
        return self.deadline - self._elapsed - self._open_seconds * self._pace()

    def _pace(self) -> float:
        """Real seconds over expected ones."""
        if not self._known_seconds:
            return 1.0
        weight = self._settled / (self._settled + PRIOR_ROWS)
        return float(np.clip(1 + weight * (self._elapsed / self._known_seconds - 1), *PACES))

    def _amounts_left(self, variance: float) -> float:
        return NormalDist().inv_cdf(1 - self.risk) * math.sqrt(variance)

    def _corrected(self, told: Expected) -> Expected:
        """With what was learned, and without the ways that are too dear to be held any more."""
        told = told.corrected(self._learned.ratios, self._learned.scatters, self._pace())
        return told.without(np.maximum(self._worst, told.cost) > max(NOTHING, self._money()))
