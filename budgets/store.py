"""The ledger's file: opened or refused, locked, forked and read through one connection.

Every SQLite and file-system failure leaves here as a `LedgerError` of one line. A file that is not ours
is refused before SQLite sees it, so that nothing is written to it. Leaves out what the rows mean: see
`ledger`; and the tables: see `schema`.
"""

from __future__ import annotations

import os
import random
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sqlite_utils import Database

from viaticum.budgets import schema
from viaticum.errors import LedgerError

BUSY_SECONDS = 60.0
WHOLE_CHECK_BYTES = 1 << 20  # a file up to this size is checked page by page when it is opened (a few ms)
_HEADER_BYTES = 100
_MAGIC = b"SQLite format 3\0"
# BUSY and LOCKED; PROTOCOL is what SQLite calls losing many races for the WAL in a row.
_BUSY_CODES = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}
_jitter = random.Random()  # its own, so that a caller's seeded numbers stay what they were


class Store:
    """One SQLite file behind one connection and one lock: threads take turns here, processes in SQLite.

    A fork is safe: the connection is closed just before it, and parent and child open their own.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._database: Database | None = None
        self._closed = False
        with self._lock, self._in_plain_words():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = self._open(create=True)
        with _stores_lock:
            _stores.add(self)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._disconnect()

    @contextmanager
    def transaction(self, *, write: bool = True) -> Iterator[Database]:
        """All that happens inside holds, or, where anything raises, none of it does."""
        with self._lock, self._in_plain_words():
            db = self._connected()
            if db.conn.in_transaction:
                raise LedgerError(
                    f"the ledger {self.path} is in use by this very thread; let that call end first"
                )
            try:
                _patiently(lambda: _begin(db, write))
                yield db
                db.execute("COMMIT")
            except BaseException:
                _roll_back(db)
                raise

    def _connected(self) -> Database:
        if self._closed:
            raise LedgerError(f"the ledger {self.path} is closed; open it again")
        if self._database is None:
            # After a fork. Never create: a file that went missing must not turn into an empty ledger.
            self._database = self._open(create=False)
        return self._database

    def _disconnect(self) -> None:
        if self._database is not None:
            with suppress(sqlite3.Error):
                self._database.close()
            self._database = None

    def _open(self, *, create: bool) -> Database:
        _refuse_foreign(self.path)
        uri = f"{self.path.as_uri()}?mode={'rwc' if create else 'rw'}"
        connection = sqlite3.connect(
            uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            db = Database(connection, execute_plugins=False)
            _patiently(lambda: _prepare(db, self.path))
        except BaseException:
            _close_untouched(connection)
            raise
        return db

    @contextmanager
    def _in_plain_words(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise LedgerError(_plain_words(error, self.path)) from error
        except OSError as error:
            reason = error.strerror or error
            raise LedgerError(f"cannot use {self.path} as a ledger: {reason}; give another path") from error


def _refuse_foreign(path: Path) -> None:
    """Look at the first bytes only. A missing or an empty file may become a ledger."""
    if not path.exists():
        return
    with path.open("rb") as file:
        header = file.read(_HEADER_BYTES)
    if not header:
        _refuse_lone_wal(path)
        return
    if len(header) < _HEADER_BYTES or not header.startswith(_MAGIC):
        raise LedgerError(f"{path} is not a ledger: it is no SQLite file; give another path")
    # SQLite's file format, section 1.3: user_version at byte 60, application_id at byte 68, big-endian.
    if int.from_bytes(header[68:72], "big") != schema.APPLICATION_ID:
        raise LedgerError(
            f"{path} is not a ledger: it is an SQLite file of another program; give another path"
        )
    _refuse_newer(path, int.from_bytes(header[60:64], "big"))


def _refuse_lone_wal(path: Path) -> None:
    """SQLite would delete the log beside an empty file; it may be all that is left of a ledger."""
    wal = path.with_name(path.name + "-wal")
    if wal.exists() and wal.stat().st_size:
        raise LedgerError(
            f"the ledger {path} is damaged: empty beside a log {wal.name}; restore it from a copy"
        )


def _refuse_newer(path: Path, found: int) -> None:
    if found > schema.VERSION:
        raise LedgerError(
            f"the ledger {path} has version {found}, newer than {schema.VERSION}, which this viaticum knows; "
            "upgrade viaticum"
        )


def _prepare(db: Database, path: Path) -> None:
    """Settings of the connection, then the tables. Safe to repeat, and with others doing the same."""
    db.execute("PRAGMA synchronous = FULL")
    db.execute("PRAGMA foreign_keys = ON")
    _refuse_newer(path, schema.version(db))
    _refuse_damaged(db, path)
    if schema.version(db) < schema.VERSION:
        _migrate(db, path)
    mode = db.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    if mode != "wal":
        raise LedgerError(
            f"the ledger {path} cannot use a write-ahead log here ({mode}); put it on a local disk"
        )
    db.execute("SELECT name FROM budgets LIMIT 1").fetchall()


def _refuse_damaged(db: Database, path: Path) -> None:
    if path.stat().st_size > WHOLE_CHECK_BYTES:
        return
    found = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    if found != "ok":
        raise LedgerError(f"the ledger {path} is damaged: {_one_line(found)}; restore it from a copy")


def _migrate(db: Database, path: Path) -> None:
    try:
        db.execute("BEGIN IMMEDIATE")
        _refuse_newer(path, schema.version(db))  # another process may have been here while we waited
        schema.migrate(db)
        db.execute("COMMIT")
    except BaseException:
        _roll_back(db)
        raise


def _begin(db: Database, write: bool) -> None:
    try:
        db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
        db.execute("PRAGMA user_version").fetchone()  # takes the read snapshot now, where waiting is possible
    except BaseException:
        _roll_back(db)
        raise


def _roll_back(db: Database) -> None:
    if db.conn.in_transaction:
        with suppress(sqlite3.Error):
            db.execute("ROLLBACK")


def _patiently(action: Callable[[], None]) -> None:
    """Repeat while the file is busy. SQLite waits by itself, but not in every state of a WAL file."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            return action()
        except sqlite3.OperationalError as error:
            if _code(error) not in _BUSY_CODES or time.monotonic() > deadline:
                raise
            time.sleep(_jitter.uniform(0.001, 0.02))


def _close_untouched(connection: sqlite3.Connection) -> None:
    """Close without the checkpoint that would write a leftover log into a file we refuse (Python 3.12)."""
    if hasattr(connection, "setconfig"):
        connection.setconfig(sqlite3.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE)  # type: ignore[attr-defined,unused-ignore]
    connection.close()


def _code(error: sqlite3.Error) -> int | None:
    """The primary result code; extended codes keep it in their low byte."""
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def _plain_words(error: sqlite3.Error, path: Path) -> str:
    code = _code(error)
    if code in _BUSY_CODES:
        return f"the ledger {path} was kept locked for {BUSY_SECONDS:.0f} s by another process; stop it or try again"
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return f"the ledger {path} is damaged: {_one_line(error)}; restore it from a copy"
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return f"the ledger {path} cannot be written: {_one_line(error)}; check the rights of file and folder"
    if code == sqlite3.SQLITE_FULL:
        return f"the ledger {path} cannot grow: {_one_line(error)}; free some disk space"
    return f"the ledger {path} failed: {_one_line(error)}"


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


# SQLite forbids carrying an open connection across a fork. So every store is locked and disconnected
# just before one; holding the locks through the fork also leaves them free in the child.
_stores: weakref.WeakSet[Store] = weakref.WeakSet()
_stores_lock = threading.Lock()
_locked_for_fork: list[Store] = []


def _before_fork() -> None:
    _stores_lock.acquire()
    for store in list(_stores):
        store._lock.acquire()
        _locked_for_fork.append(store)
        store._disconnect()


def _after_fork() -> None:
    while _locked_for_fork:
        _locked_for_fork.pop()._lock.release()
    _stores_lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
