"""Progress of a model call: to LangGraph's `custom` stream, and its text to the `messages` stream.

The `messages` stream shows what chat models report through LangChain's callbacks. The workflow uses no
LangChain model, so `StreamReporter` calls the same callbacks instead: start, each piece of text, and the end
with the usage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from langchain_core.callbacks import CallbackManager
from langchain_core.callbacks.manager import CallbackManagerForLLMRun
from langchain_core.messages import AIMessage, AIMessageChunk, convert_to_messages
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, LLMResult
from langgraph.config import get_config
from langgraph.constants import TAG_NOSTREAM
from langgraph.runtime import Runtime

from viaticum.types import Completion, Message, ThinkingDelta


class StreamReporter:
    """Reports one call of a model as it progresses.

    Args:
        id: of the message that the model generates.
        metadata: of the call, beside its model; LangSmith and other tracers show it.
        is_check: of an answer: tracers alone see it.
    """

    def __init__(
        self,
        runtime: Runtime[Any],
        id: str,
        model: str,
        messages: Sequence[Message],
        metadata: Mapping[str, Any] = MappingProxyType({}),
        *,
        is_check: bool = False,
    ) -> None:
        self._write, self._id, self._is_check = runtime.stream_writer, id, is_check
        self._run = _start(model, messages, metadata, [TAG_NOSTREAM] if is_check else [])

    def piece(self, piece: str | ThinkingDelta) -> None:
        is_thought = isinstance(piece, ThinkingDelta)
        text = piece.text if isinstance(piece, ThinkingDelta) else piece
        if not self._is_check:
            self._write({"thinking" if is_thought else "text": text})
        if self._run is not None:
            chunk = AIMessageChunk(
                content="" if is_thought else text,
                additional_kwargs={"reasoning_content": text} if is_thought else {},
                id=self._id,
            )
            self._run.on_llm_new_token("" if is_thought else text, chunk=ChatGenerationChunk(message=chunk))

    def end(self, completion: Completion) -> None:
        if self._run is not None:
            read, generated = completion.usage.input_tokens, completion.usage.output_tokens
            usage: Any = {
                "input_tokens": read,
                "output_tokens": generated,
                "total_tokens": read + generated,
                "output_token_details": {"reasoning": completion.usage.reasoning_tokens},
            }
            thought = {"reasoning_content": completion.thinking} if completion.thinking else {}
            message = AIMessage(
                content=completion.text, id=self._id, usage_metadata=usage, additional_kwargs=thought
            )
            self._run.on_llm_end(LLMResult(generations=[[ChatGeneration(message=message)]]))

    def fail(self, error: BaseException) -> None:
        if self._run is not None:
            self._run.on_llm_error(error)


def _start(
    model: str, messages: Sequence[Message], metadata: Mapping[str, Any], tags: Sequence[str]
) -> CallbackManagerForLLMRun | None:
    """Start a run with the callbacks of this node; None if it has no handler."""
    config = get_config()
    manager = CallbackManager.configure(
        inheritable_callbacks=config.get("callbacks"),
        inheritable_tags=[*(config.get("tags") or ()), *tags],
        inheritable_metadata={**_metadata(config, model), **metadata},
    )
    if not manager.handlers:
        return None
    converted = convert_to_messages([dict(message) for message in messages])
    return manager.on_chat_model_start({"name": model}, [converted])[0]


def _metadata(config: Mapping[str, Any], model: str) -> dict[str, Any]:
    return {**config.get("metadata", {}), "ls_provider": "viaticum", "ls_model_name": model}
