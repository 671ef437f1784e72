"""What a run says while it goes on: to LangGraph's `custom` stream, and the text to its `messages` stream.

The `messages` stream shows what chat models report through LangChain's callbacks. No LangChain model writes here, so a
`StreamReporter` reports to the same callbacks in its place: start, each piece, and the end with its usage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.callbacks import CallbackManager
from langchain_core.callbacks.manager import CallbackManagerForLLMRun
from langchain_core.messages import AIMessage, AIMessageChunk, convert_to_messages
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, LLMResult
from langgraph.config import get_config
from langgraph.runtime import Runtime

from viaticum.types import Completion, Message


class StreamReporter:
    """One call of a model, told as it goes on. id: of the message that it writes."""

    def __init__(self, runtime: Runtime[Any], id: str, model: str, messages: Sequence[Message]) -> None:
        self._write, self._id = runtime.stream_writer, id
        self._run = _start(model, messages)

    def piece(self, text: str) -> None:
        self._write({"text": text})
        if self._run is not None:
            chunk = AIMessageChunk(content=text, id=self._id)
            self._run.on_llm_new_token(text, chunk=ChatGenerationChunk(message=chunk))

    def end(self, completion: Completion) -> None:
        if self._run is not None:
            read, made = completion.usage.input_tokens, completion.usage.output_tokens
            usage: Any = {"input_tokens": read, "output_tokens": made, "total_tokens": read + made}
            message = AIMessage(content=completion.text, id=self._id, usage_metadata=usage)
            self._run.on_llm_end(LLMResult(generations=[[ChatGeneration(message=message)]]))

    def fail(self, error: BaseException) -> None:
        if self._run is not None:
            self._run.on_llm_error(error)


def _start(model: str, messages: Sequence[Message]) -> CallbackManagerForLLMRun | None:
    """The run that the callbacks of this node are told about; None where nobody listens."""
    config = get_config()
    manager = CallbackManager.configure(
        inheritable_callbacks=config.get("callbacks"),
        inheritable_tags=config.get("tags"),
        inheritable_metadata=_metadata(config, model),
    )
    if not manager.handlers:
        return None
    told = convert_to_messages([dict(message) for message in messages])
    return manager.on_chat_model_start({"name": model}, [told])[0]


def _metadata(config: Mapping[str, Any], model: str) -> dict[str, Any]:
    return {**config.get("metadata", {}), "ls_provider": "viaticum", "ls_model_name": model}
