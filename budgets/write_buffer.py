"""Many steps in one transaction: what they write is kept here and written once at the end, in as few statements as it takes.

The steps themselves (`postings`, `rules`) are those of single calls: they see rows as if each write before
them had been made. So a chunk of calls is checked hold by hold, and leaves the same rows, entries and hashes
as one call after the other. Leaves out transactions (`ledger`) and how rows are kept (`store`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from viaticum.budgets.chain import Chain
from viaticum.budgets.records import TERMINAL_KINDS, Entry, Hold, HoldState
from viaticum.budgets.store import EntryColumns, Rows, Scope, entry_from_columns
from viaticum.money import Price
from viaticum.types import TokenCount

Amounts = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Claim:
    """A call to reserve for, with the meaning that `Ledger.reserve` gives these. parameters: their `digest`, "" for none."""

    key: str
    usage: Mapping[str, TokenCount]
    prices: Mapping[str, Price]
    parameters: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Settlement:
    """A call to settle, with the meaning that `Ledger.settle` gives these."""

    key: str
    usage: Mapping[str, TokenCount] | None
    result: str | None = None


class WriteBuffer(Rows):
    """Rows over other rows, inside one of their write transactions; `flush` writes what was gathered.

    budgets: scopes that are locked at once, in one order, before the holds of `keys` are read, so that what
    is known of them still holds. holds: those of the keys, as they were read just before.
    """

    is_exclusive = True

    def __init__(
        self, inner: Rows, budgets: Iterable[str], keys: Sequence[str], holds: dict[str, Hold] | None = None
    ) -> None:
        self._inner = inner
        self._scopes: dict[str, Scope] = {}
        self._lineages: dict[str, list[str]] = {}
        for name in sorted(set(budgets)):
            self.lineage(name)
        self._fetched_keys = set(keys)
        # What was read before the scopes were locked holds only where nobody else writes.
        self._holds = holds if holds is not None and inner.is_exclusive else inner.find(keys)
        self._inserted: dict[str, None] = {}
        self._changed: dict[str, None] = {}
        self._results: dict[str, str] = {}
        self._entries: list[tuple[EntryColumns, str]] = []
        self._ends: dict[str, int] = {}
        self._totals: dict[str, tuple[Amounts, Amounts]] = {}
        self._buckets: dict[tuple[str, int], Amounts] = {}
        self._heads: dict[str, tuple[int, str, str]] = {}
        self._chains: dict[str, Chain] = {}

    def flush(self) -> list[int]:
        """Write everything; the ids of the entries, in the order in which they were appended."""
        inner = self._inner
        inner.insert_holds([self._holds[key] for key in self._inserted])
        inner.set_results(list(self._results.items()))
        inner.update_holds([self._holds[key] for key in self._changed])
        ids = inner.append_all(self._entries)
        for name, (held, posted) in self._totals.items():
            inner.add_to_totals([name], held, posted)
        for (name, bucket), posted in self._buckets.items():
            inner.add_to_bucket(name, bucket, posted)
        for root, head in self._heads.items():
            inner.set_chain_head(root, *head)
        self._chains.clear()  # they know these rows: all holds would wait for the collector of cycles
        return ids

    def chain_of(self, root: Scope, now: Callable[[], str]) -> Chain:
        """The end of a tree's chain: one for all that is gathered, at one moment."""
        if root.name not in self._chains:
            self._chains[root.name] = Chain(self, root, now())
        return self._chains[root.name]

    # What the steps of a call read and write

    def lineage(self, name: str) -> list[Scope]:
        if name not in self._lineages:
            found = self._inner.lineage(name)
            for scope in found:
                self._scopes.setdefault(scope.name, scope)
            self._lineages[name] = [scope.name for scope in found]
        return [self._scopes[each] for each in self._lineages[name]]

    def add_to_totals(self, names: Sequence[str], held: Amounts, posted: Amounts) -> None:
        for name in names:
            self._scopes[name] = self._scopes[name].with_amounts(held, posted)
            before = self._totals.get(name, ((0, 0), (0, 0)))
            self._totals[name] = (_add(before[0], held), _add(before[1], posted))

    def set_chain_head(self, root: str, entries: int, head: str, last_at: str) -> None:
        self._heads[root] = (entries, head, last_at)

    def add_to_bucket(self, name: str, bucket: int, posted: Amounts) -> None:
        self._buckets[name, bucket] = _add(self._buckets.get((name, bucket), (0, 0)), posted)

    def posted_since(self, name: str, bucket: int) -> Amounts:
        found = self._inner.posted_since(name, bucket)
        for (scope, start), posted in self._buckets.items():
            if scope == name and start >= bucket:
                found = _add(found, posted)
        return found

    def hold(self, key: str) -> Hold | None:
        if key not in self._fetched_keys:
            self._fetched_keys.add(key)
            self._holds |= self._inner.find([key])
        return self._holds.get(key)

    def insert_hold(self, hold: Hold) -> None:
        self._fetched_keys.add(hold.key)
        self._holds[hold.key] = hold
        self._inserted[hold.key] = None

    def update_hold(self, key: str, state: HoldState, until: str) -> None:
        self._holds[key] = self._existing_hold(key).with_state(state, until)
        if key not in self._inserted:
            self._changed[key] = None

    def set_result(self, key: str, result: str) -> None:
        self._holds[key] = self._existing_hold(key).with_result(result)
        if key not in self._inserted:
            self._results[key] = result

    def expired_holds(self, root: str | None, at: str, states: Sequence[HoldState]) -> list[Hold]:
        """Those that nothing was done to here: what is made here has a lease that runs."""
        found = self._inner.expired_holds(root, at, states)
        return [hold for hold in found if hold.key not in self._changed]

    def append(self, columns: EntryColumns, hash: str) -> int:
        """The place in what `flush` returns."""
        self._entries.append((columns, hash))
        place, key = len(self._entries) - 1, columns[3]
        if key is not None and columns[4] in TERMINAL_KINDS:
            self._ends[key] = place
        return place

    def ending_entry(self, key: str) -> Entry | None:
        if key in self._ends:
            place = self._ends[key]
            return entry_from_columns(place, *self._entries[place])
        return self._inner.ending_entry(key)

    def buffer(self, entry: Entry) -> bool:
        """Whether an entry is one of those that `flush` writes."""
        return entry.id < len(self._entries) and self._entries[entry.id][1] == entry.hash

    def _existing_hold(self, key: str) -> Hold:
        found = self.hold(key)
        assert found is not None, "a hold is read before it is written"
        return found

    # What they do not touch

    def scopes(self, root: str | None = None) -> list[Scope]:
        return self._inner.scopes(root)

    def insert_scope(self, scope: Scope) -> None:
        self._inner.insert_scope(scope)

    def update_scope(self, scope: Scope) -> None:
        self._inner.update_scope(scope)

    def clear_buckets(self, name: str) -> None:
        self._inner.clear_buckets(name)

    def buckets(self, name: str) -> dict[int, Amounts]:
        return self._inner.buckets(name)

    def holds(self, budget: str | None, state: HoldState | None) -> Iterator[Hold]:
        return self._inner.holds(budget, state)

    def count_holds(self, root: str) -> int:
        return self._inner.count_holds(root)

    def entries(self, budget: str | None, key: str | None) -> Iterator[Entry]:
        return self._inner.entries(budget, key)

    def chain(self, root: str) -> Iterator[tuple[Entry, str, str, str]]:
        return self._inner.chain(root)

    def posts_below(self, name: str, since: str) -> Iterator[Entry]:
        return self._inner.posts_below(name, since)

    def integrity_errors(self) -> list[str]:
        return self._inner.integrity_errors()


def _add(one: Amounts, other: Amounts) -> Amounts:
    return one[0] + other[0], one[1] + other[1]
