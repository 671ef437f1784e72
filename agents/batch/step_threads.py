"""The threads that make the steps of rows, and how many rows are worth reserving before one of them is free.

Leaves out the steps (`agents.batch.steps`) and which rows they are made for (`agents.batch.executor`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from viaticum.agents.batch.steps import Task

AHEAD_SECONDS = 0.1  # of work that is reserved before a thread is free for it
MAX_AHEAD = 2048  # rows
GROUP_SECONDS = 0.01  # of quick calls that one thread makes one after the other
Step = Callable[[Task], Any]


class StepThreads:
    """Threads that are started as they are needed.

    Args:
        most: threads.
        works_ahead: whether rows are reserved before a thread is free.

    Attributes:
        capacity: rows that may be under way.
    """

    def __init__(self, most: int, works_ahead: Callable[[], bool]) -> None:
        self._most, self._works_ahead = most, works_ahead
        self.capacity = most
        self._seconds = 1.0  # of a call, moving average
        self._submitted: SimpleQueue[tuple[Step, list[Task]] | None] = SimpleQueue()
        self._ended: SimpleQueue[list[tuple[Task, Any]]] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    @property
    def group_size(self) -> int:
        """Calls that one thread makes one after the other."""
        return max(1, int(GROUP_SECONDS / max(self._seconds, 1e-5)))

    def submit(self, step: Step, tasks: list[Task], running: int) -> None:
        """Make a step of some tasks, one after the other. running: tasks that are under way."""
        if len(self._threads) < min(self._most, running):
            thread = threading.Thread(target=self._run, name="viaticum-batch", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._submitted.put((step, tasks))

    def ended(self, timeout: float, most: int) -> list[tuple[Task, Any]]:
        """Tasks whose steps have ended, with results or errors: about `most`; none after `timeout` seconds.

        A step's tasks come together.
        """
        try:
            ended = self._ended.get(timeout=timeout)
        except Empty:
            return []
        with suppress(Empty):
            while len(ended) < most:
                ended += self._ended.get_nowait()
        return ended

    def close(self) -> None:
        """Let the threads end."""
        for _ in self._threads:
            self._submitted.put(None)

    def _run(self) -> None:
        while (item := self._submitted.get()) is not None:
            step, tasks = item
            ended: list[tuple[Task, Any]] = []
            began = time.perf_counter()
            for task in tasks:
                try:
                    ended.append((task, step(task)))
                except BaseException as error:
                    ended.append((task, error))
            self._update_seconds((time.perf_counter() - began) / len(tasks))
            self._ended.put(ended)

    def _update_seconds(self, seconds: float) -> None:
        weight = 0.1 if seconds > self._seconds else 0.5
        self._seconds += weight * (seconds - self._seconds)
        ahead = int(AHEAD_SECONDS * self._most / max(self._seconds, 1e-5))
        self.capacity = self._most + (min(MAX_AHEAD, ahead) if self._works_ahead() else 0)
