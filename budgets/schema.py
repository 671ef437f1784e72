"""Tables of the SQLite ledger file, as numbered migrations.

`MIGRATIONS[n]` takes a file from version n to n + 1; the version is SQLite's user_version. A released
migration is never edited: add another. Leaves out opening files and transactions: see `sqlite`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cache
from typing import Any, cast

from sqlite_utils import Database

from viaticum.budgets.chain import columns_hash, result_hash
from viaticum.budgets.records import costs
from viaticum.budgets.serialization import json_text, prices_from, usage_from, usage_text
from viaticum.budgets.store import ENTRY_COLUMNS, GENESIS_HASH, EntryColumns, Objects
from viaticum.errors import one_line

APPLICATION_ID = 0x56494154  # "VIAT": identifies the file format, also to file(1)


def budgets_holds_entries(db: Database) -> None:
    """Version 1: budgets, holds and entries."""
    for statement in (_BUDGETS, _HOLDS, _ENTRIES, *_INDEXES, *_GUARDS):
        db.execute(statement)


def scopes_states_chain(db: Database) -> None:
    """Version 2: nested scopes, windows, all states of a hold, hash-chained entries, views."""
    for table in ("entries", "holds", "budgets"):
        db.rename_table(table, f"{table}_1")
    for statement in (_BUDGETS_2, _BUCKETS_2, _HOLDS_2, _ENTRIES_2):
        db.execute(statement)
    db.execute(_COPY_BUDGETS)
    db.execute(_COPY_HOLDS)
    heads: dict[str, dict[str, Any]] = {}
    db.table("entries").insert_all(_chained_entries(db, heads))
    for root, head in heads.items():
        db.table("budgets").update(root, head)
    for table in ("entries", "holds", "budgets"):
        db.table(f"{table}_1").drop()
    for statement in (*_INDEXES_2, *_GUARDS_2, *VIEWS_2):
        db.execute(statement)


def _chained_entries(db: Database, heads: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Version 1 entries with what that version did not store: hash chain, prices and costs by model.

    Leaves the end of each chain, as columns of its budget, in `heads`.
    """
    query = (
        "SELECT e.*, h.prices, h.result FROM entries_1 e LEFT JOIN holds_1 h ON h.key = e.key ORDER BY e.id"
    )
    for row in db.query(query):
        result = row.pop("result")
        head = heads.get(row["budget"], {"entries": 0, "head": GENESIS_HASH})
        usage, prices = usage_from(row["usage"]), row["prices"] or "{}"
        note: dict[str, Any] = {}
        if row["kind"] == "post":
            note["costs"] = costs(usage, prices_from(prices))
        if row["kind"] == "reserve" and result is not None:
            note["result"] = result_hash(result)
        row |= {"usage": usage_text(usage), "prices": prices, "note": json_text(note)}
        row |= {"root": row["budget"], "number": head["entries"] + 1}
        columns = cast(EntryColumns, tuple(row[name] for name in ENTRY_COLUMNS))
        row["hash"] = columns_hash(head["head"], columns)
        heads[row["root"]] = {"entries": row["number"], "head": row["hash"], "last_at": row["at"]}
        yield row


def entries_of_clocks(db: Database) -> None:
    """Version 3: entries of kind `clock`."""
    for name in ("spend_by_scope", "spend_by_model", "spend_by_strategy", "spend_by_day"):
        db.execute(f"DROP VIEW {name}")
    db.rename_table("entries", "entries_2")  # its indexes and guards go with it
    db.execute(_ENTRIES_3)
    db.execute("INSERT INTO entries SELECT * FROM entries_2 ORDER BY id")
    db.table("entries_2").drop()
    for statement in (*_ENTRY_INDEXES_2, *_ENTRY_GUARDS_2, *VIEWS_2):
        db.execute(statement)


def leases_of_threads(db: Database) -> None:
    """Version 4: who works on what; no part of what was spent."""
    db.execute(_LEASES_4)


def labels_of_budgets(db: Database) -> None:
    """Version 5: labels of models, one of which a model has to have to be paid from a budget."""
    db.execute("ALTER TABLE budgets ADD COLUMN only_labels TEXT NOT NULL DEFAULT ''")


MIGRATIONS: tuple[Callable[[Database], None], ...] = (
    budgets_holds_entries,
    scopes_states_chain,
    entries_of_clocks,
    leases_of_threads,
    labels_of_budgets,
)
VERSION = len(MIGRATIONS)


def version(db: Database) -> int:
    found: int = db.execute("PRAGMA user_version").fetchone()[0]
    return found


def migrate(db: Database) -> None:
    """Bring the tables to `VERSION`. Needs a write transaction, so that all migrations apply or none."""
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    for step in MIGRATIONS[version(db) :]:
        step(db)
    db.execute(f"PRAGMA user_version = {VERSION}")


def objects(db: Database) -> Objects:
    """The definitions of all tables, indexes, triggers and views."""
    rows = db.execute("SELECT type, name, sql FROM sqlite_schema WHERE sql IS NOT NULL").fetchall()
    return {(kind, name): one_line(sql) for kind, name, sql in rows}  # a dump trims its statements


@cache
def expected_objects() -> Objects:
    """What the migrations make of an empty file."""
    with closing(Database(memory=True, execute_plugins=False)) as db:
        migrate(db)
        return objects(db)


# Version 1. The totals are derivable from the entries; with them a reservation reads one row, and
# `Ledger.check` compares both.
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

# REPLACE deletes rows without firing delete triggers on connections with recursive_triggers off,
# hence the trigger on INSERT.
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

# Version 2. `lease` is in seconds, `until` is its end; a version 1 hold has no lease and never expires.
# `created` is the time of the hold's first entry; version 1 read it from the clock a moment later.
_BUDGETS_2 = f"""
CREATE TABLE budgets (
  name TEXT PRIMARY KEY,
  parent TEXT REFERENCES budgets (name),
  root TEXT NOT NULL,
  depth INTEGER NOT NULL CHECK (depth >= 0),
  limit_nanousd INTEGER CHECK (limit_nanousd > 0),
  limit_tokens INTEGER CHECK (limit_tokens > 0),
  time_window TEXT NOT NULL DEFAULT '',
  state TEXT NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'paused', 'closed')),
  posted_nanousd INTEGER NOT NULL DEFAULT 0 CHECK (posted_nanousd >= 0),
  held_nanousd INTEGER NOT NULL DEFAULT 0 CHECK (held_nanousd >= 0),
  posted_tokens INTEGER NOT NULL DEFAULT 0 CHECK (posted_tokens >= 0),
  held_tokens INTEGER NOT NULL DEFAULT 0 CHECK (held_tokens >= 0),
  entries INTEGER NOT NULL DEFAULT 0,
  head TEXT NOT NULL DEFAULT '{GENESIS_HASH}',
  last_at TEXT NOT NULL DEFAULT '',
  CHECK (limit_nanousd IS NOT NULL OR limit_tokens IS NOT NULL OR parent IS NOT NULL)
) STRICT
"""

# Amounts posted to a scope and its descendants, by the bucket of its window.
_BUCKETS_2 = """
CREATE TABLE buckets (
  budget TEXT NOT NULL REFERENCES budgets (name),
  bucket INTEGER NOT NULL,
  nanousd INTEGER NOT NULL,
  tokens INTEGER NOT NULL,
  PRIMARY KEY (budget, bucket)
) STRICT, WITHOUT ROWID
"""

_HOLDS_2 = """
CREATE TABLE holds (
  key TEXT PRIMARY KEY,
  budget TEXT NOT NULL REFERENCES budgets (name),
  state TEXT NOT NULL
    CHECK (state IN ('reserved', 'dispatched', 'posted', 'void', 'expired', 'unknown')),
  held_nanousd INTEGER NOT NULL CHECK (held_nanousd >= 0),
  held_tokens INTEGER NOT NULL CHECK (held_tokens >= 0),
  usage TEXT NOT NULL,
  prices TEXT NOT NULL,
  created TEXT NOT NULL,
  result TEXT,
  parameters TEXT NOT NULL,
  tags TEXT NOT NULL,
  lease INTEGER NOT NULL,
  until TEXT NOT NULL
) STRICT, WITHOUT ROWID
"""

_ENTRIES_2 = """
CREATE TABLE entries (
  id INTEGER PRIMARY KEY,
  budget TEXT NOT NULL REFERENCES budgets (name),
  key TEXT REFERENCES holds (key),
  kind TEXT NOT NULL CHECK (kind IN ('limit', 'pause', 'resume', 'close', 'reserve', 'dispatch', 'result',
    'post', 'void', 'expire', 'unknown')),
  nanousd INTEGER NOT NULL CHECK (nanousd >= 0),
  tokens INTEGER NOT NULL CHECK (tokens >= 0),
  overrun INTEGER NOT NULL CHECK (overrun >= 0),
  at TEXT NOT NULL,
  usage TEXT NOT NULL,
  prices TEXT NOT NULL,
  note TEXT NOT NULL,
  root TEXT NOT NULL REFERENCES budgets (name),
  number INTEGER NOT NULL,
  hash TEXT NOT NULL,
  CHECK ((key IS NULL) = (kind IN ('limit', 'pause', 'resume', 'close')))
) STRICT
"""

_ENTRIES_3 = _ENTRIES_2.replace("'close', 'reserve'", "'close', 'clock', 'reserve'").replace(
    "'resume', 'close')))", "'resume', 'close', 'clock')))"
)

_LEASES_4 = """
CREATE TABLE leases (
  name TEXT PRIMARY KEY,
  owner TEXT NOT NULL,
  until TEXT NOT NULL
) STRICT, WITHOUT ROWID
"""

_COPY_BUDGETS = """
INSERT INTO budgets (name, root, depth, limit_nanousd, limit_tokens,
  posted_nanousd, held_nanousd, posted_tokens, held_tokens)
SELECT name, name, 0, limit_nanousd, limit_tokens,
  posted_nanousd, held_nanousd, posted_tokens, held_tokens FROM budgets_1
"""

_COPY_HOLDS = """
INSERT INTO holds (key, budget, state, held_nanousd, held_tokens, usage, prices, created, result,
  parameters, tags, lease, until)
SELECT key, budget, state, held_nanousd, held_tokens, usage, prices,
  coalesce((SELECT at FROM entries_1 e WHERE e.key = h.key AND e.kind = 'reserve'), created), result,
  '', '{}', 0, '9999' FROM holds_1 h ORDER BY rowid
"""

# Each index costs one more page write per call, so ended holds and the entries of one scope are found
# through their tree instead.
_ENTRY_INDEXES_2 = (
    "CREATE UNIQUE INDEX one_place_in_the_chain ON entries (root, number)",
    "CREATE UNIQUE INDEX one_reserve_a_key ON entries (key) WHERE kind = 'reserve'",
    "CREATE UNIQUE INDEX one_end_a_key ON entries (key) WHERE kind IN ('post', 'void', 'expire')",
)
_INDEXES_2 = (
    "CREATE INDEX budgets_by_parent ON budgets (parent)",
    "CREATE INDEX open_holds ON holds (budget, state, until)"
    " WHERE state IN ('reserved', 'dispatched', 'unknown')",
    *_ENTRY_INDEXES_2,
)

_ENTRY_GUARDS_2 = (
    """
    CREATE TRIGGER entries_are_not_replaced BEFORE INSERT ON entries
    WHEN EXISTS (SELECT 1 FROM entries WHERE id = NEW.id)
      OR EXISTS (SELECT 1 FROM entries WHERE root = NEW.root AND number = NEW.number)
      OR (NEW.kind = 'reserve' AND EXISTS (SELECT 1 FROM entries WHERE key = NEW.key AND kind = 'reserve'))
      OR (NEW.kind IN ('post', 'void', 'expire')
          AND EXISTS (SELECT 1 FROM entries WHERE key = NEW.key AND kind IN ('post', 'void', 'expire')))
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
)
_GUARDS_2 = (
    *_ENTRY_GUARDS_2,
    """
    CREATE TRIGGER holds_end_once BEFORE UPDATE ON holds
    WHEN (OLD.state IN ('posted', 'void', 'expired') AND NEW.state <> OLD.state)
      OR (OLD.state <> 'reserved' AND NEW.state IN ('reserved', 'expired') AND NEW.state <> OLD.state)
      OR (OLD.state = 'unknown' AND NEW.state = 'dispatched')
      OR (OLD.result IS NOT NULL AND NEW.result IS NOT OLD.result)
      OR NEW.key <> OLD.key OR NEW.budget <> OLD.budget
      OR NEW.held_nanousd <> OLD.held_nanousd OR NEW.held_tokens <> OLD.held_tokens
      OR NEW.usage <> OLD.usage OR NEW.prices <> OLD.prices OR NEW.created <> OLD.created
      OR NEW.parameters <> OLD.parameters OR NEW.tags <> OLD.tags OR NEW.lease <> OLD.lease
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

# For datasette and other readers. Dollars are floating-point numbers here: for display, not for sums.
VIEWS_2 = (
    """
    CREATE VIEW spend_by_scope AS
    SELECT name, parent, state, time_window,
      limit_nanousd / 1e9 AS limit_usd, posted_nanousd / 1e9 AS posted_usd, held_nanousd / 1e9 AS held_usd,
      limit_tokens, posted_tokens, held_tokens
    FROM budgets ORDER BY name
    """,
    """
    CREATE VIEW spend_by_model AS
    SELECT cost.key AS model, count(*) AS calls, sum(cost.value) / 1e9 AS usd,
      sum(json_extract(used.value, '$.input_tokens')) AS input_tokens,
      sum(json_extract(used.value, '$.output_tokens')) AS output_tokens
    FROM entries e, json_each(e.note, '$.costs') cost, json_each(e.usage) used
    WHERE e.kind = 'post' AND used.key = cost.key GROUP BY cost.key ORDER BY cost.key
    """,
    """
    CREATE VIEW spend_by_strategy AS
    SELECT coalesce(json_extract(note, '$.tags.strategy'), '') AS strategy, count(*) AS calls,
      sum(nanousd) / 1e9 AS usd, sum(tokens) AS tokens
    FROM entries WHERE kind = 'post' GROUP BY 1 ORDER BY 1
    """,
    """
    CREATE VIEW spend_by_day AS
    SELECT substr(at, 1, 10) AS day, count(*) AS calls, sum(nanousd) / 1e9 AS usd, sum(tokens) AS tokens
    FROM entries WHERE kind = 'post' GROUP BY 1 ORDER BY 1
    """,
)
