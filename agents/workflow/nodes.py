"""A step of the workflow as a LangGraph node: one plain function, which may be called from an event loop.

Called synchronously it runs at once. Called from an event loop it runs on the workflow's own threads, not on
those of the loop's default executor, which other code may occupy. When the caller is cancelled, `is_stopped`
becomes true.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextvars import ContextVar, copy_context
from typing import Any

from langchain_core.runnables import Runnable, RunnableConfig
from langgraph.runtime import RunControl, Runtime, get_runtime

from viaticum.agents.workflow.deadlines import Deadline
from viaticum.agents.workflow.state import Allowance
from viaticum.agents.workflow.threads import ThreadPool, is_caller_gone, watched_context

_inside: ContextVar[bool] = ContextVar("viaticum_inside_run", default=False)


class StoppableRun(RunControl):
    """LangGraph's control of one run, with a flag that its caller is gone, its deadline, and its trace.

    trace: the context of its spans (`viaticum.agents.workflow.telemetry`).
    """

    __slots__ = ("__weakref__", "deadline", "stopped", "trace")

    def __init__(self) -> None:
        super().__init__()
        self.stopped = False
        self.deadline: Deadline | None = None
        self.trace: Any = None


def is_stopped(runtime: Runtime[Any]) -> bool:
    """Whether the caller of this run, or of this step, is gone."""
    return is_caller_gone() or bool(getattr(runtime.control, "stopped", False))


def is_inside_run() -> bool:
    """Whether this code runs inside a step of the workflow."""
    return _inside.get()


class Node(Runnable[Any, Any]):
    """A node of the graph.

    function: takes the state and the runtime, returns an update of the state or a `Command`.
    """

    def __init__(self, function: Callable[[Any, Runtime[Allowance]], Any], threads: ThreadPool) -> None:
        self.name = function.__name__
        self._function, self._threads = function, threads

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        return self._step(input, get_runtime(Allowance))

    def _step(self, input: Any, runtime: Runtime[Allowance]) -> Any:
        token = _inside.set(True)
        try:
            return self._function(input, runtime)
        finally:
            _inside.reset(token)

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        stopped, runtime = threading.Event(), get_runtime(Allowance)
        context = watched_context(stopped, copy_context())
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._threads.executor, context.run, self._step, input, runtime)
        except asyncio.CancelledError:
            stopped.set()
            raise
