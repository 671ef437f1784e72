"""What a question is asked next: the rest of its plan, or one of the plans whose pairs were not tried yet.

Leaves out what applies to a run (`viaticum.agents.workflow.allowances`) and what follows where nothing fits
(`viaticum.agents.workflow.graph`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from langgraph.runtime import Runtime

from viaticum.agents.workflow.allowances import ResolvedAllowance, restricted_for, row_allowance
from viaticum.agents.workflow.approval import nanousd_left
from viaticum.agents.workflow.deadlines import SecondsOf, seconds_of_pair, seconds_of_plan, with_seconds
from viaticum.agents.workflow.estimates import estimate, output_limit
from viaticum.agents.workflow.failover import may_ask
from viaticum.agents.workflow.resources import WorkflowResources
from viaticum.agents.workflow.serialization import plan_from_hold
from viaticum.agents.workflow.sessions import route_turn
from viaticum.agents.workflow.state import Allowance, State, query_of, settings_of, turns_of
from viaticum.budgets import Budget, Ledger
from viaticum.budgets.planner import Option, WhenShort
from viaticum.budgets.planner import plan as plan_within
from viaticum.errors import ViaticumError
from viaticum.routers.query import Plan, PlanRoute, PlanRow, choose_plan
from viaticum.types import Pair, RoutingTable


@dataclass(frozen=True)
class Candidates:
    """The pairs and plans that are left for a question.

    Args:
        resources: under the restrictions of the question and of its run.
        state: of the question.
    """

    resources: WorkflowResources
    state: State

    @classmethod
    def of(cls, resources: WorkflowResources, state: State, runtime: Runtime[Allowance]) -> Candidates:
        return cls(restricted_for(resources, state, runtime), state)

    @cached_property
    def _estimates(self) -> tuple[RoutingTable, list[PlanRow]]:
        limit = output_limit(self.resources.catalogue, settings_of(self.state))
        return estimate(self.resources.router, query_of(self.state), limit)

    @property
    def table(self) -> RoutingTable:
        """The router's estimates for all pairs, whether they may be asked or not."""
        return self._estimates[0]

    @cached_property
    def seconds_of_pair(self) -> SecondsOf[str]:
        """What the calls of a pair, as model+strategy, are expected to take."""
        return seconds_of_pair(self.resources.latencies, lambda: self.table)

    @property
    def seconds_of_plan(self) -> SecondsOf[PlanRow]:
        return seconds_of_plan(self.seconds_of_pair)

    def usable_pairs(self) -> list[str]:
        """The pairs of the table, as model+strategy, whose models can be used here."""
        return [str(row.pair) for row in self.table if self.resources.is_usable(row.pair)]

    def none_usable(self) -> ViaticumError:
        """The error where no pair can be asked."""
        return self.resources.none_usable(row.pair for row in self.table)

    def pending(self) -> list[str]:
        """The pairs of the plan that are not tried yet, that may be used, and whose model has not failed.

        A check only where there is an answer, of another model.
        """
        state, resources = self.state, self.resources
        pairs = state["plan"]["pairs"] if state["plan"] else []
        left = [pair for pair in pairs if pair not in state["tried"] and may_ask(state, Pair.parse(pair))]
        left = [pair for pair in left if not Pair.parse(pair).is_check or self._is_of_other_model(pair)]
        return [pair for pair in left if not resources.residency or resources.is_usable(Pair.parse(pair))]

    def _is_of_other_model(self, check: str) -> bool:
        """Whether a check is of a model that did not give the last answer; no where there is none."""
        votes, verifier = self.state["votes"], Pair.parse(check).model
        return bool(votes) and not self.resources.catalogue.is_same_model(
            verifier, Pair.parse(votes[-1][0]).model
        )

    def untried(self) -> list[PlanRow]:
        """The plans whose pairs are all usable and not tried yet for this question."""
        state, tried = self.state, set(self.state["tried"])
        return [
            row
            for row in self._estimates[1]
            if not tried & {str(pair) for pair in row.plan.pairs}
            and self.resources.can_follow(row.plan)
            and all(may_ask(state, pair) for pair in row.plan.pairs)
        ]

    def choose(
        self, rows: Sequence[PlanRow], lineage: list[Budget], allowance: ResolvedAllowance
    ) -> PlanRoute:
        """The plan of the session's model, or else the one that the policy prefers.

        Among the rows that fit; with on_short "ask" or "stop", among all. Raises `BudgetExceeded` if it does
        not fit.
        """
        left = nanousd_left(lineage) if allowance.on_short == "cheaper" else None
        route = self._of_session(rows, left, allowance) or choose_plan(rows, left, allowance.policy)
        if allowance.on_short != "cheaper":
            _check_fits(route, lineage, allowance.on_short)
        return route

    def _of_session(
        self, rows: Sequence[PlanRow], left: int | None, allowance: ResolvedAllowance
    ) -> PlanRoute | None:
        """The plan of the first call of a session's turn; None without a session."""
        session = self.state["asked"].get("session")
        if session is None or self.state["tried"]:
            return None
        step = self.resources.sessions.state(session, turns_of(self.state))
        table = self.table
        if allowance.policy.reads_seconds:
            of_pair = self.seconds_of_pair
            table = RoutingTable(tuple(with_seconds(table.rows, lambda row: of_pair(str(row.pair)))))
        return route_turn(rows, table, step, self.resources.catalogue, allowance.policy, left)


def _check_fits(preferred: PlanRoute, lineage: list[Budget], on_short: WhenShort) -> None:
    options = [Option(str(preferred.plan), 1.0, preferred.row.cost_p50, preferred.row.cost_p90)]
    plan_within(lineage, options, on_short)


def decided_plan(ledger: Ledger, state: State, runtime: Runtime[Allowance]) -> Plan | None:
    """For a row of a job, the plan decided before this run: by the planner, or by a killed run."""
    row = row_allowance(runtime)
    if row is None:
        return None
    if not state["tried"] and row.plan is not None:
        return row.plan
    hold = ledger.hold(f"{state['run']}/{state['call']}")
    return None if hold is None else plan_from_hold(hold)


def was_left_out(candidates: Candidates, key: str) -> bool:
    """Whether an earlier run of this row could not pay for this pair, and asked a later one here."""
    hold = candidates.resources.ledger.hold(key)
    if hold is None or hold.result is None:
        return False
    return f"{hold.tags.get('model')}+{hold.tags.get('strategy')}" in candidates.pending()
