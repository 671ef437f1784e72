"""Streams that a reader may leave without closing them, as a loop does that is left by an error.

Such a stream stands at its last item, with its call and the hold of it. Whoever closes the client ends it
there, while the ledger is open, and the call is charged for what was generated. Leaves out which streams are
open (`viaticum.agents.draining`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator
from inspect import GEN_RUNNING, getgeneratorstate
from typing import Generic, TypeVar

from viaticum.errors import ClientClosed

CLOSED = "this client is closed; open another one"
Item = TypeVar("Item")


class OpenStream(Iterator[Item], Generic[Item]):
    """The items of a generator, which another thread may end between two of them.

    Args:
        items: the generator; nobody else reads it.
        is_chat: of a plain chat, and not of a question that runs through the graph.

    Attributes:
        is_over: the generator has ended.
    """

    def __init__(self, items: Generator[Item, None, None], *, is_chat: bool = False) -> None:
        self.is_chat, self.is_over = is_chat, False
        self._items, self._is_ended = items, False
        self._turn = threading.RLock()
        self._reader: int | None = None  # the thread that waits for an item

    @property
    def is_read_here(self) -> bool:
        """Whether this very thread waits for an item, as in a signal handler or in the model's own call."""
        return self._reader == threading.get_ident()

    def __next__(self) -> Item:
        """The next item. Raises `ClientClosed` once the stream was ended by `end`."""
        try:
            with self._turn:
                if self._is_ended:
                    raise ClientClosed(f"closed while it was at work; {CLOSED}")
                self._reader = threading.get_ident()
                try:
                    return next(self._items)
                finally:
                    self._reader = None
        except BaseException:  # its own, or an interrupt beside it
            self.close()
            raise

    def close(self) -> None:
        """End the current call, which is charged for what was generated."""
        with self._turn:
            self.is_over = True
            self._items.close()

    def end(self, until: float) -> None:
        """Close the stream for its reader, who gets `ClientClosed` for each further item.

        Args:
            until: monotonic time in seconds; up to then an item that another thread waits for is awaited.
        """
        self._is_ended = True
        if not self._turn.acquire(timeout=max(0.0, until - time.monotonic())):
            return
        try:
            if getgeneratorstate(self._items) != GEN_RUNNING:  # else its own call closes the client
                self.close()
        finally:
            self._turn.release()
