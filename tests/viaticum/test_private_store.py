"""What the small databases of a server share: transactions that cannot end, files that cannot be used."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from viaticum.errors import LedgerError
from viaticum.private_store import PrivateStore


class Pages(PrivateStore):
    """Pages that name the page before them, which is checked when a transaction ends."""

    def _prepare(self) -> None:
        self._db.execute("PRAGMA foreign_keys = ON")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS pages (number INTEGER PRIMARY KEY, before INTEGER"
            " REFERENCES pages (number) DEFERRABLE INITIALLY DEFERRED)"
        )

    def add(self, number: int, before: int | None) -> None:
        with self._in_use() as db, self._transaction():
            db.execute("INSERT INTO pages VALUES (?, ?)", (number, before))

    def add_nothing(self) -> None:
        with self._in_use() as db, self._transaction():
            db.execute("ROLLBACK")  # as SQLite does where the disk is full
            raise sqlite3.OperationalError("database or disk is full")

    def count(self) -> int:
        found: int = self._row("SELECT count(*) FROM pages")[0]
        return found


def test_a_transaction_that_cannot_be_committed_is_undone_and_the_next_one_begins(tmp_path: Path) -> None:
    with Pages(tmp_path / "pages.db", "pages") as pages:
        pages.add(1, None)
        with pytest.raises(LedgerError, match="FOREIGN KEY"):
            pages.add(3, 2)
        assert pages.count() == 1
        pages.add(2, 1)
        assert pages.count() == 2


def test_an_error_that_ended_the_transaction_is_told_as_it_is(tmp_path: Path) -> None:
    with Pages(tmp_path / "pages.db", "pages") as pages:
        with pytest.raises(LedgerError, match="cannot use pages: database or disk is full"):
            pages.add_nothing()
        pages.add(1, None)


def test_a_file_that_is_no_database_is_closed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[sqlite3.Connection] = []

    def open_it(path: Path) -> sqlite3.Connection:
        opened.append(sqlite3.connect(path))
        return opened[0]

    monkeypatch.setattr("viaticum.private_store.private_database", open_it)
    (tmp_path / "pages.db").write_text("no database" * 100)
    with pytest.raises(LedgerError, match="not a database"):
        Pages(tmp_path / "pages.db", "pages")
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        opened[0].execute("SELECT 1")
