"""A step of the workflow as a LangGraph node: one plain function, run where it does not get in the way.

Called synchronously it runs at once. Called from an event loop it runs on threads of the workflow's own, not on those of
the loop's default executor, which others may have filled; where the caller gives up, `is_stopped` tells the function.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from functools import cached_property
from typing import Any

from langchain_core.runnables import Runnable, RunnableConfig
from langgraph.runtime import RunControl, Runtime, get_runtime

from viaticum.agents.workflow.state import Allowance
from viaticum.errors import InputError

_stopped: ContextVar[threading.Event | None] = ContextVar("viaticum_stopped", default=None)


class StoppableRun(RunControl):
    """LangGraph's control of one run, which can also say that nobody waits for it any more."""

    __slots__ = ("stopped",)

    def __init__(self) -> None:
        super().__init__()
        self.stopped = False


def is_stopped(runtime: Runtime[Any]) -> bool:
    """Whether the caller of this run, or of this step, has gone away."""
    step = _stopped.get()
    return (step is not None and step.is_set()) or bool(getattr(runtime.control, "stopped", False))


class ThreadPool:
    """At most so many threads, which are started when they are first needed."""

    def __init__(self, count: int) -> None:
        if count < 1:
            raise InputError(f"concurrency is at least 1, got {count}")
        self.count = count

    @cached_property
    def executor(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.count, "viaticum")

    def close(self) -> None:
        if "executor" in self.__dict__:
            self.executor.shutdown()


class Node(Runnable[Any, Any]):
    """`function` takes the state and the runtime, and returns an update of the state or a `Command`."""

    def __init__(self, function: Callable[[Any, Runtime[Allowance]], Any], threads: ThreadPool) -> None:
        self.name = function.__name__
        self._function, self._threads = function, threads

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        return self._function(input, get_runtime(Allowance))

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        stopped, context, runtime = threading.Event(), copy_context(), get_runtime(Allowance)
        context.run(_stopped.set, stopped)
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(
                self._threads.executor, context.run, self._function, input, runtime
            )
        except asyncio.CancelledError:
            stopped.set()
            raise
