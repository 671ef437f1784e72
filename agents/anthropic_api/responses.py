"""Responses of Anthropic's messages API: JSON objects as typed dicts, the events of a stream, and errors.

The typed dicts are the source of the OpenAPI schemas. Leaves out HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from viaticum.agents.anthropic_api.requests import THREAD_UNSUPPORTED, MessagesRequest
from viaticum.agents.completions import CompletionEvent, CompletionFinished, CompletionStarted
from viaticum.agents.openai_api.api import ResponseWriter
from viaticum.agents.openai_api.errors import APIError
from viaticum.agents.openai_api.responses import Count, ViaticumExtension
from viaticum.types import ThinkingDelta, Usage

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "refusal"]
# Finish reasons of models; a loop was cut before the model ended its text.
_STOP_REASONS: dict[str, StopReason] = {
    "length": "max_tokens",
    "loop": "max_tokens",
    "tool_calls": "tool_use",
    "refused": "refusal",
}
ErrorType = Literal[
    "invalid_request_error",
    "authentication_error",
    "billing_error",
    "permission_error",
    "not_found_error",
    "request_too_large",
    "rate_limit_error",
    "api_error",
    "overloaded_error",
    "timeout_error",
]
_ERROR_TYPES: dict[int, ErrorType] = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
BAD_ARGUMENTS = "arguments"  # of a tool, as a text, where the model wrote no JSON object


class OutputTokensDetails(TypedDict):
    thinking_tokens: Count


class MessageUsage(TypedDict):
    """input_tokens: those that were neither read from a provider's cache nor written into it."""

    input_tokens: Count
    output_tokens: Count
    cache_read_input_tokens: Count
    cache_creation_input_tokens: Count
    output_tokens_details: NotRequired[OutputTokensDetails]


class MessageObject(TypedDict):
    """The response to a request without `stream`. content: blocks of text, thinking and tool_use."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage
    viaticum: NotRequired[ViaticumExtension]


class TokensCount(TypedDict):
    """The response of `count_tokens`."""

    input_tokens: Count


class MessageErrorObject(TypedDict):
    type: ErrorType
    message: str
    details: NotRequired[dict[str, Any]]


class MessageError(TypedDict):
    """The body of a response with status 400 or above, and the last event of a stream that failed."""

    type: Literal["error"]
    error: MessageErrorObject
    request_id: Annotated[str, Field(description="As in the header request-id.")]


def message_error(error: APIError, request_id: str) -> MessageError:
    """An error in Anthropic's form. Those of status 500 and above have type api_error where nothing fits."""
    fallback: ErrorType = "api_error" if error.status >= 500 else "invalid_request_error"
    kind = _ERROR_TYPES.get(error.status, fallback)
    made: MessageErrorObject = {"type": kind, "message": str(error)}
    if error.error["code"] == THREAD_UNSUPPORTED:
        made["details"] = {"error_code": THREAD_UNSUPPORTED, "unsupported": ["thread"]}
    return {"type": "error", "error": made, "request_id": request_id}


def message_usage(usage: Usage) -> MessageUsage:
    counts = usage.models.values()
    cached = sum(count.cached_input_tokens for count in counts)
    written = sum(count.cache_write_tokens for count in counts)
    return {
        "input_tokens": max(0, usage.input_tokens - cached - written),
        "output_tokens": usage.output_tokens,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": written,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    }


class MessageWriter(ResponseWriter):
    """The message of a request, or its events. Each block begins, has its pieces and ends, in this order."""

    keep_alive = b'event: ping\ndata: {"type":"ping"}\n\n'

    def __init__(self, id: str, request: MessagesRequest, request_id: str) -> None:
        self._id, self._request, self._request_id = id, request, request_id
        self._is_started = False
        self._blocks = 0  # begun so far
        self._open: Literal["text", "thinking"] | None = None

    def whole(
        self, finished: Sequence[CompletionFinished], extension: ViaticumExtension
    ) -> Mapping[str, Any]:
        message, (done,) = self._message(message_usage(finished[0].usage)), finished
        message["content"] = list(self._content(done))
        message["stop_reason"], message["stop_sequence"] = stop_reason(done), done.stop_string or None
        message["viaticum"] = extension
        return message

    def events(self, index: int, event: CompletionEvent) -> bytes:
        if isinstance(event, CompletionStarted):
            return self._start(event.prompt_tokens)
        if isinstance(event, ThinkingDelta):
            if not self._request.shows_thinking:
                return b""
            delta = {"type": "thinking_delta", "thinking": event.text}
            return self._start() + self._begin("thinking") + self._delta(delta)
        if isinstance(event, str) and event:
            return self._start() + self._begin("text") + self._delta({"type": "text_delta", "text": event})
        return b""

    def ending(self, finished: Sequence[CompletionFinished], extension: ViaticumExtension) -> bytes:
        (done,) = finished
        events = [self._start()]
        if not self._blocks and not done.tool_calls:
            events.append(self._begin("text"))
        events.append(self._end())
        for call in done.tool_calls:
            block = _tool_use(call)
            arguments = json.dumps(block["input"], ensure_ascii=False)
            events.append(self._begin_block({**block, "input": {}}))
            events.append(self._delta({"type": "input_json_delta", "partial_json": arguments}))
            events.append(self._end_block())
        delta = {"stop_reason": stop_reason(done), "stop_sequence": done.stop_string or None}
        usage = message_usage(done.usage)
        last = {"type": "message_delta", "delta": delta, "usage": usage, "viaticum": extension}
        return b"".join([*events, _event(last), _event({"type": "message_stop"})])

    def failure(self, error: APIError) -> bytes:
        return _event(message_error(error, self._request_id))

    def _message(self, usage: MessageUsage) -> MessageObject:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._request.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }

    def _content(self, done: CompletionFinished) -> Iterator[dict[str, Any]]:
        if done.thinking and self._request.shows_thinking:
            yield _block("thinking", done.thinking)
        if done.text or not done.tool_calls:
            yield _block("text", done.text)
        yield from map(_tool_use, done.tool_calls)

    def _start(self, prompt_tokens: int = 0) -> bytes:
        """The first event, once. Its usage is what the prompt likely has; the last event has the count."""
        if self._is_started:
            return b""
        self._is_started = True
        usage: MessageUsage = {
            "input_tokens": prompt_tokens,
            "output_tokens": 0,
            "cache_read_input_tokens": 0,
            "cache_creation_input_tokens": 0,
        }
        return _event({"type": "message_start", "message": self._message(usage)})

    def _begin(self, kind: Literal["text", "thinking"]) -> bytes:
        """The events before a piece of this kind: of the end of another block, and of its own begin."""
        if self._open == kind:
            return b""
        events = self._end() + self._begin_block(_block(kind, ""))
        self._open = kind
        return events

    def _begin_block(self, block: Mapping[str, Any]) -> bytes:
        self._blocks += 1
        return _event({"type": "content_block_start", "index": self._blocks - 1, "content_block": block})

    def _delta(self, delta: Mapping[str, Any]) -> bytes:
        return _event({"type": "content_block_delta", "index": self._blocks - 1, "delta": delta})

    def _end(self) -> bytes:
        is_open, self._open = self._open is not None, None
        return self._end_block() if is_open else b""

    def _end_block(self) -> bytes:
        return _event({"type": "content_block_stop", "index": self._blocks - 1})


def stop_reason(done: CompletionFinished) -> StopReason:
    if done.stop_string:
        return "stop_sequence"
    return _STOP_REASONS.get(done.finish_reason, "end_turn")


def _block(kind: Literal["text", "thinking"], text: str) -> dict[str, Any]:
    """A block of text or thought. Only Anthropic's own models sign their thoughts."""
    if kind == "thinking":
        return {"type": "thinking", "thinking": text, "signature": ""}
    return {"type": "text", "text": text, "citations": None}


def _tool_use(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call in Anthropic's form. Arguments that are no JSON object are given as a text in one."""
    text = call["function"]["arguments"]
    try:
        arguments = json.loads(text)
        json.dumps(arguments, allow_nan=False, ensure_ascii=False).encode()  # as it is sent
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        arguments = {BAD_ARGUMENTS: text}
    return {"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "input": arguments}


def _event(data: Mapping[str, Any]) -> bytes:
    text = json.dumps(data, separators=(",", ":"))
    return f"event: {data['type']}\ndata: {text}\n\n".encode()
