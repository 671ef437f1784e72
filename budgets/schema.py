"""The tables of the ledger file, as numbered migrations.

`MIGRATIONS[n]` takes a file from version n to n + 1; the version is SQLite's user_version. A migration
that has shipped is never edited: add another. Leaves out opening files and transactions: see `store`.
"""

from __future__ import annotations

from collections.abc import Callable

from sqlite_utils import Database

APPLICATION_ID = 0x56494154  # "VIAT": marks the file as ours, also for file(1)


def budgets_holds_entries(db: Database) -> None:
    """Version 1: what was allowed, what is set aside, and what happened."""
    for statement in (_BUDGETS, _HOLDS, _ENTRIES, *_INDEXES, *_GUARDS):
        db.execute(statement)


MIGRATIONS: tuple[Callable[[Database], None], ...] = (budgets_holds_entries,)
VERSION = len(MIGRATIONS)


def version(db: Database) -> int:
    found: int = db.execute("PRAGMA user_version").fetchone()[0]
    return found


def migrate(db: Database) -> None:
    """Bring the tables to `VERSION`. Call it inside a write transaction: all steps hold or none does."""
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    for step in MIGRATIONS[version(db) :]:
        step(db)
    db.execute(f"PRAGMA user_version = {VERSION}")


# The totals repeat what entries say, so that a reservation reads one row; `Ledger.check` compares them.
_BUDGETS = """
CREATE TABLE budgets (
  name TEXT PRIMARY KEY,
  limit_nanousd INTEGER CHECK (limit_nanousd > 0),
  limit_tokens INTEGER CHECK (limit_tokens > 0),
  posted_nanousd INTEGER NOT NULL DEFAULT 0 CHECK (posted_nanousd >= 0),
  held_nanousd INTEGER NOT NULL DEFAULT 0 CHECK (held_nanousd >= 0),
  posted_tokens INTEGER NOT NULL DEFAULT 0 CHECK (posted_tokens >= 0),
  held_tokens INTEGER NOT NULL DEFAULT 0 CHECK (held_tokens >= 0),
  CHECK (limit_nanousd IS NOT NULL OR limit_tokens IS NOT NULL)
) STRICT
"""

_HOLDS = """
CREATE TABLE holds (
  key TEXT PRIMARY KEY,
  budget TEXT NOT NULL REFERENCES budgets (name),
  state TEXT NOT NULL CHECK (state IN ('reserved', 'posted', 'void')),
  held_nanousd INTEGER NOT NULL CHECK (held_nanousd >= 0),
  held_tokens INTEGER NOT NULL CHECK (held_tokens >= 0),
  usage TEXT NOT NULL,
  prices TEXT NOT NULL,
  created TEXT NOT NULL,
  result TEXT
) STRICT
"""

_ENTRIES = """
CREATE TABLE entries (
  id INTEGER PRIMARY KEY,
  budget TEXT NOT NULL REFERENCES budgets (name),
  key TEXT REFERENCES holds (key),
  kind TEXT NOT NULL CHECK (kind IN ('limit', 'reserve', 'post', 'void')),
  nanousd INTEGER NOT NULL CHECK (nanousd >= 0),
  tokens INTEGER NOT NULL CHECK (tokens >= 0),
  overrun INTEGER NOT NULL CHECK (overrun >= 0),
  at TEXT NOT NULL,
  usage TEXT NOT NULL,
  CHECK ((key IS NULL) = (kind = 'limit'))
) STRICT
"""

_INDEXES = (
    "CREATE INDEX holds_by_budget ON holds (budget, state)",
    "CREATE INDEX entries_by_budget ON entries (budget)",
    "CREATE UNIQUE INDEX one_reserve_a_key ON entries (key) WHERE kind = 'reserve'",
    "CREATE UNIQUE INDEX one_end_a_key ON entries (key) WHERE kind IN ('post', 'void')",
)

# REPLACE deletes without firing delete triggers on connections that leave recursive_triggers off,
# hence the guard on INSERT.
_GUARDS = (
    """
    CREATE TRIGGER entries_are_not_replaced BEFORE INSERT ON entries
    WHEN EXISTS (SELECT 1 FROM entries WHERE id = NEW.id)
      OR (NEW.kind = 'reserve' AND EXISTS (SELECT 1 FROM entries WHERE key = NEW.key AND kind = 'reserve'))
      OR (NEW.kind IN ('post', 'void')
          AND EXISTS (SELECT 1 FROM entries WHERE key = NEW.key AND kind IN ('post', 'void')))
    BEGIN SELECT RAISE(ABORT, 'entries are append-only'); END
    """,
    """
    CREATE TRIGGER entries_are_not_updated BEFORE UPDATE ON entries
    BEGIN SELECT RAISE(ABORT, 'entries are append-only'); END
    """,
    """
    CREATE TRIGGER entries_are_not_deleted BEFORE DELETE ON entries
    BEGIN SELECT RAISE(ABORT, 'entries are append-only'); END
    """,
    """
    CREATE TRIGGER holds_end_once BEFORE UPDATE ON holds
    WHEN (OLD.state <> 'reserved' AND NEW.state <> OLD.state)
      OR (OLD.result IS NOT NULL AND NEW.result IS NOT OLD.result)
      OR NEW.key <> OLD.key OR NEW.budget <> OLD.budget
      OR NEW.held_nanousd <> OLD.held_nanousd OR NEW.held_tokens <> OLD.held_tokens
      OR NEW.usage <> OLD.usage OR NEW.prices <> OLD.prices OR NEW.created <> OLD.created
    BEGIN SELECT RAISE(ABORT, 'a hold ends once and keeps its terms'); END
    """,
    """
    CREATE TRIGGER holds_are_not_deleted BEFORE DELETE ON holds
    BEGIN SELECT RAISE(ABORT, 'holds are kept'); END
    """,
    """
    CREATE TRIGGER budgets_are_not_deleted BEFORE DELETE ON budgets
    BEGIN SELECT RAISE(ABORT, 'budgets are kept'); END
    """,
)
