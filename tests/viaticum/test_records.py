"""Question files in every format, and the columns that results keep."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest

from viaticum.errors import DataError, InputError
from viaticum.questions import read_questions
from viaticum.records import ParquetTable, column_names, read_records, write_table

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


@pytest.mark.parametrize(
    ("text", "rows", "line"),
    [
        ('id,question\n1,"a\n2,b\n3,c\n', [], 2),
        ('id,question\n1,a\n2,"b', [{"id": "1", "question": "a"}], 3),
        (
            'id,question\n1,a\n2,b"\n"3,c\n4,d\n',
            [{"id": "1", "question": "a"}, {"id": "2", "question": 'b"'}],
            4,
        ),
    ],
)
def test_a_quote_that_is_not_closed_swallows_no_row_without_a_word(
    tmp_path: Path, text: str, rows: list[dict[str, str]], line: int
) -> None:
    (tmp_path / "q.csv").write_text(text)
    *whole, (location, problem) = read_records(tmp_path / "q.csv")
    assert [values for _, values in whole] == rows
    assert location.endswith(f"line {line}")
    assert "a quote is not closed" in str(problem)
    with pytest.raises(DataError, match="a quote is not closed"):
        read_questions(tmp_path / "q.csv")


def test_a_quote_that_is_not_closed_in_the_first_line(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text('id,"question\n1,a\n')
    with pytest.raises(DataError, match="a quote in the first line"):
        list(read_records(tmp_path / "q.csv"))


def test_texts_are_no_formulas_and_come_back_as_they_were(tmp_path: Path) -> None:
    values = ["=1+1", "+cmd|' /C calc'!A0", "-2 apples", "@SUM(A1)", "\tx", "-5", "+1e3", "'tis", "a=b", ""]
    path = tmp_path / "q.csv"
    write_table(
        path, "csv", ({"id": str(n), "text": each} for n, each in enumerate(values)), {"id": str}, ["text"]
    )
    with path.open(newline="") as file:
        written = [row["text"] for row in csv.DictReader(file)]
    assert written == [
        "'=1+1",
        "'+cmd|' /C calc'!A0",
        "'-2 apples",
        "'@SUM(A1)",
        "'\tx",
        "-5",
        "+1e3",
        "'tis",
        "a=b",
        "",
    ]
    assert [values.get("text", "") for _, values in read_records(path) if isinstance(values, dict)] == values


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"Frage,Antwort\n1,2\n", "no column named question; its columns are Frage, Antwort; rename one"),
        (b"Question,x\n1,2\n", "its columns are Question, x; rename one of them"),
        (b"", "no column named question; the file is empty"),
        ("question,answer\n1,2\n".encode("utf-16"), "the first line is not UTF-8; save the file as UTF-8"),
    ],
)
def test_a_file_without_the_column_says_which_it_has(tmp_path: Path, text: bytes, says: str) -> None:
    (tmp_path / "q.csv").write_bytes(text)
    with pytest.raises(DataError) as caught:
        list(read_records(tmp_path / "q.csv", needs="question"))
    assert says in str(caught.value)


def test_a_folder_is_told_from_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it is a folder; name a file in it"):
        list(read_records(tmp_path))


def test_a_pipe_is_told_from_a_missing_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "q.csv")
    with pytest.raises(InputError, match="a pipe is read once, so save it first"):
        list(read_records(tmp_path / "q.csv"))
