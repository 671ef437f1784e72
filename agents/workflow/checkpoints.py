"""Where the workflow's checkpoints lie: an SQLite file, or a Postgres database (extra `postgres`).

In a file every write survives the end of the process, and what a charge depends on a power cut, too: the workflow calls
`sync` before it holds money. What comes after the last hold can be made again from the ledger, so nothing else waits
for the disk; see benchmarks/workflow.py for what that saves.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.sqlite import SqliteSaver

from viaticum.errors import LedgerError, MissingExtra

SETUP_LOCK = 0x7661_7469  # of Postgres, while the tables are made
BUSY_SECONDS = 30.0  # that a process waits for another one's write


def is_postgres(where: str | Path) -> bool:
    return str(where).startswith(("postgresql://", "postgres://"))


class FileSaver(SqliteSaver):
    """LangGraph's checkpoints in a file, which waits for the disk when it is told to."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        super().__init__(connection)
        self.setup()
        connection.execute("PRAGMA synchronous = NORMAL")

    def sync(self) -> None:
        """Return when all checkpoints so far are on the disk: a write that waits carries those before it along."""
        with self.lock:
            self.conn.execute("PRAGMA synchronous = FULL")
            try:
                self.conn.execute("PRAGMA user_version = 1")
            finally:
                self.conn.execute("PRAGMA synchronous = NORMAL")


@contextmanager
def open_checkpoints(where: str | Path, concurrency: int) -> Iterator[BaseCheckpointSaver[Any]]:
    """Checkpoints in the file, or at the `postgresql://` address, for so many runs at a time."""
    if is_postgres(where):
        with _postgres(str(where), concurrency) as saver:
            yield saver
        return
    connection = sqlite3.connect(where, check_same_thread=False, timeout=BUSY_SECONDS)
    try:
        yield FileSaver(connection)
    finally:
        connection.close()


@contextmanager
def _postgres(address: str, concurrency: int) -> Iterator[BaseCheckpointSaver[Any]]:
    try:
        import psycopg
        from langgraph.checkpoint.postgres import PostgresSaver
        from psycopg.rows import DictRow, dict_row
        from psycopg_pool import ConnectionPool, PoolTimeout
    except ImportError as error:
        raise MissingExtra(error.name or "psycopg", "postgres") from None
    # What LangGraph asks of its connections: rows as dicts, each statement its own transaction, none prepared.
    settings = {"autocommit": True, "prepare_threshold": 0, "row_factory": dict_row}
    pool: ConnectionPool[psycopg.Connection[DictRow]] = ConnectionPool(
        address, min_size=1, max_size=max(2, concurrency), kwargs=settings, open=False
    )
    try:
        pool.open(wait=True, timeout=BUSY_SECONDS)
        saver = PostgresSaver(pool)
        with pool.connection() as connection:
            # One process at a time. Not pg_advisory_lock: whoever waits in it stops the one who makes an index.
            while not _said(connection.execute("SELECT pg_try_advisory_lock(%s) AS said", (SETUP_LOCK,))):
                time.sleep(0.05)
            try:
                saver.setup()
            finally:
                connection.execute("SELECT pg_advisory_unlock(%s)", (SETUP_LOCK,))
        yield saver
    except PoolTimeout:
        raise LedgerError(
            "the Postgres server for the checkpoints does not answer; check its address"
        ) from None
    finally:
        pool.close()


def _said(cursor: Any) -> bool:
    return bool(cursor.fetchone()["said"])
