"""Questions as runs of the graph: each on a conversation thread, from its start or its last checkpoint.

A run has a deadline, a trace, and an owner among the processes that answer its thread; at its end a sample of
them is offered for shadow calls (`viaticum.agents.workflow.shadow`). Leaves out opening ledger and
checkpoints (`viaticum.agents.client`).
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import AsyncIterator, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from langgraph.checkpoint.memory import InMemorySaver
from langgraph.errors import GraphDrained

from viaticum.agents.draining import DrainGate
from viaticum.agents.workflow.allowances import begin_deadline
from viaticum.agents.workflow.approval import decision_needed
from viaticum.agents.workflow.arguments import thread_config
from viaticum.agents.workflow.checkpoints import storable
from viaticum.agents.workflow.events import Event, event_from_json
from viaticum.agents.workflow.graph import Graph
from viaticum.agents.workflow.nodes import StoppableRun
from viaticum.agents.workflow.resources import WorkflowResources
from viaticum.agents.workflow.shadow import ShadowSampler
from viaticum.agents.workflow.state import OUTPUT, Allowance, State, answer_of
from viaticum.agents.workflow.telemetry import RunSpan, current
from viaticum.agents.workflow.thread_leases import owned_thread
from viaticum.agents.workflow.threads import is_caller_gone
from viaticum.errors import ClientClosed, Draining, InputError, ModelError
from viaticum.types import Answer, Query


@dataclass(frozen=True)
class QuestionRuns:
    """Runs questions through a graph.

    Args:
        resources: of the graph.
        graph: compiled, with checkpoints.
        gate: takes no runs once it is closed or drains.
        process: the only one that may use the checkpoints; None where they follow a fork.
        shadow: what samples answered questions; None for nothing.
    """

    resources: WorkflowResources
    graph: Graph
    gate: DrainGate
    process: int | None = None
    shadow: ShadowSampler | None = None

    @contextmanager
    def enter(self, allowance: Allowance | None) -> Iterator[StoppableRun]:
        """Register a run, whose deadline begins.

        Raises `ClientClosed` in a forked child where the checkpoints cannot follow.
        """
        if self.process not in (None, os.getpid()):
            raise ClientClosed(
                "this client keeps its checkpoints in Postgres and was opened before a fork; open one in "
                "each process"
            )
        with self.gate.enter() as run:
            run.deadline = begin_deadline(self.resources, allowance)
            yield run

    def run(
        self,
        query: Query,
        thread_id: str | None,
        allowance: Allowance | None,
        *,
        live: bool,
        parent: Any = None,
    ) -> Generator[Event | Answer, None, None]:
        """Yield events if `live`, then the answer: from the start, or from the thread's last checkpoint.

        parent: the context of spans, where the caller runs in another one than this.
        """
        began, config = (
            time.perf_counter(),
            thread_config(uuid.uuid4().hex if thread_id is None else thread_id),
        )
        with self.enter(allowance) as run:
            run.trace = parent or current()
            start: State | None = {
                "question": query.text,
                "kind": query.kind,
                "messages": list(query.messages),
            }
            if thread_id is None:  # a new id has no state, and no other owner
                yield from self.run_graph(start, config, run, allowance, began, live=live)
                return
            values, is_done = self._stored(query, thread_id)
            if not is_done:
                with self.owned(thread_id, run):
                    values, is_done = self._stored(query, thread_id)
                    if not is_done:
                        start = None if values else start
                        yield from self.run_graph(start, config, run, allowance, began, live=live)
                        return
            yield answer_of(values, time.perf_counter() - began)

    def _stored(self, query: Query, thread_id: str) -> tuple[Any, bool]:
        """The state of a thread, empty for a new one, and whether its question is answered."""
        stored = self.graph.get_state(thread_config(thread_id))
        if stored.values:
            _check_same(query, stored.values, thread_id)
        # Not `stored.next`: it leaves out a task that was killed after its writes were stored.
        return stored.values, bool(stored.values) and not stored.tasks

    def owned(self, thread_id: str, run: StoppableRun) -> AbstractContextManager[None]:
        """Wait for the others who answer this thread. Checkpoints in memory are nobody else's."""
        if isinstance(self.graph.checkpointer, InMemorySaver):
            return nullcontext()

        def check() -> None:
            if run.drain_requested:
                raise self._drained(thread_id)
            if run.deadline is not None:
                run.deadline.check()
            if run.stopped or is_caller_gone():
                raise ModelError("nobody waits for this answer any more")

        return owned_thread(self.resources.ledger, thread_id, check)

    def _drained(self, thread_id: str) -> Draining:
        reason = "this client was closed" if self.gate.closed else "this process is about to end"
        return Draining(
            f"stopped because {reason}; solve thread {thread_id!r} again to go on", thread_id=thread_id
        )

    def run_graph(
        self,
        start: Any,
        config: Any,
        run: StoppableRun,
        allowance: Allowance | None,
        began: float,
        *,
        live: bool,
    ) -> Generator[Event | Answer, None, None]:
        values: dict[str, Any] = {}
        session = None if allowance is None else allowance.session
        span = RunSpan(run.trace or current(), budget=self.resources.budget, session=session)
        run.trace = span.context
        thread_id = config["configurable"]["thread_id"]
        # With "custom" LangGraph runs every node on a thread of its own, so that its text arrives at once.
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
                data: Any = chunk
                if mode == "values":
                    values = data
                elif (event := event_from_json(data)) is not None:
                    yield event
        except GraphDrained as error:
            span.fail(error)
            raise self._drained(thread_id) from None
        except BaseException as error:
            span.fail(error)
            raise
        finally:
            run.stopped = True
            chunks.close()  # type: ignore[attr-defined]
        if values.get("__interrupt__"):
            needed = decision_needed(values["__interrupt__"][0].value, thread_id)
            span.fail(needed)
            raise needed
        answer = answer_of(values, time.perf_counter() - began)
        if self.shadow is not None:
            self.shadow.offer(thread_id, values, answer, self.resources, allowance)
        span.end(answer.cost, [str(route.pair) for route in answer.routes], answer.finish_reason)
        yield answer

    def arun(
        self, query: Query, thread_id: str | None, allowance: Allowance | None
    ) -> AsyncIterator[Event | Answer]:
        self.gate.check()
        parent = current()
        return self.resources.threads.iterate(
            lambda: self.run(query, thread_id, allowance, live=True, parent=parent)
        )


def _check_same(query: Query, values: Mapping[str, Any], thread_id: str) -> None:
    stored = values.get("asked") or values  # the input itself, before the node `start` has run
    same = storable(stored.get("question")) == storable(query.text)
    if not same or list(stored.get("messages") or []) != list(query.messages):
        raise InputError(f"thread {thread_id!r} belongs to another question; use a new thread id")
