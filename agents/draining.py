"""Draining and closing: refuses new runs, and waits for those in progress, so that no call is left half done.

Leaves out what the runs do; a `StoppableRun` is LangGraph's control of one run.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from viaticum.agents.workflow.nodes import StoppableRun
from viaticum.errors import ClientClosed, Draining, LedgerError, ViaticumError

CLOSED = "this client is closed; open another one"


class DrainGate:
    """Open until `drain` or `close` is called; `enter` registers a run for its duration.

    A forked child begins without runs: those of its parent end there.
    """

    def __init__(self) -> None:
        self._begin()
        self.draining = self.closed = False

    def _begin(self) -> None:
        self._running: set[StoppableRun] = set()
        self._chats: set[object] = set()
        self._changed = threading.Condition()
        self._process = os.getpid()

    @contextmanager
    def enter(self) -> Iterator[StoppableRun]:
        """Register a run.

        Raises:
            Draining, ClientClosed: the gate takes no runs. `ClientClosed` also in place of what a run raises
                whose resources were closed meanwhile.
        """
        run = StoppableRun()
        self._after_fork()
        with self._changed:
            self.check()
            self._running.add(run)
        try:
            with self.explained():
                yield run
        finally:
            with self._changed:
                self._running.discard(run)
                self._changed.notify_all()

    @contextmanager
    def chatting(self) -> Iterator[None]:
        """Register a plain chat for its duration. It is refused nothing here, and nothing waits for it."""
        chat = object()
        self._after_fork()
        self._chats.add(chat)
        try:
            yield
        finally:
            self._chats.discard(chat)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Raise `ClientClosed` in place of errors that come from resources which were closed meanwhile."""
        try:
            yield
        except GeneratorExit:
            raise
        except Exception as error:
            is_ours = isinstance(error, ViaticumError) and not isinstance(error, LedgerError)
            if self.closed and not is_ours:
                raise ClientClosed(f"closed while it was at work; {CLOSED}") from error
            raise

    @property
    def is_idle(self) -> bool:
        """Whether no run and no chat is in progress."""
        return not self._running and not self._chats

    def check(self) -> None:
        """Raises `Draining` or `ClientClosed` where no run may begin."""
        self.check_open()
        if self.draining:
            raise Draining("this process is about to end and takes nothing new; ask another one")

    def check_open(self) -> None:
        if self.closed:
            raise ClientClosed(CLOSED)

    def close(self) -> None:
        """Refuse new runs for good; those in progress stop at their next step."""
        self._after_fork()
        with self._changed:
            self.closed = True
            for run in self._running:
                run.request_drain()

    def drain(self, timeout: float) -> bool:
        """Refuse new runs and wait for those in progress; returns whether all have ended.

        Runs have half of `timeout` (seconds) to end by themselves. Then they stop at their next step, before
        another call of a model, and have the rest of the time to settle the current one.
        """
        self._after_fork()
        half = min(timeout / 2, threading.TIMEOUT_MAX)
        with self._changed:
            self.draining = True
            if self._changed.wait_for(lambda: not self._running, half):
                return True
            for run in self._running:
                run.request_drain()
            return self._changed.wait_for(lambda: not self._running, half)

    def _after_fork(self) -> None:
        if self._process != os.getpid():
            self._begin()
