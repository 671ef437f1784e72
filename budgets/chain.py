"""The chain: each entry's hash covers all of its columns and the hash of the entry before it.

So no entry can be changed, put in or taken out without every later hash, and the end of the chain that the root
scope keeps, being made anew. Every tree of scopes has one chain. Someone who may write to the store can do
all that; a copy of a root's last hash, kept elsewhere, tells. Leaves out what is written: see `ledger`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from viaticum.budgets.records import Entry, EntryKind, json_text, prices_text, usage_text
from viaticum.budgets.store import Rows, Scope
from viaticum.money import Price
from viaticum.types import TokenCount


def entry_hash(before: str, entry: Entry, usage: str, prices: str, note: str) -> str:
    """SHA-256 over the hash before and every column but the id, which is the store's own."""
    columns = [
        before, entry.root, entry.number, entry.budget, entry.key, entry.kind, entry.nanousd, entry.tokens,
        entry.overrun, entry.at, usage, prices, note,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(columns).encode()).hexdigest()


def result_hash(result: str) -> str:
    return hashlib.sha256(result.encode()).hexdigest()


class Chain:
    """The end of one tree's chain, inside a write transaction that has locked the root."""

    def __init__(self, rows: Rows, root: Scope, now: str) -> None:
        self._rows, self._root = rows, root.name
        self._number, self._head = root.entries, root.head
        # A clock that was set back neither reopens a window nor unsorts the entries.
        self.at = max(now, root.last_at)

    def append(
        self,
        budget: str,
        kind: EntryKind,
        key: str | None = None,
        amounts: tuple[int, int] = (0, 0),
        *,
        overrun: int = 0,
        usage: Mapping[str, TokenCount] | None = None,
        prices: Mapping[str, Price] | None = None,
        note: Mapping[str, Any] | None = None,
    ) -> Entry:
        usage, prices, note = usage or {}, prices or {}, note or {}
        self._number += 1
        entry = Entry(
            0, budget, key, kind, *amounts, overrun, self.at, usage, prices, note, self._root, self._number
        )
        texts = usage_text(usage), prices_text(prices), json_text(note)
        entry = replace(entry, hash=entry_hash(self._head, entry, *texts))
        self._head = entry.hash
        entry = replace(entry, id=self._rows.append(entry, *texts))
        self._rows.set_head(self._root, self._number, self._head, self.at)
        return entry
