"""`verify` finds every altered row: each column of each row of each table, on SQLite and Postgres."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from ledger_calls import CALL, PRICES, USED, Clock

from viaticum.budgets import Ledger, Window

TABLES = {"budgets": "name", "buckets": "budget", "holds": "key", "entries": "id"}
Execute = Callable[[str, tuple[Any, ...]], list[tuple[Any, ...]]]


def fill(address: str) -> None:
    """Something of every kind: nested scopes, windows, holds in every state, results, tags, a pause."""
    clock = Clock()
    with Ledger(address, clock=clock) as ledger:
        ledger.create("org", limit_nanousd=1000, window=Window("day"))
        ledger.create("run", parent="org", limit_tokens=500)
        for key in ("posted", "void", "expired", "unknown", "dispatched", "reserved"):
            lease = 60 if key in ("expired", "unknown") else 600
            tags = {"strategy": "cot"}
            ledger.reserve("run", key, CALL, PRICES, parameters={"key": key}, tags=tags, lease=lease)
            if key in ("dispatched", "unknown"):
                ledger.dispatch(key)
        clock.wait(seconds=61)
        ledger.expire_leases()
        ledger.settle("posted", USED, '"72"')
        ledger.void("void")
        ledger.attach("dispatched", '"73"')
        ledger.pause("run", "lunch")
        assert ledger.check() == []


def sqlite_shell(path: Path) -> Iterator[Execute]:
    with closing(sqlite3.connect(path, isolation_level=None)) as shell:
        for (trigger,) in shell.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'").fetchall():
            shell.execute(f"DROP TRIGGER {trigger}")
        shell.execute("PRAGMA ignore_check_constraints = ON")
        yield lambda sql, values: shell.execute(sql, values).fetchall()


def postgres_shell(address: str) -> Iterator[Execute]:
    with psycopg.connect(address, autocommit=True) as shell:
        shell.execute("SET search_path TO viaticum")
        shell.execute("SET session_replication_role TO replica")  # no triggers, no foreign keys
        checks = "SELECT conrelid::regclass::text, conname FROM pg_constraint WHERE contype IN ('c', 'f')"
        for table, name in shell.execute(checks).fetchall():
            if table in TABLES:
                shell.execute(f"ALTER TABLE {table} DROP CONSTRAINT {name} CASCADE")  # type: ignore[call-overload]

        def execute(sql: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
            cursor = shell.execute(sql.replace("?", "%s"), values)  # type: ignore[call-overload]
            return cursor.fetchall() if cursor.description else []

        yield execute


def row_findings(ledger: Ledger) -> list[str]:
    """Without the guards that the shell took away."""
    return [finding for finding in ledger.check() if not finding.startswith("the schema was altered")]


@pytest.fixture(params=["sqlite", "postgres"])
def altered(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Execute]]:
    """A ledger that was filled, and a shell on it for someone without scruples."""
    if request.param == "sqlite":
        path = tmp_path / "ledger.db"
        fill(str(path))
        yield from ((str(path), execute) for execute in sqlite_shell(path))
    else:
        address: str = request.getfixturevalue("postgres")
        fill(address)
        yield from ((address, execute) for execute in postgres_shell(address))


def other(value: int | str) -> int | str:
    """Another value of the same type: a number far off, a text with another digit or a letter more."""
    if isinstance(value, int):
        return value + 1000
    digits = [place for place, letter in enumerate(value) if letter.isdigit()]
    if not digits:
        return value + "x"
    place = digits[0]
    return value[:place] + str((int(value[place]) + 1) % 10) + value[place + 1 :]


def columns(execute: Execute, table: str) -> list[str]:
    row = execute(f"SELECT * FROM {table} LIMIT 0", ())
    assert row == []
    return {
        "budgets": [
            "name",
            "parent",
            "root",
            "depth",
            "limit_nanousd",
            "limit_tokens",
            "time_window",
            "state",
            "posted_nanousd",
            "held_nanousd",
            "posted_tokens",
            "held_tokens",
            "entries",
            "head",
            "last_at",
        ],
        "buckets": ["budget", "bucket", "nanousd", "tokens"],
        "holds": [
            "key",
            "budget",
            "state",
            "held_nanousd",
            "held_tokens",
            "usage",
            "prices",
            "created",
            "result",
            "parameters",
            "tags",
            "lease",
            "until",
        ],
        "entries": [
            "budget",
            "key",
            "kind",
            "nanousd",
            "tokens",
            "overrun",
            "at",
            "usage",
            "prices",
            "note",
            "root",
            "number",
            "hash",
        ],
    }[table]


@pytest.mark.parametrize("table", TABLES)
def test_any_value_that_was_altered_is_found(altered: tuple[str, Execute], table: str) -> None:
    address, execute = altered
    identity = TABLES[table]
    tried = 0
    with Ledger(address) as ledger:
        for column in columns(execute, table):
            rows = execute(f"SELECT {identity}, {column} FROM {table} ORDER BY 1", ())
            assert rows
            for key, value in rows:
                if value is None:
                    continue
                changed = other(value)
                execute(f"UPDATE {table} SET {column} = ? WHERE {identity} = ?", (changed, key))
                assert row_findings(ledger), f"{table}.{column} of {key!r}: {value!r} became {changed!r}"
                where = changed if column == identity else key
                execute(f"UPDATE {table} SET {column} = ? WHERE {identity} = ?", (value, where))
                tried += 1
        assert row_findings(ledger) == []
    assert tried >= 3


@pytest.mark.parametrize("table", ["entries", "holds", "buckets"])
def test_any_row_that_was_taken_out_is_found(altered: tuple[str, Execute], table: str) -> None:
    address, execute = altered
    identity = TABLES[table]
    keys = [key for (key,) in execute(f"SELECT {identity} FROM {table} ORDER BY 1", ())]
    with Ledger(address) as ledger:
        for key in (keys[0], keys[-1]):
            names = ", ".join([*(["id"] if table == "entries" else []), *columns(execute, table)])
            (row,) = execute(f"SELECT {names} FROM {table} WHERE {identity} = ?", (key,))
            execute(f"DELETE FROM {table} WHERE {identity} = ?", (key,))
            assert row_findings(ledger), f"{table} without {key!r}"
            marks = ", ".join("?" * len(row))
            override = "OVERRIDING SYSTEM VALUE " if table == "entries" and "postgres" in address else ""
            execute(f"INSERT INTO {table} ({names}) {override}VALUES ({marks})", row)
        assert row_findings(ledger) == []


def test_a_row_that_was_put_in_is_found(altered: tuple[str, Execute]) -> None:
    address, execute = altered
    names = ", ".join(columns(execute, "holds")[1:])
    with Ledger(address) as ledger:
        execute(f"INSERT INTO holds (key, {names}) SELECT 'new', {names} FROM holds WHERE key = 'void'", ())
        assert any("put in or taken out" in finding for finding in row_findings(ledger))
        execute("DELETE FROM holds WHERE key = 'new'", ())
        names = ", ".join(column for column in columns(execute, "entries") if column != "number")
        execute(
            f"INSERT INTO entries (number, {names}) SELECT number + 1, {names} FROM entries"
            " WHERE number = (SELECT max(number) FROM entries)",
            (),
        )
        assert any("was altered" in finding for finding in row_findings(ledger))


def test_postgres_refuses_to_alter_what_is_written(postgres: str) -> None:
    fill(postgres)
    with psycopg.connect(postgres, autocommit=True) as shell:
        shell.execute("SET search_path TO viaticum")
        for statement in (
            "UPDATE entries SET nanousd = 0",
            "DELETE FROM entries",
            "TRUNCATE entries CASCADE",
            "UPDATE holds SET held_nanousd = 0",
            "UPDATE holds SET state = 'reserved' WHERE state = 'void'",
            "UPDATE holds SET state = 'dispatched' WHERE state = 'unknown'",
            "DELETE FROM holds",
            "DELETE FROM budgets",
        ):
            with pytest.raises(psycopg.errors.RaiseException, match=r"append-only|ends once"):
                shell.execute(statement)  # type: ignore[call-overload]
