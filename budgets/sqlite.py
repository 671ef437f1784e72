"""The ledger in one SQLite file: open or refuse it, lock it, survive forks, all on one connection.

Write-ahead log, BEGIN IMMEDIATE, synchronous=FULL: committed data survives a power cut. Every SQLite and
file-system failure is raised as a one-line `LedgerError`. A file of another program is refused before SQLite
opens it, so that nothing is written to it. Leaves out the meaning of the rows: see `ledger`; and the tables:
see `schema`.
"""

from __future__ import annotations

import os
import random
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from sqlite_utils import Database

from viaticum.budgets import schema
from viaticum.budgets.sql import ENTRY_INSERT, Row, SqlRows
from viaticum.budgets.store import EntryColumns, Rows, Store, T, compare_objects
from viaticum.errors import LedgerError, one_line
from viaticum.files import atomic_file, private_file

BUSY_SECONDS = 60.0
WHOLE_CHECK_BYTES = 1 << 20  # files up to this size are checked page by page on opening (a few ms)
_POLL_SECONDS = (0.001, 0.008)
_HEADER_BYTES = 100
_MAGIC = b"SQLite format 3\0"
# SQLite reports PROTOCOL after losing many races for the WAL in a row.
_BUSY_CODES = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}
Identity = list[tuple[str, int, int]]  # path, device and inode of the ledger's file, its log and its locks
_rng = random.Random()  # separate, so that a caller's seeded random numbers are not affected

# Open ledgers of this process, by real path. POSIX drops all locks of a process on a file when it closes any
# descriptor of that file, so the header of an open file must not be read again: SQLite would lose its locks.
_open_counts: Counter[str] = Counter()
_open_counts_lock = threading.Lock()


class SqliteRows(SqlRows):
    def __init__(self, db: Database, lineages: dict[str, tuple[str, ...]]) -> None:
        super().__init__(lineages)
        # The bare connection: the wrapper of sqlite-utils costs measurable time per statement and takes a
        # savepoint around each query.
        self._connection = db.conn

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> None:
        self._connection.execute(sql, parameters)

    def execute_many(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        self._connection.executemany(sql, rows)

    def query(self, sql: str, parameters: Sequence[Any] = ()) -> list[Row]:
        return list(self.stream(sql, parameters))

    def stream(self, sql: str, parameters: Sequence[Any] = ()) -> Iterator[Row]:
        cursor = self._connection.execute(sql, parameters)
        names = [column[0] for column in cursor.description]
        return (dict(zip(names, row)) for row in cursor)  # noqa: B905

    def append(self, columns: EntryColumns, hash: str) -> int:
        cursor = self._connection.execute(ENTRY_INSERT, (*columns, hash))
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def append_all(self, entries: Sequence[tuple[EntryColumns, str]]) -> list[int]:
        self.execute_many(ENTRY_INSERT, [(*columns, head) for columns, head in entries])
        # Ids are consecutive: each is the greatest id plus one, and no other writer runs.
        last: int = self._connection.execute("SELECT last_insert_rowid()").fetchone()[0]
        return list(range(last - len(entries) + 1, last + 1))

    def integrity_errors(self) -> list[str]:
        try:
            found = [row["integrity_check"] for row in self.query("PRAGMA integrity_check")]
        except sqlite3.DatabaseError as error:  # of an index that points nowhere, for example
            found = [str(error)]
        return [] if found == ["ok"] else [one_line(line) for line in found]


class SqliteStore(Store):
    """One SQLite file behind one connection and one lock: threads queue here, processes queue in SQLite.

    With `read_only` nothing is written, migrated or checked, so that a damaged or write-protected file can be
    read as far as possible.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        super().__init__()
        self.path = path
        self._read_only = read_only
        self._database: Database | None = None
        self._identity: Identity = []
        self._closed = False
        self._lineages: dict[str, tuple[str, ...]] = {}
        with self._lock, self._translate_errors():
            self._database = self._open(create=not read_only)

    def write(self, action: Callable[[Rows], T]) -> T:
        if self._read_only:
            raise LedgerError(f"the ledger {self.path} was opened to be read only; open it for writing")
        return self._transact(action, write=True)

    def read(self, action: Callable[[Rows], T]) -> T:
        return self._transact(action, write=False)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._disconnect()

    def identity(self) -> object:
        """Device and inode of the file."""
        with self._lock, self._translate_errors():
            self._connected()
            return "sqlite", *self._identity[0][1:]

    def backup(self, target: Path) -> None:
        """With SQLite's own backup, which includes the log; under the name only once it is whole."""
        with self._lock, self._translate_errors():
            source = self._connected().conn
            _refuse_replaced(self.path, self._identity)
            if target.exists():
                raise LedgerError(f"{target} exists; give the backup a name that is free")
            with atomic_file(target, advice="give another path") as scratch:
                _copy(source, private_file(scratch))

    def altered_objects(self) -> list[str]:
        with self._lock, self._translate_errors():
            found = schema.objects(self._connected())
        return compare_objects(schema.expected_objects(), found)

    def _transact(self, action: Callable[[Rows], T], *, write: bool) -> T:
        with self._lock, self._translate_errors():
            db = self._connected()
            if db.conn.in_transaction:
                raise LedgerError(
                    f"the ledger {self.path} is in use by this very thread; let that call end first"
                )
            try:
                _retry_while_busy(lambda: _begin(db, write))
                result = action(SqliteRows(db, self._lineages))
                _refuse_replaced(self.path, self._identity)
                # Nothing to commit after reading, which SQLite refuses in a file that is damaged.
                db.execute("COMMIT" if write else "ROLLBACK")
                return result
            except BaseException:
                _roll_back(db)
                raise

    def _connected(self) -> Database:
        if self._closed:
            raise LedgerError(f"the ledger {self.path} is closed; open it again")
        if self._database is None:
            # Reopen after a fork, without creating: a deleted file must not turn into an empty ledger.
            _refuse_replaced(self.path, self._identity[:1])
            self._database = self._open(create=False)
        return self._database

    def _disconnect(self) -> None:
        if self._database is not None:
            with suppress(sqlite3.Error):
                self._database.close()
            self._database = None
            _mark_closed(self.path)

    def _open(self, *, create: bool) -> Database:
        with _path_errors(self.path):
            if create:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            _check_header_once(self.path)
        try:
            if create:  # after the check: a file of another program keeps its permissions
                with _path_errors(self.path):
                    private_file(self.path)
            opened = _identify(self.path)
            connection = self._connect(create)
            try:
                db = Database(connection, execute_plugins=False)
                _retry_while_busy(lambda: _prepare(db, self.path, self._read_only))
                _refuse_replaced(self.path, opened)
                self._identity = _identify(self.path)
            except BaseException:
                _close_without_checkpoint(connection)
                raise
        except BaseException:
            _mark_closed(self.path)
            raise
        return db

    def _connect(self, create: bool) -> sqlite3.Connection:
        def connect(options: str) -> sqlite3.Connection:
            uri = f"{self.path.as_uri()}?{options}"
            return sqlite3.connect(uri, uri=True, timeout=0, isolation_level=None, check_same_thread=False)

        if not self._read_only:
            return connect(f"mode={'rwc' if create else 'rw'}")
        connection = connect("mode=ro")
        try:
            schema.version(Database(connection, execute_plugins=False))
            return connection
        except sqlite3.OperationalError:
            # The log was merged, so there is no shared-memory file, and this folder does not allow a new one.
            # Then nobody writes here either, and the file can be opened as immutable.
            connection.close()
            if self.path.with_name(self.path.name + "-wal").exists():
                raise
            return connect("mode=ro&immutable=1")

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise LedgerError(_error_message(error, self.path)) from error


@contextmanager
def _path_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise LedgerError(f"cannot use {path} as a ledger: {reason}; give another path") from error


def _check_header_once(path: Path) -> None:
    with _open_counts_lock:
        if not _open_counts[os.path.realpath(path)]:
            _refuse_foreign_file(path)
        _open_counts[os.path.realpath(path)] += 1


def _mark_closed(path: Path) -> None:
    with _open_counts_lock:
        _open_counts[os.path.realpath(path)] -= 1


def _copy(source: sqlite3.Connection, target: Path) -> None:
    with closing(sqlite3.connect(target)) as copy:
        source.backup(copy)
        copy.execute("PRAGMA journal_mode = DELETE")  # one file, which opens from a medium that is read only
        found = copy.execute("PRAGMA integrity_check(1)").fetchone()[0]
    if found != "ok":
        raise LedgerError(f"the ledger is damaged: {one_line(found)}; no backup was written")


def _identify(path: Path) -> Identity:
    """Those of the three files that are there; the ledger's own first."""
    found: Identity = []
    for name in (str(path), f"{path}-wal", f"{path}-shm"):
        with suppress(FileNotFoundError):
            status = os.stat(name)
            found.append((name, status.st_dev, status.st_ino))
    return found


def _refuse_replaced(path: Path, opened: Identity) -> None:
    """A connection goes on using a file that was removed, while others count in the new one."""
    for name, device, inode in opened:
        try:
            status = os.stat(name)
        except FileNotFoundError:
            status = None
        if status is None or (status.st_dev, status.st_ino) != (device, inode):
            raise LedgerError(
                f"the ledger {path} is no longer the file that was opened: {os.path.basename(name)} was "
                "removed or replaced, and nothing was written; stop every process that uses it and put the "
                "right file in its place"
            )


def _refuse_foreign_file(path: Path) -> None:
    """Read only the header bytes. A missing or empty file may become a ledger."""
    if not path.exists():
        return
    if not path.is_file():
        raise LedgerError(f"{path} is not a ledger: it is no regular file; give another path")
    with path.open("rb") as file:
        header = file.read(_HEADER_BYTES)
    if not header:
        _refuse_stray_wal(path, "empty beside a log")
        return
    if len(header) < _HEADER_BYTES or not header.startswith(_MAGIC):
        raise LedgerError(f"{path} is not a ledger: it is no SQLite file; give another path")
    # SQLite's file format, section 1.3: user_version at byte 60, application_id at byte 68, big-endian.
    if int.from_bytes(header[68:72], "big") != schema.APPLICATION_ID:
        raise LedgerError(
            f"{path} is not a ledger: it is an SQLite file of another program; give another path"
        )
    _refuse_newer(path, int.from_bytes(header[60:64], "big"))
    if header[18] == 1:  # of a backup, say: it was never used with a log
        _refuse_stray_wal(path, "beside a log that is not its own")


def _refuse_stray_wal(path: Path, what: str) -> None:
    """SQLite deletes a log beside an empty file, although it may be all that is left of a ledger.

    And it plays one into whatever file lies beside it, such as a backup in place of the old file.
    """
    wal = path.with_name(path.name + "-wal")
    if wal.exists() and wal.stat().st_size:
        raise LedgerError(
            f"the ledger {path} is damaged: {what}, {wal.name}; restore it from a copy, and move the log away"
        )


def _refuse_newer(path: Path, found: int) -> None:
    if found > schema.VERSION:
        raise LedgerError(
            f"the ledger {path} has version {found}, newer than {schema.VERSION}, which this viaticum knows; "
            "upgrade viaticum"
        )


def _prepare(db: Database, path: Path, read_only: bool) -> None:
    """Set up the connection, then the tables. Idempotent, and safe with other processes doing the same."""
    if read_only:
        return _prepare_to_read(db, path)
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
    return None


def _prepare_to_read(db: Database, path: Path) -> None:
    db.execute("PRAGMA query_only = ON")
    found = schema.version(db)
    _refuse_newer(path, found)
    if found < schema.VERSION:
        raise LedgerError(
            f"the ledger {path} has version {found}, older than {schema.VERSION}; open it for writing once, "
            "which brings it up to date"
        )


def _refuse_damaged(db: Database, path: Path) -> None:
    if path.stat().st_size > WHOLE_CHECK_BYTES:
        return
    found = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    if found != "ok":
        raise LedgerError(f"the ledger {path} is damaged: {one_line(found)}; restore it from a copy")


def _migrate(db: Database, path: Path) -> None:
    try:
        db.execute("BEGIN IMMEDIATE")
        _refuse_newer(path, schema.version(db))  # another process may have migrated during the wait
        schema.migrate(db)
        db.execute("COMMIT")
    except BaseException:
        _roll_back(db)
        raise


def _begin(db: Database, write: bool) -> None:
    try:
        db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
        if not write:
            db.execute("PRAGMA user_version").fetchone()  # takes the snapshot now, where retrying is possible
    except BaseException:
        _roll_back(db)
        raise


def _roll_back(db: Database) -> None:
    if db.conn.in_transaction:
        with suppress(sqlite3.Error):
            db.execute("ROLLBACK")


def _retry_while_busy(action: Callable[[], None]) -> None:
    """Repeat the action while the file is busy.

    SQLite's own busy handler sleeps up to a tenth of a second, so that one process keeps the file while
    fifteen others sleep, and it does not cover every state of a WAL file.
    """
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            return action()
        except sqlite3.OperationalError as error:
            if _primary_code(error) not in _BUSY_CODES or time.monotonic() > deadline:
                raise
            time.sleep(_rng.uniform(*_POLL_SECONDS))


def _close_without_checkpoint(connection: sqlite3.Connection) -> None:
    """Close without the checkpoint that would write a leftover log into a refused file (from Python 3.12)."""
    if hasattr(connection, "setconfig"):
        option = sqlite3.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE  # type: ignore[attr-defined,unused-ignore]
        connection.setconfig(option)  # type: ignore[attr-defined,unused-ignore]
    connection.close()


def _primary_code(error: sqlite3.Error) -> int | None:
    """The primary result code, which extended codes keep in their low byte."""
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def _error_message(error: sqlite3.Error, path: Path) -> str:
    code = _primary_code(error)
    if code in _BUSY_CODES:
        return (
            f"the ledger {path} was kept locked for {BUSY_SECONDS:.0f} s by another process; stop it or try "
            f"again"
        )
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return f"the ledger {path} is damaged: {one_line(error)}; restore it from a copy"
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return (
            f"the ledger {path} cannot be written: {one_line(error)}; check the rights of file and "
            "folder, or open it to be read only"
        )
    if code == sqlite3.SQLITE_FULL:
        return f"the ledger {path} cannot grow: {one_line(error)}; free some disk space"
    return f"the ledger {path} failed: {one_line(error)}"
