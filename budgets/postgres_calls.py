"""One step of one call as one round trip: what the rules would write, for the database to apply if it fits.

The step runs over `ProposedRows`, which know the names and windows of the scopes and the terms of the hold,
and record its writes. The function `apply_calls` (`schema_postgres`) locks the scopes, compares all that the
step rests on, checks the limits, and completes the entries with their number, time and hash. What does not
fit, or is not as it was thought, is decided by the rules over the real rows, in a transaction of its own.

Leaves out connections and that transaction: see `postgres`; and what a step does: see `ledger`.
"""

from __future__ import annotations

import json
import secrets
import selectors
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from viaticum.budgets.chain import warn_of_clock
from viaticum.budgets.records import Entry, Hold, HoldState
from viaticum.budgets.serialization import json_text
from viaticum.budgets.sql import hold_values
from viaticum.budgets.store import EntryColumns, Rows, Scope
from viaticum.errors import ViaticumError

if TYPE_CHECKING:
    import psycopg
    from psycopg import pq

CANCEL_SECONDS = 5.0
T = TypeVar("T")
Amounts = tuple[int, int]
# Without a descriptor of its own, which would cost system calls.
_Selector = getattr(selectors, "PollSelector", selectors.SelectSelector)


class NotPredictable(Exception):
    """The step needs rows that only the database has."""


@dataclass
class ProposedRows:
    """The rows that one step of a call sees and writes; a part of `Rows`.

    Attributes:
        scopes: the lineage, with names and windows alone: limits and states are compared by the database.
        known: the hold as this process knows it; None for one to be made.
    """

    scopes: list[Scope]
    known: Hold | None
    changed: Hold | None = None
    held: Amounts = (0, 0)
    posted: Amounts = (0, 0)
    since: dict[str, int] = field(default_factory=dict)
    buckets: dict[str, int] = field(default_factory=dict)
    entries: list[EntryColumns] = field(default_factory=list)
    is_exclusive = True

    def lineage(self, name: str) -> list[Scope]:
        return self.scopes

    def hold(self, key: str) -> Hold | None:
        return self.known

    def posted_since(self, name: str, bucket: int) -> Amounts:
        self.since[name] = bucket
        return 0, 0

    def insert_hold(self, hold: Hold) -> None:
        self.changed = hold

    def update_hold(self, key: str, state: HoldState, until: str) -> None:
        hold = self.changed or self.known
        assert hold is not None
        self.changed = hold.with_state(state, until)

    def set_result(self, key: str, result: str) -> None:
        hold = self.changed or self.known
        assert hold is not None
        self.changed = hold.with_result(result)

    def add_to_totals(self, names: Sequence[str], held: Amounts, posted: Amounts) -> None:
        self.held = (self.held[0] + held[0], self.held[1] + held[1])
        self.posted = (self.posted[0] + posted[0], self.posted[1] + posted[1])

    def add_to_bucket(self, name: str, bucket: int, posted: Amounts) -> None:
        self.buckets[name] = bucket

    def append(self, columns: EntryColumns, hash: str) -> int:
        self.entries.append(columns)
        return len(self.entries)

    def set_chain_head(self, root: str, entries: int, head: str, last_at: str) -> None:
        """The database knows it."""

    def __getattr__(self, name: str) -> Any:
        raise NotPredictable(name)


class Proposal(Generic[T]):
    """A step, its outcome if the database applies it, and the reply.

    reply: time, number, hash and ids of the entries; None if nothing was applied.
    """

    def __init__(self, rows: ProposedRows, outcome: T) -> None:
        self._rows, self._outcome = rows, outcome
        self.is_answered = False
        self.reply: tuple[str, int, str, list[int]] | None = None

    @classmethod
    def of(cls, action: Callable[[Rows], T], scopes: list[Scope], known: Hold | None) -> Proposal[T] | None:
        """Run the step; None where it writes nothing, or is one for the rules over the real rows."""
        rows = ProposedRows(scopes, known)
        try:
            outcome = action(cast(Rows, rows))
        except (NotPredictable, ViaticumError):
            return None
        return cls(rows, outcome) if rows.changed is not None else None

    @property
    def root(self) -> str:
        return self._rows.scopes[0].name

    def operation(self) -> dict[str, Any]:
        """The argument of `apply_calls`."""
        rows, hold = self._rows, self._rows.changed
        assert hold is not None
        now = rows.entries[0][8]
        return {
            "now": now,
            "before": _next_minute(now) if rows.since or rows.buckets else None,
            "root": json_text(self.root),
            "key": hold.key,
            "expected": None if rows.known is None else [rows.known.state, rows.known.until],
            "scopes": [
                [
                    scope.name,
                    "" if scope.window is None else str(scope.window),
                    rows.since.get(scope.name),
                ]
                for scope in rows.scopes
            ],
            "posts": list(rows.buckets.items()),
            "held": rows.held,
            "posted": rows.posted,
            "hold": hold_values(hold),
            "entries": [_entry_values(columns) for columns in rows.entries],
        }

    def completed(self) -> T:
        """The outcome as the database completed it."""
        assert self.reply is not None
        at, number, head, ids = self.reply
        if at > (now := self._rows.entries[0][8]):
            warn_of_clock(self.root, at, now)
        hold = self._rows.changed
        assert hold is not None
        if self._rows.known is None:
            hold = hold.with_times(at, hold.until)
        if isinstance(self._outcome, Entry):
            return cast(T, replace(self._outcome, id=ids[-1], at=at, number=number, hash=head))
        return cast(T, hold)


def apply(
    connection: pq.abc.PGconn, proposals: Sequence[Proposal[Any]], *, release_early: bool
) -> tuple[float, list[Any]]:
    """Send the operations in one message, in the simple protocol, which pools pass on as one.

    Args:
        connection: of libpq; psycopg's own cursors take longer than the database does.
        proposals: in the order in which they are applied.
        release_early: commit without waiting for the disk, and let a second transaction of the message wait.
            So the locks are free while the disk writes. Nothing is told to a caller before it has, and what
            others read meanwhile lies before their own commits in the log.

    Returns:
        Seconds that it waited for locks, and a reply for each proposal.

    Raises:
        psycopg.Error: of the database; its transaction is to be rolled back.
    """
    operations = json.dumps([each.operation() for each in proposals])
    quote = f"$q{secrets.token_hex(8)}$"
    select = f"SELECT viaticum.apply_calls({quote}{operations}{quote}, '{'off' if release_early else 'on'}')"
    if release_early:
        select = f"BEGIN; {select}; COMMIT; SELECT pg_logical_emit_message(true, 'viaticum', '')"
    rows = [found for result in _exchange(connection, select) if (found := result.get_value(0, 0))]
    waited, replies = json.loads(rows[0])
    return waited, replies


def cancel(connection: psycopg.Connection[Any]) -> None:
    """End a message that was interrupted, and wait until it is carried out or never will be.

    A look at the ledger on another connection could else come before it. Where the database does not answer,
    this returns after `CANCEL_SECONDS`.
    """
    import psycopg

    with suppress(psycopg.Error, TimeoutError, OSError):
        connection.cancel_safe(timeout=CANCEL_SECONDS)
        _results(connection.pgconn, time.monotonic() + CANCEL_SECONDS)


def _exchange(connection: pq.abc.PGconn, message: str) -> list[pq.abc.PGresult]:
    """Send a message and wait for its results; signals are handled while it waits."""
    import psycopg

    connection.send_query(message.encode())
    found = _results(connection)
    for result in found:
        if result.status == psycopg.pq.ExecStatus.FATAL_ERROR:
            raise psycopg.errors.error_from_result(result)
    return found


def _results(connection: pq.abc.PGconn, until: float | None = None) -> list[pq.abc.PGresult]:
    """Send what is not sent yet, and wait for all results.

    until: of the monotonic clock. Raises `TimeoutError` where it has passed.
    """
    found: list[pq.abc.PGresult] = []
    with _Selector() as waiting:
        waiting.register(connection.socket, selectors.EVENT_READ | selectors.EVENT_WRITE)
        while connection.flush():
            _wait(waiting, until)
            connection.consume_input()
        waiting.modify(connection.socket, selectors.EVENT_READ)
        while True:
            while connection.is_busy():
                _wait(waiting, until)
                connection.consume_input()
            result = connection.get_result()
            if result is None:
                return found
            found.append(result)


def _wait(waiting: selectors.BaseSelector, until: float | None) -> None:
    left = None if until is None else max(0.0, until - time.monotonic())
    if not waiting.select(left) and left is not None:
        raise TimeoutError("the database does not answer")


def _entry_values(columns: EntryColumns) -> list[Any]:
    """The parts of the hashed text around number and time, then the columns."""
    _, _, budget, key, kind, nanousd, tokens, overrun, _, *texts = columns
    before = json_text([budget, key, kind, nanousd, tokens, overrun])[1:-1]
    return [before, json_text(texts)[1:-1], budget, kind, nanousd, tokens, overrun, *texts]


def _next_minute(now: str) -> str:
    """Buckets of every window begin at whole minutes: until then those of `now` are the right ones."""
    moment = datetime.fromisoformat(now).replace(second=0, microsecond=0) + timedelta(minutes=1)
    return moment.astimezone(UTC).isoformat(timespec="microseconds")
