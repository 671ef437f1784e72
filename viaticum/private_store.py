"""A small database of a server in one SQLite file, which its owner alone may read.

Opens it, closes it, and lets one thread at a time use it. Leaves out tables, and the ledger's own database.
"""

from __future__ import annotations

import sqlite3
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from viaticum.errors import InputError, LedgerError, reason
from viaticum.files import private_database

DAYS = 30  # that something is kept where nobody says otherwise, as at OpenAI
BYTES_A_KEY = 1 << 30
LONGEST_DAYS = 36_500
SECONDS_A_DAY = 86_400


class PrivateStore(ABC):
    """One SQLite file, created if missing. Thread-safe; several processes may use it at once.

    Args:
        path: of the file.
        purpose: what cannot be used where the file cannot, for errors.

    Raises:
        LedgerError: the file cannot be used.
    """

    def __init__(self, path: Path, purpose: str) -> None:
        self.path, self._purpose = path, purpose
        self._lock = threading.Lock()
        with self._as_ledger_error():
            self._db = private_database(path)
            try:
                self._prepare()
            except BaseException:
                self._db.close()
                raise

    @abstractmethod
    def _prepare(self) -> None:
        """Make the tables that are missing."""

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _in_use(self) -> Iterator[sqlite3.Connection]:
        """The database, for this thread alone. Raises `LedgerError` for its errors."""
        with self._lock, self._as_ledger_error():
            yield self._db

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """One transaction, which begins as a writer's; within `_in_use`. One that cannot end is undone."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # some errors, such as of a full disk, have ended it
                self._db.execute("ROLLBACK")
            raise

    def _row(self, query: str, *values: Any) -> Any:
        """The first row of a query; None where there is none."""
        with self._in_use() as db:
            return db.execute(query, values).fetchone()

    def _write(self, query: str, *values: Any) -> int:
        """Returns how many rows were changed."""
        with self._in_use() as db:
            return db.execute(query, values).rowcount

    @contextmanager
    def _as_ledger_error(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise LedgerError(f"cannot use {self._purpose}: {reason(error)}") from error


def checked_limits(what: str, days: float, bytes_a_key: int) -> None:
    """Check for how long something is kept, and how much of it by one key. Raises `InputError`."""
    if not 0 < days <= LONGEST_DAYS:
        raise InputError(f"{what} are kept for more than 0 and up to {LONGEST_DAYS} days, got {days}")
    if bytes_a_key < 1:
        raise InputError(f"a key keeps 1 byte or more, got {bytes_a_key}")
