"""What a chat model of LangChain sends of a request, as texts to count, part by part.

An integration sends its messages as they are, with thoughts, signatures, results of the provider's own tools
and whatever stands beside the content. All of it is counted by its type; what has no bound before the call
(images, sound, files, what a provider kept itself) is refused by name.

Leaves out the conversion of messages for our own models (`agents.integrations.langchain_messages`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, RemoveMessage, ToolMessage

from viaticum.agents.instrumentation.sent_parts import as_json, check_parts, no_bound
from viaticum.errors import InputError


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
        check_parts(content)
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
