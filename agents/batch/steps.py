"""Steps that the threads of a batch do for one row: make a call, parse its answer, or run the whole workflow.

Leaves out what is done for many rows together: reserving, settling and reading the cache
(`agents.batch.executor`).
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field, replace
from typing import Any

from langgraph.errors import GraphDrained

from viaticum.agents.batch.cache import Cache, CachedModel
from viaticum.agents.batch.planned_rows import PlannedRow, RouteEstimates
from viaticum.agents.batch.results import (
    CallResult,
    build_row,
    call_record,
    paid_calls,
    posted_holds,
    read_row,
    row_from_workflow,
)
from viaticum.agents.workflow.call_streams import (
    check_budget,
    check_deadline,
    settle_on_failure,
    timed_out,
)
from viaticum.agents.workflow.calls import ModelCall
from viaticum.agents.workflow.deadlines import Deadline
from viaticum.agents.workflow.failover import FAILOVER, Failure, may_ask
from viaticum.agents.workflow.graph import Workflow
from viaticum.agents.workflow.nodes import StoppableRun
from viaticum.agents.workflow.resources import WorkflowResources
from viaticum.agents.workflow.settings import AUTO
from viaticum.agents.workflow.state import OUTPUT, RowAllowance, State
from viaticum.budgets.records import worst_costs
from viaticum.errors import ModelError
from viaticum.generation import NO_SETTINGS
from viaticum.jobs import JobRow
from viaticum.models.settings import chat_messages
from viaticum.strategies import get as get_strategy
from viaticum.types import Completion, Pair, split_model

DRAIN_SECONDS = 30.0
CONCURRENCY = 32
RECURSION_LIMIT = 100_000


@dataclass(frozen=True)
class RowTools:
    """What rows are answered with.

    Args:
        resources: of the workflow; its budget pays.
        job: prefix of all ledger keys.
        cache: answers of earlier calls; None for none.
        concurrency: calls at the same time.
        keep_texts: rows keep what the models wrote.
        drain_seconds: how long running rows may take to end after `stop`.
        stop: set to start no further row.
    """

    resources: WorkflowResources
    job: str
    cache: Cache | None = None
    concurrency: int = CONCURRENCY
    keep_texts: bool = False
    drain_seconds: float = DRAIN_SECONDS
    stop: threading.Event = field(default_factory=threading.Event)


@dataclass(eq=False, slots=True)
class Task:
    """A row that is being answered.

    call, parameters, key: the current call, the digest of its parameters, its ledger key. cached: its key in
    the cache. failed_cost: nano-dollars of earlier tries. retries: how often the model was unavailable.
    started: whether this run has looked up what an earlier run left of it. final: whether the workflow takes
    what still fits. result: of its call. failure: of its call, so that the workflow asks another pair.
    deadline: of all its calls together, from the first one on.
    """

    planned: PlannedRow
    call: ModelCall | None = None
    parameters: str = ""
    key: str = ""
    cached: str | None = None
    failed_cost: int = 0
    retries: int = 0
    started: bool = False
    final: bool = False
    result: CallResult | None = None
    failure: Failure | None = None
    deadline: Deadline | None = None


class Cancelled(ModelError):
    """The job is stopped: what was written is charged, and the row is answered by the next run."""


class RowSteps:
    """The steps, for all threads of a job. cancelled: set to cut running calls."""

    def __init__(self, tools: RowTools) -> None:
        self.tools, self.ledger = tools, tools.resources.ledger
        self.estimates = RouteEstimates(tools.resources.router, tools.resources.can_follow)
        self.cancelled = threading.Event()
        self._runs: set[StoppableRun] = set()
        self._runs_lock = threading.Lock()
        flow = tools.resources
        if tools.cache is not None:
            cache = tools.cache
            flow = replace(flow, model=lambda name: CachedModel(tools.resources.model(name), cache))
        self._graph = Workflow(flow).build()

    def drain(self, *, now: bool) -> None:
        """Let workflows end before their next call; with `now`, cut the current call too."""
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
        """Make one call. Its hold is dispatched, or, where the call is sent elsewhere, only reserved."""
        call, limit = task.call, self.tools.resources.timeout
        assert call is not None
        began, deadline = time.monotonic(), self._deadline(task)
        with settle_on_failure(self.ledger, task.key, call.model, call.messages, call.generation) as pieces:
            if self.cancelled.is_set():
                raise Cancelled("the job ends before this call was made")
            if deadline is not None:
                deadline.check()
            if not call.model.runs_here:
                self.ledger.dispatch(task.key)
            for piece in pieces:
                if isinstance(piece, Completion):
                    return piece
                if self.cancelled.is_set():
                    raise pieces.ended_by_caller(Cancelled("the job ends; what was written is charged"))
                if limit is not None and time.monotonic() - began > limit:
                    raise timed_out(call.model, limit)
                check_deadline(pieces, deadline)
                check_budget(pieces, self.ledger, self.tools.resources.budget)
        raise AssertionError("a stream ends with its completion")

    def _deadline(self, task: Task) -> Deadline | None:
        """Of a row, which begins with its first call: retries and other pairs have what is left."""
        seconds = self.tools.resources.max_seconds
        if seconds is not None and task.deadline is None:
            task.deadline = Deadline.after(seconds)
        return task.deadline

    def read(self, task: Task) -> JobRow | None:
        """The row of a settled call; None where its text holds no answer and other pairs may be tried."""
        assert task.result is not None
        assert task.planned.plan is not None
        pair = task.planned.plan.pairs[0]
        value, reason = read_row(task.planned, pair, task.result.completion)
        if value is None and self._may_ask_others(task, pair):
            return None
        call = call_record(task.planned, task.key, task.result, value)
        cost = task.result.cost + task.failed_cost
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
            text=task.result.completion.text if self._keeps_text(task) else None,
            thinking=task.result.completion.thinking if self._keeps_text(task) else None,
            pieces=task.result.by_model(task.call) if self.tools.keep_texts else None,
        )

    def _keeps_text(self, task: Task) -> bool:
        return self.tools.keep_texts or task.planned.row.overrides is not None

    def failure_of(self, task: Task, error: BaseException) -> Failure | None:
        """The failure of a row's one call, where another pair may answer; None where the row fails."""
        plan = task.planned.plan
        if not isinstance(error, FAILOVER) or plan is None or task.failure or not self.is_one_call(task):
            return None
        failure = Failure.of(str(plan.pairs[0]), error)
        return failure if self._may_ask_others(task, plan.pairs[0], failure) else None

    def _may_ask_others(self, task: Task, pair: Pair, failure: Failure | None = None) -> bool:
        """Whether the policy has another plan for a row that `pair` gave no answer to, or failed."""
        overrides = task.planned.row.overrides
        if overrides is not None and (failure is None or overrides.model != AUTO):
            return False
        plans, _ = self.estimates.of(task.planned.query)
        failed = {"failures": [failure.as_list] if failure else []}
        others = [
            each
            for each in plans
            if pair not in each.plan.pairs and all(may_ask(failed, other) for other in each.plan.pairs)
        ]
        return bool(task.planned.policy.filter_fallbacks(others))

    def flow(self, task: Task) -> JobRow:
        """Run the workflow for the row; it finds calls that were paid for by their keys."""
        planned, run = task.planned, StoppableRun()
        run.deadline = self._deadline(task)
        allowance = RowAllowance(
            policy=planned.policy,
            on_short="cheaper" if task.final else "stop",
            run=self.run_of(task),
            plan=planned.plan,
            failure=task.failure,
            settings=NO_SETTINGS if planned.row.overrides is None else planned.row.overrides.settings,
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
        if self.tools.cache is not None:
            self.tools.cache.put_posted(hold for hold, _ in posted_holds(self.ledger, self.run_of(task)))
        calls, cost = paid_calls(self.ledger, self.run_of(task), values.get("votes", ()))
        return row_from_workflow(planned, values, calls, cost, self._keeps_text(task))


def call_for(tools: WorkflowResources, planned: PlannedRow) -> ModelCall:
    """The call of a row whose plan is one call, with the overrides of its request."""
    assert planned.plan is not None
    pair, overrides = planned.plan.pairs[0], planned.row.overrides
    settings = tools.settings
    if overrides is not None:
        settings = overrides.settings.over(settings)
    call = ModelCall.of(tools.model(pair.model), tools.catalogue, pair, planned.query, settings)
    if overrides is None or pair.strategy != "chat" or split_model(overrides.model)[1]:
        return call
    messages = chat_messages(tools.catalogue[pair.model], list(overrides.messages), settings)
    return replace(call, messages=messages, generation=replace(call.generation, extra=overrides.extra))


def worst_of(tools: WorkflowResources, planned: PlannedRow) -> int:
    """Upper bound of the cost of a row's first call, in nano-dollars."""
    call = call_for(tools, planned)
    usage = call.model.worst_case_of(call.messages, call.generation)
    return sum(worst_costs(usage, tools.catalogue.prices(usage)).values())
