"""Limits of single requests, below a scope of the ledger: kept in memory, gone when the request ends.

A server may get any number of requests with a limit of their own. Each call of such a request is held and
posted in the scope above, as any other; here it is also counted against the limit, which no row of the ledger
tells of. That is exact, because one process answers a request. A process that dies takes the limit with it:
the scope above keeps its holds. Leaves out scopes, which last: see `scopes`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from viaticum.budgets.records import HELD_STATES, Budget, Hold, checked_limit, checked_name
from viaticum.errors import BudgetError, BudgetExceeded, InputError
from viaticum.money import format_usd


@dataclass
class RequestLimit:
    """One limit: what its calls hold, by key, and what they cost.

    Args:
        earlier: what calls of an earlier run hold that may go on in this one. They count against further
            calls, and not in `budget`, by which a plan is made: it may choose them again.
    """

    name: str
    parent: str
    nanousd: int
    posted: int = 0
    held: dict[str, int] = field(default_factory=dict)
    earlier: dict[str, int] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def budget(self) -> Budget:
        """As a scope would be seen."""
        return Budget(self.name, self.nanousd, None, self.posted, sum(self.held.values()), parent=self.parent)

    def reserve(self, wanted: Hold, hold: Callable[[], Hold]) -> Hold:
        """Hold a call in the scope above if it fits here.

        Args:
            wanted: the hold.
            hold: holds it in the ledger.

        Raises:
            BudgetExceeded: it does not fit; nothing is held.
        """
        with self.lock:
            held = self.earlier | self.held
            left = self.nanousd - self.posted - sum(held.values())
            if wanted.key not in held and wanted.held_nanousd > left:
                raise BudgetExceeded(
                    f"budget {self.name!r} has {format_usd(left)} left, the call may cost "
                    f"{format_usd(wanted.held_nanousd)}",
                    budget=self.name,
                    needed=wanted.held_nanousd,
                    left=left,
                    unit="nanousd",
                )
            found = hold()
            if found.state in HELD_STATES:
                self.held[found.key] = found.held_nanousd
            return found

    def end(self, key: str, nanousd: int) -> None:
        """Count what a call cost in place of its hold; once."""
        with self.lock:
            if key in self.held or key in self.earlier:
                self.held.pop(key, None)
                self.earlier.pop(key, None)
                self.posted += nanousd


class RequestLimits:
    """The limits of the requests that are running, by name."""

    def __init__(self) -> None:
        self._limits: dict[str, RequestLimit] = {}

    @contextmanager
    def open(
        self, name: str, parent: str, nanousd: int, earlier: Mapping[str, int] | None = None
    ) -> Iterator[RequestLimit]:
        checked_name("budget name", name)
        if checked_limit("nanousd", nanousd) is None:
            raise InputError("no limit given; give limit_nanousd")
        limit = RequestLimit(name, parent, nanousd, earlier=dict(earlier or {}))
        if self._limits.setdefault(name, limit) is not limit:
            raise BudgetError(f"the request {name!r} has a limit already; take another name")
        try:
            yield limit
        finally:
            del self._limits[name]

    def find(self, name: str) -> RequestLimit | None:
        return self._limits.get(name) if isinstance(name, str) else None

    def end(self, key: str, nanousd: int) -> None:
        """Count what a call cost in place of its hold, where it belongs to a request with a limit."""
        for limit in list(self._limits.values()):
            if key in limit.held or key in limit.earlier:
                limit.end(key, nanousd)
