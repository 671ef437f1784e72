"""The storage contract: `Store` runs transactions, `Rows` reads and writes ledger rows inside one.

Each method of `Rows` reads or writes one thing and makes no decisions. Implementations: `memory`, `sqlite`
and `postgres`; all pass one conformance suite (tests/budgets/test_ledger_stores.py). To add one, implement
both classes and add a line to `stores.open_store`.

Leaves out the rules for budgets, holds and entries: see `ledger` and `rules`.
"""

from __future__ import annotations

import json
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

from viaticum.budgets.records import BudgetState, Entry, EntryKind, Hold, HoldState
from viaticum.budgets.serialization import prices_from, usage_from
from viaticum.budgets.windows import Window
from viaticum.errors import LedgerError

T = TypeVar("T")
# The columns that the hash of an entry covers, in its order; usage, prices and note are JSON texts.
ENTRY_COLUMNS = (
    "root",
    "number",
    "budget",
    "key",
    "kind",
    "nanousd",
    "tokens",
    "overrun",
    "at",
    "usage",
    "prices",
    "note",
)
EntryColumns = tuple[str, int, str, str | None, str, int, int, int, str, str, str, str]
Objects = dict[tuple[str, str], str]  # definitions by kind and name, such as ("index", "open_holds")
GENESIS_HASH = "0" * 64  # predecessor of the first entry of a chain


@dataclass(frozen=True, slots=True)
class Scope:
    """The row of a budget. `posted_*` is all spending of the scope and its descendants, over all time.

    only: labels of models, one of which a model of its calls has to have; it never changes.
    The root of a tree also stores the end of its hash chain: the number of entries, and hash and time of the
    last.
    """

    name: str
    parent: str | None
    root: str
    depth: int
    limit_nanousd: int | None
    limit_tokens: int | None
    window: Window | None = None
    state: BudgetState = "open"
    posted_nanousd: int = 0
    held_nanousd: int = 0
    posted_tokens: int = 0
    held_tokens: int = 0
    entries: int = 0
    head: str = GENESIS_HASH
    last_at: str = ""
    only: tuple[str, ...] = ()

    def with_amounts(self, held: tuple[int, int], posted: tuple[int, int]) -> Scope:
        """Copy with these amounts added; takes a third of the time of `dataclasses.replace`."""
        return Scope(
            self.name,
            self.parent,
            self.root,
            self.depth,
            self.limit_nanousd,
            self.limit_tokens,
            self.window,
            self.state,
            self.posted_nanousd + posted[0],
            self.held_nanousd + held[0],
            self.posted_tokens + posted[1],
            self.held_tokens + held[1],
            self.entries,
            self.head,
            self.last_at,
            self.only,
        )


def entry_from_columns(id: int, columns: EntryColumns, hash: str) -> Entry:
    """Build the entry with this id from its columns."""
    root, number, budget, key, kind, nanousd, tokens, overrun, at, usage, prices, note = columns
    return Entry(
        id,
        budget,
        key,
        cast(EntryKind, kind),
        nanousd,
        tokens,
        overrun,
        at,
        usage_from(usage),
        prices_from(prices),
        json.loads(note),
        root,
        number,
        hash,
    )


class Rows(ABC):
    """Row access inside one transaction. Amounts are pairs of nano-dollars and tokens.

    is_exclusive: no other writer can run, so rows that were read before taking a lock are still valid.
    """

    is_exclusive = True

    @abstractmethod
    def scopes(self, root: str | None = None) -> list[Scope]:
        """All scopes, or those of one tree, sorted by name."""

    @abstractmethod
    def lineage(self, name: str) -> list[Scope]:
        """The scope and its ancestors, root first; empty if unknown. A write locks the rows until its end."""

    @abstractmethod
    def insert_scope(self, scope: Scope) -> None: ...

    @abstractmethod
    def update_scope(self, scope: Scope) -> None:
        """Write the limits, window and state of a scope."""

    @abstractmethod
    def add_to_totals(self, names: Sequence[str], held: tuple[int, int], posted: tuple[int, int]) -> None:
        """Add to the totals of all these scopes."""

    @abstractmethod
    def set_chain_head(self, root: str, entries: int, head: str, last_at: str) -> None: ...

    @abstractmethod
    def add_to_bucket(self, name: str, bucket: int, posted: tuple[int, int]) -> None: ...

    @abstractmethod
    def clear_buckets(self, name: str) -> None: ...

    @abstractmethod
    def posted_since(self, name: str, bucket: int) -> tuple[int, int]:
        """Amounts posted in this bucket and all later ones."""

    @abstractmethod
    def buckets(self, name: str) -> dict[int, tuple[int, int]]: ...

    @abstractmethod
    def hold(self, key: str) -> Hold | None: ...

    @abstractmethod
    def insert_hold(self, hold: Hold) -> None: ...

    @abstractmethod
    def update_hold(self, key: str, state: HoldState, until: str) -> None: ...

    @abstractmethod
    def set_result(self, key: str, result: str) -> None: ...

    @abstractmethod
    def holds(self, budget: str | None, state: HoldState | None) -> Iterator[Hold]:
        """Holds of one scope (without its descendants) or of all, oldest first."""

    @abstractmethod
    def count_holds(self, root: str) -> int:
        """Number of holds in a tree of scopes, ended ones included."""

    @abstractmethod
    def expired_holds(self, root: str | None, at: str, states: Sequence[HoldState]) -> list[Hold]:
        """Holds in these states whose lease ended before `at`, oldest first."""

    @abstractmethod
    def append(self, columns: EntryColumns, hash: str) -> int:
        """Store an entry with exactly the columns that were hashed; returns its id."""

    @abstractmethod
    def ending_entry(self, key: str) -> Entry | None:
        """The entry that ended a hold."""

    @abstractmethod
    def entries(
        self, budget: str | None, key: str | None, kinds: Sequence[EntryKind] = ()
    ) -> Iterator[Entry]:
        """Entries of one scope (without its descendants) or of all, oldest first; of these kinds, or all."""

    @abstractmethod
    def chain(self, root: str) -> Iterator[tuple[Entry, str, str, str]]:
        """The entries of a tree by number, each with the stored texts of usage, prices and note.

        Entries with unreadable texts come with empty values for them.
        """

    @abstractmethod
    def posts_below(self, name: str, since: str) -> Iterator[Entry]:
        """The `post` entries of a scope and its descendants from a time on."""

    def posts_after(self, root: str, number: int) -> Iterator[Entry]:
        """The `post` entries of a tree whose numbers are above this one."""
        return (entry for entry, *_ in self.chain(root) if entry.kind == "post" and entry.number > number)

    def hash_at(self, root: str, number: int) -> str | None:
        """The hash of the entry with this number in a tree; None where there is none."""
        return next((entry.hash for entry, *_ in self.chain(root) if entry.number == number), None)

    def times(self) -> dict[str, tuple[str, str]]:
        """By budget, the times of its first and its last entry."""
        found: dict[str, tuple[str, str]] = {}
        for entry in self.entries(None, None):
            first, last = found.get(entry.budget, (entry.at, entry.at))
            found[entry.budget] = min(first, entry.at), max(last, entry.at)
        return found

    def newest_posts(self, last: int, after: int = 0) -> list[Entry]:
        """The `post` entries of all budgets with ids above `after`, the newest first, at most so many."""
        raise NotImplementedError

    @abstractmethod
    def integrity_errors(self) -> list[str]:
        """Damage that the store itself detects in its files, indexes among them."""

    @abstractmethod
    def orphans(self) -> list[str]:
        """One line for each budget that is named by entries, holds or buckets and is not there."""

    # Leases: who works on what. No part of the chain; single operations only.

    def take_lease(self, name: str, owner: str, until: str, now: str, instead_of: str) -> str:
        """Write a lease that is free, ended before `now`, or of either owner; return the one who has it."""
        raise NotImplementedError

    def end_lease(self, name: str, owner: str) -> None:
        raise NotImplementedError

    # Batch operations. Databases override them with fewer statements.

    def find(self, keys: Sequence[str]) -> dict[str, Hold]:
        """The holds that exist for these keys."""
        return {key: found for key in keys if (found := self.hold(key)) is not None}

    def insert_holds(self, holds: Sequence[Hold]) -> None:
        for hold in holds:
            self.insert_hold(hold)

    def update_holds(self, holds: Sequence[Hold]) -> None:
        for hold in holds:
            self.update_hold(hold.key, hold.state, hold.until)

    def set_results(self, results: Sequence[tuple[str, str]]) -> None:
        for key, result in results:
            self.set_result(key, result)

    def append_all(self, entries: Sequence[tuple[EntryColumns, str]]) -> list[int]:
        return [self.append(*each) for each in entries]


class Store(ABC):
    """Transactions over `Rows`. Threads may share a store; a forked child opens a connection of its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        with _stores_lock:
            _stores.add(self)

    @abstractmethod
    def write(self, action: Callable[[Rows], T]) -> T:
        """Run the action atomically: durable when this returns, without effect if the action raises.

        The action must keep no state between runs: the store runs it again after a lost race.
        """

    def write_call(self, action: Callable[[Rows], T], key: str, budget: str | None = None) -> T:
        """As `write`, for a step of one call: of the hold `key`, which is made in `budget` or exists.

        A store of many hosts overrides it to save round trips. The action may then run more than once, over
        rows that are not there, before it runs over the real ones or is applied as it was.
        """
        return self.write(action)

    @abstractmethod
    def read(self, action: Callable[[Rows], T]) -> T:
        """Run the action on a consistent snapshot."""

    @abstractmethod
    def close(self) -> None: ...

    def identity(self) -> object:
        """What is equal for two stores over the same database, whatever they were opened by."""
        return id(self)

    def backup(self, target: Path) -> None:
        """Write a consistent copy into a new file, for stores that are files."""
        raise LedgerError("this ledger is no file; copy Postgres with pg_dump --schema=viaticum")

    def altered_objects(self) -> list[str]:
        """One line for each table, index, trigger or view that is not as the migrations made it."""
        return []

    @abstractmethod
    def _disconnect(self) -> None:
        """Close the connection before a fork; the next use opens a new one."""


def compare_objects(expected: Objects, found: Objects) -> list[str]:
    """The findings of `Store.altered_objects`. What was added does no harm, but for triggers and rules."""
    differing = [
        f"the schema was altered: the {kind} {name!r} is {'another' if (kind, name) in found else 'missing'}"
        for (kind, name), definition in expected.items()
        if found.get((kind, name)) != definition
    ]
    added = [
        f"the schema was altered: the {kind} {name!r} was added"
        for kind, name in found
        if kind in ("trigger", "rule") and (kind, name) not in expected
    ]
    return differing + added


# No database allows an open connection to be used across a fork. So every store is locked and disconnected
# just before a fork; the forking thread holds the locks, so both processes can release them afterwards.
_stores: weakref.WeakSet[Store] = weakref.WeakSet()
_stores_lock = threading.Lock()
_locked_for_fork: list[Store] = []


def _before_fork() -> None:
    _stores_lock.acquire()
    for store in list(_stores):
        store._lock.acquire()
        _locked_for_fork.append(store)
        store._disconnect()


def _after_fork() -> None:
    while _locked_for_fork:
        _locked_for_fork.pop()._lock.release()
    _stores_lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
