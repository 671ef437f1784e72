"""The folder of a batch job, which stands beside its results and which reports read.

`job.json` holds the settings of the job and how it ended; `rows.jsonl` has a line for every row of the input
that is done. Amounts are nano-dollars. Charges are in the ledger; a row holds the keys of its entries.
Standard library alone. Leaves out running jobs (`agents.batch.run`) and reports (`reports`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

from viaticum.errors import DataError, InputError
from viaticum.files import encode_json, read_jsonl, write_jsonl

JOB, ROWS, CACHE = "job.json", "rows.jsonl", "cache.db"
PROVIDER_BATCHES = "provider_batches.jsonl"
FORMAT = 1
RowState = Literal["answered", "skipped", "failed"]
STATES: tuple[RowState, ...] = get_args(RowState)
T = TypeVar("T")
JobEnd = Literal["running", "completed", "budget_exhausted", "deadline", "drained", "waiting", "cancelled"]


@dataclass(frozen=True, slots=True)
class Call:
    """One settled call.

    key: of its hold. usage: [input, output] tokens by model. provider_nanousd: its cost as the provider
    reports it, if it does. cached: answered from an earlier identical call.
    reasoning_tokens: part of the output tokens; 0 in rows of earlier versions.
    """

    pair: str
    key: str
    cost_nanousd: int
    usage: dict[str, list[int]]
    seconds: float
    finish_reason: str
    answer: str | None = None
    cached: bool = False
    provider_nanousd: int | None = None
    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True)
class JobRow:
    """One row of the input and its result.

    reason: why it was skipped or failed, or a note on the answer. gold, correct: None where the right answer
    is unknown. route: the plan that was chosen. accuracy, cost_p50, cost_p90, tokens_p50, tokens_p90:
    estimates for it before the first call. pair: whose answer it is. calls: those made, in order. pieces:
    [model, text] in the order of the text, where several models wrote it and the job keeps texts. number:
    index of the row in the input, from 0. thinking: what the model thought before its text, where the job
    keeps texts. seen: the router was fitted on this very question; None where it cannot tell.
    """

    id: str
    question: str
    state: RowState
    reason: str = ""
    answer: str | None = None
    gold: str | None = None
    correct: bool | None = None
    text: str | None = None
    route: str = ""
    pair: str = ""
    accuracy: float | None = None
    cost_p50: int | None = None
    cost_p90: int | None = None
    tokens_p50: int | None = None
    tokens_p90: int | None = None
    cost_nanousd: int = 0
    seconds: float = 0.0
    calls: tuple[Call, ...] = ()
    pieces: list[list[str]] | None = None
    number: int = 0
    thinking: str | None = None
    seen: bool | None = None

    def __post_init__(self) -> None:
        if self.state not in STATES:
            raise InputError(f"a row is {', '.join(STATES)}; got {self.state!r}")


@dataclass(frozen=True, slots=True)
class Preview:
    """Forecast at a budget. accuracy: right answers as a share of all rows; costs: of the whole job."""

    budget_nanousd: int
    accuracy: float
    cost_p50: int
    cost_p90: int


@dataclass(frozen=True, slots=True)
class Job:
    """The settings of a job, and how it ended.

    ledger: its path, or its address without a password. budget: the scope that pays. fingerprint: hashes by
    name (input, catalogue, router, policy) that a run which goes on must share. previews: forecasts at
    several budgets, the job's own among them. began, ended: ISO 8601 with zone; ended is None while it runs
    and after a kill. memory: how it began, for a run that goes on (see `agents.batch.resume`).
    """

    input: str
    results: str
    rows: int
    budget: str
    limit_nanousd: int | None
    ledger: str
    policy: str
    engine: str = "local"
    deadline_seconds: float | None = None
    fingerprint: dict[str, str] = field(default_factory=dict)
    previews: tuple[Preview, ...] = ()
    began: str = ""
    ended: str | None = None
    ending: JobEnd = "running"
    version: str = ""
    format: int = FORMAT
    memory: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: str | Path) -> None:
        """Write `job.json` in one atomic write."""
        write_jsonl(Path(folder) / JOB, [asdict(self)])

    @classmethod
    def load(cls, folder: str | Path) -> Job:
        """Read `job.json`.

        Raises:
            InputError: there is none.
            DataError: it is damaged, or of another format.
        """
        path = Path(folder) / JOB
        if not path.is_file():
            raise InputError(
                f"no job in {folder}; make one with: viaticum batch INPUT --budget USD --out RESULTS"
            )
        rows = [row for _, row in read_jsonl(path)]
        if len(rows) != 1 or rows[0].get("format") != FORMAT:
            raise DataError(
                f"{path} is no job of format {FORMAT}; it was made by another version, or damaged"
            )
        previews = tuple(_build(Preview, each, str(path)) for each in rows[0].get("previews", ()))
        return _build(cls, {**rows[0], "previews": previews}, str(path))


_CALL_FIELDS = [each.name for each in fields(Call)]
_ROW_FIELDS = [each.name for each in fields(JobRow)]


def row_line(row: JobRow) -> str:
    """Encode a row as a line of `rows.jsonl`, with its newline."""
    values = {name: getattr(row, name) for name in _ROW_FIELDS}  # `asdict` makes a deep copy
    values["calls"] = [{name: getattr(call, name) for name in _CALL_FIELDS} for call in row.calls]
    return encode_json(values) + "\n"


def read_rows(folder: str | Path, damaged: Callable[[DataError], object] | None = None) -> Iterator[JobRow]:
    """Read the rows that are done, in the order in which they ended.

    Args:
        folder: of the job.
        damaged: called with the error of each line that is no row, which is left out; None raises the first
            one.

    Raises:
        InputError: the file cannot be read.
        DataError: a line is no row; names the line.
    """
    path = Path(folder) / ROWS
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    yield parse_row(line, f"{path}, line {number}")
                except DataError as error:
                    if damaged is None:
                        raise
                    damaged(error)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None


def parse_row(line: bytes, location: str) -> JobRow:
    """Parse a line of `rows.jsonl`. Raises `DataError`, which starts with the location."""
    try:
        row = json.loads(line)
        calls = tuple(_build(Call, each, location) for each in row.get("calls", ()))
        return _build(JobRow, {**row, "calls": calls}, location)
    except DataError:
        raise
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{location}: not a row of a job ({error}); the file is damaged") from None


def _build(kind: type[T], values: Mapping[str, Any], location: str) -> T:
    try:
        return kind(**values)
    except TypeError:  # usually fields of a newer version
        known = _field_names(cast(Any, kind))
    try:
        return kind(**{name: value for name, value in values.items() if name in known})
    except TypeError as error:
        raise DataError(f"{location}: not a {kind.__name__} ({error}); the file is damaged") from None


@cache
def _field_names(kind: type[Any]) -> frozenset[str]:
    return frozenset(each.name for each in fields(kind))
