"""The folder of a job, written and read back."""

from __future__ import annotations

from pathlib import Path

import pytest

from viaticum.errors import DataError, InputError
from viaticum.jobs import JOB, ROWS, Call, Job, JobRow, Preview, read_rows, row_line


def make_job(**changes: object) -> Job:
    facts = {
        "input": "in.jsonl",
        "results": "out.jsonl",
        "rows": 2,
        "budget": "night",
        "limit_nanousd": 5,
        "ledger": "ledger.db",
        "policy": "best",
    }
    return Job(**{**facts, **changes})  # type: ignore[arg-type]


def test_a_job_is_read_as_it_was_written(tmp_path: Path) -> None:
    job = make_job(previews=(Preview(5, 0.5, 4, 6),), fingerprint={"input": "abc"}, ending="drained")
    job.save(tmp_path)
    assert Job.load(tmp_path) == job


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    call = Call("m:cot", "key", 7, {"m": [3, 4]}, 0.5, "stop", answer="4")
    rows = [
        JobRow("1", "2 + 2?", "answered", calls=(call,), pieces=[["m", "4 é"]]),
        JobRow("2", "?", "skipped", "x"),
    ]
    (tmp_path / ROWS).write_text("".join(map(row_line, rows)), encoding="utf-8")
    assert list(read_rows(tmp_path)) == rows


def test_a_folder_without_a_job_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="viaticum batch"):
        Job.load(tmp_path)


@pytest.mark.parametrize("text", ["{}", '{"format": 1}', '{"format": 2}', "[]", "{"])
def test_a_damaged_job_is_an_error_that_names_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / JOB).write_text(text)
    with pytest.raises(DataError, match=r"job\.json"):
        Job.load(tmp_path)


def test_a_damaged_row_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    (tmp_path / ROWS).write_text(row_line(JobRow("1", "?", "failed", "x")) + '{"id": "2"}\n')
    with pytest.raises(DataError, match="line 2"):
        list(read_rows(tmp_path))
