"""Writes the journal of a job, a line for every finished row, and the results, atomically.

The journal (`rows.jsonl` in the job's folder) is append-only. A kill may cut its last line and lose lines
that were not flushed: these rows are rebuilt from the ledger, which has their texts. The results have the
order of the input, in its format or that of their own suffix. Leaves out the rows themselves
(`viaticum.jobs`).
"""

from __future__ import annotations

import re
import time
import uuid
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from viaticum.agents.batch.input import Format, Input
from viaticum.errors import DataError
from viaticum.files import JournalFile, atomic_file, encode_json
from viaticum.jobs import ROWS, JobRow, parse_row, row_line
from viaticum.money import usd_digits
from viaticum.records import delimiter_for, free_name, plain, write_table

FLUSH_SECONDS = 0.5
SYNC_SECONDS = 5.0
ADVICE = "; what was paid for is in the ledger: make room and go on with --resume"
COLUMNS = (
    "id",
    "state",
    "answer",
    "correct",
    "reason",
    "pair",
    "cost_nanousd",
    "cost_usd",
    "text",
    "thinking",
)
_TYPES: dict[str, type] = {**dict.fromkeys(COLUMNS, str), "correct": bool, "cost_nanousd": int}
_NUMBER = re.compile(rb'"number": (\d+)}\n$')


@dataclass
class Counts:
    """Counts of the rows that are done. graded: rows with a known answer; right: of those."""

    answered: int = 0
    failed: int = 0
    skipped: int = 0
    graded: int = 0
    right: int = 0
    cached: int = 0

    @property
    def done(self) -> int:
        return self.answered + self.failed + self.skipped

    def add(self, row: JobRow) -> None:
        setattr(self, row.state, getattr(self, row.state) + 1)
        self.graded += row.correct is not None
        self.right += row.correct is True
        self.cached += any(call.cached for call in row.calls)


class RowJournal:
    """Journal of the finished rows. Opening it drops skipped rows and a torn last line.

    Args:
        folder: of the job.
        rows: how many rows the job has.

    Raises:
        InputError: the file cannot be read or written.
        DataError: a line is damaged, or belongs to another job.
    """

    def __init__(self, folder: Path, rows: int) -> None:
        self.path = folder / ROWS
        self.counts = Counts()
        self._done = bytearray(rows)
        self._file = JournalFile(
            self.path, flush_seconds=FLUSH_SECONDS, sync_seconds=SYNC_SECONDS, advice=ADVICE
        )
        if self.path.exists():
            self._restore(rows)
        self._file.sync()  # the file is there from the beginning, for readers of the job

    def is_done(self, number: int) -> bool:
        return bool(self._done[number])

    def write(self, row: JobRow) -> None:
        """Append a row. Raises `InputError` where the disk is full; the ledger then has what was paid for."""
        self._file.append_line(row_line(row))
        self._done[row.number] = 1
        self.counts.add(row)

    def sync(self) -> None:
        self._file.sync()

    def close(self) -> None:
        self._file.close()

    def in_order(self) -> Iterator[JobRow]:
        """Read the rows that are done in the order of the input. Takes 8 bytes of memory a row."""
        self.sync()
        offsets = array("q", bytes(8 * len(self._done)))
        with self.path.open("rb") as file:
            offset = 0
            for line in file:
                offsets[_number_in(line, self.path)] = offset + 1  # 0: not done
                offset += len(line)
            for number, start in enumerate(offsets):
                if start:
                    file.seek(start - 1)
                    yield parse_row(file.readline(), f"{self.path}, row {number + 1}")

    def _restore(self, rows: int) -> None:
        """Read the rows that are done, and write them anew without those that are to be answered again."""
        for scratch in self.path.parent.glob(f".{ROWS}*"):  # of a process that was killed here
            scratch.unlink()
        with atomic_file(self.path, advice=ADVICE) as scratch, scratch.open("wb") as kept:
            for number, line in self._file.lines():
                location = f"{self.path}, line {number}"
                row = parse_row(line, location)
                if not 0 <= row.number < rows:
                    raise DataError(
                        f"{location}: row {row.number + 1} of {rows}; the file belongs to another job"
                    )
                if row.state == "skipped" or self._done[row.number]:
                    continue
                self._done[row.number] = 1
                self.counts.add(row)
                kept.write(line)


def _number_in(line: bytes, path: Path) -> int:
    """The row's number, which ends its line."""
    found = _NUMBER.search(line)
    return int(found[1]) if found else parse_row(line, str(path)).number


# --- results --------------------------------------------------------------------------------------


def format_for(out: Path, given: Format) -> Format:
    """Format of the results: by their suffix, else the input's. OpenAI's input gives OpenAI's form."""
    suffix = out.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return "csv"
    if suffix == ".parquet":
        return "parquet"
    return given if given == "openai" or not suffix else "jsonl"


def write_results(path: Path, format: Format, rows: Iterator[JobRow], job: str, given: Input) -> None:
    """Write all rows in one atomic write, with the other columns of the input.

    A column of the input that is named like one of the results becomes `input_` and its name.

    Args:
        path: the results.
        format: their format.
        rows: in the order of the input; some may be missing.
        job: its name, from which OpenAI's ids are made.
        given: the input.

    Raises:
        InputError: the file cannot be written, or the input cannot be read any more.
    """
    with atomic_file(path, advice=ADVICE) as scratch:
        if format == "openai":
            _write_openai(scratch, rows, job)
            return
        names = {name: free_name(name, COLUMNS) for name in given.other_columns()}
        both = _with_other_values(rows, given, names)
        if format == "jsonl":
            _write_jsonl(scratch, both)
            return
        table = (_all_values(row) | others for row, others in both)
        write_table(scratch, format, table, _TYPES, list(names.values()), delimiter=delimiter_for(path))


Joined = Iterator[tuple[JobRow, dict[str, Any]]]  # a row, and the other columns of its input


def _with_other_values(rows: Iterator[JobRow], given: Input, names: Mapping[str, str]) -> Joined:
    if not names:
        yield from ((row, {}) for row in rows)
        return
    others = enumerate(given.other_values())
    for row in rows:
        found = next((values for number, values in others if number == row.number), {})
        yield row, {names[name]: value for name, value in found.items() if name in names}


def _all_values(row: JobRow) -> dict[str, Any]:
    """The columns of a row; dollars are a text, which is exact."""
    return {
        name: usd_digits(row.cost_nanousd) if name == "cost_usd" else getattr(row, name) for name in COLUMNS
    }


def _values(row: JobRow) -> dict[str, Any]:
    values = _all_values(row)
    for name in ("text", "thinking"):
        if values[name] is None:
            del values[name]
    if row.gold is None:
        del values["correct"]
    return values


def _write_jsonl(path: Path, rows: Joined) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row, others in rows:
            file.write(
                encode_json(_values(row) | {name: plain(each) for name, each in others.items()}) + "\n"
            )


def _write_openai(path: Path, rows: Iterator[JobRow], job: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(encode_json(_openai_line(row, job)) + "\n")


def _openai_line(row: JobRow, job: str) -> dict[str, Any]:
    """A line of OpenAI's batch output: a response or an error."""
    name = uuid.uuid5(uuid.NAMESPACE_URL, f"viaticum:{job}/{row.id}").hex
    line: dict[str, Any] = {"id": f"batch_req_{name}", "custom_id": row.id, "response": None, "error": None}
    if row.state == "answered":
        body = _openai_body(row, f"chatcmpl-{name}")
        return line | {"response": {"status_code": 200, "request_id": name, "body": body}}
    return line | {"error": {"code": row.state, "message": row.reason}}


def _openai_body(row: JobRow, name: str) -> dict[str, Any]:
    read, made = (
        sum(counts[index] for call in row.calls for counts in call.usage.values()) for index in (0, 1)
    )
    text = row.text or ""
    if row.answer and row.answer not in text:
        text = f"{text}\n\n{row.answer}" if text else row.answer  # a program's output, a vote
    reasons = {"stop": "stop", "length": "length", "loop": "length", "tool_calls": "tool_calls"}
    ended = reasons.get(row.calls[-1].finish_reason, "stop") if row.calls else "stop"
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if row.thinking:
        message["reasoning_content"] = row.thinking
    return {
        "id": name,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": row.pair,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": ended}],
        "usage": {
            "prompt_tokens": read,
            "completion_tokens": made,
            "total_tokens": read + made,
            "completion_tokens_details": {
                "reasoning_tokens": sum(call.reasoning_tokens for call in row.calls),
            },
        },
        "viaticum": {
            "answer": row.answer,
            "cost_nanousd": row.cost_nanousd,
            "cost_usd": usd_digits(row.cost_nanousd),
            "routes": [call.pair for call in row.calls],
        },
    }
