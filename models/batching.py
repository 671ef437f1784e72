"""Continuous batching of many callers on a pool of local models: a new request joins those that are running.

One thread steps the engines (`viaticum.decoders.Engine`) of a pool, because engines that share a runner must
be stepped by one thread. It runs while there are requests, and `IDLE_SECONDS` longer. Each caller waits on a
queue of its own; a caller that closes its iterator has its requests aborted and their slots freed. Slots
bound the memory: requests that find none wait in the order of arrival. Leaves out chats, prices and the
decoding mode of a pair.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from viaticum.errors import ModelError

if TYPE_CHECKING:
    from viaticum.decoders import Event, MixedDecoder, Request, Runner
    from viaticum.decoders.engine import Engine

# How long the thread outlives its last request. The first step of a new thread pays for a new team of OpenMP
# threads.
IDLE_SECONDS = 1.0
HEARTBEAT_SECONDS = 0.25  # a caller gets an empty event this often, so that it can close the iterator

WorkerMessage = tuple[int, "Event | ModelError"]


class PendingRequest:
    """One submitted request.

    index: its position in its caller's list; request_id: the engine's number, -1 until it has a slot.
    """

    __slots__ = ("decoder", "finished", "index", "messages", "request", "request_id")

    def __init__(
        self, decoder: MixedDecoder, index: int, request: Request, messages: SimpleQueue[WorkerMessage]
    ) -> None:
        self.decoder, self.index, self.request, self.messages = decoder, index, request, messages
        self.request_id = -1
        self.finished = False

    def send(self, message: Event | ModelError) -> None:
        self.messages.put((self.index, message))

    def fail(self, error: ModelError) -> None:
        self.finished = True
        self.send(error)


class EngineQueue:
    """An engine and the requests that run on it."""

    def __init__(self, decoder: MixedDecoder) -> None:
        self.engine: Engine = decoder.engine()
        self.running: dict[int, PendingRequest] = {}
        self.runners: frozenset[Runner] = frozenset(decoder.runners.values())

    def add(self, pending: PendingRequest) -> None:
        pending.request_id = self.engine.add(pending.request)
        self.running[pending.request_id] = pending

    def step(self) -> None:
        for event in self.engine.step():
            pending = self.running[event.index]
            if event.result is not None:
                pending.finished = True
                del self.running[event.index]
            pending.send(event)

    def fail(self, error: ModelError) -> None:
        """End every request of the engine with this error and free its slots."""
        self.engine.close()
        for pending in self.running.values():
            pending.fail(error)
        self.running.clear()


class BatchScheduler:
    """Accepts requests from any thread. Engines that share a runner must use the same scheduler."""

    def __init__(self) -> None:
        # Reentrant: a caller's generator may be collected in any thread.
        self._changed = threading.Condition()
        self._submitted: list[PendingRequest] = []
        self._withdrawn: list[PendingRequest] = []
        self._thread: threading.Thread | None = None
        self._closing = False
        # Used by the scheduler's thread alone:
        self._waiting: deque[PendingRequest] = deque()
        self._engines: dict[MixedDecoder, EngineQueue] = {}
        _schedulers.add(self)

    def generate(
        self, decoder: MixedDecoder, requests: Sequence[Request]
    ) -> Iterator[tuple[int, Event | None]]:
        """Yield (index in `requests`, event) as events come, until every request has ended.

        (-1, None) is yielded every `HEARTBEAT_SECONDS` without an event, so that the caller can close the
        iterator, which aborts the requests that have not ended. The result of a request that failed alone
        holds its error.

        Raises:
            InputError, PromptTooLong: a request cannot be computed; raised before any is.
            ModelError: an engine failed.
        """
        for request in requests:
            decoder.check(request)
        messages: SimpleQueue[WorkerMessage] = SimpleQueue()
        submitted = [PendingRequest(decoder, index, each, messages) for index, each in enumerate(requests)]
        unfinished = len(submitted)
        self._submit(submitted)
        try:
            while unfinished:
                try:
                    index, message = messages.get(timeout=HEARTBEAT_SECONDS)
                except Empty:
                    yield -1, None
                    continue
                if isinstance(message, ModelError):
                    raise message
                unfinished -= message.result is not None
                yield index, message
        finally:
            self._withdraw(submitted)

    def close(self) -> None:
        """Abort every request with an error and end the thread. A later request starts a new one."""
        with self._changed:
            thread, self._closing = self._thread, True
            self._changed.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    # --- called from callers' threads -----------------------------------------------------------------------

    def _submit(self, submitted: Sequence[PendingRequest]) -> None:
        with self._changed:
            self._submitted.extend(submitted)
            if self._thread is None:
                self._closing = False
                self._thread = threading.Thread(
                    target=self._run, name="viaticum-batch-scheduler", daemon=True
                )
                self._thread.start()
            self._changed.notify_all()

    def _withdraw(self, submitted: Sequence[PendingRequest]) -> None:
        withdrawn = [pending for pending in submitted if not pending.finished]
        if withdrawn:
            with self._changed:
                self._withdrawn.extend(withdrawn)
                self._changed.notify_all()

    # --- the scheduler's thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._receive():
                self._admit_waiting()
                self._step_all()
        except BaseException as error:
            self._fail_all(ModelError(f"the thread that writes local texts broke: {error!r}"))
            raise

    def _receive(self) -> bool:
        """Take over submitted and withdrawn requests; wait when idle. False: the thread is to end."""
        with self._changed:
            if not (self._engines or self._waiting):
                self._changed.wait_for(lambda: self._submitted or self._closing, IDLE_SECONDS)
            if self._closing or not (self._engines or self._waiting or self._submitted):
                self._fail_all(ModelError("local models were closed while the text was being written"))
                return False
            self._waiting.extend(self._submitted)
            self._submitted = []
            withdrawn, self._withdrawn = self._withdrawn, []
        for pending in withdrawn:
            if pending.request_id >= 0 and not pending.finished:
                self._engines[pending.decoder].engine.abort(pending.request_id)
            elif pending in self._waiting:
                self._waiting.remove(pending)
        return True

    def _admit_waiting(self) -> None:
        """Give free slots in the order of arrival.

        A request that finds none blocks its runners for all behind it: a pair needs a slot that is free at
        both of its models, and would starve if others kept taking one of the two.
        """
        taken: dict[Runner, int] = {}
        # What an engine holds back for want of memory goes first, and finds its slot free.
        blocked = {
            runner
            for queue in self._engines.values()
            if queue.engine.waiting or queue.engine.starved
            for runner in queue.runners
        }
        for pending in list(self._waiting):
            queue = self._engines.get(pending.decoder) or EngineQueue(pending.decoder)
            free = queue.engine.free_slots - max(taken.get(runner, 0) for runner in queue.runners)
            if free <= 0 or blocked & queue.runners:
                blocked |= queue.runners
                continue
            self._engines[pending.decoder] = queue
            self._waiting.remove(pending)
            queue.add(pending)
            for runner in queue.runners:
                taken[runner] = taken.get(runner, 0) + 1

    def _step_all(self) -> None:
        for decoder, queue in list(self._engines.items()):
            # The slot that a pair was to have may have gone to a text of one of its models: it is free soon.
            if queue.engine.starved and self._frees_slots_of(queue):
                continue
            try:
                queue.step()
            except ModelError as error:
                queue.fail(error)
            except Exception as error:
                queue.fail(ModelError(f"a model broke: {error!r}"))
            if not queue.engine.busy:
                del self._engines[decoder]

    def _frees_slots_of(self, starved: EngineQueue) -> bool:
        """Whether another engine decodes on one of these runners."""
        return any(
            queue.engine.busy and not queue.engine.starved and queue.runners & starved.runners
            for queue in self._engines.values()
        )

    def _fail_all(self, error: ModelError) -> None:
        with self._changed:
            for queue in self._engines.values():
                queue.fail(error)
            for pending in (*self._waiting, *self._submitted):
                pending.fail(error)
            self._engines = {}
            self._waiting.clear()
            self._submitted, self._withdrawn = [], []
            self._thread = None


_schedulers: weakref.WeakSet[BatchScheduler] = weakref.WeakSet()


@atexit.register
def _close_schedulers() -> None:
    """A thread that is inside torch while Python shuts down may crash the process."""
    for scheduler in list(_schedulers):
        scheduler.close()
