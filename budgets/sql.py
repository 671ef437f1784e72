"""Ledger rows in the SQL that SQLite and Postgres share: one statement per method.

Parameters are written `?`. Leaves out connections, transactions and the differences between the databases:
see `sqlite` and `postgres`; and the tables: see `schema` and `schema_postgres`.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from viaticum.budgets.records import HELD_STATES, Entry, EntryKind, Hold, HoldState
from viaticum.budgets.serialization import json_text, prices_from, prices_text, usage_from, usage_text
from viaticum.budgets.store import ENTRY_COLUMNS, EntryColumns, Rows, Scope
from viaticum.budgets.windows import Window
from viaticum.errors import ViaticumError

Row = dict[str, Any]

_HOLD_COLUMNS = (
    "key, budget, state, held_nanousd, held_tokens, usage, prices, created, result, parameters, tags, lease, "
    "until"
)
_ENTRY_COLUMNS = (
    "id, budget, key, kind, nanousd, tokens, overrun, at, usage, prices, note, root, number, hash"
)
# Repeats the condition of the partial index `open_holds`, so that the database uses that index.
_IS_OPEN = " AND state IN ('reserved', 'dispatched', 'unknown')"
_MAX_PARAMETERS = 500  # of one statement
_HOLD_INSERT = (
    f"INSERT INTO holds ({_HOLD_COLUMNS}) VALUES ({', '.join('?' * len(_HOLD_COLUMNS.split(',')))})"
)
_HOLD_UPDATE = "UPDATE holds SET state = ?, until = ? WHERE key = ?"
_RESULT_UPDATE = "UPDATE holds SET result = ? WHERE key = ?"
_BELOW = """
WITH RECURSIVE below (name) AS (
  SELECT name FROM budgets WHERE name = ?
  UNION ALL SELECT b.name FROM budgets b JOIN below ON b.parent = below.name
)
"""
_ABOVE = """
WITH RECURSIVE above (name, parent, depth) AS (
  SELECT name, parent, depth FROM budgets WHERE name = ?
  UNION ALL SELECT b.name, b.parent, b.depth FROM budgets b JOIN above ON b.name = above.parent
)
SELECT name FROM above ORDER BY depth
"""


class SqlRows(Rows):
    """Rows in SQL. A subclass adds how to run a statement, lock rows and check the files.

    lineages: cache owned by the store, names from root to leaf; a scope's lineage never changes.
    """

    lock_clause = ""

    def __init__(self, lineages: dict[str, tuple[str, ...]]) -> None:
        self._lineages = lineages

    @abstractmethod
    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> None: ...

    @abstractmethod
    def query(self, sql: str, parameters: Sequence[Any] = ()) -> list[Row]: ...

    @abstractmethod
    def stream(self, sql: str, parameters: Sequence[Any] = ()) -> Iterator[Row]:
        """As `query`, but row by row, for results larger than memory."""

    @abstractmethod
    def execute_many(self, sql: str, rows: Sequence[Sequence[Any]]) -> None: ...

    @abstractmethod
    def append(self, columns: EntryColumns, hash: str) -> int: ...

    def scopes(self, root: str | None = None) -> list[Scope]:
        where, values = _where({"root": root})
        return [_scope(row) for row in self.query(f"SELECT * FROM budgets{where} ORDER BY name", values)]

    def lineage(self, name: str) -> list[Scope]:
        names = self._lineages.get(name)
        if names is None:
            names = tuple(row["name"] for row in self.query(_ABOVE, [name]))
            if not names:
                return []
            self._lineages[name] = names
        marks = ", ".join("?" * len(names))
        sql = f"SELECT * FROM budgets WHERE name IN ({marks}) ORDER BY depth{self.lock_clause}"
        return [_scope(row) for row in self.query(sql, names)]

    def insert_scope(self, scope: Scope) -> None:
        self.execute(
            "INSERT INTO budgets (name, parent, root, depth, limit_nanousd, limit_tokens, time_window, state,"
            " only_labels) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                scope.name,
                scope.parent,
                scope.root,
                scope.depth,
                scope.limit_nanousd,
                scope.limit_tokens,
                _window_text(scope),
                scope.state,
                ",".join(scope.only),
            ],
        )

    def update_scope(self, scope: Scope) -> None:
        self.execute(
            "UPDATE budgets SET limit_nanousd = ?, limit_tokens = ?, time_window = ?, state = ? WHERE name "
            "= ?",
            [scope.limit_nanousd, scope.limit_tokens, _window_text(scope), scope.state, scope.name],
        )

    def add_to_totals(self, names: Sequence[str], held: tuple[int, int], posted: tuple[int, int]) -> None:
        marks = ", ".join("?" * len(names))
        self.execute(
            "UPDATE budgets SET held_nanousd = held_nanousd + ?, held_tokens = held_tokens + ?,"
            " posted_nanousd = posted_nanousd + ?, posted_tokens = posted_tokens + ?"
            f" WHERE name IN ({marks})",
            [*held, *posted, *names],
        )

    def set_chain_head(self, root: str, entries: int, head: str, last_at: str) -> None:
        self.execute(
            "UPDATE budgets SET entries = ?, head = ?, last_at = ? WHERE name = ?",
            [entries, head, last_at, root],
        )

    def add_to_bucket(self, name: str, bucket: int, posted: tuple[int, int]) -> None:
        self.execute(
            "INSERT INTO buckets (budget, bucket, nanousd, tokens) VALUES (?, ?, ?, ?)"
            " ON CONFLICT (budget, bucket) DO UPDATE SET"
            " nanousd = buckets.nanousd + excluded.nanousd, tokens = buckets.tokens + excluded.tokens",
            [name, bucket, *posted],
        )

    def clear_buckets(self, name: str) -> None:
        self.execute("DELETE FROM buckets WHERE budget = ?", [name])

    def posted_since(self, name: str, bucket: int) -> tuple[int, int]:
        sql = (
            "SELECT coalesce(sum(nanousd), 0) AS nanousd, coalesce(sum(tokens), 0) AS tokens"
            " FROM buckets WHERE budget = ? AND bucket >= ?"
        )
        row = self.query(sql, [name, bucket])[0]
        return int(row["nanousd"]), int(row["tokens"])

    def buckets(self, name: str) -> dict[int, tuple[int, int]]:
        rows = self.query("SELECT bucket, nanousd, tokens FROM buckets WHERE budget = ?", [name])
        return {row["bucket"]: (row["nanousd"], row["tokens"]) for row in rows}

    def take_lease(self, name: str, owner: str, until: str, now: str, instead_of: str) -> str:
        self.execute(
            "INSERT INTO leases (name, owner, until) VALUES (?, ?, ?) ON CONFLICT (name) DO UPDATE"
            " SET owner = excluded.owner, until = excluded.until"
            " WHERE leases.owner IN (?, ?) OR leases.until < ?",
            [name, owner, until, owner, instead_of, now],
        )
        return str(self.query("SELECT owner FROM leases WHERE name = ?", [name])[0]["owner"])

    def end_lease(self, name: str, owner: str) -> None:
        self.execute("DELETE FROM leases WHERE name = ? AND owner = ?", [name, owner])

    def hold(self, key: str) -> Hold | None:
        rows = self.query(f"SELECT {_HOLD_COLUMNS} FROM holds WHERE key = ?", [key])
        return _hold(rows[0]) if rows else None

    def find(self, keys: Sequence[str]) -> dict[str, Hold]:
        found: dict[str, Hold] = {}
        keys = [key for key in keys if key.isprintable()]  # databases refuse others, and no hold has one
        for start in range(0, len(keys), _MAX_PARAMETERS):
            part = keys[start : start + _MAX_PARAMETERS]
            marks = ", ".join("?" * len(part))
            for row in self.query(f"SELECT {_HOLD_COLUMNS} FROM holds WHERE key IN ({marks})", part):
                found[row["key"]] = _hold(row)
        return found

    def insert_hold(self, hold: Hold) -> None:
        self.insert_holds([hold])

    def insert_holds(self, holds: Sequence[Hold]) -> None:
        self.execute_many(_HOLD_INSERT, [hold_values(hold) for hold in holds])

    def update_hold(self, key: str, state: HoldState, until: str) -> None:
        self.execute(_HOLD_UPDATE, [state, until, key])

    def update_holds(self, holds: Sequence[Hold]) -> None:
        self.execute_many(_HOLD_UPDATE, [(hold.state, hold.until, hold.key) for hold in holds])

    def set_result(self, key: str, result: str) -> None:
        self.execute(_RESULT_UPDATE, [result, key])

    def set_results(self, results: Sequence[tuple[str, str]]) -> None:
        self.execute_many(_RESULT_UPDATE, [(result, key) for key, result in results])

    def holds(self, budget: str | None, state: HoldState | None) -> Iterator[Hold]:
        where, values = _where({"budget": budget, "state": state})
        if state in HELD_STATES:
            where += _IS_OPEN
        sql = f"SELECT {_HOLD_COLUMNS} FROM holds{where} ORDER BY created, key"
        return (_hold(row) for row in self.stream(sql, values))

    def count_holds(self, root: str) -> int:
        sql = "SELECT count(*) AS n FROM holds h JOIN budgets b ON b.name = h.budget WHERE b.root = ?"
        return int(self.query(sql, [root])[0]["n"])

    def expired_holds(self, root: str | None, at: str, states: Sequence[HoldState]) -> list[Hold]:
        marks = ", ".join("?" * len(states))
        sql = f"SELECT {_HOLD_COLUMNS} FROM holds WHERE state IN ({marks}) AND until < ?{_IS_OPEN}"
        values: list[Any] = [*states, at]
        if root is not None:
            sql += " AND budget IN (SELECT name FROM budgets WHERE root = ?)"
            values.append(root)
        return [_hold(row) for row in self.query(f"{sql} ORDER BY created, key", values)]

    def ending_entry(self, key: str) -> Entry | None:
        sql = f"SELECT {_ENTRY_COLUMNS} FROM entries WHERE key = ? AND kind IN ('post', 'void', 'expire')"
        rows = self.query(sql, [key])
        return _entry(rows[0]) if rows else None

    def entries(
        self, budget: str | None, key: str | None, kinds: Sequence[EntryKind] = ()
    ) -> Iterator[Entry]:
        where, values = _where({"budget": budget, "key": key})
        if kinds:
            where += f"{' AND' if where else ' WHERE'} kind IN ({', '.join('?' * len(kinds))})"
            values += kinds
        if budget is not None:
            where += " AND root = (SELECT root FROM budgets WHERE name = ?)"
            values.append(budget)
        sql = f"SELECT {_ENTRY_COLUMNS} FROM entries{where} ORDER BY id"
        return (_entry(row) for row in self.stream(sql, values))

    def chain(self, root: str) -> Iterator[tuple[Entry, str, str, str]]:
        sql = f"SELECT {_ENTRY_COLUMNS} FROM entries WHERE root = ? ORDER BY number, id"
        for row in self.stream(sql, [root]):
            texts = row["usage"], row["prices"], row["note"]
            try:
                entry = _entry(row)
            except (ViaticumError, ValueError, TypeError, AttributeError):
                entry = Entry(**{**row, "usage": {}, "prices": {}, "note": {}})
            yield entry, *texts

    def posts_below(self, name: str, since: str) -> Iterator[Entry]:
        sql = (
            f"{_BELOW}SELECT {_ENTRY_COLUMNS} FROM entries"
            " WHERE root = (SELECT root FROM budgets WHERE name = ?)"
            " AND kind = 'post' AND at >= ? AND budget IN (SELECT name FROM below) ORDER BY number"
        )
        return (_entry(row) for row in self.stream(sql, [name, name, since]))

    def posts_after(self, root: str, number: int) -> Iterator[Entry]:
        sql = (
            f"SELECT {_ENTRY_COLUMNS} FROM entries"
            " WHERE root = ? AND kind = 'post' AND number > ? ORDER BY number"
        )
        return (_entry(row) for row in self.stream(sql, [root, number]))

    def hash_at(self, root: str, number: int) -> str | None:
        rows = self.query("SELECT hash FROM entries WHERE root = ? AND number = ?", [root, number])
        return rows[0]["hash"] if rows else None

    def times(self) -> dict[str, tuple[str, str]]:
        sql = "SELECT budget, min(at) AS began, max(at) AS ended FROM entries GROUP BY budget"
        return {row["budget"]: (row["began"], row["ended"]) for row in self.query(sql)}

    def newest_posts(self, last: int, after: int = 0) -> list[Entry]:
        sql = f"SELECT {_ENTRY_COLUMNS} FROM entries WHERE kind = 'post' AND id > ? ORDER BY id DESC LIMIT ?"
        return [_entry(row) for row in self.query(sql, [after, last])]

    def orphans(self) -> list[str]:
        return [
            f"a budget is missing: {row['budget']!r} is not there, {row['n']} {table} name it"
            for table, column, there in (
                ("entries", "root", "SELECT name FROM budgets WHERE parent IS NULL"),
                ("holds", "budget", "SELECT name FROM budgets"),
                ("buckets", "budget", "SELECT name FROM budgets"),
            )
            for row in self.query(
                f"SELECT {column} AS budget, count(*) AS n FROM {table}"
                f" WHERE {column} NOT IN ({there}) GROUP BY {column} ORDER BY {column}"
            )
        ]


# Columns in the order of `EntryColumns`, then the hash.
ENTRY_INSERT = (
    f"INSERT INTO entries ({', '.join(ENTRY_COLUMNS)}, hash)"
    f" VALUES ({', '.join('?' * (len(ENTRY_COLUMNS) + 1))})"
)


def _where(wanted: dict[str, Any]) -> tuple[str, list[Any]]:
    given = {column: value for column, value in wanted.items() if value is not None}
    conditions = " AND ".join(f"{column} = ?" for column in given)
    return (f" WHERE {conditions}" if given else ""), list(given.values())


def _window_text(scope: Scope) -> str:
    return str(scope.window) if scope.window else ""


def _scope(row: Row) -> Scope:
    values = dict(row)
    window, labels = values.pop("time_window"), values.pop("only_labels")
    only = tuple(labels.split(",")) if labels else ()
    return Scope(**values, window=Window.parse(window) if window else None, only=only)


def hold_values(hold: Hold) -> list[Any]:
    """The columns of a hold, in the order of its table."""
    return [
        hold.key,
        hold.budget,
        hold.state,
        hold.held_nanousd,
        hold.held_tokens,
        usage_text(hold.usage),
        prices_text(hold.prices),
        hold.created,
        hold.result,
        hold.parameters,
        json_text(hold.tags),
        hold.lease,
        hold.until,
    ]


@lru_cache(maxsize=64)  # calls with the same model and strategy have the same tags
def _tags_from(text: str) -> tuple[tuple[str, str], ...]:
    return tuple(json.loads(text).items())


def _hold(row: Row) -> Hold:
    return Hold(
        **{
            **row,
            "usage": usage_from(row["usage"]),
            "prices": prices_from(row["prices"]),
            "tags": dict(_tags_from(row["tags"])),
        }
    )


def _entry(row: Row) -> Entry:
    return Entry(
        **{
            **row,
            "usage": usage_from(row["usage"]),
            "prices": prices_from(row["prices"]),
            "note": json.loads(row["note"]),
        }
    )
