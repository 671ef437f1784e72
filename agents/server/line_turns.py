"""How many lines of batches are in memory at once, over all batches of the server, and whose is next.

A line is taken from its file only when its key has a turn, which it has until its answer is written: while it
waits for a rate, for a slot, for money, and while it runs. Leaves out the slots themselves (`admission`).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass


@dataclass(eq=False, slots=True)
class _Waiter:
    name: str
    turn: asyncio.Future[None]


class LineTurns:
    """Turns, shared fairly by name. All of it belongs to one event loop.

    A free turn goes to the waiting name that has the fewest, and among its waiters to the first. Where all
    are taken, a name that has fewer than its equal part, at least one, does not wait: the lines of the others
    may wait for hours, for a rate or for money. So once no name has more than its part there are at most as
    many lines as turns, and one for each name beyond.

    Args:
        most: turns.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._taken: Counter[str] = Counter()
        self._waiters: list[_Waiter] = []

    @property
    def taken(self) -> int:
        return self._taken.total()

    async def take(self, name: str) -> None:
        """Wait for a turn of this name."""
        waiter = _Waiter(name, asyncio.get_running_loop().create_future())
        self._waiters.append(waiter)
        self._hand_over()
        try:
            await waiter.turn
        except asyncio.CancelledError:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            elif not waiter.turn.cancelled():
                self.release(name)  # it was handed over just before the cancellation
            raise

    def release(self, name: str) -> None:
        """End a turn of this name, and hand it over to a waiter."""
        self._taken[name] -= 1
        if not self._taken[name]:
            del self._taken[name]
        self._hand_over()

    def _hand_over(self) -> None:
        while (waiter := self._next()) is not None:
            self._waiters.remove(waiter)
            if not waiter.turn.done():  # else it was cancelled, and does not know yet
                self._taken[waiter.name] += 1
                waiter.turn.set_result(None)

    def _next(self) -> _Waiter | None:
        """The waiter that has its turn now."""
        first = min(self._waiters, key=lambda each: self._taken[each.name], default=None)
        if first is None or self.taken < self.most:
            return first
        names = {*self._taken, *(each.name for each in self._waiters)}
        return first if self._taken[first.name] < max(1, self.most // len(names)) else None
