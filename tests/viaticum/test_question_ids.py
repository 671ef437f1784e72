"""Ids of questions: what is missing is the number of the row, in every form that tables have for it."""

from __future__ import annotations

import json
from pathlib import Path

from viaticum.questions import read_questions


def test_an_id_that_is_missing_is_the_number_of_the_row(tmp_path: Path) -> None:
    given = (None, float("nan"), "", 0, "x")
    rows = [{"question": f"{number}?", "id": each} for number, each in enumerate(given)]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"question": "without an id?"}]))
    assert [each.id for each in read_questions(path)] == ["1", "2", "3", "0", "x", "6"]
