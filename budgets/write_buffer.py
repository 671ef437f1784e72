"""Many ledger steps in one transaction: buffer their writes and flush them in as few statements as possible.

The steps (`postings`, `rules`) are those of single calls and see the rows with all earlier buffered writes
applied. So a batch of calls is checked hold by hold and leaves the same rows, entries and hashes as the calls
one by one. Leaves out transactions (`ledger`) and storage (`store`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from viaticum.budgets.chain import Chain
from viaticum.budgets.records import (
    TERMINAL_KINDS,
    Entry,
    EntryKind,
    Hold,
    HoldState,
    amounts,
    checked_lease,
    checked_name,
    checked_tags,
    checked_usage,
    snapshot,
    worst_costs,
)
from viaticum.budgets.store import EntryColumns, Rows, Scope, entry_from_columns
from viaticum.budgets.tagging import current_tags
from viaticum.money import Price
from viaticum.types import TokenCount

Amounts = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Claim:
    """One call of `Ledger.reserve_many`; fields as in `Ledger.reserve`.

    parameters: their `digest`, "" for none.
    """

    key: str
    usage: Mapping[str, TokenCount]
    prices: Mapping[str, Price]
    parameters: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    hint: str = ""
    labels: Iterable[str] = ()

    def hold(self, budget: str, unpriced: tuple[str, ...], lease: int) -> Hold:
        """Its hold in a budget, once it is checked.

        Args:
            unpriced: models that may go without a price.
            lease: seconds.
        """
        usage = checked_usage(self.usage)
        prices = snapshot(self.prices, usage, unpriced)
        return Hold(
            checked_name("hold key", self.key),
            budget,
            "reserved",
            *amounts(usage, worst_costs(usage, prices)),
            usage,
            prices,
            "",
            parameters=self.parameters,
            tags=checked_tags({**current_tags(), **checked_tags(self.tags)}),
            lease=checked_lease(lease),
        )


@dataclass(frozen=True, slots=True)
class Settlement:
    """One call of `Ledger.settle_many`; fields as in `Ledger.settle`."""

    key: str
    usage: Mapping[str, TokenCount] | None
    result: str | None = None


class WriteBuffer(Rows):
    """Rows over other rows, inside one of their write transactions; `flush` writes what was buffered.

    Args:
        inner: the rows of the transaction.
        budgets: scopes to lock at once, in sorted order, before the holds of `keys` are read, so that these
            stay valid.
        keys: keys of all holds that the steps use.
        holds: the holds of `keys`, if they were read just before.
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
        # Holds read before the scopes were locked are valid only if no other writer can run.
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
        """Write everything; returns the ids of the entries in order of appending."""
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
        self._chains.clear()  # breaks a reference cycle, which would keep all holds until garbage collection
        return ids

    def chain_of(self, root: Scope, now: Callable[[], str]) -> Chain:
        """The chain of a tree: one for all buffered entries, at one time."""
        if root.name not in self._chains:
            self._chains[root.name] = Chain(self, root, now())
        return self._chains[root.name]

    # Buffered rows

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
        """Those that were not changed here: a hold made here has a running lease."""
        found = self._inner.expired_holds(root, at, states)
        return [hold for hold in found if hold.key not in self._changed]

    def append(self, columns: EntryColumns, hash: str) -> int:
        """Buffer an entry; returns its index in the result of `flush`."""
        self._entries.append((columns, hash))
        index, key = len(self._entries) - 1, columns[3]
        if key is not None and columns[4] in TERMINAL_KINDS:
            self._ends[key] = index
        return index

    def ending_entry(self, key: str) -> Entry | None:
        if key in self._ends:
            index = self._ends[key]
            return entry_from_columns(index, *self._entries[index])
        return self._inner.ending_entry(key)

    def is_buffered(self, entry: Entry) -> bool:
        """Whether `flush` will write this entry."""
        return entry.id < len(self._entries) and self._entries[entry.id][1] == entry.hash

    def _existing_hold(self, key: str) -> Hold:
        found = self.hold(key)
        assert found is not None, "a hold is read before it is written"
        return found

    # Passed through

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

    def entries(
        self, budget: str | None, key: str | None, kinds: Sequence[EntryKind] = ()
    ) -> Iterator[Entry]:
        return self._inner.entries(budget, key, kinds)

    def chain(self, root: str) -> Iterator[tuple[Entry, str, str, str]]:
        return self._inner.chain(root)

    def posts_below(self, name: str, since: str) -> Iterator[Entry]:
        return self._inner.posts_below(name, since)

    def integrity_errors(self) -> list[str]:
        return self._inner.integrity_errors()

    def orphans(self) -> list[str]:
        return self._inner.orphans()


def _add(one: Amounts, other: Amounts) -> Amounts:
    return one[0] + other[0], one[1] + other[1]
