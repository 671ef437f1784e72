"""Who is inside, and whether anyone may still come in: what lets a process end without leaving a call half done.

Knows nothing of what is done inside; a `StoppableRun` is LangGraph's control of one run.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from viaticum.agents.workflow.nodes import StoppableRun
from viaticum.errors import Draining


class DrainGate:
    """Open until it drains; `enter` counts those inside."""

    def __init__(self) -> None:
        self._inside: set[StoppableRun] = set()
        self._changed = threading.Condition()
        self.draining = False

    @contextmanager
    def enter(self) -> Iterator[StoppableRun]:
        """Raises `Draining` where nothing new may begin."""
        run = StoppableRun()
        with self._changed:
            self.check()
            self._inside.add(run)
        try:
            yield run
        finally:
            with self._changed:
                self._inside.discard(run)
                self._changed.notify_all()

    def check(self) -> None:
        if self.draining:
            raise Draining("this process is about to end and takes nothing new; ask another one")

    def drain(self, timeout: float) -> bool:
        """Let nobody in, and wait for those inside; returns whether none is left.

        They have half of the time to end of themselves. Then they stop at their next step, before another call of a
        model, and have the rest of the time to settle the one at hand.
        """
        with self._changed:
            self.draining = True
            if self._changed.wait_for(lambda: not self._inside, timeout / 2):
                return True
            for run in self._inside:
                run.request_drain()
            return self._changed.wait_for(lambda: not self._inside, timeout / 2)
