"""Incremental detokenization: whole characters only, thought apart from text, nothing past a stop string.

Leaves out models. A tokenizer is anything with `decode(list of ids) -> str`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from viaticum.stop_strings import AnswerStream
from viaticum.thinking import PLAIN, Piece, ThinkingSplitter
from viaticum.types import ThinkingDelta

INCOMPLETE = "\ufffd"  # what decoding gives for bytes that do not form a character yet


class Tokenizer(Protocol):
    def decode(self, token_ids: list[int]) -> str: ...


class Shown(NamedTuple):
    """New text and new thought that are safe to show; the thought comes before the text."""

    text: str = ""
    thinking: str = ""


NOTHING_SHOWN = Shown()


class TextStream:
    """Text and thought of a growing list of tokens; `push` returns what became safe to show.

    Only the tokens since the last complete character are decoded again, so that a long text costs no more a
    token than a short one. What could be the beginning of a tag or of a stop string is held back. Stop
    strings are looked for in the text, not in the thought.

    Args:
        stops: stop strings.
        splitter: knows the tags around the thought; by default there is none.
    """

    def __init__(
        self, tokenizer: Tokenizer, stops: tuple[str, ...] = (), splitter: ThinkingSplitter | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []  # settled tokens as left context, then the unsettled ones
        self._settled = 0
        self._answer = AnswerStream(splitter or ThinkingSplitter(PLAIN), stops)

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended the text."""
        return self._answer.stopped

    @property
    def stop_string(self) -> str:
        """The stop string that ended the text, "" for none."""
        return self._answer.stop_string

    @property
    def text(self) -> str:
        """All text that was shown so far, without the thought."""
        return self._answer.text

    @property
    def thinking(self) -> str:
        """All of the thought so far."""
        return self._answer.thinking

    @property
    def inside_thought(self) -> bool:
        """Whether the next token continues a thought."""
        return self._answer.inside_thought

    def push(self, token: int) -> Shown:
        """Add a token; returns what is new. A stop string is cut with what follows."""
        self._window.append(token)
        before = self._tokenizer.decode(self._window[: self._settled])
        whole = self._tokenizer.decode(self._window)
        if whole.endswith(INCOMPLETE) and len(self._window) - self._settled < 8:
            return NOTHING_SHOWN
        self._window = self._window[self._settled :]
        self._settled = len(self._window)
        return _joined(self._answer.push(whole[len(before) :]))

    def finish(self, *, ended: bool = True) -> Shown:
        """What remains: incomplete bytes, and what was held back for a tag or a stop string.

        ended: the model ended the text, it was not cut off.
        """
        if self.stopped:
            return NOTHING_SHOWN
        pieces: list[Piece] = []
        if len(self._window) > self._settled:
            before = self._tokenizer.decode(self._window[: self._settled])
            pieces = self._answer.push(self._tokenizer.decode(self._window)[len(before) :])
        return _joined([*pieces, *self._answer.finish(ended=ended)])


def _joined(pieces: Sequence[Piece]) -> Shown:
    return Shown(
        "".join(piece for piece in pieces if isinstance(piece, str)),
        "".join(piece.text for piece in pieces if isinstance(piece, ThinkingDelta)),
    )
