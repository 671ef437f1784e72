"""What `viaticum budget` reads: ledgers, windows, usage on the command line and in files, heads of chains.

Leaves out the commands: see `budget`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from viaticum.errors import InputError, reason
from viaticum.types import TokenCount

if TYPE_CHECKING:
    from viaticum.budgets import Entry, Ledger, Window


@contextmanager
def opened_ledger(where: str | None, *, read_only: bool = False) -> Iterator[Ledger]:
    """Open a ledger that is there, for a command that makes none.

    where: as `--ledger` names it. Before this user's first call there is no ledger of theirs: an empty one in
        memory takes its place.

    Raises:
        InputError: `where` names a file that is not there.
    """
    from viaticum.budgets import Ledger, default_path

    if where is None and not default_path().exists():
        where = "memory:"
    elif where is not None and "://" not in where and where != "memory:" and not Path(where).exists():
        raise InputError(f"no ledger at {where}; correct the path, or make one: viaticum budget create NAME")
    with Ledger(where, read_only=read_only) as ledger:
        yield ledger


def window_from(per: str | None, rolling: bool, zone: str) -> Window | None:
    from viaticum.budgets import Window

    if per is None:
        if rolling or zone != "UTC":
            raise InputError("--rolling and --zone go with --per hour, day or month")
        return None
    return Window(per, rolling, zone)  # type: ignore[arg-type]


def settle_one(ledger: Ledger, key: str, used: list[str], void: bool, worst: bool) -> Entry:
    if bool(used) + void + worst != 1:
        raise InputError("say what became of the call: --used MODEL=INPUT,OUTPUT, --void or --worst")
    if void:
        return ledger.void(key)
    return ledger.settle(key, None if worst else dict(_usage(text) for text in used))


def _usage(text: str) -> tuple[str, TokenCount]:
    model, equals, counts = text.rpartition("=")
    try:
        if not equals:
            raise ValueError
        input_tokens, output_tokens = counts.split(",")
        return model, TokenCount(int(input_tokens), int(output_tokens))
    except ValueError:
        raise InputError(f"not a usage: {text!r}; write MODEL=INPUT,OUTPUT such as gpt-5=1200,80") from None


def reported_usage(file: Path) -> Iterator[tuple[str, dict[str, TokenCount] | None]]:
    lines = _text_of(file).split("\n")  # not at U+2028, which JSON may contain
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            usage = row["usage"]
            counts = None if usage is None else {name: TokenCount(**count) for name, count in usage.items()}
            yield row["key"], counts
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"{file}, line {number}: not a call with its usage ({error!r}); write "
                f'{{"key": ..., "usage": ...}}'
            ) from None


def heads_from(file: Path) -> dict[str, tuple[int, str]]:
    """The heads in what `verify --json` printed; raises `InputError` where there are none."""
    try:
        kept: dict[str, Any] = json.loads(_text_of(file))["heads"]
        heads = {root: (int(each["entries"]), str(each["head"])) for root, each in kept.items()}
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        heads = {}
    if not heads:
        raise InputError(
            f"{file} has no heads; write it with viaticum budget verify --json, which must end ok"
        )
    return heads


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read: {reason(error)}") from error
