"""Draining and closing: refuses new runs, and waits for those in progress, so that no call is left half done.

Leaves out what the runs do; a `StoppableRun` is LangGraph's control of one run.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakSet

from viaticum.agents.workflow.nodes import StoppableRun, is_inside_run
from viaticum.agents.workflow.open_streams import CLOSED, OpenStream
from viaticum.agents.workflow.shadow import ShadowSampler
from viaticum.errors import ClientClosed, Draining, LedgerError, ViaticumError

CLOSING_SECONDS = 30.0  # that current calls have to end by themselves where a client is closed
SETTLE_SECONDS = 30.0  # and that they have then to be settled
Item = TypeVar("Item")
_log = logging.getLogger("viaticum")


class DrainGate:
    """Open until `drain` or `close` is called; `enter` registers a run for its duration.

    A forked child begins without runs: those of its parent end there.
    """

    def __init__(self) -> None:
        self._begin()
        self.draining = self.closed = False

    def _begin(self) -> None:
        # Without those that an interrupt kept from being taken out.
        self._running = WeakSet[StoppableRun]()
        self._streams = WeakSet[OpenStream[Any]]()
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

    def watched(self, items: Generator[Item, None, None], *, is_chat: bool = False) -> OpenStream[Item]:
        """The items of a stream, which is refused nothing here, and which `close` ends."""
        stream = OpenStream(items, is_chat=is_chat)
        self._after_fork()
        with self._changed:
            self._streams.add(stream)
        return stream

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
        return not self._running and not any(each.is_chat and not each.is_over for each in self._open())

    def _open(self) -> list[OpenStream[Any]]:
        with self._changed:
            return list(self._streams)

    def check(self) -> None:
        """Raises `Draining` or `ClientClosed` where no run may begin."""
        self.check_open()
        if self.draining:
            raise Draining("this process is about to end and takes nothing new; ask another one")

    def check_open(self) -> None:
        if self.closed:
            raise ClientClosed(CLOSED)

    def close(self) -> None:
        """Refuse new runs for good, and end those in progress while their calls can be settled.

        A stream ends where its reader stands. Other runs have `CLOSING_SECONDS` for their current call, and
        stop at their next step; then the call is ended as well, and charged for what was generated.
        """
        self._after_fork()
        streams = self._open()
        waits = not is_inside_run() and not any(each.is_read_here for each in streams)  # not for itself
        with self._changed:
            self.closed = True
            for run in self._running:
                run.request_drain()
        until = time.monotonic() + (CLOSING_SECONDS if waits else 0.0)
        self._end(streams, until)
        if not self._have_ended(until):
            with self._changed:
                for run in self._running:
                    run.stopped = True
        until = time.monotonic() + (SETTLE_SECONDS if waits else 0.0)
        self._end([each for each in streams if not each.is_over], until)
        self._have_ended(until)

    def _end(self, streams: Iterable[OpenStream[Any]], until: float) -> None:
        for stream in streams:
            try:
                stream.end(until)
            except ViaticumError as error:
                _log.warning("a stream that was open could not be ended: %s", error)

    def _have_ended(self, until: float) -> bool:
        """Wait for the runs in progress, up to a monotonic time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._running, max(0.0, until - time.monotonic()))

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


def drain_all(gate: DrainGate, shadow: ShadowSampler | None, timeout: float) -> bool:
    """`DrainGate.drain`, and shadow calls beside the runs, which may take all of the time.

    Shadow calls have half of `timeout` (seconds) and at most their `wait_seconds`; then they end.
    """
    until = time.monotonic() + timeout
    if shadow is None:
        return gate.drain(timeout)
    wait = min(timeout / 2, shadow.sampling.wait_seconds)
    settle = {"settle_seconds": timeout - wait}
    ending = threading.Thread(target=shadow.close, args=(wait,), kwargs=settle, daemon=True)
    ending.start()
    ended = gate.drain(until - time.monotonic())
    ending.join(max(0.0, until - time.monotonic()))
    return ended
