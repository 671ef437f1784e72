"""The ledger in memory: for tests, dry runs and programs that keep nothing. It ends with the process.

Dictionaries and lists behind a lock; a write that raises is undone step by step. A forked child has a copy of
its own. Leaves out the meaning of the rows: see `ledger`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice, takewhile
from typing import Any, TypeVar

from viaticum.budgets.records import TERMINAL_KINDS, Entry, EntryKind, Hold, HoldState
from viaticum.budgets.store import EntryColumns, Rows, Scope, Store, T, entry_from_columns
from viaticum.errors import LedgerError

K = TypeVar("K")
V = TypeVar("V")


class MemoryRows(Rows):
    """All rows. `undo` holds the inverse of each step of the current write, in order."""

    def __init__(self) -> None:
        self._scopes: dict[str, Scope] = {}
        self._holds: dict[str, Hold] = {}
        self._held: dict[str, Hold] = {}  # reserved or dispatched
        self._ends: dict[str, Entry] = {}
        self._entries: list[tuple[Entry, str, str, str]] = []
        self._chains: dict[str, list[tuple[Entry, str, str, str]]] = {}  # the entries by root
        self._reserved: dict[str, int] = {}  # number of holds by root
        self._buckets: dict[str, dict[int, tuple[int, int]]] = {}
        self._leases: dict[str, tuple[str, str]] = {}
        self.undo: list[Callable[[], Any]] = []

    def _put(self, table: dict[K, V], key: K, value: V) -> None:
        if key in table:
            before = table[key]
            self.undo.append(lambda: table.__setitem__(key, before))
        else:
            self.undo.append(lambda: table.pop(key, None))
        table[key] = value

    def _take(self, table: dict[K, V], key: K) -> None:
        if key in table:
            before = table[key]
            self.undo.append(lambda: table.__setitem__(key, before))
            del table[key]

    def scopes(self, root: str | None = None) -> list[Scope]:
        return [
            self._scopes[name] for name in sorted(self._scopes) if root in (None, self._scopes[name].root)
        ]

    def lineage(self, name: str) -> list[Scope]:
        found: list[Scope] = []
        step: str | None = name
        while step is not None and step in self._scopes:
            found.insert(0, self._scopes[step])
            step = self._scopes[step].parent
        return found

    def insert_scope(self, scope: Scope) -> None:
        self._put(self._scopes, scope.name, scope)

    def update_scope(self, scope: Scope) -> None:
        row = replace(
            self._scopes[scope.name],
            limit_nanousd=scope.limit_nanousd,
            limit_tokens=scope.limit_tokens,
            window=scope.window,
            state=scope.state,
        )
        self._put(self._scopes, scope.name, row)

    def add_to_totals(self, names: Sequence[str], held: tuple[int, int], posted: tuple[int, int]) -> None:
        for name in names:
            self._put(self._scopes, name, self._scopes[name].with_amounts(held, posted))

    def set_chain_head(self, root: str, entries: int, head: str, last_at: str) -> None:
        row = replace(self._scopes[root], entries=entries, head=head, last_at=last_at)
        self._put(self._scopes, root, row)

    def add_to_bucket(self, name: str, bucket: int, posted: tuple[int, int]) -> None:
        table = self._buckets.setdefault(name, {})
        before = table.get(bucket, (0, 0))
        self._put(table, bucket, (before[0] + posted[0], before[1] + posted[1]))

    def clear_buckets(self, name: str) -> None:
        table = self._buckets.get(name, {})
        for bucket in list(table):
            self._take(table, bucket)

    def posted_since(self, name: str, bucket: int) -> tuple[int, int]:
        counted = [posted for start, posted in self.buckets(name).items() if start >= bucket]
        return sum(posted[0] for posted in counted), sum(posted[1] for posted in counted)

    def buckets(self, name: str) -> dict[int, tuple[int, int]]:
        return dict(self._buckets.get(name, {}))

    def take_lease(self, name: str, owner: str, until: str, now: str, instead_of: str) -> str:
        has, its_end = self._leases.get(name, (owner, ""))
        if has in (owner, instead_of) or its_end < now:
            self._put(self._leases, name, (owner, until))
        return self._leases[name][0]

    def end_lease(self, name: str, owner: str) -> None:
        if self._leases.get(name, ("", ""))[0] == owner:
            self._take(self._leases, name)

    def hold(self, key: str) -> Hold | None:
        return self._holds.get(key)

    def insert_hold(self, hold: Hold) -> None:
        root = self._scopes[hold.budget].root
        self._put(self._holds, hold.key, hold)
        self._put(self._held, hold.key, hold)
        self._put(self._reserved, root, self._reserved.get(root, 0) + 1)

    def update_hold(self, key: str, state: HoldState, until: str) -> None:
        row = replace(self._holds[key], state=state, until=until)
        self._put(self._holds, key, row)
        if state in ("reserved", "dispatched"):
            self._put(self._held, key, row)
        else:
            self._take(self._held, key)

    def set_result(self, key: str, result: str) -> None:
        row = replace(self._holds[key], result=result)
        self._put(self._holds, key, row)
        if key in self._held:
            self._put(self._held, key, row)

    def holds(self, budget: str | None, state: HoldState | None) -> Iterator[Hold]:
        found = [
            hold
            for hold in self._holds.values()
            if budget in (None, hold.budget) and state in (None, hold.state)
        ]
        return iter(sorted(found, key=lambda hold: (hold.created, hold.key)))

    def count_holds(self, root: str) -> int:
        return self._reserved.get(root, 0)

    def expired_holds(self, root: str | None, at: str, states: Sequence[HoldState]) -> list[Hold]:
        found = [
            hold
            for hold in self._held.values()
            if hold.state in states and hold.until < at and root in (None, self._scopes[hold.budget].root)
        ]
        return sorted(found, key=lambda hold: (hold.created, hold.key))

    def append(self, columns: EntryColumns, hash: str) -> int:
        entry = entry_from_columns(len(self._entries) + 1, columns, hash)
        for table in (self._entries, self._chains.setdefault(entry.root, [])):
            self.undo.append(partial(_cut, table, len(table)))
            table.append((entry, *columns[-3:]))
        if entry.kind in TERMINAL_KINDS and entry.key is not None:
            self._put(self._ends, entry.key, entry)
        return entry.id

    def ending_entry(self, key: str) -> Entry | None:
        return self._ends.get(key)

    def entries(
        self, budget: str | None, key: str | None, kinds: Sequence[EntryKind] = ()
    ) -> Iterator[Entry]:
        for entry, *_ in self._entries:
            wanted = not kinds or entry.kind in kinds
            if wanted and budget in (None, entry.budget) and key in (None, entry.key):
                yield entry

    def chain(self, root: str) -> Iterator[tuple[Entry, str, str, str]]:
        return iter(self._chains.get(root, ()))

    def posts_below(self, name: str, since: str) -> Iterator[Entry]:
        for entry, *_ in self._chains.get(self._scopes[name].root, ()):
            is_late = entry.kind == "post" and entry.at >= since
            if is_late and any(scope.name == name for scope in self.lineage(entry.budget)):
                yield entry

    def newest_posts(self, last: int, after: int = 0) -> list[Entry]:
        newest = takewhile(lambda entry: entry.id > after, (entry for entry, *_ in reversed(self._entries)))
        return list(islice((entry for entry in newest if entry.kind == "post"), last))

    def integrity_errors(self) -> list[str]:
        return []

    def orphans(self) -> list[str]:
        return []


def _cut(table: list[Any], length: int) -> None:
    del table[length:]


class MemoryStore(Store):
    def __init__(self) -> None:
        super().__init__()
        self._rows: MemoryRows | None = MemoryRows()
        self._busy = threading.Lock()

    def write(self, action: Callable[[Rows], T]) -> T:
        return self._transact(action)

    def read(self, action: Callable[[Rows], T]) -> T:
        return self._transact(action)

    def _transact(self, action: Callable[[Rows], T]) -> T:
        with self._lock:
            rows = self._rows
            if rows is None:
                raise LedgerError("this ledger in memory is closed, and gone; make a new one")
            if self._busy.locked():
                raise LedgerError(
                    "the ledger in memory is in use by this very thread; let that call end first"
                )
            with self._busy:  # a lock of C code is freed whenever an interrupt comes
                rows.undo.clear()
                try:
                    return action(rows)
                except BaseException:
                    while rows.undo:
                        rows.undo.pop()()
                    raise

    def close(self) -> None:
        with self._lock:
            self._rows = None

    def _disconnect(self) -> None:
        """Nothing to close: a fork copies memory."""
