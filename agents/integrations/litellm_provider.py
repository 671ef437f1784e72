"""Our router and our models as a provider of LiteLLM: `litellm.completion(model="viaticum/auto", ...)`.

After `register`, every program that speaks through LiteLLM, its proxy among them, can ask `viaticum/auto`,
`viaticum/NAME` or `viaticum/MODEL+STRATEGY`, within one budget. Usage and the cost that the ledger posted are
in the response; our errors come out as LiteLLM's. A thin shell around `ChatViaticum`.

Leaves out the other direction, LiteLLM's models in our catalogue: see `models.remote.model`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Generator, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from langchain_core.messages import AIMessageChunk, BaseMessage, convert_to_messages

from viaticum.agents.integrations.chat_model import ChatViaticum, iterate_in_thread
from viaticum.errors import (
    AuthenticationFailed,
    BudgetClosed,
    BudgetExceeded,
    ContentRefused,
    InputError,
    PromptTooLong,
    ProviderTimeout,
    ProviderUnavailable,
    RateLimited,
    UnknownName,
    UnknownPrice,
    ViaticumError,
)
from viaticum.models.remote.model import load_litellm
from viaticum.money import NANOUSD_PER_USD

PROVIDER = "viaticum"
# OpenAI's word for what we call otherwise, and what LiteLLM adds for itself.
_RENAMED = {"max_completion_tokens": "max_tokens"}
_LEFT_OUT = {"stream", "stream_options", "extra_body", "max_retries"}
_FINISH = {"refused": "content_filter", "length": "length", "tool_calls": "tool_calls"}


def register(chat: ChatViaticum | None = None, *, provider: str = PROVIDER, **settings: Any) -> Any:
    """Make LiteLLM know us; returns the handler, whose `chat` holds the budget and whose `close` closes the ledger.

    settings are those of `ChatViaticum` (budget, folder, router ...), or give a chat that there is.
    Registering again replaces what the name stood for. Raises `MissingExtra` without LiteLLM.
    """
    litellm = load_litellm()
    made = handler(chat, **settings)
    others = [item for item in litellm.custom_provider_map if item["provider"] != provider]
    litellm.custom_provider_map = [*others, {"provider": provider, "custom_handler": made}]
    litellm.utils.custom_llm_setup()
    return made


def handler(chat: ChatViaticum | None = None, **settings: Any) -> Any:
    """A `litellm.CustomLLM`, for the `custom_provider_map` of a proxy's configuration."""
    if chat is not None and settings:
        raise InputError(f"give a chat or settings for one, not both: {', '.join(settings)}")
    return _handler_class()(chat or ChatViaticum(**settings))


@cache
def _handler_class() -> type[Any]:
    """Made late: its base class is LiteLLM's."""
    litellm = load_litellm()

    class ViaticumLLM(litellm.CustomLLM):  # type: ignore[misc, name-defined]
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

        async def acompletion(self, *args: Any, **kwargs: Any) -> Any:
            return await asyncio.to_thread(self.completion, *args, **kwargs)

        def streaming(
            self, model: str, messages: list[Any], *args: Any, optional_params: dict[str, Any], **_: Any
        ) -> Generator[dict[str, Any], None, None]:
            """Begun when it returns: what LiteLLM meets later, it calls a stream that broke off."""
            chunks = self._chunks(model, messages, optional_params)
            try:
                first = next(chunks)
            except ViaticumError as error:
                raise _as_litellm(error, model) from error
            return self._go_on(model, first, chunks)

        def astreaming(self, *args: Any, **kwargs: Any) -> AsyncIterator[dict[str, Any]]:
            """LiteLLM calls this in a thread of its own, so that the first piece may be waited for."""
            return iterate_in_thread(self.streaming(*args, **kwargs))

        def _go_on(
            self, model: str, first: AIMessageChunk, chunks: Generator[AIMessageChunk, None, None]
        ) -> Generator[dict[str, Any], None, None]:
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
            asked = {
                _RENAMED.get(name, name): value for name, value in params.items() if name not in _LEFT_OUT
            }
            stop = asked.pop("stop", None)
            stops = [stop] if isinstance(stop, str) else stop
            for chunk in self.chat._stream(_messages(messages), stops, model=model, **asked):
                assert isinstance(chunk.message, AIMessageChunk)
                yield chunk.message

    return ViaticumLLM


def _messages(messages: Sequence[Any]) -> list[BaseMessage]:
    try:
        return convert_to_messages(messages)
    except (ValueError, NotImplementedError) as error:
        raise InputError(f"not a chat: {error}") from None


def _fill(response: Any, model: str, chunks: Sequence[AIMessageChunk]) -> Any:
    """LiteLLM's response, filled in from a whole answer."""
    litellm = load_litellm()
    text, last = "".join(str(chunk.content) for chunk in chunks), chunks[-1]
    told = last.response_metadata
    calls = [_tool_call(call) for call in last.tool_call_chunks]
    response.choices = [
        litellm.Choices(
            index=0,
            finish_reason=_FINISH.get(told["finish_reason"], "stop"),
            message=litellm.Message(
                role="assistant",
                content=text or None if calls else text,
                tool_calls=calls or None,
                provider_specific_fields={PROVIDER: told},
            ),
        )
    ]
    response.model = f"{PROVIDER}/{model}"
    response.usage = litellm.Usage(**_usage(last))
    response._hidden_params["response_cost"] = told["cost_nanousd"] / NANOUSD_PER_USD
    return response


def _pieces(chunk: AIMessageChunk) -> Iterator[dict[str, Any]]:
    """LiteLLM's pieces of one chunk: text as it comes; at the end tool calls, one a piece, usage and the rest."""
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
    for place, call in enumerate(chunk.tool_call_chunks):
        yield {**base, "tool_use": {**_tool_call(call), "index": place}}
    told = chunk.response_metadata
    yield {
        **base,
        "is_finished": True,
        "finish_reason": _FINISH.get(told["finish_reason"], "stop"),
        "usage": {**_usage(chunk), "cost": told["cost_nanousd"] / NANOUSD_PER_USD},
        "provider_specific_fields": {PROVIDER: told},
    }


def _tool_call(call: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": call["id"],
        "type": "function",
        "function": {"name": call["name"], "arguments": call["args"]},
    }


def _usage(chunk: AIMessageChunk) -> dict[str, Any]:
    said = chunk.usage_metadata
    assert said is not None, "the last chunk has the usage"
    return {
        "prompt_tokens": said["input_tokens"],
        "completion_tokens": said["output_tokens"],
        "total_tokens": said["total_tokens"],
        "prompt_tokens_details": {"cached_tokens": said["input_token_details"].get("cache_read", 0)},
        "completion_tokens_details": {"reasoning_tokens": said["output_token_details"].get("reasoning", 0)},
    }


def _as_litellm(error: ViaticumError, model: str) -> Exception:
    """LiteLLM's error for ours."""
    litellm = load_litellm()
    where = {"message": str(error), "model": model, "llm_provider": PROVIDER}
    made: Any
    if isinstance(error, BudgetExceeded):
        # LiteLLM's own BudgetExceededError is turned into a bad request on its way out; this one stays what
        # it is.
        kinds = litellm.exceptions
        budget = {
            "category": kinds.RateLimitErrorCategory.LITELLM_RATE_LIMIT,
            "rate_limit_type": kinds.RateLimitType.BUDGET,
        }
        made = litellm.RateLimitError(**where, **budget)
    elif isinstance(error, BudgetClosed):
        made = litellm.PermissionDeniedError(**where, response=_response(403))
    elif isinstance(error, PromptTooLong):
        made = litellm.ContextWindowExceededError(**where)
    elif isinstance(error, UnknownName):
        made = litellm.NotFoundError(**where)
    elif isinstance(error, InputError | UnknownPrice):
        made = litellm.BadRequestError(**where)
    elif isinstance(error, RateLimited):
        made = litellm.RateLimitError(**where)
    elif isinstance(error, AuthenticationFailed):
        made = litellm.AuthenticationError(**where)
    elif isinstance(error, ContentRefused):
        made = litellm.ContentPolicyViolationError(**where)
    elif isinstance(error, ProviderTimeout):
        made = litellm.Timeout(**where)
    elif isinstance(error, ProviderUnavailable):
        made = litellm.ServiceUnavailableError(**where)
    else:
        made = litellm.InternalServerError(**where)
    found: Exception = made
    return found


def _response(status: int) -> Any:
    import httpx

    return httpx.Response(status, request=httpx.Request("POST", f"{PROVIDER}://local"))
