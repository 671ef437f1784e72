"""A run as columns: what a job's folder, or an outcome table, says about each of its rows.

Rows are read one at a time and only what is counted is kept, so that a job of a million rows can be reported on.
Leaves out the ledger (`trail`) and all arithmetic.
"""

from __future__ import annotations

import heapq
import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np

from viaticum.errors import DataError, InputError
from viaticum.jobs import JOB, Job, JobRow, read_rows
from viaticum.money import MAX_NANOUSD
from viaticum.outcomes import read_outcomes
from viaticum.types import Outcome

Array = np.ndarray[Any, Any]
STATES = ("answered", "skipped", "failed")
NO_ROUTE = "(no route)"
EXAMPLES = 3
LONGEST_EXAMPLE = 240  # characters
LONGEST_TEXT = 4_000
MOST_REASONS = 200


@dataclass(frozen=True, slots=True)
class Columns:
    """One item a row, in the order they ended; NaN where it is not known.

    text: 64 bits that stand for the question, 0 where its text is not known. route indexes `routes`. graded: the right
    answer is known. tried: at least one call was made. cached: some call was answered from an earlier one. cost is
    nano-dollars, tokens are output tokens of all calls of the row.
    """

    ids: tuple[str, ...]
    text: Array
    state: Array
    route: Array
    graded: Array
    right: Array
    accuracy: Array
    cost: Array
    cost_p50: Array
    cost_p90: Array
    tokens: Array
    tokens_p50: Array
    tokens_p90: Array
    seconds: Array
    calls: Array
    cached: Array

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Example:
    """A row to show. texts are cut at `LONGEST_EXAMPLE` characters."""

    id: str
    question: str
    reason: str
    answer: str | None
    gold: str | None


@dataclass(slots=True)
class Group:
    """Rows that came to nothing for one reason: numbers in it stand as N.

    state: failed, skipped, no answer (nothing could be read from the text) or wrong.
    """

    state: str
    reason: str
    count: int = 0
    examples: list[Example] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Written:
    """A text and who wrote which part of it."""

    id: str
    question: str
    pieces: tuple[tuple[str, str], ...]


@dataclass(slots=True)
class Texts:
    """What is kept of texts that several models wrote: a few of them whole, and who wrote which twentieth of all.

    parts: by model, characters in each twentieth of the text, summed over the texts.
    """

    count: int = 0
    shown: list[Written] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Run:
    """A run that was read. job is None for an outcome table; `outcomes` holds that table.

    calls: by key of a hold, the row that paid and what the row says it cost, and what the provider says. cached: keys of
    calls that were answered from an earlier one. usage: by
    model, [input, output] tokens as the rows tell them. single: the pair whose rows stand for an outcome table that
    holds several.
    """

    name: str
    path: str
    kind: Literal["job", "outcome table"]
    rows: Columns
    routes: tuple[str, ...]
    job: Job | None = None
    calls: dict[str, tuple[int, int, int | None]] = field(default_factory=dict)
    cached: frozenset[str] = frozenset()
    usage: dict[str, list[int]] = field(default_factory=dict)
    groups: tuple[Group, ...] = ()
    texts: Texts = field(default_factory=Texts)
    outcomes: tuple[Outcome, ...] = ()
    single: str = ""
    warnings: tuple[str, ...] = ()


PARTS = 20


def read_run(path: str | Path) -> Run:
    """A job's folder, its RESULTS file beside the folder, or an outcome table.

    Raises `InputError` where it is none of them, `DataError` for a damaged job or table. Damaged rows of a job are left
    out and named in `warnings`.
    """
    path = Path(path)
    if path.is_dir():
        return _read_job(path)
    folder = path.with_name(path.name + ".job")
    if (folder / JOB).is_file():
        return _read_job(folder)
    if not path.is_file():
        raise InputError(
            f"nothing at {path}; name a job's folder (RESULTS.jsonl.job), its RESULTS file, or an outcome table"
        )
    try:
        return _read_table(path)
    except DataError as error:
        raise DataError(
            f"{path} is no run: there is no folder {folder.name} beside it, and it is no outcome table ({error})"
        ) from None


def text_number(question: str | None) -> int:
    """64 bits that stand for a question; its spaces do not count."""
    words = " ".join((question or "").split())
    return int.from_bytes(blake2b(words.encode(), digest_size=8).digest(), "big") or 1 if words else 0


def shortened(text: str, most: int = LONGEST_EXAMPLE) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


class _Reader:
    """Rows come in, columns and counts go out."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}
        self.routes: dict[str, int] = {}
        self.lines = _Lines()
        self.calls: dict[str, tuple[int, int, int | None]] = {}
        self.cached: set[str] = set()
        self.usage: dict[str, list[int]] = {}
        self.groups: dict[tuple[str, str], Group] = {}
        self.texts = Texts()
        self.again = 0
        self._shown: list[tuple[int, int, Written]] = []

    def take(self, row: JobRow) -> None:
        if row.id in self.ids:
            self.again += 1
            return
        line = self._line(row)
        number = self.ids[row.id] = len(self.ids)
        self.lines.add(line)
        for call in row.calls:
            for model, (read, made) in call.usage.items():
                count = self.usage.setdefault(model, [0, 0])
                count[0], count[1] = count[0] + read, count[1] + made
            if call.cached:
                self.cached.add(call.key)
            elif call.key:
                self.calls[call.key] = (number, call.cost_nanousd, call.provider_nanousd)
        self._group(row)
        if row.pieces:
            self._written(row)

    def _line(self, row: JobRow) -> tuple[Any, ...]:
        tokens = [made for call in row.calls for _, made in call.usage.values()]
        numbers = (row.accuracy, row.cost_p50, row.cost_p90, row.tokens_p50, row.tokens_p90)
        known = [float("nan") if each is None else float(each) for each in numbers]
        cost, seconds, used = int(row.cost_nanousd), float(row.seconds), float(sum(tokens))
        if abs(cost) > MAX_NANOUSD:
            raise ValueError(f"a cost out of range: {cost}")
        tried = [call for call in row.calls if not call.cached]
        return (
            text_number(row.question),
            STATES.index(row.state),
            self.routes.setdefault(
                row.route or NO_ROUTE, len(self.routes)
            ),  # only now: a damaged row has none
            row.gold is not None or row.correct is not None,
            row.correct is True,
            *known,
            cost,
            used if row.calls else float("nan"),
            seconds,
            len(row.calls),
            len(tried) < len(row.calls),
        )

    def _group(self, row: JobRow) -> None:
        state, reason = _came_to_nothing(row)
        if not state:
            return
        kind = re.sub(r"(?<!\w)\d+(?:[.,]\d+)*", "N", shortened(reason, 160))
        if (state, kind) not in self.groups and len(self.groups) >= MOST_REASONS:
            kind = "other reasons"
        group = self.groups.setdefault((state, kind), Group(state, kind))
        group.count += 1
        if len(group.examples) < EXAMPLES:
            group.examples.append(
                Example(
                    row.id,
                    shortened(row.question),
                    shortened(row.reason),
                    _short(row.answer),
                    _short(row.gold),
                )
            )

    def _written(self, row: JobRow) -> None:
        pieces = tuple((str(model), str(text)) for model, text in row.pieces or () if text)
        if len({model for model, _ in pieces}) < 2:
            return
        self.texts.count += 1
        length, place = sum(len(text) for _, text in pieces), 0
        for model, text in pieces:
            parts = self.texts.parts.setdefault(model, [0.0] * PARTS)
            _spread(parts, place / length, (place + len(text)) / length, len(text))
            place += len(text)
        if length <= LONGEST_TEXT:
            item = (len(pieces), -self.texts.count, Written(row.id, shortened(row.question), pieces))
            (heapq.heappush if len(self._shown) < EXAMPLES else heapq.heappushpop)(self._shown, item)
            self.texts.shown = [written for *_, written in sorted(self._shown, reverse=True)]

    def columns(self) -> Columns:
        return self.lines.made(self.ids)


def _came_to_nothing(row: JobRow) -> tuple[str, str]:
    """What became of a row that is not right, and why; ("", "") for any other."""
    if row.state != "answered":
        return row.state, row.reason or "no reason was given"
    if row.answer is not None and row.correct is not False:
        return "", ""
    cut = any(call.finish_reason == "length" for call in row.calls[-1:])
    ended = "the text was cut at its longest length" if cut else row.reason or "the text ended by itself"
    return "no answer" if row.answer is None else "wrong", ended


def _short(answer: str | None) -> str | None:
    return None if answer is None else shortened(str(answer), 80)


def _spread(parts: list[float], begin: float, end: float, amount: float) -> None:
    """Add an amount to the parts of [0, 1] that a stretch covers, by how much of it lies in each."""
    first, last = int(begin * PARTS), min(PARTS - 1, int(end * PARTS))
    width = max(end - begin, 1e-12)
    for part in range(first, last + 1):
        covered = min(end, (part + 1) / PARTS) - max(begin, part / PARTS)
        parts[part] += amount * max(0.0, covered) / width


class _Lines:
    """Columns that grow: text, state, route, graded, right, accuracy, cost_p50, cost_p90, tokens_p50, tokens_p90, cost,
    tokens, seconds, calls, cached."""

    KINDS = "Qbibbdddddqddib"  # of the standard library's arrays, in that order

    def __init__(self) -> None:
        self.columns = [array(kind) for kind in self.KINDS]

    def add(self, line: tuple[Any, ...]) -> None:
        for column, value in zip(self.columns, line, strict=True):
            column.append(value)

    def made(self, ids: Iterable[str]) -> Columns:
        made = [np.array(column) for column in self.columns]
        text, state, route, graded, right, accuracy, cost_p50, cost_p90, tokens_p50, tokens_p90, *rest = made
        cost, tokens, seconds, calls, cached = rest
        return Columns(
            tuple(ids),
            text,
            state,
            route,
            graded.astype(bool),
            right.astype(bool),
            accuracy,
            cost,
            cost_p50,
            cost_p90,
            tokens,
            tokens_p50,
            tokens_p90,
            seconds,
            calls,
            cached.astype(bool),
        )


def _read_job(folder: Path) -> Run:
    job = Job.load(folder)
    reader, damaged = _Reader(), list[str]()
    try:
        for row in read_rows(folder, lambda error: damaged.append(str(error))):
            try:
                reader.take(row)
            except (TypeError, ValueError, AttributeError, OverflowError) as error:
                damaged.append(f"{folder.name}, row {row.id!r}: {error}")
    except InputError as error:
        damaged.append(str(error))
    warnings = []
    if damaged:
        lines = "a line" if len(damaged) == 1 else f"{len(damaged)} lines"
        warnings.append(
            f"{lines} of the job's rows could not be read and are left out. The first: {damaged[0]}"
        )
    if reader.again:
        warnings.append(f"{reader.again} rows are there twice; the first of each counts")
    return Run(
        name=folder.name.removesuffix(".job").removesuffix(".jsonl") or folder.name,
        path=str(folder),
        kind="job",
        rows=reader.columns(),
        routes=tuple(reader.routes),
        job=job,
        calls=reader.calls,
        cached=frozenset(reader.cached - reader.calls.keys()),
        usage=reader.usage,
        groups=tuple(sorted(reader.groups.values(), key=lambda group: -group.count)),
        texts=reader.texts,
        warnings=tuple(warnings),
    )


def _read_table(path: Path) -> Run:
    outcomes = tuple(read_outcomes(path))
    if not outcomes:
        raise DataError("it is empty")
    rows = {(row.dataset, str(row.question_id), row.pair) for row in outcomes}
    questions = {(dataset, question) for dataset, question, _ in rows}
    single = ""
    mine: Sequence[Outcome] = outcomes
    if len(rows) > len(questions):
        from viaticum.reports.frontier import best_pair

        best = best_pair(outcomes)
        single, mine = str(best), [row for row in outcomes if row.pair == best]
    reader, datasets = _Reader(), {dataset for dataset, _ in questions}
    for row in mine:
        name = str(row.question_id) if len(datasets) == 1 else f"{row.dataset}/{row.question_id}"
        reader.take(_as_job_row(row, name))
    columns = reader.columns()
    costs = {
        f"{'' if len(datasets) == 1 else row.dataset + '/'}{row.question_id}": row.cost_nanousd
        for row in mine
    }
    if any(cost is None for cost in costs.values()):
        raise DataError("some of its rows do not say what they cost")
    return Run(
        name=path.name,
        path=str(path),
        kind="outcome table",
        rows=columns,
        routes=tuple(reader.routes),
        usage=reader.usage,
        groups=tuple(sorted(reader.groups.values(), key=lambda group: -group.count)),
        outcomes=outcomes,
        single=single,
    )


def _as_job_row(row: Outcome, name: str) -> JobRow:
    from viaticum.jobs import Call

    cost = row.cost_nanousd or 0
    usage = {row.model: [row.input_tokens or 0, row.output_tokens or 0]}
    call = Call(str(row.pair), "", cost, usage, row.seconds or 0.0, row.finish_reason or "")
    return JobRow(
        id=name,
        question=row.question or "",
        state="answered",
        answer=row.answer,
        correct=bool(row.correct),
        route=str(row.pair),
        pair=str(row.pair),
        cost_nanousd=cost,
        seconds=row.seconds or 0.0,
        calls=(call,),
    )
