"""What a chat model of LangChain sends of a request, as texts to count, part by part.

An integration sends its messages as they are, with thoughts, signatures, results of the provider's own tools
and whatever stands beside the content. All of it is counted by its type; what has no bound before the call
(images, sound, files, what a provider kept itself) is refused by name.

Leaves out the conversion of messages for our own models (`agents.integrations.langchain_messages`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, RemoveMessage, ToolMessage

from viaticum.errors import InputError

# Parts whose tokens are in their own text: LangChain's, Anthropic's, OpenAI's two APIs', Google's, Bedrock's.
TEXTUAL = frozenset(
    (
        "text",
        "input_text",
        "output_text",
        "text-plain",
        "refusal",
        "thinking",
        "redacted_thinking",
        "reasoning",
        "reasoning_content",
        "tool_use",
        "tool_call",
        "tool_call_chunk",
        "invalid_tool_call",
        "function_call",
        "function_call_output",
        "custom_tool_call",
        "custom_tool_call_output",
        "tool_result",
        "server_tool_use",
        "server_tool_call",
        "server_tool_call_chunk",
        "server_tool_result",
        "web_search_call",
        "web_search_tool_result",
        "web_search_result",
        "web_fetch_tool_result",
        "web_fetch_result",
        "file_search_call",
        "code_interpreter_call",
        "code_execution_tool_result",
        "code_execution_result",
        "code_execution_output",
        "bash_code_execution_tool_result",
        "bash_code_execution_result",
        "bash_code_execution_output",
        "executable_code",
        "mcp_call",
        "mcp_list_tools",
        "mcp_approval_request",
        "mcp_approval_response",
        "mcp_tool_use",
        "mcp_tool_result",
        "search_result",
        "citation",
        "non_standard",
    )
)
_UNTYPED = frozenset(
    ("text", "cachePoint", "cache_control", "reasoningContent", "json")
)  # as Bedrock's parts
_TEXTUAL_NAMES = re.compile(r"\w+_tool_result_error|text_editor_code_execution_\w+")
_INSIDE = ("content", "output", "value")  # where parts stand in parts


def sent_texts(messages: Iterable[BaseMessage]) -> Iterator[tuple[str, int]]:
    """Yield the JSON of each message, and the least tokens that it has.

    A thought that the provider keeps and a message only refers to (Responses API) has no more tokens than the
    provider counted for the answer that it was made for.

    Raises:
        InputError: a part has no bound; the message names its type.
    """
    for message in messages:
        if isinstance(message, RemoveMessage):
            raise InputError("not a message for a model: RemoveMessage")
        content = message.content if isinstance(message.content, list) else [message.content]
        _check_parts(content)
        if "audio" in message.additional_kwargs:
            raise no_bound("audio")
        fields: dict[str, Any] = {"role": message.type, "name": message.name, "content": message.content}
        if message.additional_kwargs:
            fields["additional"] = message.additional_kwargs
        if isinstance(message, AIMessage):
            inside = {part.get("id") for part in content if isinstance(part, Mapping)}
            fields["tool_calls"] = [call for call in message.tool_calls if call["id"] not in inside]
            fields["invalid_tool_calls"] = message.invalid_tool_calls
        if isinstance(message, ToolMessage):
            fields["tool_call_id"] = message.tool_call_id
        yield (
            as_json({name: value for name, value in fields.items() if value}),
            _kept_tokens(message, content),
        )


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _check_parts(parts: Any) -> None:
    for part in parts:
        if not isinstance(part, Mapping):
            continue
        kind = part.get("type")
        if kind == "document":
            _check_document(part)
        elif kind is None:
            if unknown := part.keys() - _UNTYPED:
                raise no_bound(", ".join(sorted(map(str, unknown))))
        elif not _is_textual(part):
            raise no_bound(kind)
        for name in _INSIDE if kind != "document" else ():
            inside = part.get(name)
            if isinstance(inside, list):
                _check_parts(inside)
            elif isinstance(inside, Mapping) and "type" in inside:
                _check_parts([inside])


def _is_textual(part: Mapping[str, Any]) -> bool:
    kind = str(part["type"])
    if kind == "text-plain":
        return isinstance(part.get("text"), str)
    return kind in TEXTUAL or _TEXTUAL_NAMES.fullmatch(kind) is not None


def _check_document(part: Mapping[str, Any]) -> None:
    """A document of text is text; one of a file, an address or an id has no bound."""
    source = part.get("source")
    source = source if isinstance(source, Mapping) else {}
    if source.get("type") == "content" and isinstance(source.get("content"), list):
        _check_parts(source["content"])
    elif source.get("type") != "text":
        raise no_bound("document")


def no_bound(kind: Any) -> InputError:
    """The error for a part whose tokens are not known before the call."""
    return InputError(
        f"a part of type {kind!r} cannot be budgeted: its tokens are not known before; send text only"
    )


def _kept_tokens(message: BaseMessage, content: Sequence[Any]) -> int:
    kept = [
        part
        for part in (*content, message.additional_kwargs.get("reasoning"))
        if isinstance(part, Mapping)
        and part.get("type") == "reasoning"
        and str(part.get("id") or "").startswith("rs_")
        and not part.get("encrypted_content")
    ]
    if not kept:
        return 0
    usage = message.usage_metadata if isinstance(message, AIMessage) else None
    if usage is None:
        raise InputError(
            f"the thought {kept[0]['id']} lies with the provider, and the message does not say how many "
            "tokens it has; keep the message's usage_metadata, or ask for encrypted_content"
        )
    return max(0, usage["output_tokens"])
