"""Which budget pays for a call: that of its task or thread. Leaves out what a budget does (`scope`)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from typing import Protocol

from viaticum.agents.instrumentation.requests import ModelCall
from viaticum.types import TokenCount


class Held(Protocol):
    """A call that is held and being sent."""

    call: ModelCall
    limit: int

    def settle(self, count: TokenCount | None, kept: Mapping[str, int] | None = None) -> None: ...

    def void(self) -> None: ...


class Payer(Protocol):
    """A budget that holds for calls."""

    @property
    def parent(self) -> Payer | None: ...

    def reserve(self, call: ModelCall) -> Held: ...

    def reserve_amount(self, tool: str, amount: int) -> Callable[[int | None], None]: ...

    def refuses(self, what: str) -> bool: ...

    def note_refusal(self, reason: str) -> None: ...

    def note_unheld(self, what: str) -> None: ...


_current: ContextVar[Payer | None] = ContextVar("viaticum_budget", default=None)
_open: list[Payer] = []
_lock = threading.Lock()
_OF_THREAD = "_viaticum_budget"


def enter(payer: Payer) -> object:
    """Make a budget that of this context; returns what `leave` takes."""
    with _lock:
        _open.append(payer)
    return _current.set(payer)


def leave(payer: Payer, entered: object) -> None:
    """Take back what `enter` did, in whatever context."""
    with _lock:
        if payer in _open:
            _open.remove(payer)
    with suppress(ValueError):  # left in another context than it was entered in
        _current.reset(entered)  # type: ignore[arg-type]


def own() -> Payer | None:
    """The budget of this task or thread."""
    return _current.get() or getattr(threading.current_thread(), _OF_THREAD, None)


def current() -> Payer | None:
    """The budget of this task or thread, else the only one that is open, if there is one.

    So calls of threads that were there before (a client's own event loop) are held too.
    """
    payer = own()
    if payer is not None:
        return payer
    with _lock:
        roots = [each for each in _open if each.parent is None or each.parent not in _open]
        return roots[0] if len(roots) == 1 else None


def open_budgets() -> list[Payer]:
    """All budgets that are entered and not left, of any context."""
    with _lock:
        return list(_open)


def give(thread: threading.Thread, payer: Payer | None) -> None:
    """Make a budget that of a thread which is about to start."""
    setattr(thread, _OF_THREAD, payer)


class Inside:
    """A context in which calls are paid for by one budget."""

    def __init__(self, payer: Payer | None) -> None:
        self._payer = payer

    def __enter__(self) -> None:
        self._token = _current.set(self._payer)

    def __exit__(self, *_: object) -> None:
        _current.reset(self._token)
