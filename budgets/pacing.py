"""Spread a budget over the questions of a running job: prices that follow the actual spending.

A job knows a sample of its questions in advance and the rest block by block. At every block, the price of a
nano-dollar (and of a second, if there is a deadline) is set so that the remaining questions are expected to
cost the remaining budget: the relaxation of `budgets.allocate` on the sample, at most one row short of it.
The last block is allocated exactly. Memory does not depend on the number of rows.

`settle` reports real costs. They correct the expectations of each option, by a ratio that is shrunk towards 1
while few rows are known, and they replace the expected costs, so that only unsettled rows need a reserve for
variance. Amounts are nano-dollars. Leaves out the ledger, which has the last word: a plan is not a hold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from viaticum.budgets.allocate import SKIPPED, Array, allocate, check_terms, take_chosen, with_reserve
from viaticum.budgets.corrections import Corrections
from viaticum.budgets.prices import Estimates, Share, choose_mixed, prices_within
from viaticum.errors import InputError
from viaticum.jobs import Preview
from viaticum.quantiles import NORMAL_P90

PACE_BOUNDS = (0.1, 10.0)
EPSILON = 1e-9  # nano-dollars and seconds, in place of a budget that is used up
# The end of the sample that is used even after its rows have passed: at least 64 rows, or 1/16 of the sample.
MIN_SAMPLE_ROWS, MIN_SAMPLE_FRACTION = 64, 16
REPRICE_FRACTION = 128  # prices are recomputed after 1/128 of the remaining rows
STRIDE_FRACTION = 16  # at most 1/16 of the remaining rows is planned at once
PRIOR_ROWS = 16  # rows after which measured and expected time have equal weight


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
    """Forecast what each of several budgets would buy.

    Args:
        worth, cost, spread, risk, seconds, deadline: of a sample [S, K], as for `Pacer`.
        budgets: in nano-dollars.
        rows: number of rows of the whole job, to which the sample is scaled.
    """
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
    """Plans the rows of a job in the order of their arrival."""

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
        """Plan for a job from a sample of its rows; a sample of all rows gives an exact plan.

        Args:
            worth, cost, spread: expectations of the S sampled rows, as for `allocate`; every option of the
                job is a column [S, K].
            rows: number of rows of the whole job.
            budget: upper bound of the total cost, in nano-dollars.
            risk: probability that the total may exceed the budget.
            seconds: what each row adds to the duration of the job: its own time divided by the concurrency
                [S, K].
            deadline: seconds for the whole job.
            at: position of each sampled row in the job, from 0, so that rows that have passed are left out;
                without it, the sample represents all rows regardless of position [S].
            worst: amount held for a row by option; near the end, options that no longer fit are not planned
                [K].

        Raises:
            InputError: an array is not finite or of another shape, the sample is empty, or budget or deadline
                is not above zero.
        """
        check_terms(budget, seconds, deadline, risk)
        estimates = Estimates.of(worth, cost, spread, seconds)
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
        self._sample = estimates.part(order)
        options = estimates.worth.shape[1]
        self._worst = np.zeros(options) if worst is None else np.asarray(worst, dtype=np.float64)
        self._planned = self._settled = 0  # rows
        self._worth = self._spent = 0.0  # of planned and of settled rows
        self._pending_cost = np.zeros(options)  # expected cost of planned, unsettled rows [K]
        self._pending_variance = self._pending_seconds = 0.0
        self._corrections = Corrections(options)
        self._known_seconds = self._elapsed = 0.0
        self._shares: list[Share] = []
        self._priced_at = -1
        self._turn = 0  # of rows on which two prices disagree
        self._is_short_of_time = False

    @property
    def is_short_of_time(self) -> bool:
        """Whether the deadline, and not the budget alone, decided about the rows that were planned last."""
        return self._is_short_of_time

    @property
    def rows_left(self) -> int:
        """Number of rows not planned yet."""
        return self.rows - self._planned

    @property
    def spent(self) -> float:
        return self._spent

    @property
    def price(self) -> float:
        """Worth per nano-dollar at the latest prices, the highest of the shares; 0 before the first."""
        return max((share.price for share in self._shares), default=0.0)

    @property
    def ratios(self) -> Array:
        """Real over expected cost of each option so far [K]."""
        return self._corrections.ratios.copy()

    def stride(self, most: int = 1024) -> int:
        """Number of rows to plan next: fewer near the end, so that the rest can still correct deviations."""
        return max(1, min(most, self.rows_left // STRIDE_FRACTION, self.rows_left))

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
        """Choose the option of each of the next B rows, `SKIPPED` for none [B].

        Args:
            worth, cost, spread, seconds: expectations of these rows, as for the sample [B, K].
            elapsed: seconds since the start of the job, for a deadline; default: sum of the reported seconds.
            left: nano-dollars not posted yet, according to the ledger.

        Raises:
            InputError: more rows than the job has left, or arrays that do not match those of the sample.
        """
        estimates = Estimates.of(worth, cost, spread, seconds)
        if estimates.worth.shape[1] != len(self._pending_cost):
            raise InputError(
                f"the sample has {len(self._pending_cost)} ways, these rows {estimates.worth.shape[1]}"
            )
        if len(estimates) > self.rows_left:
            raise InputError(f"{len(estimates)} more rows, but only {self.rows_left} of {self.rows} are left")
        if (spread is None) != (self._sample.spread is None) or (seconds is None) != (self.deadline is None):
            raise InputError("give spread and seconds as they were given of the sample")
        if elapsed is not None:
            self._elapsed = elapsed
        if left is not None:
            self._spent = self.budget - left
        estimates = self._corrected(estimates)
        if len(estimates) == self.rows_left:
            chosen = self._choose_last(estimates)
        else:
            if self._priced_at < 0 or (self._planned - self._priced_at) * REPRICE_FRACTION >= self.rows_left:
                self._shares, self._priced_at = self._prices(), self._planned
            self._is_short_of_time = any(share.second for share in self._shares)
            chosen, self._turn = choose_mixed(estimates, self._shares, self._turn)
        self._record(estimates, np.asarray(cost), chosen)
        return chosen

    def settle(
        self,
        options: Array,
        expected: Array,
        actual: Array,
        *,
        spread: Array | None = None,
        learn: Array | None = None,
        expected_seconds: Array | None = None,
        seconds: Array | None = None,
    ) -> None:
        """Report what R planned rows have really cost.

        Args:
            options: as chosen [R].
            expected: costs as given to `choose` [R].
            actual: amounts charged [R].
            spread: as given to `choose` [R].
            learn: whether a row followed its option to the end, so that its cost says something about that
                option; not so for a row that was refused or took a cheaper option. Default: all [R].
            expected_seconds, seconds: for a deadline, as given to `choose` and as measured [R].
        """
        options = np.asarray(options)
        expected, actual = np.asarray(expected, dtype=np.float64), np.asarray(actual, dtype=np.float64)
        if not options.shape == expected.shape == actual.shape or options.ndim != 1:
            raise InputError(
                f"ways, expected and actual are [R]; got {options.shape}, {expected.shape}, {actual.shape}"
            )
        if len(options) + self._settled > self._planned:
            raise InputError(
                f"{self._settled + len(options)} rows are settled, but only {self._planned} were planned"
            )
        took = options != SKIPPED
        indices = np.where(took, options, 0)
        total = self._pending_cost.sum()
        self._pending_cost -= np.bincount(indices, np.where(took, expected, 0.0), len(self._pending_cost))
        np.maximum(self._pending_cost, 0.0, out=self._pending_cost)
        share = self._pending_cost.sum() / total if total > 0 else 0.0
        self._settled += len(options)
        if self._settled == self._planned:
            self._pending_cost[:], share = 0.0, 0.0  # removes rounding errors
        self._pending_variance *= share
        self._spent += float(actual.sum())
        if expected_seconds is not None:
            self._pending_seconds = max(0.0, self._pending_seconds - float(np.sum(expected_seconds)))
            self._known_seconds += float(np.sum(expected_seconds))
        if seconds is not None:
            self._elapsed += float(np.sum(seconds))
        useful = took if learn is None else took & np.asarray(learn, dtype=bool)
        spread = None if spread is None else np.asarray(spread, dtype=np.float64)[useful]
        self._corrections.update(options[useful], expected[useful], actual[useful], spread)

    def forecast(self) -> Preview:
        """Expected result of the whole job: right answers, and cost at its median and 90th percentile."""
        estimates, scale = self._remaining_sample()
        # The reserve is released to later rows in the end, and spent.
        shares = self._prices(reserved=False) if self.rows_left else []
        worth, cost, variance = (scale * each for each in estimates.sums(shares)[:3])
        ahead = cost + float((self._pending_cost * self._corrections.ratios).sum())
        ratio_deviation = ahead * self._corrections.ratio_deviation
        high = ahead + NORMAL_P90 * math.sqrt(variance + self._pending_variance + ratio_deviation**2)
        middle = min(self._spent + ahead, max(self.budget, self._spent))
        return Preview(
            round(self.budget),
            (self._worth + worth) / self.rows,
            round(middle),
            round(max(middle, min(self._spent + high, self.budget))),
        )

    def state(self) -> dict[str, Any]:
        """What was learned from settled rows, for JSON. Planned but unsettled rows are planned again."""
        return {
            "rows": self.rows,
            "settled": self._settled,
            "worth": self._worth * self._settled / max(1, self._planned),
            "spent": self._spent,
            "learned": self._corrections.state(),
            "known_seconds": self._known_seconds,
            "elapsed": self._elapsed,
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of an earlier run: its settled rows do not come again, rows in flight do.

        Raises:
            InputError: the state belongs to a job with other options or rows.
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
        self._corrections.resume(learned)
        self._settled = self._planned = settled
        self._worth, self._spent, self._known_seconds, self._elapsed = amounts
        self._pending_cost[:] = self._pending_variance = self._pending_seconds = 0.0
        self._priced_at = -1

    def _remaining_sample(self) -> tuple[Estimates, float]:
        """The corrected sample of the rows not planned yet, and how many rows each sampled row represents."""
        first = 0
        if self._at is not None:
            first = int(np.searchsorted(self._at, self._planned))
            # A small rest is a bad estimate; rows that have just passed resemble the next ones.
            if len(self._at) < self.rows:
                first = max(
                    0, min(first, len(self._at) - max(MIN_SAMPLE_ROWS, len(self._at) // MIN_SAMPLE_FRACTION))
                )
        estimates = self._sample.part(slice(first, None))
        return self._corrected(estimates), self.rows_left / max(1, len(estimates))

    def _prices(self, *, reserved: bool = True) -> list[Share]:
        """Prices at which the remaining rows are expected to cost the remaining budget minus the reserve."""
        estimates, scale = self._remaining_sample()
        money = max(EPSILON, self._budget_left())
        limit = None if self.deadline is None else max(EPSILON, self._seconds_left()) / scale

        def find(reserve: float) -> tuple[list[Share], float]:
            shares = prices_within(estimates, (money - reserve) / scale, limit)
            if estimates.spread is None or not reserved:
                return shares, 0.0
            return shares, self._amounts_left(self._pending_variance + scale * estimates.sums(shares)[2])

        return with_reserve(find, money)[0]

    def _choose_last(self, estimates: Estimates) -> Array:
        found = allocate(
            np.where(np.isneginf(estimates.worth), np.nan, estimates.worth),
            estimates.cost,
            max(EPSILON, self._budget_left()),
            spread=estimates.spread,
            risk=self.risk,
            seconds=estimates.seconds,
            deadline=None if self.deadline is None else max(EPSILON, self._seconds_left()),
            pending=self._pending_variance,
        )
        self._is_short_of_time = found.is_short_of_time
        return found.chosen

    def _record(self, estimates: Estimates, cost: Array, chosen: Array) -> None:
        """estimates: as corrected; cost: as given, uncorrected."""
        self._planned += len(chosen)
        self._worth += float(take_chosen(estimates.worth, chosen).sum())
        took = np.maximum(chosen, 0)
        self._pending_cost += np.bincount(took, take_chosen(cost, chosen), len(self._pending_cost))
        if estimates.spread is not None:
            self._pending_variance += float((take_chosen(estimates.spread, chosen) ** 2).sum())
        if estimates.seconds is not None:
            self._pending_seconds += float(take_chosen(estimates.seconds, chosen).sum()) / self._pace()

    def _budget_left(self) -> float:
        """Budget minus spent and pending costs."""
        return self.budget - self._spent - float((self._pending_cost * self._corrections.ratios).sum())

    def _seconds_left(self) -> float:
        assert self.deadline is not None
        return self.deadline - self._elapsed - self._pending_seconds * self._pace()

    def _pace(self) -> float:
        """Real over expected seconds."""
        if not self._known_seconds:
            return 1.0
        weight = self._settled / (self._settled + PRIOR_ROWS)
        return float(np.clip(1 + weight * (self._elapsed / self._known_seconds - 1), *PACE_BOUNDS))

    def _amounts_left(self, variance: float) -> float:
        return NormalDist().inv_cdf(1 - self.risk) * math.sqrt(variance)

    def _corrected(self, estimates: Estimates) -> Estimates:
        """Apply the corrections, and remove options whose hold no longer fits."""
        estimates = estimates.corrected(self._corrections.ratios, self._corrections.scatters, self._pace())
        return estimates.without(np.maximum(self._worst, estimates.cost) > max(EPSILON, self._budget_left()))
