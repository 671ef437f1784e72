"""Responses of OpenAI's API: JSON objects as typed dicts, and the builder of a completion or its stream.

The typed dicts are the source of the OpenAPI schemas (`openapi`). They are plain dicts at run time, so that a
chunk of a stream costs no validation. Leaves out HTTP and errors (`errors`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,  # which pydantic can make schemas of
)

from pydantic import Field
from typing_extensions import TypedDict

from viaticum.agents.completions import CompletionFinished
from viaticum.money import NANOUSD_PER_USD
from viaticum.types import Usage

Count = Annotated[int, Field(ge=0)]
FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]

# Finish reasons of models that OpenAI does not have. A loop was cut before the model ended its text.
_FINISH_REASONS: dict[str, FinishReason] = {
    "length": "length",
    "tool_calls": "tool_calls",
    "loop": "length",
    "refused": "content_filter",
}

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"  # a comment, which clients pass over


class PromptTokensDetails(TypedDict):
    """`cache_creation_tokens` is LiteLLM's name of those that a provider wrote into its cache."""

    cached_tokens: Count
    cache_creation_tokens: NotRequired[Count]


class CompletionTokensDetails(TypedDict):
    reasoning_tokens: Count


class CompletionUsage(TypedDict):
    """Tokens of all choices."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class ModelUsage(TypedDict):
    input_tokens: Count
    output_tokens: Count


class ViaticumExtension(TypedDict):
    """Who answered and what it cost; costs are those of all choices, the rest is of the last one."""

    route: Annotated[str, Field(description="The model, or model+strategy, that wrote the answer.")]
    routes: Annotated[list[str], Field(description="Every route that was tried, in order.")]
    answer: Annotated[str | None, Field(description="The answer that the strategy read from the text.")]
    reason: Annotated[str, Field(description="Why there is no answer.")]
    why: Annotated[str, Field(description="Why the route was chosen; empty where it was named.")]
    switched_from: Annotated[
        str | None, Field(description="The model of the session's last turn, where that was another one.")
    ]
    cost_nanousd: Annotated[Count, Field(description="Nano-dollars.")]
    cost_usd: Annotated[float, Field(ge=0, description="Dollars, rounded to a float.")]
    left_nanousd: Annotated[int | None, Field(description="Left of the budget; null without a limit.")]
    usage: Annotated[dict[str, ModelUsage], Field(description="Tokens by model.")]


class ChoiceLogprobs(TypedDict):
    content: list[dict[str, Any]]
    refusal: None


class ChatCompletionMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[Annotated[str, Field(description="What the model thought before.")]]
    tool_calls: NotRequired[list[dict[str, Any]]]


class Choice(TypedDict):
    index: Count
    message: ChatCompletionMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(TypedDict):
    """The response to a request without `stream`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: None
    choices: Annotated[list[Choice], Field(min_length=1)]
    usage: CompletionUsage
    viaticum: ViaticumExtension


class ChoiceDelta(TypedDict):
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    reasoning_content: NotRequired[Annotated[str, Field(description="A piece of the thought.")]]
    tool_calls: NotRequired[list[dict[str, Any]]]


class ChunkChoice(TypedDict):
    index: Count
    delta: ChoiceDelta
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(TypedDict):
    """One event of a stream. `viaticum` comes with the end of the last choice, and with `usage`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: None
    choices: list[ChunkChoice]
    usage: NotRequired[CompletionUsage]
    viaticum: NotRequired[ViaticumExtension]


class ModelObject(TypedDict):
    """A name that can be requested, in the forms of OpenAI and of Anthropic at once."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["viaticum"]
    type: Literal["model"]
    display_name: str
    created_at: str


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelObject]
    has_more: Literal[False]
    first_id: str | None
    last_id: str | None


class Health(TypedDict):
    status: Literal["ok", "draining"]
    in_flight: Annotated[Count, Field(description="Calls that run.")]
    queued: Annotated[Count, Field(description="Requests that wait for a free slot.")]


class ResponseBuilder:
    """Builds the completion of a request, or its events; all share id, creation time and model."""

    def __init__(self, id: str, model: str) -> None:
        self.id, self.model, self.created = id, model, int(time.time())

    def completion(
        self, finished: Sequence[CompletionFinished], extension: ViaticumExtension
    ) -> ChatCompletion:
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
            "choices": [
                {
                    "index": index,
                    "message": _message(each),
                    "logprobs": _logprobs(each),
                    "finish_reason": _finish_reason(each),
                }
                for index, each in enumerate(finished)
            ],
            "usage": completion_usage(finished),
            "viaticum": extension,
        }

    def first_event(self, index: int) -> bytes:
        return server_sent_event(self._chunk([_choice(index, {"role": "assistant", "content": ""})]))

    def text_event(self, index: int, text: str) -> bytes:
        return server_sent_event(self._chunk([_choice(index, {"content": text})]))

    def thinking_event(self, index: int, text: str) -> bytes:
        return server_sent_event(self._chunk([_choice(index, {"reasoning_content": text})]))

    def final_events(
        self, index: int, finished: CompletionFinished, extension: ViaticumExtension | None = None
    ) -> bytes:
        """A choice's tool calls, if any, then its finish reason. extension: given with the last choice."""
        calls: list[dict[str, Any]] = [
            {"index": number, **call} for number, call in enumerate(finished.tool_calls)
        ]
        chunk = self._chunk([_choice(index, {}, _finish_reason(finished), _logprobs(finished))])
        if extension is not None:
            chunk["viaticum"] = extension
        tools = self._chunk([_choice(index, {"tool_calls": calls})]) if calls else None
        return (server_sent_event(tools) if tools else b"") + server_sent_event(chunk)

    def usage_event(self, finished: Sequence[CompletionFinished], extension: ViaticumExtension) -> bytes:
        chunk = self._chunk([])
        chunk["usage"], chunk["viaticum"] = completion_usage(finished), extension
        return server_sent_event(chunk)

    def _chunk(self, choices: list[ChunkChoice]) -> ChatCompletionChunk:
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
            "choices": choices,
        }


def viaticum_extension(
    last: CompletionFinished, *, route: str, cost: int, left: int | None
) -> ViaticumExtension:
    """The `viaticum` object of a response.

    Args:
        last: the last choice.
        route: who started the first choice, for a completion that names no route.
        cost: of all choices, in nano-dollars.
        left: of the budget, in nano-dollars; None where dollars are not limited.
    """
    return {
        "route": last.routes[-1] if last.routes else route,
        "routes": list(last.routes),
        "answer": last.answer,
        "reason": last.reason,
        "why": last.why,
        "switched_from": last.switched_from or None,
        "cost_nanousd": cost,
        "cost_usd": to_usd(cost),
        "left_nanousd": left,
        "usage": {
            name: {"input_tokens": count.input_tokens, "output_tokens": count.output_tokens}
            for name, count in last.usage.models.items()
        },
    }


def model_object(name: str) -> ModelObject:
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "viaticum",
        "type": "model",
        "display_name": name,
        "created_at": "1970-01-01T00:00:00Z",
    }


def model_list(names: Iterable[str]) -> ModelList:
    models = [model_object(name) for name in names]
    ends = (models[0]["id"], models[-1]["id"]) if models else (None, None)
    return {"object": "list", "data": models, "has_more": False, "first_id": ends[0], "last_id": ends[1]}


def completion_usage(finished: Sequence[CompletionFinished]) -> CompletionUsage:
    total = sum((each.usage for each in finished), Usage())
    counts = total.models.values()
    read: PromptTokensDetails = {"cached_tokens": sum(count.cached_input_tokens for count in counts)}
    if written := sum(count.cache_write_tokens for count in counts):
        read["cache_creation_tokens"] = written
    return {
        "prompt_tokens": total.input_tokens,
        "completion_tokens": total.output_tokens,
        "total_tokens": total.input_tokens + total.output_tokens,
        "prompt_tokens_details": read,
        "completion_tokens_details": {"reasoning_tokens": sum(count.reasoning_tokens for count in counts)},
    }


def to_usd(nanousd: int) -> float:
    """Nano-dollars as dollars, for display; the integers are exact."""
    return float(Decimal(nanousd) / NANOUSD_PER_USD)


def server_sent_event(data: Mapping[str, object]) -> bytes:
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


def _choice(
    index: int,
    delta: ChoiceDelta,
    finish_reason: FinishReason | None = None,
    logprobs: ChoiceLogprobs | None = None,
) -> ChunkChoice:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _message(finished: CompletionFinished) -> ChatCompletionMessage:
    message: ChatCompletionMessage = {"role": "assistant", "content": finished.text, "refusal": None}
    if finished.thinking:
        message["reasoning_content"] = finished.thinking
    if finished.tool_calls:
        message["content"] = finished.text or None
        message["tool_calls"] = [dict(call) for call in finished.tool_calls]
    return message


def _logprobs(finished: CompletionFinished) -> ChoiceLogprobs | None:
    """None where the model gave none. In a stream all of them come with the end of the choice."""
    if not finished.logprobs:
        return None
    return {"content": [dict(token) for token in finished.logprobs], "refusal": None}


def _finish_reason(finished: CompletionFinished) -> FinishReason:
    return _FINISH_REASONS.get(finished.finish_reason, "stop")
