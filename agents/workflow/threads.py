"""Threads for blocking code that an event loop calls: a pool, and blocking iterators as asynchronous ones."""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from viaticum.errors import ClientClosed

Item = TypeVar("Item")


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

        If the caller is cancelled, the iterator is closed at its next item.
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
            finally:
                iterator.close()  # type: ignore[attr-defined]

        future = loop.run_in_executor(self.executor, work)
        future.add_done_callback(lambda _: items.put_nowait(end))
        try:
            while (item := await items.get()) is not end:
                yield item
            await future
        finally:
            cancelled.set()
            if not future.done():
                await asyncio.wait([future])


async def iterate_in_thread(events: Generator[Item, None, None]) -> AsyncIterator[Item]:
    """The events of a blocking generator, each awaited in a thread.

    It is closed when the caller is cancelled.
    """
    end = object()
    step: asyncio.Future[Any] | None = None
    try:
        while True:
            step = asyncio.ensure_future(asyncio.to_thread(next, events, end))
            event = await asyncio.shield(step)
            if event is end:
                return
            yield event
    finally:
        if step is not None and not step.done():  # cancelled: a generator that runs cannot be closed
            await asyncio.wait([step])
        await asyncio.to_thread(events.close)


def in_own_context(events: Generator[Item, None, None]) -> Generator[Item, None, None]:
    """The same events, generated in a context of their own.

    A graph that runs inside another one would otherwise inherit its thread id and checkpoints.
    """
    context = contextvars.Context()
    end = object()
    try:
        while (event := context.run(next, events, end)) is not end:
            yield event  # type: ignore[misc]
    finally:
        context.run(events.close)
