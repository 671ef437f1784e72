"""What a ledger tells: budgets, holds, entries and the audit; opening and closing it.

Leaves out every change: see `scopes` and `ledger`.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Self

from platformdirs import user_data_path

from viaticum.budgets import postings, rules
from viaticum.budgets.chain import Chain
from viaticum.budgets.memory import MemoryStore
from viaticum.budgets.records import (
    Budget,
    Entry,
    EntryKind,
    Hold,
    HoldState,
    checked_name,
    checked_state,
    checked_tags,
)
from viaticum.budgets.replay import Heads, audit
from viaticum.budgets.request_limits import RequestLimits
from viaticum.budgets.store import Rows, Scope
from viaticum.budgets.stores import open_store
from viaticum.budgets.write_buffer import WriteBuffer
from viaticum.checks import checked_count, checked_items, checked_type
from viaticum.errors import InputError
from viaticum.residency import Residency


def default_path() -> Path:
    """The ledger file of this user: in VIATICUM_HOME, else in the system's folder for application data."""
    home = os.environ.get("VIATICUM_HOME")
    return (Path(home).expanduser() if home else user_data_path("viaticum")) / "ledger.db"


class LedgerReader:
    """The part of `Ledger` that changes nothing; arguments as there."""

    def __init__(
        self,
        where: str | os.PathLike[str] | None = None,
        *,
        read_only: bool = False,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        where = default_path() if where is None else where
        checked_type("where", where, (str, os.PathLike), "a path, or an address")
        self._store = open_store(where, read_only=read_only)
        self._clock = clock
        self._requests = RequestLimits()
        self._residencies: dict[str, Residency] = {}  # by budget, which never change

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._store.close()

    @property
    def is_in_memory(self) -> bool:
        """Whether it ends with this process, which no other one shares."""
        return isinstance(self._store, MemoryStore)

    def is_same(self, other: LedgerReader) -> bool:
        """Whether both are over the same database, whatever they were opened by."""
        return self is other or self._store.identity() == other._store.identity()

    def budget(self, name: str) -> Budget:
        """Return one budget; raises `UnknownName` with the nearest name."""
        limit = self._requests.find(name)
        if limit is not None:
            return limit.budget()
        return self._store.read(
            lambda rows: rules.budget_at(rows, rules.get_lineage(rows, name)[-1], self._clock())
        )

    def lineage(self, name: str) -> list[Budget]:
        """The scope and its ancestors, whose limits apply to its calls as well; root first."""
        limit = self._requests.find(name)
        if limit is not None:
            return [*self.lineage(limit.parent), limit.budget()]
        return self._store.read(
            lambda rows: [
                rules.budget_at(rows, scope, self._clock()) for scope in rules.get_lineage(rows, name)
            ]
        )

    def residency(self, name: str) -> Residency:
        """Where the data of a budget's calls may go: its restriction and those of the scopes above."""
        if name not in self._residencies:
            limit = self._requests.find(name)
            if limit is not None:
                return self.residency(limit.parent)
            lineage = self._store.read(lambda rows: rules.get_lineage(rows, name))
            self._residencies[name] = Residency.of(*(scope.only or None for scope in lineage))
        return self._residencies[name]

    def budgets(self) -> list[Budget]:
        """All budgets, sorted by name."""
        return self._store.read(
            lambda rows: [rules.budget_at(rows, scope, self._clock()) for scope in rows.scopes()]
        )

    def times(self) -> dict[str, tuple[str, str]]:
        """By budget, the times of the first and the last entry, of it and of those below: UTC, ISO 8601."""

        def action(rows: Rows) -> dict[str, tuple[str, str]]:
            found = rows.times()
            for scope in sorted(rows.scopes(), key=lambda each: -each.depth):
                if scope.parent is not None and scope.name in found:
                    first, last = found[scope.name]
                    above = found.get(scope.parent, (first, last))
                    found[scope.parent] = min(first, above[0]), max(last, above[1])
            return found

        return self._store.read(action)

    def check_open(self, name: str) -> None:
        """Raise `BudgetClosed` where a budget, or one above it, is paused or closed."""
        limit = self._requests.find(name)
        scope = name if limit is None else limit.parent
        self._store.read(lambda rows: rules.refuse_closed(rules.get_lineage(rows, scope)))

    def hold(self, key: str) -> Hold | None:
        return self._store.read(lambda rows: rows.hold(checked_name("hold key", key)))

    def find(self, keys: Sequence[str]) -> dict[str, Hold]:
        """The holds that exist for these keys."""
        wanted = checked_items("keys", keys, str, "the key of a hold")
        return self._store.read(lambda rows: rows.find(wanted)) if wanted else {}

    def holds(self, budget: str | None = None, state: HoldState | None = None) -> list[Hold]:
        """The holds of a budget or of all, oldest first, optionally only those in `state`."""

        checked_state(state)

        def action(rows: Rows) -> list[Hold]:
            if budget is not None:
                rules.get_lineage(rows, budget)
            return list(rows.holds(budget, state))

        return self._store.read(action)

    def entries(self, budget: str | None = None, key: str | None = None) -> list[Entry]:
        """The entries of a budget or of all, oldest first, optionally only those of the hold `key`."""
        found: list[Entry] = []
        self.each_entry(found.append, budget, key)
        return found

    def each_entry(
        self,
        take: Callable[[Entry], object],
        budget: str | None = None,
        key: str | None = None,
        kinds: Sequence[EntryKind] = (),
    ) -> None:
        """Call `take` with each entry, as `entries` returns them, for more than fit in memory.

        `take` must not use this ledger. kinds: of these kinds alone, or of all.
        """

        once = _Once(take)

        def action(rows: Rows) -> None:
            if budget is not None:
                rules.get_lineage(rows, budget)
            wanted = None if key is None else checked_name("hold key", key)
            once.take_all(rows.entries(budget, wanted, kinds))

        self._store.read(action)

    def posts(
        self, budget: str, *, tags: Mapping[str, str] | None = None, last: int | None = None
    ) -> list[Entry]:
        """Posts of a scope and its descendants with all these tags, oldest first; only the `last` newest."""
        wanted = checked_tags({} if tags is None else tags).items()
        limit = None if last is None else checked_count("last", last, 0)

        def action(rows: Rows) -> list[Entry]:
            rules.get_lineage(rows, budget)
            posts = rows.posts_below(budget, "")
            return list(
                deque((post for post in posts if wanted <= post.note.get("tags", {}).items()), maxlen=limit)
            )

        return self._store.read(action)

    def each_post(self, take: Callable[[Entry], object], budget: str | None = None, since: str = "") -> None:
        """Call `take` with each post of a scope and its descendants, or of all, for more than fit in memory.

        Args:
            take: must not use this ledger.
            since: UTC in ISO 8601; earlier posts are left out.
        """

        once = _Once(take)

        def action(rows: Rows) -> None:
            if budget is None:
                roots = [scope.name for scope in rows.scopes() if scope.parent is None]
            else:
                roots = [rules.get_lineage(rows, budget)[-1].name]
            once.take_all(chain.from_iterable(rows.posts_below(root, since) for root in roots))

        self._store.read(action)

    def each_new_post(
        self, take: Callable[[Entry], object], heads: Heads
    ) -> dict[str, tuple[int, str]] | None:
        """Call `take` with each post after `heads`, and return the heads of that moment.

        None, without any call, where the entries up to `heads` are not those of this ledger.

        Args:
            take: must not use this ledger.
            heads: `chain_heads()` of an earlier time; a chain that is not there is taken from its beginning.
        """
        known, once = _checked_heads(heads), _Once(take)

        def action(rows: Rows) -> dict[str, tuple[int, str]] | None:
            now = {scope.name: (scope.entries, scope.head) for scope in rows.scopes() if scope.parent is None}
            for root, head in known.items():
                if head[0] and head != now.get(root) and rows.hash_at(root, head[0]) != head[1]:
                    return None
            new = [root for root, head in now.items() if head != known.get(root)]
            once.take_all(
                chain.from_iterable(rows.posts_after(root, known.get(root, (0, ""))[0]) for root in new)
            )
            return now

        return self._store.read(action)

    def newest_calls(self, last: int) -> list[tuple[Hold, Entry]]:
        """The newest posts of all budgets with their holds, the newest first, at most so many."""
        limit = checked_count("last", last)
        return self._store.read(lambda rows: _settled_calls(rows, limit, 0))

    @property
    def folder(self) -> Path | None:
        """The folder of its file; None where it is none."""
        path = getattr(self._store, "path", None)
        return None if path is None else Path(path).absolute().parent

    def newest_and_open_calls(self, last: int, after: int = 0) -> tuple[list[tuple[Hold, Entry]], list[Hold]]:
        """The newest settled calls, as `newest_calls` has them, and the open holds, as of one moment.

        after: only posts with ids above this one.
        """
        limit, above = checked_count("last", last), checked_count("after", after, 0)

        def action(rows: Rows) -> tuple[list[tuple[Hold, Entry]], list[Hold]]:
            open_holds = [*rows.holds(None, "reserved"), *rows.holds(None, "dispatched")]
            return _settled_calls(rows, limit, above), open_holds

        return self._store.read(action)

    def chain_heads(self) -> dict[str, tuple[int, str]]:
        """The end of each chain: number of entries and hash of the last one, by root."""
        return self._store.read(
            lambda rows: {s.name: (s.entries, s.head) for s in rows.scopes() if s.parent is None}
        )

    def backup(self, file: str | os.PathLike[str]) -> None:
        """Write a consistent copy of a ledger file into a new file, while others go on using it.

        Raises:
            LedgerError: the ledger is no file, the new one exists or cannot be written.
        """
        checked_type("file", file, (str, os.PathLike), "a path")
        self._store.backup(Path(file).absolute())

    def check(self, budget: str | None = None, *, heads: Heads | None = None) -> list[str]:
        """Audit the ledger: one line per finding; none if nothing was altered and every limit held.

        Args:
            budget: check only its tree of scopes: not the pages and indexes of the file, its tables and
                triggers, and rows whose budget is not there.
            heads: `chain_heads()` of an earlier day; the entries up to there must still be the same.
        """
        kept = {} if heads is None else _checked_heads(heads)
        found = self._store.read(lambda rows: audit(rows, budget, kept))
        return found + (self._store.altered_objects() if budget is None else [])

    def _now(self) -> str:
        return postings.format_time(self._clock())

    def _chain(self, rows: Rows, lineage: list[Scope]) -> Chain:
        if isinstance(rows, WriteBuffer):
            return rows.chain_of(lineage[0], self._now)
        return Chain(rows, lineage[0], self._now())


class _Once:
    """Calls a function once with each entry, also where a store reads anew after it lost its connection.

    The entries of each root come in the order of their numbers, so that those of an earlier reading are known
    by the last one.
    """

    def __init__(self, take: Callable[[Entry], object]) -> None:
        self._take, self._last = take, dict[str, int]()

    def take_all(self, entries: Iterable[Entry]) -> None:
        before = dict(self._last)
        for entry in entries:
            if entry.root in before and entry.number <= before[entry.root]:
                continue
            self._last[entry.root] = entry.number
            self._take(entry)


def _settled_calls(rows: Rows, last: int, after: int) -> list[tuple[Hold, Entry]]:
    posts = {entry.key: entry for entry in rows.newest_posts(last, after) if entry.key is not None}
    found = rows.find(list(posts))
    return [(found[key], entry) for key, entry in posts.items() if key in found]


def _checked_heads(heads: Heads) -> dict[str, tuple[int, str]]:
    """Return a copy; raises `InputError` where a head is no pair of a number and a hash."""
    wanted = "the number of entries and the hash of the last, by root (chain_heads)"
    checked: dict[str, tuple[int, str]] = {}
    for root, head in checked_type("heads", heads, Mapping, wanted).items():
        is_pair = isinstance(head, tuple) and [type(each) for each in head] == [int, str]
        if not isinstance(root, str) or not is_pair or not 0 <= head[0] < 2**63:
            raise InputError(f"not the head of a chain: {root!r}: {head!r}; give {wanted}")
        checked[root] = head
    return checked
