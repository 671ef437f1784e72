"""Many questions at once, on threads or on an event loop; results as each ends.

Leaves out jobs over files (`viaticum.agents.batch`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from typing import TypeVar

from viaticum.checks import checked_seconds
from viaticum.errors import DeadlineExceeded, ViaticumError

Item = TypeVar("Item")
Result = TypeVar("Result")


class StartDeadline:
    """When the last of many questions may begin.

    Args:
        seconds: from now on; None for no limit.

    Raises:
        InputError: the seconds are not above zero.
    """

    def __init__(self, seconds: float | None) -> None:
        self._seconds = None if seconds is None else checked_seconds("deadline", seconds)
        self._until = time.monotonic() + (self._seconds or 0.0)

    def check(self) -> None:
        """Raises `DeadlineExceeded` where no further question begins."""
        if self._seconds is not None and time.monotonic() >= self._until:
            raise DeadlineExceeded(
                f"{self._seconds:g} seconds (deadline) are over: this question was not begun"
            )


def in_threads(
    executor: Executor, work: Callable[[Item], Result], items: Iterable[Item], limit: int
) -> Iterator[tuple[int, Result | ViaticumError]]:
    """Yield (index of the item, result or error) as each ends, at most `limit` at a time."""
    running, waiting = dict[Future[Result], int](), enumerate(items)
    try:
        while True:
            while len(running) < limit and (following := next(waiting, None)) is not None:
                index, item = following
                running[executor.submit(work, item)] = index
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                result = _result_of(future)
                yield running.pop(future), result
    finally:
        for future in running:
            future.cancel()
        wait(running)


async def in_tasks(
    work: Callable[[Item], Awaitable[Result]], items: Iterable[Item] | AsyncIterable[Item], limit: int
) -> AsyncIterator[tuple[int, Result | ViaticumError]]:
    """As `in_threads`, as tasks of the running loop."""
    running, waiting = dict[asyncio.Task[Result], int](), aiter(_asynchronous(items))
    index, more = 0, True
    try:
        while True:
            while more and len(running) < limit:
                try:
                    item = await anext(waiting)
                except StopAsyncIteration:
                    more = False
                    break
                running[asyncio.ensure_future(work(item))] = index
                index += 1
            if not running:
                return
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                result = _result_of(task)
                yield running.pop(task), result
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def _result_of(done: Future[Result] | asyncio.Task[Result]) -> Result | ViaticumError:
    try:
        return done.result()
    except ViaticumError as error:
        return error


async def _asynchronous(items: Iterable[Item] | AsyncIterable[Item]) -> AsyncIterator[Item]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item
