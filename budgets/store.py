"""The contract of a store: what every place that keeps a ledger can do, inside transactions.

A `Store` runs an action in a transaction and hands it `Rows`; each method of `Rows` reads or writes one thing
and decides nothing. Implementations: `memory`, `sqlite`, `postgres`; all of them run one conformance suite
(tests/test_ledger_stores.py). To add one, implement both classes and add a line to `stores.open_store`.

Leaves out what may happen to budgets, holds and entries: see `ledger` and `rules`.
"""

from __future__ import annotations

import json
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

from viaticum.budgets.records import BudgetState, Entry, EntryKind, Hold, HoldState, prices_from, usage_from
from viaticum.budgets.windows import Window

T = TypeVar("T")
# root, number, budget, key, kind, nanousd, tokens, overrun, at, and usage, prices and note as JSON texts.
EntryColumns = tuple[str, int, str, str | None, str, int, int, int, str, str, str, str]
GENESIS_HASH = "0" * 64  # what the first entry of a chain follows


@dataclass(frozen=True, slots=True)
class Scope:
    """The row of a budget. posted is all that was ever spent here and below.

    The root of a tree of scopes keeps where its chain of entries ends: how many there are, the hash and the
    time of the last one.
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

    def with_amounts(self, held: tuple[int, int], posted: tuple[int, int]) -> Scope:
        """With these amounts added; what `dataclasses.replace` does, in a third of its time."""
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
        )


def entry_from_columns(place: int, columns: EntryColumns, hash: str) -> Entry:
    """The entry that these columns are. place: its id."""
    root, number, budget, key, kind, nanousd, tokens, overrun, at, usage, prices, note = columns
    return Entry(
        place,
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
    """The rows of a ledger, inside one transaction. Amounts are pairs: nano-dollars and tokens.

    is_exclusive: no other write goes on, so that what was read before a lock was taken still holds.
    """

    is_exclusive = True

    @abstractmethod
    def scopes(self, root: str | None = None) -> list[Scope]:
        """All of them, or those of one tree, by name."""

    @abstractmethod
    def lineage(self, name: str) -> list[Scope]:
        """The scope and all above it, the root first; none where it is unknown. Locked until the end of a write."""

    @abstractmethod
    def insert_scope(self, scope: Scope) -> None: ...

    @abstractmethod
    def update_scope(self, scope: Scope) -> None:
        """Write its limits, window and state."""

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
        """What was posted in this bucket and all later ones."""

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
        """Oldest first; of one scope (not of those below), or of all."""

    @abstractmethod
    def count_holds(self, root: str) -> int:
        """How many holds there are in a tree of scopes, ended ones among them."""

    @abstractmethod
    def expired_holds(self, root: str | None, at: str, states: Sequence[HoldState]) -> list[Hold]:
        """Holds in these states whose lease ran out before `at`, oldest first."""

    @abstractmethod
    def append(self, columns: EntryColumns, hash: str) -> int:
        """Keep an entry, just as it was hashed; its id."""

    @abstractmethod
    def ending_entry(self, key: str) -> Entry | None:
        """The entry that ended a hold."""

    @abstractmethod
    def entries(self, budget: str | None, key: str | None) -> Iterator[Entry]:
        """Oldest first; of one scope (not of those below), or of all."""

    @abstractmethod
    def chain(self, root: str) -> Iterator[tuple[Entry, str, str, str]]:
        """The entries of a tree by number, each with the texts of usage, prices and note as they are kept.

        An entry whose texts cannot be read comes with empty values beside them.
        """

    @abstractmethod
    def posts_below(self, name: str, since: str) -> Iterator[Entry]:
        """The `post` entries of a scope and of all below it, from a time on."""

    @abstractmethod
    def integrity_errors(self) -> list[str]:
        """What the store itself finds wrong with its files."""

    # Many at once; a database does these in fewer steps.

    def find(self, keys: Sequence[str]) -> dict[str, Hold]:
        """The holds of those keys that have one."""
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
    """Transactions over `Rows`. Threads may share one; a fork gives parent and child their own connection."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        with _stores_lock:
            _stores.add(self)

    @abstractmethod
    def write(self, action: Callable[[Rows], T]) -> T:
        """Run the action so that all it does holds, on disk when this returns, or, where it raises, nothing.

        The action may be run again where the store lost a race, so it keeps nothing between runs.
        """

    @abstractmethod
    def read(self, action: Callable[[Rows], T]) -> T:
        """Run the action on one moment of the ledger."""

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def _disconnect(self) -> None:
        """Give up the connection before a fork; the next use makes a new one."""


def one_line(text: object) -> str:
    return " ".join(str(text).split())


# No database allows carrying an open connection across a fork. So every store is locked and disconnected
# just before one; holding the locks through the fork also leaves them free in the child.
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
