"""The outcome table on disk: JSON lines, CSV or Parquet, one row a question, model and strategy.

A verdict on an answer is a row too: its model is the verifier, its strategy `verify:` and the pair that was
checked, its answer yes or no, and it is correct where that is. Readers of outcomes do not see these rows;
`read_verdicts` does.

Profiling, importing other formats (`viaticum.outcome_imports`), fitting routers and reports are elsewhere.
Parquet needs pyarrow (extra `local`); the rest needs no extra.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from math import isfinite, sqrt
from pathlib import Path
from statistics import NormalDist
from typing import Any

from viaticum.checks import MOST, shown
from viaticum.errors import DataError, InputError
from viaticum.files import atomic_file, write_jsonl
from viaticum.records import delimiter_for, file_format, free_name, plain, read_values, write_table
from viaticum.types import VERIFY, Outcome, Pair

COLUMNS = tuple(field.name for field in fields(Outcome))
VERDICT = f"{VERIFY}:"  # start of the strategy of a verdict; the pair that was checked follows
REQUIRED = ("dataset", "question_id", "model", "strategy", "correct")
_COUNTS = ("input_tokens", "output_tokens", "cost_nanousd")
_TYPES: dict[str, type] = {
    **dict.fromkeys(COLUMNS, str),
    "correct": bool,
    "seconds": float,
    **dict.fromkeys(_COUNTS, int),
}
_TRUE, _FALSE = ("1", "1.0", "true", "yes", "t", "y"), ("0", "0.0", "false", "no", "f", "n")
_Z95 = NormalDist().inv_cdf(0.975)


def read_outcomes(*paths: str | Path) -> list[Outcome]:
    """Read all answers of outcome tables: Parquet and CSV where the suffix says so, else JSON lines.

    Of several tables a row that stands in more than one counts once.

    Raises:
        InputError: there is no such file.
        DataError: a row is not an outcome; names the file, the row and the column.
        MissingExtra: a Parquet file without pyarrow.
    """
    if len(paths) == 1:
        return list(iterate_outcomes(paths[0]))
    return list(dict.fromkeys(outcome for path in paths for outcome in iterate_outcomes(path)))


def iterate_outcomes(path: str | Path) -> Iterator[Outcome]:
    """Read the answers of an outcome table one at a time. Raises as `read_outcomes`."""
    rows = (parse_outcome(row, source) for source, row in outcome_rows(path))
    return (row for row in rows if checked_pair(row) is None)


def read_verdicts(*paths: str | Path) -> list[Outcome]:
    """Read the verdicts of outcome tables, each once. Raises as `read_outcomes`."""
    rows = (parse_outcome(row, source) for path in paths for source, row in outcome_rows(path))
    return list(dict.fromkeys(row for row in rows if checked_pair(row) is not None))


def checked_pair(row: Outcome) -> Pair | None:
    """The pair whose answer a row is a verdict on; None of an answer."""
    return Pair.parse(row.strategy.removeprefix(VERDICT)) if row.strategy.startswith(VERDICT) else None


def outcome_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read (location, values) of an outcome table, further columns included; nothing is checked yet.

    Raises as `read_outcomes`.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"no outcome table at {path}; make one with: viaticum profile QUESTIONS.jsonl --out {path}"
        )
    yield from read_values(path)


def write_outcomes(
    path: str | Path, outcomes: Iterable[Outcome], others: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """Write a table in the format of the path's suffix; the file appears whole or not at all.

    Args:
        path: the table.
        outcomes: its rows, which are read one at a time.
        others: further columns by question id, which are kept under their names (`input_` and the name where
            that is a column of outcomes).
    """
    rows: Iterable[dict[str, Any]] = map(asdict, outcomes)
    names: list[str] = []
    if others:
        names = list(dict.fromkeys(free_name(name, COLUMNS) for values in others.values() for name in values))
        rows = (
            row
            | {free_name(name, COLUMNS): each for name, each in others.get(row["question_id"], {}).items()}
            for row in rows
        )
    write_rows(path, rows, names)


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]], others: Sequence[str] = ()) -> None:
    """As `write_outcomes`, for rows that are mappings. others: the names of their further columns."""
    path = Path(path)
    if (kind := file_format(path)) == "jsonl":
        write_jsonl(path, ({name: plain(value) for name, value in row.items()} for row in rows))
        return
    with atomic_file(path) as scratch:
        write_table(scratch, kind, rows, _TYPES, others, delimiter=delimiter_for(path))


def append_outcome(path: str | Path, row: Outcome, others: Mapping[str, object] | None = None) -> None:
    """Append a row to a JSONL table in one write, so that several processes can append to it.

    others: columns beside those of an outcome.
    """
    line = json.dumps(asdict(row) | dict(others or {}), ensure_ascii=False) + "\n"
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with Path(path).open("ab", buffering=0) as file:
            file.write(line.encode())
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


def accuracy_interval(correct: int, total: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share (Wilson, JASA 22, 1927, equation for its two roots).

    Raises `InputError` where `correct` of `total` is not a share.
    """
    if not 0 <= correct <= total or total == 0:
        raise InputError(
            f"not a share: {correct} of {total}; count at least one question, and no more right than asked"
        )
    share, z2 = correct / total, _Z95 * _Z95
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z95 * sqrt(share * (1 - share) / total + z2 / (4 * total * total)) / (1 + z2 / total)
    low = 0.0 if correct == 0 else middle - half
    high = 1.0 if correct == total else middle + half
    return max(0.0, low), min(1.0, high)


def parse_outcome(row: Mapping[str, Any], source: str) -> Outcome:
    """Return a row as an `Outcome`; numbers and truth values may be texts, as they are in CSV.

    Raises:
        DataError: a column is missing, or its value is none of its kind; starts with `source` and names the
            column.
    """
    # NaN is what is missing in a table of pandas, also in a column of texts.
    row = {name: value for name, value in row.items() if value == value}
    missing = [name for name in REQUIRED if row.get(name) is None or row[name] == ""]
    if missing:
        raise DataError(f"{source}: missing {', '.join(missing)}; an outcome needs {', '.join(REQUIRED)}")
    finish, answer = row.get("finish_reason"), row.get("answer")
    strategy = str(row["strategy"])
    if strategy.startswith(VERDICT) and "+" not in strategy:
        raise DataError(f"{source}: strategy {strategy!r} names no pair; write {VERDICT}model+strategy")
    return Outcome(
        str(row["dataset"]),
        str(row["question_id"]),
        str(row.get("question") or ""),
        str(row["model"]),
        strategy,
        None if answer is None else str(answer),
        parse_truth(row["correct"], f"{source}: correct"),
        _count(row, "input_tokens", source),
        _count(row, "output_tokens", source),
        _count(row, "cost_nanousd", source),
        _number(row, "seconds", source),
        None if finish is None else str(finish),
    )


def parse_truth(value: object, source: str) -> bool:
    """A truth value, 0 or 1, or one of them as text. Raises `DataError`, which starts with `source`."""
    if isinstance(value, str):
        text = value.strip().casefold()
        if text in _TRUE or text in _FALSE:
            return text in _TRUE
    elif isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    raise DataError(f"{source} must be true or false, not {value!r}")


def _number(row: Mapping[str, Any], name: str, source: str) -> float | None:
    """A number from 0, or None where it is unknown."""
    value = row.get(name)
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = -1.0
    if isinstance(value, bool) or not (number >= 0 and isfinite(number)):
        raise DataError(
            f"{source}: {name} must be a number from 0, not {shown(value)}; correct it, or leave it out"
        )
    return number


def _count(row: Mapping[str, Any], name: str, source: str) -> int | None:
    """A whole number from 0, or None where it is unknown."""
    value = row.get(name)
    if type(value) is int and 0 <= value <= MOST:
        return value
    number = _number(row, name, source)
    if number is not None and (number != int(number) or number > MOST):
        raise DataError(
            f"{source}: {name} must be a whole number, not {shown(value)}; correct it, or leave it out"
        )
    return None if number is None else int(number)
