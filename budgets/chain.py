"""The hash chain: the hash of an entry covers all its columns and the hash of the entry before it.

Changing, inserting or removing an entry therefore means recomputing every later hash and the chain head
stored with the root scope. Each tree of scopes has one chain. Whoever can write to the store can recompute
all of it; a copy of a root's last hash, kept elsewhere, detects that. Leaves out the content of entries: see
`ledger`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from datetime import datetime, timedelta
from functools import cache
from typing import Any

from viaticum.budgets.records import Entry, EntryKind
from viaticum.budgets.serialization import json_text, prices_text, usage_text
from viaticum.budgets.store import EntryColumns, Rows, Scope
from viaticum.money import Price
from viaticum.types import TokenCount

CLOCK_TOLERANCE = timedelta(hours=1)  # clocks of several hosts differ by less
_log = logging.getLogger("viaticum")


def entry_hash(before: str, entry: Entry, usage: str, prices: str, note: str) -> str:
    """SHA-256 over the previous hash and every column but the id, which the store assigns."""
    columns = (
        entry.root,
        entry.number,
        entry.budget,
        entry.key,
        entry.kind,
        entry.nanousd,
        entry.tokens,
        entry.overrun,
        entry.at,
        usage,
        prices,
        note,
    )
    return columns_hash(before, columns)


def columns_hash(before: str, columns: EntryColumns) -> str:
    return hashlib.sha256(json_text([before, *columns]).encode()).hexdigest()


def result_hash(result: str) -> str:
    return hashlib.sha256(result.encode()).hexdigest()


def warn_of_clock(root: str, last_at: str, now: str) -> None:
    """Tell once of a tree whose last entry is later than `now` by more than hosts differ."""
    ahead = datetime.fromisoformat(last_at) - datetime.fromisoformat(now)
    if ahead > CLOCK_TOLERANCE:
        _warn_once(root, last_at)


@cache
def _warn_once(root: str, last_at: str) -> None:
    _log.warning(
        "the last entry of budget %s is of %s, later than the clock of this machine; its windows stand still "
        "until then; if a clock ran ahead: viaticum budget clock %s",
        root,
        last_at,
        root,
    )


class Chain:
    """The end of one tree's chain, inside a write transaction that has locked the root."""

    def __init__(self, rows: Rows, root: Scope, now: str) -> None:
        self._rows, self._root = rows, root.name
        self._number, self._head = root.entries, root.head
        if root.last_at > now:
            warn_of_clock(root.name, root.last_at, now)
        # Never earlier than the last entry: a clock set back must not reopen a window or unsort the entries.
        self.at = max(now, root.last_at)
        self.moment = datetime.fromisoformat(self.at)

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
        texts = usage_text(usage), prices_text(prices), json_text(note)
        self._number += 1
        columns = (self._root, self._number, budget, key, kind, *amounts, overrun, self.at, *texts)
        self._head = columns_hash(self._head, columns)
        entry_id = self._rows.append(columns, self._head)
        self._rows.set_chain_head(self._root, self._number, self._head, self.at)
        return Entry(
            entry_id,
            budget,
            key,
            kind,
            *amounts,
            overrun,
            self.at,
            usage,
            prices,
            note,
            self._root,
            self._number,
            self._head,
        )
