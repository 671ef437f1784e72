"""Answers planned rows: reserves, calls models on threads, settles and parses.

A row whose plan is one call of one pair is reserved for, and settled, in one transaction with the rows that
are ready at the same time. All other rows, and those whose one call gave no answer, go through the workflow.
Both paths use the same key for a call, job + row + number of the call, so that after a kill a call that was
paid for is found and not paid twice.

Leaves out planning (`agents.batch.planning`), files (`agents.batch.input`, `agents.batch.output`), the
threads (`agents.batch.step_threads`) and where it runs (`agents.batch.engines`).
"""

from __future__ import annotations

import itertools
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from viaticum.agents.batch.cache import CachedAnswer, as_cached
from viaticum.agents.batch.planned_rows import NO_FALLBACK, PlannedRow
from viaticum.agents.batch.results import BATCH_TAG, CallResult, build_row, paid_calls
from viaticum.agents.batch.step_threads import StepThreads
from viaticum.agents.batch.steps import (
    CONCURRENCY,
    DRAIN_SECONDS,
    Cancelled,
    RowSteps,
    RowTools,
    Task,
    call_for,
)
from viaticum.agents.workflow.calls import existing_tries, next_try
from viaticum.agents.workflow.failover import Failure, next_call_is_known
from viaticum.agents.workflow.serialization import completion_to_json, parse_completion, plan_from_hold
from viaticum.agents.workflow.watched_router import expected_tags
from viaticum.budgets import Claim, Entry, Hold, Settlement
from viaticum.budgets.records import digest
from viaticum.errors import (
    AuthenticationFailed,
    BudgetClosed,
    BudgetExceeded,
    Draining,
    LedgerError,
    MissingExtra,
    ModelError,
    ModelUnavailable,
    ProviderTimeout,
    ProviderUnavailable,
    QuotaExhausted,
    RateLimited,
    SandboxError,
    UnknownPrice,
    ViaticumError,
    WeightsError,
)
from viaticum.jobs import JobRow, RowState
from viaticum.money import Price
from viaticum.strategies import get as get_strategy
from viaticum.types import Completion, Pair, Row

__all__ = ["CONCURRENCY", "DRAIN_SECONDS", "FATAL", "RowTools", "process_rows"]

BATCH_ROWS = 512  # rows that are reserved for, or settled, in one transaction, at most
# Errors that concern all rows; they end the job.
FATAL = (
    LedgerError,
    BudgetClosed,
    AuthenticationFailed,
    QuotaExhausted,
    MissingExtra,
    WeightsError,
    UnknownPrice,
    SandboxError,
)
TRANSIENT = (ModelUnavailable, RateLimited, ProviderUnavailable)


def process_rows(
    planned: Iterable[PlannedRow | None], tools: RowTools, meanwhile: Callable[[], None] = lambda: None
) -> Iterator[tuple[PlannedRow, JobRow]]:
    """Answer rows; yields each with its plan as it ends: answered, skipped or failed.

    Rows that `stop` left over are not yielded; given again, they go on where they were.

    Args:
        planned: rows, taken when there is capacity for them; a None asks to finish some rows before further
            ones are taken.
        tools: resources and settings of the job.
        meanwhile: called at least twice a second while rows run, until the job is stopped.

    Raises:
        ViaticumError: one of `FATAL`, after the rows that ran have ended.
    """
    work = _Executor(tools)
    try:
        yield from work.rows(planned, meanwhile)
    finally:
        work.close()


class _Executor:
    """One run of `process_rows`.

    The caller's thread does everything but the steps of `RowSteps`, which threads do.
    """

    def __init__(self, tools: RowTools) -> None:
        self.tools, self.ledger = tools, tools.resources.ledger
        self.steps = RowSteps(tools)
        self._running = 0
        self._waiting_for_budget: deque[Task] = deque()
        self._retries: list[tuple[float, Task]] = []
        self._in_flight: dict[str, list[Task]] = {}  # tasks that wait for the same call of another row
        self._threads = StepThreads(tools.concurrency, lambda: not self._waiting_for_budget)
        self._prices: dict[tuple[str, ...], Mapping[str, Price]] = {}
        self._labels: dict[str, frozenset[str]] = {}
        self._fatal: BaseException | None = None
        self._stopped_at: float | None = None

    # --- the caller's thread ----------------------------------------------------------------------

    def rows(
        self, planned: Iterable[PlannedRow | None], meanwhile: Callable[[], None]
    ) -> Iterator[tuple[PlannedRow, JobRow]]:
        source, more = iter(planned), True
        while True:
            if not self._stopping():
                meanwhile()
            while (
                more
                and not self._stopping()
                and not self._waiting_for_budget
                and (room := self._threads.capacity - self._running) > 0
            ):
                block = list(itertools.islice(source, min(BATCH_ROWS, room)))
                more = bool(block)
                yield from self._start([Task(each) for each in block if each is not None])
                if None in block:
                    break
            yield from self._start(self._due_tasks())
            if self._running:
                yield from self._collect()
            elif self._stopping():
                break
            elif self._waiting_for_budget:
                yield from self._try_cheaper(self._waiting_for_budget.popleft())
            elif self._retries:
                time.sleep(min(0.1, max(0.0, min(when for when, _ in self._retries) - time.monotonic())))
            elif not more:
                break
        if self._fatal is not None:
            raise self._fatal

    def close(self) -> None:
        self.steps.cancelled.set()
        self._threads.close()

    def _stopping(self) -> bool:
        """Whether no row is started any more.

        Running calls are drained after half of `drain_seconds`, cut at its end.
        """
        if self._fatal is None and not self.tools.stop.is_set():
            return False
        now = time.monotonic()
        if self._stopped_at is None:
            self._stopped_at = now
        gone = now - self._stopped_at
        if gone > self.tools.drain_seconds / 2:
            self.steps.drain(now=gone > self.tools.drain_seconds)
        if gone > self.tools.drain_seconds + 10:
            # A model that yields no piece cannot be cut: its hold stays, and the call is made again by the
            # next run.
            self._running = 0
        return True

    def _due_tasks(self) -> list[Task]:
        """Tasks whose next try is due."""
        if self._stopping():
            return []
        now = time.monotonic()
        due = [task for when, task in self._retries if when <= now]
        self._retries = [(when, task) for when, task in self._retries if when > now]
        return due

    def _start(self, tasks: list[Task]) -> Iterator[tuple[PlannedRow, JobRow]]:
        """Look tasks up in ledger and cache, reserve the rest in one transaction, start their calls."""
        if not tasks:
            return
        self._running += len(tasks)
        found = self.ledger.find([self.steps.key_of(task) for task in tasks])
        single_calls: list[Task] = []
        ready: list[tuple[Task, Completion]] = []
        texts: list[str] = []
        for task in tasks:
            hold = found.get(self.steps.key_of(task))
            # A row that was started is finished, even if the plan would skip it now.
            if hold is not None and not task.started:
                self._restore_plan(task, hold)
            task.started = True
            if task.planned.plan is None:
                yield self._finish(task, build_row(task.planned, "skipped", task.planned.why))
                continue
            try:
                if task.failure is not None or not self.steps.is_one_call(task):
                    self._submit(self.steps.flow, [task])
                    continue
                known = self._prepare(task, hold)
                if known is None and hold is not None and next_call_is_known(self.ledger, hold.key):
                    task.failure = Failure(str(task.planned.plan.pairs[0]), "", "before a kill")
                    self._submit(self.steps.flow, [task])
                    continue
            except Exception as error:
                yield from self._handle_error(task, error)
                continue
            if known is None:
                single_calls.append(task)
            elif known.result is not None:
                ready.append(
                    (task, parse_completion(known.result, f"the text of the call {known.key} in the ledger"))
                )
                texts.append(known.result)  # as it is: another version may have written other fields
            else:
                self._submit(self.steps.write, [task])
        yield from self._settle(ready, texts)
        yield from self._reserve(single_calls)

    def _restore_plan(self, task: Task, hold: Hold) -> None:
        """Take the plan that a killed run had chosen for this row; its last try has the latest.

        A row that a provider's batch has not answered is planned anew.
        """
        *_, last = existing_tries(self.ledger, hold.key)
        if BATCH_TAG in last.tags and last.state != "posted":
            return
        plan = plan_from_hold(last)
        if plan is not None and plan != task.planned.plan:
            why = "decided before the job was interrupted"
            task.planned = self.steps.estimates.replan(task.planned, plan, why)

    def _prepare(self, task: Task, first: Hold | None) -> Hold | None:
        """Prepare the call of a row; returns its hold, where an earlier run has made one."""
        task.call = call_for(self.tools.resources, task.planned)
        task.parameters = digest(task.call.parameters)
        task.key, hold = self.steps.key_of(task), None
        if first is not None:
            task.key, hold, task.failed_cost = next_try(
                self.ledger, task.key, task.parameters, runs_here=task.call.model.runs_here
            )
        # A text that is in the ledger may not have reached the cache before a kill.
        if self.tools.cache is not None and (hold is None or hold.result is not None):
            task.cached = self.tools.cache.key(task.call, task.parameters)
        return hold

    def _reserve(self, tasks: list[Task]) -> Iterator[tuple[PlannedRow, JobRow]]:
        """Answer from the cache; reserve for the others, and start their calls."""
        keys = [task.cached for task in tasks if task.cached is not None]
        known = self.tools.cache.find(keys) if self.tools.cache is not None and keys else {}
        wanted: list[tuple[Task, Claim]] = []
        for task in tasks:
            if task.cached in known:
                yield from self._answer_from_cache(task, known[task.cached])
            elif task.cached is not None and task.cached in self._in_flight:
                self._in_flight[task.cached].append(task)
            else:
                try:
                    wanted.append((task, self._claim(task)))
                except Exception as error:
                    yield from self._handle_error(task, error)
                    continue
                if task.cached is not None:
                    self._in_flight[task.cached] = []
        started = []
        for task, hold in self._holds(wanted):
            if isinstance(hold, Hold):
                started.append(task)
            else:
                yield from self._handle_error(task, hold)
        group_size = min(BATCH_ROWS, self._threads.group_size)
        for start in range(0, len(started), group_size):
            self._submit(self.steps.write, started[start : start + group_size])

    def _holds(self, wanted: list[tuple[Task, Claim]]) -> Iterator[tuple[Task, Hold | ViaticumError]]:
        """Reserve for calls. Those that are sent elsewhere are dispatched one by one, as they are sent."""
        for here in (True, False):
            part = [each for each in wanted if _runs_here(each[0]) is here]
            claims = [claim for _, claim in part]
            holds = self.ledger.reserve_many(self.tools.resources.budget, claims, dispatch=here)
            yield from zip((task for task, _ in part), holds, strict=True)

    def _claim(self, task: Task) -> Claim:
        assert task.call is not None
        assert task.planned.plan is not None
        worst = task.call.model.worst_case_of(task.call.messages, task.call.generation)
        pair = task.planned.plan.pairs[0]
        tags = {"model": pair.model, "strategy": pair.strategy, **self._expected_tags(task.planned, pair)}
        names = tuple(worst)
        if names not in self._prices:  # converting the catalogue's decimals is slow
            self._prices[names] = self.tools.resources.catalogue.prices(worst)
        hint = task.call.model.counting_hint
        labels = self._labels.setdefault(pair.model, self.tools.resources.labels(pair.model))
        return Claim(task.key, worst, self._prices[names], task.parameters, tags, hint, labels)

    def _expected_tags(self, planned: PlannedRow, pair: Pair) -> dict[str, str]:
        costs, tokens = (planned.cost_p50, planned.cost_p90), (planned.tokens_p50, planned.tokens_p90)
        if None in (*costs, *tokens) or planned.row.overrides is not None:
            return {}
        row = Row(pair, planned.accuracy or 0.0, *tokens, *costs, planned.cost_mean)  # type: ignore[arg-type]
        return expected_tags(self.tools.resources.router, planned.query, row)

    def _collect(self) -> Iterator[tuple[PlannedRow, JobRow]]:
        """Settle the steps that have ended, at least one, together; retry tasks that wait for budget."""
        ended = self._threads.ended(0.05 if self._retries or self._stopping() else 0.5, BATCH_ROWS)
        if not ended:
            return
        written: list[tuple[Task, Completion]] = []
        for task, outcome in ended:
            if isinstance(outcome, Completion):
                written.append((task, outcome))
            elif isinstance(outcome, JobRow):
                yield self._finish(task, outcome)
            elif outcome is None:
                self._submit(self.steps.flow, [task])
            else:
                yield from self._handle_error(task, outcome)
        yield from self._settle(written)
        # Tasks that ended for want of budget have freed none.
        if not self._stopping() and not all(isinstance(outcome, BudgetExceeded) for _, outcome in ended):
            waiting, self._waiting_for_budget = list(self._waiting_for_budget), deque()
            yield from self._start(waiting)

    def _settle(
        self, written: list[tuple[Task, Completion]], texts: Sequence[str] = ()
    ) -> Iterator[tuple[PlannedRow, JobRow]]:
        """Post the costs of calls with their texts, in one transaction; then parse the answers.

        texts: completions as the ledger has them already, of calls that an earlier run made.
        """
        if not written:
            return
        texts = texts or [json.dumps(completion_to_json(each)) for _, each in written]
        entries = self.ledger.settle_many(
            [
                Settlement(task.key, each.usage.models, text)
                for (task, each), text in zip(written, texts, strict=True)
            ]
        )
        if self.tools.cache is not None:
            self.tools.cache.put(
                [
                    (task.cached, text, task.key)
                    for (task, _), text, entry in zip(written, texts, entries, strict=True)
                    if task.cached is not None and isinstance(entry, Entry)
                ]
            )
        for (task, completion), entry in zip(written, entries, strict=True):
            if not isinstance(entry, Entry):
                yield from self._handle_error(task, entry)
                continue
            task.result = CallResult(completion, entry.nanousd)
            for other in self._in_flight.pop(task.cached or "", ()):
                yield from self._answer_from_cache(other, CachedAnswer(completion, task.key))
            yield from self._read_answer(task)

    def _answer_from_cache(self, task: Task, known: CachedAnswer) -> Iterator[tuple[PlannedRow, JobRow]]:
        assert task.call is not None
        task.key = known.key or task.key
        task.result = CallResult(as_cached(known.completion, task.call.model), 0)
        yield from self._read_answer(task)

    def _read_answer(self, task: Task) -> Iterator[tuple[PlannedRow, JobRow]]:
        """Parse the answer here, or on a thread where that takes a sandbox."""
        assert task.planned.plan is not None
        if get_strategy(task.planned.plan.pairs[0].strategy).needs:
            self._submit(self.steps.read, [task])
            return
        row = self.steps.read(task)
        if row is None:
            self._submit(self.steps.flow, [task])
        else:
            yield self._finish(task, row)

    def _handle_error(self, task: Task, error: BaseException) -> Iterator[tuple[PlannedRow, JobRow]]:
        """Decide what an error means: wait for budget, retry, ask another pair, fail the row, end the job."""
        for other in self._in_flight.pop(task.cached or "", ()):
            self._running -= 1
            self._retries.append((time.monotonic(), other))
        if isinstance(error, Draining | Cancelled) or (
            self.steps.cancelled.is_set() and isinstance(error, ModelError)
        ):
            self._running -= 1
        elif isinstance(error, BudgetExceeded):
            self._running -= 1
            self._threads.capacity = self.tools.concurrency
            self._waiting_for_budget.append(task)
        elif isinstance(error, FATAL) or not isinstance(error, Exception):
            self._running -= 1
            self._fatal = self._fatal or error
        elif self._is_transient(error) and task.retries + 1 < self.tools.resources.tries:
            self._running -= 1
            task.retries += 1
            wait = getattr(error, "retry_after", None)
            backoff = self.tools.resources.backoff * 2 ** (task.retries - 1)
            self._retries.append((time.monotonic() + (backoff if wait is None else wait), task))
        elif failure := self.steps.failure_of(task, error):
            task.failure = failure
            self._submit(self.steps.flow, [task])
        else:
            reason = str(error) if isinstance(error, ViaticumError) else f"{type(error).__name__}: {error}"
            calls, cost = paid_calls(self.ledger, self.steps.run_of(task))
            yield self._finish(task, build_row(task.planned, "failed", reason, calls=calls, cost=cost))

    @staticmethod
    def _is_transient(error: Exception) -> bool:
        return isinstance(error, TRANSIENT) and not isinstance(error, ProviderTimeout)

    def _try_cheaper(self, task: Task) -> Iterator[tuple[PlannedRow, JobRow]]:
        """Nothing else runs and the worst case does not fit: take a cheaper pair, or end the row."""
        planned = task.planned
        # Its call was made and gave no answer, or failed.
        answerless = task.result is not None or task.failure is not None
        if answerless or not self.steps.is_one_call(task):
            if not task.final:
                task.final = True  # the workflow may take what fits, and ends with what it has
                yield from self._start([task])
                return
        elif planned.policy != NO_FALLBACK:
            for each in self.steps.estimates.cheaper_pairs(planned.query, planned.cost_p90 or 0):
                task.planned = self.steps.estimates.replan(planned, each.plan, "what still fits")
                yield from self._start([task])
                return
        self._running += 1
        why = "the budget has no room left for the worst case of its call"
        calls, cost = paid_calls(self.ledger, self.steps.run_of(task))
        state: RowState = "failed" if cost else "skipped"
        yield self._finish(task, build_row(planned, state, why, calls=calls, cost=cost))

    def _finish(self, task: Task, row: JobRow) -> tuple[PlannedRow, JobRow]:
        self._running -= 1
        return task.planned, row

    def _submit(self, step: Callable[[Task], Any], tasks: list[Task]) -> None:
        self._threads.submit(step, tasks, self._running)


def _runs_here(task: Task) -> bool:
    return task.call is not None and task.call.model.runs_here
