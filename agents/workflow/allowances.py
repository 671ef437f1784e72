"""The terms of one run: its allowance with every field set, and the plan that is preferred within it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from langgraph.runtime import Runtime

from viaticum.agents.workflow.approval import nanousd_left
from viaticum.agents.workflow.deadlines import Deadline, first_deadline
from viaticum.agents.workflow.failover import may_ask
from viaticum.agents.workflow.nodes import StoppableRun
from viaticum.agents.workflow.resources import WorkflowResources
from viaticum.agents.workflow.restrictions import restricted
from viaticum.agents.workflow.state import Allowance, RowAllowance, State, residency_of
from viaticum.budgets import Budget
from viaticum.budgets.planner import Option, WhenShort
from viaticum.budgets.planner import plan as plan_within
from viaticum.checks import checked_type, shown
from viaticum.errors import InputError
from viaticum.residency import Residency
from viaticum.routers.query import PlanRoute, PlanRow, Policy, choose_plan
from viaticum.types import Pair

_PLAIN = (str, bytes, int, float, list, tuple, set, frozenset)  # which no graph takes as its context


@dataclass(frozen=True, slots=True)
class ResolvedAllowance:
    """An `Allowance` with every field set."""

    budget: str
    policy: Policy
    on_short: WhenShort
    timeout: float | None


def allowance_in(context: object) -> Allowance:
    """The allowance of a run.

    Inside another graph the context is that graph's: it may be one, or have one.

    Raises:
        InputError: the context is a plain value, or what it has as its allowance is none.
    """
    if isinstance(context, Allowance):
        return context
    if isinstance(context, _PLAIN):
        raise InputError(f"context is an Allowance, or an object that has one, got {shown(context)}")
    name = "allowance"
    given = context.get(name) if isinstance(context, Mapping) else getattr(context, name, None)
    return (
        Allowance() if given is None else checked_type("context.allowance", given, Allowance, "an Allowance")
    )


def begin_deadline(resources: WorkflowResources, given: Allowance | None) -> Deadline | None:
    """When a run that begins now has to end: of its allowance, else of the settings; None for no limit."""
    seconds = resources.max_seconds if given is None or given.max_seconds is None else given.max_seconds
    own = None if seconds is None else Deadline.after(seconds)
    return first_deadline(own, None if given is None else given.deadline)


def until_of(resources: WorkflowResources, runtime: Runtime[Allowance]) -> float | None:
    """The same of a run that is called without the client, in seconds of `time.time`."""
    deadline = begin_deadline(resources, allowance_in(runtime.context))
    return None if deadline is None else deadline.until


def deadline_of(resources: WorkflowResources, state: State, runtime: Runtime[Allowance]) -> Deadline | None:
    """Of this run: from when the client began or continued it, else from when its question began."""
    if isinstance(runtime.control, StoppableRun):
        return runtime.control.deadline
    now, until = begin_deadline(resources, allowance_in(runtime.context)), state.get("until")
    return None if now is None or until is None else Deadline(now.seconds, until)


def restricted_for(
    resources: WorkflowResources, state: State, runtime: Runtime[Allowance]
) -> WorkflowResources:
    """The resources under the restrictions that the question began with, of this run, and of who pays."""
    given = allowance_in(runtime.context)
    of_budget = resources.ledger.residency(given.budget or resources.budget)
    return restricted(resources, residency_of(state) & Residency.of(given.only) & of_budget)


def pending_pairs(state: State, resources: WorkflowResources) -> list[str]:
    """The pairs of the plan that are not tried yet, that may be used, and whose model has not failed.

    A check only where there is an answer, of another model.
    """
    pairs = state["plan"]["pairs"] if state["plan"] else []
    left = [pair for pair in pairs if pair not in state["tried"] and may_ask(state, Pair.parse(pair))]
    answered_by = [Pair.parse(pair).model for pair, _ in state["votes"][-1:]]
    left = [pair for pair in left if not Pair.parse(pair).is_check or _is_other(pair, answered_by, resources)]
    return [pair for pair in left if not resources.residency or resources.is_usable(Pair.parse(pair))]


def _is_other(check: str, answered_by: list[str], resources: WorkflowResources) -> bool:
    """Whether a check is of a model that did not give the last answer; no where there is none."""
    verifier = Pair.parse(check).model
    return bool(answered_by) and not resources.catalogue.is_same_model(verifier, answered_by[0])


def row_allowance(runtime: Runtime[Allowance]) -> RowAllowance | None:
    return runtime.context if isinstance(runtime.context, RowAllowance) else None


def choose_within(rows: list[PlanRow], lineage: list[Budget], allowance: ResolvedAllowance) -> PlanRoute:
    """The plan that the policy prefers among those that fit; with on_short "ask" or "stop", among all.

    Raises `BudgetExceeded` if it does not fit.
    """
    if allowance.on_short == "cheaper":
        return choose_plan(rows, nanousd_left(lineage), allowance.policy)
    preferred = choose_plan(rows, None, allowance.policy)
    check_fits(preferred, lineage, allowance.on_short)
    return preferred


def check_fits(preferred: PlanRoute, lineage: list[Budget], on_short: WhenShort) -> None:
    """Raises `BudgetExceeded` where a plan does not fit."""
    options = [Option(str(preferred.plan), 1.0, preferred.row.cost_p50, preferred.row.cost_p90)]
    plan_within(lineage, options, on_short)
