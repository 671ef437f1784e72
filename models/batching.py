"""One desk where many callers have texts written at once: who asks while others are served joins them.

A thread of its own steps the engines (`viaticum.decoders.Engine`) of a pool of local models, as engines that share a
runner must be stepped by one thread. It lives while there are texts, and a moment longer. Callers wait for their own
events; one that goes away has its text aborted and its slot freed. Slots bound the memory: what finds none waits, in
the order of arrival. Knows nothing of chats, prices or which way a pair decodes.
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

IDLE_SECONDS = (
    1.0  # the thread outlives its last text: starting one costs its first step a fresh team of OpenMP threads
)
BEAT_SECONDS = 0.25  # how long a caller may be left without a word, and so without a chance to go away

WorkerMessage = tuple[int, "Event | ModelError"]


class PendingRequest:
    """One text that was asked for. place: which of its caller's texts; number: the engine's, once it has a slot."""

    __slots__ = ("decoder", "ended", "letters", "number", "place", "request")

    def __init__(
        self, decoder: MixedDecoder, place: int, request: Request, letters: SimpleQueue[WorkerMessage]
    ) -> None:
        self.decoder, self.place, self.request, self.letters = decoder, place, request, letters
        self.number = -1
        self.ended = False

    def tell(self, word: Event | ModelError) -> None:
        self.letters.put((self.place, word))


class EngineQueue:
    """An engine and the tickets of the texts that it is writing."""

    def __init__(self, decoder: MixedDecoder) -> None:
        self.engine: Engine = decoder.engine()
        self.tickets: dict[int, PendingRequest] = {}
        self.runners: frozenset[Runner] = frozenset(decoder.runners.values())

    def seat(self, ticket: PendingRequest) -> None:
        ticket.number = self.engine.add(ticket.request)
        self.tickets[ticket.number] = ticket

    def step(self) -> None:
        for event in self.engine.step():
            ticket = self.tickets[event.index]
            if event.result is not None:
                ticket.ended = True
                del self.tickets[event.index]
            ticket.tell(event)

    def fail(self, error: ModelError) -> None:
        """End every text of the engine and free its slots."""
        self.engine.close()
        for ticket in self.tickets.values():
            ticket.ended = True
            ticket.tell(error)
        self.tickets.clear()


class BatchScheduler:
    """Takes texts from any thread. Engines that share a runner belong to the same desk."""

    def __init__(self) -> None:
        self._news = threading.Condition()  # reentrant: a caller's generator may be collected in any thread
        self._arrived: list[PendingRequest] = []
        self._unwanted: list[PendingRequest] = []
        self._thread: threading.Thread | None = None
        self._closing = False
        # The thread's own:
        self._waiting: deque[PendingRequest] = deque()
        self._benches: dict[MixedDecoder, EngineQueue] = {}
        _desks.add(self)

    def write(self, decoder: MixedDecoder, requests: Sequence[Request]) -> Iterator[tuple[int, Event | None]]:
        """(place in `requests`, event) as they come, until every text has ended.

        (-1, None) comes now and then while there is nothing to tell, so that a caller may go away. Closing the
        iterator aborts what has not ended. Raises `InputError` and `PromptTooLong` before anything is computed, and
        `ModelError` where an engine broke; a text that failed alone has its error in its result.
        """
        for request in requests:
            decoder.check(request)
        letters: SimpleQueue[WorkerMessage] = SimpleQueue()
        tickets = [PendingRequest(decoder, place, request, letters) for place, request in enumerate(requests)]
        left = len(tickets)
        self._submit(tickets)
        try:
            while left:
                try:
                    place, word = letters.get(timeout=BEAT_SECONDS)
                except Empty:
                    yield -1, None
                    continue
                if isinstance(word, ModelError):
                    raise word
                left -= word.result is not None
                yield place, word
        finally:
            self._withdraw(tickets)

    def close(self) -> None:
        """Abort every text, tell their callers, and let the thread end. A text that comes later starts it anew."""
        with self._news:
            thread, self._closing = self._thread, True
            self._news.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    # --- callers' threads -----------------------------------------------------------------------------------

    def _submit(self, tickets: Sequence[PendingRequest]) -> None:
        with self._news:
            self._arrived.extend(tickets)
            if self._thread is None:
                self._closing = False
                self._thread = threading.Thread(target=self._serve, name="viaticum-desk", daemon=True)
                self._thread.start()
            self._news.notify_all()

    def _withdraw(self, tickets: Sequence[PendingRequest]) -> None:
        unwanted = [ticket for ticket in tickets if not ticket.ended]
        if unwanted:
            with self._news:
                self._unwanted.extend(unwanted)
                self._news.notify_all()

    # --- the desk's thread ----------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while self._take_news():
                self._seat_those_who_wait()
                self._step_all()
        except BaseException as error:
            self._fail_all(ModelError(f"the thread that writes local texts broke: {error!r}"))
            raise

    def _take_news(self) -> bool:
        """Take in what callers asked for; with nothing to do wait for it. False: the thread is to end."""
        with self._news:
            if not (self._benches or self._waiting):
                self._news.wait_for(lambda: self._arrived or self._closing, IDLE_SECONDS)
            if self._closing or not (self._benches or self._waiting or self._arrived):
                self._fail_all(ModelError("local models were closed while the text was being written"))
                return False
            self._waiting.extend(self._arrived)
            self._arrived = []
            unwanted, self._unwanted = self._unwanted, []
        for ticket in unwanted:
            if ticket.number >= 0 and not ticket.ended:
                self._benches[ticket.decoder].engine.abort(ticket.number)
            elif ticket in self._waiting:
                self._waiting.remove(ticket)
        return True

    def _seat_those_who_wait(self) -> None:
        """Give free slots in the order of arrival. Where one finds none, those after it leave its runners alone:
        a pair needs a slot that is free at both models, and would wait for ever while others take one of them."""
        taken: dict[Runner, int] = {}
        blocked: set[Runner] = set()
        for ticket in list(self._waiting):
            bench = self._benches.get(ticket.decoder) or EngineQueue(ticket.decoder)
            room = bench.engine.free_slots - max(taken.get(runner, 0) for runner in bench.runners)
            if room <= 0 or blocked & bench.runners:
                blocked |= bench.runners
                continue
            self._benches[ticket.decoder] = bench
            self._waiting.remove(ticket)
            bench.seat(ticket)
            for runner in bench.runners:
                taken[runner] = taken.get(runner, 0) + 1

    def _step_all(self) -> None:
        for decoder, bench in list(self._benches.items()):
            try:
                bench.step()
            except Exception as error:
                bench.fail(
                    error if isinstance(error, ModelError) else ModelError(f"a model broke: {error!r}")
                )
            if not bench.engine.busy:
                del self._benches[decoder]

    def _fail_all(self, error: ModelError) -> None:
        with self._news:
            for bench in self._benches.values():
                bench.fail(error)
            for ticket in (*self._waiting, *self._arrived):
                ticket.ended = True
                ticket.tell(error)
            self._benches = {}
            self._waiting.clear()
            self._arrived, self._unwanted = [], []
            self._thread = None


_desks: weakref.WeakSet[BatchScheduler] = weakref.WeakSet()


@atexit.register
def _close_desks() -> None:
    """A thread that is inside torch while Python shuts down may crash it."""
    for desk in list(_desks):
        desk.close()
