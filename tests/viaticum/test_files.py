"""Atomic writes, journals and run locks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from viaticum.errors import DataError, InputError
from viaticum.files import JournalFile, atomic_file, atomic_write, read_jsonl, run_lock, write_jsonl


def lines_of(journal: JournalFile) -> list[tuple[int, dict[str, object]]]:
    return [(number, json.loads(line)) for number, line in journal.lines()]


def test_an_atomic_write_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for content in ("old\r\nlines", b"new"):
        atomic_write(path, content)
        assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_atomic_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    atomic_write(path, "old")
    with pytest.raises(UnicodeEncodeError), atomic_file(path) as scratch:
        scratch.write_text("half \udc80", encoding="utf-8")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_of_writing_names_the_file_and_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "a.txt"
    error = pytest.raises(InputError, match=rf"cannot write {path}: No such file or directory; make room")
    with error, atomic_file(path, advice="; make room") as scratch:
        scratch.write_text("x")
    with pytest.raises(InputError, match=rf"cannot write {path}: .*; make room"):
        JournalFile(path, advice="; make room").append({})


def test_a_link_stays_one(tmp_path: Path) -> None:
    """Such as a catalogue that is kept with other settings."""
    (tmp_path / "kept").mkdir()
    link, target = tmp_path / "a.txt", tmp_path / "kept" / "a.txt"
    link.symlink_to(target)
    for content in ("made", "replaced"):
        atomic_write(link, content)
        assert (link.is_symlink(), target.is_symlink(), target.read_text()) == (True, False, content)
    assert [path.name for path in target.parent.iterdir()] == ["a.txt"]


def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path) -> None:
    """As root, /dev/null and /dev/stdout would be: here a pipe, and a link to a device."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to("/dev/null")
    for name in ("pipe", "null", "."):
        with pytest.raises(InputError, match="it is no regular file; give another path"):
            atomic_write(tmp_path / name, "x")
    assert (tmp_path / "pipe").is_fifo()
    assert Path("/dev/null").is_char_device()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["null", "pipe"]


def test_json_lines_are_read_as_they_were_written(tmp_path: Path) -> None:
    rows = [{"text": "é\u2028\x85\r\x0c"}, {"n": 2}]  # separators that are no newlines
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert list(read_jsonl(tmp_path / "rows.jsonl")) == [(1, rows[0]), (2, rows[1])]


@pytest.mark.parametrize("line", ["{", "[]", "\udcff"])
def test_a_line_that_is_no_object_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"{}\n\n" + line.encode(errors="surrogateescape") + b"\n")
    with pytest.raises(DataError, match="line 3: not"):
        list(read_jsonl(path))


@pytest.mark.parametrize("torn", [b"", b'{"n": 3', b'{"n": 3}'])
def test_a_journal_goes_on_after_a_torn_line(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    journal = JournalFile(path)
    assert lines_of(journal) == []
    assert not path.exists(), "made with its first line"
    journal.append({"text": "é\u2028"})
    journal.append({"n": 2})
    journal.close()
    with path.open("ab") as file:
        file.write(torn)

    again = JournalFile(path)
    assert lines_of(again) == [(1, {"text": "é\u2028"}), (2, {"n": 2})]
    again.append({"n": 4})
    again.close()
    assert path.read_bytes() == '{"text": "é\u2028"}\n{"n": 2}\n{"n": 4}\n'.encode()


def test_a_journal_that_may_wait_keeps_lines_until_it_is_synced(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = JournalFile(path, flush_seconds=1000, sync_seconds=1000)
    journal.append({"n": 1})
    assert path.read_bytes() == b""
    journal.sync()
    assert path.read_bytes() == b'{"n": 1}\n'
    journal.append({"n": 2})
    journal.close()
    assert path.read_bytes() == b'{"n": 1}\n{"n": 2}\n'


def test_a_run_lock_is_held_by_one(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    refused = pytest.raises(InputError, match="another run")
    with run_lock(path, busy="another run"), refused, run_lock(path, busy="another run"):
        raise AssertionError
    with run_lock(path, busy="another run"):
        assert path.exists()


def test_a_run_lock_waits_and_is_free_after_a_kill(tmp_path: Path) -> None:
    hold = (
        "import sys, time\nfrom pathlib import Path\nfrom viaticum.files import run_lock\n"
        "with run_lock(Path(sys.argv[1])): print(flush=True); time.sleep(1000)"
    )
    path, waited = tmp_path / ".lock", []
    with subprocess.Popen([sys.executable, "-c", hold, str(path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with run_lock(path, waiting=lambda: (waited.append(path), other.kill())):
            assert waited == [path]
