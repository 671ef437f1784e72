"""Reads question files: CSV, JSON lines or Parquet with a question and, where it is known, the right answer.

What counts as a right answer is `golds`' part, reading the file that of `records`. Leaves out what else the
file of a batch may be (`agents.batch.input`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

from viaticum.errors import DataError
from viaticum.golds import parse_golds, with_options
from viaticum.records import read_values
from viaticum.types import ANSWER_KINDS, Query

COLUMNS = ("id", "question", "answer", "answers", "kind", "options", "choices")  # what a question is made of
MOST_FIELDS = 100  # characters of a row's fields that a message names


@dataclass(frozen=True, slots=True)
class Question:
    """A query with its id, gold answer (None where unknown) and further answers that are right too.

    columns: the other columns of its row, which results keep.
    """

    id: str
    query: Query
    gold: str | None
    others: tuple[str, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def accepted(self) -> tuple[str, ...]:
        """All answers that are right; none where they are unknown."""
        return () if self.gold is None else (self.gold, *self.others)


def read_questions(path: str | Path, *, limit: int | None = None) -> list[Question]:
    """Read the questions of a file: `question`, and optionally `id`, `answer(s)`, `kind`, `options`.

    Args:
        path: CSV, Parquet, or JSON lines under any other suffix; the id of a question without one is the
            number of its row.
        limit: how many questions at most.

    Raises:
        DataError: a line is no object, has no question, an unknown kind, an answer that cannot be read in one
            way only, or the id of an earlier line; names the line.
    """
    questions: list[Question] = []
    locations: dict[str, str] = {}
    for number, (location, row) in enumerate(read_values(path, needs="question"), 1):
        if limit is not None and len(questions) >= limit:
            break
        question = parse_question(row, number, location)
        if question.id in locations:
            raise DataError(f"{location}: id {question.id!r} is that of {locations[question.id]} too")
        locations[question.id] = location.removeprefix(f"{path}, ")
        questions.append(question)
    if not questions:
        raise DataError(f"{path}: no questions; write one object with a question a line")
    return questions


def parse_question(row: Mapping[str, Any], number: int, location: str) -> Question:
    """Parse a question from its JSON object. Raises `DataError`, which starts with the location."""
    text = row.get("question")
    if not isinstance(text, str) or not text.strip():
        fields = shorten(", ".join(map(str, row)), MOST_FIELDS, placeholder=" ...")
        found = f" among the fields {fields}" if row and "question" not in row else ""
        raise DataError(f'{location}: no question{found}; write {{"question": "...", "answer": "..."}}')
    kind = row.get("kind") or None
    if kind is not None and kind not in ANSWER_KINDS:
        raise DataError(f"{location}: unknown answer kind {kind!r}; known: {', '.join(ANSWER_KINDS)}")
    try:
        golds = parse_golds(row, kind)
    except DataError as error:
        raise DataError(f"{location}: {error}") from None
    query = Query(with_options(text, golds.options), golds.kind or "auto")
    first, *others = golds.accepted or (None,)
    given = row.get("id")
    return Question(
        str(number if given in (None, "") or given != given else given),  # NaN: missing in a table of pandas
        query,
        first,
        tuple(each for each in others if each is not None),
        {name: value for name, value in row.items() if name and name not in COLUMNS},
    )


def digest_of(text: str) -> str:
    """Identity of a question, whatever its id: the first 16 hexadecimal digits of its text's SHA-256."""
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]
