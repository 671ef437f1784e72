"""Anthropic's messages as an API of the server."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from viaticum.agents.anthropic_api.requests import MessagesRequest, parse_messages
from viaticum.agents.anthropic_api.responses import MessageWriter, message_error
from viaticum.agents.openai_api.api import CompletionAPI, CompletionBody, ResponseWriter
from viaticum.agents.openai_api.errors import APIError


class Messages(CompletionAPI):
    """POST /v1/messages. request_id: returns the id of the request that is answered, which errors repeat."""

    id_prefix = "msg_"

    def __init__(self, request_id: Callable[[], str]) -> None:
        self._request_id = request_id

    def parse(self, body: bytes) -> CompletionBody:
        return parse_messages(body)

    def writer(self, id: str, body: CompletionBody) -> ResponseWriter:
        assert isinstance(body, MessagesRequest)
        return MessageWriter(id, body, self._request_id())

    def error_body(self, error: APIError) -> Mapping[str, Any]:
        return message_error(error, self._request_id())
