"""The audit behind `Ledger.check`: replay all entries and compare the result with all other rows.

It recomputes the hash and the amounts of each entry, checks each limit after each hold, and finally compares
every column of every scope, hold and bucket. It reads only and repairs nothing. Rows altered together with
every later hash are found only with the heads of the chains that were kept (`Ledger.chain_heads`). Leaves out
the definitions of tables and triggers: see `Store.altered_objects`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from types import MappingProxyType

from viaticum.budgets.chain import entry_hash, result_hash
from viaticum.budgets.postings import folded, lease_end
from viaticum.budgets.records import Entry, Hold, HoldState, amounts, costs, worst_costs
from viaticum.budgets.rules import get_lineage
from viaticum.budgets.serialization import prices_from, usage_from
from viaticum.budgets.store import GENESIS_HASH, Rows, Scope
from viaticum.budgets.windows import Window
from viaticum.errors import UnknownName, ViaticumError

_UNREADABLE = (ViaticumError, ValueError, TypeError, AttributeError, KeyError)


Heads = Mapping[str, tuple[int, str]]  # number of entries and hash of the last one, by root


def audit(rows: Rows, budget: str | None = None, kept: Heads = MappingProxyType({})) -> list[str]:
    """Return the findings, one line each. Call it inside a read transaction, for a consistent snapshot.

    Args:
        rows: the rows of the transaction.
        budget: check only its tree; None for all trees, the store's files, and rows of budgets not there.
        kept: ends of chains as they were earlier; the entries up to there must be the same.
    """
    errors = rows.integrity_errors() if budget is None else []  # checks the whole file
    if errors:
        return [f"the store is damaged: {line}" for line in errors]
    try:
        root = get_lineage(rows, budget)[0].name if budget is not None else None
        scopes = {scope.name: scope for scope in rows.scopes(root)}
    except UnknownName:
        raise
    except _UNREADABLE as error:
        return [f"a budget cannot be read: {error}"]
    roots = [root] if root is not None else _roots(scopes)
    missing = [
        f"a budget is missing: {name!r} is not there, its head was kept"
        for name in kept
        if budget is None and name not in roots
    ]
    orphans = rows.orphans() if budget is None else []
    found = [finding for root in roots for finding in _Audit(rows, root, scopes, kept.get(root)).findings()]
    return missing + orphans + found


def _roots(scopes: dict[str, Scope]) -> list[str]:
    return list(dict.fromkeys(scope.root for scope in scopes.values()))


@dataclass
class _ReplayedScope:
    """The state of a scope after the entries replayed so far."""

    scope: Scope
    buckets: dict[int, tuple[int, int]] = field(default_factory=dict)

    def used(self, at: str) -> tuple[int, int]:
        """Posted (within the window, if any) plus held."""
        scope = self.scope
        posted = (scope.posted_nanousd, scope.posted_tokens)
        if scope.window is not None:
            since = scope.window.since(datetime.fromisoformat(at))
            counted = [amount for bucket, amount in self.buckets.items() if bucket >= since]
            posted = (sum(amount[0] for amount in counted), sum(amount[1] for amount in counted))
        return posted[0] + scope.held_nanousd, posted[1] + scope.held_tokens

    def add(self, held: tuple[int, int], posted: tuple[int, int] = (0, 0), at: str = "") -> None:
        scope = self.scope
        self.scope = replace(
            scope,
            held_nanousd=scope.held_nanousd + held[0],
            held_tokens=scope.held_tokens + held[1],
            posted_nanousd=scope.posted_nanousd + posted[0],
            posted_tokens=scope.posted_tokens + posted[1],
        )
        if scope.window is not None and at:
            self.fill(posted, at)

    def fill(self, posted: tuple[int, int], at: str) -> None:
        assert self.scope.window is not None
        bucket = self.scope.window.bucket(datetime.fromisoformat(at))
        before = self.buckets.get(bucket, (0, 0))
        self.buckets[bucket] = (before[0] + posted[0], before[1] + posted[1])


class _Audit:
    """The audit of one tree of scopes."""

    def __init__(self, rows: Rows, root: str, scopes: dict[str, Scope], kept: tuple[int, str] | None) -> None:
        self.rows, self.root, self.kept = rows, root, kept
        self.stored = {name: scope for name, scope in scopes.items() if scope.root == root}
        self.replayed: dict[str, _ReplayedScope] = {}
        self.open: dict[str, Hold] = {}
        self.results: dict[str, str] = {}  # result hashes of open holds, by key
        self.unmatched_results: dict[str, str] = {}  # of ended holds: results without their entry so far
        self.reserved = 0

    def findings(self) -> Iterator[str]:
        number, head, last = 0, GENESIS_HASH, ""
        for entry, *texts in self.rows.chain(self.root):
            if entry.number != number + 1:
                yield (
                    f"entries are missing or doubled before entry {entry.id}: number {entry.number} follows "
                    f"{number}"
                )
            if entry_hash(head, entry, *texts) != entry.hash:
                yield (
                    f"entry {entry.id} was altered, or the one before it: its hash is not that of its columns"
                )
            number, head, last = entry.number, entry.hash, entry.at
            if self.kept is not None and number == self.kept[0] and head != self.kept[1]:
                yield (
                    f"the chain of {self.root!r} was rewritten: its entry number {number} has the hash "
                    f"{head}, not {self.kept[1]}, which was kept"
                )
            yield from self._check_texts(entry, *texts)
            try:
                yield from self._apply(entry)
            except _UNREADABLE as error:
                yield f"entry {entry.id} cannot be played again: {error!r}"
        if self.kept is not None and number < self.kept[0]:
            yield (
                f"entries are missing: {self.root!r} has {number}, {self.kept[0]} were there when its head "
                "was kept"
            )
        yield from self._compare_scopes(number, head, last)
        yield from self._compare_open_holds()

    def _check_texts(self, entry: Entry, usage: str, prices: str, note: str) -> Iterator[str]:
        try:
            usage_from(usage), prices_from(prices), json.loads(note)
        except _UNREADABLE as error:
            yield f"entry {entry.id} cannot be priced again: {error}"

    def _apply(self, entry: Entry) -> Iterator[str]:
        if entry.kind == "limit":
            yield from self._limit(entry)
        elif entry.budget not in self.replayed:
            yield f"entry {entry.id} names a budget {entry.budget!r} that no entry made"
        elif entry.kind == "clock":
            self._restart_clock(datetime.fromisoformat(entry.at))
        elif entry.key is None:
            state = {"pause": "paused", "resume": "open", "close": "closed"}[entry.kind]
            self._change(entry.budget, state=state)
        elif entry.kind == "reserve":
            yield from self._reserve(entry)
        else:
            yield from self._apply_hold_entry(entry)

    def _change(self, budget: str, **changes: object) -> None:
        replayed = self.replayed[budget]
        replayed.scope = replace(replayed.scope, **changes)  # type: ignore[arg-type]

    # Scopes

    def _limit(self, entry: Entry) -> Iterator[str]:
        limits = (entry.nanousd or None, entry.tokens or None)
        window = Window.parse(entry.note["window"]) if "window" in entry.note else None
        if entry.budget not in self.replayed:
            parent = entry.note.get("parent")
            depth = self.replayed[parent].scope.depth + 1 if parent is not None else 0
            labels = entry.note.get("only", "")
            only = tuple(labels.split(",")) if labels else ()
            scope = Scope(entry.budget, parent, self.root, depth, *limits, window, only=only)
            self.replayed[entry.budget] = _ReplayedScope(scope)
            return
        replayed = self.replayed[entry.budget]
        old = replayed.scope
        self._change(entry.budget, limit_nanousd=limits[0], limit_tokens=limits[1], window=window)
        if window != old.window:
            self._refill(replayed, entry)
        for unit, used, limit, before in zip(
            ("nano-dollars", "tokens"),
            replayed.used(entry.at),
            limits,
            (old.limit_nanousd, old.limit_tokens),
            strict=True,
        ):
            if limit is not None and limit != before and used > limit:
                yield (
                    f"a limit is exceeded: entry {entry.id} sets {limit} {unit} for {entry.budget!r}, {used} "
                    f"are used"
                )

    def _refill(self, replayed: _ReplayedScope, entry: Entry) -> None:
        """Rebuild the window that is current at this entry from the posts before it."""
        replayed.buckets = {}
        if replayed.scope.window is None:
            return
        since = replayed.scope.window.since(datetime.fromisoformat(entry.at))
        text = datetime.fromtimestamp(since, UTC).isoformat(timespec="microseconds")
        for post in self.rows.posts_below(entry.budget, text):
            if post.number < entry.number:
                replayed.fill((post.nanousd, post.tokens), min(post.at, entry.at))

    def _restart_clock(self, moment: datetime) -> None:
        for replayed in self.replayed.values():
            if replayed.scope.window is not None:
                replayed.buckets = folded(replayed.buckets, replayed.scope.window.bucket(moment))
        for hold in self.open.values():
            until = lease_end(moment, hold.lease)
            if hold.state in ("reserved", "dispatched") and until < hold.until < "9999":
                self.open[hold.key] = replace(hold, until=until)

    def _lineage(self, budget: str) -> Iterator[_ReplayedScope]:
        name: str | None = budget
        while name is not None:
            yield self.replayed[name]
            name = self.replayed[name].scope.parent

    # Holds

    def _reserve(self, entry: Entry) -> Iterator[str]:
        assert entry.key is not None
        if entry.key in self.open:
            yield f"a hold was not reserved once: {entry.key!r}"
            return
        self.reserved += 1
        note = entry.note
        self.open[entry.key] = Hold(
            entry.key,
            entry.budget,
            "reserved",
            entry.nanousd,
            entry.tokens,
            entry.usage,
            entry.prices,
            entry.at,
            None,
            note.get("parameters", ""),
            note.get("tags", {}),
            note.get("lease", 0),
            note.get("until", "9999"),
        )
        if "result" in note:  # version 1 files had no separate entry for it
            self._note_result(entry.key, note["result"])
        yield from _check_amounts(entry, amounts(entry.usage, worst_costs(entry.usage, entry.prices)))
        for replayed in self._lineage(entry.budget):
            replayed.add((entry.nanousd, entry.tokens))
            scope, used = replayed.scope, replayed.used(entry.at)
            if scope.state != "open":
                yield f"entry {entry.id} reserves in {scope.name!r}, which is {scope.state}"
            limits = (("nano-dollars", scope.limit_nanousd), ("tokens", scope.limit_tokens))
            for amount, (unit, limit) in zip(used, limits, strict=True):
                if limit is not None and amount > limit:
                    yield (
                        f"a limit is exceeded: after entry {entry.id} {scope.name!r} has {amount} of {limit} "
                        f"{unit}"
                    )

    def _apply_hold_entry(self, entry: Entry) -> Iterator[str]:
        assert entry.key is not None
        hold = self.open.get(entry.key)
        if entry.kind == "result":
            self._note_result(entry.key, entry.note["result"])
        elif hold is None:
            row = self.rows.hold(entry.key)
            what = "a hold ended more than once" if row else "an entry names no such hold"
            yield f"{what}: entry {entry.id}, {entry.kind} {entry.key!r}"
        elif hold.budget != entry.budget:
            yield f"entry {entry.id} names another budget than its hold {entry.key!r}"
        elif entry.kind == "dispatch":
            until = entry.note["until"]
            self.open[entry.key] = replace(hold, state="dispatched", until=until)
        elif entry.kind == "unknown":
            self.open[entry.key] = replace(hold, state="unknown")
        else:
            yield from self._end(entry, hold)

    def _end(self, entry: Entry, hold: Hold) -> Iterator[str]:
        held, posted = (hold.held_nanousd, hold.held_tokens), (0, 0)
        if entry.kind == "post":
            by_model = costs(entry.usage, hold.prices)
            yield from _check_amounts(entry, amounts(entry.usage, by_model))
            if entry.note.get("costs") != by_model:
                yield f"entry {entry.id} tells costs by model that its usage does not make"
            posted = (entry.nanousd, entry.tokens)
            if entry.overrun != max(0, posted[0] - held[0]):
                yield f"a hold differs from its entries: {hold.key!r} has an overrun of {entry.overrun}"
            if "result" in entry.note:
                self._note_result(hold.key, entry.note["result"])
        elif (entry.nanousd, entry.tokens) != held:
            yield (
                f"a hold differs from its entries: entry {entry.id} frees other amounts than {hold.key!r} "
                f"held"
            )
        for replayed in self._lineage(entry.budget):
            replayed.add((-held[0], -held[1]), posted, entry.at if entry.kind == "post" else "")
        del self.open[hold.key]
        states: dict[str, HoldState] = {"post": "posted", "void": "void", "expire": "expired"}
        yield from self._compare_hold(replace(hold, state=states[entry.kind]), ended=True)

    def _note_result(self, key: str, recorded: str) -> None:
        if key in self.open:
            self.results[key] = recorded
        elif self.unmatched_results.get(key) == recorded:
            del self.unmatched_results[key]
        else:
            self.unmatched_results[key] = f"not {recorded}"

    # Comparison with the stored rows

    def _compare_hold(self, expected: Hold, *, ended: bool) -> Iterator[str]:
        key = expected.key
        recorded = self.results.pop(key, None)
        try:
            found = self.rows.hold(key)
        except _UNREADABLE as error:
            yield f"the hold {key!r} cannot be read: it cannot be priced again: {error!r}"
            return
        if found is None:
            yield f"a hold differs from its entries: {key!r} is missing"
            return
        for name in Hold.__dataclass_fields__:
            is_there, made = getattr(found, name), getattr(expected, name)
            if name != "result" and is_there != made:
                yield (
                    f"a hold differs from its entries: {key!r} has {name} {is_there}, the entries make it "
                    f"{made}"
                )
        actual = None if found.result is None else result_hash(found.result)
        if ended and recorded is None and actual is not None:
            self.unmatched_results[key] = actual
        elif actual != recorded:
            yield f"the result of {key!r} is not the one its entry tells of"

    def _compare_open_holds(self) -> Iterator[str]:
        for expected in list(self.open.values()):
            yield from self._compare_hold(expected, ended=False)
        for key in self.unmatched_results:
            yield f"the result of {key!r} is not the one its entry tells of"
        count = self.rows.count_holds(self.root)
        if count != self.reserved:
            yield (
                f"{self.root!r} has {count} holds, its entries reserve {self.reserved}: one was put in or "
                f"taken out"
            )

    def _compare_scopes(self, number: int, head: str, last: str) -> Iterator[str]:
        if self.root in self.replayed:
            self._change(self.root, entries=number, head=head, last_at=last)
        for name in {**self.replayed, **self.stored}:
            found, replayed = self.stored.get(name), self.replayed.get(name)
            if found is None or replayed is None:
                yield f"budget {name!r} is {'not stored' if found is None else 'there, and no entry made it'}"
                continue
            yield from _differences(found, replayed.scope)
            if self.rows.buckets(name) != replayed.buckets:
                yield f"totals differ from the entries: the window of {name!r}"


def _check_amounts(entry: Entry, expected: tuple[int, int]) -> Iterator[str]:
    if expected != (entry.nanousd, entry.tokens):
        yield (
            f"entry {entry.id} says {entry.nanousd} nano-dollars and {entry.tokens} tokens, "
            f"its usage makes {expected[0]} and {expected[1]}"
        )


_WHAT_DIFFERS = {
    "limit_nanousd": "a limit differs from its last entry",
    "limit_tokens": "a limit differs from its last entry",
    "window": "a limit differs from its last entry",
    "only": "where its data may go differs from its first entry",
    "entries": "the end of the chain differs from its last entry",
    "head": "the end of the chain differs from its last entry",
    "last_at": "the end of the chain differs from its last entry",
}


def _differences(found: Scope, expected: Scope) -> Iterator[str]:
    for name in Scope.__dataclass_fields__:
        has, made = getattr(found, name), getattr(expected, name)
        if has != made:
            what = _WHAT_DIFFERS.get(name, "totals differ from the entries")
            yield f"{what}: budget {found.name!r} has {name} {has}, the entries make it {made}"
