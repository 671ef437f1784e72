"""The ledger in Postgres, for many hosts: one connection per process, rows locked from the root scope down.

Isolation is read committed. Row locks are taken in one order, which rules out deadlocks between writers, and
rows are read after they are locked. A transaction that loses a race for a key, or its connection before the
commit, runs again: every ledger operation is idempotent. Needs the extra `postgres` (psycopg).

No state is kept in a session: every transaction names its schema and how it commits, and no statement is
prepared, so that a pool (PgBouncer) may give each transaction another connection. The steps of calls are one
round trip each (`postgres_calls`); those of several threads go together.

Leaves out the meaning of the rows: see `ledger`; and the tables: see `schema_postgres`.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, LiteralString, cast

from viaticum.budgets import schema_postgres as schema
from viaticum.budgets.postgres_calls import Proposal, apply, cancel
from viaticum.budgets.postgres_objects import objects
from viaticum.budgets.records import Hold
from viaticum.budgets.sql import ENTRY_INSERT, Row, SqlRows
from viaticum.budgets.store import EntryColumns, Rows, Scope, Store, T, compare_objects
from viaticum.errors import LedgerError, MissingExtra, one_line

if TYPE_CHECKING:
    import psycopg

MAX_ATTEMPTS = 10
_MIGRATION_LOCK = 0x56494154  # advisory lock held while migrating
# SQLSTATEs of lost races (unique violation, serialization failure, deadlock), of lost connections (class 08,
# which PgBouncer too says; shutdowns and time limits of idle sessions), and of too many of them.
_RETRYABLE = ("23505", "40001", "40P01", "08", "57P", "25P03", "25P04", "53300")
MAX_PROPOSALS = 64
CONTENTION_SECONDS = 0.0002  # a lock that takes longer was held by another call
MAX_HOLDS = 10_000
_STREAM_ROWS = 1000
_SETTINGS: LiteralString = (
    "SELECT set_config('search_path', 'viaticum', true), set_config('synchronous_commit', 'on', true)"
)
_log = logging.getLogger("viaticum")
_INDEXES = """
SELECT i.indexrelid AS id, (SELECT nspname FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace
  WHERE extname = 'amcheck') AS checker
FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid WHERE c.relnamespace = 'viaticum'::regnamespace
"""


class PostgresRows(SqlRows):
    is_exclusive = False

    def __init__(
        self,
        connection: psycopg.Connection[Row],
        lineages: dict[str, tuple[str, ...]],
        scopes: dict[str, list[Scope]],
        *,
        write: bool,
    ) -> None:
        super().__init__(lineages)
        self._scopes = scopes
        self._connection = connection
        self._cursors = itertools.count()
        self._write = write
        self.lock_clause = " FOR NO KEY UPDATE" if write else ""

    def lineage(self, name: str) -> list[Scope]:
        found = super().lineage(name)
        if found:
            self._scopes[name] = [
                Scope(each.name, each.parent, each.root, each.depth, None, None, each.window, only=each.only)
                for each in found
            ]
        return found

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> None:
        self._connection.execute(_to_psycopg_parameters(sql), parameters)

    def execute_many(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        if rows:
            self._connection.cursor().executemany(_to_psycopg_parameters(sql), rows)

    def query(self, sql: str, parameters: Sequence[Any] = ()) -> list[Row]:
        return self._connection.execute(_to_psycopg_parameters(sql), parameters).fetchall()

    def stream(self, sql: str, parameters: Sequence[Any] = ()) -> Iterator[Row]:
        if self._write:  # no server-side cursors in a pipeline; a write reads one window at most
            yield from self.query(sql, parameters)
            return
        with self._connection.cursor(name=f"stream_{next(self._cursors)}") as cursor:
            cursor.itersize = _STREAM_ROWS
            cursor.execute(_to_psycopg_parameters(sql), parameters)
            yield from cursor

    def append(self, columns: EntryColumns, hash: str) -> int:
        values = (*columns, hash)
        return int(self.query(f"{ENTRY_INSERT} RETURNING id", values)[0]["id"])

    def append_all(self, entries: Sequence[tuple[EntryColumns, str]]) -> list[int]:
        if not entries:
            return []
        ids: list[int] = []
        cursor = self._connection.cursor()
        values = [(*columns, head) for columns, head in entries]
        cursor.executemany(_to_psycopg_parameters(f"{ENTRY_INSERT} RETURNING id"), values, returning=True)
        while True:  # one result set per entry
            ids += [int(row["id"]) for row in cursor.fetchall()]
            if not cursor.nextset():
                return ids

    def integrity_errors(self) -> list[str]:
        """Postgres checks its pages as it reads them; its extension amcheck, where installed, the indexes."""
        if not self.query("SELECT 1 AS found FROM pg_extension WHERE extname = 'amcheck'"):
            return []
        found: list[str] = []
        for row in self.query(_INDEXES):
            try:
                with self._connection.transaction():
                    self.query(f"SELECT {row['checker']}.bt_index_check(?, true)", [row["id"]])
            except _psycopg().errors.IndexCorrupted as error:
                found.append(one_line(error))
        return found


_IDENTITY = (
    "SELECT pg_postmaster_start_time() AS started, oid::bigint AS number FROM pg_database"
    " WHERE datname = current_database()"
)


class PostgresStore(Store):
    """The schema `viaticum` of one database. Threads queue for the connection, processes for row locks."""

    def __init__(self, address: str, *, read_only: bool = False) -> None:
        super().__init__()
        self._address = address
        self._name = _without_password(address)
        self._read_only = read_only
        self._connection: psycopg.Connection[Row] | None = None
        self._closed = self._is_contended = False
        self._busy = threading.Lock()  # of C code, so that it is freed whenever an interrupt comes
        self._lineages: dict[str, tuple[str, ...]] = {}
        self._scopes: dict[str, list[Scope]] = {}  # names and windows of lineages
        self._holds: dict[str, Hold] = {}  # of calls of this process that are running
        self._proposals: deque[Proposal[Any]] = deque()
        with self._lock, self._translate_errors():
            self._connection = self._open()

    def write(self, action: Callable[[Rows], T]) -> T:
        if self._read_only:
            raise LedgerError(f"the ledger {self._name} was opened to be read only; open it for writing")
        return self._transact(action, write=True)

    def read(self, action: Callable[[Rows], T]) -> T:
        return self._transact(action, write=False)

    def write_call(self, action: Callable[[Rows], T], key: str, budget: str | None = None) -> T:
        proposal = None if self._read_only else self._propose(action, key, budget)
        if proposal is not None:
            self._proposals.append(proposal)
            with self._lock, self._translate_errors():
                if not proposal.is_answered:
                    self._apply_proposals()
        answered = proposal is not None and proposal.reply is not None
        outcome = proposal.completed() if proposal is not None and answered else self.write(action)
        with self._lock:
            self._remember(key, outcome)
        return outcome

    def _propose(self, action: Callable[[Rows], T], key: str, budget: str | None) -> Proposal[T] | None:
        """None where scopes or hold are not known to this process."""
        known = self._holds.get(key) if isinstance(key, str) else None
        if (known is None) != (budget is not None):
            return None
        name = budget if known is None else known.budget
        scopes = self._scopes.get(name) if name is not None else None
        return None if scopes is None else Proposal.of(action, scopes, known)

    def _remember(self, key: str, outcome: object) -> None:
        """Keep the holds of calls that are running."""
        self._holds.pop(key, None)
        is_running = isinstance(outcome, Hold) and outcome.state in ("reserved", "dispatched")
        if is_running and isinstance(outcome, Hold) and outcome.result is None:
            self._holds[key] = outcome
            if len(self._holds) > MAX_HOLDS:
                del self._holds[next(iter(self._holds))]

    def _apply_proposals(self) -> None:
        """Send the proposals of all waiting threads. Those without a reply go the long way, by their keys."""
        taken = [self._proposals.popleft() for _ in range(min(len(self._proposals), MAX_PROPOSALS))]
        taken.sort(key=lambda each: each.root)  # all processes lock trees in this order
        try:
            for proposal, reply in zip(taken, self._apply(taken), strict=True):
                proposal.reply = reply
        except _psycopg().Error as error:
            _log.debug("steps of %d calls are decided one by one: %s", len(taken), one_line(error))
        finally:
            for proposal in taken:
                proposal.is_answered = True

    def _apply(self, proposals: Sequence[Proposal[Any]]) -> list[Any]:
        """One message and its replies."""
        self._refuse_nested()
        with self._busy:
            connection = self._connected()
            try:
                waited, replies = apply(connection.pgconn, proposals, release_early=self._is_contended)
            except _psycopg().Error:
                self._clean_up(connection)
                raise
            except BaseException:  # an interrupt: the reply is still to come
                try:
                    cancel(connection)
                finally:
                    self._disconnect()
                raise
            self._is_contended = waited > CONTENTION_SECONDS
            return replies

    def altered_objects(self) -> list[str]:
        with self._lock, self._translate_errors():
            return compare_objects(*objects(self._connected()))

    def identity(self) -> object:
        """The start of the server, to the microsecond, and the database's number in it."""
        with self._lock:
            found = self.read(lambda rows: cast(PostgresRows, rows).query(_IDENTITY))
        return "postgres", *found[0].values()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._disconnect()

    def _transact(self, action: Callable[[Rows], T], *, write: bool) -> T:
        with self._lock, self._translate_errors():
            self._refuse_nested()
            with self._busy:
                return self._run_with_retries(action, write=write)

    def _refuse_nested(self) -> None:
        if self._busy.locked():
            raise LedgerError(
                f"the ledger {self._name} is in use by this very thread; let that call end first"
            )

    def _run_with_retries(self, action: Callable[[Rows], T], *, write: bool) -> T:
        for attempt in itertools.count(1):
            try:
                return self._run_once(action, write=write)
            except BaseException as error:
                if not _is_retryable(error) or attempt == MAX_ATTEMPTS:
                    raise
                time.sleep(0.01 * 2**attempt if self._connection is None else 0.0)
        raise AssertionError("the loop returns or raises")

    def _run_once(self, action: Callable[[Rows], T], *, write: bool) -> T:
        connection = self._connected()
        begin: LiteralString = "BEGIN" if write else "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
        try:
            # A pipeline sends statements without waiting for replies until a result is read.
            with connection.pipeline() if write else nullcontext():
                connection.execute(begin)
                connection.execute(_SETTINGS)
                result = action(PostgresRows(connection, self._lineages, self._scopes, write=write))
                connection.execute("COMMIT")
            return result
        except BaseException:
            self._clean_up(connection)
            raise

    def _clean_up(self, connection: psycopg.Connection[Row]) -> None:
        """End the transaction, or the connection where that is impossible."""
        with suppress(Exception):
            connection.execute("ROLLBACK")
        if connection.closed or connection.broken:
            self._disconnect()

    def _connected(self) -> psycopg.Connection[Row]:
        if self._closed:
            raise LedgerError(f"the ledger {self._name} is closed; open it again")
        if self._connection is None:
            self._connection = self._open()
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            with suppress(Exception):
                self._connection.close()
            self._connection = None

    def _open(self) -> psycopg.Connection[Row]:
        dict_row = _psycopg().rows.dict_row
        connection: psycopg.Connection[Row] = _psycopg().connect(
            self._address, autocommit=True, row_factory=dict_row, prepare_threshold=None
        )
        try:
            self._migrate(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _migrate(self, connection: psycopg.Connection[Row]) -> None:
        if self._version(connection) == schema.VERSION:
            return
        if self._read_only:
            raise LedgerError(f"the ledger {self._name} is not there or older; open it for writing once")
        with connection.transaction():
            connection.execute("SELECT pg_advisory_xact_lock(%s)", [_MIGRATION_LOCK])
            connection.execute(_SETTINGS)
            found = self._version(connection)  # another process may have migrated during the wait
            if found == 0:
                connection.execute("CREATE SCHEMA IF NOT EXISTS viaticum")
                connection.execute("CREATE TABLE IF NOT EXISTS version (number INTEGER NOT NULL)")
                connection.execute(
                    "INSERT INTO version (number) SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM version)"
                )
            for step in schema.MIGRATIONS[found:]:
                connection.execute(step)
            connection.execute("UPDATE version SET number = %s", [schema.VERSION])

    def _version(self, connection: psycopg.Connection[Row]) -> int:
        """The schema version, 0 for no ledger. Raises `LedgerError` for a newer version."""
        # Not to_regclass(): after a wait for a lock, it may answer from a cache that predates the table.
        query = "SELECT 1 AS found FROM pg_tables WHERE schemaname = 'viaticum' AND tablename = 'version'"
        if connection.execute(query).fetchone() is None:
            return 0
        row = connection.execute("SELECT number FROM viaticum.version").fetchone()
        found = int(row["number"]) if row else 0
        if found > schema.VERSION:
            raise LedgerError(
                f"the ledger {self._name} has version {found}, newer than {schema.VERSION}, which this "
                f"viaticum "
                "knows; upgrade viaticum"
            )
        return found

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        psycopg = _psycopg()
        try:
            yield
        except psycopg.errors.DiskFull as error:
            raise LedgerError(
                f"the ledger {self._name} cannot grow: {one_line(error)}; free some disk space"
            ) from error
        except psycopg.errors.ReadOnlySqlTransaction as error:
            raise LedgerError(
                f"the ledger {self._name} cannot be written: {one_line(error)}; use the primary server"
            ) from error
        except (psycopg.errors.DataCorrupted, psycopg.errors.IndexCorrupted) as error:
            raise LedgerError(
                f"the ledger {self._name} is damaged: {one_line(error)}; restore it from a copy"
            ) from error
        except psycopg.OperationalError as error:
            raise LedgerError(
                f"the ledger {self._name} cannot be reached: {one_line(error)}; check address, rights and "
                f"server"
            ) from error
        except psycopg.Error as error:
            raise LedgerError(f"the ledger {self._name} failed: {one_line(error)}") from error


def _psycopg() -> Any:
    try:
        import psycopg
    except ImportError:
        raise MissingExtra("psycopg", "postgres") from None
    return psycopg


def _is_retryable(error: BaseException) -> bool:
    """Whether a race or the connection was lost; after a commit without a reply, the retry finds its key."""
    psycopg = _psycopg()
    if not isinstance(error, psycopg.Error):
        return False
    # Without an SQLSTATE the server did not answer at all.
    lost = isinstance(error, psycopg.OperationalError) and error.sqlstate is None
    return lost or (error.sqlstate or "").startswith(_RETRYABLE)


def _to_psycopg_parameters(sql: str) -> str:
    """Replace `?` by psycopg's `%s`. No statement of the ledger contains either character otherwise."""
    return sql.replace("?", "%s")


def _without_password(address: str) -> str:
    psycopg = _psycopg()
    try:
        parts = psycopg.conninfo.conninfo_to_dict(address)
    except psycopg.ProgrammingError:  # its message repeats the address with the password
        raise LedgerError(
            "not an address of a Postgres database; write postgresql://user@host:port/database"
        ) from None
    return f"postgresql://{parts.get('host', '')}:{parts.get('port', 5432)}/{parts.get('dbname', '')}"
