"""How much a server takes on: places for calls that run, a queue before them, and a rate for each key.

All of it belongs to one event loop. Knows nothing of HTTP: what does not fit is a `QueueFull` or a `RateLimitExceeded`, with the
seconds after which trying again may help.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass


class QueueFull(Exception):
    """Every place is taken, and so is the queue."""

    retry_after = 1


class RateLimitExceeded(Exception):
    """More requests than a key's rate allows."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after


class ConcurrencyLimiter:
    """So many calls at once, and so many that wait for a place, in the order they came."""

    def __init__(self, count: int, queue: int) -> None:
        self.count, self.queue = count, queue
        self.taken = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    async def take(self) -> None:
        """Return with a place. Raises `QueueFull`."""
        if self.taken < self.count and not self._waiting:
            self.taken += 1
            return
        if len(self._waiting) >= self.queue:
            raise QueueFull
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give()  # the place had just been given to one who went away
            else:
                self._waiting.remove(turn)
            raise

    def give(self) -> None:
        """Give a place back, or on to the one who waits longest."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.taken -= 1


@dataclass(slots=True)
class _Bucket:
    left: float
    at: float


class TokenBuckets:
    """Requests a minute for each name: as many at once as a whole minute allows, then as fast as the rate."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}

    def spend(self, name: str, per_minute: int | None) -> None:
        """Count one request. Raises `RateLimitExceeded`."""
        if per_minute is None:
            return
        now = self._clock()
        bucket = self._buckets.setdefault(name, _Bucket(per_minute, now))
        bucket.left = min(per_minute, bucket.left + (now - bucket.at) * per_minute / 60)
        bucket.at = now
        if bucket.left < 1:
            raise RateLimitExceeded(math.ceil((1 - bucket.left) * 60 / per_minute))
        bucket.left -= 1
