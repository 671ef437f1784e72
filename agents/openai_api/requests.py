"""Requests of OpenAI's chat completions API: the pydantic models that parse and validate a body.

Pure data: no server, no model. A field that would change the answer and is not supported is an error; fields
that do not affect the answer (`user`, `metadata` ...) are accepted and ignored, and so is null for any field.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from viaticum.agents.openai_api.errors import APIError
from viaticum.agents.openai_api.parsing import Form, StrictForm, parse_body
from viaticum.errors import InputError
from viaticum.generation import MAX_BIASES, Bias, GenerationSettings
from viaticum.money import budget_nanousd
from viaticum.types import Message

MAX_CHOICES = 16
MAX_TOP_K = 1_000_000
TokenKey = Annotated[str, Field(pattern=r"^\d{1,9}$")]
# Parameters that go to one named model as they are, and their values that ask for nothing.
_EXTRA = ("tools", "tool_choice", "parallel_tool_calls", "response_format", "service_tier", "verbosity")
_DEFAULTS = {"response_format": {"type": "text"}, "service_tier": "auto", "verbosity": "medium"}


class CacheControl(Form):
    """A mark after which the provider keeps the prompt in its cache, as Anthropic has them."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextPart(Form):
    """A part of a message."""

    model_config = ConfigDict(extra="ignore", strict=True)
    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None


class ImageUrl(Form):
    """Where an image is: an address that the provider fetches, or a data: URL with the image itself."""

    model_config = ConfigDict(extra="ignore", strict=True)
    url: Annotated[str, Field(min_length=1)]
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Form):
    """An image of a user's message, for models whose entries state how many tokens one has at most."""

    model_config = ConfigDict(extra="ignore", strict=True)
    type: Literal["image_url"]
    image_url: ImageUrl


class RefusalPart(Form):
    """A refusal among the parts of an assistant's earlier message."""

    model_config = ConfigDict(extra="ignore", strict=True)
    type: Literal["refusal"]
    refusal: str


class ThoughtPart(Form):
    """A thought among the parts of an assistant's earlier message. It is not sent to a model again."""

    model_config = ConfigDict(extra="ignore", strict=True)
    type: Literal["thinking", "reasoning", "redacted_thinking"]


Part = Annotated[TextPart | ImagePart | RefusalPart | ThoughtPart, Field(discriminator="type")]


class FunctionCall(Form):
    """A call of an assistant's earlier message, as it was written before there were `tool_calls`."""

    model_config = ConfigDict(extra="ignore", strict=True)
    name: str
    arguments: str


class ChatMessage(Form):
    """One message. Only an assistant's may have no `content`.

    `reasoning_content`, and `reasoning` as other servers call it, are accepted and not sent to a model again.
    """

    model_config = ConfigDict(extra="ignore", strict=True)
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[Part], Field(min_length=1)] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    function_call: FunctionCall | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    cache_control: CacheControl | None = None
    audio: None = Field(None, description="No model here reads or writes sound.")


class StreamOptions(StrictForm):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class RequestLimits(StrictForm):
    """Fields of our own, of each API: what a request may cost, and where its data may go."""

    budget: Annotated[float, Field(gt=0)] | str | None = Field(
        None, description="Upper limit of the cost of this request in dollars, all its calls together."
    )
    only: (
        Annotated[str, Field(min_length=1, max_length=200)]
        | Annotated[
            list[Annotated[str, Field(min_length=1, max_length=200)]], Field(min_length=1, max_length=16)
        ]
        | None
    ) = Field(
        None,
        description="Labels of models, one of which a model has to have: local, or a region or a tag of its "
        "entry. Beside what the key allows.",
    )

    @property
    def limit_nanousd(self) -> int | None:
        """The request's own budget in nano-dollars. Raises `InputError` if it is not above zero."""
        if self.budget is None:
            return None
        return budget_nanousd(self.budget)


class RoutedRequest(RequestLimits):
    """The fields of our own where a model is chosen."""

    policy: str | None = Field(
        None,
        max_length=100,
        description="within:DISTANCE, best, cheapest:ACCURACY, fastest:ACCURACY or weighted:PER_DOLLAR.",
    )
    max_seconds: float | None = Field(
        None, ge=1, le=86_400, description="Seconds that this request may take, its wait for a slot included."
    )
    session: str | None = Field(
        None,
        min_length=1,
        max_length=200,
        description="Of auto: a name of the conversation, which keeps its model while that is worth it. Also "
        "the header x-viaticum-session.",
    )


class ChatRequest(RoutedRequest):
    """The body of POST /v1/chat/completions: OpenAI's fields, and those of our own."""

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
    modalities: list[Literal["text"]] | None = None
    service_tier: Literal["auto", "default", "flex"] | None = Field(
        None, description="No dearer one: the worst case of a call is held at the prices of the catalogue."
    )
    verbosity: Literal["low", "medium", "high"] | None = None
    # As vLLM and llama.cpp call them.
    top_k: int | None = Field(None, ge=-1, le=MAX_TOP_K, description="-1 and 0 limit nothing.")
    min_p: float | None = Field(None, ge=0, lt=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    # Accepted and ignored.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def is_lenient(self) -> bool:
        return False

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def stop_sequences(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def to_settings(self) -> GenerationSettings:
        """How the request's calls are generated; what it leaves out is the strategy's or the entry's."""
        return GenerationSettings.of(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=None if self.top_k is None else max(0, self.top_k),
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
        """Parameters of one named model: logprobs, and of a remote one tools and the form of the answer.

        What says only what is the default anyway is left out.
        """
        extra = {name: value for name in _EXTRA if (value := getattr(self, name)) is not None}
        if not self.tools:
            for name in ("tools", "tool_choice", "parallel_tool_calls"):
                extra.pop(name, None)
        if self.logprobs:
            extra |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        return {name: value for name, value in extra.items() if value != _DEFAULTS.get(name)}

    def to_messages(self) -> list[Message]:
        """The messages as models take them. Raises `InputError` for a message without content."""
        call_ids: list[str] = []
        return [_to_message(index, message, call_ids) for index, message in enumerate(self.messages)]


def parse_request(body: bytes) -> ChatRequest:
    """Parse a JSON body. Raises `APIError` with status 400, naming the first field that is wrong.

    Takes up to a tenth of a second for a megabyte: not for the event loop's thread.
    """
    request = parse_body(ChatRequest, body)
    if request.top_logprobs and not request.logprobs:
        raise APIError(400, "top_logprobs goes with logprobs: true", param="top_logprobs")
    if request.stream_options is not None and not request.stream:
        raise APIError(400, "stream_options goes with stream: true", param="stream_options")
    if not request.tools and request.tool_choice not in (None, "none", "auto"):
        raise APIError(400, "tool_choice goes with tools", param="tool_choice")
    return request


def _to_message(index: int, message: ChatMessage, call_ids: list[str]) -> Message:
    """One message. call_ids: of the function calls so far, whose results name only the function; updated."""
    role: Any = {"developer": "system", "function": "tool"}.get(message.role, message.role)
    fields: dict[str, Any] = {"role": role, "content": _text(index, message)}
    if marked := _marked_parts(message):
        fields["parts"] = marked
    for name in ("name", "tool_calls", "tool_call_id"):
        if value := getattr(message, name):
            fields[name] = value
    if message.function_call is not None:
        call_ids.append(f"call_{index}")
        function = message.function_call.model_dump()
        fields["tool_calls"] = [{"id": call_ids[-1], "type": "function", "function": function}]
    if message.role == "function":
        if not call_ids:
            raise InputError(f"messages.{index}: the result of a function that no message before it calls")
        fields["tool_call_id"] = call_ids[-1]
    return fields  # type: ignore[return-value]


def _text(index: int, message: ChatMessage) -> str:
    text, is_assistant = message.content, message.role == "assistant"
    if isinstance(text, list):
        if message.role != "user" and any(isinstance(part, ImagePart) for part in text):
            raise InputError(f"messages.{index}: only a user's message has images")
        if not is_assistant and not all(isinstance(part, TextPart | ImagePart) for part in text):
            raise InputError(f"messages.{index}: only an assistant's message has thoughts; send text")
        texts = (part.text if isinstance(part, TextPart) else getattr(part, "refusal", "") for part in text)
        text = "".join(texts)
    if text is None and not is_assistant:
        raise InputError(f"messages.{index}: no content; write what the {message.role} says")
    return (text or "") + (message.refusal or "")


def _marked_parts(message: ChatMessage) -> list[dict[str, Any]]:
    """The parts of a message with an image, or a mark for the provider's cache; else none."""
    parts: Any = message.content if isinstance(message.content, list) else ()
    marked: list[dict[str, Any]] = [
        part.model_dump(exclude_none=True) for part in parts if isinstance(part, TextPart | ImagePart)
    ]
    if message.cache_control is not None:
        marked = marked or [{"type": "text", "text": message.content or ""}]
        marked[-1]["cache_control"] = message.cache_control.model_dump(exclude_none=True)
    is_kept = any("cache_control" in part or part["type"] == "image_url" for part in marked)
    return marked if is_kept else []
