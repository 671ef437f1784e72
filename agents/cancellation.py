"""Cancellation between two pieces of text: a token that the caller closes, and what a closed one raises."""

from __future__ import annotations

import threading


class CallerGone(BaseException):
    """Whoever asked went away, or reads too slowly. No `Exception`: what was read and written has to be paid for."""


class CancellationToken:
    """Says between two pieces of text whether anyone still wants the next one. This one: until it is closed."""

    def __init__(self) -> None:
        self._closed = threading.Event()

    def wait(self) -> None:
        """Return when the next piece is wanted. Raises `CallerGone` where none is any more."""
        if self._closed.is_set():
            raise CallerGone

    def close(self) -> None:
        self._closed.set()
