"""Adds entries to a user's catalogue, whose other text stays as it is, byte for byte.

An entry is appended as a table of its own; an entry that is there already is never changed. Leaves out what
an entry says (`viaticum.model_spec`) and where its fields come from (`viaticum.models.added`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from viaticum.catalogue import Catalogue, read_catalogue
from viaticum.errors import InputError
from viaticum.files import atomic_write, run_lock

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Added:
    """What became of an entry.

    Attributes:
        path: the catalogue.
        text: the entry as it stands there.
        is_new: it was written now.
        differences: fields of an entry that was there already, as (field, there, now).
    """

    path: Path
    text: str
    is_new: bool
    differences: tuple[tuple[str, str, str], ...] = ()


def add_entry(path: Path, name: str, fields: Mapping[str, Any], comment: str = "") -> Added:
    """Append an entry to the catalogue, which is made where there is none.

    Args:
        fields: of `ModelSpec`, without the name; None leaves a field out.
        comment: a line above the entry.

    Raises:
        InputError: the file cannot be read or written, or the entry does not fit in it.
    """
    fields = {key: value for key, value in fields.items() if value is not None}
    text = entry_text(name, fields, comment)
    path = path.expanduser().resolve()  # a link stays a link
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {path.parent}: {error.strerror or error}") from None
    with run_lock(
        path.with_name(f".{path.name}.lock"), busy="another process writes the catalogue; try again"
    ):
        before = _read(path)
        own, _ = read_catalogue(before, str(path))
        if name in own:
            return Added(path, entry_text(name, own[name]), False, _differences(own[name], fields))
        newline = b"\r\n" if b"\r\n" in before else b"\n"
        gap = b"" if not before else newline if before.endswith(b"\n") else 2 * newline
        after = before + gap + text.encode().replace(b"\n", newline)
        _check(after, path, name)
        atomic_write(path, after)
    return Added(path, text, True)


def entry_text(name: str, fields: Mapping[str, Any], comment: str = "") -> str:
    """An entry as TOML; tables and lists of tables of its fields come last."""
    key = f"models.{_key(name)}"
    inner = {each: value for each, value in fields.items() if _is_table(value) or _is_tables(value)}
    lines = [f"# {comment}"] if comment else []
    lines += [f"[{key}]"]
    lines += [f"{each} = {_value(value)}" for each, value in fields.items() if each not in inner]
    for each, value in inner.items():
        for table in [value] if _is_table(value) else value:
            lines += ["", f"[{key}.{each}]" if _is_table(value) else f"[[{key}.{each}]]"]
            lines += [f"{_key(part)} = {_value(inside)}" for part, inside in table.items()]
    return "\n".join(lines) + "\n"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise InputError(f"cannot read the catalogue {path}: {error.strerror or error}") from None


def _check(text: bytes, path: Path, name: str) -> None:
    """Raises `InputError` if the catalogue with the new entry is none."""
    own, _ = read_catalogue(text, str(path))
    if name not in own:
        raise InputError(f"{path}: nothing can be added below `models = ...`; write [models.NAME] tables")
    Catalogue.parse(own, path)


def _differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[tuple[str, str, str], ...]:
    """Fields that a new entry would give another value; what the user added or left out is not one."""
    return tuple(
        (field, _value(there[field]), _value(value))
        for field, value in now.items()
        if field in there and field != "description" and _plain(there[field]) != _plain(value)
    )


def _plain(value: Any) -> Any:
    """Numbers by their value, whatever they are written as."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return Decimal(str(value)) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_tables(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and any(map(_is_table, value))


def _key(name: str) -> str:
    return name if _BARE_KEY.fullmatch(name) else _string(name)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Decimal | float):
        text = format(Decimal(str(value)).normalize(), "f")
        return text if "." in text else f"{text}.0"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_key(key)} = {_value(each)}' for key, each in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    return _string(str(value))


def _string(text: str) -> str:
    """A basic string of TOML, whose escapes are those of JSON, and one more."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")
