"""Files that hold prompts and answers are their owner's alone, whatever the umask."""

from __future__ import annotations

import logging
import os
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from batch_jobs import write_questions
from scripted_batch import run
from scripted_client import client

from viaticum.agents.batch import job_folder
from viaticum.agents.server.api_keys import ApiKeyStore
from viaticum.budgets import Ledger
from viaticum.errors import InputError, LedgerError
from viaticum.files import private_database, private_file, private_folder

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX rights")


@pytest.fixture(autouse=True)
def open_umask() -> Iterator[None]:
    before = os.umask(0o002)
    yield
    os.umask(before)


def rights(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_what_a_job_leaves(tmp_path: Path) -> None:
    write_questions(tmp_path / "in.jsonl", 3)
    run(tmp_path)
    assert rights(tmp_path / "ledger.db") == 0o600
    assert rights(job_folder(tmp_path / "out.jsonl")) == 0o700
    assert rights(tmp_path / "out.jsonl") == 0o664, "the results are the user's, as the umask says"


def test_ledger_and_keys_with_what_sqlite_writes_beside_them(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.db") as ledger, ApiKeyStore(tmp_path / "keys.db"):
        ledger.create("b", limit_nanousd=1)
        found = {path.name: rights(path) for path in tmp_path.iterdir()}
    assert {"ledger.db", "ledger.db-wal", "keys.db"} <= set(found)
    assert set(found.values()) == {0o600}


def test_existing_files_are_tightened_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, folder = tmp_path / "ledger.db", tmp_path / "job"
    with Ledger(path) as ledger:
        ledger.create("b", limit_nanousd=1)
    path.chmod(0o644)
    folder.mkdir(mode=0o755)
    with caplog.at_level(logging.WARNING, "viaticum"), Ledger(path) as ledger:
        assert ledger.budget("b").limit_nanousd == 1
    private_folder(folder)
    assert (rights(path), rights(folder)) == (0o600, 0o700)
    assert f"{path} could be read by other users" in caplog.text
    path.chmod(0o444)
    private_file(path)
    assert rights(path) == 0o400, "nobody gains a right"


@pytest.mark.parametrize("name", ["notes.txt", "other.db", "folder", "pipe"])
def test_what_is_no_ledger_keeps_its_rights(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    elif name == "pipe":
        os.mkfifo(path)
    elif name == "other.db":
        with closing(sqlite3.connect(path)) as other:
            other.execute("CREATE TABLE t (x)")
    else:
        path.write_text("a letter")
    path.chmod(0o755)
    with pytest.raises(LedgerError, match="ledger"):
        Ledger(path)
    assert rights(path) == 0o755


@pytest.mark.parametrize("make", [private_file, private_database])
def test_a_folder_is_no_private_file(tmp_path: Path, make: Callable[[Path], object]) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(IsADirectoryError):
        make(tmp_path)
    assert rights(tmp_path) == 0o755


def test_checkpoints_of_a_client(tmp_path: Path) -> None:
    with client(tmp_path) as opened:
        opened.solve("Twice 2?")
    made = [path for path in tmp_path.rglob("*") if path.suffix == ".db"]
    assert {path.name for path in made} >= {"ledger.db"}
    assert {rights(path) for path in made} == {0o600}


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_that_no_job_made_is_in_the_way(tmp_path: Path, force: bool) -> None:
    write_questions(tmp_path / "in.jsonl", 3)
    folder = job_folder(tmp_path / "out.jsonl")
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"holds thesis\.tex, which no job made"):
        run(tmp_path, force=force)
    assert (folder / "thesis.tex").read_text() == "years of work"


def test_a_new_job_in_the_folder_of_an_old_one_leaves_what_is_not_its_own(tmp_path: Path) -> None:
    write_questions(tmp_path / "in.jsonl", 3)
    ended = run(tmp_path)
    (ended.folder / "notes.txt").write_text("mine")
    before = (ended.folder / "rows.jsonl").read_text()
    run(tmp_path, force=True)
    assert (ended.folder / "notes.txt").read_text() == "mine"
    assert (ended.folder / "rows.jsonl").read_text() != before
