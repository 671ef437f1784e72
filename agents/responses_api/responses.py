"""Responses of the Responses API: JSON objects as typed dicts, and the writer of a response or its events.

The typed dicts are the source of the OpenAPI schemas. Leaves out HTTP and errors before a stream begins.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from typing_extensions import TypedDict

from viaticum.agents.completions import CompletionEvent, CompletionFinished
from viaticum.agents.openai_api.api import ResponseWriter
from viaticum.agents.openai_api.errors import APIError
from viaticum.agents.openai_api.responses import Count, ViaticumExtension
from viaticum.agents.responses_api.requests import ResponseRequest
from viaticum.types import ThinkingDelta, Usage

Status = Literal["in_progress", "completed", "incomplete", "failed"]
# Finish reasons of models that leave a response incomplete, and why it is.
_INCOMPLETE = {"length": "max_output_tokens", "loop": "max_output_tokens", "refused": "content_filter"}
# Codes of failed responses that OpenAI has; any other is server_error.
_CODES = {429: "rate_limit_exceeded", 400: "invalid_prompt"}


class InputTokensDetails(TypedDict):
    cached_tokens: Count
    cache_write_tokens: Count


class ResponseTokensDetails(TypedDict):
    reasoning_tokens: Count


class ResponseUsage(TypedDict):
    input_tokens: Count
    input_tokens_details: InputTokensDetails
    output_tokens: Count
    output_tokens_details: ResponseTokensDetails
    total_tokens: Count


class ResponseError(TypedDict):
    code: str
    message: str


class ResponseObject(TypedDict):
    """The response to a request, as it is kept. output: thoughts, messages and calls of functions."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Status
    model: str
    output: list[dict[str, Any]]
    error: ResponseError | None
    incomplete_details: dict[str, str] | None
    usage: ResponseUsage | None
    instructions: str | None
    metadata: dict[str, Any]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, Any] | None
    store: bool
    temperature: float | None
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float | None
    max_output_tokens: int | None
    truncation: Literal["disabled"]
    viaticum: ViaticumExtension | None


class DeletedResponse(TypedDict):
    id: str
    object: Literal["response.deleted"]
    deleted: Literal[True]


class ResponsesWriter(ResponseWriter):
    """The response to a request, or its events: each item begins, has its pieces and ends, in this order."""

    def __init__(self, id: str, request: ResponseRequest) -> None:
        self._id, self._request, self._created = id, request, int(time.time())
        self._number = 0  # of the next event
        self._items: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._text = ""  # of the open item

    def whole(
        self, finished: Sequence[CompletionFinished], extension: ViaticumExtension
    ) -> Mapping[str, Any]:
        (done,) = finished
        response = self._response("completed")
        self._items = self._items or _output(done)
        response["output"] = self._items
        response["usage"] = response_usage(done.usage)
        response["viaticum"] = extension
        if reason := _INCOMPLETE.get(done.finish_reason):
            response["status"], response["incomplete_details"] = "incomplete", {"reason": reason}
        return response

    def events(self, index: int, event: CompletionEvent) -> bytes:
        if isinstance(event, ThinkingDelta) and event.text:
            return self._start() + self._piece("reasoning", event.text)
        if isinstance(event, str) and event:
            return self._start() + self._piece("message", event)
        return self._start()

    def ending(self, finished: Sequence[CompletionFinished], extension: ViaticumExtension) -> bytes:
        (done,) = finished
        events = self._start()
        if not done.tool_calls and (self._open is None or self._open["type"] != "message"):
            events += self._piece("message", "")
        events += self._end(done.logprobs)
        for call in done.tool_calls:
            events += self._call(call)
        response = self.whole(finished, extension)
        return events + self._event(f"response.{response['status']}", response=response)

    def failure(self, error: APIError) -> bytes:
        if not self._number:
            return self._event("error", code=error.error["code"], message=str(error), param=None)
        response = self._response("failed")
        response["output"] = self._items
        code = _CODES.get(error.status, "server_error")
        response["error"] = {"code": code, "message": str(error)}
        return self._event("response.failed", response=response)

    def _response(self, status: Status) -> ResponseObject:
        request = self._request
        text = request.text.model_dump(by_alias=True, exclude_none=True) if request.text else {}
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "model": request.model,
            "output": [],
            "error": None,
            "incomplete_details": None,
            "usage": None,
            "instructions": request.instructions,
            "metadata": request.metadata or {},
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": request.previous_response_id,
            "reasoning": None if request.reasoning is None else request.reasoning.model_dump(),
            "store": request.is_stored,
            "temperature": request.temperature,
            "text": {"format": {"type": "text"}, **text},
            "tool_choice": request.tool_choice or "auto",
            "tools": [{"strict": None, **tool.model_dump()} for tool in request.tools or ()],
            "top_p": request.top_p,
            "max_output_tokens": request.max_output_tokens,
            "truncation": "disabled",
            "viaticum": None,
        }

    def _start(self) -> bytes:
        """The first events, once."""
        if self._number:
            return b""
        events = self._event("response.created", response=self._response("in_progress"))
        return events + self._event("response.in_progress", response=self._response("in_progress"))

    def _piece(self, kind: Literal["message", "reasoning"], text: str) -> bytes:
        """A piece of a message or a thought, after what ends another item and begins this one."""
        events = b""
        if self._open is None or self._open["type"] != kind:
            events = self._end() + self._begin(_message([]) if kind == "message" else _reasoning([]))
            events += self._event("response.content_part.added", content_index=0, part=_part(kind, ""))
        if not text:
            return events
        self._text += text
        logprobs: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        return events + self._event(f"{_TEXT_EVENTS[kind]}.delta", content_index=0, delta=text, **logprobs)

    def _begin(self, item: dict[str, Any]) -> bytes:
        """The event that begins an item."""
        self._items.append(item)
        self._open, self._text = item, ""
        return self._event("response.output_item.added", item={**item, "status": "in_progress"}, item_id=None)

    def _end(self, logprobs: Sequence[Mapping[str, Any]] = ()) -> bytes:
        """The events that end a message or a thought, if one is open."""
        if (item := self._open) is None:
            return b""
        kind: Any = item["type"]
        part = _part(kind, self._text, logprobs)
        extra: dict[str, Any] = {"logprobs": part["logprobs"]} if kind == "message" else {}
        events = self._event(f"{_TEXT_EVENTS[kind]}.done", content_index=0, text=self._text, **extra)
        events += self._event("response.content_part.done", content_index=0, part=part)
        item["content"] = [part]
        events += self._event("response.output_item.done", item=item, item_id=None)
        self._open = None
        return events

    def _call(self, call: Mapping[str, Any]) -> bytes:
        """The events of a call of a function."""
        item = _function_call(call)
        arguments, name = item["arguments"], item["name"]
        events = self._begin({**item, "arguments": ""})
        self._items[-1] = item
        kind = "response.function_call_arguments"
        events += self._event(f"{kind}.delta", delta=arguments)
        events += self._event(f"{kind}.done", arguments=arguments, name=name)
        events += self._event("response.output_item.done", item=item, item_id=None)
        self._open = None
        return events

    def _event(self, kind: str, **fields: Any) -> bytes:
        """An event with its number. One of an item has its index, and its id unless item_id is None."""
        data: dict[str, Any] = {"type": kind, "sequence_number": self._number}
        self._number += 1
        if self._open is not None and "response" not in fields:
            data |= {"output_index": len(self._items) - 1, "item_id": self._open["id"]}
        data |= fields
        if data.get("item_id", "") is None:
            del data["item_id"]
        return f"event: {kind}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


_TEXT_EVENTS = {"message": "response.output_text", "reasoning": "response.reasoning_text"}


def response_usage(usage: Usage) -> ResponseUsage:
    counts = usage.models.values()
    return {
        "input_tokens": usage.input_tokens,
        "input_tokens_details": {
            "cached_tokens": sum(count.cached_input_tokens for count in counts),
            "cache_write_tokens": sum(count.cache_write_tokens for count in counts),
        },
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.input_tokens + usage.output_tokens,
    }


def _output(done: CompletionFinished) -> list[dict[str, Any]]:
    items = [_reasoning([_part("reasoning", done.thinking)])] if done.thinking else []
    if done.text or not done.tool_calls:
        items.append(_message([_part("message", done.text, done.logprobs)]))
    return [*items, *map(_function_call, done.tool_calls)]


def _part(
    kind: Literal["message", "reasoning"], text: str, logprobs: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {
        "type": "output_text",
        "text": text,
        "annotations": [],
        "logprobs": [dict(token) for token in logprobs],
    }


def _message(content: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": content,
    }


def _reasoning(content: list[dict[str, Any]]) -> dict[str, Any]:
    made = {"id": f"rs_{uuid.uuid4().hex}", "type": "reasoning", "status": "completed", "summary": []}
    return {**made, "content": content}


def _function_call(call: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": f"fc_{uuid.uuid4().hex}",
        "type": "function_call",
        "status": "completed",
        "call_id": call["id"],
        "name": call["function"]["name"],
        "arguments": call["function"]["arguments"],
    }
