"""The SDK: `Viaticum(budget=...).solve("...")`, its async, streaming and batch forms, and draining.

A thin layer over the workflow graph. It adds: opening and closing the ledger and the checkpoints, a thread
pool, and errors instead of interrupts; questions run on conversation threads
(`viaticum.agents.question_runs`). One object may be used by many threads and event loops at once.
"""

from __future__ import annotations

import asyncio
import copy
import os
import signal
import time
from collections.abc import AsyncIterable, AsyncIterator, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.types import Command

from viaticum.agents.build import open_workflow
from viaticum.agents.draining import DrainGate, drain_all
from viaticum.agents.question_runs import QuestionRuns
from viaticum.agents.workflow.approval import parse_decision
from viaticum.agents.workflow.arguments import as_query, as_questions, thread_config, with_settings
from viaticum.agents.workflow.checkpoints import FileSaver, open_checkpoints
from viaticum.agents.workflow.events import Event
from viaticum.agents.workflow.feedback import record_outcome
from viaticum.agents.workflow.graph import Workflow
from viaticum.agents.workflow.latencies import Seconds
from viaticum.agents.workflow.many import StartDeadline, in_tasks, in_threads
from viaticum.agents.workflow.open_streams import OpenStream
from viaticum.agents.workflow.resources import WorkflowResources
from viaticum.agents.workflow.restrictions import restricted
from viaticum.agents.workflow.sessions import Sessions
from viaticum.agents.workflow.settings import Dollars, SettingsKeywords, WorkflowSettings
from viaticum.agents.workflow.shadow import ShadowSampler
from viaticum.agents.workflow.soft_limits import SoftLimitWatch
from viaticum.agents.workflow.state import Allowance
from viaticum.budgets import Budget, Ledger
from viaticum.checks import checked_count, checked_seconds, checked_text, checked_type
from viaticum.display import html_facts
from viaticum.errors import InputError, ViaticumError
from viaticum.generation import GenerationKeywords
from viaticum.models.base import Model
from viaticum.money import format_usd
from viaticum.residency import NO_RESTRICTION, Residency
from viaticum.shadow_samples import SHADOWS
from viaticum.signals import drain_on
from viaticum.types import Answer, AnswerKind, Message, Pair, Query, Row

DRAIN_SECONDS = 30.0
Item = TypeVar("Item")


class Viaticum:
    """Answers questions within a budget.

    Args:
        budget: dollars for all questions of this object; 0.01 by default.
        settings: keywords of `WorkflowSettings`, such as policy, models, router, folder and timeout.

    Raises:
        InputError: the budget is not above zero, or another setting is out of range.
    """

    def __init__(self, budget: Dollars | None = None, **settings: Unpack[SettingsKeywords]) -> None:
        self._settings, self._gate = WorkflowSettings.from_keywords(budget, settings), DrainGate()
        with ExitStack() as opened:
            self.ledger = opened.enter_context(Ledger(self._settings.ledger_address))
            resources = open_workflow(self._settings, self.ledger)
            if self._settings.soft_limits is not None:
                opened.callback(SoftLimitWatch(self.ledger, self._settings.soft_limits).close)
            saver = opened.enter_context(
                open_checkpoints(self._settings.checkpoints_address, self._settings.concurrency)
            )
            opened.callback(resources.threads.close)
            self._shadow = self._open_shadow(resources)
            if self._shadow is not None:
                opened.callback(self._shadow.close)
            self._opened = opened.pop_all()
        self._threads = resources.threads
        self.catalogue, self.router, self.policy = resources.catalogue, resources.router, resources.policy
        self.budget_name, self.settings = resources.budget, resources.settings
        is_file = isinstance(saver, FileSaver)
        process = None if is_file else os.getpid()  # a file is opened again after a fork
        self._resources = replace(resources, sync=saver.sync) if isinstance(saver, FileSaver) else resources
        self.graph = Workflow(self._resources).build(saver)
        self._runs = QuestionRuns(self._resources, self.graph, self._gate, process, self._shadow)

    def _open_shadow(self, resources: WorkflowResources) -> ShadowSampler | None:
        sampling, path = self._settings.shadow, self._settings.home / SHADOWS
        if sampling is None:
            return None
        return ShadowSampler(resources, sampling, path, is_idle=lambda: self._gate.is_idle)

    def __repr__(self) -> str:
        return f"Viaticum({'; '.join(f'{name} {value}' for name, value in self._facts())})"

    def _repr_html_(self) -> str:
        return html_facts(self._facts())

    def _facts(self) -> list[tuple[str, str]]:
        """What it is, for people; without keys and passwords, and never an error."""
        router, policy = type(self.router).__name__, self._settings.policy
        facts = [("router", router), ("policy", policy if isinstance(policy, str) else repr(policy))]
        if self._gate.closed:
            return [("budget", f"{self.budget_name} (closed)"), *facts]
        try:
            budget = self.budget()
        except ViaticumError as error:
            return [("budget", f"{self.budget_name} ({error})"), *facts]
        left = "no limit" if budget.left_nanousd is None else f"{format_usd(budget.left_nanousd)} left"
        spent = f"{format_usd(budget.posted_nanousd)} spent, {format_usd(budget.held_nanousd)} held"
        return [("budget", f"{budget.name}: {spent}, {left}"), *facts]

    # One question

    def solve(
        self,
        question: str | Query,
        *,
        kind: AnswerKind = "auto",
        messages: Sequence[Message] = (),
        thread_id: str | None = None,
        allowance: Allowance | None = None,
        **settings: Unpack[GenerationKeywords],
    ) -> Answer:
        """Answer one question.

        Args:
            question: a text, or a `Query` with kind and messages of its own.
            kind: of the answer that is expected.
            messages: the conversation before the question.
            thread_id: the same id again returns the stored answer, or continues where a kill stopped the
                question.
            allowance: terms of this question alone, such as the scope that pays.
            settings: how its calls are generated: max_tokens, temperature, system and so on; see
                `viaticum.generation.GenerationSettings`.

        Raises:
            BudgetExceeded: no call fits in the budget.
            DecisionNeeded: with on_short="ask", a person has to decide; see `resume`.
            ModelError: every model failed.
            Draining: this process is about to end.
            ClientClosed: the client is closed.
            InputError: an argument cannot be used, or the thread belongs to another question.
        """
        query = as_query(question, kind, messages)
        return _answer_in(self._runs.run(query, thread_id, with_settings(allowance, settings), live=False))

    def stream(
        self,
        question: str | Query,
        *,
        kind: AnswerKind = "auto",
        messages: Sequence[Message] = (),
        thread_id: str | None = None,
        allowance: Allowance | None = None,
        **settings: Unpack[GenerationKeywords],
    ) -> Iterator[Event | Answer]:
        """Yield events as they occur (`viaticum.agents.workflow.events`), then the `Answer`.

        Closing the iterator early ends the current call, which is charged for what was generated. So does
        closing the client.
        """
        allowance = with_settings(allowance, settings)
        query = as_query(question, kind, messages)
        return self._gate.watched(self._runs.run(query, thread_id, allowance, live=True))

    async def asolve(
        self,
        question: str | Query,
        *,
        kind: AnswerKind = "auto",
        messages: Sequence[Message] = (),
        thread_id: str | None = None,
        allowance: Allowance | None = None,
        **settings: Unpack[GenerationKeywords],
    ) -> Answer:
        """As `solve`, without blocking the event loop; cancelling it ends the current call."""
        query = as_query(question, kind, messages)
        async for event in self._runs.arun(query, thread_id, with_settings(allowance, settings)):
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
        **settings: Unpack[GenerationKeywords],
    ) -> AsyncIterator[Event | Answer]:
        """As `stream`, without blocking the event loop."""
        query = as_query(question, kind, messages)
        async for event in self._runs.arun(query, thread_id, with_settings(allowance, settings)):
            yield event

    # Decisions

    def resume(
        self, thread_id: str, decision: str | Mapping[str, Any], *, allowance: Allowance | None = None
    ) -> Answer:
        """Continue a thread that raised `DecisionNeeded`: "raise" (by what is missing), "cheaper" or "stop".

        {"do": "raise", "by": "0.05"} raises by so many dollars; the keys by_nanousd and by_tokens work
        likewise.

        Raises:
            InputError: the thread waits for no decision, or this is none.
        """
        began, config = time.perf_counter(), thread_config(thread_id)
        with self._runs.enter(allowance) as run, self._runs.owned(thread_id, run):
            stored = self.graph.get_state(config)
            if not stored.interrupts:
                raise InputError(f"thread {thread_id!r} waits for no decision")
            parse_decision(decision, stored.interrupts[0].value)
            return _answer_in(
                self._runs.run_graph(
                    Command(resume=decision), config, run, with_settings(allowance, {}), began, live=False
                )
            )

    async def aresume(
        self, thread_id: str, decision: str | Mapping[str, Any], *, allowance: Allowance | None = None
    ) -> Answer:
        """As `resume`, without blocking the event loop."""
        return await asyncio.get_running_loop().run_in_executor(
            self._threads.executor, lambda: self.resume(thread_id, decision, allowance=allowance)
        )

    # Many questions

    def batch(
        self,
        questions: Iterable[str | Query],
        *,
        concurrency: int | None = None,
        deadline: float | None = None,
    ) -> Iterator[tuple[int, Answer | ViaticumError]]:
        """Yield (index of the question, answer or error) as each ends, at most `concurrency` at a time.

        Questions are read from the iterable when there is room for them. Closing the iterator early waits for
        those in progress.

        Args:
            deadline: seconds from now after which no question is begun: the error of each later one is
                `DeadlineExceeded`. Those in progress go on; `max_seconds` ends them.
        """
        self._gate.check_open()
        checked, begin = as_questions(questions, Iterable), StartDeadline(deadline)

        def solve(question: str | Query) -> Answer:
            begin.check()
            return self.solve(question)

        return in_threads(self._threads.executor, solve, checked, self._concurrency(concurrency))

    def abatch(
        self,
        questions: Iterable[str | Query] | AsyncIterable[str | Query],
        *,
        concurrency: int | None = None,
        deadline: float | None = None,
    ) -> AsyncIterator[tuple[int, Answer | ViaticumError]]:
        """As `batch`, without blocking the event loop; questions may come from an async iterable."""
        self._gate.check_open()
        checked, begin = as_questions(questions, (Iterable, AsyncIterable)), StartDeadline(deadline)

        async def solve(question: str | Query) -> Answer:
            begin.check()
            return await self.asolve(question)

        return in_tasks(solve, checked, self._concurrency(concurrency))

    def _concurrency(self, concurrency: int | None) -> int:
        if concurrency is None:
            return self._threads.count
        return min(checked_count("concurrency", concurrency), self._threads.count)

    # Draining and closing

    def drain(self, timeout: float = DRAIN_SECONDS) -> bool:
        """Refuse new questions with `Draining` and wait for those in progress; returns whether all ended.

        Questions have half of `timeout` (seconds) to be answered. Then each stops after its current call,
        which is settled, with a `Draining` that names its thread: solved again under that id, here or
        elsewhere, it continues. Shadow calls have the same half and at most their
        `wait_seconds`; then they end and are settled.
        """
        return drain_all(self._gate, self._shadow, checked_seconds("timeout", timeout) if timeout else 0.0)

    def drain_on(self, *signals: signal.Signals, timeout: float = DRAIN_SECONDS) -> None:
        """`drain` on one of these signals (SIGTERM by default), then do what the signal did before.

        From the main thread only, as `signal.signal`. A second signal does at once what it did before. A
        question has ended when `solve` returns, or when the iterator of `stream` is advanced past its answer:
        what the caller does after that is not waited for. An answer that is lost thereby can be fetched again
        from its thread, at no cost.
        """
        drain_on(signals or (signal.SIGTERM,), lambda: self.drain(timeout))

    def chatting(self, events: Generator[Item, None, None]) -> OpenStream[Item]:
        """The events of a plain chat: `close` ends it, and no shadow call of a local model begins before."""
        return self._gate.watched(events, is_chat=True)

    @property
    def shadow(self) -> ShadowSampler | None:
        """What asks a share of the questions again; None without shadow sampling."""
        return self._shadow

    def wait_for_shadows(self, timeout: float | None = None) -> bool:
        """Wait until no shadow call is queued or in progress; returns whether that is so.

        timeout: seconds; None for as long as it takes.
        """
        return self._shadow is None or self._shadow.wait(timeout)

    def close(self) -> None:
        """Close ledger, checkpoints and threads, after what is in progress was settled.

        Streams end where their readers stand, and other questions after their current call, which has 30
        seconds; then it is ended too.
        """
        try:
            self._gate.close()
        finally:
            self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def aclose(self) -> None:
        """As `close`, in a thread, so that the event loop goes on meanwhile."""
        await asyncio.to_thread(self.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    # Models, budget, feedback

    def model(self, name: str) -> Model:
        """A model by its name, opened on first use.

        Raises `UnknownName`, `WeightsError`, `MissingExtra`, `ClientClosed`.
        """
        self._gate.check_open()
        return self._resources.model(checked_text("the name of a model", name))

    def is_usable(self, model: str) -> bool:
        """Whether a model is given, or of the catalogue with its weights, key and price here."""
        return self._resources.is_usable(Pair(checked_text("the name of a model", model), "direct"))

    @property
    def sessions(self) -> Sessions:
        """What is remembered of conversations."""
        return self._resources.sessions

    @property
    def max_seconds(self) -> float | None:
        """Seconds that a run may take where its allowance does not say; None for no limit."""
        return self._resources.max_seconds

    def seconds_of(self, row: Row) -> Seconds | None:
        """What a call of a row's pair takes, by the newest calls in the ledger; None where none was seen."""
        return self._resources.latencies.of(row)

    def labels(self, model: str) -> frozenset[str]:
        """Where the data of a model's calls goes (`viaticum.residency`)."""
        return self._resources.labels(model)

    def allows(self, model: str) -> bool:
        """Whether the restrictions of this client allow a model, which may yet be unusable."""
        return self._resources.residency.allows(self.labels(model))

    def why_unusable(self, models: Iterable[str]) -> ViaticumError:
        """The error where none of these models can be used here."""
        return self._resources.none_usable(Pair(name, "direct") for name in models)

    def derive(
        self,
        *,
        checkpointer: BaseCheckpointSaver[Any] | None = None,
        residency: Residency = NO_RESTRICTION,
        **resources: Any,
    ) -> Viaticum:
        """A client that shares the ledger, models and threads of this one, and ends with it.

        Args:
            checkpointer: None for that of this client.
            residency: restrictions beside those of this client.
            resources: fields of `WorkflowResources` that differ.
        """
        self._gate.check_open()
        derived = copy.copy(self)
        derived._resources = restricted(replace(self._resources, **resources), residency)
        derived.router, derived.policy = derived._resources.router, derived._resources.policy
        derived.budget_name = derived._resources.budget
        derived.graph = Workflow(derived._resources).build(checkpointer or self.graph.checkpointer)
        derived._runs = replace(self._runs, resources=derived._resources, graph=derived.graph)
        return derived

    def budget(self) -> Budget:
        """The state of the budget."""
        return self.ledger.budget(self.budget_name)

    def feedback(self, question: str | Query, answer: Answer, correct: bool) -> Path:
        """Record whether an answer was right in `outcomes.jsonl` of the folder; returns that file.

        `viaticum router refit` learns from that file. An answer of several calls is recorded for its last
        pair, without tokens and cost if other pairs had a part in them. A router that watches its models
        compares the share of right answers with the expected one: give feedback on a random sample of
        answers. Feedback on bad answers alone raises an alarm, whatever the model does.

        Raises:
            InputError: no pair gave the answer, or an argument is of another type.
        """
        query = as_query(question, "auto", ())
        checked_type("answer", answer, Answer, "the Answer that solve returned")
        checked_type("correct", correct, bool, "True or False")
        return record_outcome(self._settings.home, self.router, query, answer, correct)


def _answer_in(events: Generator[Event | Answer, None, None]) -> Answer:
    with closing(events):
        for event in events:
            if isinstance(event, Answer):
                return event
    raise AssertionError("a stream ends with its answer")
