"""Requests of OpenAI's chat completions API: the pydantic models that parse and validate a body.

Pure data: no server, no model. A field that would change the answer and is not supported is an error; fields
that do not affect the answer (`user`, `metadata` ...) are accepted and ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, from_json

from viaticum.agents.openai_api.errors import APIError
from viaticum.errors import InputError, UnknownName
from viaticum.generation import MAX_BIASES, Bias, GenerationSettings
from viaticum.money import nanousd
from viaticum.types import Message

MAX_CHOICES = 16
MAX_TOP_K = 1_000_000
MAX_FIELDS = 5_000  # of one object, such as OpenAI's limit of all properties of a schema
TokenKey = Annotated[str, Field(pattern=r"^\d{1,9}$")]
DEFAULT_TOP_P = 1.0


class _Form(BaseModel):
    """A model whose lists are validated up to the first wrong element: a million of them hold nobody up."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        parts: list[Any] = [schema]
        while parts:
            part = parts.pop()
            if isinstance(part, dict):
                if part.get("type") == "list":
                    part["fail_fast"] = True
                parts += part.values()
            elif isinstance(part, list | tuple):
                parts += part
        return schema


class _StrictModel(_Form):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Form):
    """A part of a message. Only text: images and audio are not supported."""

    model_config = ConfigDict(extra="ignore", strict=True)
    type: Literal["text"]
    text: str


class ThoughtPart(_Form):
    """A thought among the parts of an assistant's earlier message. It is not sent to a model again."""

    model_config = ConfigDict(extra="ignore", strict=True)
    type: Literal["thinking", "reasoning"]


class ChatMessage(_Form):
    """One message. `content` may be missing only where `tool_calls` or `reasoning_content` are given.

    `reasoning_content`, and `reasoning` as other servers call it, are accepted and not sent to a model again.
    """

    model_config = ConfigDict(extra="ignore", strict=True)
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart | ThoughtPart], Field(min_length=1)] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class StreamOptions(_StrictModel):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ChatRequest(_StrictModel):
    """The body of POST /v1/chat/completions: OpenAI's fields, and `budget` and `policy`."""

    model: str = Field(
        min_length=1, max_length=200, description="auto, a model of the catalogue, or model+strategy."
    )
    messages: list[ChatMessage] = Field(min_length=1, max_length=4096)
    max_tokens: int | None = Field(None, ge=1, le=10_000_000)
    max_completion_tokens: int | None = Field(None, ge=1, le=10_000_000)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
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
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[dict[TokenKey, Bias], Field(max_length=MAX_BIASES)] | None = Field(
        None, description="By token id, of the model that writes; -100 bans a token, 100 bans all others."
    )
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = Field(None, min_length=1, max_length=100)
    response_format: dict[str, Any] | None = None
    # As vLLM and llama.cpp call them.
    top_k: int | None = Field(None, ge=0, le=MAX_TOP_K)
    min_p: float | None = Field(None, ge=0, lt=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    budget: Annotated[float, Field(gt=0)] | str | None = Field(
        None, description="Upper limit of the cost of this request in dollars, all its calls together."
    )
    policy: str | None = Field(
        None, max_length=100, description="within:DISTANCE, best, cheapest:ACCURACY or weighted:PER_DOLLAR."
    )
    # Accepted and ignored.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    verbosity: str | None = None

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def stop_sequences(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def limit_nanousd(self) -> int | None:
        """The request's own budget in nano-dollars. Raises `InputError` if it is not above zero."""
        if self.budget is None:
            return None
        limit = nanousd(self.budget)
        if limit <= 0:
            raise InputError(f"a budget is above zero dollars, got {self.budget}")
        return limit

    def to_settings(self) -> GenerationSettings:
        """How the request's calls are generated; what it leaves out is the strategy's or the entry's."""
        return GenerationSettings.of(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=self.logit_bias,
            seed=self.seed,
            stop=self.stop_sequences,
            reasoning_effort=self.reasoning_effort,
        )

    def to_extra(self) -> dict[str, Any]:
        """Parameters of one named model: logprobs, and of a remote one tools and the form of the answer."""
        extra = {
            name: value
            for name in ("tools", "tool_choice", "parallel_tool_calls", "response_format")
            if (value := getattr(self, name)) is not None
        }
        if self.logprobs:
            extra |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        if extra.get("response_format") == {"type": "text"}:
            del extra["response_format"]  # the default
        return extra

    def to_messages(self) -> list[Message]:
        """The messages as models take them. Raises `InputError` for a message without content."""
        return [_to_message(index, message) for index, message in enumerate(self.messages)]


def parse_request(body: bytes) -> ChatRequest:
    """Parse a JSON body. Raises `APIError` with status 400, naming the first field that is wrong.

    Takes up to a tenth of a second for a megabyte: not for the event loop's thread.
    """
    try:
        _check_objects(body)
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _invalid_request(error) from None
    if request.top_logprobs and not request.logprobs:
        raise APIError(400, "top_logprobs goes with logprobs: true", param="top_logprobs")
    if request.stream_options is not None and not request.stream:
        raise APIError(400, "stream_options goes with stream: true", param="stream_options")
    return request


def _check_objects(body: bytes) -> None:
    """Raise `APIError` for an object of so many fields that the errors in them would hold everybody up."""
    if body.count(b":") <= MAX_FIELDS:
        return
    try:
        values: list[Any] = [from_json(body)]
    except ValueError:
        return  # no JSON: the model says where
    while values:
        value = values.pop()
        if isinstance(value, dict):
            if len(value) > MAX_FIELDS:
                raise APIError(400, f"an object with {len(value)} fields; give at most {MAX_FIELDS}")
            values += value.values()
        elif isinstance(value, list):
            values += value


def _invalid_request(error: ValidationError) -> APIError:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    message = f"{field}: {first['msg']}" if field else first["msg"]
    if first["type"] == "extra_forbidden":
        message = str(UnknownName("field", field, ChatRequest.model_fields))
    return APIError(400, message, param=field or None)


def _to_message(index: int, message: ChatMessage) -> Message:
    text = message.content
    if isinstance(text, list):
        if message.role != "assistant" and any(isinstance(part, ThoughtPart) for part in text):
            raise InputError(f"messages.{index}: only an assistant's message has thoughts; send text")
        text = "".join(part.text for part in text if isinstance(part, TextPart))
    if text is None and not (message.tool_calls or message.reasoning_content or message.reasoning):
        raise InputError(f"messages.{index}: no content; write what the {message.role} says")
    role = "system" if message.role == "developer" else message.role
    fields: dict[str, Any] = {"role": role, "content": text or ""}
    for name in ("name", "tool_calls", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            fields[name] = value
    return fields  # type: ignore[return-value]
