"""Threads for blocking code that an event loop calls: a pool, and blocking iterators as asynchronous ones.

None of it runs on the default executor of the caller's event loop, whose few threads also resolve names.
When the caller is cancelled, `is_caller_gone` becomes true in the code that runs for it.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Generic, TypeVar

from viaticum.errors import ClientClosed

Item = TypeVar("Item")
_gone: contextvars.ContextVar[threading.Event | None] = contextvars.ContextVar("viaticum_gone", default=None)


def is_caller_gone() -> bool:
    """Whether the coroutine that this code runs for was cancelled."""
    gone = _gone.get()
    return gone is not None and gone.is_set()


def watched_context(gone: threading.Event, context: contextvars.Context) -> contextvars.Context:
    """The context, in which `is_caller_gone` is true once `gone` is set."""
    context.run(_gone.set, gone)
    return context


class ThreadPool:
    """At most `count` threads, started on first use; a forked child starts its own."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._closed = False
        self._begin()

    def _begin(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._lock, self._process = threading.Lock(), os.getpid()

    @property
    def executor(self) -> ThreadPoolExecutor:
        """The threads. Raises `ClientClosed` once they are closed."""
        if self._process != os.getpid():  # a fork copies no threads: work that is given to them never runs
            self._begin()
        with self._lock:
            if self._closed:
                raise ClientClosed("the threads of this client are closed; open another one")
            if self._executor is None:
                self._executor = ThreadPoolExecutor(self.count, "viaticum")
            return self._executor

    def close(self) -> None:
        """Wait for what runs; take nothing new."""
        if self._process != os.getpid():
            self._begin()
        with self._lock:
            self._closed, executor = True, self._executor
        if executor is not None:
            executor.shutdown()

    async def iterate(self, start: Callable[[], Iterator[Item]]) -> AsyncIterator[Item]:
        """Yield the items of an iterator that runs on one thread of the pool, as they arrive.

        If the caller is cancelled, the iterator is closed at its next item, or ends by `is_caller_gone`.
        """
        loop, items = asyncio.get_running_loop(), asyncio.Queue[Any]()
        cancelled, end = threading.Event(), object()

        def work() -> None:
            if cancelled.is_set():
                return
            iterator = start()
            try:
                for item in iterator:
                    loop.call_soon_threadsafe(items.put_nowait, item)
                    if cancelled.is_set():
                        break
            except Exception:
                if not cancelled.is_set():  # else nobody is there to be told
                    raise
            finally:
                iterator.close()  # type: ignore[attr-defined]

        context = watched_context(cancelled, contextvars.Context())
        future = loop.run_in_executor(self.executor, context.run, work)
        future.add_done_callback(lambda _: items.put_nowait(end))
        try:
            while (item := await items.get()) is not end:
                yield item
            await future
        finally:
            cancelled.set()
            if not future.done():
                await asyncio.wait([future])


class StreamThread(Generic[Item]):
    """The items of a blocking generator, each made when it is asked for, in a thread of its own.

    The first is asked for at once. When the coroutine that iterates is cancelled, or nobody has this object
    any more, the generator is closed at its next item, or ends by `is_caller_gone`.
    """

    def __init__(self, events: Generator[Item, None, None]) -> None:
        gone = threading.Event()
        weakref.finalize(self, gone.set)
        self._events, self._gone, self._end = events, gone, object()
        self._context = watched_context(gone, contextvars.copy_context())
        self._executor = ThreadPoolExecutor(1, "viaticum-stream")
        self._step = self._ask()

    def _ask(self) -> Future[Any]:
        context, events, end = self._context, self._events, self._end  # not self: see finalize
        return self._executor.submit(lambda: context.run(next, events, end))

    def wait(self, seconds: float) -> None:
        """Return when the first item is there, or the time is over. Raises the error in its place."""
        with suppress(TimeoutError):
            self._step.result(seconds)

    async def items(self) -> AsyncGenerator[Item, None]:
        try:
            while (item := await asyncio.shield(asyncio.wrap_future(self._step))) is not self._end:
                yield item
                self._step = self._ask()
        finally:
            self._gone.set()
            if not self._step.done():  # a generator that runs cannot be closed
                step = asyncio.wrap_future(self._step)
                await asyncio.wait([step])
                step.exception()  # nobody is there to be told
            closed = self._executor.submit(self._context.run, self._events.close)
            self._executor.shutdown(wait=False)
            await asyncio.wrap_future(closed)


def in_own_context(events: Generator[Item, None, None]) -> Generator[Item, None, None]:
    """The same events, generated in a context of their own.

    A graph that runs inside another one would otherwise inherit its thread id and checkpoints.
    """
    context, end, gone = contextvars.Context(), object(), _gone.get()
    if gone is not None:
        context = watched_context(gone, context)
    try:
        while (event := context.run(next, events, end)) is not end:
            yield event  # type: ignore[misc]
    finally:
        context.run(events.close)
