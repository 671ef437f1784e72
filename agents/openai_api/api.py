"""What the server has to know of an API: how a request is read and how its response is written.

An API is one `CompletionAPI`; chat completions are one (`chat`). Everything between the two ends, which is
keys, budgets, routes and calls, is the same for all of them. Leaves out HTTP.
"""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from viaticum.agents.completions import CompletionEvent, CompletionFinished
from viaticum.agents.openai_api.errors import APIError
from viaticum.agents.openai_api.responses import KEEP_ALIVE, ViaticumExtension
from viaticum.generation import GenerationSettings
from viaticum.types import Message


class CompletionBody(Protocol):
    """A parsed request. n: choices; limit_nanousd: its own budget, None for none.

    is_lenient: what a model cannot do of its hints is left out (`CompletionRequest`).
    """

    @property
    def model(self) -> str: ...
    @property
    def stream(self) -> bool | None: ...
    @property
    def n(self) -> int | None: ...
    @property
    def policy(self) -> str | None: ...
    @property
    def limit_nanousd(self) -> int | None: ...
    @property
    def only(self) -> str | list[str] | None: ...
    @property
    def max_seconds(self) -> float | None: ...
    @property
    def session(self) -> str | None: ...
    @property
    def is_lenient(self) -> bool: ...
    def to_messages(self) -> list[Message]: ...
    def to_settings(self) -> GenerationSettings: ...
    def to_extra(self) -> dict[str, Any]: ...


class ResponseWriter(ABC):
    """Writes the response to one request: whole, or as the events of a stream.

    keep_alive: sent where nothing else is to be sent. last: ends every stream, also one that failed.
    """

    keep_alive: bytes = KEEP_ALIVE
    last: bytes = b""

    @abstractmethod
    def whole(
        self, finished: Sequence[CompletionFinished], extension: ViaticumExtension
    ) -> Mapping[str, Any]:
        """The JSON body of the response. finished: the choices."""

    @abstractmethod
    def events(self, index: int, event: CompletionEvent) -> bytes:
        """The events, maybe none, of a piece of a choice."""

    @abstractmethod
    def ending(self, finished: Sequence[CompletionFinished], extension: ViaticumExtension) -> bytes:
        """The events at the end of the last choice."""

    @abstractmethod
    def failure(self, error: APIError) -> bytes:
        """The events of a stream that failed after it began."""


class CompletionAPI(ABC):
    """An API that asks for completions.

    id_prefix: of the ids of its responses. keeps: whether it keeps responses, so that `keep` is called.
    """

    id_prefix: str
    keeps: bool = False

    @abstractmethod
    def parse(self, body: bytes) -> CompletionBody:
        """Parse a JSON body. Raises `APIError` with status 400. Not for the event loop's thread."""

    def load(self, body: CompletionBody, scope: str) -> CompletionBody:
        """A request with what this API keeps of the conversation. In a thread. Raises `APIError`.

        scope: the budget that pays, whose responses alone are found.
        """
        return body

    def keep(  # noqa: B027  # most APIs keep nothing
        self,
        body: CompletionBody,
        scope: str,
        finished: Sequence[CompletionFinished],
        response: Mapping[str, Any],
    ) -> None:
        """Keep a response before its client learns that it has ended. In a thread."""

    @abstractmethod
    def writer(self, id: str, body: CompletionBody) -> ResponseWriter:
        """The writer of the response to a request that `parse` returned."""

    def error_body(self, error: APIError) -> Mapping[str, Any]:
        """The JSON body of a response with status 400 or above."""
        return error.body

    def new_id(self) -> str:
        return f"{self.id_prefix}{uuid.uuid4().hex}"
