"""Incremental detokenization: whole characters only, and nothing past a stop string.

Leaves out models. A tokenizer is anything with `decode(list of ids) -> str`.
"""

from __future__ import annotations

from typing import Protocol

INCOMPLETE = "\ufffd"  # what decoding gives for bytes that do not form a character yet


class Tokenizer(Protocol):
    def decode(self, token_ids: list[int]) -> str: ...


class TextStream:
    """Text of a growing list of tokens; `push` returns what became safe to show.

    Only the tokens since the last complete character are decoded again, so that a long text costs no more a
    token than a short one. Text that could be the beginning of a stop string is held back.
    """

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._held_back = max((len(stop) for stop in stops), default=1) - 1
        self._window: list[int] = []  # settled tokens as left context, then the unsettled ones
        self._settled = 0
        self._shown = 0
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; returns new text. A stop string sets `stopped` and is cut with what follows."""
        self._window.append(token)
        before = self._tokenizer.decode(self._window[: self._settled])
        whole = self._tokenizer.decode(self._window)
        if whole.endswith(INCOMPLETE) and len(self._window) - self._settled < 8:
            return ""
        self._window = self._window[self._settled :]
        self._settled = len(self._window)
        return self._add(whole[len(before) :])

    def finish(self) -> str:
        """The remaining text: incomplete bytes and what was held back for a stop string."""
        begin = self._shown
        if not self.stopped and len(self._window) > self._settled:
            before = self._tokenizer.decode(self._window[: self._settled])
            self._add(self._tokenizer.decode(self._window)[len(before) :])
        rest = self.text[begin:]
        self._shown = len(self.text)
        return rest

    def _add(self, new: str) -> str:
        search_from = max(0, len(self.text) - self._held_back)
        self.text += new
        found = [index for stop in self._stops if (index := self.text.find(stop, search_from)) >= 0]
        if found:
            self.stopped = True
            self.text = self.text[: min(found)]
            return self.finish()
        safe = len(self.text) - self._held_back if self._stops else len(self.text)
        shown = self.text[self._shown : max(safe, self._shown)]
        self._shown = max(safe, self._shown)
        return shown
