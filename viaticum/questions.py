"""Reads question files: JSONL with a question and, where it is known, the right answer.

What counts as a right answer is `golds`' part. Leaves out the larger and other files of a batch
(`agents.batch.input`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from viaticum.errors import DataError
from viaticum.files import read_jsonl
from viaticum.golds import parse_golds, with_options
from viaticum.types import ANSWER_KINDS, Query


@dataclass(frozen=True, slots=True)
class Question:
    """A query with its id, gold answer (None where unknown) and further answers that are right too."""

    id: str
    query: Query
    gold: str | None
    others: tuple[str, ...] = ()

    @property
    def accepted(self) -> tuple[str, ...]:
        """All answers that are right; none where they are unknown."""
        return () if self.gold is None else (self.gold, *self.others)


def read_questions(path: str | Path, *, limit: int | None = None) -> list[Question]:
    """Read the questions of a JSONL file: `question`, and optionally `id`, `answer(s)`, `kind`, `options`.

    Args:
        path: the file; the id of a question without one is its line number.
        limit: how many questions at most.

    Raises:
        DataError: a line is no object, has no question, an unknown kind, an answer that cannot be read in one
            way only, or the id of an earlier line; names the line.
    """
    questions: list[Question] = []
    lines: dict[str, int] = {}
    for number, row in read_jsonl(path):
        if limit is not None and len(questions) >= limit:
            break
        question = parse_question(row, number, f"{path}, line {number}")
        if question.id in lines:
            raise DataError(
                f"{path}, line {number}: id {question.id!r} is that of line {lines[question.id]} too"
            )
        lines[question.id] = number
        questions.append(question)
    if not questions:
        raise DataError(f"{path}: no questions; write one object with a question a line")
    return questions


def parse_question(row: Mapping[str, Any], number: int, location: str) -> Question:
    """Parse a question from its JSON object. Raises `DataError`, which starts with the location."""
    text = row.get("question")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f'{location}: no question; write {{"question": "...", "answer": "..."}}')
    kind = row.get("kind") or None
    if kind is not None and kind not in ANSWER_KINDS:
        raise DataError(f"{location}: unknown answer kind {kind!r}; known: {', '.join(ANSWER_KINDS)}")
    try:
        golds = parse_golds(row, kind)
    except DataError as error:
        raise DataError(f"{location}: {error}") from None
    query = Query(with_options(text, golds.options), golds.kind or "auto")
    first, *others = golds.accepted or (None,)
    return Question(
        str(row.get("id", number)), query, first, tuple(each for each in others if each is not None)
    )


def digest_of(text: str) -> str:
    """Identity of a question, whatever its id: the first 16 hexadecimal digits of its text's SHA-256."""
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]
