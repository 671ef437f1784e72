"""The rows of a batch, good and bad, in every format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from viaticum.agents.batch import input as batch_input
from viaticum.agents.batch.input import BatchRow, Input, mark_duplicates, survey
from viaticum.errors import DataError, InputError

BODY = {"model": "auto", "messages": [{"role": "user", "content": "What is 2 + 2?"}]}


def rows_of(path: Path, text: str | bytes, **settings: Any) -> list[BatchRow]:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return list(Input.open(path, **settings).rows())


def openai(id: str, **body: Any) -> str:
    return json.dumps(
        {"custom_id": id, "method": "POST", "url": "/v1/chat/completions", "body": {**BODY, **body}}
    )


def test_plain_rows_have_a_question_and_what_is_known_of_it(tmp_path: Path) -> None:
    first, second, third = rows_of(
        tmp_path / "q.jsonl",
        '\ufeff{"id": 7, "question": "2 + 2?", "answer": 4, "kind": "number"}\n\n'
        '{"question": "3 + 3?", "answer": "so it is\\n#### 6"}\n{"question": "?", "level": 3}',
    )
    assert (first.number, first.id, first.gold) == (0, "7", "4")
    assert first.query is not None
    assert (first.query.text, first.query.kind) == ("2 + 2?", "number")
    assert (second.id, second.gold) == ("2", "6")
    assert (third.number, third.id, third.gold, third.problem) == (2, "3", None, "")


def test_skip_and_limit_count_rows_and_names_stay_those_of_the_file(tmp_path: Path) -> None:
    text = "".join(f'{{"question": "{n}?"}}\n' for n in range(6))
    rows = rows_of(tmp_path / "q.jsonl", text, skip=2, limit=3)
    assert [(row.number, row.id) for row in rows] == [(0, "3"), (1, "4"), (2, "5")]


def test_openai_rows_say_which_model_and_how_it_writes(tmp_path: Path) -> None:
    (row, other) = rows_of(
        tmp_path / "q.jsonl",
        openai("a", model="cheap", max_tokens=9, temperature=0.5, seed=3, stop="x")
        + "\n"
        + openai("b", messages=[{"role": "system", "content": "Be short."}, *BODY["messages"]]),  # type: ignore[misc]
    )
    assert row.overrides is not None
    assert row.overrides.model == "cheap"
    assert row.overrides.settings.given == {
        "max_new_tokens": 9,
        "temperature": 0.5,
        "seed": 3,
        "stop": ("x",),
    }
    assert other.query is not None
    assert other.query.messages == ({"role": "system", "content": "Be short."},)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"stream": True}, "'stream'"),
        ({"n": 2}, "'n'"),
        ({"tools": []}, "'tools'"),
        ({"budget": 1}, "'budget'"),
        ({"only": "local"}, "'only'"),
        ({"max_seconds": 5}, "'max_seconds'"),
        ({"session": "s"}, "'session'"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "end with the user"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_openai_rows_that_cannot_be_asked(tmp_path: Path, body: dict[str, Any], why: str) -> None:
    (row,) = rows_of(tmp_path / "q.jsonl", openai("a", **body))
    assert why in row.problem
    assert "line 1" in row.problem


def test_csv_and_parquet_are_read_alike(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    csv = rows_of(tmp_path / "q.csv", 'id,question,answer,other\r\na,"2 +\n2?",4,x\r\nb,3?,,\r\n')
    table = [
        {"id": "a", "question": "2 +\n2?", "answer": "4", "other": 1},
        {"id": "b", "question": "3?", "answer": None, "other": 2},
    ]
    parquet.write_table(pa.Table.from_pylist(table), tmp_path / "q.parquet")
    assert list(Input.open(tmp_path / "q.parquet").rows()) == csv
    assert [(row.id, row.gold) for row in csv] == [("a", "4"), ("b", None)]


BAD = {
    "no question": ('{"id": "x"}', "no question among the fields id; write"),
    "another name": (
        '{"prompt": "1 + 1?", "expected": 2}',
        "no question among the fields prompt, expected; write",
    ),
    "empty question": ('{"question": " "}', "no question"),
    "kind": ('{"question": "?", "kind": "colour"}', "unknown answer kind 'colour'"),
    "no JSON": ('{"question": ', "not valid JSON"),
    "no object": ('["question"]', "not a JSON object"),
    "mixed": (openai("x"), "put them into a file of their own"),
    "UTF-8": (b'{"question": "caf\xe9?"}', "not UTF-8"),
    "id": ('{"id": "a\\nb", "question": "?"}', "printable"),
    "long": (b'{"question": "' + b"x" * (10 << 20) + b'"}', "longer than 8 MiB"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_row_is_told_with_its_line_and_the_others_are_read(tmp_path: Path, bad: str) -> None:
    line, why = BAD[bad]
    raw = line if isinstance(line, bytes) else line.encode()
    first, second, third = rows_of(
        tmp_path / "q.jsonl", b'{"question": "1?"}\n' + raw + b'\n{"question": "3?"}\n'
    )
    assert (first.problem, third.problem) == ("", "")
    assert "q.jsonl, line 2: " in second.problem
    assert why in second.problem.replace("it into a file of its own", "them into a file of their own")
    assert second.query is None
    assert len(second.problem) < 300


@pytest.mark.parametrize(
    ("text", "why"), [(b"question\ncaf\xe9?\n", "not UTF-8"), (b"id,question\n1,2,3\n", "more fields")]
)
def test_bad_lines_of_csv(tmp_path: Path, text: bytes, why: str) -> None:
    (row,) = rows_of(tmp_path / "q.csv", text)
    assert why in row.problem


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        Input.open(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="no column named question"):
        rows_of(tmp_path / "q.csv", "a,b\n1,2\n")
    with pytest.raises(DataError, match="not a readable Parquet"):
        rows_of(tmp_path / "q.parquet", "no")
    with pytest.raises(InputError, match="unknown format"):
        Input.open(tmp_path / "q.csv", format="xml")
    with pytest.raises(InputError, match="limit 1 or more"):
        Input.open(tmp_path / "q.csv", limit=0)


def test_a_survey_counts_samples_and_finds_ids_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_input, "BLOCK_ROWS", 7)
    lines = [f'{{"id": "q{n % 90}", "question": "{n}?", "answer": {n}}}' for n in range(100)]
    (tmp_path / "q.jsonl").write_text("\n".join([*lines, "{}"]))
    given = Input.open(tmp_path / "q.jsonl")
    found = survey(given.rows(), lambda number: number < 50, 10)
    assert (found.rows, found.bad, found.pending, found.graded) == (101, 11, 40, 100)
    assert found.problems[0] == "row 91: id 'q0' is that of row 1 too"
    assert len(found.problems) == 5
    assert len(found.sample) == 10
    assert all(row.number == place + 50 for place, row in found.sample)
    assert len({place for place, _ in found.sample}) == 10
    marked = [row for row in mark_duplicates(given.rows(), found.duplicates) if row.problem]
    assert [row.number for row in marked] == [*range(90, 101)]
    monkeypatch.setattr(batch_input, "MAX_DUPLICATES", 5)
    with pytest.raises(DataError, match="more than 5 rows"):
        survey(given.rows(), lambda number: False, 10)
