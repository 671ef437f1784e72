"""Cancellation between pieces of text: a token that the caller closes, and the exception it then raises."""

from __future__ import annotations

import threading


class CallerGone(BaseException):
    """The client disconnected or reads too slowly. A BaseException, so that partial work is still charged."""


class CancellationToken:
    """Checked between two pieces of text; open until `close` is called."""

    def __init__(self) -> None:
        self._closed = threading.Event()

    def wait(self) -> None:
        """Return when the next piece is wanted. Raises `CallerGone` if the token is closed."""
        if self._closed.is_set():
            raise CallerGone

    def close(self) -> None:
        self._closed.set()
