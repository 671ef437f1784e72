"""Cancellation between pieces of text: a token that the caller closes, and the exception it then raises.

A model can be made to check the token. Leaves out what an ended call is charged
(`viaticum.agents.workflow.call_streams`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

from viaticum.agents.workflow.call_streams import WatchedStream
from viaticum.errors import ModelError
from viaticum.models.base import Generation, Model, StreamPiece
from viaticum.types import Message, TokenCount


class CallerGone(BaseException):
    """The client disconnected or reads too slowly. A BaseException, so that partial work is still charged."""


class CancellationToken:
    """Checked between two pieces of text; open until `close` is called."""

    def __init__(self) -> None:
        self._closed = threading.Event()

    def wait(self) -> None:
        """Return when the next piece is wanted. Raises `CallerGone` if the token is closed."""
        if self._closed.is_set():
            raise CallerGone

    def close(self) -> None:
        self._closed.set()


class CancellableModel(Model):
    """A model that checks a token before each piece."""

    def __init__(self, model: Model, token: CancellationToken) -> None:
        self.model, self.token = model, token
        self.name, self.members, self.runs_here = model.name, model.members, model.runs_here

    def worst_case(self, messages: Sequence[Message], max_new_tokens: int) -> dict[str, TokenCount]:
        return self.model.worst_case(messages, max_new_tokens)

    def count(self, text: str) -> int:
        return self.model.count(text)

    @property
    def counting_hint(self) -> str:
        return self.model.counting_hint

    def worst_case_of(self, messages: Sequence[Message], generation: Generation) -> dict[str, TokenCount]:
        return self.model.worst_case_of(messages, generation)

    def stream(self, messages: Sequence[Message], generation: Generation) -> Iterator[StreamPiece]:
        try:
            self.token.wait()
        except CallerGone:  # as an error: nothing was read, so nothing is charged
            raise ModelError("whoever asked went away before the model began") from None
        return WatchedStream(self.model.stream(messages, generation), before=self.token.wait)
