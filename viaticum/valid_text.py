"""Texts without halves of characters (lone surrogates), which JSON can write and UTF-8 cannot.

Models write them, and servers that cut a text into pieces by UTF-16 units send the halves of one character in
two pieces. Halves that belong together are joined, others become U+FFFD. Standard library only. Leaves out
what callers give, which is refused (`viaticum.checks`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from viaticum.types import Completion, ThinkingDelta


def valid_text(text: str) -> str:
    """The text with halves of characters joined or replaced."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def valid_json(value: Any) -> Any:
    """A JSON value whose texts, also the names of fields, are valid."""
    if isinstance(value, str):
        return valid_text(value)
    if isinstance(value, dict):
        return {valid_text(str(name)): valid_json(each) for name, each in value.items()}
    return [valid_json(each) for each in value] if isinstance(value, list | tuple) else value


class ValidPieces:
    """Makes the pieces of one completion valid, in the order they come."""

    def __init__(self) -> None:
        self._held, self._is_thought = "", False  # the first half of a character, and where it stood

    def add(self, piece: str | ThinkingDelta | Completion) -> Iterator[str | ThinkingDelta | Completion]:
        """The valid pieces that one becomes: before another kind, what was held back."""
        is_thought = isinstance(piece, ThinkingDelta)
        if self._held and (isinstance(piece, Completion) or is_thought != self._is_thought):
            yield self._piece(valid_text(self._held))
            self._held = ""
        if isinstance(piece, Completion):
            yield _valid_completion(piece)
            return
        self._is_thought = is_thought
        text = self._held + (piece.text if isinstance(piece, ThinkingDelta) else piece)
        self._held = text[-1:] if "\ud800" <= text[-1:] <= "\udbff" else ""
        yield self._piece(valid_text(text.removesuffix(self._held)))

    def _piece(self, text: str) -> str | ThinkingDelta:
        return ThinkingDelta(text) if self._is_thought else text


def _valid_completion(completion: Completion) -> Completion:
    return replace(
        completion,
        text=valid_text(completion.text),
        thinking=valid_text(completion.thinking),
        tool_calls=tuple(valid_json(call) for call in completion.tool_calls),
        logprobs=tuple(valid_json(token) for token in completion.logprobs),
    )
