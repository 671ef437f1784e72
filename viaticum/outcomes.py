"""The outcome table on disk: JSONL or Parquet, one row a question, model and strategy.

Leaves out making outcomes (profiling), fitting routers on them and reporting. Parquet needs pyarrow (the
`local` extra); JSONL and intervals need nothing.
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
    """All rows of an outcome table, by the file's suffix: .parquet, or JSONL for anything else.

    Raises `DataError` naming the line (JSONL) or the columns that are missing; `MissingExtra` without pyarrow.
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
    """Write a table by the path's suffix; the file appears whole or not at all."""
    path = Path(path)
    if path.suffix == ".parquet":
        with atomic_file(path) as scratch:
            _write_parquet(scratch, outcomes)
    else:
        write_jsonl(path, map(asdict, outcomes))


def append_outcome(path: str | Path, row: Outcome) -> None:
    """Add a row to a JSONL table, in one write, so that several processes may add to it."""
    line = json.dumps(asdict(row), ensure_ascii=False) + "\n"
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with Path(path).open("ab", buffering=0) as file:
            file.write(line.encode())
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


def accuracy_interval(right: int, of: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share of `of` questions (Wilson, JASA 22, 1927, equation for its two roots)."""
    if not 0 <= right <= of or of == 0:
        raise InputError(
            f"not a share: {right} of {of}; count at least one question, and no more right than asked"
        )
    share, z2 = right / of, _Z95 * _Z95
    middle = (share + z2 / (2 * of)) / (1 + z2 / of)
    half = _Z95 * sqrt(share * (1 - share) / of + z2 / (4 * of * of)) / (1 + z2 / of)
    low, high = (0.0 if right == 0 else middle - half), (1.0 if right == of else middle + half)
    return max(0.0, low), min(1.0, high)


def parse_outcome(row: Mapping[str, Any], place: str) -> Outcome:
    """One row as an `Outcome`; raises `DataError` for missing columns, naming the place."""
    missing = [name for name in REQUIRED if name not in row]
    if missing:
        raise DataError(f"{place}: missing {', '.join(missing)}; an outcome needs {', '.join(REQUIRED)}")
    values = {name: row.get(name) for name in COLUMNS}
    if values["correct"] not in (0, 1):
        raise DataError(f"{place}: correct must be true or false, not {values['correct']!r}")
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

    types = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    kinds: dict[str, type] = dict.fromkeys(COLUMNS, str) | {"correct": bool, "seconds": float}
    kinds |= dict.fromkeys(("input_tokens", "output_tokens", "cost_nanousd"), int)
    schema = pa.schema([(name, types[kinds[name]]) for name in COLUMNS])
    parquet.write_table(
        pa.Table.from_pylist([asdict(row) for row in outcomes], schema=schema), path, compression="zstd"
    )


def pyarrow_parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra("pyarrow", "local") from None
    return pyarrow.parquet
