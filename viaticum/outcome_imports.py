"""Makes outcome tables of what users have: their own tables, batches, live calls, exports of other tools.

Every format becomes rows with the columns of `TARGETS` (`viaticum.export_formats`); here they are mapped,
graded where only the right answer is known, checked, and made unique. Memory does not grow with the file.
Leaves out comparing answers, which the caller gives as `grade`.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from viaticum.errors import DataError, InputError, UnknownName
from viaticum.export_formats import (
    LEFT_OUT,
    Rows,
    batch_rows,
    langsmith_rows,
    lm_eval_rows,
    look_up,
    promptfoo_rows,
)
from viaticum.files import encode_json
from viaticum.golds import parse_golds
from viaticum.money import NANOUSD_PER_USD
from viaticum.outcomes import COLUMNS, parse_outcome, parse_truth
from viaticum.questions import Question, digest_of
from viaticum.records import Values, plain, read_values
from viaticum.types import ANSWER_KINDS, Outcome, Pair

MORE = ("pair", "gold", "kind", "cost_usd", "milliseconds", "key")  # columns that others are made of
TARGETS = (*COLUMNS, *MORE)
DEFAULT_STRATEGY = "chat"  # asks the question as it is
KEEP = ("first", "last", "error")
Grade = Callable[[str | None, Iterable[str], Any], bool]  # answer, accepted answers, kind -> right


def _table_rows(path: Path) -> Rows:
    for source, row in read_values(path):
        yield source, {name: row[name] for name in TARGETS if name in row} | {"row": row}


FORMATS: dict[str, Callable[[Path], Rows]] = {
    "table": _table_rows,
    "batch": batch_rows,
    "lm-eval": lm_eval_rows,
    "langsmith": langsmith_rows,
    "promptfoo": promptfoo_rows,
}


@dataclass(frozen=True)
class ImportSettings:
    """How rows become outcomes.

    Args:
        columns: by column of `TARGETS` the column, or path such as `inputs.question`, that it is read from.
        constants: values of columns, whatever the rows say.
        threshold: least score that counts as right; None: scores are 0 or 1.
        filter: of lm-eval's logs, which have a line for each filter.
        questions: right answers by question id, for rows without a verdict.
        grade: compares an answer with the accepted ones; None: rows without a verdict are refused.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, str] = field(default_factory=dict)
    threshold: float | None = None
    filter: str | None = None
    questions: Mapping[str, Question] = field(default_factory=dict)
    grade: Grade | None = None

    def __post_init__(self) -> None:
        for name in (*self.columns, *self.constants):
            if name not in TARGETS:
                raise UnknownName("column", name, TARGETS)


@dataclass
class Importer:
    """Reads files of one format.

    Args:
        format: one of `FORMATS`.
        settings: how rows become outcomes.
        call: what a ledger knows of the call with a key, for rows with a column `key`; None: nothing.
        left_out: reasons of rows that are no outcomes, with how many there were.
    """

    format: str
    settings: ImportSettings = field(default_factory=ImportSettings)
    call: Callable[[str], Mapping[str, Any] | None] | None = None
    left_out: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UnknownName("format", self.format, tuple(FORMATS))

    def read(self, path: str | Path) -> Iterator[Outcome]:
        """The outcomes of a file, one at a time.

        Raises:
            InputError: the file cannot be read.
            DataError: a row is no outcome; names the file, the row and the column.
        """
        path, settings = Path(path), self.settings
        if not path.exists() and self.format != "batch":
            raise InputError(f"cannot read {path}: there is no such file")
        filters: set[str] = set()
        for source, values in FORMATS[self.format](path):
            if (found := values.get("filter")) is not None:
                if settings.filter not in (None, found):
                    continue
                filters.add(str(found))
                if len(filters) > 1:
                    raise DataError(
                        f"{source}: answers were read by several filters, {' and '.join(sorted(filters))}; "
                        "say which counts, such as --filter " + sorted(filters)[0]
                    )
            if reason := values.get(LEFT_OUT):
                self.left_out[str(reason)] += 1
                continue
            yield self._outcome(source, values, path)

    def _outcome(self, source: str, values: Values, path: Path) -> Outcome:
        settings = self.settings
        row = values.pop("row", values)
        for name, column in settings.columns.items():
            values[name] = look_up(row, column)
            if values[name] is None and name in ("question", "model", "correct"):
                raise DataError(f"{source}: no {column!r}, which {name} is read from; correct --map")
        # NaN is what is missing in a table of pandas, also in a column of texts.
        values = {name: value for name, value in values.items() if value == value}
        if self.call is not None and (key := values.pop("key", None)) is not None:
            known = self._of_call(source, str(key))
            values = known | {name: value for name, value in values.items() if value is not None}
        values |= settings.constants
        if pair := values.pop("pair", None):
            try:
                parsed = Pair.parse(str(pair))
            except InputError as error:
                raise DataError(f"{source}: {error}") from None
            values["model"], values["strategy"] = parsed.model, parsed.strategy
        question = values["question"] = _text(values.get("question"))
        if values.get("question_id") in (None, ""):
            if not question:
                raise DataError(f"{source}: neither question nor question_id; name their column with --map")
            values["question_id"] = digest_of(question)
        if not values.get("model"):
            raise DataError(
                f"{source}: no model; name its column with --map model=COLUMN, or --set model=NAME"
            )
        values["strategy"] = _text(values.get("strategy")) or DEFAULT_STRATEGY
        values["dataset"] = values.get("dataset") or path.stem
        if (answer := values.get("answer")) is not None:
            values["answer"] = _text(answer)
        values["correct"] = self._verdict(source, values)
        if values.get("cost_nanousd") is None:
            values["cost_nanousd"] = _scaled(values, "cost_usd", NANOUSD_PER_USD, source)
        if values.get("seconds") is None:
            values["seconds"] = _scaled(values, "milliseconds", 1e-3, source)
        return parse_outcome(values, source)

    def _of_call(self, source: str, key: str) -> Values:
        found = self.call(key) if self.call is not None else None
        if found is None:
            raise DataError(
                f"{source}: the ledger has no settled call with the key {key!r}; give the right --ledger"
            )
        return {name: value for name, value in found.items() if value is not None}

    def _verdict(self, source: str, values: Values) -> bool:
        given, settings = values.get("correct"), self.settings
        if given is not None and given != "":
            return _verdict_of(given, settings.threshold, f"{source}: correct")
        question = settings.questions.get(str(values["question_id"]))
        kind = values.get("kind") or (question.query.kind if question else None)
        if kind not in (None, *ANSWER_KINDS):
            raise DataError(f"{source}: unknown answer kind {kind!r}; known: {', '.join(ANSWER_KINDS)}")
        accepted = question.accepted if question else ()
        if not accepted:
            try:
                accepted = parse_golds({"answer": values.get("gold")}, kind).accepted
            except DataError as error:
                raise DataError(f"{source}: gold: {error}") from None
        if not accepted or settings.grade is None:
            raise DataError(
                f"{source}: neither correct nor a right answer; name a column with --map correct=COLUMN or "
                "--map gold=COLUMN, or give the questions with their answers as --questions"
            )
        return settings.grade(values.get("answer"), accepted, kind or "auto")


def _verdict_of(given: object, threshold: float | None, source: str) -> bool:
    if threshold is None or isinstance(given, bool):
        try:
            return parse_truth(given, source)
        except DataError as error:
            hint = "" if threshold is not None else "; of a score say from where it is right: --threshold 0.5"
            raise DataError(f"{error}{hint}") from None
    try:
        score = float(given)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return parse_truth(given, source)
    return parse_truth(given, source) if math.isnan(score) else score >= threshold


def _text(value: object) -> str:
    if value is None:
        return ""
    return encode_json(value) if isinstance(value, list | Mapping) else str(value)


def _scaled(values: Values, name: str, factor: float, source: str) -> float | int | None:
    value = values.pop(name, None)
    if value is None or value == "":
        return None
    try:
        scaled = float(str(value).lstrip("$")) * factor
        return round(scaled) if factor > 1 else scaled
    except (ValueError, OverflowError):
        raise DataError(f"{source}: {name} must be a number, not {value!r}") from None


def unique(rows: Iterable[tuple[str, Values]], keep: str = "error") -> Iterator[Values]:
    """Rows of outcome tables, each pair once on each question, in the order of its first row.

    Rows are compared in a temporary database, so that memory does not grow with their number.

    Args:
        rows: (location, values), further columns included.
        keep: which of several rows of a pair on a question: the first or the last one; "error" refuses rows
            that say otherwise whether it was right.

    Raises:
        DataError: rows contradict each other, and `keep` is "error"; a row is no outcome.
    """
    if keep not in KEEP:
        raise UnknownName("choice", keep, KEEP)
    with closing(sqlite3.connect("")) as database:
        database.execute("CREATE TABLE rows (number INTEGER, key TEXT PRIMARY KEY, source, correct, line)")
        known = "SELECT source, correct FROM rows WHERE key = ?"
        inserting = "INSERT INTO rows (source, correct, line, key, number) VALUES (?, ?, ?, ?, ?)"
        replacing = "UPDATE rows SET source = ?, correct = ?, line = ? WHERE key = ?"
        for number, (source, values) in enumerate(rows):
            outcome = parse_outcome(values, source)
            key = json.dumps((outcome.dataset, outcome.question_id, outcome.model, outcome.strategy))
            before = database.execute(known, (key,)).fetchone()
            line = encode_json({name: plain(each) for name, each in (dict(values) | asdict(outcome)).items()})
            row = (source, outcome.correct, line, key)
            if before is None:
                database.execute(inserting, (*row, number))
            elif keep == "last":
                database.execute(replacing, row)
            elif keep == "error" and bool(before[1]) != outcome.correct:
                raise DataError(
                    f"{source}: {outcome.pair} on question {outcome.question_id!r} of {outcome.dataset} is "
                    f"{'right' if outcome.correct else 'wrong'}, unlike in {before[0]}; choose with "
                    "--keep first or --keep last"
                )
        for (line,) in database.execute("SELECT line FROM rows ORDER BY number"):
            yield json.loads(line)
