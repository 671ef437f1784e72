"""What the threads of a batch do for a row: one paid call, the reading of its answer, or the whole workflow.

Leaves out what is done for many rows together: reserving, settling and looking into the cache (`agents.batch.executor`).
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field, replace
from typing import Any

from langgraph.errors import GraphDrained

from viaticum.agents.batch.cache import Cache, CachedModel
from viaticum.agents.batch.planning import PlannedRow, RouteEstimates
from viaticum.agents.batch.results import (
    CallResult,
    build_row,
    call_record,
    paid_calls,
    read_row,
    row_from_workflow,
)
from viaticum.agents.workflow.calls import ModelCall, settle_on_failure
from viaticum.agents.workflow.graph import Workflow, WorkflowResources
from viaticum.agents.workflow.nodes import StoppableRun
from viaticum.agents.workflow.state import RowAllowance, State
from viaticum.budgets.records import worst_costs
from viaticum.errors import ModelError, ModelUnavailable
from viaticum.jobs import JobRow
from viaticum.strategies import get as get_strategy
from viaticum.types import Completion, Pair, split_model

DRAIN_SECONDS = 30.0
CONCURRENCY = 32
OUTPUT = list(State.__annotations__)
RECURSION_LIMIT = 100_000


@dataclass(frozen=True)
class RowTools:
    """What rows are answered with. tools: the workflow's, whose budget pays; job: what all ledger keys begin with.

    stop: set to take no further row; those that run then have `drain_seconds` to end. keep_texts: rows keep what the
    models wrote.
    """

    tools: WorkflowResources
    job: str
    cache: Cache | None = None
    concurrency: int = CONCURRENCY
    keep_texts: bool = False
    drain_seconds: float = DRAIN_SECONDS
    stop: threading.Event = field(default_factory=threading.Event)


@dataclass(eq=False, slots=True)
class Task:
    """A row on its way. key: of the call at hand; wasted: what earlier tries of it cost; tried: how often it was unavailable.

    begun: whether this run has looked at what an earlier one left of it.
    """

    planned: PlannedRow
    call: ModelCall | None = None
    parameters: str = ""
    key: str = ""
    cached: str | None = None
    failed_cost: int = 0
    retries: int = 0
    started: bool = False
    last: bool = False
    pieces: CallResult | None = None


class Cancelled(ModelError):
    """The job ends: what was written is charged, and the row comes again."""


class RowSteps:
    """What is done on threads. cancelled: set to cut what runs."""

    def __init__(self, tools: RowTools) -> None:
        self.tools, self.ledger = tools, tools.tools.ledger
        self.estimates = RouteEstimates(tools.tools.router, tools.tools.is_usable)
        self.cancelled = threading.Event()
        self._runs: set[StoppableRun] = set()
        self._runs_lock = threading.Lock()
        flow = tools.tools
        if tools.cache is not None:
            cache = tools.cache
            flow = replace(flow, model=lambda name: CachedModel(tools.tools.model(name), cache))
        self._graph = Workflow(flow).build()

    def drain(self, *, now: bool) -> None:
        """Let workflows end before their next call; now: cut the call at hand."""
        with self._runs_lock:
            for run in self._runs:
                run.request_drain()
                run.stopped = now
        if now:
            self.cancelled.set()

    def run_of(self, task: Task) -> str:
        return f"{self.tools.job}/{task.planned.row.id}"

    def key_of(self, task: Task) -> str:
        return f"{self.run_of(task)}/0"

    def is_one_call(self, task: Task) -> bool:
        plan = task.planned.plan
        assert plan is not None
        return len(plan.pairs) == 1 and get_strategy(plan.pairs[0].strategy).samples == 1

    def write(self, task: Task) -> Completion:
        """One paid call, whose hold is dispatched."""
        call, limit = task.call, self.tools.tools.timeout
        assert call is not None
        began = time.monotonic()
        with settle_on_failure(self.ledger, task.key, call.model, call.messages, call.generation) as pieces:
            if self.cancelled.is_set():
                raise Cancelled("the job ends before this call was made")
            for piece in pieces:
                if isinstance(piece, Completion):
                    return piece
                if self.cancelled.is_set():
                    raise Cancelled("the job ends; what was written is charged")
                if limit is not None and time.monotonic() - began > limit:
                    raise ModelUnavailable(
                        f"{call.model.name} did not end within {limit:g} seconds; what it wrote is charged"
                    )
        raise AssertionError("a stream ends with its completion")

    def read(self, task: Task) -> JobRow | None:
        """The row of a call that was paid; None where there is no answer in its text and others may be asked."""
        assert task.pieces is not None
        assert task.planned.plan is not None
        pair = task.planned.plan.pairs[0]
        value, reason = read_row(task.planned, pair, task.pieces.completion)
        if value is None and self._may_ask_others(task, pair):
            return None
        call = call_record(task.planned, task.key, task.pieces, value)
        cost = task.pieces.cost + task.failed_cost
        before = paid_calls(self.ledger, self.run_of(task))[0] if task.failed_cost else ()
        calls = (*(each for each in before if each.key != call.key), call)
        return build_row(
            task.planned,
            "failed" if value is None else "answered",
            reason,
            answer=value,
            pair=str(pair),
            calls=calls,
            cost=cost,
            text=task.pieces.completion.text if self._keeps_text(task) else None,
            pieces=task.pieces.by_model(task.call) if self.tools.keep_texts else None,
        )

    def _keeps_text(self, task: Task) -> bool:
        return self.tools.keep_texts or task.planned.row.overrides is not None

    def _may_ask_others(self, task: Task, pair: Pair) -> bool:
        if task.planned.row.overrides is not None:
            return False
        plans, _ = self.estimates.of(task.planned.query)
        return bool(
            task.planned.policy.filter_fallbacks([each for each in plans if pair not in each.plan.pairs])
        )

    def flow(self, task: Task) -> JobRow:
        """The row by the workflow, which finds the calls that were paid for by their keys."""
        planned, run = task.planned, StoppableRun()
        allowance = RowAllowance(
            policy=planned.policy,
            on_short="cheaper" if task.last else "stop",
            run=self.run_of(task),
            plan=planned.plan,
        )
        query = planned.query
        start: State = {"question": query.text, "kind": query.kind, "messages": list(query.messages)}
        config: Any = {"recursion_limit": RECURSION_LIMIT}
        values: dict[str, Any] = {}
        with self._runs_lock:
            self._runs.add(run)
        try:
            if self.cancelled.is_set():
                raise Cancelled("the job ends before this row was begun")
            chunks = self._graph.stream(
                start, config, context=allowance, stream_mode="values", output_keys=OUTPUT, control=run
            )
            for chunk in chunks:
                values = chunk
        except GraphDrained:
            raise Cancelled("the job ends between two calls of this row") from None
        finally:
            with self._runs_lock:
                self._runs.discard(run)
        calls, cost = paid_calls(self.ledger, self.run_of(task), values.get("votes", ()))
        return row_from_workflow(planned, values, calls, cost, self._keeps_text(task))


def call_for(tools: WorkflowResources, planned: PlannedRow) -> ModelCall:
    """The call of a row whose plan is one call, as its wish has it."""
    assert planned.plan is not None
    pair, overrides = planned.plan.pairs[0], planned.row.overrides
    call = ModelCall.of(tools.model(pair.model), pair, planned.query)
    if overrides is None:
        return call
    own = call.generation
    if pair.strategy == "chat" and not split_model(overrides.model)[1]:
        limit = overrides.limit or own.max_new_tokens
        generation = replace(overrides.generation, max_new_tokens=limit)
        return replace(call, messages=list(overrides.messages), generation=generation)
    limit = min(own.max_new_tokens, overrides.limit or own.max_new_tokens)
    stop = tuple(dict.fromkeys((*own.stop, *overrides.generation.stop)))
    seed = own.seed or overrides.generation.seed
    return replace(call, generation=replace(own, max_new_tokens=limit, stop=stop, seed=seed))


def worst_of(tools: WorkflowResources, planned: PlannedRow) -> int:
    """Nano-dollars that the first call of a row may cost at most."""
    call = call_for(tools, planned)
    usage = call.model.worst_case_of(call.messages, call.generation)
    return sum(worst_costs(usage, tools.catalogue.prices(usage)).values())
