"""What was counted of the spending of ledgers, kept in a file, so that only new posts are counted next time.

A file holds, by ledger and by list of dimensions, the sums of `SpendingCounter` and the ends of the ledger's
chains up to which they count. A ledger that is not the one that was counted (restored, replaced or altered)
is counted anew, as is one without sums. Leaves out what is counted (`spending`) and shown (`spending_page`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from viaticum import __version__
from viaticum.budgets import Entry, Ledger
from viaticum.budgets.records import digest
from viaticum.files import atomic_write
from viaticum.reports.spending import Spending, SpendingCounter, spending_of

FORMAT = 2
Heads = Mapping[str, tuple[int, str]]  # by root, number and hash of the last entry that is counted
Kept = dict[tuple[str, tuple[str, ...]], tuple[SpendingCounter, Heads]]  # by ledger and dimensions


class KeptSpending:
    """Counts the posts of several ledgers together, from where the file ends. Weeks are those of UTC.

    Args:
        path: the file, made by `save`; one that is missing, damaged or of another version counts as empty.
        ledgers: open ones, by their addresses.
    """

    def __init__(self, path: Path, ledgers: Mapping[str, Ledger]) -> None:
        self._path = path
        self._ledgers = {digest(address)[:16]: ledger for address, ledger in ledgers.items()}
        self._kept = {key: value for key, value in _read(path).items() if key[0] in self._ledgers}
        self._used = set[tuple[str, tuple[str, ...]]]()

    def tables(self, dimensions: Sequence[Sequence[str]]) -> list[Spending]:
        """The spending of all ledgers, once for each list of dimensions."""
        for name, ledger in self._ledgers.items():
            self._count(name, ledger, [tuple(each) for each in dimensions])
        unknown = [hold for ledger in self._ledgers.values() for hold in ledger.holds(None, "unknown")]
        found = []
        for by in map(tuple, dimensions):
            together = SpendingCounter(by)
            for name in self._ledgers:
                together.add(self._kept[name, by][0])
            found.append(spending_of(together, unknown))
        return found

    def save(self) -> None:
        """Write the file, with what `tables` was asked for."""
        counted = [
            {"ledger": name, "heads": heads, **counter.to_json()}
            for (name, by), (counter, heads) in self._kept.items()
            if (name, by) in self._used
        ]
        document = {"format": FORMAT, "version": __version__, "digest": digest(counted), "counted": counted}
        atomic_write(self._path, json.dumps(document, ensure_ascii=False, separators=(",", ":")) + "\n")

    def _count(self, name: str, ledger: Ledger, dimensions: Sequence[tuple[str, ...]]) -> None:
        """Bring the sums of one ledger up to date: those that end alike in one pass."""
        passes = dict[str, list[SpendingCounter]]()
        for by in dict.fromkeys(dimensions):
            counter, heads = self._kept.get((name, by), (SpendingCounter(by), {}))
            passes.setdefault(json.dumps(heads, sort_keys=True), []).append(counter)
            self._used.add((name, by))
        for text, counters in passes.items():
            now = ledger.each_new_post(_taker(counters), _heads(json.loads(text)))
            if now is None:
                counters = [SpendingCounter(each.by) for each in counters]
                now = ledger.each_new_post(_taker(counters), {}) or {}
            for counter in counters:
                self._kept[name, counter.by] = counter, now


def _taker(counters: Sequence[SpendingCounter]) -> Callable[[Entry], None]:
    def take(entry: Entry) -> None:
        for counter in counters:
            counter.take(entry)

    return take


def _heads(heads: Mapping[str, Sequence[Any]]) -> dict[str, tuple[int, str]]:
    return {str(root): (int(number), str(last)) for root, (number, last) in heads.items()}


def _read(path: Path) -> Kept:
    found: Kept = {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT or document["version"] != __version__:
            return {}
        if document["digest"] != digest(document["counted"]):
            return {}
        for each in document["counted"]:
            counter = SpendingCounter.from_json(each)
            found[str(each["ledger"]), counter.by] = counter, _heads(each["heads"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return found
