"""The outcome table on disk: JSONL or Parquet, one row a question, model and strategy.

Profiling, fitting routers and reports are elsewhere. Parquet needs pyarrow (extra `local`); JSONL and
intervals need no extra.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from math import sqrt
from pathlib import Path
from statistics import NormalDist
from typing import Any

from viaticum.errors import DataError, InputError, MissingExtra
from viaticum.files import atomic_file, read_jsonl, write_jsonl
from viaticum.types import Outcome

COLUMNS = tuple(field.name for field in fields(Outcome))
REQUIRED = COLUMNS[:7]
_Z95 = NormalDist().inv_cdf(0.975)


def read_outcomes(path: str | Path) -> list[Outcome]:
    """Read all rows of an outcome table: Parquet where the suffix is .parquet, else JSONL.

    Raises:
        InputError: there is no such file.
        DataError: a row is not an outcome; names the line and the missing columns.
        MissingExtra: a Parquet file without pyarrow.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"no outcome table at {path}; make one with: viaticum profile QUESTIONS.jsonl --out {path}"
        )
    if path.suffix == ".parquet":
        return [parse_outcome(row, f"{path}, row {n}") for n, row in enumerate(_read_parquet(path), 1)]
    return [parse_outcome(row, f"{path}, line {n}") for n, row in read_jsonl(path)]


def write_outcomes(path: str | Path, outcomes: Iterable[Outcome]) -> None:
    """Write a table in the format of the path's suffix; the file appears whole or not at all."""
    path = Path(path)
    if path.suffix == ".parquet":
        with atomic_file(path) as scratch:
            _write_parquet(scratch, outcomes)
    else:
        write_jsonl(path, map(asdict, outcomes))


def append_outcome(path: str | Path, row: Outcome) -> None:
    """Append a row to a JSONL table in one write, so that several processes can append to it."""
    line = json.dumps(asdict(row), ensure_ascii=False) + "\n"
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
    """Return a row as an `Outcome`. Raises `DataError`, which names `source`, for missing columns."""
    missing = [name for name in REQUIRED if name not in row]
    if missing:
        raise DataError(f"{source}: missing {', '.join(missing)}; an outcome needs {', '.join(REQUIRED)}")
    values = {name: row.get(name) for name in COLUMNS}
    if values["correct"] not in (0, 1):
        raise DataError(f"{source}: correct must be true or false, not {values['correct']!r}")
    return Outcome(**{**values, "correct": bool(values["correct"])})  # type: ignore[arg-type]


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    parquet = pyarrow_parquet()
    try:
        table = parquet.read_table(path)
    except Exception as error:
        raise DataError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def _write_parquet(path: Path, outcomes: Iterable[Outcome]) -> None:
    parquet = pyarrow_parquet()
    import pyarrow as pa

    arrow_types = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    column_types: dict[str, type] = dict.fromkeys(COLUMNS, str) | {"correct": bool, "seconds": float}
    column_types |= dict.fromkeys(("input_tokens", "output_tokens", "cost_nanousd"), int)
    schema = pa.schema([(name, arrow_types[column_types[name]]) for name in COLUMNS])
    parquet.write_table(
        pa.Table.from_pylist([asdict(row) for row in outcomes], schema=schema), path, compression="zstd"
    )


def pyarrow_parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra("pyarrow", "local") from None
    return pyarrow.parquet
