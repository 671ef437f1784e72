"""Planned rows of a batch, and the estimates of the router for the plans that can be run here.

Leaves out the choice among plans (`agents.batch.planning`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from viaticum.agents.batch.input import BatchRow
from viaticum.agents.batch.plan_times import PlanTimes
from viaticum.agents.workflow.deadlines import with_seconds
from viaticum.agents.workflow.estimates import estimate
from viaticum.budgets.allocate import SKIPPED
from viaticum.errors import InputError, ViaticumError
from viaticum.routers.query import AtPrice, Plan, PlanRow, Policy, QueryRouter
from viaticum.routers.query.limits import Limit
from viaticum.types import Pair, Query, Row

NO_FALLBACK = AtPrice(math.inf)  # no other pair is tried after the named one gave no answer


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """A row and its plan.

    plan: None where the row is skipped; `why` says why. accuracy, costs (nano-dollars), tokens_p50,
    tokens_p90 (of output): estimates for the plan, None where there are none. seen: the router was fitted on
    this very question; None where it cannot tell. policy: for the pairs that are
    tried after the plan gave no answer. choice, expected, spread, seconds: the pacer's
    original choice and estimates, kept when the plan later changes. deferred: the call may wait for a
    provider's batch, at whose price the costs are.
    """

    row: BatchRow
    plan: Plan | None
    policy: Policy
    why: str = ""
    accuracy: float | None = None
    cost_p50: int | None = None
    cost_p90: int | None = None
    cost_mean: int | None = None
    tokens_p50: int | None = None
    tokens_p90: int | None = None
    choice: int = SKIPPED
    expected: float = 0.0
    spread: float = 0.0
    seconds: float = 0.0
    seen: bool | None = None
    deferred: bool = False

    @property
    def query(self) -> Query:
        assert self.row.query is not None, "a row that cannot be used is not planned"
        return self.row.query


class RouteEstimates:
    """Estimates of a router for the plans that can be run here.

    Args:
        router: predicts them.
        can_follow: whether the models of a plan are usable, and none checks its own answer.
        limit: returns the most output tokens of a call of a pair.
        none_usable: returns the error where no model of these pairs is usable.
        times: how long plans take; None where that is not known.
    """

    def __init__(
        self,
        router: QueryRouter,
        can_follow: Callable[[Plan], bool],
        limit: Limit = lambda pair: None,
        none_usable: Callable[[Iterable[Pair]], ViaticumError] = lambda pairs: InputError(
            "no pair can be asked here; add a model: viaticum models add NAME"
        ),
        times: PlanTimes | None = None,
    ) -> None:
        self._router, self._can_follow, self._limit = router, can_follow, limit
        self._none_usable, self.times = none_usable, times or PlanTimes()
        self._last: tuple[Any, list[PlanRow], dict[Pair, Row], int] | None = None

    def prefetch(self, rows: Sequence[BatchRow]) -> None:
        self._router.prefetch([row.query for row in rows if row.query is not None])

    def of(self, query: Query) -> tuple[list[PlanRow], dict[Pair, Row]]:
        """The plans of usable pairs that are quick enough, and the table by pair.

        A router with one table for all rows is asked once, and again when times may have changed.
        """
        self.times.refresh()
        table, version = self._router.table(query), self.times.version
        last = self._last
        if not self._router.has_plans and last is not None and last[0] is table and last[3] == version:
            return last[1], last[2]
        limited, plans = estimate(self._router, query, self._limit)
        plans = [each for each in plans if self._can_follow(each.plan)]
        rows = {row.pair: row for row in limited}
        plans = self.times.in_time(plans, rows)
        self._last = (table, plans, rows, version)
        return plans, rows

    def with_seconds(self, query: Query, plans: Sequence[PlanRow]) -> list[PlanRow]:
        """Plans of a query; those whose seconds the router does not know with those of earlier calls."""
        _, table = self.of(query)
        return with_seconds(plans, lambda plan: self.times.of_all(plan, table))

    def usable_plans(self, query: Query) -> list[PlanRow]:
        """The plans of usable pairs, at least one. Raises the reason where no pair is usable."""
        plans, table = self.of(query)
        if not plans:
            raise self._none_usable(table)
        return plans

    def planned(
        self,
        row: BatchRow,
        plan: Plan,
        policy: Policy,
        why: str = "",
        choice: int = SKIPPED,
        expected: float = 0.0,
        spread: float = 0.0,
        seconds: float = 0.0,
    ) -> PlannedRow:
        """A row with a plan and its estimates: tokens where the plan is one call of one pair."""
        assert row.query is not None
        plans, table = self.of(row.query)
        found = next((each for each in plans if each.plan == plan), None)
        alone = table.get(plan.pairs[0]) if len(plan.pairs) == 1 else None
        return PlannedRow(
            row,
            plan,
            policy,
            why,
            None if found is None else found.accuracy,
            None if found is None else found.cost_p50,
            None if found is None else found.cost_p90,
            None if found is None else found.cost_mean,
            None if alone is None else alone.tokens_p50,
            None if alone is None else alone.tokens_p90,
            choice,
            expected,
            spread,
            seconds,
            self._router.has_seen(row.query),
        )

    def replan(self, planned: PlannedRow, plan: Plan, why: str) -> PlannedRow:
        """The same row with another plan; keeps the pacer's choice and estimates."""
        kept = (planned.choice, planned.expected, planned.spread, planned.seconds)
        return self.planned(planned.row, plan, planned.policy, why, *kept)

    def cheaper_pairs(self, query: Query, than: int) -> list[PlanRow]:
        """Single pairs with an expected cost below `than` nano-dollars, the most accurate first."""
        plans, _ = self.of(query)
        found = [each for each in plans if len(each.plan.pairs) == 1 and each.cost_p90 < than]
        return sorted(found, key=lambda each: (-each.accuracy, each.expected_cost))


def at_batch_price(planned: PlannedRow, factor: float) -> PlannedRow:
    """A row that waits for a provider's batch. factor: what a call costs there of its price."""
    return replace(planned, deferred=True, **scaled(planned, factor))


def scaled(costs: PlannedRow | PlanRow, factor: float) -> dict[str, Any]:
    """The known costs of a plan, times a factor."""
    found = {name: getattr(costs, name) for name in ("cost_p50", "cost_p90", "cost_mean")}
    return {name: round(cost * factor) for name, cost in found.items() if cost is not None}
