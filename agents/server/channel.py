"""From a thread that writes to a coroutine that sends: a few items at a time, and either side may go away.

The thread waits while the reader has not taken what is there, so a slow client does not fill the memory. Knows
nothing of HTTP or models.
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

ROOM = 32  # items


class Channel(CancellationToken, Generic[T]):
    """One writer, a thread; one reader, a coroutine of `loop`. patience: seconds that the writer waits for room."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, room: int = ROOM, patience: float = 60.0) -> None:
        super().__init__()
        self._loop, self._room, self._patience = loop, room, patience
        self._items: deque[T] = deque()
        self._change = threading.Condition()
        self._news = asyncio.Event()
        self._ended = False
        self._error: BaseException | None = None

    # --- the writer's thread --------------------------------------------------------------------------------

    def put(self, item: T) -> None:
        """Raises `CallerGone` where the reader went away, or took nothing for too long."""
        self.wait()
        with self._change:
            self._items.append(item)
        self._wake()

    def wait(self) -> None:
        """Return when there is room. Raises `CallerGone`, as `put` does."""
        with self._change:
            end = time.monotonic() + self._patience
            while len(self._items) >= self._room and not self._closed.is_set():
                if not self._change.wait(end - time.monotonic()) and time.monotonic() >= end:
                    break
        if self._closed.is_set() or time.monotonic() >= end:
            self.close()
            raise CallerGone

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more comes; the reader is told why, where it is an error."""
        with self._change:
            self._ended, self._error = True, self._error or error
        self._wake()

    # --- the reader -----------------------------------------------------------------------------------------

    async def take(self) -> list[T]:
        """All that is there, at least one item; nothing where no more comes. Raises the writer's error, after the
        last item, and that of `close` at once."""
        while True:
            with self._change:
                self._news.clear()
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
            await self._news.wait()

    # --- anyone ---------------------------------------------------------------------------------------------

    def close(self, error: Exception | None = None) -> None:
        """Nobody wants the rest: the writer's next step raises `CallerGone`, and the reader is told `error`."""
        with self._change:
            if not self._ended:
                self._error = self._error or error
                self._closed.set()
                self._change.notify_all()
        self._wake()

    def _wake(self) -> None:
        with suppress(RuntimeError):  # the loop has ended, and its readers with it
            self._loop.call_soon_threadsafe(self._news.set)
