"""A bounded buffer from a thread that writes to a coroutine that reads; either side may cancel.

The writer waits while the buffer is full, so that a slow client does not fill the memory. Leaves out HTTP and
models.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from contextlib import suppress
from typing import Generic, TypeVar

from viaticum.agents.cancellation import CallerGone, CancellationToken

T = TypeVar("T")

CAPACITY = 32  # items


class Channel(CancellationToken, Generic[T]):
    """A buffer with one writer, a thread, and one reader, a coroutine.

    Args:
        loop: the reader's event loop.
        capacity: items in the buffer.
        stall_timeout: seconds that the writer waits for the reader before it gives up.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, *, capacity: int = CAPACITY, stall_timeout: float = 60.0
    ) -> None:
        super().__init__()
        self._loop, self._capacity, self._stall_timeout = loop, capacity, stall_timeout
        self._items: deque[T] = deque()
        self._change = threading.Condition()
        self._readable = asyncio.Event()
        self._ended = False
        self._error: BaseException | None = None

    # --- the writer's thread ------------------------------------------------------------------------------

    def put(self, item: T) -> None:
        """Append an item. Raises `CallerGone` where the reader cancelled or stalled."""
        self.wait()
        with self._change:
            self._items.append(item)
        self._wake()

    def wait(self) -> None:
        """Wait until the buffer has room. Raises `CallerGone`, as `put` does."""
        with self._change:
            end = time.monotonic() + self._stall_timeout
            while len(self._items) >= self._capacity and not self._closed.is_set():
                if not self._change.wait(end - time.monotonic()) and time.monotonic() >= end:
                    break
        if self._closed.is_set() or time.monotonic() >= end:
            self.close()
            raise CallerGone

    def end(self, error: BaseException | None = None) -> None:
        """End the items; the reader gets the error, if any, after the last one."""
        with self._change:
            self._ended, self._error = True, self._error or error
        self._wake()

    # --- the reader ---------------------------------------------------------------------------------------

    async def get(self) -> list[T]:
        """Wait for items and return all that are buffered; an empty list after the end.

        Raises:
            BaseException: the error of `end`, after the last item; that of `close` at once.
            CallerGone: the channel was closed without an error.
        """
        while True:
            with self._change:
                self._readable.clear()
                if self._closed.is_set():
                    raise self._error or CallerGone
                if self._items:
                    items = list(self._items)
                    self._items.clear()
                    self._change.notify_all()
                    return items
                if self._ended:
                    if self._error is not None:
                        raise self._error
                    return []
            await self._readable.wait()

    # --- any thread ---------------------------------------------------------------------------------------

    def close(self, error: Exception | None = None) -> None:
        """Discard the rest: the writer's next step raises `CallerGone`, the reader's raises `error`."""
        with self._change:
            if not self._ended:
                self._error = self._error or error
                self._closed.set()
                self._change.notify_all()
        self._wake()

    def _wake(self) -> None:
        with suppress(RuntimeError):  # the event loop has been closed
            self._loop.call_soon_threadsafe(self._readable.set)
