"""Incremental detokenization: whole characters only, thought apart from text, nothing past a stop string.

Leaves out models. A tokenizer is anything with `decode(list of ids) -> str`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from viaticum.stop_strings import StopStrings
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
        self._stops = StopStrings(stops)
        self._window: list[int] = []  # settled tokens as left context, then the unsettled ones
        self._settled = 0
        self._splitter = splitter or ThinkingSplitter(PLAIN)
        self._shown: list[str] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended the text."""
        return self._stops.stopped

    @property
    def text(self) -> str:
        """All text that was shown so far, without the thought."""
        return "".join(self._shown)

    @property
    def thinking(self) -> str:
        """All of the thought so far."""
        return self._splitter.thinking

    @property
    def inside_thought(self) -> bool:
        """Whether the next token continues a thought."""
        return self._splitter.inside

    def push(self, token: int) -> Shown:
        """Add a token; returns what is new. A stop string is cut with what follows."""
        self._window.append(token)
        before = self._tokenizer.decode(self._window[: self._settled])
        whole = self._tokenizer.decode(self._window)
        if whole.endswith(INCOMPLETE) and len(self._window) - self._settled < 8:
            return NOTHING_SHOWN
        self._window = self._window[self._settled :]
        self._settled = len(self._window)
        return self._add(self._splitter.push(whole[len(before) :]))

    def finish(self, *, ended: bool = True) -> Shown:
        """What remains: incomplete bytes, and what was held back for a tag or a stop string.

        ended: the model ended the text, it was not cut off.
        """
        if self.stopped:
            return NOTHING_SHOWN
        pieces: list[Piece] = []
        if len(self._window) > self._settled:
            before = self._tokenizer.decode(self._window[: self._settled])
            pieces = self._splitter.push(self._tokenizer.decode(self._window)[len(before) :])
        shown = self._add([*pieces, *self._splitter.finish(ended=ended)])
        rest = self._stops.finish()
        self._shown.append(rest)
        return shown._replace(text=shown.text + rest)

    def _add(self, pieces: Sequence[Piece]) -> Shown:
        text = self._stops.push("".join(piece for piece in pieces if isinstance(piece, str)))
        self._shown.append(text)
        return Shown(text, "".join(piece.text for piece in pieces if isinstance(piece, ThinkingDelta)))
