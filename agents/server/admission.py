"""Admission control: a limit of concurrent calls with a bounded queue, and a request rate for each key.

All of it belongs to one event loop. Leaves out HTTP: a request over a limit raises `QueueFull` or
`RateLimitExceeded`, with the seconds after which a retry may succeed.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
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


class ConcurrencyLimiter:
    """A semaphore with a bounded queue: waiters get a free slot in the order they came.

    Args:
        max_running: slots.
        max_queued: waiters; further ones raise `QueueFull`.
    """

    def __init__(self, max_running: int, max_queued: int) -> None:
        self.max_running, self.max_queued = max_running, max_queued
        self.running = 0
        self._waiters: deque[asyncio.Future[None]] = deque()

    @property
    def queued(self) -> int:
        return len(self._waiters)

    async def acquire(self) -> None:
        """Wait for a slot. Raises `QueueFull`."""
        if self.running < self.max_running and not self._waiters:
            self.running += 1
            return
        if len(self._waiters) >= self.max_queued:
            raise QueueFull
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self.release()  # the slot was handed over just before the cancellation
            else:
                self._waiters.remove(waiter)
            raise

    def release(self) -> None:
        """Hand a slot over to the first waiter, or free it."""
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
        self.running -= 1


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
