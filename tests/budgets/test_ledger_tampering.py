"""What `verify` finds beside altered rows: missing budgets, other chains, dropped guards, damaged indexes."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
from altered_ledgers import alter, alter_postgres, alter_sqlite
from ledger_calls import CALL, PRICES, USED
from typer.testing import CliRunner

from viaticum.budgets import Ledger
from viaticum.cli import app
from viaticum.errors import InputError


def fill(address: str) -> dict[str, tuple[int, str]]:
    """Two trees with a call each; returns the heads of their chains."""
    with Ledger(address) as ledger:
        for root in ("org", "other"):
            ledger.create(root, limit_nanousd=1000)
            ledger.create(f"{root}/run", parent=root)
            ledger.reserve(f"{root}/run", f"{root}/call", CALL, PRICES)
            ledger.settle(f"{root}/call", USED)
        assert ledger.check() == []
        return ledger.chain_heads()


def check(address: str | Path) -> list[str]:
    with Ledger(str(address)) as ledger:
        return ledger.check()


@pytest.fixture(params=["sqlite", "postgres"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "ledger.db") if request.param == "sqlite" else request.getfixturevalue("postgres")


@pytest.mark.parametrize("names", ["'org'", "'org', 'org/run'"])
def test_a_root_that_was_taken_out_is_found(address: str, names: str) -> None:
    fill(address)
    alter(address, f"DELETE FROM budgets WHERE name IN ({names})")
    assert any(
        "a budget is missing: 'org' is not there, 4 entries name it" in line for line in check(address)
    )


def test_entries_of_a_root_that_never_was_are_found(address: str) -> None:
    fill(address)
    columns = "budget, key, kind, nanousd, tokens, overrun, at, usage, prices, note"
    alter(
        address,
        f"INSERT INTO entries (root, number, hash, {columns})"
        f" SELECT 'ghost', number, hash, 'ghost', NULL, {columns.removeprefix('budget, key, ')} FROM entries"
        " WHERE root = 'org' AND kind = 'limit'",
    )
    assert check(address) == ["a budget is missing: 'ghost' is not there, 2 entries name it"]


def test_holds_of_a_budget_that_never_was_are_found(address: str) -> None:
    fill(address)
    columns = (
        "state, held_nanousd, held_tokens, usage, prices, created, result, parameters, tags, lease, until"
    )
    alter(
        address,
        f"INSERT INTO holds (key, budget, {columns}) SELECT 'new', 'ghost', {columns} FROM holds LIMIT 1",
        "INSERT INTO buckets (budget, bucket, nanousd, tokens) VALUES ('ghost', 1, 5, 5)",
    )
    assert check(address) == [
        "a budget is missing: 'ghost' is not there, 1 holds name it",
        "a budget is missing: 'ghost' is not there, 1 buckets name it",
    ]


def test_a_chain_that_was_written_anew_differs_from_the_head_that_was_kept(tmp_path: Path) -> None:
    kept = fill(str(tmp_path / "ledger.db"))
    with Ledger(tmp_path / "again.db") as ledger:  # a ledger that agrees with itself, but cost less
        for root in ("org", "other"):
            ledger.create(root, limit_nanousd=1000)
            ledger.create(f"{root}/run", parent=root)
        ledger.reserve("other/run", "other/call", CALL, PRICES)
        ledger.void("other/call")
        assert ledger.check() == []
        found = ledger.check(heads=kept)
        assert len(found) == 2
        assert "entries are missing: 'org' has 2, 4 were there when its head was kept" in found
        assert any("the chain of 'other' was rewritten: its entry number 4" in line for line in found)
        assert ledger.check(heads={"gone": kept["org"]}) == [
            "a budget is missing: 'gone' is not there, its head was kept"
        ]
    with Ledger(tmp_path / "ledger.db") as ledger:
        ledger.reserve("org/run", "another", CALL, PRICES)
        assert ledger.check(heads=kept) == []
        for wrong in ({"org": 5}, {"org": ("x", "y")}, {5: kept["org"]}, 5):
            with pytest.raises(InputError):
                ledger.check(heads=wrong)  # type: ignore[arg-type]


def test_the_command_compares_with_what_it_printed_earlier(tmp_path: Path) -> None:
    where, head = ["--ledger", str(tmp_path / "ledger.db")], tmp_path / "head.json"
    fill(where[1])
    run = CliRunner().invoke
    head.write_text(run(app, ["budget", "verify", "--json", *where]).stdout)
    assert run(app, ["budget", "verify", "--head", str(head), *where]).exit_code == 0
    kept = json.loads(head.read_text())
    kept["heads"]["org"]["head"] = "0" * 64
    head.write_text(json.dumps(kept))
    result = run(app, ["budget", "verify", "--head", str(head), *where])
    assert result.exit_code == 1
    assert "the chain of 'org' was rewritten" in result.stdout
    head.write_text("{}")
    with pytest.raises(InputError, match="has no heads"):
        run(app, ["budget", "verify", "--head", str(head), *where], catch_exceptions=False)


@pytest.mark.parametrize(
    ("statements", "found"),
    [
        (["DROP TRIGGER holds_end_once"], "the trigger 'holds_end_once' is missing"),
        (
            ["DROP VIEW spend_by_day", "CREATE VIEW spend_by_day AS SELECT 1 AS calls"],
            "the view 'spend_by_day' is another",
        ),
        (["DROP INDEX one_end_a_key"], "the index 'one_end_a_key' is missing"),
        (
            ["DROP INDEX one_end_a_key", "CREATE INDEX one_end_a_key ON entries (key)"],
            "the index 'one_end_a_key' is another",
        ),
        (
            ["CREATE TRIGGER helps AFTER INSERT ON holds BEGIN SELECT 1; END"],
            "the trigger 'helps' was added",
        ),
    ],
)
def test_a_schema_that_was_altered_is_found_in_sqlite(
    tmp_path: Path, statements: list[str], found: str
) -> None:
    fill(str(tmp_path / "ledger.db"))
    with closing(sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)) as shell:
        for statement in statements:
            shell.execute(statement)
    assert check(tmp_path / "ledger.db") == [f"the schema was altered: {found}"]


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("DROP TRIGGER holds_end_once ON holds", "the trigger 'holds_end_once' is missing"),
        ("ALTER TABLE holds DISABLE TRIGGER holds_end_once", "the trigger 'holds_end_once' is another"),
        (
            "CREATE OR REPLACE FUNCTION kept() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN OLD; END'",
            "the function 'kept' is another",
        ),
        (
            "CREATE OR REPLACE VIEW spend_by_day AS SELECT substr(at, 1, 10) AS day, 1::bigint AS calls,"
            " 1::numeric AS usd, 1::numeric AS tokens FROM entries",
            "the view 'spend_by_day' is another",
        ),
        ("DROP INDEX one_end_a_key", "the index 'one_end_a_key' is missing"),
        (
            "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'one_end_a_key'::regclass",
            "the index 'one_end_a_key' is another",
        ),
        ("ALTER TABLE entries DROP CONSTRAINT entries_check", "the constraint 'entries_check' is missing"),
        ("ALTER TABLE entries ALTER note DROP NOT NULL", "the table 'entries' is another"),
        ("CREATE RULE less AS ON DELETE TO entries DO INSTEAD NOTHING", "the rule 'less' was added"),
    ],
)
def test_a_schema_that_was_altered_is_found_in_postgres(postgres: str, statement: str, found: str) -> None:
    fill(postgres)
    alter_postgres(postgres, statement)
    assert check(postgres) == [f"the schema was altered: {found}"]


def test_an_auditor_who_may_only_read_compares_names(postgres: str) -> None:
    fill(postgres)
    with psycopg.connect(postgres, autocommit=True) as shell:
        shell.execute("DROP ROLE IF EXISTS auditor")
        shell.execute("CREATE ROLE auditor LOGIN")
        shell.execute("GRANT USAGE ON SCHEMA viaticum TO auditor")
        shell.execute("GRANT SELECT ON ALL TABLES IN SCHEMA viaticum TO auditor")
        as_auditor = postgres.replace("viaticum@", "auditor@")
        with Ledger(as_auditor, read_only=True) as ledger:
            assert ledger.check() == []
            shell.execute("DROP TRIGGER holds_end_once ON viaticum.holds")
            assert ledger.check() == ["the schema was altered: the trigger 'holds_end_once' is missing"]
        shell.execute("DROP OWNED BY auditor")


def test_an_index_that_lacks_a_row_is_found(tmp_path: Path) -> None:
    """A second end of a call gets by a unique index that was unhooked for a moment."""
    path = tmp_path / "ledger.db"
    fill(str(path))
    with closing(sqlite3.connect(path, isolation_level=None)) as shell:
        where = "name = 'one_end_a_key'"
        row = shell.execute(f"SELECT * FROM sqlite_schema WHERE {where}").fetchone()
        shell.execute("PRAGMA writable_schema = ON")
        shell.execute(f"DELETE FROM sqlite_schema WHERE {where}")
        shell.execute("PRAGMA writable_schema = RESET")
    columns = "budget, key, kind, nanousd, tokens, overrun, at, usage, prices, note, root, hash"
    alter_sqlite(
        path,
        f"INSERT INTO entries (number, {columns}) SELECT 99, {columns} FROM entries WHERE kind = 'post'"
        " AND root = 'org'",
    )
    with closing(sqlite3.connect(path, isolation_level=None)) as shell:
        shell.execute("PRAGMA writable_schema = ON")
        shell.execute("INSERT INTO sqlite_schema VALUES (?, ?, ?, ?, ?)", row)
        shell.execute("PRAGMA writable_schema = RESET")
    with Ledger(path, read_only=True) as ledger:
        assert any(line.startswith("the store is damaged: ") and "index" in line for line in ledger.check())
