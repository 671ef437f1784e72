"""Right answers in question files: read in one way only, or refused with what to write."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from viaticum.agents.batch.input import Input
from viaticum.errors import DataError
from viaticum.questions import parse_question, read_questions
from viaticum.strategies.answers import is_right


def golds(**row: Any) -> tuple[str, ...]:
    return parse_question({"question": "Which?", **row}, 1, "here").accepted


def kind_of(**row: Any) -> str:
    return parse_question({"question": "Which?", **row}, 1, "here").query.kind


@pytest.mark.parametrize(
    ("answer", "accepted"),
    [
        ("72", ("72",)),
        (72, ("72",)),
        (72.0, ("72",)),
        (0.5, ("0.5",)),
        (-(10**30), (str(-(10**30)),)),
        (Decimal("1.50"), ("1.50",)),
        (True, ("yes",)),
        (datetime.date(2021, 5, 3), ("2021-05-03",)),
        (datetime.datetime(2021, 5, 3), ("2021-05-03",)),
        (None, ()),
        ("", ()),
        ("  ", ()),
        (float("nan"), ()),
        ([], ()),
        ([None], ()),
        (["72"], ("72",)),
        (["72", "72"], ("72",)),
        ([[72]], ("72",)),
        ("['72']", ("72",)),
        ('{"value": 72}', ("72",)),
        ({"value": "72"}, ("72",)),
        ({"value": "Paris", "aliases": ["City of Light"]}, ("Paris", "City of Light")),
        ({"text": ["in May", "May"], "answer_start": [3, 6]}, ("in May", "May")),
        ("[1, 2]", ("[1, 2]",)),
        ("{1, 2}", ("{1, 2}",)),
        ("She sells 3 + 4 = 7 eggs.\n#### 7", ("7",)),
        (r"We get $x = 5$, so the answer is $\boxed{5}$.", ("5",)),
        (r"First \boxed{3}, but then it is \boxed{\frac{1}{2}}", (r"\frac{1}{2}",)),
        (r"The roots are $\boxed{-2}$ and $\boxed{3}$.", ("-2, 3",)),
        (r"\boxed{\left\{1, 2\right\}}", (r"\left\{1, 2\right\}",)),
        (r"\boxed 7", ("7",)),
        ("The answer is 42", ("42",)),
        ("Answer: Paris", ("Paris",)),
    ],
)
def test_a_gold_answer_is_read(answer: object, accepted: tuple[str, ...]) -> None:
    assert golds(answer=answer) == accepted


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"answer": [1, 2]}, 'write|"answers"'),
        ({"answer": ["Paris", "London"]}, '"answers": \\["a", "b"\\]'),
        ({"answer": "['Paris', 'London']"}, '"answers"'),
        ({"answer": {"number": "3", "spans": []}}, "is an object"),
        ({"answer": float("inf")}, "is no text, number"),
        ({"answer": b"72"}, "is no text, number"),
        ({"answer": "nan"}, "leave it out"),
        ({"answer": "None"}, "leave it out"),
        ({"answer": "It takes 3 steps.\n####"}, "after the last ####"),
        ({"answer": "#### Solution\nIt is 3."}, "after the last ####"),
        ({"answer": r"So it is \boxed{"}, "is not closed"),
        ({"answer": r"So it is \boxed{}"}, "is empty"),
        ({"answer": "A long story. " * 40}, "write the final answer alone"),
        ({"answer": True, "kind": "number"}, "is a truth value"),
        ({"answer": "maybe", "kind": "boolean"}, "neither yes nor no"),
        ({"answer": 2, "kind": "choice"}, "names no choice"),
        ({"answer": "a cat", "kind": "choice"}, "names no choice"),
        ({"answer": 4, "options": ["a", "b", "c", "d"]}, "names none of the 4 options"),
        ({"answer": 2, "options": ["1", "2", "3"]}, "names more than one of the 3 options"),
        ({"answer": "A", "options": "a or b"}, "are no list"),
        ({"answer": "A", "options": ["x"]}, "are no list"),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused(row: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says) as refused:
        golds(**row)
    assert str(refused.value).startswith("here: ")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(b)", "B"),
        ("B) Rome", "B"),
        ("Rome", "B"),
        ("rome.", "B"),
        (1, "B"),
        (r"\boxed{B}", "B"),
    ],
)
def test_options_give_a_letter(answer: object, letter: str) -> None:
    row = {"answer": answer, "options": ["Paris", "Rome", "Oslo"]}
    assert golds(**row) == (letter,)
    assert kind_of(**row) == "choice"


def test_labelled_options_are_named_by_their_labels() -> None:
    choices = {"text": ["Paris", "Rome"], "label": ["1", "2"]}
    assert golds(answer="2", choices=choices) == ("B",)
    assert golds(answer="B", options={"A": "Paris", "B": "Rome"}) == ("B",)


def test_options_are_asked_with_the_question() -> None:
    asked = parse_question({"question": "Which is in Italy?", "options": ["Oslo", "Rome"]}, 1, "here")
    assert asked.query.text == "Which is in Italy?\nA) Oslo\nB) Rome"
    given = {"question": "Is it (A) Oslo or (B) Rome?", "options": ["Oslo", "Rome"], "answer": "B"}
    assert parse_question(given, 1, "here").query.text == "Is it (A) Oslo or (B) Rome?"


def test_several_accepted_answers() -> None:
    accepted = golds(answers=["Paris", "City of Light", None], kind="text")
    assert accepted == ("Paris", "City of Light")
    assert is_right("paris", accepted, "text")
    assert is_right("the City of Light", accepted, "text")
    assert not is_right("Rome", accepted, "text")
    assert not is_right(None, accepted, "text")


def test_kinds_follow_from_answers() -> None:
    assert kind_of(answer="3 + 4 = 7\n#### 7") == "number"
    assert kind_of(answer=True) == "boolean"
    assert kind_of(answer="Paris", kind=None) == "auto"
    assert kind_of(answer="None", kind="text") == "text"


def test_a_refused_answer_names_its_line(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text('{"question": "1?", "answer": "1"}\n{"question": "2?", "answer": [1, 2]}\n')
    with pytest.raises(DataError, match="line 2: the answer"):
        read_questions(file)
    assert "line 2: the answer" in list(Input.open(file).rows())[1].problem


def test_every_format_is_read_by_the_same_rules(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    boxed = r"It is \boxed{7}"
    rows = [
        {"question": "1?", "answers": ["one", "1"], "answer": boxed, "options": None},
        {"question": "2?", "answers": None, "answer": None, "options": ["two", "deux"]},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in.parquet")
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cells = [f'1?,"[""one"", ""1""]",{boxed},', "2?,,,\"['two', 'deux']\""]
    (tmp_path / "in.csv").write_text("question,answers,answer,options\n" + "\n".join(cells) + "\n")
    for name in ("in.parquet", "in.jsonl", "in.csv"):
        read = list(Input.open(tmp_path / name).rows())
        assert [row.problem for row in read] == ["", ""], name
        assert [row.accepted for row in read] == [("7", "one", "1"), ()], name
        assert read[1].query is not None
        assert read[1].query.text == "2?\nA) two\nB) deux", name
