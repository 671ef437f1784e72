"""OpenAI's chat completions on the wire: what may be asked, and the shapes of what is said back.

Pure data: no server, no model. What would change the answer and cannot be done is refused, never ignored; what does
not touch the answer (`user`, `metadata` ...) is taken and left alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from viaticum.agents.completions import CompletionFinished
from viaticum.errors import (
    BudgetClosed,
    BudgetExceeded,
    InputError,
    LedgerError,
    MissingExtra,
    ModelError,
    PromptTooLong,
    UnknownName,
    UnknownPrice,
    ViaticumError,
    WeightsError,
)
from viaticum.models.base import Generation
from viaticum.money import NANOUSD_PER_USD, nanousd
from viaticum.types import Message, Usage

MOST_CHOICES = 16
DEFAULT_TOP_P = 1.0


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Part(BaseModel):
    """A part of a message: text. Images and sound are refused."""

    model_config = ConfigDict(extra="ignore", strict=True)
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn. `content` may be missing only where the assistant called tools."""

    model_config = ConfigDict(extra="ignore", strict=True)
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(min_length=1)] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class StreamOptions(_Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ChatRequest(_Body):
    """The body of POST /v1/chat/completions: OpenAI's, and `budget` and `policy`."""

    model: str = Field(
        min_length=1, max_length=200, description="auto, a model of the catalogue, or model+strategy."
    )
    messages: list[ChatMessage] = Field(min_length=1, max_length=4096)
    max_tokens: int | None = Field(None, ge=1, le=10_000_000)
    max_completion_tokens: int | None = Field(None, ge=1, le=10_000_000)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=16)]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    frequency_penalty: float | None = Field(None, ge=0, le=0, description="Only 0.")
    presence_penalty: float | None = Field(None, ge=0, le=0, description="Only 0.")
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = Field(
        None, description="Only empty."
    )
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    budget: Annotated[float, Field(gt=0)] | str | None = Field(
        None, description="Dollars that this request may cost at most; all of its calls together."
    )
    policy: str | None = Field(
        None, max_length=100, description="best, cheapest:ACCURACY or weighted:PER_DOLLAR."
    )
    # Taken and left alone.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def limit_nanousd(self) -> int | None:
        """The request's own limit. Raises `InputError` for what is no amount above zero."""
        if self.budget is None:
            return None
        limit = nanousd(self.budget)
        if limit <= 0:
            raise InputError(f"a budget is above zero dollars, got {self.budget}")
        return limit

    def generation(self) -> Generation:
        extra = {
            name: value
            for name in ("tools", "tool_choice", "parallel_tool_calls", "response_format")
            if (value := getattr(self, name)) is not None
        }
        if self.logprobs:
            extra |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        if extra.get("response_format") == {"type": "text"}:
            del extra["response_format"]  # says nothing
        return Generation(
            temperature=0.0 if self.temperature is None else self.temperature,
            top_p=DEFAULT_TOP_P if self.top_p is None else self.top_p,
            seed=self.seed or 0,
            stop=self.stops,
            extra=extra,
        )

    def chat(self) -> list[Message]:
        """The messages as models take them. Raises `InputError` for a turn without words."""
        return [_message(place, each) for place, each in enumerate(self.messages)]


def _message(place: int, message: ChatMessage) -> Message:
    text = message.content
    if isinstance(text, list):
        text = "".join(part.text for part in text)
    if text is None and not message.tool_calls:
        raise InputError(f"messages.{place}: no content; write what the {message.role} says")
    role = "system" if message.role == "developer" else message.role
    told: dict[str, Any] = {"role": role, "content": text or ""}
    for name in ("name", "tool_calls", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            told[name] = value
    return told  # type: ignore[return-value]


def read_request(body: bytes) -> ChatRequest:
    """Raises `APIError` with status 400, naming the first field that is wrong."""
    try:
        asked = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        message = f"{where}: {first['msg']}" if where else first["msg"]
        if first["type"] == "extra_forbidden":
            message = str(UnknownName("field", where, ChatRequest.model_fields))
        raise APIError(400, message, param=where or None) from None
    if asked.top_logprobs and not asked.logprobs:
        raise APIError(400, "top_logprobs goes with logprobs: true", param="top_logprobs")
    if asked.stream_options is not None and not asked.stream:
        raise APIError(400, "stream_options goes with stream: true", param="stream_options")
    return asked


# --- refusals -------------------------------------------------------------------------------------------------


class APIError(Exception):
    """A status and OpenAI's error object. retry_after: seconds, where trying again may help."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after
        self.error = {"message": message, "type": type, "param": param, "code": code}

    @property
    def body(self) -> dict[str, Any]:
        return {"error": self.error}

    @property
    def headers(self) -> dict[str, str]:
        told = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        return told | ({"www-authenticate": "Bearer"} if self.status == 401 else {})


def refusal_of(error: BaseException) -> APIError | None:
    """What a client is told of an error that was raised on purpose; None for one that was not."""
    match error:
        case APIError():
            return error
        case BudgetExceeded():
            return APIError(402, str(error), type="insufficient_quota", code="budget_exceeded")
        case BudgetClosed():
            return APIError(402, str(error), type="insufficient_quota", code="budget_closed")
        case UnknownName() if error.kind in ("model", "strategy"):
            return unknown_model(str(error))
        case WeightsError() | MissingExtra():
            return unknown_model(str(error))
        case PromptTooLong():
            return APIError(400, str(error), code="context_length_exceeded", param="messages")
        case UnknownPrice():
            return APIError(400, str(error), code="unknown_price", param="model")
        case InputError():
            return APIError(400, str(error))
        case ModelError():
            return APIError(502, str(error), type="server_error", code="model_failed")
        case LedgerError():
            return APIError(503, str(error), type="server_error", code="ledger_unavailable", retry_after=1)
        case ViaticumError():
            return APIError(500, str(error), type="server_error")
    return None


def unknown_model(message: str) -> APIError:
    return APIError(404, message, code="model_not_found", param="model")


# --- what is said back ----------------------------------------------------------------------------------------


class Reply:
    """The parts of one answer, as objects or as events of a stream; they share id, time and model."""

    def __init__(self, id: str, model: str) -> None:
        self.id, self.model, self.created = id, model, int(time.time())

    def whole(self, done: Sequence[CompletionFinished], told: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **self._head("chat.completion"),
            "choices": [
                {
                    "index": index,
                    "message": _said(each),
                    "logprobs": _logprobs(each),
                    "finish_reason": _finish_reason(each),
                }
                for index, each in enumerate(done)
            ],
            "usage": usage_of(done),
            "viaticum": told,
        }

    def opening(self, index: int) -> bytes:
        return self._chunk(index, {"role": "assistant", "content": ""})

    def piece(self, index: int, text: str) -> bytes:
        return self._chunk(index, {"content": text})

    def closing(self, index: int, done: CompletionFinished, told: Mapping[str, Any] | None) -> bytes:
        """The end of a choice, after the functions it wants called. told: on the last one, for `viaticum`."""
        calls = [{"index": place, **call} for place, call in enumerate(done.tool_calls)]
        before = self._chunk(index, {"tool_calls": calls}) if calls else b""
        return before + self._chunk(index, {}, _finish_reason(done), told, _logprobs(done))

    def usage(self, done: Sequence[CompletionFinished], told: Mapping[str, Any]) -> bytes:
        return event(
            {**self._head("chat.completion.chunk"), "choices": [], "usage": usage_of(done), "viaticum": told}
        )

    def _chunk(
        self,
        index: int,
        delta: Mapping[str, Any],
        finish_reason: str | None = None,
        told: Mapping[str, Any] | None = None,
        logprobs: Mapping[str, Any] | None = None,
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        whole = {**self._head("chat.completion.chunk"), "choices": [choice]}
        return event(whole if told is None else {**whole, "viaticum": told})

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
        }


def event(data: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def usage_of(done: Sequence[CompletionFinished]) -> dict[str, Any]:
    total = sum((each.usage for each in done), Usage())
    counts = total.models.values()
    return {
        "prompt_tokens": total.input_tokens,
        "completion_tokens": total.output_tokens,
        "total_tokens": total.input_tokens + total.output_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(count.cached_input_tokens for count in counts)},
        "completion_tokens_details": {"reasoning_tokens": sum(count.reasoning_tokens for count in counts)},
    }


def usd(amount: int) -> float:
    """Nano-dollars as dollars, to read; the integers are what counts."""
    return float(Decimal(amount) / NANOUSD_PER_USD)


def _said(done: CompletionFinished) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": done.text, "refusal": None}
    if done.tool_calls:
        message |= {"content": done.text or None, "tool_calls": [dict(call) for call in done.tool_calls]}
    return message


def _logprobs(done: CompletionFinished) -> dict[str, Any] | None:
    """Where the model gave them; of a stream, all with its end."""
    return {"content": [dict(token) for token in done.logprobs], "refusal": None} if done.logprobs else None


def _finish_reason(done: CompletionFinished) -> str:
    return (
        done.finish_reason
        if done.finish_reason in ("length", "tool_calls")
        else _REASONS.get(done.finish_reason, "stop")
    )


_REASONS = {"loop": "length", "refused": "content_filter"}  # a loop was cut before its writer ended it
