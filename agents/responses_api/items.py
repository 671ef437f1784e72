"""Items of the Responses API: the pydantic models that parse them, and the messages that models take.

Calls of functions in a row belong to one turn of the assistant. Thoughts are not sent to a model again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from viaticum.agents.openai_api.parsing import Form
from viaticum.errors import InputError
from viaticum.types import Message

_ITEM = ConfigDict(extra="ignore", strict=True)


class TextContent(Form):
    """A text of a message, given or written."""

    model_config = _ITEM
    type: Literal["input_text", "output_text", "text"]
    text: str


class RefusalContent(Form):
    model_config = _ITEM
    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


class ImageContent(Form):
    """An image by its address or as a data: URL, for models whose entries state how many tokens one has."""

    model_config = _ITEM
    type: Literal["input_image"]
    image_url: Annotated[str, Field(min_length=1)]
    detail: Literal["auto", "low", "high", "original"] | None = None

    @property
    def part(self) -> dict[str, Any]:
        detail = {} if self.detail in (None, "original") else {"detail": self.detail}
        return {"type": "image_url", "image_url": {"url": self.image_url, **detail}}


Content = Annotated[TextContent | RefusalContent | ImageContent, Field(discriminator="type")]


class MessageItem(Form):
    """A message. `type` may be left out."""

    model_config = _ITEM
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Content]


class FunctionCallItem(Form):
    model_config = _ITEM
    type: Literal["function_call"]
    call_id: Annotated[str, Field(min_length=1)]
    name: Annotated[str, Field(min_length=1)]
    arguments: str


class FunctionOutputItem(Form):
    model_config = _ITEM
    type: Literal["function_call_output"]
    call_id: Annotated[str, Field(min_length=1)]
    output: str | list[Content]


class ReasoningItem(Form):
    model_config = _ITEM
    type: Literal["reasoning"]


def _kind(item: Any) -> str:
    return str(item.get("type") or "message") if isinstance(item, dict) else str(getattr(item, "type", ""))


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind),
]


def to_messages(items: Iterable[Any], earlier: Sequence[Message] = ()) -> list[Message]:
    """The messages of a conversation that goes on.

    Args:
        items: the new ones.
        earlier: messages before them. Calls that have an output among the items are there.

    Raises:
        InputError: a message without content, or an output of a call that nobody made.
    """
    messages, images = list(earlier), list[ImageContent]()
    for index, item in enumerate(items):
        if not isinstance(item, FunctionOutputItem) and images:
            messages.append(_message("user", images))  # of functions, whose messages have text alone
            images = []
        if isinstance(item, MessageItem):
            messages.append(_of(index, item))
        elif isinstance(item, FunctionCallItem):
            _add_call(messages, item)
        elif isinstance(item, FunctionOutputItem):
            messages.append(_output(index, item, messages))
            images += [each for each in _contents(item.output) if isinstance(each, ImageContent)]
    return [*messages, _message("user", images)] if images else messages


def _of(index: int, item: MessageItem) -> Message:
    contents = _contents(item.content)
    if item.role != "user" and any(isinstance(each, ImageContent) for each in contents):
        raise InputError(f"input.{index}: only a user's message has images")
    if not contents:
        raise InputError(f"input.{index}: no content; write what the {item.role} says")
    return _message("system" if item.role == "developer" else item.role, contents)


def _add_call(messages: list[Message], item: FunctionCallItem) -> None:
    """Add a call to the assistant's turn at the end, or begin one."""
    function = {"name": item.name, "arguments": item.arguments}
    call = {"id": item.call_id, "type": "function", "function": function}
    if messages and messages[-1]["role"] == "assistant":
        last = messages[-1]
        messages[-1] = {**last, "tool_calls": [*last.get("tool_calls", ()), call]}
    else:
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})


def _output(index: int, item: FunctionOutputItem, messages: Sequence[Message]) -> Message:
    calls = (call["id"] for message in messages for call in message.get("tool_calls", ()))
    if item.call_id not in calls:
        raise InputError(f"input.{index}: no call {item.call_id!r} before its output; send it, too")
    texts = [each for each in _contents(item.output) if not isinstance(each, ImageContent)]
    return {**_message("tool", texts), "tool_call_id": item.call_id}


def _message(role: Any, contents: Sequence[Any]) -> Message:
    """A message of contents; with parts where it has images."""
    texts = [each.text for each in contents if not isinstance(each, ImageContent)]
    message: Message = {"role": role, "content": "".join(texts)}
    if any(isinstance(each, ImageContent) for each in contents):
        message["parts"] = [
            each.part if isinstance(each, ImageContent) else {"type": "text", "text": each.text}
            for each in contents
        ]
    return message


def _contents(content: str | Sequence[Any]) -> list[Any]:
    if isinstance(content, str):
        return [TextContent(type="input_text", text=content)]
    return list(content)
