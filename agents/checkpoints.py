"""Where the workflow's checkpoints lie: an SQLite file, or a Postgres database (extra `postgres`)."""

from __future__ import annotations

import sqlite3
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


@contextmanager
def open_checkpoints(where: str | Path, concurrency: int) -> Iterator[BaseCheckpointSaver[Any]]:
    """Checkpoints in the file, or at the `postgresql://` address, for so many runs at a time."""
    if is_postgres(where):
        with _postgres(str(where), concurrency) as saver:
            yield saver
        return
    connection = sqlite3.connect(where, check_same_thread=False, timeout=BUSY_SECONDS)
    try:
        yield SqliteSaver(connection)
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
            connection.execute("SELECT pg_advisory_lock(%s)", (SETUP_LOCK,))
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
