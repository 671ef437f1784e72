"""Chats as lists of messages: a conversation joined with a strategy's turns, a system turn folded.

Standard library alone. Leaves out chat templates (`viaticum.models.prompts`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from viaticum.errors import InputError
from viaticum.types import Message, Query


def with_history(history: Sequence[Message], messages: Sequence[Message]) -> list[Message]:
    """The conversation so far followed by a strategy's messages, as one chat that every template accepts.

    All system turns are joined into one at the start; adjacent turns of the same role are joined.
    """
    system = [each["content"] for each in (*messages, *history) if each["role"] == "system"]
    joined: list[Message] = [{"role": "system", "content": "\n\n".join(system)}] if system else []
    for message in (*history, *messages):
        if message["role"] == "system":
            continue
        if joined and joined[-1]["role"] == message["role"]:
            content = f"{joined[-1]['content']}\n\n{message['content']}"
            joined[-1] = {"role": message["role"], "content": content}
        else:
            joined.append({"role": message["role"], "content": message["content"]})
    return joined


def fold_system(messages: Sequence[Message]) -> list[Message]:
    """The chat without system turns: their text stands at the start of the first user turn."""
    text = "\n\n".join(each["content"] for each in messages if each["role"] == "system" and each["content"])
    rest: list[Message] = [each for each in messages if each["role"] != "system"]
    if not text:
        return rest
    for index, message in enumerate(rest):
        if message["role"] == "user":
            rest[index] = {**message, "content": f"{text}\n\n{message['content']}"}
            if "parts" in message:
                rest[index]["parts"] = [{"type": "text", "text": f"{text}\n\n"}, *message["parts"]]
            return rest
    return [{"role": "user", "content": text}, *rest]


def images_in(message: Message) -> int:
    """How many images a message has."""
    return sum(part.get("type") == "image_url" for part in message.get("parts", ()))


def refuse_parts(name: str, messages: Sequence[Message]) -> None:
    """Raise `InputError` for what only remote models read: images, and marks for a provider's cache."""
    if any(map(images_in, messages)):
        raise InputError(
            f"{name} reads no images; name a remote model whose entry states image_tokens, or auto"
        )
    refuse_cache_marks(name, messages)


def refuse_cache_marks(name: str, messages: Sequence[Message]) -> None:
    """Raise `InputError` for messages with marks for the cache of a provider, which `name` has none of."""
    if any("cache_control" in part for message in messages for part in message.get("parts", ())):
        raise InputError(f"{name} writes nothing into a provider's cache; leave cache_control out")


def without_cache_marks(messages: Sequence[Message]) -> list[Message]:
    """The messages without marks for the cache of a provider; parts are kept where there are images."""
    stripped: list[Message] = without_marks(messages)
    for message in stripped:
        if "parts" in message and not images_in(message):
            del message["parts"]
    return stripped


def without_marks(value: Any) -> Any:
    """A copy of plain JSON without its marks for the cache of a provider."""
    if isinstance(value, Mapping):
        return {name: without_marks(each) for name, each in value.items() if name != "cache_control"}
    return [without_marks(each) for each in value] if isinstance(value, list | tuple) else value


def query_from_messages(messages: Sequence[Message]) -> Query:
    """A conversation as a question: its last message, after those before it.

    Raises:
        InputError: the last message is not the user's.
    """
    *before, last = messages
    if last["role"] != "user":
        raise InputError(f"the last message is the {last['role']}'s; end with the user's question")
    return Query(last["content"], messages=tuple(before))
