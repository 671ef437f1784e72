"""Checks of values that callers give: each returns the value, or raises `InputError` with what was wanted.

Standard library only. Leaves out what a value means: ranges of one setting alone stand where it is declared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from viaticum.errors import InputError, one_line

T = TypeVar("T")
MOST = 2**63 - 1
SHOWN = 60  # characters of a wrong value in a message


def checked_type(name: str, value: Any, kinds: type[T] | tuple[type[T], ...], wanted: str) -> T:
    """Return the value. name: of the argument; wanted: what to give, in words. None is no exception."""
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in _as_tuple(kinds)):
        raise InputError(f"{name} is {wanted}, got {shown(value)}")
    return value


def checked_items(name: str, values: Any, kinds: type[T] | tuple[type[T], ...], wanted: str) -> tuple[T, ...]:
    """Return the items of a list or another iterable, of one type; a single text is no list of texts.

    wanted: what each item is, in words.
    """
    if not isinstance(values, Iterable) or isinstance(values, str | bytes | Mapping):
        raise InputError(f"{name} is a list, got {shown(values)}")
    return tuple(checked_type(f"an item of {name}", each, kinds, wanted) for each in values)


def checked_text(name: str, value: Any, *, blank: bool = False) -> str:
    """Return a text that can be stored and sent. blank: whether it may be empty."""
    text = checked_type(name, value, str, "a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name} holds half of a character (a lone surrogate) at {error.start}: {shown(text)}; "
            "decode it with errors='replace'"
        ) from None
    if not blank and not text.strip():
        raise InputError(f"{name} is empty; leave it out, or give a text")
    return text


def checked_count(name: str, value: Any, least: int = 1) -> int:
    """Return a whole number of at least `least` that fits 63 bits."""
    number = checked_type(name, value, int, f"a whole number from {least} on")
    if number < least:
        raise InputError(f"{name} is at least {least}, got {shown(number)}")
    if number > MOST:
        raise InputError(f"{name} is at most {MOST}, got {shown(number)}")
    return number


def checked_seconds(name: str, value: Any) -> float:
    """Return seconds above zero; infinity is allowed."""
    seconds = checked_type(name, value, (int, float), "a number of seconds")
    if not 0 < seconds < MOST and seconds != float("inf"):
        raise InputError(f"{name} is above zero seconds, got {shown(seconds)}")
    return seconds


def shown(value: Any) -> str:
    """A wrong value in a message: its repr, cut, on one line. Never raises."""
    try:
        text = repr(value)  # escapes what cannot be printed
    except Exception:  # a repr of somebody else's, or an integer with too many digits to print
        text = f"a {type(value).__name__}"
    return one_line(text, SHOWN)


def _as_tuple(kinds: Any) -> tuple[type, ...]:
    return kinds if isinstance(kinds, tuple) else (kinds,)
