"""Question files in every format, and the columns that results keep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from viaticum.errors import DataError, InputError
from viaticum.questions import read_questions
from viaticum.records import ParquetTable, column_names, read_records

ROWS = [
    {"id": "a", "question": "2 +\n2?", "answer": "4", "topic": "sums"},
    {"id": "b", "question": "3?", "topic": "more"},
]


def files(folder: Path) -> list[Path]:
    """The same two questions as JSON lines, CSV with three separators, and Parquet."""
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    table = [["id", "question", "answer", "topic"], ["a", '"2 +\n2?"', "4", "sums"], ["b", "3?", "", "more"]]
    for name, separator in (("comma.csv", ","), ("semicolon.csv", ";"), ("q.tsv", "\t")):
        text = "\r\n".join(map(separator.join, table))
        (folder / name).write_bytes(("\ufeff" + text).encode())
    types = dict.fromkeys(("id", "question", "answer"), str)
    with ParquetTable(folder / "q.parquet", types, ["topic"]) as parquet:
        for row in ROWS:
            parquet.write(row)
    return sorted(folder.iterdir())


def test_one_reader_for_every_format(tmp_path: Path) -> None:
    for path in files(tmp_path):
        first, second = read_questions(path)
        assert (first.id, first.query.text, first.gold) == ("a", "2 +\n2?", "4"), path
        assert (second.id, second.gold, second.columns) == ("b", None, {"topic": "more"}), path
        assert column_names(path) == ["id", "question", "answer", "topic"], path


def test_errors_name_file_and_row(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text("id,question\na,1?\na,2?\n")
    with pytest.raises(DataError, match=r"q.csv, line 3: id 'a' is that of line 2 too"):
        read_questions(tmp_path / "q.csv")
    (tmp_path / "q.csv").write_text("id, question \na,1?\n")
    assert [each.query.text for each in read_questions(tmp_path / "q.csv")] == ["1?"]
    (tmp_path / "q.csv").write_text("id,frage\na,1?\n")
    with pytest.raises(DataError, match="no column named question"):
        read_questions(tmp_path / "q.csv")
    (tmp_path / "q.csv").write_bytes(b"question\ncaf\xe9?\n")
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        read_questions(tmp_path / "q.csv")
    with pytest.raises(InputError, match="no such file"):
        list(read_records(tmp_path / "none.csv"))


def test_columns_of_parquet_are_typed_and_checked(tmp_path: Path) -> None:
    import pyarrow.parquet as parquet

    with ParquetTable(tmp_path / "t.parquet", {"id": str}, ["level", "tags", "score", "ok"]) as table:
        table.write({"id": "a", "level": 1, "tags": ["x"], "score": 1, "ok": True})
        table.write({"id": "b", "score": 0.5})
    read = parquet.read_table(tmp_path / "t.parquet").to_pylist()
    assert read[0] == {"id": "a", "level": 1, "tags": '["x"]', "score": 1.0, "ok": True}
    assert read[1]["level"] is None
    with (
        pytest.raises(DataError, match="column level: 'high' is no int"),
        ParquetTable(tmp_path / "u.parquet", {"level": int}) as table,
    ):
        table.write({"level": "high"})
