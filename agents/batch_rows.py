"""Planned rows in, answered rows out: what a job does with a chunk of its input, on this machine or on any other.

A row whose plan is one call of one pair goes a short way: its worst case is reserved, and its cost posted, together with
those of the rows beside it, as many as there are at that moment. All others, and those whose one call gave no answer,
go through the workflow. Both know a call by the same key, job + row + number of the call, so that whatever happens in
between, what is paid for is found again and not paid for twice.

Leaves out planning (`agents.batch_plan`), files (`agents.batch_input`, `agents.batch_output`) and where it runs.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from typing import Any

from langgraph.errors import GraphDrained

from viaticum.agents.batch_answers import Pieces, cached_call, calls_of, read_row, row_of, row_of_flow
from viaticum.agents.batch_cache import Cache, CachedModel, Known, as_cached
from viaticum.agents.batch_plan import NO_OTHER, Expectations, Planned
from viaticum.agents.calls import Asked, completion_from_json, completion_to_json, next_try, paying
from viaticum.agents.graph import Tools, Workflow, plan_of
from viaticum.agents.nodes import Stoppable
from viaticum.agents.state import RowAllowance, State
from viaticum.budgets import Claim, Entry, Hold, Settlement
from viaticum.budgets.records import digest, worst_costs
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
    RateLimited,
    SandboxError,
    UnknownPrice,
    ViaticumError,
    WeightsError,
)
from viaticum.jobs import JobRow, RowState
from viaticum.strategies import get as get_strategy
from viaticum.types import Completion, Pair

DRAIN_SECONDS = 30.0
CONCURRENCY = 32
AHEAD_SECONDS = 0.1  # of work that is reserved before there is a thread for it, where calls are quick
MOST_AHEAD = 2048
TOGETHER_SECONDS = 0.01  # of quick calls that one thread makes in a row
AT_ONCE = 512  # rows that are reserved for, or settled, in one transaction
# What concerns all rows, not the one it was met at.
FATAL = (
    LedgerError,
    BudgetClosed,
    AuthenticationFailed,
    MissingExtra,
    WeightsError,
    UnknownPrice,
    SandboxError,
)
PASSING = (ModelUnavailable, RateLimited, ProviderUnavailable)
OUTPUT = list(State.__annotations__)
RECURSION_LIMIT = 100_000


@dataclass(frozen=True)
class RowTools:
    """What rows are answered with. tools: the workflow's, whose budget pays; job: what all ledger keys begin with.

    stop: set to take no further row; those that run then have `drain_seconds` to end. keep_texts: rows keep what the
    models wrote.
    """

    tools: Tools
    job: str
    cache: Cache | None = None
    concurrency: int = CONCURRENCY
    keep_texts: bool = False
    drain_seconds: float = DRAIN_SECONDS
    stop: threading.Event = field(default_factory=threading.Event)


def process_rows(planned: Iterable[Planned | None], tools: RowTools) -> Iterator[tuple[Planned, JobRow]]:
    """Each row as it ends, beside its plan. Rows are taken from the iterable when there is room for them; a None among
    them says that it is wiser to end some before further ones are taken.

    A row is answered, skipped or failed. Those that `stop` left over are not given at all: the same rows again go on
    where they were. Raises what concerns all rows (`FATAL`), after those that ran have ended.
    """
    work = _Work(tools)
    try:
        yield from work.rows(planned)
    finally:
        work.close()


@dataclass(eq=False, slots=True)
class _Task:
    """A row on its way. key: of the call at hand; wasted: what earlier tries of it cost; tried: how often it was unavailable."""

    planned: Planned
    asked: Asked | None = None
    parameters: str = ""
    key: str = ""
    cached: str | None = None
    wasted: int = 0
    tried: int = 0
    last: bool = False
    pieces: Pieces | None = None


class _Cancelled(ModelError):
    """The job ends: what was written is charged, and the row comes again."""


class _Work:
    """One run of `process_rows`. All but `_write`, `_read` and `_flow` is done by the caller's thread."""

    def __init__(self, tools: RowTools) -> None:
        self.tools, self.ledger = tools, tools.tools.ledger
        self.expectations = Expectations(tools.tools.router, tools.tools.usable)
        self._inside = 0
        self._room = tools.concurrency
        self._seconds = 1.0  # of a call, as lately seen
        self._short: deque[_Task] = deque()
        self._again: list[tuple[float, _Task]] = []
        self._asking: dict[str, list[_Task]] = {}  # those that wait for the same call, made for another row
        self._todo: SimpleQueue[tuple[Callable[[_Task], Any], list[_Task]] | None] = SimpleQueue()
        self._done: SimpleQueue[list[tuple[_Task, Any]]] = SimpleQueue()
        self._cancelled = threading.Event()
        self._runs: set[Stoppable] = set()
        self._runs_lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._fatal: BaseException | None = None
        self._stopped_at: float | None = None
        flow = tools.tools
        if tools.cache is not None:
            cache = tools.cache
            flow = replace(flow, model=lambda name: CachedModel(tools.tools.model(name), cache))
        self._graph = Workflow(flow).build()

    # --- the caller's thread --------------------------------------------------------------------------------

    def rows(self, planned: Iterable[Planned | None]) -> Iterator[tuple[Planned, JobRow]]:
        source, more = iter(planned), True
        while True:
            while more and not self._stopping() and not self._short and self._inside < self._room:
                block = list(itertools.islice(source, min(AT_ONCE, self._room - self._inside)))
                more = bool(block)
                yield from self._begin([_Task(each) for each in block if each is not None])
                if None in block and self._inside:
                    break
            yield from self._begin(self._due())
            if self._inside:
                yield from self._collect()
            elif self._stopping():
                break
            elif self._short:
                yield from self._last_resort(self._short.popleft())
            elif self._again:
                time.sleep(min(0.1, max(0.0, min(when for when, _ in self._again) - time.monotonic())))
            elif not more:
                break
        if self._fatal is not None:
            raise self._fatal

    def close(self) -> None:
        self._cancelled.set()
        for _ in self._threads:
            self._todo.put(None)

    def _stopping(self) -> bool:
        """Whether nothing new is begun. What runs is told so after half of the time to drain, and cut at its end."""
        if self._fatal is None and not self.tools.stop.is_set():
            return False
        now = time.monotonic()
        if self._stopped_at is None:
            self._stopped_at = now
        gone = now - self._stopped_at
        if gone > self.tools.drain_seconds / 2:
            with self._runs_lock:
                for run in self._runs:
                    run.request_drain()
                    run.stopped = gone > self.tools.drain_seconds
        if gone > self.tools.drain_seconds:
            self._cancelled.set()
        if gone > self.tools.drain_seconds + 10:
            self._inside = (
                0  # a model that gives no piece cannot be told; its hold stays, and the call is made again
            )
        return True

    def _due(self) -> list[_Task]:
        """Those that wait for a try that is due now, or for money, since some came free."""
        if self._stopping():
            return []
        now = time.monotonic()
        due = [task for when, task in self._again if when <= now]
        self._again = [(when, task) for when, task in self._again if when > now]
        return due

    def _begin(self, tasks: list[_Task]) -> Iterator[tuple[Planned, JobRow]]:
        """Find out what is known of each, reserve for the rest in one transaction, and give them to the threads."""
        if not tasks:
            return
        self._inside += len(tasks)
        found = self.ledger.find([self._key(task) for task in tasks])
        quick: list[_Task] = []
        ready: list[tuple[_Task, Completion]] = []
        for task in tasks:
            if task.planned.plan is None:
                yield self._end(task, row_of(task.planned, "skipped", task.planned.why))
                continue
            hold = found.get(self._key(task))
            if hold is not None:
                self._take_up(task, hold)
            if not self._is_one_call(task):
                self._give(self._flow, [task])
                continue
            try:
                known = self._prepare(task, hold)
            except Exception as error:
                yield from self._broken(task, error)
                continue
            if known is None:
                quick.append(task)
            elif known.result is not None:
                ready.append((task, completion_from_json(json.loads(known.result))))
            else:
                self._give(self._write, [task])
        yield from self._settle(ready)
        yield from self._reserve(quick)

    def _take_up(self, task: _Task, hold: Hold) -> None:
        """A run that was killed had decided how this row is answered."""
        plan = plan_of(hold)
        if plan is not None and plan != task.planned.plan:
            why = "decided before the job was interrupted"
            old = task.planned
            task.planned = self.expectations.planned(old.row, plan, old.policy, why)

    def _prepare(self, task: _Task, first: Hold | None) -> Hold | None:
        """Make the call of a row ready; returns its hold, where it has one."""
        task.asked = asked_of(self.tools.tools, task.planned)
        task.parameters = digest(task.asked.parameters)
        task.key, hold = self._key(task), None
        if first is not None:
            task.key, hold, task.wasted = next_try(self.ledger, task.key, task.parameters)
        if hold is None and self.tools.cache is not None:
            task.cached = self.tools.cache.key(task.asked, task.parameters)
        return hold

    def _reserve(self, tasks: list[_Task]) -> Iterator[tuple[Planned, JobRow]]:
        """Answer from the cache, and reserve for the others."""
        keys = [task.cached for task in tasks if task.cached is not None]
        known = self.tools.cache.find(keys) if self.tools.cache is not None and keys else {}
        wanted: list[tuple[_Task, Claim]] = []
        for task in tasks:
            if task.cached in known:
                yield from self._answer_from_cache(task, known[task.cached])
            elif task.cached is not None and task.cached in self._asking:
                self._asking[task.cached].append(task)
            else:
                try:
                    wanted.append((task, self._claim(task)))
                except Exception as error:
                    yield from self._broken(task, error)
                    continue
                if task.cached is not None:
                    self._asking[task.cached] = []
        holds = self.ledger.reserve_many(
            self.tools.tools.budget, [claim for _, claim in wanted], dispatch=True
        )
        begun = []
        for (task, _), hold in zip(wanted, holds, strict=True):
            if isinstance(hold, Hold):
                begun.append(task)
            else:
                yield from self._broken(task, hold)
        together = max(1, min(AT_ONCE, int(TOGETHER_SECONDS / max(self._seconds, 1e-5))))
        for start in range(0, len(begun), together):
            self._give(self._write, begun[start : start + together])

    def _claim(self, task: _Task) -> Claim:
        assert task.asked is not None
        assert task.planned.plan is not None
        worst = task.asked.model.worst_case_of(task.asked.messages, task.asked.generation)
        pair = task.planned.plan.pairs[0]
        tags = {"model": pair.model, "strategy": pair.strategy}
        return Claim(task.key, worst, self.tools.tools.catalogue.prices(worst), task.parameters, tags)

    def _collect(self) -> Iterator[tuple[Planned, JobRow]]:
        """Take what has ended by now, at least one; settle it together; let those go on that waited for money."""
        try:
            ended = self._done.get(timeout=0.05 if self._again or self._stopping() else 0.5)
        except Empty:
            return
        with suppress(Empty):
            while len(ended) < AT_ONCE:
                ended += self._done.get_nowait()
        written: list[tuple[_Task, Completion]] = []
        for task, outcome in ended:
            if isinstance(outcome, Completion):
                written.append((task, outcome))
            elif isinstance(outcome, JobRow):
                yield self._end(task, outcome)
            elif outcome is None:
                self._give(self._flow, [task])
            else:
                yield from self._broken(task, outcome)
        yield from self._settle(written)
        waiting, self._short = list(self._short), deque()
        if not self._stopping():
            yield from self._begin(waiting)

    def _settle(self, written: list[tuple[_Task, Completion]]) -> Iterator[tuple[Planned, JobRow]]:
        """Post what calls cost and keep their texts, in one transaction; then read the answers."""
        if not written:
            return
        entries = self.ledger.settle_many(
            [
                Settlement(task.key, each.usage.models, json.dumps(completion_to_json(each)))
                for task, each in written
            ]
        )
        if self.tools.cache is not None:
            self.tools.cache.keep(
                [(task.cached, each, task.key) for task, each in written if task.cached is not None]
            )
        for (task, completion), entry in zip(written, entries, strict=True):
            if not isinstance(entry, Entry):
                yield from self._broken(task, entry)
                continue
            task.pieces = Pieces(completion, entry.nanousd)
            for other in self._asking.pop(task.cached or "", ()):
                yield from self._answer_from_cache(other, Known(completion, task.key))
            yield from self._read_soon(task)

    def _answer_from_cache(self, task: _Task, known: Known) -> Iterator[tuple[Planned, JobRow]]:
        assert task.asked is not None
        task.key = known.key or task.key
        task.pieces = Pieces(as_cached(known.completion, task.asked.model), 0)
        yield from self._read_soon(task)

    def _read_soon(self, task: _Task) -> Iterator[tuple[Planned, JobRow]]:
        """Read the answer here, or, where that takes a sandbox, on a thread."""
        assert task.planned.plan is not None
        if get_strategy(task.planned.plan.pairs[0].strategy).needs:
            self._give(self._read, [task])
            return
        row = self._read(task)
        if row is None:
            self._give(self._flow, [task])
        else:
            yield self._end(task, row)

    def _broken(self, task: _Task, error: BaseException) -> Iterator[tuple[Planned, JobRow]]:
        """What an error means for a row: wait for money, try again, failed, or the end of the job."""
        for other in self._asking.pop(task.cached or "", ()):
            self._inside -= 1
            self._again.append((time.monotonic(), other))
        if isinstance(error, Draining | _Cancelled) or (
            self._cancelled.is_set() and isinstance(error, ModelError)
        ):
            self._inside -= 1
        elif isinstance(error, BudgetExceeded):
            self._inside -= 1
            self._room = self.tools.concurrency
            self._short.append(task)
        elif isinstance(error, FATAL) or not isinstance(error, Exception):
            self._inside -= 1
            self._fatal = self._fatal or error
        elif self._is_passing(error) and task.tried + 1 < self.tools.tools.tries:
            self._inside -= 1
            task.tried += 1
            wait = getattr(error, "retry_after", None)
            backoff = self.tools.tools.backoff * 2 ** (task.tried - 1)
            self._again.append((time.monotonic() + (backoff if wait is None else wait), task))
        else:
            reason = str(error) if isinstance(error, ViaticumError) else f"{type(error).__name__}: {error}"
            calls, cost = calls_of(self.ledger, self._run(task))
            yield self._end(task, row_of(task.planned, "failed", reason, calls=calls, cost=cost))

    @staticmethod
    def _is_passing(error: Exception) -> bool:
        return isinstance(error, PASSING) and not isinstance(error, ProviderTimeout)

    def _last_resort(self, task: _Task) -> Iterator[tuple[Planned, JobRow]]:
        """Nothing else runs, and still its worst case does not fit: something cheaper, or nothing."""
        planned = task.planned
        if not self._is_one_call(task):
            if not task.last:
                task.last = True  # the workflow may take what fits, and ends with what it has
                yield from self._begin([task])
                return
        elif planned.policy != NO_OTHER:
            for each in self.expectations.cheaper(planned.query, planned.cost_p90 or 0):
                task.planned = self.expectations.planned(
                    planned.row, each.plan, planned.policy, "what still fits"
                )
                task.planned = replace(task.planned, way=planned.way, expected=planned.expected)
                yield from self._begin([task])
                return
        self._inside += 1
        why = "the budget has no room left for the worst case of its call"
        calls, cost = calls_of(self.ledger, self._run(task))
        state: RowState = "failed" if cost else "skipped"
        yield self._end(task, row_of(planned, state, why, calls=calls, cost=cost))

    def _end(self, task: _Task, row: JobRow) -> tuple[Planned, JobRow]:
        self._inside -= 1
        return task.planned, row

    def _give(self, step: Callable[[_Task], Any], tasks: list[_Task]) -> None:
        if len(self._threads) < min(self.tools.concurrency, self._inside):
            thread = threading.Thread(target=self._serve, name="viaticum-batch", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._todo.put((step, tasks))

    # --- what a row asks ------------------------------------------------------------------------------------

    def _run(self, task: _Task) -> str:
        return f"{self.tools.job}/{task.planned.row.id}"

    def _key(self, task: _Task) -> str:
        return f"{self._run(task)}/0"

    def _is_one_call(self, task: _Task) -> bool:
        plan = task.planned.plan
        assert plan is not None
        return len(plan.pairs) == 1 and get_strategy(plan.pairs[0].strategy).samples == 1

    # --- threads --------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while (item := self._todo.get()) is not None:
            step, tasks = item
            ended: list[tuple[_Task, Any]] = []
            began = time.perf_counter()
            for task in tasks:
                try:
                    ended.append((task, step(task)))
                except BaseException as error:
                    ended.append((task, error))
            self._note((time.perf_counter() - began) / len(tasks))
            self._done.put(ended)

    def _note(self, seconds: float) -> None:
        self._seconds += (
            0.1 * (seconds - self._seconds) if seconds > self._seconds else 0.5 * (seconds - self._seconds)
        )
        ahead = int(AHEAD_SECONDS * self.tools.concurrency / max(self._seconds, 1e-5))
        self._room = self.tools.concurrency + (0 if self._short else min(MOST_AHEAD, ahead))

    def _write(self, task: _Task) -> Completion:
        """One paid call, whose hold is dispatched."""
        asked, limit = task.asked, self.tools.tools.timeout
        assert asked is not None
        began = time.monotonic()
        with paying(self.ledger, task.key, asked.model, asked.messages, asked.generation) as pieces:
            if self._cancelled.is_set():
                raise _Cancelled("the job ends before this call was made")
            for piece in pieces:
                if isinstance(piece, Completion):
                    return piece
                if self._cancelled.is_set():
                    raise _Cancelled("the job ends; what was written is charged")
                if limit is not None and time.monotonic() - began > limit:
                    raise ModelUnavailable(
                        f"{asked.model.name} did not end within {limit:g} seconds; what it wrote is charged"
                    )
        raise AssertionError("a stream ends with its completion")

    def _read(self, task: _Task) -> JobRow | None:
        """The row of a call that was paid; None where there is no answer in its text and others may be asked."""
        assert task.pieces is not None
        assert task.planned.plan is not None
        pair = task.planned.plan.pairs[0]
        value, reason = read_row(task.planned, pair, task.pieces.completion)
        if value is None and self._may_ask_others(task, pair):
            return None
        call = cached_call(task.planned, task.key, task.pieces, value)
        cost = task.pieces.cost + task.wasted
        return row_of(
            task.planned, "failed" if value is None else "answered", reason, answer=value, pair=str(pair),
            calls=(call,), cost=cost, text=task.pieces.completion.text if self._keeps_text(task) else None,
            pieces=task.pieces.by_model(task.asked) if self.tools.keep_texts else None,
        )  # fmt: skip

    def _keeps_text(self, task: _Task) -> bool:
        return self.tools.keep_texts or task.planned.row.wish is not None

    def _may_ask_others(self, task: _Task, pair: Pair) -> bool:
        if task.planned.row.wish is not None:
            return False
        plans, _ = self.expectations.of(task.planned.query)
        return bool(task.planned.policy.worth_asking([each for each in plans if pair not in each.plan.pairs]))

    def _flow(self, task: _Task) -> JobRow:
        """The row by the workflow, which finds the calls that were paid for by their keys."""
        planned, run = task.planned, Stoppable()
        allowance = RowAllowance(
            policy=planned.policy,
            on_short="cheaper" if task.last else "stop",
            run=self._run(task),
            plan=planned.plan,
        )
        query = planned.query
        start: State = {"question": query.text, "kind": query.kind, "messages": list(query.messages)}
        config: Any = {"recursion_limit": RECURSION_LIMIT}
        values: dict[str, Any] = {}
        with self._runs_lock:
            self._runs.add(run)
        try:
            if self._cancelled.is_set():
                raise _Cancelled("the job ends before this row was begun")
            chunks = self._graph.stream(
                start, config, context=allowance, stream_mode="values", output_keys=OUTPUT, control=run
            )
            for chunk in chunks:
                values = chunk
        except GraphDrained:
            raise _Cancelled("the job ends between two calls of this row") from None
        finally:
            with self._runs_lock:
                self._runs.discard(run)
        calls, cost = calls_of(self.ledger, self._run(task), values.get("votes", ()))
        return row_of_flow(planned, values, calls, cost, self._keeps_text(task))


def asked_of(tools: Tools, planned: Planned) -> Asked:
    """The call of a row whose plan is one call, as its wish has it."""
    assert planned.plan is not None
    pair, wish = planned.plan.pairs[0], planned.row.wish
    asked = Asked.of(tools.model(pair.model), pair, planned.query)
    if wish is None:
        return asked
    own = asked.generation
    if pair.strategy == "chat" and "+" not in wish.model:
        limit = wish.limit or own.max_new_tokens
        generation = replace(wish.generation, max_new_tokens=limit)
        return replace(asked, messages=list(wish.messages), generation=generation)
    limit = min(own.max_new_tokens, wish.limit or own.max_new_tokens)
    stop = tuple(dict.fromkeys((*own.stop, *wish.generation.stop)))
    seed = own.seed or wish.generation.seed
    return replace(asked, generation=replace(own, max_new_tokens=limit, stop=stop, seed=seed))


def worst_of(tools: Tools, planned: Planned) -> int:
    """Nano-dollars that the first call of a row may cost at most."""
    asked = asked_of(tools, planned)
    usage = asked.model.worst_case_of(asked.messages, asked.generation)
    return sum(worst_costs(usage, tools.catalogue.prices(usage)).values())
