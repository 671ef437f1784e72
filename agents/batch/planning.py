"""Plans the rows of a batch: estimates for each row, and the choice of the pacer or policy.

`paced` is the policy of a batch: the most right answers that the budget (and the time) buys, see
`viaticum.budgets.pacing`. Any other policy chooses for every row alone, from what is left. Rows that name a
model or a pair get what they name. Leaves out calling models (`agents.batch.executor`).
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from viaticum.agents.batch.input import BatchRow
from viaticum.agents.batch.planned_rows import (
    NO_FALLBACK,
    PlannedRow,
    RouteEstimates,
    at_batch_price,
    scaled,
)
from viaticum.agents.batch.reserved import ReservedForNamedModels
from viaticum.budgets.allocate import SKIPPED
from viaticum.budgets.pacing import Pacer, preview
from viaticum.errors import BudgetExceeded, InputError, ViaticumError
from viaticum.jobs import JobRow, Preview
from viaticum.money import NANOUSD_PER_USD
from viaticum.quantiles import mean_and_spread
from viaticum.routers.query import AtPrice, Plan, PlanRow, Policy, choose_plan, parse_policy
from viaticum.types import Pair, Query, split_model

PACED = "paced"
NOT_WORTH_ITS_COST = "no way is worth what it costs at this budget"
NO_TIME = "no time is left for it before the deadline"
BLOCK_ROWS = 256  # rows that are planned together, at most
UNSETTLED_SHARE = 16  # at most a 16th of the remaining rows is unsettled: prices follow real costs
HOLD_ROWS = 8  # about so many rows give the worst case of each plan
Array = np.ndarray[Any, Any]
BatchFactor = Callable[[BatchRow, Plan], float | None]


class RowPlanner:
    """Plans the rows of one pass over the input, block by block, and learns from their costs.

    Args:
        estimates: of the router.
        policy: "paced", or a policy of `Viaticum`.
        left: returns the nano-dollars that are not posted, by the ledger.
        elapsed: returns the seconds since the job started.
        worst: returns the nano-dollars that are held for a planned row before its first call; None holds
            nothing back.
        deadline: seconds after which no row is started; None for none.
        concurrency: calls at the same time.
        batch_factor: returns the share of its price that a row's plan costs in a provider's batch; None where
            the row cannot wait for one.

    Raises:
        InputError: the policy is unknown.
    """

    def __init__(
        self,
        estimates: RouteEstimates,
        policy: str,
        *,
        left: Callable[[], int],
        elapsed: Callable[[], float],
        worst: Callable[[PlannedRow], int] | None = None,
        deadline: float | None = None,
        concurrency: int = 1,
        batch_factor: BatchFactor = lambda row, plan: None,
    ) -> None:
        self.policy = None if policy == PACED else parse_policy(policy)
        waits = self.policy is None or not self.policy.reads_seconds  # what has to be fast waits for no batch
        self.estimates, self._batch_factor = estimates, batch_factor if waits else _never_in_batch
        self._left, self._elapsed, self._deadline = left, elapsed, deadline
        self._concurrency, self._worst = concurrency, worst
        self._plans: list[Plan] = []
        self._plan_index: dict[Plan, int] = {}
        self._pacer: Pacer | None = None
        self._unsettled = 0
        self._ended: list[tuple[PlannedRow, JobRow]] = []
        self._arrays: tuple[Any, list[Array], list[float | None]] | None = None
        self._began_at, self._budget, self._reserved = 0.0, 0, ReservedForNamedModels()

    def begin(self, sample: Sequence[tuple[int, BatchRow]], rows: int) -> None:
        """Start a pass. sample: (index among its rows, row); rows: how many rows the pass has."""
        self._unsettled, self._ended, self._began_at = 0, [], self._elapsed()
        arrays = self._sample_arrays(sample)
        if arrays is None:
            self._pacer = None
            return
        worth, cost, spread, seconds = arrays
        self._budget = self._left()
        at = np.array([index for index, _ in sample])
        self._reserved = self._reserve_for_named([row for _, row in sample], rows)
        self._pacer = Pacer(
            worth,
            cost,
            rows=rows,
            budget=max(1.0, self._budget - self._reserved.nanousd),
            spread=spread,
            at=at,
            worst=self._worst_holds([row for _, row in sample]),
            **self._deadline_terms(seconds),
        )

    def previews(
        self, sample: Sequence[tuple[int, BatchRow]], rows: int, budgets: Sequence[int]
    ) -> list[Preview]:
        """Forecast what each of some budgets buys; none where rows name their models, or a policy chooses."""
        arrays = self._sample_arrays(sample)
        if arrays is None:
            return []
        worth, cost, spread, seconds = arrays
        reserved = self._reserve_for_named([row for _, row in sample], rows)
        routed = [max(1, round(budget - reserved.nanousd)) for budget in budgets]
        found = preview(worth, cost, routed, rows=rows, spread=spread, **self._deadline_terms(seconds))
        return [reserved.add_to(each, budget) for each, budget in zip(found, budgets, strict=True)]

    def choices(self, sample: Sequence[tuple[int, BatchRow]], rows: int) -> tuple[dict[str, int], list[str]]:
        """How many rows of a sample get which plan, most frequent first, and where the estimates come from.

        Rows that are skipped count as "skipped".
        """
        self.begin(sample, rows)
        counts, origins = Counter[str](), dict[str, None]()
        for planned in self._plan_block([row for _, row in sample]):
            route = "skipped" if planned.plan is None else str(planned.plan)
            counts[f"{route} (provider batch)" if planned.deferred else route] += 1
            if planned.plan is not None and not planned.row.names_model:
                _, table = self.estimates.of(planned.query)
                found = (table[pair].origin for pair in planned.plan.pairs if pair in table)
                origins.update(dict.fromkeys(origin for origin in found if origin))
        return dict(counts.most_common()), [*origins]

    def forecast(self) -> Preview | None:
        self._learn()
        return (
            self._reserved.add_to(self._pacer.forecast(), self._budget) if self._pacer is not None else None
        )

    def plan(self, rows: Iterable[BatchRow]) -> Iterator[PlannedRow | None]:
        """Plan rows as they are taken; yields None to ask the caller to settle some rows first."""
        source = iter(rows)
        while block := list(itertools.islice(source, self._stride())):
            self.estimates.prefetch(block)
            for planned in self._plan_block(block):
                yield planned
                self._unsettled += 1
                if self._unsettled > self._max_unsettled():
                    while self._unsettled > self._max_unsettled() // 2:
                        yield None

    def left_to_batch(self, rows: int) -> None:
        """Planned rows wait for a provider's batch: no further row waits for them to be settled."""
        self._unsettled -= rows

    def answered_in_batch(
        self, row: BatchRow, plan: Plan, policy: Policy | None, factor: float
    ) -> PlannedRow:
        """A row whose call was made in a provider's batch, with its estimates there.

        policy: for the pairs that are tried where it has no answer; None for that of the job.
        """
        policy = policy or self.policy or NO_FALLBACK
        return at_batch_price(self.estimates.planned(row, plan, policy), factor)

    def settled(self, planned: PlannedRow, row: JobRow) -> None:
        """Take the result of a planned row."""
        self._unsettled -= 1
        self._ended.append((planned, row))
        if len(self._ended) >= BLOCK_ROWS:
            self._learn()

    def _learn(self) -> None:
        """Pass the rows that ended to the pacer."""
        ended, self._ended = self._ended, []
        if self._pacer is None or not ended:
            return
        named_plan = np.array([planned.row.names_model for planned, _ in ended])
        costs = np.array([float(row.cost_nanousd) for _, row in ended])
        expected = np.array([planned.expected for planned, _ in ended])
        self._reserved.settle(expected[named_plan].tolist(), costs[named_plan].tolist())
        timed: dict[str, Any] = {}
        if self._deadline is not None:
            timed = {"expected_seconds": np.array([planned.seconds for planned, _ in ended])}
        self._pacer.settle(
            np.array([planned.choice for planned, _ in ended]),
            expected,
            np.where(named_plan, 0.0, costs),  # not the pacer's money
            spread=np.array([planned.spread for planned, _ in ended]),
            learn=np.array(
                [
                    self._followed_choice(planned, row) and not any(call.cached for call in row.calls)
                    for planned, row in ended
                ]
            ),
            **timed,
        )

    # --- inside -----------------------------------------------------------------------------------

    def _followed_choice(self, planned: PlannedRow, row: JobRow) -> bool:
        chosen = None if planned.choice == SKIPPED else self._plans[planned.choice]
        return planned.plan == chosen and str(planned.plan) == row.route

    def _reserve_for_named(self, sample: Sequence[BatchRow], rows: int) -> ReservedForNamedModels:
        named_plan = [self._named_cost(row) for row in sample if row.names_model]
        scale = rows / max(1, len(sample))
        return ReservedForNamedModels(scale * sum(named_plan), sum(named_plan) / max(1, len(named_plan)))

    def _named_cost(self, row: BatchRow) -> float:
        """Expected cost of a row that names its model: the table's, else its worst case."""
        planned = self._deferred_if_possible(self._plan_named(row))
        if planned.cost_p50 is not None and planned.cost_p90 is not None:
            mean = math.nan if planned.cost_mean is None else planned.cost_mean
            costs = (np.array(float(each)) for each in (planned.cost_p50, planned.cost_p90, mean))
            return float(mean_and_spread(*costs)[0])
        factor = self._batch_factor(row, planned.plan) if planned.plan is not None else None
        try:
            worst = float(self._worst(planned)) if self._worst is not None else 0.0
            return worst if factor is None else worst * factor
        except ViaticumError:  # the row fails with this error
            return 0.0

    def _deadline_terms(self, seconds: Array) -> dict[str, Any]:
        if self._deadline is None:
            return {}
        return {"seconds": seconds, "deadline": max(1e-3, self._deadline - self._elapsed())}

    def _worst_holds(self, rows: Sequence[BatchRow]) -> Array | None:
        """Median hold of each plan over a few rows [W], in nano-dollars; 0 where it is unknown.

        Not the largest: one long row that the budget cannot pay would keep it from all others.
        """
        if self._worst is None:
            return None
        routed = [row for row in rows if not row.names_model]
        holds: dict[Pair, list[int]] = {plan.pairs[0]: [] for plan in self._plans}  # plans share first calls
        for row in routed[:: max(1, len(routed) // HOLD_ROWS)]:
            for pair, found in holds.items():
                try:
                    found.append(self._worst(PlannedRow(row, Plan((pair,)), NO_FALLBACK)))
                except InputError:  # e.g. a question too long for the model: the row will say so
                    continue
        median = {pair: float(np.median(found)) if found else 0.0 for pair, found in holds.items()}
        return np.array([median[plan.pairs[0]] for plan in self._plans])

    def _max_unsettled(self) -> int:
        left = self._pacer.rows_left if self._pacer is not None else 1 << 30
        return max(2 * self._concurrency, left // UNSETTLED_SHARE)

    def _stride(self) -> int:
        return self._pacer.stride(BLOCK_ROWS) if self._pacer is not None else BLOCK_ROWS

    def _sample_arrays(self, sample: Sequence[tuple[int, BatchRow]]) -> list[Array] | None:
        """Estimates of the sample; None if no pacer is needed. Raises the reason if no pair is usable."""
        rows = [row for _, row in sample]
        routed = [row for row in rows if not row.names_model]
        if not routed or self.policy is not None:
            return None
        self.estimates.prefetch(rows)
        plans = self.estimates.usable_plans(_query(routed[0]))
        self._plans = [each.plan for each in plans]
        self._plan_index = {plan: number for number, plan in enumerate(self._plans)}
        return self._arrays_of(rows)

    def _arrays_of(self, rows: Sequence[BatchRow]) -> list[Array]:
        """Accuracy, mean cost, cost deviation and seconds, each [rows, plans]; NaN if unknown."""
        lines = [self._row_arrays(row) for row in rows]
        return [np.stack([line[part] for line in lines]) for part in range(4)]

    def _row_arrays(self, row: BatchRow) -> list[Array]:
        if row.names_model:
            return [np.full(len(self._plans), math.nan)] * 4
        plans, table = self.estimates.of(_query(row))
        factors = [self._batch_factor(row, each) for each in self._plans]
        if self._arrays is not None and self._arrays[0] is plans and self._arrays[2] == factors:
            return self._arrays[1]
        estimates = np.full((4, len(self._plans)), math.nan)
        means = np.full(len(self._plans), math.nan)
        single = row.overrides is not None
        for each in plans:
            number = self._plan_index.get(each.plan)
            if number is None or (single and len(each.plan.pairs) > 1):
                continue
            asked = each.plan.pairs[: max(2, each.plan.need)]  # at least; a check is a call too
            seconds = self.estimates.times.seconds(asked, table)
            estimates[:, number] = each.accuracy, each.cost_p50, each.cost_p90, seconds
            means[number] = math.nan if each.cost_mean is None else each.cost_mean
        mean, spread = mean_and_spread(estimates[1], estimates[2], means)
        share = np.array([1.0 if factor is None else factor for factor in factors])
        here = np.array([factor is None for factor in factors])  # what waits takes no time of ours
        line = [estimates[0], mean * share, spread * share, here * estimates[3] / self._concurrency]
        if not single:
            self._arrays = (plans, line, factors)
        return line

    def _plan_block(self, rows: list[BatchRow]) -> Iterator[PlannedRow]:
        if self._pacer is None:
            yield from map(self._plan_by_policy, rows)
            return
        self._learn()
        worth, cost, spread, seconds = self._arrays_of(rows)
        timed: dict[str, Any] = {}
        if self._deadline is not None:
            timed = {"seconds": seconds, "elapsed": self._elapsed() - self._began_at}
        left = max(0.0, self._left() - self._reserved.nanousd)
        chosen = self._pacer.choose(worth, cost, spread, left=left, **timed)
        policy = AtPrice(self._pacer.price * NANOUSD_PER_USD)
        short_of_time = self._pacer.is_short_of_time
        for index, (row, choice) in enumerate(zip(rows, chosen.tolist(), strict=True)):
            if row.names_model:
                named = self._deferred_if_possible(self._plan_named(row))
                yield replace(named, expected=self._named_cost(row))
                continue
            if choice == SKIPPED:
                yield PlannedRow(row, None, policy, NO_TIME if short_of_time else NOT_WORTH_ITS_COST)
                continue
            planned = self.estimates.planned(
                row,
                self._plans[choice],
                policy,
                "",
                choice,
                float(cost[index, choice]),
                float(spread[index, choice]),
                float(seconds[index, choice]) if timed else 0.0,
            )
            yield self._deferred_if_possible(planned)

    def _plan_by_policy(self, row: BatchRow) -> PlannedRow:
        """Plan a row by the fixed policy, from what is left."""
        if row.names_model:
            return self._deferred_if_possible(self._plan_named(row))
        assert self.policy is not None
        plans = self.estimates.usable_plans(_query(row))
        plans = [each for each in plans if row.overrides is None or len(each.plan.pairs) == 1]
        plans = [self._at_its_price(row, each) for each in plans]
        if self.policy.reads_seconds:
            plans = self.estimates.with_seconds(_query(row), plans)
            self.policy.check(plans)
        try:
            route = choose_plan(plans, self._left(), self.policy)
        except BudgetExceeded as error:
            return PlannedRow(row, None, self.policy, str(error))
        planned = self.estimates.planned(row, route.plan, self.policy, route.why)
        return self._deferred_if_possible(planned)

    def _at_its_price(self, row: BatchRow, found: PlanRow) -> PlanRow:
        """A plan at the price of a provider's batch, where the row can wait for one."""
        factor = self._batch_factor(row, found.plan)
        return found if factor is None else replace(found, **scaled(found, factor))

    def _deferred_if_possible(self, planned: PlannedRow) -> PlannedRow:
        factor = None if planned.plan is None else self._batch_factor(planned.row, planned.plan)
        return planned if factor is None else at_batch_price(planned, factor)

    def _plan_named(self, row: BatchRow) -> PlannedRow:
        return self.estimates.planned(row, self.named_plan(row), NO_FALLBACK, "the row names it")

    @staticmethod
    def named_plan(row: BatchRow) -> Plan:
        """The plan that a row names: a pair, or a model with the strategy "chat"."""
        assert row.overrides is not None
        model, strategy = split_model(row.overrides.model)
        return Plan((Pair(model, strategy or "chat"),))


def _never_in_batch(row: BatchRow, plan: Plan) -> None:
    return None


def _query(row: BatchRow) -> Query:
    assert row.query is not None
    return row.query
