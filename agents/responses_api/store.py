"""Responses that are kept, in `responses.db` beside the ledger, so that a conversation can go on by an id.

Each row has the new messages of one response and names the response before it. A response belongs to its key
(`Caller.owner`); others do not find it. Where a key keeps too many bytes, its oldest responses go. Leaves out
HTTP, and what a response is.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from viaticum.private_store import BYTES_A_KEY, DAYS, SECONDS_A_DAY, PrivateStore, checked_limits
from viaticum.residency import NO_RESTRICTION, Residency
from viaticum.types import Message

LONGEST = 10_000  # responses of one conversation
_TABLES = """
CREATE TABLE IF NOT EXISTS responses (
  id TEXT PRIMARY KEY,
  scope TEXT NOT NULL,
  only_labels TEXT NOT NULL,
  created INTEGER NOT NULL,
  previous TEXT,
  messages TEXT NOT NULL,
  body TEXT NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS by_age ON responses (created);
CREATE INDEX IF NOT EXISTS by_scope ON responses (scope, created);
CREATE TABLE IF NOT EXISTS sizes (scope TEXT PRIMARY KEY, bytes INTEGER NOT NULL) STRICT;
"""
_SIZE = "length(CAST({row}.messages AS BLOB)) + length(CAST({row}.body AS BLOB))"
# The sizes of all rows, kept by the database itself, so that no writer and no deletion forgets them.
_TRIGGERS = f"""
CREATE TRIGGER IF NOT EXISTS size_of_new AFTER INSERT ON responses BEGIN
  INSERT INTO sizes VALUES (new.scope, {_SIZE.format(row="new")})
  ON CONFLICT (scope) DO UPDATE SET bytes = bytes + excluded.bytes;
END;
CREATE TRIGGER IF NOT EXISTS size_of_old AFTER DELETE ON responses BEGIN
  UPDATE sizes SET bytes = bytes - ({_SIZE.format(row="old")}) WHERE scope = old.scope;
END;
"""
_COUNT = f"INSERT INTO sizes SELECT scope, sum({_SIZE.format(row='responses')}) FROM responses GROUP BY scope"


class ResponseStore(PrivateStore):
    """The kept responses in one SQLite file, created if missing. Thread-safe.

    Args:
        path: the file, readable by its owner alone.
        days: how long a response is kept.
        bytes_a_key: of the responses that one key keeps at most.

    Raises:
        InputError: a limit is out of range.
        LedgerError: the file cannot be used.
    """

    def __init__(self, path: str | Path, *, days: float = DAYS, bytes_a_key: int = BYTES_A_KEY) -> None:
        checked_limits("responses", days, bytes_a_key)
        self._seconds, self._bytes = days * SECONDS_A_DAY, bytes_a_key
        super().__init__(Path(path), f"{path} for responses")

    def _prepare(self) -> None:
        self._db.execute("PRAGMA recursive_triggers = ON")  # else a replaced row is not subtracted
        with self._transaction():
            known = {name for (name,) in self._db.execute("SELECT name FROM sqlite_master")}
            for statement in _TABLES.split(";\n"):
                self._db.execute(statement)
            if "sizes" not in known:
                self._db.execute(_COUNT)
            for trigger in _TRIGGERS.split("END;\n")[:-1]:
                self._db.execute(f"{trigger}END")

    def put(
        self,
        id: str,
        scope: str,
        previous: str | None,
        messages: Sequence[Message],
        body: Mapping[str, Any],
        *,
        residency: Residency = NO_RESTRICTION,
    ) -> None:
        """Keep a response, unless it alone is larger than what a key may keep.

        Args:
            id: of the response.
            scope: to whom it belongs.
            previous: the response before it; None for the first of a conversation.
            messages: those that are new in this response, its own ones included.
            body: the response.
            residency: where the request said that its data may go.
        """
        now = time.time()
        only = json.dumps(residency.groups)
        row = (id, scope, only, int(now), previous, json.dumps(list(messages)), json.dumps(body))
        if len(row[-2]) + len(row[-1]) > self._bytes:
            return
        with self._in_use(), self._transaction():
            self._db.execute("DELETE FROM responses WHERE created < ?", (int(now - self._seconds),))
            self._db.execute("INSERT OR REPLACE INTO responses VALUES (?, ?, ?, ?, ?, ?, ?)", row)
            self._make_room(scope)

    def _make_room(self, scope: str) -> None:
        """Delete the oldest responses of a scope that keeps too many bytes."""
        while self._size(scope) > self._bytes:
            deleted = self._db.execute(
                "DELETE FROM responses WHERE id IN"
                " (SELECT id FROM responses WHERE scope = ? ORDER BY created, rowid LIMIT 1)",
                (scope,),
            )
            if not deleted.rowcount:
                return

    def _size(self, scope: str) -> int:
        row = self._db.execute("SELECT bytes FROM sizes WHERE scope = ?", (scope,)).fetchone()
        size: int = row[0] if row else 0
        return size

    def body(self, id: str, scope: str) -> dict[str, Any] | None:
        """A response; None for one that is not kept, or belongs to another scope."""
        found = self._response(id, scope)
        body: dict[str, Any] | None = None if found is None else json.loads(found[2])
        return body

    def conversation(self, id: str, scope: str) -> tuple[tuple[Message, ...], Residency] | None:
        """All messages up to a response, and where they may go; None where one of them is not kept."""
        parts: list[list[Message]] = []
        residency = NO_RESTRICTION
        current: str | None = id
        while current is not None and len(parts) < LONGEST:
            found = self._response(current, scope)
            if found is None:
                return None
            parts.append(json.loads(found[1]))
            residency &= Residency(tuple(tuple(group) for group in json.loads(found[3])))
            current = found[0]
        if current is not None:  # longer than any conversation
            return None
        return tuple(message for part in reversed(parts) for message in part), residency

    def delete(self, id: str, scope: str) -> bool:
        """Delete a response; returns whether there was one. Conversations through it cannot go on."""
        return self._write("DELETE FROM responses WHERE id = ? AND scope = ?", id, scope) > 0

    def _response(self, id: str, scope: str) -> tuple[str | None, str, str, str] | None:
        """previous, messages, body and restrictions."""
        row: tuple[str | None, str, str, str] | None = self._row(
            "SELECT previous, messages, body, only_labels FROM responses"
            " WHERE id = ? AND scope = ? AND created >= ?",
            id,
            scope,
            int(time.time() - self._seconds),
        )
        return row
