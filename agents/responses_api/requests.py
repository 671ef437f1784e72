"""Requests of the Responses API: the pydantic models that parse and validate a body.

As for chat completions: a field that would change the answer and is not supported is an error; fields that do
not affect it (`user`, `metadata` ...) are accepted, and so is null for any field.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PrivateAttr

from viaticum.agents.openai_api.errors import APIError
from viaticum.agents.openai_api.parsing import Form, StrictForm, parse_body
from viaticum.agents.openai_api.requests import RoutedRequest
from viaticum.agents.responses_api.items import Item, to_messages
from viaticum.errors import InputError
from viaticum.generation import GenerationSettings
from viaticum.types import Message

LOGPROBS = "message.output_text.logprobs"  # what `include` asks for where it wants log-probabilities


class FunctionTool(Form):
    """A function of the client. Tools that run at OpenAI have other types, and are refused."""

    model_config = ConfigDict(extra="ignore", strict=True)
    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ReasoningConfig(StrictForm):
    effort: str | None = Field(None, min_length=1, max_length=100)
    summary: str | None = None
    generate_summary: str | None = None


class TextFormat(Form):
    model_config = ConfigDict(extra="ignore", strict=True)
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    form: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextConfig(StrictForm):
    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponseStreamOptions(StrictForm):
    include_obfuscation: bool | None = None


class ResponseRequest(RoutedRequest):
    """The body of POST /v1/responses: OpenAI's fields, and `budget`, `policy` and `only`."""

    model: str = Field(
        min_length=1, max_length=200, description="auto, a model of the catalogue, or model+strategy."
    )
    input: Annotated[str, Field(min_length=1)] | Annotated[list[Item], Field(min_length=1, max_length=4096)]
    instructions: str | None = None
    previous_response_id: str | None = Field(None, min_length=1, max_length=100)
    store: bool | None = Field(None, description="Keep the conversation for previous_response_id.")
    max_output_tokens: int | None = Field(None, ge=1, le=10_000_000)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningConfig | None = None
    text: TextConfig | None = None
    include: list[str] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    service_tier: Literal["auto", "default", "flex"] | None = Field(
        None, description="No dearer one: the worst case of a call is held at the prices of the catalogue."
    )
    metadata: dict[str, Any] | None = None
    # Accepted and ignored.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    max_tool_calls: int | None = None

    _earlier: tuple[Message, ...] = PrivateAttr(default=())

    @property
    def n(self) -> int:
        return 1

    @property
    def is_lenient(self) -> bool:
        return False

    @property
    def is_stored(self) -> bool:
        """Whether the response is kept, which is the default of OpenAI's API."""
        return self.store is not False

    @property
    def earlier(self) -> tuple[Message, ...]:
        """The messages before this request."""
        return self._earlier

    def continued(self, earlier: tuple[Message, ...]) -> ResponseRequest:
        """This request after a conversation, without the instructions that were given in it."""
        self._earlier = earlier
        return self

    def conversation(self) -> list[Message]:
        """All messages but the instructions, which hold for this response alone."""
        if isinstance(self.input, str):
            return [*self._earlier, {"role": "user", "content": self.input}]
        return to_messages(self.input, self._earlier)

    def to_messages(self) -> list[Message]:
        """The messages as models take them. Raises `InputError` for an item that cannot be sent."""
        instructions: list[Message] = []
        if self.instructions:
            instructions = [{"role": "system", "content": self.instructions}]
        messages = [*instructions, *self.conversation()]
        if not messages:
            raise InputError("input: nothing that a model reads; write a message")
        return messages

    def to_settings(self) -> GenerationSettings:
        """How the request's calls are generated; what it leaves out is the strategy's or the entry's."""
        return GenerationSettings.of(
            max_new_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            reasoning_effort=self.reasoning and self.reasoning.effort,
        )

    def to_extra(self) -> dict[str, Any]:
        """Tools, the form of the answer, and the like, by the names of chat completions."""
        extra: dict[str, Any] = {}
        if self.tools:
            chosen, allowed = _tool_choice(self.tool_choice)
            tools = [_tool(index, tool) for index, tool in enumerate(self.tools)]
            extra["tools"] = [
                tool for tool in tools if allowed is None or tool["function"]["name"] in allowed
            ]
            if chosen not in (None, "auto"):
                extra["tool_choice"] = chosen
            if self.parallel_tool_calls is not None:
                extra["parallel_tool_calls"] = self.parallel_tool_calls
        if self.text is not None and self.text.format is not None and self.text.format.type != "text":
            extra["response_format"] = _response_format(self.text.format)
        if self.text is not None and self.text.verbosity not in (None, "medium"):
            extra["verbosity"] = self.text.verbosity
        if self.service_tier not in (None, "auto"):
            extra["service_tier"] = self.service_tier
        if self.top_logprobs or LOGPROBS in (self.include or ()):
            extra |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        return extra


def parse_response_request(body: bytes) -> ResponseRequest:
    """Parse a body. Raises `APIError` with status 400. Not for the event loop's thread."""
    request = parse_body(ResponseRequest, body)
    if not request.tools and request.tool_choice not in (None, "none", "auto"):
        raise APIError(400, "tool_choice: it goes with tools", param="tool_choice")
    form = request.text and request.text.format
    if form and form.type == "json_schema" and form.form is None:
        raise APIError(400, "text.format.schema: Field required", param="text.format.schema")
    return request


def _tool(index: int, tool: FunctionTool) -> dict[str, Any]:
    if tool.type != "function":
        raise InputError(f"tools.{index}: a tool of type {tool.type!r} runs at OpenAI; give functions")
    if not tool.name:
        raise InputError(f"tools.{index}: a function without a name; write one")
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.parameters or {"type": "object"}}
    for name in ("description", "strict"):
        if (value := getattr(tool, name)) is not None:
            function[name] = value
    return {"type": "function", "function": function}


def _tool_choice(choice: str | dict[str, Any] | None) -> tuple[Any, set[str] | None]:
    """The choice by the names of chat completions, and the names of tools that are left; None for all."""
    if not isinstance(choice, dict):
        return choice, None
    if choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}, None
    if choice.get("type") == "allowed_tools":
        names = {str(each.get("name")) for each in choice.get("tools") or () if isinstance(each, dict)}
        return choice.get("mode"), names
    raise InputError(f"tool_choice of type {choice.get('type')!r} is not taken; name a function")


def _response_format(form: TextFormat) -> dict[str, Any]:
    if form.type == "json_object":
        return {"type": "json_object"}
    schema = {"name": form.name or "answer", "schema": form.form}
    for name in ("description", "strict"):
        if (value := getattr(form, name)) is not None:
            schema[name] = value
    return {"type": "json_schema", "json_schema": schema}
