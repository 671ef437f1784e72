"""Select the store for an address. Leaves out what a store does: see `store`."""

from __future__ import annotations

import os
from pathlib import Path

from viaticum.budgets.memory import MemoryStore
from viaticum.budgets.sqlite import SqliteStore
from viaticum.budgets.store import Store


def open_store(where: str | os.PathLike[str], *, read_only: bool = False) -> Store:
    """Open an SQLite file by path, a `postgresql://` address, or `memory:`."""
    text = os.fspath(where)
    if text.startswith(("postgresql://", "postgres://")):
        from viaticum.budgets.postgres import PostgresStore  # psycopg is an optional dependency

        return PostgresStore(text, read_only=read_only)
    if text == "memory:":
        return MemoryStore()
    return SqliteStore(Path(text).absolute(), read_only=read_only)
