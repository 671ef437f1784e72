"""The terms of one run: its allowance with every field set, its deadline, and where its data may go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from langgraph.runtime import Runtime

from viaticum.agents.workflow.deadlines import Deadline, first_deadline
from viaticum.agents.workflow.nodes import StoppableRun
from viaticum.agents.workflow.resources import WorkflowResources
from viaticum.agents.workflow.restrictions import restricted
from viaticum.agents.workflow.state import Allowance, RowAllowance, State, residency_of
from viaticum.budgets.planner import WhenShort
from viaticum.checks import checked_type, shown
from viaticum.errors import InputError
from viaticum.residency import Residency
from viaticum.routers.query import Policy, as_policy

_PLAIN = (str, bytes, int, float, list, tuple, set, frozenset)  # which no graph takes as its context


@dataclass(frozen=True, slots=True)
class ResolvedAllowance:
    """An `Allowance` with every field set."""

    budget: str
    policy: Policy
    on_short: WhenShort
    timeout: float | None

    @classmethod
    def of(cls, resources: WorkflowResources, state: State, runtime: Runtime[Allowance]) -> ResolvedAllowance:
        """What the run says, else what the graph's settings say; on_short as a person decided."""
        given = allowance_in(runtime.context)
        return cls(
            budget=given.budget or resources.budget,
            policy=as_policy(given.policy if given.policy is not None else resources.policy),
            on_short=state.get("on_short") or given.on_short or resources.on_short,
            timeout=given.timeout if given.timeout is not None else resources.timeout,
        )


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


def row_allowance(runtime: Runtime[Allowance]) -> RowAllowance | None:
    return runtime.context if isinstance(runtime.context, RowAllowance) else None
