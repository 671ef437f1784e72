"""Requests of Anthropic's messages API: the pydantic models that parse and validate a body.

As for OpenAI's: a field that would change the answer and is not supported is an error; fields that do not
affect it (`metadata`, `service_tier` ...) are accepted and ignored, and so is null for any field. Hints
(cache marks, efforts of thought) are left out for a model that cannot heed them, as Anthropic's own API does.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from viaticum.agents.anthropic_api.blocks import Block, TextBlock
from viaticum.agents.anthropic_api.messages import mark_for_cache, to_messages
from viaticum.agents.openai_api.errors import APIError
from viaticum.agents.openai_api.parsing import Form, StrictForm, parse_body
from viaticum.agents.openai_api.requests import CacheControl, RoutedRequest
from viaticum.errors import InputError
from viaticum.generation import GenerationSettings
from viaticum.types import Message

THREAD_UNSUPPORTED = "thread_unsupported_request"  # at which the SDK goes on without threads
_KEPT = "clear_thinking"  # edits of a context that are made anyway: no thought is sent again


class Turn(Form):
    """One message. Turns of the same role in a row are one turn."""

    model_config = ConfigDict(extra="ignore", strict=True)
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class Tool(Form):
    """A tool of the client. Tools that run at Anthropic have other types, and are refused."""

    model_config = ConfigDict(extra="ignore", strict=True)
    name: Annotated[str, Field(min_length=1)]
    input_schema: dict[str, Any] | None = None
    description: str | None = None
    type: str | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None


class ToolChoice(Form):
    model_config = ConfigDict(extra="ignore", strict=True)
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Form):
    """How long to think. display omitted: the thought is not shown."""

    model_config = ConfigDict(extra="ignore", strict=True)
    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: int | None = Field(None, ge=1, le=10_000_000)
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Form):
    model_config = ConfigDict(extra="ignore", strict=True)
    type: Literal["json_schema"]
    form: dict[str, Any] = Field(alias="schema")


class OutputConfig(StrictForm):
    effort: str | None = Field(None, min_length=1, max_length=100)
    format: OutputFormat | None = None


class ContextEdit(Form):
    model_config = ConfigDict(extra="ignore", strict=True)
    type: str


class ContextManagement(StrictForm):
    edits: list[ContextEdit] | None = None


class CountRequest(StrictForm):
    """The body of POST /v1/messages/count_tokens: what a prompt is made of."""

    model: str = Field(
        min_length=1, max_length=200, description="auto, a model of the catalogue, or model+strategy."
    )
    messages: list[Turn] = Field(min_length=1, max_length=4096)
    system: str | list[TextBlock] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    cache_control: CacheControl | None = None
    context_management: ContextManagement | None = None
    thread: dict[str, Any] | None = Field(
        None, description="No conversation is kept here: refused, so that the SDK sends all of it each time."
    )
    # Accepted and ignored.
    metadata: dict[str, Any] | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    speed: Literal["standard"] | None = None

    @property
    def is_lenient(self) -> bool:
        return True

    def to_messages(self) -> list[Message]:
        """The messages as models take them. Raises `InputError` for a turn that cannot be sent."""
        messages = to_messages(self.system, ((turn.role, turn.content) for turn in self.messages))
        if not messages:
            raise InputError("messages: nothing that a model reads; send a turn with text")
        if self.cache_control is not None:
            mark_for_cache(messages[-1], self.cache_control)
        return messages

    def to_extra(self) -> dict[str, Any]:
        """Tools and the form of the answer, by OpenAI's names."""
        extra: dict[str, Any] = {}
        if self.tools:
            extra["tools"] = [_tool(index, tool) for index, tool in enumerate(self.tools)]
            if self.tool_choice is not None:
                extra |= _tool_choice(self.tool_choice)
        form = self.output_format or (self.output_config and self.output_config.format)
        if form:
            schema = {"name": "answer", "schema": form.form, "strict": True}
            extra["response_format"] = {"type": "json_schema", "json_schema": schema}
        return extra


class MessagesRequest(CountRequest, RoutedRequest):
    """The body of POST /v1/messages: Anthropic's fields, and `budget`, `policy` and `only`."""

    max_tokens: int | None = Field(None, ge=1, le=10_000_000)
    stop_sequences: list[str] | None = Field(None, max_length=8191)
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1_000_000)

    @property
    def n(self) -> int:
        return 1

    @property
    def shows_thinking(self) -> bool:
        """Whether the client asked to see thoughts; one that did not may not expect them."""
        return self.thinking is not None and (
            self.thinking.type != "disabled" and self.thinking.display != "omitted"
        )

    def to_settings(self) -> GenerationSettings:
        """How the request's calls are generated; what it leaves out is the strategy's or the entry's."""
        thinking = self.thinking
        budget = 0 if thinking and thinking.type == "disabled" else thinking and thinking.budget_tokens
        return GenerationSettings.of(
            max_new_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=None if self.top_k is None else max(0, self.top_k),
            stop=tuple(stop for stop in self.stop_sequences or () if stop),
            thinking_budget=budget,
            reasoning_effort=self.output_config and self.output_config.effort,
        )


def parse_messages(body: bytes) -> MessagesRequest:
    """Parse a body. Raises `APIError` with status 400. Not for the event loop's thread."""
    request = parse_body(MessagesRequest, body)
    _check(request)
    return request


def parse_count(body: bytes) -> CountRequest:
    """Parse a body. Raises `APIError` with status 400. Not for the event loop's thread."""
    request = parse_body(CountRequest, body)
    _check(request)
    return request


def _check(request: CountRequest) -> None:
    if request.thread is not None:
        raise APIError(400, "thread: send the whole conversation", code=THREAD_UNSUPPORTED, param="thread")
    choice = request.tool_choice
    if choice is not None and choice.type in ("any", "tool") and not request.tools:
        raise APIError(400, "tool_choice: it goes with tools", param="tool_choice")
    if choice is not None and choice.type == "tool" and not choice.name:
        raise APIError(400, "tool_choice: name the tool", param="tool_choice.name")
    edits = (request.context_management and request.context_management.edits) or ()
    for index, edit in enumerate(edits):
        if not edit.type.startswith(_KEPT):
            field = f"context_management.edits.{index}"
            raise APIError(400, f"{field}: {edit.type!r} is not done here; shorten the messages", param=field)


def _tool(index: int, tool: Tool) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        raise InputError(
            f"tools.{index}: a tool of type {tool.type!r} is known to Anthropic's models alone; give a tool "
            "with an input_schema"
        )
    if tool.input_schema is None:
        raise InputError(f"tools.{index}: no input_schema; write which arguments {tool.name} takes")
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict is not None:
        function["strict"] = tool.strict
    made: dict[str, Any] = {"type": "function", "function": function}
    if tool.cache_control is not None:
        made["cache_control"] = tool.cache_control.model_dump(exclude_none=True)
    return made


def _tool_choice(choice: ToolChoice) -> dict[str, Any]:
    names: dict[str, Any] = {"auto": "auto", "any": "required", "none": "none"}
    chosen = names.get(choice.type) or {"type": "function", "function": {"name": choice.name}}
    extra = {} if chosen == "auto" else {"tool_choice": chosen}
    return extra | ({"parallel_tool_calls": False} if choice.disable_parallel_tool_use else {})
