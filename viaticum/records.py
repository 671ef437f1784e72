"""Reads the rows of a user's file, one at a time, and writes Parquet: CSV, JSON lines or Parquet.

One reader for questions, batches and outcome tables. Memory does not grow with the file. What is wrong with a
row comes in the place of its values, with its line, so that the caller decides whether that ends the reading.
Leaves out what the columns mean. Parquet needs pyarrow (extra `local`).
"""

from __future__ import annotations

import codecs
import csv
import itertools
import json
import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import IO, Any, Literal

from viaticum.errors import DataError, InputError, MissingExtra
from viaticum.files import encode_json

FileFormat = Literal["jsonl", "csv", "parquet"]
Values = dict[str, Any]
Record = tuple[str, Values | str]  # location, and the values or what is wrong with them
MAX_LINE_BYTES = 8 << 20
BLOCK_ROWS = 1024  # rows of Parquet that are read or written at a time
ROW_GROUP = 4096  # rows of a Parquet row group
END = "\ue000end of the file\ue000"  # after the last line of CSV
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a field that begins so is a formula to a spreadsheet
DELIMITERS = (",", ";", "\t")


def file_format(path: str | Path) -> FileFormat:
    """The format by the suffix: CSV for .csv and .tsv, Parquet for .parquet, else JSON lines."""
    suffix = Path(path).suffix.lower()
    if suffix in (".csv", ".tsv"):
        return "csv"
    return "parquet" if suffix == ".parquet" else "jsonl"


def read_records(path: str | Path, format: FileFormat | None = None, *, needs: str = "") -> Iterator[Record]:
    """Read (location, values) for every row; empty fields of CSV and nulls of Parquet are left out.

    Args:
        path: the file.
        format: by default that of its suffix.
        needs: a column that a CSV or Parquet file has to have; JSON lines are told one by one.

    Raises:
        InputError: the file cannot be read.
        DataError: none of its rows can be read.
        MissingExtra: a Parquet file without pyarrow.
    """
    path = Path(path)
    check_readable(path)
    kind = format or file_format(path)
    rows = {"csv": _csv_rows, "parquet": _parquet_rows}.get(kind, _json_rows)
    try:
        yield from rows(path, needs)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None


def check_readable(path: Path) -> None:
    """Raise `InputError` where there is no such file, or one that cannot be read more than once."""
    if not path.exists():
        raise InputError(f"cannot read {path}: there is no such file")
    if path.is_dir():
        raise InputError(f"cannot read {path}: it is a folder; name a file in it")
    if not path.is_file():
        raise InputError(f"cannot read {path}: it is no regular file; a pipe is read once, so save it first")


def read_values(
    path: str | Path, format: FileFormat | None = None, *, needs: str = ""
) -> Iterator[tuple[str, Values]]:
    """As `read_records`; raises `DataError`, which names file and line, for the first row that is broken."""
    for location, values in read_records(path, format, needs=needs):
        if isinstance(values, str):
            raise DataError(f"{location}: {values}")
        yield location, values


def column_names(path: str | Path, format: FileFormat | None = None) -> list[str]:
    """The columns of a file in their order; of JSON lines those of all objects. Raises as `read_records`."""
    path = Path(path)
    kind = format or file_format(path)
    if kind == "parquet":
        with _open_parquet(path) as file:
            return list(file.schema_arrow.names)
    if kind == "csv":
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
            return list(_csv_reader(text, path, "").fieldnames or ())
    found: dict[str, None] = {}
    for _, values in read_records(path, kind):
        if isinstance(values, dict):
            found |= dict.fromkeys(values)
    return list(found)


# --- JSON lines -----------------------------------------------------------------------------------


def _json_rows(path: Path, needs: str) -> Iterator[Record]:
    with path.open("rb") as file:
        for number in itertools.count(1):
            line = file.readline(MAX_LINE_BYTES + 1)
            if not line:
                return
            location = f"{path}, line {number}"
            if len(line) > MAX_LINE_BYTES:
                _skip_line(file, line)
                yield location, f"longer than {MAX_LINE_BYTES >> 20} MiB; no model reads that much"
                continue
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield location, _json_values(line)


def _json_values(line: bytes) -> Values | str:
    try:
        values = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8"
    except (ValueError, RecursionError) as error:  # no JSON, or a number of thousands of digits
        return f"not valid JSON ({error}); correct or remove the line"
    if b"\\u" in line:
        try:
            json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            return f"half of a character ({error.object[error.start]!r}); correct it"
    return values if isinstance(values, dict) else "not a JSON object; write one object a line"


def _skip_line(file: IO[bytes], line: bytes) -> None:
    while line and not line.endswith(b"\n"):
        line = file.readline(1 << 16)


# --- CSV ------------------------------------------------------------------------------------------


def _csv_rows(path: Path, needs: str) -> Iterator[Record]:
    # Bytes that are not UTF-8 become lone surrogates, so that one broken line does not end the reading.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = _csv_reader(file, path, needs)
        while True:
            before = lines.line_num
            try:
                values = next(lines, None)
            except csv.Error as error:
                yield f"{path}, line {lines.line_num}", f"not CSV ({error})"
                continue
            if values is None or next(iter(values.values())) == END:
                return
            if any(END in (each or "") for each in _fields_of(values)):
                text = "a quote is not closed, so that all that follows is one field; close or remove it"
                yield f"{path}, line {before + 1}", text
                return
            yield f"{path}, line {lines.line_num}", _csv_values(values)


def _csv_reader(file: IO[str], path: Path, needs: str) -> csv.DictReader[str]:
    """A reader whose first line names the columns; separated by commas, or by what separates these."""
    csv.field_size_limit(MAX_LINE_BYTES)
    first = file.readline(MAX_LINE_BYTES)
    file.seek(0)
    delimiter = max(DELIMITERS, key=lambda each: len(next(csv.reader([first], delimiter=each), ())))
    lines = csv.DictReader(_with_end(file), delimiter=delimiter)
    names = [(name or "").strip() for name in lines.fieldnames or () if name != END]
    if any(END in name for name in names):
        raise DataError(f"{path}: a quote in the first line, which names the columns, is not closed")
    lines.fieldnames = names
    if any(not _is_utf8(name) for name in names):
        raise DataError(f"{path}: the first line is not UTF-8; save the file as UTF-8")
    if needs and needs not in names:
        raise DataError(_no_column(path, needs, names))
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise DataError(f"{path}: two columns are named {', '.join(twice)}; rename one of them")
    return lines


def _no_column(path: Path, needs: str, names: Sequence[str]) -> str:
    known = shorten(", ".join(filter(None, names)), 200, placeholder=" ...")
    found = f"its columns are {known}; rename one of them" if known else "the file is empty"
    return f"{path}: no column named {needs}; {found}"


def _is_utf8(text: str) -> bool:
    """Whether no byte of it was another encoding's, which the error handler makes half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _with_end(file: IO[str]) -> Iterator[str]:
    """The lines, and one more: inside a quote that is not closed it becomes part of a field."""
    for line in file:
        yield line if line.endswith(("\n", "\r")) else f"{line}\n"
    yield END


def _fields_of(values: dict[Any, Any]) -> Iterator[str | None]:
    for each in values.values():
        yield from each if isinstance(each, list) else (each,)


def _csv_values(values: dict[Any, Any]) -> Values | str:
    if None in values:
        return "more fields than the first line names; put a field with commas into quotes"
    if not _is_utf8("".join(each or "" for each in values.values())):
        return "not UTF-8; save the file as UTF-8"
    return {name: _without_mark(value) for name, value in values.items() if value}


def _without_mark(value: str) -> str:
    """A field as it was before `field_text`."""
    return value[1:] if value[0] == "'" and value[1:2] and value[1] in FORMULA else value


# --- Parquet --------------------------------------------------------------------------------------


def _parquet_rows(path: Path, needs: str) -> Iterator[Record]:
    with _open_parquet(path) as file:
        names = file.schema_arrow.names
        if needs and needs not in names:
            raise DataError(_no_column(path, needs, names))
        number = 0
        for batch in file.iter_batches(batch_size=BLOCK_ROWS):
            for values in batch.to_pylist():
                number += 1
                yield (
                    f"{path}, row {number}",
                    {key: value for key, value in values.items() if value is not None},
                )


def _open_parquet(path: Path) -> Any:
    parquet = pyarrow_parquet()
    try:
        return parquet.ParquetFile(path)
    except OSError:
        raise
    except Exception as error:
        raise DataError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None


def pyarrow_parquet() -> Any:
    """The module `pyarrow.parquet`. Raises `MissingExtra` where it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra("pyarrow", "local") from None
    return pyarrow.parquet


# --- writing --------------------------------------------------------------------------------------


def plain(value: object) -> object:
    """A value as JSON has it: dates and decimals, which Parquet has too, as text."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def field_text(value: object) -> object:
    """A value for a field of CSV: lists and objects as JSON, others as they are.

    A text that a spreadsheet would run as a formula gets an apostrophe before it, which `read_records` takes
    away again; numbers stay (OWASP, CSV Injection).
    """
    if isinstance(value, list | tuple | Mapping):
        return encode_json(plain(value))
    if isinstance(value, str) and value[:1] in FORMULA and value and not _is_number(value):
        return f"'{value}"
    return value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def free_name(name: str, taken: Container[str]) -> str:
    """The name of a user's column beside ours: `input_` and its name where that is `taken`."""
    return f"input_{name}" if name in taken else name


def delimiter_for(path: Path) -> str:
    """What separates the fields of a CSV file that is written: tabs in a .tsv."""
    return "\t" if path.suffix.lower() == ".tsv" else ","


def write_table(
    path: Path,
    kind: Literal["csv", "parquet"],
    rows: Iterable[Mapping[str, Any]],
    types: Mapping[str, type],
    others: Sequence[str] = (),
    *,
    delimiter: str = ",",
) -> None:
    """Write rows as CSV or Parquet, one at a time.

    types: of the columns of a known type. others: names of further columns, see `ParquetTable`. delimiter:
    of CSV, see `delimiter_for`.
    """
    if kind == "parquet":
        with ParquetTable(path, types, others) as table:
            for row in rows:
                table.write(row)
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        lines = csv.DictWriter(file, (*types, *others), delimiter=delimiter)
        lines.writeheader()
        lines.writerows({name: field_text(value) for name, value in row.items()} for row in rows)


class ParquetTable:
    """Writes rows to a Parquet file in row groups, so that memory does not grow with their number.

    Args:
        path: the file.
        types: columns of a known type.
        others: further columns; each has the type of its values in the first row group where all of them have
            the same one among text, truth value, integer and number, else it is text.

    Raises:
        MissingExtra: pyarrow is not installed.
    """

    def __init__(self, path: Path, types: Mapping[str, type], others: Sequence[str] = ()) -> None:
        self._parquet = pyarrow_parquet()
        self._path, self._types, self._others = path, dict(types), list(others)
        self._block: list[dict[str, Any]] = []
        self._writer: Any = None

    def __enter__(self) -> ParquetTable:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and (self._block or self._writer is None):
                self._flush()
        finally:
            if self._writer is not None:
                self._writer.close()

    def write(self, row: Mapping[str, Any]) -> None:
        self._block.append(dict(row))
        if len(self._block) == ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._writer is None:
            self._types |= {name: _type_of(row.get(name) for row in self._block) for name in self._others}
            names = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
            self._schema = pa.schema([(name, names[each]) for name, each in self._types.items()])
            self._writer = self._parquet.ParquetWriter(self._path, self._schema, compression="zstd")
        rows = [{name: self._value(name, row.get(name)) for name in self._types} for row in self._block]
        self._writer.write_table(pa.Table.from_pylist(rows, schema=self._schema))
        self._block = []

    def _value(self, name: str, value: object) -> object:
        kind = self._types[name]
        if value is None or (isinstance(value, kind) and (kind is not int or not isinstance(value, bool))):
            return value
        if kind is str:
            return field_text(plain(value)) if isinstance(value, list | tuple | Mapping) else str(value)
        if kind is float and isinstance(value, int):
            return float(value)
        raise DataError(
            f"column {name}: {value!r} is no {kind.__name__}, as the values before it are; correct it, or "
            "write JSON lines or CSV"
        )


def _type_of(values: Iterable[object]) -> type:
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        return float
    return kinds.pop() if len(kinds) == 1 and kinds <= {str, int, float, bool} else str
