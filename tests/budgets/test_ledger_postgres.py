"""The ledger in Postgres: made, migrated, refused, and what a server does that goes away."""

from __future__ import annotations

import threading

import psycopg
import pytest
from ledger_calls import CALL, PRICES, USED
from postgres_server import new_database, running_server

from viaticum.budgets import Entry, Ledger, schema_postgres
from viaticum.budgets import postgres as postgres_store
from viaticum.errors import LedgerError


def tables(address: str) -> list[tuple[str, ...]]:
    with psycopg.connect(address) as shell:
        columns = (
            "SELECT table_name, column_name, data_type, is_nullable FROM information_schema.columns"
            " WHERE table_schema = 'viaticum' ORDER BY 1, 2"
        )
        triggers = "SELECT tgname, tgrelid::regclass::text FROM pg_trigger WHERE NOT tgisinternal ORDER BY 1"
        return shell.execute(columns).fetchall() + shell.execute(triggers).fetchall()


@pytest.mark.parametrize("start", range(schema_postgres.VERSION))
def test_migrations_lead_from_every_version_to_the_last(
    postgres: str, postgres_server: str, start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(schema_postgres, "MIGRATIONS", schema_postgres.MIGRATIONS[:start])
        patched.setattr(schema_postgres, "VERSION", start)
        if start:
            Ledger(postgres).close()
    with Ledger(postgres) as ledger:
        ledger.create("demo", limit_nanousd=100)
        assert ledger.check() == []
    new = new_database(postgres_server, f"new_from_{start}")
    Ledger(new).close()
    assert tables(postgres) == tables(new)


def test_a_migration_that_fails_leaves_nothing(postgres: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        breaks = "CREATE TABLE half_done (x INT); SELECT 1 / 0;"
        patched.setattr(schema_postgres, "MIGRATIONS", (*schema_postgres.MIGRATIONS, breaks))
        with pytest.raises(LedgerError, match="division by zero"):
            Ledger(postgres)
    assert tables(postgres) == []
    Ledger(postgres).close()


def test_a_newer_ledger_is_refused_not_damaged(postgres: str) -> None:
    with Ledger(postgres) as ledger:
        ledger.create("demo", limit_nanousd=100)
    with psycopg.connect(postgres) as shell:
        shell.execute("UPDATE viaticum.version SET number = number + 1")
    before = tables(postgres)
    with pytest.raises(LedgerError, match=r"newer than \d+, which this viaticum knows; upgrade viaticum"):
        Ledger(postgres)
    assert tables(postgres) == before


def test_many_open_a_new_ledger_at_once(postgres: str) -> None:
    errors: list[BaseException] = []
    start = threading.Barrier(8)

    def opens() -> None:
        try:
            start.wait()
            with Ledger(postgres) as ledger:
                ledger.create("demo", limit_tokens=5)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=opens) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_reading_needs_a_ledger_and_writes_nothing(postgres: str) -> None:
    with pytest.raises(LedgerError, match="open it for writing once"):
        Ledger(postgres, read_only=True)
    assert tables(postgres) == []
    with Ledger(postgres) as ledger:
        ledger.create("demo", limit_nanousd=100)
    with Ledger(postgres, read_only=True) as reader:
        assert reader.budget("demo").left_nanousd == 100
        with pytest.raises(LedgerError, match="read only"):
            reader.create("other", limit_nanousd=100)


def cut_all(shell: psycopg.Connection[tuple[object, ...]]) -> None:
    """Cut every other connection to the database."""
    shell.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE pid <> pg_backend_pid() AND datname = current_database()"
    )


def test_a_connection_that_is_cut_is_made_anew(postgres: str) -> None:
    with Ledger(postgres) as ledger, psycopg.connect(postgres, autocommit=True) as shell:
        ledger.create("demo", limit_nanousd=1000)
        for number in range(3):
            cut_all(shell)
            ledger.reserve("demo", f"{number}", CALL, PRICES)
            ledger.settle(f"{number}", USED)
        assert ledger.check() == []
        assert ledger.budget("demo").posted_nanousd == 75


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("postgresql://nobody:secret@127.0.0.1:1/nothing", "cannot be reached"),
        ("postgresql://nobody:secret@[", "not an address"),
    ],
)
def test_an_address_that_does_not_work_is_told_in_one_line_without_its_password(
    address: str, said: str
) -> None:
    with pytest.raises(LedgerError, match=said) as error:
        Ledger(address)
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_server_that_crashed_and_came_back_has_all_it_confirmed() -> None:
    with running_server(fsync=True) as address, Ledger(address) as ledger:
        ledger.create("demo", limit_nanousd=10**6)
        ledger.reserve("demo", "a", CALL, PRICES)
        # A backend that dies by SIGKILL makes the server end all connections and recover from its log.
        with psycopg.connect(address, autocommit=True) as shell:
            (pid,) = shell.execute("SELECT pg_backend_pid()").fetchone()  # type: ignore[misc]
            with pytest.raises(psycopg.OperationalError):
                shell.execute(f"COPY (SELECT 1) TO PROGRAM 'kill -KILL {pid}; sleep 60'")
        ledger.settle("a", USED)
        assert ledger.check() == []
        assert ledger.budget("demo").posted_nanousd == 25


def posts_in_two_trees(ledger: Ledger) -> None:
    for root in ("first", "second"):
        ledger.create(root, limit_nanousd=10_000)
        for number in range(10):
            ledger.reserve(root, f"{root}-{number}", CALL, PRICES)
            ledger.settle(f"{root}-{number}", USED)


@pytest.mark.parametrize("read", ["each_new_post", "each_post", "each_entry"])
@pytest.mark.parametrize("at", [1, 7, 13])
def test_a_read_whose_connection_is_cut_tells_each_entry_once(
    postgres: str, monkeypatch: pytest.MonkeyPatch, read: str, at: int
) -> None:
    monkeypatch.setattr(postgres_store, "_STREAM_ROWS", 2)
    taken: list[str] = []
    with Ledger(postgres) as ledger, psycopg.connect(postgres, autocommit=True) as shell:
        posts_in_two_trees(ledger)

        def take(entry: Entry) -> None:
            taken.append(f"{entry.kind} {entry.key}")
            if len(taken) == at:  # a post of another process, and the connection is lost
                with Ledger(postgres) as other:
                    other.reserve("first", "later", CALL, PRICES)
                    other.settle("later", USED)
                cut_all(shell)

        if read == "each_new_post":
            now = ledger.each_new_post(take, {})
            assert now == ledger.chain_heads()
            assert ledger.each_new_post(take, now) == now
        elif read == "each_post":
            ledger.each_post(take)
        else:
            ledger.each_entry(take, kinds=("post",))
    keys = [f"{root}-{number}" for root in ("first", "second") for number in range(10)]
    assert sorted(taken) == sorted(f"post {key}" for key in [*keys, "later"])
