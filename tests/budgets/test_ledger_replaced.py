"""The ledger's file under an open ledger: removed, replaced, copied; and its backup."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from ledger_calls import CALL, PRICES, USED
from typer.testing import CliRunner

from viaticum.budgets import Ledger
from viaticum.cli import app
from viaticum.errors import InputError, LedgerError


def spend(ledger: Ledger, number: int) -> None:
    ledger.reserve("demo", f"call/{number}", CALL, PRICES)
    ledger.settle(f"call/{number}", USED)


def remove(path: Path) -> None:
    for each in path.parent.glob(f"{path.name}*"):
        each.unlink()


def remove_the_file_alone(path: Path) -> None:
    path.unlink()


def remove_the_log(path: Path) -> None:
    path.with_name("ledger.db-wal").unlink()


def remove_the_locks(path: Path) -> None:
    path.with_name("ledger.db-shm").unlink()


def replace_by_another(path: Path) -> None:
    with Ledger(path.with_name("other.db")) as other:
        other.create("demo", limit_nanousd=1000)
    os.replace(path.with_name("other.db"), path)


def replace_by_a_copy(path: Path) -> None:
    shutil.copy(path, path.with_name("copy.db"))
    os.replace(path.with_name("copy.db"), path)


@pytest.mark.parametrize(
    "change",
    [
        remove,
        remove_the_file_alone,
        remove_the_log,
        remove_the_locks,
        replace_by_another,
        replace_by_a_copy,
    ],
)
def test_a_file_that_was_removed_or_replaced_takes_no_more_calls(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    path = tmp_path / "ledger.db"
    with Ledger(path) as ledger:
        ledger.create("demo", limit_nanousd=1000)
        for number in range(3):
            spend(ledger, number)
        change(path)
        for step in (
            lambda: spend(ledger, 3),
            lambda: ledger.settle("call/0", USED),
            lambda: ledger.create("new", limit_nanousd=5),
            lambda: ledger.budget("demo"),
            lambda: ledger.backup(tmp_path / "backup.db"),
        ):
            with pytest.raises(LedgerError, match=r"no longer the file that was opened: ledger\.db"):
                step()


def test_two_handles_never_spend_the_limit_twice(tmp_path: Path) -> None:
    """A limit of 1,000, a file that is replaced, and one handle from before: what both spent counts once."""
    path = tmp_path / "ledger.db"
    with Ledger(path) as before:
        before.create("demo", limit_nanousd=1000)
        for number in range(10):
            spend(before, number)
        remove(path)
        with Ledger(path) as after:
            after.create("demo", limit_nanousd=1000)
            for number in range(10, 50):
                with pytest.raises(LedgerError, match="no longer the file"):
                    spend(before, number)
            assert after.budget("demo").posted_nanousd == 0


def test_a_file_that_is_put_back_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with Ledger(path) as ledger:
        ledger.create("demo", limit_nanousd=1000)
        path.rename(tmp_path / "aside.db")
        with pytest.raises(LedgerError, match="no longer the file"):
            spend(ledger, 0)
        (tmp_path / "aside.db").rename(path)
        spend(ledger, 0)
        assert ledger.check() == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_fork_after_the_file_was_replaced_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with Ledger(path) as ledger:
        ledger.create("demo", limit_nanousd=1000)
        replace_by_another(path)
        child = os.fork()
        if child == 0:
            try:
                spend(ledger, 0)
            except LedgerError:
                os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    with Ledger(path) as other:
        assert other.holds() == []


def test_a_backup_has_what_a_copy_of_the_file_lacks(tmp_path: Path) -> None:
    path, backup = tmp_path / "ledger.db", tmp_path / "backup.db"
    with Ledger(path) as ledger:
        ledger.create("demo", limit_nanousd=1000)
        spend(ledger, 0)
        shutil.copy(path, tmp_path / "copy.db")
        ledger.backup(backup)
        heads = ledger.chain_heads()
        spend(ledger, 1)
        assert ledger.check(heads=heads) == []
    assert stat.S_IMODE(backup.stat().st_mode) == 0o600
    assert sorted(each.name for each in tmp_path.glob("*backup*")) == ["backup.db"]
    with Ledger(backup, read_only=True) as copy:
        assert copy.chain_heads() == heads
        assert copy.check(heads=heads) == []
    with Ledger(tmp_path / "copy.db") as copy:  # the calls are in the log, which was left behind
        assert copy.check(heads=heads) != []
    with Ledger(backup) as restored:
        spend(restored, 1)
        assert restored.check(heads=heads) == []


def test_a_backup_put_beside_the_old_log_is_refused(tmp_path: Path) -> None:
    """SQLite would play the log of the old file into the restored one."""
    path, backup = tmp_path / "ledger.db", tmp_path / "backup.db"
    with Ledger(path) as ledger:
        ledger.create("demo", limit_nanousd=1000)
        ledger.backup(backup)
        spend(ledger, 0)
        log = (tmp_path / "ledger.db-wal").read_bytes()
    os.replace(backup, path)
    (tmp_path / "ledger.db-wal").write_bytes(log)
    with pytest.raises(LedgerError, match=r"beside a log that is not its own, ledger\.db-wal"):
        Ledger(path)
    (tmp_path / "ledger.db-wal").unlink()
    with Ledger(path) as ledger:
        assert ledger.check() == []
        assert ledger.budget("demo").posted_nanousd == 0


def test_a_backup_replaces_nothing_and_leaves_nothing_half_done(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with Ledger(path) as ledger:
        ledger.create("demo", limit_nanousd=1000)
        (tmp_path / "kept").write_text("a file of the user")
        for target, said in ((tmp_path / "kept", "exists"), (path, "exists")):
            with pytest.raises(LedgerError, match=said):
                ledger.backup(target)
        with pytest.raises(InputError, match="give another path"):
            ledger.backup(tmp_path / "missing" / "backup.db")
    assert (tmp_path / "kept").read_text() == "a file of the user"
    with Ledger("memory:") as ledger, pytest.raises(LedgerError, match="no file"):
        ledger.backup(tmp_path / "backup.db")


def test_the_command_backs_up_while_another_process_writes(tmp_path: Path) -> None:
    path, backup = tmp_path / "ledger.db", tmp_path / "backup.db"
    with Ledger(path) as ledger, closing(sqlite3.connect(path, isolation_level=None)) as other:
        ledger.create("demo", limit_nanousd=1000)
        spend(ledger, 0)
        other.execute("BEGIN IMMEDIATE")
        result = CliRunner().invoke(app, ["budget", "backup", str(backup), "--ledger", str(path)])
        other.execute("ROLLBACK")
    assert result.exit_code == 0, result.output
    with Ledger(backup) as copy:
        assert copy.budget("demo").posted_nanousd == 25
        assert copy.check() == []
