"""Alters the tables of a ledger behind its back, for the tests of what `verify` finds."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import psycopg


def alter_sqlite(path: Path, *statements: str) -> None:
    """Run the statements without guards, which are then made again as they were."""
    with closing(sqlite3.connect(path, isolation_level=None)) as shell:
        triggers = shell.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            shell.execute(f"DROP TRIGGER {name}")
        shell.execute("PRAGMA writable_schema = ON")
        for statement in statements:
            shell.execute(statement)
        shell.execute("PRAGMA writable_schema = RESET")
        for _, sql in triggers:
            shell.execute(sql)


def alter_postgres(address: str, *statements: str) -> None:
    with psycopg.connect(address, autocommit=True) as shell:
        shell.execute("SET search_path TO viaticum")
        shell.execute("SET session_replication_role TO replica")
        for statement in statements:
            shell.execute(statement)


def alter(address: str, *statements: str) -> None:
    if address.startswith("postgresql"):
        alter_postgres(address, *statements)
    else:
        alter_sqlite(Path(address), *statements)
