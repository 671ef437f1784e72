"""Damaged, changed and unwritable files of a job end it with one line; what was paid for is kept."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from batch_jobs import models, write_questions
from scripted_batch import rows_of, run

from viaticum.agents.workflow.serialization import parse_completion
from viaticum.errors import DataError, InputError

COMMAND = [sys.executable, "-c", "import sys; sys.path.pop(0); from viaticum.cli import main; main()"]
CATALOGUE = """
[models.fast]
kind = "scripted"
description = "Says a word that few encodings have."
context_length = 4096
text = "Seven \\u2192 six. The answer is \\u4e09."
input_price = 1
output_price = 1
"""


@pytest.mark.parametrize("line", [b'{"id": "q2", broken', b"[1]", b'{"id": 1}', b"\xff\xfe", b"null"])
def test_a_damaged_row_is_named(tmp_path: Path, line: bytes) -> None:
    write_questions(tmp_path / "in.jsonl", 5)
    ended = run(tmp_path)
    rows = ended.folder / "rows.jsonl"
    lines = rows.read_bytes().splitlines()
    rows.write_bytes(b"\n".join([*lines[:2], line, *lines[3:]]) + b"\n")
    with pytest.raises(DataError, match=r"rows.jsonl, line 3: .*damaged"):
        run(tmp_path, resume=True)


@pytest.mark.parametrize("text", ["{broken", "[]", "null", '{"text": "x"}', '{"usage": [], "text": 1}'])
def test_a_damaged_answer_of_the_cache_is_asked_for_again(tmp_path: Path, text: str) -> None:
    write_questions(tmp_path / "in.jsonl", 3)
    cache = tmp_path / "answers.db"
    first = rows_of(run(tmp_path, cache=cache))
    with sqlite3.connect(cache) as database:
        assert database.execute("UPDATE answers SET completion = ?", (text,)).rowcount
    database.close()
    again = run(tmp_path, cache=cache, out=tmp_path / "again.jsonl")
    assert [row.answer for row in rows_of(again)] == [row.answer for row in first]
    assert all(not call.cached for row in rows_of(again) for call in row.calls)
    with pytest.raises(DataError, match="the cache is damaged: no completion"):
        parse_completion(text, "the cache")


class Changing:
    """A script that changes the input while its third question is answered."""

    def __init__(self, path: Path, change: Any) -> None:
        self.path, self.change, self.asked = path, change, 0

    def __call__(self, messages: Any, generation: Any) -> str:
        self.asked += 1
        if self.asked == 3:
            self.change(self.path)
        return "The answer is 1."


def append(path: Path) -> None:
    with path.open("a") as file:
        file.write('{"id": "new", "question": "What is new?"}\n')


def swap(path: Path) -> None:
    """Another file of the same length in its place, as editors write one."""
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes().replace(b"What", b"Whut").replace(b"?", b"!"))
    other.replace(path)


@pytest.mark.parametrize("change", [append, swap, Path.unlink])
def test_an_input_that_changes_while_the_job_runs_ends_it(tmp_path: Path, change: Any) -> None:
    source = write_questions(tmp_path / "in.jsonl", 400)
    before, script = source.read_bytes(), Changing(source, change)
    scripted = models(cheap=script, expensive=script)
    with pytest.raises(InputError, match=r"in.jsonl (changed while the job ran|:)|cannot read"):
        run(tmp_path, models=scripted)
    assert not (tmp_path / "out.jsonl").exists()
    assert 3 <= script.asked < 400
    source.write_bytes(before)
    asked = script.asked
    rows = rows_of(run(tmp_path, models=scripted, resume=True))
    assert len(rows) == 400
    assert script.asked <= asked + 400


def test_an_input_that_is_only_touched_goes_on(tmp_path: Path) -> None:
    source = write_questions(tmp_path / "in.jsonl", 40)
    script = Changing(source, Path.touch)
    scripted = models(cheap=script, expensive=script)
    assert len(rows_of(run(tmp_path, models=scripted))) == 40


def test_places_where_nothing_can_be_written_are_told_before_anything_is_paid(tmp_path: Path) -> None:
    write_questions(tmp_path / "in.jsonl", 3)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(InputError, match="it is no regular file"):
        run(tmp_path, out=tmp_path / "folder.jsonl", force=True)
    (tmp_path / "b.jsonl.job" / ".lock").mkdir(parents=True)
    with pytest.raises(InputError, match=r"cannot lock .*lock: Is a directory"):
        run(tmp_path, out=tmp_path / "b.jsonl")
    assert not (tmp_path / "ledger.db").exists() or not rows_paid(tmp_path)


@pytest.mark.parametrize("name", ["in.jsonl", "link.jsonl"])
def test_results_never_take_the_place_of_their_questions(tmp_path: Path, name: str) -> None:
    source = write_questions(tmp_path / "in.jsonl", 3)
    (tmp_path / "link.jsonl").symlink_to(source)
    before = source.read_bytes()
    for how in ({}, {"force": True}, {"resume": True}):
        with pytest.raises(InputError, match="is the file that is read"):
            run(tmp_path, out=tmp_path / name, **how)
    assert source.read_bytes() == before
    assert not (tmp_path / "ledger.db").exists()


def rows_paid(folder: Path) -> int:
    with sqlite3.connect(folder / "ledger.db") as database:
        found: int = database.execute("SELECT count(*) FROM holds").fetchone()[0]
    database.close()
    return found


@pytest.mark.skipif(os.name != "posix", reason="needs modes of files")
def test_a_read_only_folder_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_questions(tmp_path / "in.jsonl", 3)
    (tmp_path / "ro").mkdir()
    refused = {str(tmp_path / "ro")}
    real = os.access  # for root, who may write everywhere, every folder is writable
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) not in refused and real(path, mode))
    with pytest.raises(InputError, match="ro: it is read-only"):
        run(tmp_path, out=tmp_path / "ro" / "out.jsonl")


def command(folder: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    (folder / "catalogue.toml").write_text(CATALOGUE)
    home = {"VIATICUM_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    return subprocess.run(
        [*COMMAND, *arguments], cwd=folder, env={**os.environ, **home}, stderr=subprocess.PIPE, **options
    )


SOLVE = (
    "solve",
    "What is 6 times 7?",
    "--model",
    "fast",
    "--strategy",
    "cot",
    "--budget",
    "0.01",
    "--catalogue",
    "catalogue.toml",
    "--kind",
    "text",
)


def test_an_output_in_another_encoding_shows_what_it_lacks_as_an_escape(tmp_path: Path) -> None:
    done = command(tmp_path, *SOLVE, env={"PYTHONIOENCODING": "cp1252"}, stdout=subprocess.PIPE)
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False)
    assert rb"\u4e09" in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [SOLVE, ("models", "list"), ("--help",), ("keys", "list", "--json")])
def test_an_output_that_is_full_is_one_line(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    with open("/dev/full", "wb") as full:
        done = command(tmp_path, *arguments, stdout=full)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr
    assert done.stderr.rstrip().endswith(b"error: No space left on device")
