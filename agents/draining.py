"""Draining: refuses new runs and waits for those in progress, so that no call is left half done.

Leaves out what the runs do; a `StoppableRun` is LangGraph's control of one run.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from viaticum.agents.workflow.nodes import StoppableRun
from viaticum.errors import Draining


class DrainGate:
    """Open until `drain` is called; `enter` registers a run for its duration."""

    def __init__(self) -> None:
        self._running: set[StoppableRun] = set()
        self._changed = threading.Condition()
        self.draining = False

    @contextmanager
    def enter(self) -> Iterator[StoppableRun]:
        """Register a run. Raises `Draining` once the gate is draining."""
        run = StoppableRun()
        with self._changed:
            self.check()
            self._running.add(run)
        try:
            yield run
        finally:
            with self._changed:
                self._running.discard(run)
                self._changed.notify_all()

    def check(self) -> None:
        if self.draining:
            raise Draining("this process is about to end and takes nothing new; ask another one")

    def drain(self, timeout: float) -> bool:
        """Refuse new runs and wait for those in progress; returns whether all have ended.

        Runs have half of `timeout` (seconds) to end by themselves. Then they stop at their next step, before
        another call of a model, and have the rest of the time to settle the current one.
        """
        with self._changed:
            self.draining = True
            if self._changed.wait_for(lambda: not self._running, timeout / 2):
                return True
            for run in self._running:
                run.request_drain()
            return self._changed.wait_for(lambda: not self._running, timeout / 2)
