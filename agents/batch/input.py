"""Reads and surveys the rows of a batch: plain JSONL, OpenAI's batch format, CSV, Parquet.

Memory does not grow with the file: ids are compared in a temporary database. What is wrong with a row is kept
beside it, with its line. Leaves out reading files (`viaticum.records`) and answering
(`agents.batch.executor`).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from viaticum.agents.workflow.settings import AUTO
from viaticum.errors import DataError, InputError, ViaticumError
from viaticum.generation import GenerationSettings
from viaticum.messages import refuse_parts
from viaticum.questions import COLUMNS, parse_question
from viaticum.records import FileFormat, Record, check_readable, column_names, file_format, read_records
from viaticum.types import Message, Query, split_model

Format = Literal["jsonl", "openai", "csv", "parquet"]
BLOCK_ROWS = 1024  # ids that are compared at a time
ROUTE = "/v1/chat/completions"
MAX_DUPLICATES = 1000  # rows with the id of an earlier row, which are kept in memory


@dataclass(frozen=True, slots=True)
class RequestOverrides:
    """Settings of a row in OpenAI's format.

    Args:
        model: "auto", a model, or model+strategy.
        settings: how its calls are generated.
        messages: the chat, for a model without a strategy.
        extra: further parameters of a remote model, such as response_format.
    """

    model: str
    settings: GenerationSettings
    messages: tuple[Message, ...]
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BatchRow:
    """A row of the input.

    Args:
        number: its index, from 0.
        others: further answers that are right, beside `gold`.
        query: None for a row that cannot be used.
        problem: why it cannot be used, with its line.
    """

    number: int
    id: str
    query: Query | None
    gold: str | None = None
    others: tuple[str, ...] = ()
    overrides: RequestOverrides | None = None
    problem: str = ""

    @property
    def accepted(self) -> tuple[str, ...]:
        """All answers that are right; none where they are unknown."""
        return () if self.gold is None else (self.gold, *self.others)

    @property
    def names_model(self) -> bool:
        """Whether the row names a model or a pair; other rows are routed."""
        return self.overrides is not None and self.overrides.model != AUTO


@dataclass(frozen=True)
class Input:
    """A file of rows. skip: leave out so many first rows; limit: take at most so many."""

    path: Path
    format: Format
    skip: int = 0
    limit: int | None = None

    @classmethod
    def open(
        cls, path: str | Path, *, format: str | None = None, skip: int = 0, limit: int | None = None
    ) -> Input:
        """Open a file; its format is that of its suffix, for JSONL that of its first row.

        Raises:
            InputError: there is no such file or format, or a number is out of range.
        """
        path = Path(path)
        if format is not None and format not in get_args(Format):
            raise InputError(f"unknown format {format!r}; known: {', '.join(get_args(Format))}")
        check_readable(path)
        if skip < 0 or (limit is not None and limit < 1):
            raise InputError(f"skip is 0 or more and limit 1 or more, got {skip} and {limit}")
        return cls(path, _format_of(path) if format is None else format, skip, limit)  # type: ignore[arg-type]

    def rows(self) -> Iterator[BatchRow]:
        """Read the rows in the order of the file.

        Raises:
            InputError: the file cannot be read.
            DataError: none of its rows can be read.
        """
        make = _openai_row if self.format == "openai" else _plain_row
        for number, (location, record) in enumerate(self._records()):
            yield _row(make, number, self.skip + number + 1, location, record)

    def other_columns(self) -> list[str]:
        """Columns that no row's question is made of, which the results keep; none in OpenAI's format."""
        if self.format == "openai":
            return []
        return [name for name in column_names(self.path, self.format) if name and name not in COLUMNS]

    def other_values(self) -> Iterator[dict[str, Any]]:
        """The values of `other_columns`, a dict a row; empty for rows that cannot be read."""
        for _, record in self._records():
            values = record if isinstance(record, dict) else {}
            yield {name: value for name, value in values.items() if name and name not in COLUMNS}

    def _records(self) -> Iterator[Record]:
        kind: FileFormat = "jsonl" if self.format == "openai" else self.format
        stop = None if self.limit is None else self.skip + self.limit
        needs = "" if self.format == "openai" else "question"
        return itertools.islice(read_records(self.path, kind, needs=needs), self.skip, stop)

    def state(self) -> tuple[int, ...]:
        """What changes when the file is written or replaced; () where it is gone."""
        try:
            found = self.path.stat()
        except OSError:
            return ()
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

    def digest(self) -> str:
        """SHA-256 of the file."""
        try:
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror or error}") from None


@dataclass
class Survey:
    """Counts and a sample of all rows.

    rows: of the input. bad: rows that cannot be used. pending: usable rows that are not done. graded: rows
    with a known answer. problems: messages of the first bad rows. duplicates: messages of rows with the id of
    an earlier row, by number of the row. sample: (index among the pending rows, row). named: models that
    usable rows name.
    """

    rows: int = 0
    bad: int = 0
    pending: int = 0
    graded: int = 0
    problems: list[str] = field(default_factory=list)
    duplicates: dict[int, str] = field(default_factory=dict)
    sample: list[tuple[int, BatchRow]] = field(default_factory=list)
    named: set[str] = field(default_factory=set)

    def note(self, problem: str) -> None:
        self.bad += 1
        if len(self.problems) < 5:
            self.problems.append(problem)


def survey(rows: Iterator[BatchRow], done: Callable[[int], bool], most: int, *, seed: int = 0) -> Survey:
    """Look at every row: count, compare ids, and draw a sample of at most `most` rows that are not done.

    Raises `DataError` where more than `MAX_DUPLICATES` rows have an id that an earlier one has.
    """
    found, rng = Survey(), random.Random(seed)
    first_routed: tuple[int, BatchRow] | None = None
    with closing(sqlite3.connect("")) as ids:  # a temporary file, removed when it is closed
        ids.execute("CREATE TABLE ids (id TEXT PRIMARY KEY, number INTEGER) WITHOUT ROWID")
        while block := list(itertools.islice(rows, BLOCK_ROWS)):
            duplicates = _find_duplicates(ids, block)
            for row in block:
                found.rows += 1
                found.graded += row.gold is not None
                problem = row.problem or duplicates.get(row.number, "")
                if problem:
                    found.note(problem)
                    if not row.problem:
                        found.duplicates[row.number] = problem
                    continue
                if row.overrides is not None and row.names_model:
                    found.named.add(split_model(row.overrides.model)[0])
                if done(row.number):
                    continue
                position = found.pending
                found.pending += 1
                if first_routed is None and not row.names_model:
                    first_routed = (position, row)
                if len(found.sample) < most:
                    found.sample.append((position, row))
                elif (chosen := rng.randrange(found.pending)) < most:
                    found.sample[chosen] = (position, row)
            if len(found.duplicates) > MAX_DUPLICATES:
                raise DataError(
                    f"more than {MAX_DUPLICATES} rows have an id that an earlier row has; the first: "
                    f"{next(iter(found.duplicates.values()))}; give every row an id of its own"
                )
    # Prices are computed from rows that are routed: the sample holds at least one.
    if first_routed is not None and all(row.names_model for _, row in found.sample):
        found.sample[-1] = first_routed
    return found


def _find_duplicates(ids: sqlite3.Connection, block: Sequence[BatchRow]) -> dict[int, str]:
    """Messages of the rows of a block whose id came before, by number; the other ids are stored."""
    before = ids.total_changes
    new = [(row.id, row.number) for row in block if not row.problem]
    ids.executemany("INSERT OR IGNORE INTO ids VALUES (?, ?)", new)
    if ids.total_changes - before == len(new):
        return {}
    found = {}
    for name, number in new:
        first = ids.execute("SELECT number FROM ids WHERE id = ?", (name,)).fetchone()[0]
        if first != number:
            found[number] = f"row {number + 1}: id {_short(name)!r} is that of row {first + 1} too"
    return found


# --- rows -----------------------------------------------------------------------------------------


def _row(
    make: Callable[[dict[str, Any], int, int, str], BatchRow],
    number: int,
    count: int,
    location: str,
    record: dict[str, Any] | str,
) -> BatchRow:
    """count: number of the row in the whole file, from 1; names a row without an id."""
    if isinstance(record, str):
        return BatchRow(number, f"row-{count}", None, problem=f"{location}: {record}")
    try:
        row = make(record, number, count, location)
        _check_id(row.id, location)
        return row
    except ViaticumError as error:
        return BatchRow(number, _id_of(record, count), None, problem=str(error))


def _plain_row(values: dict[str, Any], number: int, count: int, location: str) -> BatchRow:
    if "custom_id" in values and "question" not in values:
        raise DataError(
            f"{location}: a row of OpenAI's batch format among plain ones; put them into a file of their own"
        )
    question = parse_question(values, count, location)
    return BatchRow(number, question.id, question.query, question.gold, question.others)


def _openai_row(values: dict[str, Any], number: int, count: int, location: str) -> BatchRow:
    from viaticum.agents.openai_api.errors import APIError
    from viaticum.agents.openai_api.requests import parse_request

    if "custom_id" not in values and "question" in values:
        raise DataError(
            f"{location}: a plain row among those of OpenAI's batch format; put it into a file of its own"
        )
    name, body = values.get("custom_id"), values.get("body")
    if not isinstance(name, str) or not isinstance(body, dict):
        raise DataError(
            f'{location}: write {{"custom_id": "...", "method": "POST", "url": "{ROUTE}", "body": {{...}}}}'
        )
    if values.get("method") != "POST" or values.get("url") != ROUTE:
        raise DataError(
            f"{location}: {values.get('method')} {values.get('url')} cannot be asked; only POST {ROUTE}"
        )
    try:
        asked = parse_request(json.dumps(body).encode())
        messages = asked.to_messages()
        if asked.model == AUTO or split_model(asked.model)[1]:
            refuse_parts(asked.model, messages)
    except (APIError, InputError) as error:
        raise DataError(f"{location}: {error}") from None
    for field_name, wrong in (
        ("stream", bool(asked.stream)),
        ("n", (asked.n or 1) > 1),
        ("budget", asked.budget is not None),
        ("policy", asked.policy is not None),
        ("only", asked.only is not None),  # of the whole job: --only
        ("max_seconds", asked.max_seconds is not None),
        ("session", asked.session is not None),
        ("tools", asked.tools is not None),
        ("logprobs", bool(asked.logprobs)),
    ):
        if wrong:
            raise DataError(f"{location}: a row of a batch cannot have {field_name!r}; leave it out")
    if messages[-1]["role"] != "user":
        raise DataError(
            f"{location}: the last message is the {messages[-1]['role']}'s; end with the user's question"
        )
    overrides = RequestOverrides(asked.model, asked.to_settings(), tuple(messages), asked.to_extra())
    plain = all(set(each) == {"role", "content"} for each in messages)
    before = tuple(messages[:-1]) if plain else ()
    return BatchRow(number, name, Query(messages[-1]["content"], messages=before), overrides=overrides)


def _check_id(id: str, location: str) -> None:
    if not id.strip() or not id.isprintable() or len(id) > 200:
        raise DataError(f"{location}: an id is 1 to 200 printable characters, got {_short(id)!r}")


def _id_of(values: dict[str, Any], count: int) -> str:
    given = values.get("custom_id", values.get("id"))
    return given if isinstance(given, str) and 0 < len(given) <= 200 else f"row-{count}"


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:60] + "..."


# --- files ----------------------------------------------------------------------------------------


def _format_of(path: Path) -> Format:
    if (found := file_format(path)) != "jsonl":
        return found
    for _, values in read_records(path):
        if isinstance(values, dict):
            return "openai" if "custom_id" in values and "question" not in values else "jsonl"
    return "jsonl"


def mark_duplicates(rows: Iterator[BatchRow], duplicates: dict[int, str]) -> Iterator[BatchRow]:
    """The rows; those whose id came before have that as their problem."""
    for row in rows:
        yield replace(row, problem=duplicates[row.number], query=None) if row.number in duplicates else row
