"""Admission control: concurrent calls with a bounded queue, shared fairly by keys, and a rate for each key.

All of it belongs to one event loop. Leaves out HTTP: a request over a limit raises `QueueFull` or
`RateLimitExceeded`, with the seconds after which a retry may succeed.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass


class QueueFull(Exception):
    """All slots are in use, and the queue is full."""

    retry_after = 1


class RateLimitExceeded(Exception):
    """More requests than a key's rate allows. retry_after: seconds until the next one is allowed."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after


def fair_share(slots: int) -> int:
    """The slots that one of several keys may use at once: a quarter, at least one, is kept for the others."""
    return max(1, slots - max(1, slots // 4))


@dataclass(eq=False, slots=True)
class _Waiter:
    name: str
    share: int
    turn: asyncio.Future[None]
    is_background: bool = False


class ConcurrencyLimiter:
    """Slots with a bounded queue, both shared fairly by name.

    A free slot goes to the waiting name that uses the fewest, and among its waiters to the first. In a full
    queue the last waiter of the name with the most makes room for a name with fewer. Background work has a
    slot only where nothing else waits for one, and leaves a quarter of the slots, at least one of several,
    free; it waits without a limit, outside the queue.

    Args:
        max_running: slots.
        max_queued: waiters; further ones raise `QueueFull`.
    """

    def __init__(self, max_running: int, max_queued: int) -> None:
        self.max_running, self.max_queued = max_running, max_queued
        self.running = 0
        self._running: Counter[str] = Counter()
        self._waiters: list[_Waiter] = []
        self.max_background = fair_share(max_running)
        self._background: Counter[str] = Counter()
        self._background_waiters: list[_Waiter] = []

    @property
    def queued(self) -> int:
        return len(self._waiters)

    async def acquire(self, name: str = "", share: int | None = None) -> None:
        """Wait for a slot.

        Args:
            name: who asks.
            share: slots that this name may use at once; None for all.

        Raises:
            QueueFull: at once, or later for a name with fewer waiters.
        """
        share = self.max_running if share is None else share
        if self.running < self.max_running and self._running[name] < share:
            self._take(name)
            return
        self._make_room(name)
        waiter = _Waiter(name, share, asyncio.get_running_loop().create_future())
        self._waiters.append(waiter)
        try:
            await waiter.turn
        except asyncio.CancelledError:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            elif not waiter.turn.cancelled() and waiter.turn.exception() is None:
                self.release(name)  # the slot was handed over just before the cancellation
            raise

    async def acquire_background(self, name: str = "") -> None:
        """Wait for a slot for background work, for as long as it takes."""
        waiter = _Waiter(name, self.max_background, asyncio.get_running_loop().create_future(), True)
        self._background_waiters.append(waiter)
        self._hand_over()
        try:
            await waiter.turn
        except asyncio.CancelledError:
            if waiter in self._background_waiters:
                self._background_waiters.remove(waiter)
            elif not waiter.turn.cancelled():
                self.release(name, background=True)
            raise

    def release(self, name: str = "", *, background: bool = False) -> None:
        """Free a slot of this name, and hand it over to a waiter."""
        counts = self._background if background else self._running
        self.running -= 1
        counts[name] -= 1
        if not counts[name]:
            del counts[name]
        self._hand_over()

    def _hand_over(self) -> None:
        """Give free slots to waiters."""
        while self.running < self.max_running and (waiter := self._next_waiter()) is not None:
            (self._background_waiters if waiter.is_background else self._waiters).remove(waiter)
            if not waiter.turn.done():  # else it was cancelled, and does not know yet
                self._take(waiter.name, background=waiter.is_background)
                waiter.turn.set_result(None)

    def _take(self, name: str, *, background: bool = False) -> None:
        self.running += 1
        (self._background if background else self._running)[name] += 1

    def _next_waiter(self) -> _Waiter | None:
        waiting = [each for each in self._waiters if self._running[each.name] < each.share]
        if waiting or self._background.total() >= self.max_background:
            return min(waiting, key=lambda each: self._running[each.name], default=None)
        return min(self._background_waiters, key=lambda each: self._background[each.name], default=None)

    def _make_room(self, name: str) -> None:
        """Raise `QueueFull` where the queue is full and no other name has more waiters than this will."""
        if len(self._waiters) < self.max_queued:
            return
        counts = Counter(each.name for each in self._waiters)
        longest, most = max(counts.items(), key=lambda each: each[1], default=("", 0))
        if not self.max_queued or most <= counts[name] + 1:
            raise QueueFull
        last = next(each for each in reversed(self._waiters) if each.name == longest)
        self._waiters.remove(last)
        if not last.turn.done():
            last.turn.set_exception(QueueFull())


@dataclass(slots=True)
class _Bucket:
    tokens: float
    updated_at: float


class TokenBuckets:
    """A token bucket for each name: a burst of one minute's requests, then refilled at the rate."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}

    def consume(self, name: str, per_minute: int | None) -> None:
        """Count one request of `name`. Raises `RateLimitExceeded`."""
        if per_minute is None:
            return
        now = self._clock()
        bucket = self._buckets.setdefault(name, _Bucket(per_minute, now))
        bucket.tokens = min(per_minute, bucket.tokens + (now - bucket.updated_at) * per_minute / 60)
        bucket.updated_at = now
        if bucket.tokens < 1:
            raise RateLimitExceeded(math.ceil((1 - bucket.tokens) * 60 / per_minute))
        bucket.tokens -= 1

    def charge(self, name: str, count: int) -> None:
        """Count further ones of a request that was let in: its choices. Later requests wait for them."""
        if (bucket := self._buckets.get(name)) is not None:
            bucket.tokens -= count
