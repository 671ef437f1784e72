"""The SDK: `Viaticum(budget=...).solve("...")`, its async, streaming and batch forms, and how it ends.

A thin shell around the workflow graph. What it adds: opening and closing the ledger and the checkpoints, threads of its
own, threads of conversation that stand for one question each, and errors in place of interrupts. One object may be used
by many threads and event loops at once.
"""

from __future__ import annotations

import asyncio
import signal
import threading
import time
import uuid
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from langgraph.errors import GraphDrained
from langgraph.types import Command

from viaticum.agents.build import open_workflow
from viaticum.agents.draining import DrainGate
from viaticum.agents.workflow.approval import decided, decision_needed
from viaticum.agents.workflow.checkpoints import FileSaver, open_checkpoints
from viaticum.agents.workflow.events import Event, event_from_json
from viaticum.agents.workflow.graph import Workflow
from viaticum.agents.workflow.nodes import StoppableRun
from viaticum.agents.workflow.settings import Dollars, SettingsKeywords, WorkflowSettings
from viaticum.agents.workflow.state import Allowance, State, answer_of
from viaticum.budgets import Budget, Ledger
from viaticum.errors import Draining, InputError, ViaticumError
from viaticum.models.base import Model
from viaticum.outcomes import append_outcome
from viaticum.questions import digest_of
from viaticum.signals import drain_on
from viaticum.types import Answer, AnswerKind, Message, Outcome, Query

DRAIN_SECONDS = 30.0
OUTPUT = list(State.__annotations__)
# Nodes of one run: two a call, up to a hundred calls a pair. Never reached: a run ends when its pairs are used up.
RECURSION_LIMIT = 100_000

Result = TypeVar("Result")


class Viaticum:
    """Answers questions within a budget.

    Args:
        budget: dollars for all questions of this object; 0.01 by default.
        settings: keywords of `WorkflowSettings`, such as policy, models, router, folder and timeout.

    Raises:
        InputError: the budget is not above zero, or another setting is out of range.
    """

    def __init__(self, budget: Dollars | None = None, **settings: Unpack[SettingsKeywords]) -> None:
        self._settings = WorkflowSettings.from_keywords(budget, settings)
        with ExitStack() as opened:
            self.ledger = opened.enter_context(Ledger(self._settings.ledger_address))
            resources = open_workflow(self._settings, self.ledger)
            saver = opened.enter_context(
                open_checkpoints(self._settings.checkpoints_address, self._settings.concurrency)
            )
            opened.callback(resources.threads.close)
            self._opened = opened.pop_all()
        self._threads, self._gate = resources.threads, DrainGate()
        self.catalogue, self.router, self.policy = resources.catalogue, resources.router, resources.policy
        self.budget_name = resources.budget
        if isinstance(saver, FileSaver):
            resources = replace(resources, sync=saver.sync)
        self._resources = resources
        self.graph = Workflow(resources).build(saver)

    # One question

    def solve(
        self,
        question: str | Query,
        *,
        kind: AnswerKind = "auto",
        messages: Sequence[Message] = (),
        thread_id: str | None = None,
        allowance: Allowance | None = None,
    ) -> Answer:
        """Answer one question. The same thread_id again gives its answer, or goes on where a kill stopped it.

        messages: the conversation before it. allowance: what differs for this question, such as the scope that pays.
        Raises `BudgetExceeded`, with on_short="ask" `DecisionNeeded`, `ModelError`, `Draining`, and `InputError` where
        the thread belongs to another question.
        """
        query = _query(question, kind, messages)
        return _last(self._run(query, thread_id, allowance, live=False))

    def stream(
        self,
        question: str | Query,
        *,
        kind: AnswerKind = "auto",
        messages: Sequence[Message] = (),
        thread_id: str | None = None,
        allowance: Allowance | None = None,
    ) -> Iterator[Event | Answer]:
        """Events as they come (`viaticum.agents.workflow.events`), then the `Answer`.

        Closing the iterator early ends the call at hand, which is charged for what was written.
        """
        return self._run(_query(question, kind, messages), thread_id, allowance, live=True)

    async def asolve(
        self,
        question: str | Query,
        *,
        kind: AnswerKind = "auto",
        messages: Sequence[Message] = (),
        thread_id: str | None = None,
        allowance: Allowance | None = None,
    ) -> Answer:
        """As `solve`, without blocking the event loop; cancelled, it ends the call at hand."""
        query = _query(question, kind, messages)
        async for event in self._pump(lambda: self._run(query, thread_id, allowance, live=True)):
            if isinstance(event, Answer):
                return event
        raise AssertionError("a stream ends with its answer")

    async def astream(
        self,
        question: str | Query,
        *,
        kind: AnswerKind = "auto",
        messages: Sequence[Message] = (),
        thread_id: str | None = None,
        allowance: Allowance | None = None,
    ) -> AsyncIterator[Event | Answer]:
        """As `stream`, without blocking the event loop."""
        query = _query(question, kind, messages)
        async for event in self._pump(lambda: self._run(query, thread_id, allowance, live=True)):
            yield event

    # Decisions

    def resume(
        self, thread_id: str, decision: str | Mapping[str, Any], *, allowance: Allowance | None = None
    ) -> Answer:
        """Go on with a thread that `DecisionNeeded` named: "raise" (by what is missing), "cheaper" or "stop".

        {"do": "raise", "by": "0.05"} says by how many dollars; by_nanousd and by_tokens do, too. Raises `InputError`
        for a thread that waits for no decision, or what is none.
        """
        began, config = time.perf_counter(), _config(thread_id)
        with self._gate.enter() as run:
            seen = self.graph.get_state(config)
            if not seen.interrupts:
                raise InputError(f"thread {thread_id!r} waits for no decision")
            decided(decision, seen.interrupts[0].value)
            return _last(self._go(Command(resume=decision), config, run, allowance, began, live=False))

    async def aresume(
        self, thread_id: str, decision: str | Mapping[str, Any], *, allowance: Allowance | None = None
    ) -> Answer:
        """As `resume`, without blocking the event loop."""
        return await asyncio.get_running_loop().run_in_executor(
            self._threads.executor, lambda: self.resume(thread_id, decision, allowance=allowance)
        )

    # Many questions

    def batch(
        self, questions: Iterable[str | Query], *, concurrency: int | None = None
    ) -> Iterator[tuple[int, Answer | ViaticumError]]:
        """(place, answer or error) of each question as it ends, at most `concurrency` of them at once.

        Questions are taken from the iterable when there is room for them. Closing the iterator early waits for those
        that were begun.
        """
        most, begun = self._most(concurrency), dict[Future[Answer], int]()
        waiting = enumerate(questions)
        try:
            while True:
                while len(begun) < most and (one := next(waiting, None)) is not None:
                    begun[self._threads.executor.submit(self.solve, one[1])] = one[0]
                if not begun:
                    return
                for future in wait(begun, return_when=FIRST_COMPLETED).done:
                    yield begun.pop(future), _outcome(future)
        finally:
            for future in begun:
                future.cancel()
            wait(begun)

    async def abatch(
        self,
        questions: Iterable[str | Query] | AsyncIterable[str | Query],
        *,
        concurrency: int | None = None,
    ) -> AsyncIterator[tuple[int, Answer | ViaticumError]]:
        """As `batch`, without blocking the event loop; questions may come from an async iterable."""
        most, begun = self._most(concurrency), dict[asyncio.Task[Answer], int]()
        waiting, number, more = aiter(_asynchronous(questions)), 0, True
        try:
            while True:
                while more and len(begun) < most:
                    try:
                        one = await anext(waiting)
                    except StopAsyncIteration:
                        more = False
                        break
                    begun[asyncio.create_task(self.asolve(one))] = number
                    number += 1
                if not begun:
                    return
                done, _ = await asyncio.wait(begun, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    yield begun.pop(task), _outcome(task)
        finally:
            for task in begun:
                task.cancel()
            await asyncio.gather(*begun, return_exceptions=True)

    def _most(self, concurrency: int | None) -> int:
        if concurrency is not None and concurrency < 1:
            raise InputError(f"concurrency is at least 1, got {concurrency}")
        return min(concurrency or self._threads.count, self._threads.count)

    # The end

    def drain(self, timeout: float = DRAIN_SECONDS) -> bool:
        """Take nothing new (`Draining` is raised), and wait so many seconds for what runs; whether nothing is left.

        Questions have half of the time to be answered. Then each stops after the call at hand, which is settled, with a
        `Draining` that names its thread: solved again under that id, here or elsewhere, it goes on.
        """
        return self._gate.drain(timeout)

    def drain_on(self, *signals: signal.Signals, timeout: float = DRAIN_SECONDS) -> None:
        """`drain` on one of these signals (SIGTERM by default), then do what the signal did before.

        From the main thread only, as `signal.signal`. The signal a second time does that at once. A question has ended when
        `solve` returns or `stream` is asked for more than its answer: what the caller then does is not waited for, but
        the thread of an answer that was lost by it gives it again, unpaid.
        """
        drain_on(signals or (signal.SIGTERM,), lambda: self.drain(timeout))

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # What there is besides

    def model(self, name: str) -> Model:
        """A model by its name, opened when it is first asked for. Raises `UnknownName`, `WeightsError`, `MissingExtra`."""
        return self._resources.model(name)

    def budget(self) -> Budget:
        """Where the allowance stands."""
        return self.ledger.budget(self.budget_name)

    def feedback(self, question: str, answer: Answer, correct: bool) -> Path:
        """Tell whether an answer was right: a row for the pair that gave it is added to `outcomes.jsonl` in the folder.

        `viaticum router refit` learns from that file. An answer of several calls is kept for its last pair, without
        tokens and cost where other pairs had a part in them. Returns the file. Raises `InputError` for an answer
        that no pair gave.
        """
        if not answer.routes:
            raise InputError("no pair gave this answer, so there is nothing to learn from it")
        pair, alone = answer.routes[-1].pair, len(answer.routes) == 1
        row = Outcome(
            dataset="live",
            question_id=digest_of(question),
            question=question,
            model=pair.model,
            strategy=pair.strategy,
            answer=answer.value,
            correct=correct,
            input_tokens=answer.usage.input_tokens if alone else None,
            output_tokens=answer.usage.output_tokens if alone else None,
            cost_nanousd=answer.cost if alone else None,
            seconds=answer.usage.seconds if alone else None,
            finish_reason=answer.finish_reason,
        )
        append_outcome(self._settings.home / "outcomes.jsonl", row)
        return self._settings.home / "outcomes.jsonl"

    # Inside

    def _run(
        self, query: Query, thread_id: str | None, allowance: Allowance | None, *, live: bool
    ) -> Iterator[Event | Answer]:
        """Events, where it is `live`, then the answer: from the beginning, or from the thread's last checkpoint."""
        began, config = time.perf_counter(), _config(thread_id or uuid.uuid4().hex)
        with self._gate.enter() as run:
            start: State | None = {
                "question": query.text,
                "kind": query.kind,
                "messages": list(query.messages),
            }
            if thread_id is not None:  # a new id has no state
                seen = self.graph.get_state(config)
                if seen.values:
                    _check_same(query, seen.values, thread_id)
                    start = None
                    # Not `seen.next`: it leaves out a task that was killed after its writes were kept.
                    if not seen.tasks:
                        yield answer_of(seen.values, time.perf_counter() - began)
                        return
            yield from self._go(start, config, run, allowance, began, live=live)

    def _go(
        self,
        start: Any,
        config: Any,
        run: StoppableRun,
        allowance: Allowance | None,
        began: float,
        *,
        live: bool,
    ) -> Iterator[Event | Answer]:
        values: dict[str, Any] = {}
        thread_id = config["configurable"]["thread_id"]
        # With "custom" LangGraph moves every node to a thread of its own, so that its words come at once.
        chunks = self.graph.stream(
            start,
            config,
            context=allowance,
            stream_mode=["custom", "values"] if live else ["values"],
            output_keys=OUTPUT,
            durability="sync",
            control=run,
        )
        try:
            for mode, chunk in chunks:
                said: Any = chunk
                if mode == "values":
                    values = said
                elif (event := event_from_json(said)) is not None:
                    yield event
        except GraphDrained:
            raise Draining(
                f"stopped because this process is about to end; solve thread {thread_id!r} again to go on",
                thread_id=thread_id,
            ) from None
        finally:
            run.stopped = True
            chunks.close()  # type: ignore[attr-defined]
        if values.get("__interrupt__"):
            raise decision_needed(values["__interrupt__"][0].value, thread_id)
        yield answer_of(values, time.perf_counter() - began)

    async def _pump(self, run: Callable[[], Iterator[Result]]) -> AsyncIterator[Result]:
        """What an iterator gives on a thread of ours, as it comes. Given up, the iterator is closed at its next item."""
        loop, items = asyncio.get_running_loop(), asyncio.Queue[Any]()
        gone, end = threading.Event(), object()

        def work() -> None:
            if gone.is_set():
                return
            iterator = run()
            try:
                for item in iterator:
                    loop.call_soon_threadsafe(items.put_nowait, item)
                    if gone.is_set():
                        break
            finally:
                iterator.close()  # type: ignore[attr-defined]

        self._gate.check()
        future = loop.run_in_executor(self._threads.executor, work)
        future.add_done_callback(lambda _: items.put_nowait(end))
        try:
            while (item := await items.get()) is not end:
                yield item
            await future
        finally:
            gone.set()
            if not future.done():
                await asyncio.wait([future])


def _config(thread_id: str) -> Any:
    return {"configurable": {"thread_id": thread_id}, "recursion_limit": RECURSION_LIMIT}


def _query(question: str | Query, kind: AnswerKind, messages: Sequence[Message]) -> Query:
    if isinstance(question, Query):
        return question
    return Query(question, kind, messages=tuple(messages))


def _check_same(query: Query, values: Mapping[str, Any], thread_id: str) -> None:
    asked = values.get("asked") or values  # before `begin` ran, the input itself
    if asked.get("question") != query.text or list(asked.get("messages") or []) != list(query.messages):
        raise InputError(f"thread {thread_id!r} belongs to another question; use a new thread id")


def _last(events: Iterator[Event | Answer]) -> Answer:
    for event in events:
        if isinstance(event, Answer):
            return event
    raise AssertionError("a stream ends with its answer")


def _outcome(done: Future[Answer] | asyncio.Task[Answer]) -> Answer | ViaticumError:
    try:
        return done.result()
    except ViaticumError as error:
        return error


async def _asynchronous(questions: Iterable[Result] | AsyncIterable[Result]) -> AsyncIterator[Result]:
    if isinstance(questions, AsyncIterable):
        async for one in questions:
            yield one
    else:
        for one in questions:
            yield one
