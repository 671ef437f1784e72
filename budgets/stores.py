"""The stores there are, and which one an address means. Leaves out what a store does: see `store`."""

from __future__ import annotations

import os
from pathlib import Path

from viaticum.budgets.memory import MemoryStore
from viaticum.budgets.sqlite import SqliteStore
from viaticum.budgets.store import Store


def open_store(where: str | os.PathLike[str], *, read_only: bool = False) -> Store:
    """A path of an SQLite file, a `postgresql://` address, or `memory:`."""
    text = os.fspath(where)
    if text.startswith(("postgresql://", "postgres://")):
        from viaticum.budgets.postgres import PostgresStore  # needs an extra

        return PostgresStore(text, read_only=read_only)
    if text == "memory:":
        return MemoryStore()
    return SqliteStore(Path(text).absolute(), read_only=read_only)
