"""Shadow sampling: a share of the answered questions is asked again of one model, in the background.

So that what is saved by routing, and what is lost, can be said against "always this model" without running
all of it. Shadow calls pay from a budget of their own, each held and settled as any call; where that is used
up a question is recorded as not asked. The answer is given before its question is queued; a queue that is
full, an error and a model that may not be used are recorded too, and nothing of it reaches the caller. A
model that runs on this machine is asked one question at a time, and while no answer is in progress.

Leaves out what follows from the samples (`viaticum.reports.shadow`).
"""

from __future__ import annotations

import atexit
import contextvars
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from viaticum.agents.workflow.allowances import allowance_in
from viaticum.agents.workflow.calls import Calls, ModelCall, SettledCall
from viaticum.agents.workflow.graph import Workflow
from viaticum.agents.workflow.nodes import StoppableRun
from viaticum.agents.workflow.resources import WorkflowResources
from viaticum.agents.workflow.restrictions import restricted
from viaticum.agents.workflow.shadow_questions import Sampled, same_pair, worst_case_of
from viaticum.agents.workflow.shadow_settings import ShadowSampling
from viaticum.agents.workflow.state import (
    OUTPUT,
    Allowance,
    RowAllowance,
    State,
    query_of,
    residency_of,
    settings_of,
)
from viaticum.agents.workflow.threads import watched_context
from viaticum.budgets.records import digest
from viaticum.catalogue import Catalogue
from viaticum.errors import BudgetExceeded, InputError, ModelError, UnknownName, ViaticumError
from viaticum.generation import NO_SETTINGS
from viaticum.money import format_usd
from viaticum.questions import digest_of
from viaticum.residency import Residency
from viaticum.routers.query import as_policy
from viaticum.routers.query.restricted import RestrictedRouter
from viaticum.routers.query.single_pair import SinglePairRouter
from viaticum.shadow_samples import GivenAnswer, ShadowSample, append_sample
from viaticum.strategies import equivalent
from viaticum.strategies.answers import is_right
from viaticum.strategies.verify import AnsweredQuery, verdict_of
from viaticum.types import VERIFY, Answer, Pair, Query, split_model

THREADS = 4
IDLE_SECONDS = 0.05  # between looks at whether no answer is in progress
SETTLE_SECONDS = 60.0  # for a call that is ended: of a model that yields no piece it can take long
ENDED = "the process ended"
QUEUED = 256  # questions that wait; more are recorded as not asked
_log = logging.getLogger("viaticum")


class ShadowRun(StoppableRun):
    """A shadow call in progress. gone: set once it has to end."""

    __slots__ = ("gone",)

    def __init__(self) -> None:
        super().__init__()
        self.gone = threading.Event()

    def end(self) -> None:
        """End it at the next piece of its call, and before the next call."""
        self.request_drain()
        self.stopped = True
        self.gone.set()

    def check(self) -> None:
        """Raises `ModelError` where it has to end."""
        if self.stopped:
            raise ModelError(ENDED)


class ShadowSampler:
    """Samples answered questions and asks them again on threads of its own.

    Args:
        resources: of the answers, as they were opened; the ledger has the budget of the shadow calls.
        sampling: the setting.
        path: where samples are recorded.
        is_idle: whether no answer is in progress.
        threads: shadow calls at the same time, of a model that runs elsewhere.

    Raises:
        UnknownName: there is no such model or judge.
        InputError: the judge is the model that is asked again.
        BudgetError: the budget of the shadow calls exists with another limit.
    """

    def __init__(
        self,
        resources: WorkflowResources,
        sampling: ShadowSampling,
        path: Path,
        *,
        is_idle: Callable[[], bool] = lambda: True,
        threads: int = THREADS,
    ) -> None:
        check_sampling(sampling, resources.catalogue)
        self.resources, self.sampling, self.path = resources, sampling, path
        self._is_idle = is_idle
        is_local = resources.catalogue[split_model(sampling.model)[0]].kind in ("local", "pair")
        self._most, self._waits = (1, True) if is_local else (threads, False)
        self.scope = f"{resources.budget}-shadow"
        resources.ledger.create(self.scope, limit_nanousd=sampling.limit_nanousd)
        self._begin()
        atexit.register(self.close)

    def _begin(self) -> None:
        """Also in a forked child, to which no thread comes along."""
        self._process, self._changed = os.getpid(), threading.Condition()
        self._queue = deque[Sampled]()
        self._runs = set[ShadowRun]()
        self._threads, self._busy, self._closed = 0, 0, False

    # The caller's thread

    def offer(
        self,
        request: str,
        values: Mapping[str, Any],
        answer: Answer,
        resources: WorkflowResources,
        allowance: Allowance | None,
    ) -> None:
        """Take an answer of the workflow, if its question is sampled. Never raises, and never waits.

        Args:
            request: id of the request.
            values: the last state of its graph.
            resources: of that graph. One for a single pair that its caller named is no sample.
            allowance: of its run.
        """
        if isinstance(resources.router, SinglePairRouter) or not self.sampling.is_sampled(request):
            return
        try:
            state: Any = values
            given = allowance_in(allowance or Allowance())
            routes = tuple(str(route.pair) for route in answer.routes)
            self.put(
                Sampled(
                    request,
                    query_of(state),
                    GivenAnswer(
                        routes[-1] if routes else "", answer.value, answer.cost, answer.usage.seconds
                    ),
                    routes,
                    as_policy(given.policy if given.policy is not None else resources.policy),
                    settings_of(state),
                    resources.residency
                    & residency_of(state)
                    & Residency.of(given.only)
                    & resources.ledger.residency(given.budget or resources.budget),
                )
            )
        except Exception:
            _log.exception("a question was not sampled")

    def offer_chat(
        self,
        request: str,
        text: str,
        live: GivenAnswer,
        worst_case: Callable[[], int],
        residency: Residency,
        ask: Callable[[str, str], GivenAnswer],
    ) -> None:
        """The same of a plain chat with tools or a schema, if it is sampled.

        Args:
            request: its id.
            text: the last one of its user.
            live: its answer, as a digest of what the model wrote and called; the pair is the model.
            worst_case, residency, ask: see `Sampled`.
        """
        if self.sampling.is_sampled(request):
            query = Query(text.strip() or "-", "text")
            self.put(
                Sampled(
                    request,
                    query,
                    live,
                    (live.pair,),
                    self.resources.policy,
                    NO_SETTINGS,
                    residency,
                    worst_case=worst_case,
                    ask=ask,
                )
            )

    def put(self, sampled: Sampled) -> None:
        """Queue a question. One that has no room is recorded as not asked."""
        if self._process != os.getpid():
            self._begin()
        with self._changed:
            is_closed, is_full = self._closed, len(self._queue) >= QUEUED
            is_queued = not is_closed and not is_full
            if is_queued:
                self._queue.append(sampled)
            if is_queued and self._threads < min(self._most, len(self._queue) + self._busy):
                self._threads += 1
                thread = threading.Thread(target=self._work, name="viaticum-shadow", daemon=True)
                contextvars.Context().run(thread.start)  # of no budget, run or trace of the caller
            self._changed.notify()
        if not is_queued:
            self._record(sampled, reason=ENDED if is_closed else "too many questions waited")

    def wait_for_room(self, seconds: float) -> bool:
        """Wait until few questions are queued; returns whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self._queue) < self._most, seconds)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until nothing is queued or in progress; returns whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and not self._busy, seconds)

    def close(self, seconds: float | None = None, *, settle_seconds: float = SETTLE_SECONDS) -> None:
        """Take nothing new, wait for what is in progress, then end it; what still waits is recorded.

        All is settled when this returns, but for a call that did not end in `settle_seconds`.

        Args:
            seconds: that it waits before it ends them, by default as set; not at all where it is closed.
            settle_seconds: that it waits for those that it ended.
        """
        atexit.unregister(self.close)
        if self._process != os.getpid():
            return
        if not self._closed:
            self.wait(self.sampling.wait_seconds if seconds is None else seconds)
        with self._changed:
            self._closed = True
            waiting = list(self._queue)
            self._queue.clear()
            for run in self._runs:
                run.end()
            self._changed.notify_all()
        for sampled in waiting:
            self._record(sampled, reason=ENDED)
        self.wait(settle_seconds)

    # Threads

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._queue) or self._closed)
                while self._waits and not self._closed and not self._is_idle():
                    self._changed.wait(IDLE_SECONDS)
                if not self._queue:
                    self._threads -= 1
                    return
                sampled, self._busy = self._queue.popleft(), self._busy + 1
                run = ShadowRun()
                self._runs.add(run)
            try:
                watched_context(run.gone, contextvars.Context()).run(self._ask, sampled, run)
            except Exception:
                _log.exception("a shadow call failed")
            finally:
                with self._changed:
                    self._runs.discard(run)
                    self._busy -= 1
                    self._changed.notify_all()

    def _ask(self, sampled: Sampled, run: ShadowRun) -> None:
        try:
            shadow = self._answer(sampled, run)
        except Exception as error:
            is_ours, ended = isinstance(error, ViaticumError), run.stopped
            reason = str(error) if is_ours else f"{type(error).__name__}: {error}"
            self._record(sampled, reason=ENDED if ended else reason)
        else:
            self._compare(sampled, shadow, run)

    def _answer(self, sampled: Sampled, run: ShadowRun) -> GivenAnswer:
        """What the model answers that is always asked."""
        model, strategy = split_model(self.sampling.model)
        self._check_allowed(sampled, model)
        run.check()
        if sampled.ask is not None:
            if sampled.live.pair != model:
                return sampled.ask(self.scope, f"{self._run_of(sampled)}/0")
            self._check_fits(sampled.worst_case())
            return sampled.live
        resources = replace(
            restricted(self.resources, sampled.residency),
            router=RestrictedRouter(self.resources.router, model, strategy or None),
            budget=self.scope,
            on_short="stop",
            sync=lambda: None,
        )
        if (same := same_pair(sampled, resources)) is not None:
            self._check_fits(worst_case_of(sampled, same, resources))
            return sampled.live
        allowance = RowAllowance(policy=sampled.policy, run=self._run_of(sampled), settings=sampled.settings)
        query = sampled.query
        start: State = {"question": query.text, "kind": query.kind, "messages": list(query.messages)}
        values: Any = {}
        for chunk in (
            Workflow(resources)
            .build()
            .stream(start, context=allowance, stream_mode="values", output_keys=OUTPUT, control=run)
        ):
            values = chunk
        pair = values["routes"][-1]["pair"] if values["routes"] else ""
        return GivenAnswer(pair, values["value"], values["cost"], values["seconds"])

    def _check_allowed(self, sampled: Sampled, model: str) -> None:
        """Raises `ModelNotAllowed`. The scope of the shadow calls itself refuses no model."""
        residency = self.resources.residency & sampled.residency
        labels = self.resources.labels(model)
        if not residency.allows(labels):
            raise residency.refusal({model: labels})

    def _check_fits(self, needed: int) -> None:
        """Raises `BudgetExceeded`, also of an answer that is the same and costs nothing.

        Else what is left would choose which questions are compared: once it is used up, the equal ones alone.
        """
        left = self.resources.ledger.budget(self.scope).left_nanousd
        if left is not None and needed > left:
            raise BudgetExceeded(
                f"budget {self.scope!r} has {format_usd(left)} left, the call may cost {format_usd(needed)}",
                budget=self.scope,
                needed=needed,
                left=left,
            )

    def _compare(self, sampled: Sampled, shadow: GivenAnswer, run: ShadowRun) -> None:
        live, kind = sampled.live, sampled.query.kind
        equal: bool | None = equivalent(live.answer, shadow.answer, kind)
        by = ""
        if sampled.ask is not None:  # texts that differ may say the same
            equal = equal or None
        elif sampled.golds:
            live, shadow = (
                replace(each, correct=is_right(each.answer, sampled.golds, kind)) for each in (live, shadow)
            )
            by = "gold"
        elif not equal and self._may_judge(live):
            try:
                live, shadow = (self._judged(sampled, each, run) for each in (live, shadow))
                by = "judge"
            except ViaticumError as error:
                _log.warning("the judge of shadow calls gave no verdict: %s", error)
        self._record(replace(sampled, live=live), shadow, equal, by)

    def _may_judge(self, live: GivenAnswer) -> bool:
        """Whether there is a judge, of another model than the live answer; the other one is not its own."""
        judge, wrote = self.sampling.judge, split_model(live.pair)[0]
        return judge is not None and not self.resources.catalogue.is_same_model(judge, wrote)

    def _judged(self, sampled: Sampled, given: GivenAnswer, run: ShadowRun) -> GivenAnswer:
        """The answer with the judge's verdict; no answer is wrong."""
        if given.answer is None:
            return replace(given, correct=False)
        assert self.sampling.judge is not None
        self._check_allowed(sampled, self.sampling.judge)
        run.check()
        resources = restricted(self.resources, sampled.residency)
        judge, query = Pair(self.sampling.judge, VERIFY), AnsweredQuery.of(sampled.query, given.answer)
        call = ModelCall.of(resources.model(judge.model), resources.catalogue, judge, query, NO_SETTINGS)
        key = f"{self._run_of(sampled)}/judge-{digest(given.answer)[:16]}"
        calls = Calls(resources.catalogue, resources.ledger, resources.model, labels=resources.labels)
        for event in calls.stream(self.scope, key, judge.model, call.messages, call.generation):
            if isinstance(event, SettledCall):
                done = event.completion
                return replace(given, correct=verdict_of(done.text, done.finish_reason))
        raise AssertionError("a stream ends with its settled call")

    def _run_of(self, sampled: Sampled) -> str:
        """Prefix of the ledger keys of a request, so that a call which was paid for is not made again."""
        return f"{self.scope}/{digest(sampled.id)[:32]}"

    def _record(
        self,
        sampled: Sampled,
        shadow: GivenAnswer | None = None,
        equal: bool | None = None,
        by: str = "",
        reason: str = "",
    ) -> None:
        sample = ShadowSample(
            sampled.id,
            digest_of(sampled.query.text),
            self.sampling.model,
            sampled.live,
            shadow,
            equal,
            by,
            reason,
            datetime.now(UTC).isoformat(timespec="seconds"),
            sampled.query.kind,
        )
        try:
            append_sample(self.path, sample)
        except ViaticumError as error:
            _log.warning("a shadow sample was not recorded: %s", error)


def check_sampling(sampling: ShadowSampling, catalogue: Catalogue) -> None:
    """Raise `UnknownName` for a model or judge that is not there, `InputError` where they are the same."""
    for name in filter(None, (sampling.model, sampling.judge)):
        _check_model(catalogue, split_model(name)[0])
    if sampling.judge is not None and catalogue.is_same_model(sampling.judge, split_model(sampling.model)[0]):
        raise InputError(
            f"{sampling.judge} would judge its own answers, which models favour (arXiv 2404.13076); name "
            "another judge of shadow calls, or none"
        )


def _check_model(catalogue: Catalogue, name: str) -> None:
    models = [spec.name for spec in catalogue.models()]
    if name not in models:
        raise UnknownName("model", name, models)
