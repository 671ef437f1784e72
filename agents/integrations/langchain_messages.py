"""Conversion of LangChain's messages to `Message`, and of completions to LangChain's chunks.

Text, and images of the user, for models whose entries bound their tokens. Of sound and files the cost is not
known before they are sent, so nothing could be reserved for them. Leaves out what other chat models send
(`agents.integrations.sent_messages`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.messages.ai import InputTokenDetails, OutputTokenDetails, UsageMetadata
from langchain_core.messages.tool import tool_call_chunk

from viaticum.agents.instrumentation.sent_parts import TEXTUAL, no_bound
from viaticum.errors import InputError
from viaticum.types import ROLES, Message, Query, Usage
from viaticum.valid_text import valid_json, valid_text

# Parts of an assistant's message with a text; its other parts that are text are converted elsewhere (tool
# calls), or are thoughts and the provider's own calls, which are not sent to another model.
_TEXTS = {"text": "text", "output_text": "text", "input_text": "text", "refusal": "refusal"}


def from_langchain(messages: Sequence[BaseMessage]) -> list[Message]:
    """Convert messages. Raises `InputError` for a part of one that is neither text nor an image of the user.

    Halves of characters are replaced: results of tools, which nobody reads before they are sent, have them.
    """
    return [valid_json(_message(message)) for message in messages]


def query_from_langchain(messages: Sequence[BaseMessage], *, text_only: bool = True) -> Query:
    """The last message of the user as a question, after the conversation before it.

    text_only: refuse parts that are no text. Else they are left out, and named where a turn has no text: what
    only chooses a model need not read them.
    """
    indices = [index for index, message in enumerate(messages) if isinstance(message, HumanMessage)]
    if not indices:
        raise InputError("no user turn among the messages; add a HumanMessage")
    if not text_only:
        messages = [_text_alone(message) for message in messages]
    before = from_langchain(messages[: indices[-1]])
    kept = tuple(each for each in before if each["role"] in ROLES and each["content"])
    return Query(valid_text(_text(messages[indices[-1]])), messages=kept)


def final_chunk(
    usage: Usage, metadata: Mapping[str, Any], tool_calls: Sequence[Mapping[str, Any]] = ()
) -> AIMessageChunk:
    """The last chunk of a message: its tool calls, usage and metadata, without text."""
    chunks = [
        tool_call_chunk(
            name=call["function"]["name"], args=call["function"]["arguments"], id=call["id"], index=index
        )
        for index, call in enumerate(tool_calls)
    ]
    return AIMessageChunk(
        content="",
        tool_call_chunks=chunks,
        usage_metadata=usage_metadata(usage),
        response_metadata=dict(metadata),
        chunk_position="last",
    )


def thinking_chunk(text: str) -> AIMessageChunk:
    """A piece of a thought; the message's `content_blocks` then begin with a block of reasoning."""
    return AIMessageChunk(content="", additional_kwargs={"reasoning_content": text})


def usage_metadata(usage: Usage) -> UsageMetadata:
    """The sum of the tokens of all models of a call."""
    counts = usage.models.values()
    read = InputTokenDetails(cache_read=sum(count.cached_input_tokens for count in counts))
    if written := sum(count.cache_write_tokens for count in counts):
        read["cache_creation"] = written
    return UsageMetadata(
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        total_tokens=usage.input_tokens + usage.output_tokens,
        input_token_details=read,
        output_token_details=OutputTokenDetails(reasoning=sum(count.reasoning_tokens for count in counts)),
    )


def _message(message: BaseMessage) -> Message:
    content = _text(message)
    if isinstance(message, SystemMessage):
        converted = Message(role="system", content=content)
    elif isinstance(message, HumanMessage):
        converted = Message(role="user", content=content)
    elif isinstance(message, ToolMessage):
        converted = Message(role="tool", content=content, tool_call_id=message.tool_call_id)
    elif isinstance(message, AIMessage):
        converted = Message(role="assistant", content=content)
        if calls := _tool_calls(message):
            converted["tool_calls"] = calls
    elif isinstance(message, ChatMessage) and message.role in ROLES:
        converted = Message(role=message.role, content=content)  # type: ignore[typeddict-item]
    else:
        raise InputError(
            f"not a message for a model: {type(message).__name__}; use system, human, AI or tool messages"
        )
    if marked := _marked_parts(message):
        converted["parts"] = marked
    if message.name and not isinstance(message, ToolMessage):
        converted["name"] = message.name
    return converted


def _tool_calls(message: AIMessage) -> list[dict[str, Any]]:
    """Tool calls in the form of OpenAI's API; arguments that were not valid JSON are passed on unchanged."""
    calls = [
        (call["id"], call["name"], json.dumps(call["args"], ensure_ascii=False))
        for call in message.tool_calls
    ] + [(call["id"], call["name"] or "", call["args"] or "") for call in message.invalid_tool_calls]
    return [
        {"id": id_ or "", "type": "function", "function": {"name": name, "arguments": arguments}}
        for id_, name, arguments in calls
    ]


def _text(message: BaseMessage) -> str:
    if isinstance(message.content, str):
        return message.content
    return "".join(_part(part, message) for part in message.content)


def _marked_parts(message: BaseMessage) -> list[dict[str, Any]]:
    """The parts of a message with an image, or a mark for the provider's cache; else none."""
    parts: list[dict[str, Any]] = []
    for part in message.content if isinstance(message.content, list) else ():
        mark = part.get("cache_control") if isinstance(part, dict) else None
        if (url := _image_url(part, message)) is not None:
            parts.append({"type": "image_url", "image_url": url})
        elif text := _part(part, message):
            parts.append({"type": "text", "text": text} | ({"cache_control": mark} if mark else {}))
    is_kept = any("cache_control" in part or part["type"] == "image_url" for part in parts)
    return parts if is_kept else []


def _image_url(part: str | dict[Any, Any], message: BaseMessage) -> dict[str, Any] | None:
    """The image of a part of a user's message in OpenAI's form; None for any other part.

    Known are the forms of OpenAI, Anthropic and LangChain. Files that a provider keeps are not read.
    """
    if not isinstance(message, HumanMessage) or not isinstance(part, dict):
        return None
    given = part.get("image_url") if part.get("type") == "image_url" else None
    if isinstance(given, str):
        return {"url": given}
    if isinstance(given, dict) and given.get("url"):
        return {name: given[name] for name in ("url", "detail") if given.get(name)}
    if part.get("type") != "image":
        return None
    source = part["source"] if isinstance(part.get("source"), dict) else part
    data = source.get("base64") or source.get("data")
    kind = source.get("mime_type") or source.get("media_type")
    if data and kind:
        return {"url": f"data:{kind};base64,{data}"}
    return {"url": source["url"]} if source.get("url") else None


def _part(part: str | dict[Any, Any], message: BaseMessage) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type")
    if _image_url(part, message) is not None:
        return ""
    if kind in _TEXTS:
        return str(part.get(_TEXTS[kind], ""))
    if isinstance(message, AIMessage) and kind in TEXTUAL:
        return ""
    raise no_bound(kind)


def _text_alone(message: BaseMessage) -> BaseMessage:
    """The message with its texts alone, or the kinds of its parts where it has no text."""
    if isinstance(message.content, str):
        return message
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in message.content]
    texts = [str(part.get("text", "")) for part in parts if part.get("type") in _TEXTS]
    named = [f"[{part.get('type')}]" for part in parts]
    return message.model_copy(update={"content": "".join(texts) if any(texts) else " ".join(named)})
