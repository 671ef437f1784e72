"""A LiteLLM provider for the router and the models: `litellm.completion(model="viaticum/auto", ...)`.

After `register`, every program that uses LiteLLM, including its proxy, can call `viaticum/auto`,
`viaticum/NAME` or `viaticum/MODEL+STRATEGY`, within one budget. The response has the usage and the cost
posted in the ledger; errors are converted to LiteLLM's. A thin layer over `ChatViaticum`.

Leaves out the other direction, LiteLLM's models in the catalogue: see `models.remote.model`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator, Iterator, Mapping, Sequence
from contextlib import aclosing
from functools import cache
from typing import Any

from langchain_core.messages import AIMessageChunk, BaseMessage, convert_to_messages

from viaticum.agents.integrations.chat_model import ChatViaticum
from viaticum.agents.workflow.threads import StreamThread
from viaticum.errors import (
    AuthenticationFailed,
    BudgetClosed,
    BudgetExceeded,
    ContentRefused,
    InputError,
    PromptTooLong,
    ProviderTimeout,
    ProviderUnavailable,
    QuotaExhausted,
    RateLimited,
    UnknownName,
    UnknownPrice,
    ViaticumError,
)
from viaticum.models.remote.request import load_litellm
from viaticum.money import NANOUSD_PER_USD

PROVIDER = "viaticum"
START_SECONDS = 0.5  # in which an error is one of the call, not of its stream
# OpenAI's parameters under other names, and parameters that LiteLLM adds for itself.
_RENAMED = {"max_completion_tokens": "max_tokens"}
_LEFT_OUT = {"stream", "stream_options", "extra_body", "max_retries"}
_FINISH = {"refused": "content_filter", "length": "length", "tool_calls": "tool_calls"}


def register(chat: ChatViaticum | None = None, *, provider: str = PROVIDER, **settings: Any) -> Any:
    """Register the provider with LiteLLM, in place of an earlier one of that name; returns the handler.

    The handler's `chat` holds the budget, and its `close` closes the ledger.

    Args:
        chat: an existing chat model; None to create one.
        provider: the prefix of the model names.
        settings: of `ChatViaticum`, such as budget, folder and router, if no chat is given.

    Raises:
        MissingExtra: LiteLLM is not installed.
    """
    litellm = load_litellm()
    custom = handler(chat, **settings)
    others = [item for item in litellm.custom_provider_map if item["provider"] != provider]
    litellm.custom_provider_map = [*others, {"provider": provider, "custom_handler": custom}]
    litellm.utils.custom_llm_setup()
    return custom


def handler(chat: ChatViaticum | None = None, **settings: Any) -> Any:
    """A `litellm.CustomLLM`, for the `custom_provider_map` of a proxy's configuration."""
    if chat is not None and settings:
        raise InputError(f"give a chat or settings for one, not both: {', '.join(settings)}")
    return _handler_class()(chat or ChatViaticum(**settings))


class _Handler:
    """The methods of `litellm.CustomLLM`, whose class is mixed in late: it is LiteLLM's."""

    def __init__(self, chat: ChatViaticum) -> None:
        super().__init__()
        self.chat = chat

    def completion(
        self,
        model: str,
        messages: list[Any],
        *args: Any,
        model_response: Any,
        optional_params: dict[str, Any],
        **_: Any,
    ) -> Any:
        try:
            return _fill(model_response, model, list(self._chunks(model, messages, optional_params)))
        except ViaticumError as error:
            raise _as_litellm(error, model) from error

    async def acompletion(
        self,
        model: str,
        messages: list[Any],
        *args: Any,
        model_response: Any,
        optional_params: dict[str, Any],
        **_: Any,
    ) -> Any:
        stream = StreamThread(self._chunks(model, messages, optional_params))
        try:
            async with aclosing(stream.items()) as chunks:
                return _fill(model_response, model, [chunk async for chunk in chunks])
        except ViaticumError as error:
            raise _as_litellm(error, model) from error

    def streaming(
        self, model: str, messages: list[Any], *args: Any, optional_params: dict[str, Any], **_: Any
    ) -> Generator[Any, None, None]:
        """Request the first chunk before returning: LiteLLM reports later errors as an interrupted stream."""
        chunks = self._chunks(model, messages, optional_params)
        try:
            first = next(chunks)
        except ViaticumError as error:
            raise _as_litellm(error, model) from error
        return self._continue(model, first, chunks)

    def astreaming(
        self, model: str, messages: list[Any], *args: Any, optional_params: dict[str, Any], **_: Any
    ) -> AsyncIterator[Any]:
        """Wait a moment for the first chunk, as `streaming` does; LiteLLM calls this outside the event loop.

        No longer, because a thread that waits here does not see that the caller is cancelled.
        """
        stream = StreamThread(self._chunks(model, messages, optional_params))
        try:
            stream.wait(START_SECONDS)
        except ViaticumError as error:
            raise _as_litellm(error, model) from error
        return self._acontinue(model, stream)

    async def _acontinue(self, model: str, stream: StreamThread[AIMessageChunk]) -> AsyncIterator[Any]:
        try:
            async with aclosing(stream.items()) as chunks:
                async for chunk in chunks:
                    for piece in _pieces(chunk):
                        yield piece
        except ViaticumError as error:
            raise _as_litellm(error, model) from error

    def _continue(
        self, model: str, first: AIMessageChunk, chunks: Generator[AIMessageChunk, None, None]
    ) -> Generator[Any, None, None]:
        try:
            yield from _pieces(first)
            for chunk in chunks:
                yield from _pieces(chunk)
        except ViaticumError as error:
            raise _as_litellm(error, model) from error
        finally:
            chunks.close()

    def close(self) -> None:
        self.chat.close()

    def _chunks(
        self, model: str, messages: list[Any], params: Mapping[str, Any]
    ) -> Generator[AIMessageChunk, None, None]:
        chat_settings = {
            _RENAMED.get(name, name): value for name, value in params.items() if name not in _LEFT_OUT
        }
        stop = chat_settings.pop("stop", None)
        stops = [stop] if isinstance(stop, str) else stop
        for chunk in self.chat._stream(_messages(messages), stops, model=model, **chat_settings):
            assert isinstance(chunk.message, AIMessageChunk)
            yield chunk.message


@cache
def _handler_class() -> type[Any]:
    return type("ViaticumLLM", (_Handler, load_litellm().CustomLLM), {})


def _messages(messages: Sequence[Any]) -> list[BaseMessage]:
    try:
        return convert_to_messages(messages)
    except (ValueError, NotImplementedError) as error:
        raise InputError(f"not a chat: {error}") from None


def _fill(response: Any, model: str, chunks: Sequence[AIMessageChunk]) -> Any:
    """Fill LiteLLM's response from the chunks of a whole answer."""
    litellm = load_litellm()
    text, last = "".join(str(chunk.content) for chunk in chunks), chunks[-1]
    thinking = "".join(_thinking(chunk) for chunk in chunks)
    metadata = last.response_metadata
    calls = [_tool_call(call) for call in last.tool_call_chunks]
    response.choices = [
        litellm.Choices(
            index=0,
            finish_reason=_FINISH.get(metadata["finish_reason"], "stop"),
            message=litellm.Message(
                role="assistant",
                content=text or None if calls else text,
                tool_calls=calls or None,
                reasoning_content=thinking or None,
                provider_specific_fields={PROVIDER: metadata},
            ),
        )
    ]
    response.model = f"{PROVIDER}/{model}"
    response.usage = litellm.Usage(**_usage(last))
    response._hidden_params["response_cost"] = metadata["cost_nanousd"] / NANOUSD_PER_USD
    return response


def _thinking(chunk: AIMessageChunk) -> str:
    return str(chunk.additional_kwargs.get("reasoning_content", ""))


def _pieces(chunk: AIMessageChunk) -> Iterator[Any]:
    """LiteLLM's pieces of one chunk: thought, text, or, for the last one, each tool call, then the rest.

    The rest is usage and metadata. LiteLLM's generic pieces have no place for a thought.
    """
    if thinking := _thinking(chunk):
        types = load_litellm().types.utils
        delta = types.Delta(role="assistant", reasoning_content=thinking)
        choice = types.StreamingChoices(index=0, delta=delta, finish_reason=None)
        yield types.ModelResponseStream(choices=[choice])
        return
    base: dict[str, Any] = {
        "text": "",
        "tool_use": None,
        "is_finished": False,
        "finish_reason": "",
        "usage": None,
        "index": 0,
    }
    if chunk.chunk_position != "last":
        yield {**base, "text": str(chunk.content)}
        return
    for index, call in enumerate(chunk.tool_call_chunks):
        yield {**base, "tool_use": {**_tool_call(call), "index": index}}
    metadata = chunk.response_metadata
    yield {
        **base,
        "is_finished": True,
        "finish_reason": _FINISH.get(metadata["finish_reason"], "stop"),
        "usage": {**_usage(chunk), "cost": metadata["cost_nanousd"] / NANOUSD_PER_USD},
        "provider_specific_fields": {PROVIDER: metadata},
    }


def _tool_call(call: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": call["id"],
        "type": "function",
        "function": {"name": call["name"], "arguments": call["args"]},
    }


def _usage(chunk: AIMessageChunk) -> dict[str, Any]:
    usage = chunk.usage_metadata
    assert usage is not None, "the last chunk has the usage"
    return {
        "prompt_tokens": usage["input_tokens"],
        "completion_tokens": usage["output_tokens"],
        "total_tokens": usage["total_tokens"],
        "prompt_tokens_details": {"cached_tokens": usage["input_token_details"].get("cache_read", 0)},
        "completion_tokens_details": {"reasoning_tokens": usage["output_token_details"].get("reasoning", 0)},
    }


def _as_litellm(error: ViaticumError, model: str) -> Exception:
    """Convert an error to LiteLLM's."""
    litellm = load_litellm()
    details = {"message": str(error), "model": model, "llm_provider": PROVIDER}
    made: Any
    if isinstance(error, BudgetExceeded):
        # LiteLLM turns its own BudgetExceededError into a bad request; this one is passed on unchanged.
        kinds = litellm.exceptions
        budget = {
            "category": kinds.RateLimitErrorCategory.LITELLM_RATE_LIMIT,
            "rate_limit_type": kinds.RateLimitType.BUDGET,
        }
        made = litellm.RateLimitError(**details, **budget)
    elif isinstance(error, BudgetClosed):
        made = litellm.PermissionDeniedError(**details, response=_response(403))
    elif isinstance(error, PromptTooLong):
        made = litellm.ContextWindowExceededError(**details)
    elif isinstance(error, UnknownName):
        made = litellm.NotFoundError(**details)
    elif isinstance(error, InputError | UnknownPrice):
        made = litellm.BadRequestError(**details)
    elif isinstance(error, RateLimited | QuotaExhausted):
        made = litellm.RateLimitError(**details)
    elif isinstance(error, AuthenticationFailed):
        made = litellm.AuthenticationError(**details)
    elif isinstance(error, ContentRefused):
        made = litellm.ContentPolicyViolationError(**details)
    elif isinstance(error, ProviderTimeout):
        made = litellm.Timeout(**details)
    elif isinstance(error, ProviderUnavailable):
        made = litellm.ServiceUnavailableError(**details)
    else:
        made = litellm.InternalServerError(**details)
    found: Exception = made
    return found


def _response(status: int) -> Any:
    import httpx

    return httpx.Response(status, request=httpx.Request("POST", f"{PROVIDER}://local"))
