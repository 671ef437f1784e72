"""The parts of a message, by type: those whose tokens are in their own text, and those without a bound.

Needs no LangChain, so that calls of any client can be checked by it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

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


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def check_parts(parts: Any) -> None:
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
                check_parts(inside)
            elif isinstance(inside, Mapping) and "type" in inside:
                check_parts([inside])


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
        check_parts(source["content"])
    elif source.get("type") != "text":
        raise no_bound("document")


def no_bound(kind: Any) -> InputError:
    """The error for a part whose tokens are not known before the call."""
    return InputError(
        f"a part of type {kind!r} cannot be budgeted: its tokens are not known before; send text only"
    )
