"""LangChain's four ways to call a chat model (whole or streamed, sync or async) over one stream of chunks.

Leaves out what the chunks are and who makes them (`agents.integrations.chat_model`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Mapping
from contextlib import aclosing
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.language_models.chat_models import generate_from_stream
from langchain_core.messages import AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult

from viaticum.agents.workflow.threads import StreamThread


class StreamedChatModel(BaseChatModel):
    """A chat model whose answer is a stream of message chunks, reported to callbacks as they come.

    streaming: whether also a whole answer is reported by its chunks.
    """

    streaming: bool = False

    @abstractmethod
    def _chunks(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None,
        kwargs: Mapping[str, Any],
        *,
        whole: bool = False,
    ) -> Generator[AIMessageChunk, None, None]:
        """whole: nobody sees a chunk before the last one, so that another model may answer until then."""

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        chunks = self._chunks(messages, stop, kwargs, whole=not self.streaming)
        return generate_from_stream(_reported(chunks, run_manager if self.streaming else None))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        return _reported(self._chunks(messages, stop, kwargs), run_manager)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        chunks = self._chunks(messages, stop, kwargs, whole=not self.streaming)
        stream = _areported(chunks, run_manager if self.streaming else None)
        return generate_from_stream(iter([chunk async for chunk in stream]))

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        stream = _areported(self._chunks(messages, stop, kwargs), run_manager)
        async with aclosing(stream):
            async for chunk in stream:
                yield chunk


def _reported(
    chunks: Generator[AIMessageChunk, None, None], run_manager: CallbackManagerForLLMRun | None
) -> Iterator[ChatGenerationChunk]:
    try:
        for message in chunks:
            chunk = ChatGenerationChunk(message=message)
            if run_manager is not None and (message.content or message.additional_kwargs):
                run_manager.on_llm_new_token(str(message.content), chunk=chunk)
            yield chunk
    finally:
        chunks.close()


async def _areported(
    chunks: Generator[AIMessageChunk, None, None], run_manager: AsyncCallbackManagerForLLMRun | None
) -> AsyncGenerator[ChatGenerationChunk]:
    async with aclosing(StreamThread(chunks).items()) as items:
        async for message in items:
            chunk = ChatGenerationChunk(message=message)
            if run_manager is not None and (message.content or message.additional_kwargs):
                await run_manager.on_llm_new_token(str(message.content), chunk=chunk)
            yield chunk
