"""Reading a run: a job's folder, its RESULTS file, or an outcome table.

Rows are read one at a time and only what is counted is kept, so that a job of a million rows can be reported
on.
"""

from __future__ import annotations

import heapq
import re
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from viaticum.errors import DataError, InputError
from viaticum.jobs import JOB, Call, Job, JobRow, read_rows
from viaticum.money import MAX_NANOUSD
from viaticum.outcomes import read_outcomes
from viaticum.reports.outcome_table import best_pair
from viaticum.reports.runs import (
    ANSWER,
    EXAMPLES,
    NO_ROUTE,
    PARTS,
    STATES,
    THINKING,
    Columns,
    Example,
    Group,
    Run,
    Texts,
    Written,
    shortened,
    text_number,
)
from viaticum.types import VERIFY, Outcome, split_model

_CLOSING = re.compile(r"\s*(?:</\w+>|<\|[^|>]*\|>)?\s*")  # of a thought, in the formats that models use
LONGEST_TEXT = 4_000  # characters of a text that is shown whole
MOST_REASONS = 200


def read_run(path: str | Path) -> Run:
    """Read a run. Damaged rows of a job are left out and named in `Run.warnings`.

    Args:
        path: a job's folder, its RESULTS file beside the folder, or an outcome table.

    Raises:
        InputError: the path is none of them.
        DataError: the job or the table is damaged.
    """
    path = Path(path)
    if path.is_dir():
        return _read_job(path)
    folder = path.with_name(path.name + ".job")
    if (folder / JOB).is_file():
        return _read_job(folder)
    if not path.is_file():
        raise InputError(
            f"nothing at {path}; name a job's folder (RESULTS.jsonl.job), its RESULTS file, or an outcome"
            " table"
        )
    try:
        return _read_table(path)
    except DataError as error:
        raise DataError(
            f"{path} is no run: there is no folder {folder.name} beside it, and it is no outcome table"
            f" ({error})"
        ) from None


class _RowCollector:
    """Turns rows, one at a time, into columns and counts."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}
        self.routes: dict[str, int] = {}
        self.growing = _GrowingColumns()
        self.calls: dict[str, tuple[int, int, int | None]] = {}
        self.cached: set[str] = set()
        self.usage: dict[str, list[int]] = {}
        self.groups: dict[tuple[str, str], Group] = {}
        self.texts = Texts()
        self.repeated = 0
        self._shown: list[tuple[int, int, Written]] = []

    def add(self, row: JobRow) -> None:
        if row.id in self.ids:
            self.repeated += 1
            return
        values = self._values(row)  # first: a damaged row leaves nothing behind
        number = self.ids[row.id] = len(self.ids)
        self.growing.add(values)
        for call in row.calls:
            for model, (input_tokens, output_tokens) in call.usage.items():
                count = self.usage.setdefault(model, [0, 0])
                count[0], count[1] = count[0] + input_tokens, count[1] + output_tokens
            if call.cached:
                self.cached.add(call.key)
            elif call.key:
                self.calls[call.key] = (number, call.cost_nanousd, call.provider_nanousd)
        self._group(row)
        if row.pieces or row.thinking:
            self._written(row)

    def _values(self, row: JobRow) -> tuple[Any, ...]:
        output_tokens = [output for call in row.calls for _, output in call.usage.values()]
        numbers = (row.accuracy, row.cost_p50, row.cost_p90, row.tokens_p50, row.tokens_p90)
        known = [float("nan") if each is None else float(each) for each in numbers]
        cost, seconds, used = int(row.cost_nanousd), float(row.seconds), float(sum(output_tokens))
        if abs(cost) > MAX_NANOUSD:
            raise ValueError(f"a cost out of range: {cost}")
        tried = [call for call in row.calls if not call.cached]
        return (
            text_number(row.question),
            STATES.index(row.state),
            # Only now: a damaged row adds no route.
            self.routes.setdefault(row.route or NO_ROUTE, len(self.routes)),
            row.gold is not None or row.correct is not None,
            row.correct is True,
            *known,
            cost,
            used if row.calls else float("nan"),
            seconds,
            sum(split_model(call.pair)[1] != VERIFY for call in row.calls),
            len(tried) < len(row.calls),
            -1 if row.seen is None else bool(row.seen),
        )

    def _group(self, row: JobRow) -> None:
        state, reason = _failure(row)
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
        pieces, thinking = pieces_of(row)
        several = len({model for model, _ in pieces}) > 1
        if not pieces or not (several or thinking):
            return
        texts = self.texts
        texts.count, texts.thought = texts.count + several, texts.thought + bool(thinking)
        length, start = sum(len(text) for _, text in pieces), 0
        for n, (model, text) in enumerate(pieces):
            end = start + len(text)
            phase = THINKING if n < thinking else ANSWER
            kept = [texts.phases.setdefault((phase, model), [0.0] * PARTS)]
            kept += [texts.parts.setdefault(model, [0.0] * PARTS)] if several else []
            for parts in kept:
                _spread(parts, start / length, end / length, len(text))
            start = end
        if length <= LONGEST_TEXT:
            written = Written(row.id, shortened(row.question), pieces, thinking)
            item = (len(pieces), -texts.count - texts.thought, written)
            (heapq.heappush if len(self._shown) < EXAMPLES else heapq.heappushpop)(self._shown, item)
            self.texts.shown = [written for *_, written in sorted(self._shown, reverse=True)]

    def columns(self) -> Columns:
        return self.growing.columns(self.ids)


def _failure(row: JobRow) -> tuple[str, str]:
    """State and reason of a row without a right answer; ("", "") for any other."""
    if row.state != "answered":
        return row.state, row.reason or "no reason was given"
    if row.answer is not None and row.correct is not False:
        return "", ""
    cut = any(call.finish_reason == "length" for call in row.calls[-1:])
    ended = "the text was cut at its longest length" if cut else row.reason or "the text ended by itself"
    return "no answer" if row.answer is None else "wrong", ended


def pieces_of(row: JobRow) -> tuple[tuple[tuple[str, str], ...], int]:
    """(model, text) in order, and how many of these pieces, the first ones, are thinking."""
    pieces = [(str(model), str(text)) for model, text in row.pieces or () if text]
    thinking = row.thinking or ""
    if not pieces:
        model = split_model(row.pair)[0]
        pieces = [(model, text) for text in (thinking, row.text or "") if text]
        return tuple(pieces), int(bool(thinking) and bool(pieces))
    if not thinking:
        return tuple(pieces), 0
    left, found = _end_of_thinking("".join(text for _, text in pieces), thinking), list[tuple[str, str]]()
    count = 0
    for model, text in pieces:
        for part in (text[:left], text[left:]):
            if part:
                found.append((model, part))
        count += bool(text[:left])
        left = max(0, left - len(text))
    return tuple(found), count


def _end_of_thinking(text: str, thinking: str) -> int:
    """Where the answer begins in a text that a thought precedes: after the mark that closes it, if any."""
    start = text.find(thinking.strip())
    if start < 0:  # such as cut, or decoded otherwise
        return min(len(text), len(thinking))
    end = start + len(thinking.strip())
    mark = _CLOSING.match(text, end)
    return mark.end() if mark else end


def _short(answer: str | None) -> str | None:
    return None if answer is None else shortened(str(answer), 80)


def _spread(parts: list[float], begin: float, end: float, amount: float) -> None:
    """Add an amount to the parts of [0, 1] that an interval covers, by how much of it lies in each."""
    first, last = int(begin * PARTS), min(PARTS - 1, int(end * PARTS))
    width = max(end - begin, 1e-12)
    for part in range(first, last + 1):
        covered = min(end, (part + 1) / PARTS) - max(begin, part / PARTS)
        parts[part] += amount * max(0.0, covered) / width


class _GrowingColumns:
    """Columns that grow by a value a row.

    text, state, route, graded, right, accuracy, cost_p50, cost_p90, tokens_p50, tokens_p90, cost, tokens,
    seconds, calls, cached, seen.
    """

    KINDS = "Qbibbdddddqddibb"  # of the standard library's arrays, in that order

    def __init__(self) -> None:
        self.arrays = [array(kind) for kind in self.KINDS]

    def add(self, values: tuple[Any, ...]) -> None:
        for column, value in zip(self.arrays, values, strict=True):
            column.append(value)

    def columns(self, ids: Iterable[str]) -> Columns:
        arrays = [np.array(column) for column in self.arrays]
        text, state, route, graded, right, accuracy, cost_p50, cost_p90, tokens_p50, tokens_p90, *rest = (
            arrays
        )
        cost, tokens, seconds, calls, cached, seen = rest
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
            seen,
        )


def _read_job(folder: Path) -> Run:
    job = Job.load(folder)
    collector, damaged = _RowCollector(), list[str]()
    try:
        for row in read_rows(folder, lambda error: damaged.append(str(error))):
            try:
                collector.add(row)
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
    if collector.repeated:
        warnings.append(f"{collector.repeated} rows are there twice; the first of each counts")
    return Run(
        name=folder.name.removesuffix(".job").removesuffix(".jsonl") or folder.name,
        path=str(folder),
        kind="job",
        rows=collector.columns(),
        routes=tuple(collector.routes),
        job=job,
        calls=collector.calls,
        cached=frozenset(collector.cached - collector.calls.keys()),
        usage=collector.usage,
        groups=tuple(sorted(collector.groups.values(), key=lambda group: -group.count)),
        texts=collector.texts,
        warnings=tuple(warnings),
    )


def _read_table(path: Path) -> Run:
    outcomes = tuple(read_outcomes(path))
    if not outcomes:
        raise DataError("it is empty")
    rows = {(row.dataset, str(row.question_id), row.pair) for row in outcomes}
    questions = {(dataset, question) for dataset, question, _ in rows}
    single = ""
    shown: Sequence[Outcome] = outcomes
    if len(rows) > len(questions):
        best = best_pair(outcomes)
        single, shown = str(best), [row for row in outcomes if row.pair == best]
    collector, datasets = _RowCollector(), {dataset for dataset, _ in questions}
    for row in shown:
        name = str(row.question_id) if len(datasets) == 1 else f"{row.dataset}/{row.question_id}"
        collector.add(_as_job_row(row, name))
    columns = collector.columns()
    costs = {
        f"{'' if len(datasets) == 1 else row.dataset + '/'}{row.question_id}": row.cost_nanousd
        for row in shown
    }
    if any(cost is None for cost in costs.values()):
        raise DataError("some of its rows do not say what they cost")
    return Run(
        name=path.name,
        path=str(path),
        kind="outcome table",
        rows=columns,
        routes=tuple(collector.routes),
        usage=collector.usage,
        groups=tuple(sorted(collector.groups.values(), key=lambda group: -group.count)),
        outcomes=outcomes,
        single=single,
    )


def _as_job_row(row: Outcome, name: str) -> JobRow:
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
