"""Anthropic's turns as the messages that models take, which are those of OpenAI's chat completions.

A turn of the user becomes a message for each result of a tool, then one for the rest. Images in the results
follow there, since a message of a tool has text alone. Turns of the same role in a row are one turn.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from viaticum.agents.anthropic_api.blocks import (
    Block,
    DocumentBlock,
    ImageBlock,
    SearchResultBlock,
    TextBlock,
    ThoughtBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from viaticum.agents.openai_api.requests import CacheControl
from viaticum.errors import InputError
from viaticum.types import Message

# Claude Code's account of itself, which differs in every request and would spoil every cache of prompts.
_BILLING_HEADER = "x-anthropic-billing-header:"
_READ = (TextBlock, DocumentBlock, SearchResultBlock, ImageBlock)


def to_messages(
    system: str | Sequence[TextBlock] | None, turns: Iterable[tuple[str, str | Sequence[Block]]]
) -> list[Message]:
    """The messages of a conversation. turns: role and content.

    Raises `InputError` for a block that its role cannot have, and a turn without content.
    """
    messages = list(_system(system))
    numbered = [(index, role, _blocks(content)) for index, (role, content) in enumerate(turns)]
    shown = [each for each in numbered if each[1] == "user" or _is_sent(each[2])]
    for role, group in groupby(shown, key=lambda each: each[1]):
        same = list(group)
        for index, _, blocks in same:
            _check(index, role, blocks)
        joined = [block for _, _, blocks in same for block in blocks]
        messages += _assistant(joined) if role == "assistant" else _of(role, joined, same[0][0])
    return messages


def _is_sent(blocks: Sequence[Any]) -> bool:
    """Whether a turn has more than thoughts, which are not sent again."""
    return not all(isinstance(block, ThoughtBlock) for block in blocks)


def _of(role: str, blocks: list[Any], index: int) -> Iterator[Message]:
    """The messages of a turn of the user, or of the system in the middle of a conversation."""
    if role == "system":
        yield from _system(blocks)
        return
    results = [block for block in blocks if isinstance(block, ToolResultBlock)]
    rest = [block for block in blocks if not isinstance(block, ToolResultBlock)]
    for result in results:
        yield _tool_result(result)
        rest = [*rest, *(each for each in _blocks(result.content) if isinstance(each, ImageBlock))]
    if rest:
        yield _message("user", rest)
    elif not results:
        raise InputError(f"messages.{index}: no content; write what the user says")


def _system(content: str | Sequence[TextBlock] | None) -> Iterator[Message]:
    blocks = [block for block in _blocks(content) if not block.text.startswith(_BILLING_HEADER)]
    if blocks:
        yield _message("system", blocks)


def _assistant(blocks: Sequence[Any]) -> list[Message]:
    texts = [block for block in blocks if isinstance(block, TextBlock)]
    calls = [block for block in blocks if isinstance(block, ToolUseBlock)]
    message = _message("assistant", texts, "")
    if calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(call.input, ensure_ascii=False)},
            }
            for call in calls
        ]
    return [message]


def _tool_result(block: ToolResultBlock) -> Message:
    """The message of a tool. An error says so, as its form has no other way to."""
    texts = [each for each in _blocks(block.content) if not isinstance(each, ImageBlock)]
    message = _message("tool", texts)
    if block.is_error and not message["content"].lower().startswith("error"):
        message["content"] = f"Error: {message['content']}"
        message.pop("parts", None)
    if block.cache_control is not None and texts:
        mark_for_cache(message, block.cache_control)
    message["tool_call_id"] = block.tool_use_id
    return message


def mark_for_cache(message: Message, mark: CacheControl) -> None:
    """Mark the end of a message for the provider's cache."""
    parts = message.get("parts") or [{"type": "text", "text": message["content"]}]
    parts[-1]["cache_control"] = mark.model_dump(exclude_none=True)
    message["parts"] = parts


def _message(role: Any, blocks: Sequence[Any], separator: str = "\n\n") -> Message:
    """A message of blocks; with parts where it has images or marks for the provider's cache."""
    texts = [block.text for block in blocks if not isinstance(block, ImageBlock)]
    message: Message = {"role": role, "content": separator.join(texts)}
    if any(isinstance(block, ImageBlock) or block.cache_control is not None for block in blocks):
        message["parts"] = [_part(block) for block in blocks]
    return message


def _part(block: Any) -> dict[str, Any]:
    if isinstance(block, ImageBlock):
        part: dict[str, Any] = {"type": "image_url", "image_url": {"url": block.source.address}}
    else:
        part = {"type": "text", "text": block.text}
    if block.cache_control is not None:
        part["cache_control"] = block.cache_control.model_dump(exclude_none=True)
    return part


def _blocks(content: Any) -> list[Any]:
    """Content as blocks, without empty texts, which providers refuse. A text is short for a block."""
    if content is None:
        return []
    blocks = [TextBlock(type="text", text=content)] if isinstance(content, str) else list(content)
    return [block for block in blocks if not isinstance(block, TextBlock) or block.text.strip()]


def _check(index: int, role: str, blocks: Sequence[Any]) -> None:
    allowed: dict[str, tuple[type, ...]] = {
        "user": (*_READ, ToolResultBlock),
        "system": (TextBlock,),
    }
    for block in blocks:
        is_read_by_assistant = isinstance(block, ImageBlock | DocumentBlock | SearchResultBlock)
        is_wrong = (
            is_read_by_assistant or isinstance(block, ToolResultBlock)
            if role == "assistant"
            else not isinstance(block, allowed[role])
        )
        if is_wrong:
            raise InputError(f"messages.{index}: a turn of the {role} has no block of type {block.type}")
