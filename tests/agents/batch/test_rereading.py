"""The kept texts of a profile read again: the table anew, without a model."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from viaticum.agents.batch.profile_journal import profile_lock
from viaticum.agents.batch.rereading import reread
from viaticum.catalogue import Catalogue
from viaticum.cli import app
from viaticum.errors import DataError, InputError
from viaticum.outcomes import read_outcomes, read_verdicts, write_outcomes
from viaticum.questions import Question
from viaticum.types import Outcome, Query

TEXTS = {
    ("q1", "cot"): ["4 + 3 = 7.\nThe answer is 7."],
    ("q1", "pot"): ["```python\nprint(3 + 4)\n```"],
    ("q1", "self-consistency:cot:3"): ["The answer is 7.", "The answer is 8.", "The answer is 7."],
    ("q2", "cot"): ["<think>\nThe answer is 9.\n</think>\nThe answer is 5."],
}
QUESTIONS = [Question("q1", Query("3 + 4?", "number"), "7"), Question("q2", Query("2 + 3?", "number"), "5")]


def old_rows() -> list[Outcome]:
    """As a reader that is mostly wrong left them."""
    return [
        Outcome("d", name, "", "m", strategy, answer, answer == "7", 30, 20, 1234, 1.5, "stop")
        for (name, strategy), answer in zip(TEXTS, ["7", None, "8", "9"], strict=True)
    ]


def old_line(row: Outcome) -> dict[str, object]:
    """A line of the texts file of the first format, without thoughts and without the end of each sample."""
    kept = ("question_id", "model", "strategy", "answer", "correct", "finish_reason")
    return {name: getattr(row, name) for name in kept} | {"texts": TEXTS[row.question_id, row.strategy]}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    write_outcomes(tmp_path / "o.jsonl", old_rows())
    lines = "".join(json.dumps(old_line(row)) + "\n" for row in old_rows())
    (tmp_path / "texts.jsonl").write_text(lines)
    return tmp_path / "o.jsonl"


def test_texts_are_read_anew_and_the_rest_stays(table: Path) -> None:
    texts = table.with_name("texts.jsonl")
    read = reread(QUESTIONS, table, catalogue=Catalogue.load(), completions=texts)
    assert [(row.answer, row.correct) for row in read.outcomes] == [("7", True)] * 3 + [("5", True)]
    assert read_outcomes(table) == list(read.outcomes)
    assert [replace(row, answer=None, correct=False) for row in read.outcomes] == [
        replace(row, answer=None, correct=False) for row in old_rows()
    ]
    assert [(each.before.answer, each.after.answer) for each in read.changes] == [
        (None, "7"),
        ("8", "7"),
        ("9", "5"),
    ]
    assert all(each.newly_right and not each.newly_wrong for each in read.changes)
    kept = [json.loads(line) for line in texts.read_text().splitlines()]
    assert [line["answer"] for line in kept] == ["7", "7", "7", "5"]
    assert kept[2]["finish_reasons"] == ["stop"] * 3
    again = reread(QUESTIONS, table, catalogue=Catalogue.load(), completions=texts)
    assert not again.changes


def test_verdicts_stay_on_answers_that_stay(table: Path) -> None:
    said = [
        replace(row, model="judge", strategy=f"verify:{row.pair}", answer="yes", correct=row.correct)
        for row in old_rows()
        if row.answer is not None
    ]
    write_outcomes(table, [*old_rows(), *said])
    read = reread(QUESTIONS, table, catalogue=Catalogue.load(), completions=table.with_name("texts.jsonl"))
    assert len(read.outcomes) == 4
    assert [row.strategy for row in read_verdicts(table)] == ["verify:m+cot"]
    assert read_verdicts(table)[0].question_id == "q1", "of q2 another answer is read now"


def test_verdicts_are_right_or_wrong_by_the_right_answers_of_now(table: Path) -> None:
    """What was told of an answer stands; questions that are left out are left out of verdicts too."""
    texts = table.with_name("texts.jsonl")
    reread(QUESTIONS, table, catalogue=Catalogue.load(), completions=texts)
    now = read_outcomes(table)
    said = [replace(row, model="judge", strategy=f"verify:{row.pair}", answer="yes") for row in now]
    write_outcomes(table, [*now, *said])
    questions = [replace(each, gold="8") for each in QUESTIONS]
    read = reread(questions, table, catalogue=Catalogue.load(), completions=texts, with_text=False)
    assert any(each.newly_wrong for each in read.changes)
    kept = read_verdicts(table)
    assert [row.correct for row in kept] == [row.correct for row in read.outcomes] == [False] * len(now)
    assert {row.question for row in (*read_outcomes(table), *kept, *read.outcomes)} == {""}
    with profile_lock(table), pytest.raises(InputError, match="another run of profile writes"):
        reread(questions, table, catalogue=Catalogue.load(), completions=texts)


def test_right_answers_are_those_of_now(table: Path) -> None:
    questions = [replace(each, gold="8", others=("7",) if each.id == "q2" else ()) for each in QUESTIONS]
    texts = table.with_name("texts.jsonl")
    read = reread(questions, table, catalogue=Catalogue.load(), completions=texts)
    assert [row.correct for row in read.outcomes] == [False] * 4
    assert next(each.newly_wrong for each in read.changes)


def test_the_journal_of_a_run_that_goes_on_is_read_and_left_alone(tmp_path: Path) -> None:
    journal = tmp_path / "o.parquet.journal"
    rows = [asdict(row) | {"texts": TEXTS[row.question_id, row.strategy]} for row in old_rows()]
    lines = [json.dumps({"fingerprint": "f"}), *map(json.dumps, rows), '{"dataset": "d", "ques']
    journal.write_text("\n".join(lines))
    before = journal.read_bytes()
    texts = tmp_path / "texts.jsonl"
    read = reread(QUESTIONS, tmp_path / "o.parquet", catalogue=Catalogue.load(), completions=texts)
    assert read.unfinished
    assert [row.answer for row in read_outcomes(tmp_path / "o.parquet")] == ["7", "7", "7", "5"]
    assert journal.read_bytes() == before
    assert len(texts.read_text().splitlines()) == 4


def test_files_that_do_not_belong_together_are_refused(table: Path, tmp_path: Path) -> None:
    catalogue, texts = Catalogue.load(), table.with_name("texts.jsonl")
    with pytest.raises(InputError, match="--completions"):
        reread(QUESTIONS, table, catalogue=catalogue)
    with pytest.raises(InputError, match="no outcome table"):
        reread(QUESTIONS, tmp_path / "none.jsonl", catalogue=catalogue, completions=texts)
    with pytest.raises(DataError, match="is not one of these questions"):
        reread(QUESTIONS[:1], table, catalogue=catalogue, completions=texts)
    with pytest.raises(DataError, match="has no answer"):
        reread(
            [replace(each, gold=None) for each in QUESTIONS], table, catalogue=catalogue, completions=texts
        )
    with pytest.raises(DataError, match="line 1: not a line of kept texts"):
        reread(QUESTIONS, table, catalogue=catalogue, completions=table)
    texts.write_text("")
    with pytest.raises(DataError, match="has no text"):
        reread(QUESTIONS, table, catalogue=catalogue, completions=texts)
    assert [row.answer for row in read_outcomes(table)] == ["7", None, "8", "9"]


def test_the_command_says_what_changed(table: Path, tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    rows = [{"id": q.id, "question": q.query.text, "answer": q.gold, "kind": "number"} for q in QUESTIONS]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = table.with_name("texts.jsonl")
    command = ["profile", str(file), "--out", str(table), "--completions", str(texts), "--reread"]
    said = CliRunner().invoke(app, [*command, "--json"])
    assert said.exit_code == 0, said.output
    result = json.loads(said.stdout)
    assert (result["newly_right"], result["newly_wrong"], len(result["changes"])) == (3, 0, 3)
    assert result["changes"][0] == {
        "pair": "m+pot",
        "question_id": "q1",
        "before": None,
        "after": "7",
        "newly_right": True,
        "newly_wrong": False,
    }
    said = CliRunner().invoke(app, command)
    assert "0 read otherwise, 0 newly right, 0 newly wrong" in said.stdout
    assert CliRunner().invoke(app, [*command, "--model", "m"]).exit_code != 0
