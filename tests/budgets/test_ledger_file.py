"""The ledger's file: made, migrated, refused, damaged, full, read-only, locked."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import textwrap
import threading
from contextlib import closing
from pathlib import Path

import pytest
from sqlite_utils import Database

from viaticum.budgets import Ledger, schema, sqlite
from viaticum.errors import LedgerError
from viaticum.money import Price
from viaticum.types import TokenCount

PRICES = {"small": Price(1_000_000, 1_000_000)}
CALL = {"small": TokenCount(10, 20)}


def script(code: str, *args: object) -> str:
    """Run code in a Python of its own, warnings being errors; its output."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def filled(path: Path, calls: int = 3) -> Path:
    with Ledger(path) as ledger:
        ledger.create("demo", limit_nanousd=10**9)
        for number in range(calls):
            ledger.reserve("demo", f"call {number}", CALL, PRICES)
    return path


def refused(path: Path, message: str) -> None:
    """Opening fails with one line that says why, and the file keeps every byte."""
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=message) as error:
        Ledger(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    assert path.read_bytes() == before


# Made and migrated


def test_a_ledger_is_made_with_its_folders_and_marked(tmp_path: Path) -> None:
    path = filled(tmp_path / "a" / "b c" / "100% #1?.db")
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name]
    with closing(sqlite3.connect(path)) as shell:
        assert shell.execute("PRAGMA application_id").fetchone() == (schema.APPLICATION_ID,)
        assert shell.execute("PRAGMA user_version").fetchone() == (schema.VERSION,)
        assert shell.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    with Ledger(path) as ledger:
        assert len(ledger.holds("demo")) == 3


def test_a_relative_path_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Ledger("ledger.db") as ledger:
        monkeypatch.chdir("/")
        ledger.create("demo", limit_tokens=1)
    assert (tmp_path / "ledger.db").exists()


def test_an_empty_file_becomes_a_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    path.touch()
    filled(path)


@pytest.mark.parametrize("start", range(schema.VERSION))
def test_migrations_lead_from_every_version_to_the_last(tmp_path: Path, start: int) -> None:
    path = tmp_path / "old.db"
    db = Database(path)
    db.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
    for step in schema.MIGRATIONS[:start]:
        step(db)
    db.execute(f"PRAGMA user_version = {start}")
    db.close()
    filled(path)
    with Ledger(tmp_path / "new.db"):
        pass
    with closing(sqlite3.connect(path)) as old, closing(sqlite3.connect(tmp_path / "new.db")) as new:
        tables = "SELECT type, name, sql FROM sqlite_schema ORDER BY type, name"
        assert old.execute(tables).fetchall() == new.execute(tables).fetchall()


def test_a_file_of_version_1_keeps_all_it_held(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with closing(sqlite3.connect(path)) as old:
        old.executescript((Path(__file__).parents[1] / "data" / "ledger_v1.sql").read_text())
    with Ledger(path) as ledger:
        assert ledger.check() == []
        demo = ledger.budget("demo")
        assert (demo.limit_nanousd, demo.limit_tokens, demo.parent, demo.window) == (900, 500, None, None)
        assert (demo.posted_nanousd, demo.held_nanousd, demo.posted_tokens) == (25 + 8 + 320, 70, 15 + 20)
        assert {hold.key: (hold.state, hold.result) for hold in ledger.holds()} == {
            "held": ("reserved", None),
            "posted": ("posted", '{"text": "72"}'),
            "void": ("void", None),
            "attached": ("reserved", '"paid"'),
            "both": ("posted", None),
        }
        assert ledger.expire_leases() == []  # such a hold has no lease
        (both,) = [entry for entry in ledger.entries("demo", "both") if entry.kind == "post"]
        assert both.note["costs"] == {"small": 8, "large": 320}
        ledger.settle("held", {"small": TokenCount(10, 5)})
        ledger.settle("attached", {"small": TokenCount(10, 5)})
        assert ledger.check() == []


def test_a_migration_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(db: Database) -> None:
        db.execute("CREATE TABLE half_done (x)")
        raise sqlite3.OperationalError("out of luck")

    path = tmp_path / "ledger.db"
    with monkeypatch.context() as patched:
        patched.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, breaks))
        patched.setattr(schema, "VERSION", schema.VERSION + 1)
        with pytest.raises(LedgerError, match="out of luck"):
            Ledger(path)
    with closing(sqlite3.connect(path)) as shell:
        assert shell.execute("SELECT count(*) FROM sqlite_schema").fetchone() == (0,)


def test_many_open_a_new_ledger_at_once(tmp_path: Path) -> None:
    errors: list[BaseException] = []
    start = threading.Barrier(16)

    def opens() -> None:
        try:
            start.wait()
            with Ledger(tmp_path / "ledger.db") as ledger:
                ledger.create("demo", limit_tokens=5)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=opens) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


# Append-only


@pytest.mark.parametrize("replace_fires_triggers", [True, False])
@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET nanousd = 0",
        "DELETE FROM entries",
        "INSERT OR REPLACE INTO entries SELECT * FROM entries",
        "INSERT OR REPLACE INTO entries SELECT id + 99, budget, key, kind, 0, 0, 0, at, usage, prices, note, "
        "root,"
        " number + 99, hash FROM entries WHERE kind = 'reserve'",
        "INSERT OR REPLACE INTO entries SELECT id + 99, budget, key, 'dispatch', 0, 0, 0, at, usage, prices, "
        "note,"
        " root, number, hash FROM entries WHERE kind = 'reserve'",
        "UPDATE holds SET held_nanousd = 0",
        "UPDATE holds SET usage = '{}'",
        "UPDATE holds SET state = 'reserved' WHERE state = 'void'",
        "DELETE FROM holds",
        "DELETE FROM budgets",
    ],
)
def test_what_is_written_stays(tmp_path: Path, statement: str, replace_fires_triggers: bool) -> None:
    path = filled(tmp_path / "ledger.db")
    with Ledger(path) as ledger:
        ledger.void("call 0")
    with closing(sqlite3.connect(path)) as shell:
        shell.execute(f"PRAGMA recursive_triggers = {replace_fires_triggers:d}")
        with pytest.raises(sqlite3.IntegrityError, match=r"append-only|ends once|kept"):
            shell.execute(statement)


# Refused


@pytest.mark.parametrize("content", [b"x", b"not a ledger\n" * 50, b"\0" * 4096, b"SQLite format 3\0"])
def test_a_file_that_is_not_sqlite_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ledger.db"
    path.write_bytes(content)
    refused(path, "not a ledger")


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_an_sqlite_file_of_another_program_is_refused(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "ledger.db"
    with closing(sqlite3.connect(path)) as shell:
        shell.execute(f"PRAGMA journal_mode = {mode}")
        shell.execute("CREATE TABLE budgets (name TEXT)")
        shell.commit()
    refused(path, "another program")
    assert [file.name for file in tmp_path.iterdir()] == ["ledger.db"]


def test_a_newer_ledger_is_refused(tmp_path: Path) -> None:
    path = filled(tmp_path / "ledger.db")
    with closing(sqlite3.connect(path)) as shell:
        shell.execute(f"PRAGMA user_version = {schema.VERSION + 1}")
    refused(path, f"version {schema.VERSION + 1}, newer than {schema.VERSION}.*upgrade viaticum")


def test_a_newer_ledger_is_refused_while_its_log_is_not_merged(tmp_path: Path) -> None:
    path = filled(tmp_path / "ledger.db")
    with closing(sqlite3.connect(path)) as shell:
        shell.execute(f"PRAGMA user_version = {schema.VERSION + 1}")
        refused(path, "upgrade viaticum")


@pytest.mark.parametrize("keep", [0.05, 0.5, 0.95])
def test_a_truncated_ledger_is_refused(tmp_path: Path, keep: float) -> None:
    path = filled(tmp_path / "ledger.db", calls=30)
    size = path.stat().st_size
    os.truncate(path, int(size * keep))
    refused(path, "damaged")


@pytest.mark.parametrize("page", range(1, 8))
def test_a_ledger_with_a_page_of_garbage_is_refused(tmp_path: Path, page: int) -> None:
    path = filled(tmp_path / "ledger.db", calls=30)
    with path.open("r+b") as file:
        file.seek(4096 * page)
        file.write(b"\xa5" * 4096)
    refused(path, "damaged")


def test_an_empty_file_beside_a_log_is_refused_and_the_log_kept(tmp_path: Path) -> None:
    path, log = tmp_path / "ledger.db", tmp_path / "ledger.db-wal"
    path.touch()
    log.write_bytes(b"all that is left")
    refused(path, "damaged")
    assert log.read_bytes() == b"all that is left"


def test_damage_found_later_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "WHOLE_CHECK_BYTES", 0)  # as with a large file: nothing is read ahead
    path = filled(tmp_path / "ledger.db", calls=100)
    with path.open("r+b") as file:
        file.seek(4096 * 2)
        file.write(b"\xa5" * (path.stat().st_size - 4096 * 2))
    with pytest.raises(LedgerError, match="damaged") as error, Ledger(path) as ledger:
        ledger.reserve("demo", "new", CALL, PRICES)
    assert "\n" not in str(error.value)


def test_a_path_that_cannot_be_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path, tmp_path / "file" / "ledger.db", Path("/proc/nowhere/ledger.db")):
        with pytest.raises(LedgerError, match="give another path"):
            Ledger(path)


# Faults while it is used


def test_a_closed_ledger_says_so(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    ledger.close()
    ledger.close()
    with pytest.raises(LedgerError, match="closed"):
        ledger.budgets()


def test_a_full_disk_is_an_error_and_what_was_there_still_reads(tmp_path: Path) -> None:
    with Ledger(filled(tmp_path / "ledger.db")) as ledger:
        before = ledger.budget("demo")
        assert isinstance(ledger._store, sqlite.SqliteStore)
        database = ledger._store._database
        assert database is not None
        database.execute("PRAGMA max_page_count = 1")  # the pages there are; no more
        usage = {f"model {number}" * 50: TokenCount(1, 1) for number in range(200)}
        with pytest.raises(LedgerError, match="free some disk space"):
            ledger.reserve("demo", "big", usage, dict.fromkeys(usage, PRICES["small"]))
        assert ledger.budget("demo") == before
        assert ledger.hold("big") is None
        assert ledger.check() == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX file-size limits")
def test_a_write_that_fails_midway_is_an_error_and_holds_nothing(tmp_path: Path) -> None:
    path = filled(tmp_path / "ledger.db")
    output = script(
        """
        import resource, signal, sys
        from viaticum.budgets import Ledger
        from viaticum.errors import LedgerError
        from viaticum.money import Price
        from viaticum.types import TokenCount

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        acknowledged = 0
        with Ledger(sys.argv[1]) as ledger:
            try:
                while True:
                    usage, prices = {"m": TokenCount(1, 1)}, {"m": Price(0, 0)}
                    ledger.reserve("demo", f"more {acknowledged}", usage, prices)
                    acknowledged += 1
            except LedgerError as error:
                assert chr(10) not in str(error)
        print(acknowledged)
        """,
        path,
    )
    with Ledger(path) as ledger:
        assert len(ledger.holds("demo")) == 3 + int(output)
        assert ledger.check() == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX rights")
@pytest.mark.parametrize("there", [True, False])
def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path, there: bool) -> None:
    """In a process of its own that gives up root's rights, which would ignore the folder's."""
    output = script(
        """
        import os, sys, tempfile
        from viaticum.budgets import Ledger
        from viaticum.errors import LedgerError

        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "ledger.db")
            if sys.argv[1] == "True":
                Ledger(path).close()
            os.chmod(folder, 0o555)
            child = os.fork()
            if child == 0:
                try:
                    if os.getuid() == 0:
                        os.setuid(65534)
                    Ledger(path)
                except LedgerError as error:
                    print(error, flush=True)
                    os._exit(0)
                os._exit(1)
            assert os.waitpid(child, 0)[1] == 0
            os.chmod(folder, 0o755)
        """,
        there,
    )
    assert len(output.splitlines()) == 1
    assert "ledger.db" in output


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX rights")
@pytest.mark.parametrize("folder_mode", [0o555, 0o755])
def test_a_file_that_may_not_be_written_is_an_error_and_still_reads(tmp_path: Path, folder_mode: int) -> None:
    """In a process of its own that gives up root's rights, which would ignore those of the file."""
    output = script(
        """
        import os, sys, tempfile
        from viaticum.budgets import Ledger
        from viaticum.errors import LedgerError
        from viaticum.money import Price
        from viaticum.types import TokenCount

        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "ledger.db")
            with Ledger(path) as ledger:
                ledger.create("demo", limit_nanousd=100)
                ledger.reserve("demo", "call", {"m": TokenCount(1, 1)}, {"m": Price(0, 0)})
            os.chmod(path, 0o444)
            os.chmod(folder, int(sys.argv[1]))
            child = os.fork()
            if child == 0:
                if os.getuid() == 0:
                    os.setuid(65534)
                try:
                    with Ledger(path) as ledger:
                        ledger.void("call")
                except LedgerError as error:
                    print(error, flush=True)
                    with Ledger(path, read_only=True) as ledger:
                        assert [hold.key for hold in ledger.holds("demo")] == ["call"]
                        assert ledger.check() == []
                        try:
                            ledger.void("call")
                        except LedgerError as error:
                            print(error, flush=True)
                            os._exit(0)
                os._exit(1)
            assert os.waitpid(child, 0)[1] == 0
            os.chmod(folder, 0o755)
        """,
        folder_mode,
    )
    first, second = output.splitlines()
    assert "ledger.db" in first
    assert "check the rights" in first
    assert "read only" in second


def test_what_is_left_of_a_damaged_ledger_still_reads(tmp_path: Path) -> None:
    path = filled(tmp_path / "ledger.db", calls=100)
    with closing(sqlite3.connect(path)) as shell:
        (page,) = shell.execute(
            "SELECT rootpage FROM sqlite_schema WHERE name = 'one_place_in_the_chain'"
        ).fetchone()
    with path.open("r+b") as file:
        file.seek(4096 * (page - 1))
        file.write(b"\xa5" * 4096)
    refused(path, "damaged")
    with Ledger(path, read_only=True) as ledger:
        assert len(ledger.holds()) == 100
        assert len(ledger.entries()) == 101
        assert ledger.check()[0].startswith("the store is damaged")
        with pytest.raises(LedgerError, match=r"damaged.*restore it from a copy"):
            ledger.entries("demo")


def test_a_missing_or_older_file_is_not_made_by_reading(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with pytest.raises(LedgerError, match="cannot be written"):
        Ledger(path, read_only=True)
    assert not path.exists()
    with closing(sqlite3.connect(path)) as old:
        old.executescript((Path(__file__).parents[1] / "data" / "ledger_v1.sql").read_text())
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=r"version 1, older than .*open it for writing once"):
        Ledger(path, read_only=True)
    assert path.read_bytes() == before


def test_opening_a_ledger_again_leaves_the_locks_of_the_first_alone(tmp_path: Path) -> None:
    """POSIX: closing any descriptor of a file drops this process's locks on it, so headers are read once."""
    path = filled(tmp_path / "ledger.db")
    with Ledger(path):
        before = locks_of(path)
        assert before
        for _ in range(2):
            Ledger(path).close()
        assert locks_of(path) == before
    assert locks_of(path) == []


def locks_of(path: Path) -> list[str]:
    """The POSIX locks that this process has on a file."""
    inode = f":{path.stat().st_ino} "
    lines = Path("/proc/locks").read_text().splitlines()
    return [line.split(":", 1)[1] for line in lines if inode in line and f" {os.getpid()} " in line]


def test_a_file_locked_for_too_long_is_told_in_plain_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "BUSY_SECONDS", 0.1)
    path = filled(tmp_path / "ledger.db")
    with closing(sqlite3.connect(path, isolation_level=None)) as other, Ledger(path) as ledger:
        other.execute("BEGIN IMMEDIATE")
        assert len(ledger.budgets()) == 1  # readers do not wait for a writer
        with pytest.raises(LedgerError, match="kept locked"):
            ledger.void("call 0")
        other.execute("COMMIT")
        ledger.void("call 0")


def test_a_ledger_that_went_missing_is_not_made_anew_after_a_fork(tmp_path: Path) -> None:
    with Ledger(filled(tmp_path / "ledger.db")) as ledger:
        ledger._store._disconnect()  # what a fork does
        (tmp_path / "ledger.db").unlink()
        with pytest.raises(LedgerError, match="no longer the file that was opened"):
            ledger.budgets()
    assert not (tmp_path / "ledger.db").exists()


def test_using_a_ledger_from_inside_its_own_transaction_is_refused(tmp_path: Path) -> None:
    with Ledger(filled(tmp_path / "ledger.db")) as ledger:
        with pytest.raises(LedgerError, match="this very thread"):
            ledger.each_entry(lambda _: ledger.void("call 0"))
        ledger.void("call 0")
