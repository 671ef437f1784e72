"""A call through LiteLLM that can be ended at any moment, and that says so while nothing arrives.

A thread that waits for a socket cannot be interrupted, a task can be cancelled: the calls of all threads run
on one event loop, in a thread of its own. Leaves out what the chunks mean (`models.remote.response`) and
further tries (`models.remote.model`).
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from inspect import CORO_CREATED, getcoroutinestate
from queue import Empty, SimpleQueue
from types import CoroutineType
from typing import Any

from viaticum.errors import ProviderUnavailable

HEARTBEAT_SECONDS = 0.25  # after which a caller is told that nothing has arrived
EXIT_SECONDS = 2.0
AWAITED_SECONDS = 1.0  # by which a call that was built has begun
THREADS = 32  # in which calls are built and names resolved


class RemoteCall:
    """One request, sent at once.

    Args:
        completion: `litellm.acompletion`.
        request: its arguments.

    Attributes:
        response: LiteLLM's response; None until the provider begins to answer.
    """

    def __init__(self, completion: Any, request: Mapping[str, Any]) -> None:
        self.response: Any = None
        self._completion, self._request = completion, request
        self._arrived: SimpleQueue[tuple[bool, Any]] = SimpleQueue()  # (whether it goes on, chunk or error)
        self._task: asyncio.Task[None] | None = None
        self._loop = _thread.loop()
        self._loop.call_soon_threadsafe(self._begin, context=copy_context())

    def chunks(self) -> Iterator[Any]:
        """Yield chunks, or the whole response, as they arrive, and None where none has for a while.

        Raises what LiteLLM raises.
        """
        while True:
            try:
                goes_on, found = self._arrived.get(timeout=HEARTBEAT_SECONDS)
            except Empty:
                yield None
                continue
            if not goes_on:
                if found is not None:
                    raise found
                return
            yield found

    def close(self) -> list[Any]:
        """Close the connection, so that the provider stops; return the chunks that nobody has taken."""
        with suppress(RuntimeError):  # the process ends
            self._loop.call_soon_threadsafe(self._cancel)
        left = []
        with suppress(Empty):
            while True:
                goes_on, found = self._arrived.get_nowait()
                left += [found] if goes_on else []
        return left

    # --- on the event loop ----------------------------------------------------------------------------

    def _begin(self) -> None:
        self._task = self._loop.create_task(self._run())

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        error: BaseException | None = None
        try:
            self.response = await self._completion(**self._request)
            if self._request.get("stream"):
                async for chunk in self.response:
                    self._arrived.put((True, chunk))
            else:
                self._arrived.put((True, self.response))
        except asyncio.CancelledError:
            error = ProviderUnavailable("the call was cancelled, because this process ends")
            raise
        except Exception as failure:
            error = failure
        finally:
            self._arrived.put((False, error))
            close = getattr(self.response, "aclose", None)
            if close is not None:
                with suppress(Exception):
                    await close()


class _EventLoopThread:
    """The event loop of this process, started at the first call; a forked child starts its own."""

    def __init__(self) -> None:
        self.reset()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.reset)
        atexit.register(self._end)

    def reset(self) -> None:
        self._lock = threading.Lock()
        self._running: tuple[asyncio.AbstractEventLoop, asyncio.Event, threading.Thread] | None = None

    def loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._running is None:
                started: SimpleQueue[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = SimpleQueue()
                thread = threading.Thread(
                    target=lambda: asyncio.run(_serve(started)), name="viaticum-remote", daemon=True
                )
                thread.start()
                self._running = (*started.get(), thread)
            return self._running[0]

    def _end(self) -> None:
        if self._running is not None:
            loop, ended, thread = self._running
            loop.call_soon_threadsafe(ended.set)
            thread.join(EXIT_SECONDS)


async def _serve(started: SimpleQueue[tuple[asyncio.AbstractEventLoop, asyncio.Event]]) -> None:
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.set_default_executor(_Executor(loop))
    started.put((loop, ended))
    await ended.wait()


class _Executor(ThreadPoolExecutor):
    """LiteLLM builds a call here, as a coroutine; if the call is cancelled meanwhile, nobody awaits that."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(THREADS, "viaticum-remote")
        self._loop = loop

    def submit(self, *args: Any, **kwargs: Any) -> Any:
        future = super().submit(*args, **kwargs)
        future.add_done_callback(self._built)
        return future

    def _built(self, future: Future[Any]) -> None:
        if (
            not future.cancelled()
            and future.exception() is None
            and isinstance(future.result(), CoroutineType)
        ):
            with suppress(RuntimeError):  # the process ends
                self._loop.call_soon_threadsafe(
                    self._loop.call_later, AWAITED_SECONDS, _close, future.result()
                )


def _close(coroutine: CoroutineType[Any, Any, Any]) -> None:
    """Close a coroutine that was not begun."""
    if getcoroutinestate(coroutine) == CORO_CREATED:
        coroutine.close()


_thread = _EventLoopThread()
