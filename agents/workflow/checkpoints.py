"""The workflow's checkpoints in an SQLite file, or in a Postgres database (extra `postgres`).

In a file every write survives the end of the process. Writes that a charge depends on survive a power cut as
well: the workflow calls `sync` before it reserves. What follows the last hold can be recovered from the
ledger, so no other write waits for the disk; benchmarks/workflow.py measures what that saves.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import weakref
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, LiteralString

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.sqlite import SqliteSaver

from viaticum.errors import ClientClosed, LedgerError, MissingExtra, one_line
from viaticum.files import private_file

COMPRESS_FROM = 4096  # bytes
BUSY_SECONDS = 30.0  # how long a process waits for the write of another one


class CompressedSerializer(SerializerProtocol):
    """LangGraph's serializer, with long values compressed by zlib.

    A question has about five checkpoints, and each repeats the prompt and the text in full: 32,000 tokens of
    prompt are otherwise a megabyte. Values that were stored uncompressed are still read.
    """

    SUFFIX = "+zlib"

    def __init__(self) -> None:
        self._inner = JsonPlusSerializer()

    def dumps_typed(self, obj: Any) -> tuple[str, bytes]:
        kind, data = self._inner.dumps_typed(obj)
        if len(data) < COMPRESS_FROM:
            return kind, data
        return kind + self.SUFFIX, zlib.compress(data, 1)

    def loads_typed(self, data: tuple[str, bytes]) -> Any:
        kind, value = data
        if kind.endswith(self.SUFFIX):
            kind, value = kind.removesuffix(self.SUFFIX), zlib.decompress(value)
        return self._inner.loads_typed((kind, value))


def is_postgres(where: str | Path) -> bool:
    return str(where).startswith(("postgresql://", "postgres://"))


class FileSaver(SqliteSaver):
    """LangGraph's checkpoints in a file, flushed to the disk by `sync` only.

    No SQLite connection may be used across a fork: it is closed before one, and both processes open their own
    at the next use.
    """

    def __init__(self, where: str | Path) -> None:
        self._where, self._closed = where, False
        self._connection: sqlite3.Connection | None = None
        super().__init__(self._open(where), serde=CompressedSerializer())
        self.setup()
        with _savers_lock:
            _savers.add(self)

    @property
    def conn(self) -> sqlite3.Connection:
        if self._connection is None:
            if self._closed:
                raise ClientClosed("the checkpoints of this client are closed; open another one")
            self._connection = self._open(self._where)
        return self._connection

    @conn.setter
    def conn(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    @staticmethod
    def _open(where: str | Path) -> sqlite3.Connection:
        if where not in ("", ":memory:"):
            private_file(where)
        connection = sqlite3.connect(where, check_same_thread=False, timeout=BUSY_SECONDS)
        connection.execute("PRAGMA synchronous = NORMAL")
        return connection

    def close(self) -> None:
        with self.lock:
            self._closed = True
            self._disconnect()

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def sync(self) -> None:
        """Return when all checkpoints so far are on the disk: a full-sync write flushes earlier ones too."""
        with self.lock:
            self.conn.execute("PRAGMA synchronous = FULL")
            try:
                self.conn.execute("PRAGMA user_version = 1")
            finally:
                self.conn.execute("PRAGMA synchronous = NORMAL")


_savers: weakref.WeakSet[FileSaver] = weakref.WeakSet()
_savers_lock = threading.Lock()
_locked_for_fork: list[FileSaver] = []


def _before_fork() -> None:
    _savers_lock.acquire()
    for saver in list(_savers):
        saver.lock.acquire()
        _locked_for_fork.append(saver)
        saver._disconnect()


def _after_fork() -> None:
    while _locked_for_fork:
        _locked_for_fork.pop().lock.release()
    _savers_lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)


@contextmanager
def open_checkpoints(where: str | Path, concurrency: int) -> Iterator[BaseCheckpointSaver[Any]]:
    """Open the checkpoints in a file, or at a `postgresql://` address.

    concurrency: runs at the same time; the size of the Postgres connection pool, at least 2.
    """
    if is_postgres(where):
        with _postgres(str(where), concurrency) as saver:
            yield saver
        return
    saver = FileSaver(where)
    try:
        yield saver
    finally:
        saver.close()


def storable(value: Any) -> Any:
    """The value; a text with U+FFFD in place of each NUL, as it reads after a resume from Postgres."""
    return value.replace("\0", "\ufffd") if isinstance(value, str) else value


@contextmanager
def _postgres(address: str, concurrency: int) -> Iterator[BaseCheckpointSaver[Any]]:
    try:
        import psycopg
        from langgraph.checkpoint.postgres import PostgresSaver
        from psycopg.rows import DictRow, dict_row
        from psycopg_pool import ConnectionPool, PoolTimeout
    except ImportError as error:
        raise MissingExtra(error.name or "psycopg", "postgres") from None
    # LangGraph requires of its connections: rows as dicts, autocommit. A prepared statement would be lost in
    # a pool such as PgBouncer, which gives each transaction another connection.
    settings = {"autocommit": True, "prepare_threshold": None, "row_factory": dict_row}
    pool: ConnectionPool[psycopg.Connection[DictRow]] = ConnectionPool(
        address,
        min_size=1,
        max_size=max(2, concurrency),
        kwargs=settings,
        open=False,
        check=ConnectionPool.check_connection,  # a server, or a pool between, drops idle ones
    )
    try:
        pool.open(wait=True, timeout=BUSY_SECONDS)

        class Saver(PostgresSaver):
            """LangGraph's, for texts with NUL, which Postgres refuses in JSON: see `storable`."""

            def put(self, config: Any, checkpoint: Any, metadata: Any, new_versions: Any) -> Any:
                values = {name: storable(value) for name, value in checkpoint["channel_values"].items()}
                stored: Any = {**checkpoint, "channel_values": values}
                return super().put(config, stored, metadata, new_versions)

            @contextmanager
            def _cursor(self, *, pipeline: bool = False) -> Iterator[Any]:
                try:
                    with super()._cursor(pipeline=pipeline) as cursor:
                        yield cursor
                except psycopg.Error as error:
                    raise LedgerError(
                        f"the checkpoints in Postgres failed: {one_line(error)}; check the server and go on "
                        "with the same thread"
                    ) from error

        saver = Saver(pool, serde=CompressedSerializer())
        # One process at a time, by a lock that ends with its transaction: a pool keeps no session. Not
        # pg_advisory_xact_lock: who waits in it blocks CREATE INDEX CONCURRENTLY of who holds it. The number
        # stands in the statement: one with parameters would keep its snapshot, and block it too.
        is_set_up = False
        while not is_set_up:
            with pool.connection() as connection, connection.transaction():
                lock: LiteralString = "SELECT pg_try_advisory_xact_lock(1986098281) AS acquired"
                if _acquired(connection.execute(lock)):
                    saver.setup()
                    is_set_up = True
            if not is_set_up:
                time.sleep(0.05)
        yield saver
    except PoolTimeout:
        raise LedgerError(
            "the Postgres server for the checkpoints does not answer; check its address"
        ) from None
    finally:
        pool.close()


def _acquired(cursor: Any) -> bool:
    return bool(cursor.fetchone()["acquired"])
