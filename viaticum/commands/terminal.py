"""Texts of models on a terminal: shown, never obeyed."""

from __future__ import annotations

import re
from typing import TextIO

# C0 and C1 controls but tab and newline, DEL, and what turns the direction of a text (CVE-2021-42574).
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def visible(text: str, stream: TextIO) -> str:
    """The text for a stream: on a terminal controls are shown as escapes; a file or a pipe gets them.

    Lone surrogates, which no stream can encode, are escapes on both.
    """
    text = _SURROGATE.sub(_escaped, text)
    return _CONTROL.sub(_escaped, text) if stream.isatty() else text


def literal(text: str) -> str:
    """The text on one line of a table: all that is not printed is shown as escapes."""
    return "".join(letter if letter.isprintable() else _escape(letter) for letter in text)


def _escaped(found: re.Match[str]) -> str:
    return _escape(found[0])


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode()
