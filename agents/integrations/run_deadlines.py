"""The deadline of an agent's whole run: what is left of it bounds each model call.

A run's time begins with it, and anew in another process that goes on with it; it stands still while a person
is asked. A call in progress at its bound is left: an asynchronous one is cancelled, a synchronous one goes on
in a thread of its own, unheard. Leaves out money, and what happens then
(`viaticum.agents.integrations.middleware`).
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from langchain.agents.middleware import ModelRequest

from viaticum.agents.integrations.last_calls import run_of
from viaticum.agents.workflow.deadlines import Deadline
from viaticum.agents.workflow.latencies import Seconds

MOST_RUNS = 10_000
_LEFT = "the call did not end by then; all that was held for it is charged"
T = TypeVar("T")


@dataclass(frozen=True)
class RunDeadlines:
    """The deadlines of all runs of one middleware. seconds: of a run; None for no limit."""

    seconds: float | None
    _known: OrderedDict[str, Deadline] = field(default_factory=OrderedDict)
    _left: dict[str, float] = field(default_factory=dict)  # seconds of runs in which a person is asked
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def of(self, state: Any) -> Deadline | None:
        """The deadline of a run, from now on where it is not known here."""
        if self.seconds is None:
            return None
        if not run_of(state):  # it has not begun
            return Deadline.after(self.seconds)
        with self._lock:
            left = self._left.pop(run_of(state), self.seconds)
            found = self._known.setdefault(run_of(state), Deadline(self.seconds, time.time() + left))
            while len(self._known) > MOST_RUNS:
                self._left.pop(self._known.popitem(last=False)[0], None)
        return found

    def begin(self, state: Any, seconds: float | None = None) -> Deadline | None:
        """Let a run have so many seconds from now on, by default all that a run has."""
        self.end(state)
        if seconds is not None and run_of(state):
            with self._lock:
                self._left[run_of(state)] = seconds
        return self.of(state)

    def pause(self, state: Any) -> None:
        """Let a run's time stand still until it is asked for again: a person is asked meanwhile."""
        with self._lock:
            if (found := self._known.pop(run_of(state), None)) is not None:
                self._left[run_of(state)] = found.left
                while len(self._left) > MOST_RUNS:
                    del self._left[next(iter(self._left))]

    def end(self, state: Any) -> None:
        with self._lock:
            self._known.pop(run_of(state), None)
            self._left.pop(run_of(state), None)


def check_time(deadline: Deadline | None, seen: Seconds | None, model: str) -> None:
    """Raises `DeadlineExceeded` where a call cannot begin, or took longer in half of the cases.

    Args:
        deadline: of the call.
        seen: what calls of its model took.
        model: its name.
    """
    if deadline is None:
        return
    deadline.check()
    if seen is not None and seen.p50 > deadline.left:
        raise deadline.exceeded(
            f"half of the calls of {model} took {seen.p50:.1f} seconds, and "
            f"{deadline.left:.1f} are left for one"
        )


def call_until(
    until: Deadline | None, handler: Callable[[ModelRequest[Any]], T], request: ModelRequest[Any]
) -> T:
    """Call a model, and wait for it until a deadline. Raises `DeadlineExceeded`."""
    if until is None:
        return handler(request)
    future, context = Future[T](), contextvars.copy_context()

    def work() -> None:
        try:
            future.set_result(context.run(handler, request))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name="viaticum-agent-call", daemon=True).start()
    try:
        return future.result(min(max(0.0, until.left), threading.TIMEOUT_MAX))
    except TimeoutError:
        if future.done():  # it is the model's own
            raise
        raise until.exceeded(_LEFT) from None


async def acall_until(
    until: Deadline | None,
    handler: Callable[[ModelRequest[Any]], Awaitable[T]],
    request: ModelRequest[Any],
) -> T:
    """As `call_until`; the call is cancelled at the deadline."""
    if until is None:
        return await handler(request)
    limit = asyncio.timeout(max(0.0, until.left))
    try:
        async with limit:
            return await handler(request)
    except TimeoutError:
        if not limit.expired():
            raise
        raise until.exceeded(_LEFT) from None
