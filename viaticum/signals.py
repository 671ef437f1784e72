"""Signal handlers that are put back: what SIGTERM and SIGINT do while something has to end in order.

Leaves out what the handlers do: the client, the server and the commands each pass a function.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class SignalHandler:
    """Calls a function on signals. As a context manager it does nothing outside the main thread.

    Args:
        handle: called in the main thread with the number of the signal.
        signals: the signals whose handlers it replaces.
        once: restore the former handlers before the first call, so that a second signal has its former
            effect.
    """

    def __init__(
        self,
        handle: Callable[[int], object],
        signals: tuple[signal.Signals, ...] = STOP_SIGNALS,
        *,
        once: bool = False,
    ) -> None:
        self._handle, self._signals, self._once = handle, signals, once
        self._former: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Replace the handlers. Raises `ValueError` outside the main thread, as `signal.signal` does."""
        for number in self._signals:
            self._former[number] = signal.signal(number, self._on_signal)

    def restore(self) -> None:
        """Put the former handlers back."""
        for number, former in self._former.items():
            signal.signal(number, former)

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self.install()

    def __exit__(self, *error: object) -> None:
        self.restore()

    def _on_signal(self, number: int, frame: object) -> None:
        if self._once:
            self.restore()
        self._handle(number)


def drain_on(signals: tuple[signal.Signals, ...], drain: Callable[[], Any]) -> None:
    """On one of these signals drain, on a thread of its own, then do what the signal did before.

    A second signal does at once what it did before.

    Raises:
        ValueError: this is not the main thread.
    """

    def drain_and_raise(number: int) -> None:
        drain()
        os.kill(os.getpid(), number)

    def start(number: int) -> None:
        threading.Thread(target=drain_and_raise, args=(number,), name="viaticum-drain").start()

    SignalHandler(start, signals, once=True).install()
