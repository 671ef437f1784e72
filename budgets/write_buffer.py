"""Many steps in one transaction: what they write is kept here and written once at the end, in as few statements as it takes.

The steps themselves (`postings`, `rules`) are those of single calls: they see rows as if each write before them had been
made. So a chunk of calls is checked hold by hold, and leaves the same rows, entries and hashes as one call after the other.
Leaves out transactions (`ledger`) and how rows are kept (`store`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from viaticum.budgets.chain import Chain
from viaticum.budgets.records import ENDINGS, Entry, Hold, HoldState
from viaticum.budgets.store import EntryColumns, Rows, Scope, entry_of
from viaticum.money import Price
from viaticum.types import TokenCount

Pairs = tuple[int, int]


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

    budgets: scopes that are locked at once, in one order, before the holds of `keys` are read, so that what is known of
    them still holds. holds: those of the keys, as they were read just before.
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
        self._looked = set(keys)
        # What was read before the scopes were locked holds only where nobody else writes.
        self._holds = holds if holds is not None and inner.is_exclusive else inner.find(keys)
        self._new: dict[str, None] = {}
        self._changed: dict[str, None] = {}
        self._results: dict[str, str] = {}
        self._entries: list[tuple[EntryColumns, str]] = []
        self._ends: dict[str, int] = {}
        self._moves: dict[str, tuple[Pairs, Pairs]] = {}
        self._buckets: dict[tuple[str, int], Pairs] = {}
        self._heads: dict[str, tuple[int, str, str]] = {}
        self._chains: dict[str, Chain] = {}

    def flush(self) -> list[int]:
        """Write everything; the ids of the entries, in the order in which they were appended."""
        inner = self._inner
        inner.insert_holds([self._holds[key] for key in self._new])
        inner.set_results(list(self._results.items()))
        inner.update_holds([self._holds[key] for key in self._changed])
        ids = inner.append_all(self._entries)
        for name, (held, posted) in self._moves.items():
            inner.move([name], held, posted)
        for (name, bucket), posted in self._buckets.items():
            inner.add_to_bucket(name, bucket, posted)
        for root, head in self._heads.items():
            inner.set_head(root, *head)
        self._chains.clear()  # they know these rows: all holds would wait for the collector of cycles
        return ids

    def end_of(self, root: Scope, now: Callable[[], str]) -> Chain:
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

    def move(self, names: Sequence[str], held: Pairs, posted: Pairs) -> None:
        for name in names:
            self._scopes[name] = self._scopes[name].moved(held, posted)
            before = self._moves.get(name, ((0, 0), (0, 0)))
            self._moves[name] = (_sum(before[0], held), _sum(before[1], posted))

    def set_head(self, root: str, entries: int, head: str, last_at: str) -> None:
        self._heads[root] = (entries, head, last_at)

    def add_to_bucket(self, name: str, bucket: int, posted: Pairs) -> None:
        self._buckets[name, bucket] = _sum(self._buckets.get((name, bucket), (0, 0)), posted)

    def since(self, name: str, bucket: int) -> Pairs:
        found = self._inner.since(name, bucket)
        for (scope, start), posted in self._buckets.items():
            if scope == name and start >= bucket:
                found = _sum(found, posted)
        return found

    def hold(self, key: str) -> Hold | None:
        if key not in self._looked:
            self._looked.add(key)
            self._holds |= self._inner.find([key])
        return self._holds.get(key)

    def insert_hold(self, hold: Hold) -> None:
        self._looked.add(hold.key)
        self._holds[hold.key] = hold
        self._new[hold.key] = None

    def update_hold(self, key: str, state: HoldState, until: str) -> None:
        self._holds[key] = self._known(key).turned(state, until)
        if key not in self._new:
            self._changed[key] = None

    def set_result(self, key: str, result: str) -> None:
        self._holds[key] = self._known(key).keeping(result)
        if key not in self._new:
            self._results[key] = result

    def lapsed(self, root: str | None, at: str, states: Sequence[HoldState]) -> list[Hold]:
        """Those that nothing was done to here: what is made here has a lease that runs."""
        found = self._inner.lapsed(root, at, states)
        return [hold for hold in found if hold.key not in self._changed]

    def append(self, columns: EntryColumns, hash: str) -> int:
        """The place in what `flush` returns."""
        self._entries.append((columns, hash))
        place, key = len(self._entries) - 1, columns[3]
        if key is not None and columns[4] in ENDINGS:
            self._ends[key] = place
        return place

    def ending(self, key: str) -> Entry | None:
        if key in self._ends:
            place = self._ends[key]
            return entry_of(place, *self._entries[place])
        return self._inner.ending(key)

    def gathered(self, entry: Entry) -> bool:
        """Whether an entry is one of those that `flush` writes."""
        return entry.id < len(self._entries) and self._entries[entry.id][1] == entry.hash

    def _known(self, key: str) -> Hold:
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

    def buckets(self, name: str) -> dict[int, Pairs]:
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

    def damage(self) -> list[str]:
        return self._inner.damage()


def _sum(one: Pairs, other: Pairs) -> Pairs:
    return one[0] + other[0], one[1] + other[1]
