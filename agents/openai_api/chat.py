"""Chat completions as an API of the server: their parser, and the writer of a completion or its chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from viaticum.agents.completions import CompletionEvent, CompletionFinished
from viaticum.agents.openai_api.api import CompletionAPI, CompletionBody, ResponseWriter
from viaticum.agents.openai_api.errors import APIError
from viaticum.agents.openai_api.requests import ChatRequest, parse_request
from viaticum.agents.openai_api.responses import (
    DONE,
    ResponseBuilder,
    ViaticumExtension,
    server_sent_event,
)
from viaticum.types import ThinkingDelta


class ChatCompletions(CompletionAPI):
    """POST /v1/chat/completions."""

    id_prefix = "chatcmpl-"

    def parse(self, body: bytes) -> CompletionBody:
        return parse_request(body)

    def writer(self, id: str, body: CompletionBody) -> ResponseWriter:
        assert isinstance(body, ChatRequest)
        return ChatWriter(id, body)


class ChatWriter(ResponseWriter):
    """The completion of a request, or its chunks."""

    last = DONE

    def __init__(self, id: str, request: ChatRequest) -> None:
        self._request, self._builder = request, ResponseBuilder(id, request.model)
        self._opened = set[int]()

    def whole(
        self, finished: Sequence[CompletionFinished], extension: ViaticumExtension
    ) -> Mapping[str, Any]:
        return self._builder.completion(finished, extension)

    def events(self, index: int, event: CompletionEvent) -> bytes:
        first = b"" if index in self._opened else self._builder.first_event(index)
        self._opened.add(index)
        if isinstance(event, str):
            return first + self._builder.text_event(index, event)
        if isinstance(event, ThinkingDelta):
            return first + self._builder.thinking_event(index, event.text)
        if isinstance(event, CompletionFinished) and index < (self._request.n or 1) - 1:
            return first + self._builder.final_events(index, event)
        return first  # the last choice ends with the cost

    def ending(self, finished: Sequence[CompletionFinished], extension: ViaticumExtension) -> bytes:
        events = self._builder.final_events(len(finished) - 1, finished[-1], extension)
        options = self._request.stream_options
        if options is not None and options.include_usage:
            events += self._builder.usage_event(finished, extension)
        return events

    def failure(self, error: APIError) -> bytes:
        return server_sent_event(error.body)
