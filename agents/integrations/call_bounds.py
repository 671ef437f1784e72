"""The worst case of an agent's model call: upper bounds of the tokens that it reads and writes.

Leaves out money (`viaticum.agents.integrations.middleware`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from langchain.agents.middleware import ModelRequest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage
from langchain_core.utils.function_calling import convert_to_openai_tool

from viaticum.agents.instrumentation.call_settings import (
    OWN_TOOL_TOKENS,
    CallSettings,
    own_tools,
    provider_tools,
)
from viaticum.agents.instrumentation.sent_parts import as_json
from viaticum.agents.integrations.sent_messages import sent_texts
from viaticum.agents.workflow.settings import Dollars
from viaticum.catalogue import Catalogue
from viaticum.errors import InputError
from viaticum.models.remote.model import MESSAGE_TOKENS, REQUEST_TOKENS, TOOLS_TOKENS
from viaticum.models.remote.prices import check_cache_writes
from viaticum.money import Price, as_price
from viaticum.types import TokenCount

Prices = Mapping[str, Price | tuple[Dollars, Dollars]]


@dataclass(frozen=True)
class CallBounds:
    """Bounds of the calls of one middleware.

    Args:
        prices: by model name.
        max_tokens: of new tokens, unless the model or the request sets less.
        setting: the name under which that is sent.
        count: an upper bound of the tokens of a text.
        provider_tools: beginnings of the names of tools that the provider may run.
    """

    prices: Mapping[str, Price]
    max_tokens: int
    setting: str
    count: Callable[[str], int]
    provider_tools: tuple[str, ...] = ()

    def limit(self, request: ModelRequest[Any]) -> int:
        """Maximum of new tokens: the least of the model's, the request's and the middleware's."""
        asked = request.model_settings.get(self.setting)
        return min(filter(None, (self.limit_of(request.model), positive(asked))))

    def limit_of(self, model: BaseChatModel) -> int:
        """Maximum of new tokens of a call whose request sets none."""
        return min(self.max_tokens, positive(getattr(model, self.setting, None)) or self.max_tokens)

    def text(self, text: str) -> int:
        """Tokens of a request that is one text."""
        return REQUEST_TOKENS + MESSAGE_TOKENS + self.count(text)

    def worst_case(self, request: ModelRequest[Any]) -> TokenCount:
        """Upper bounds of what a request reads and writes. Raises `InputError` for what has none."""
        limit, settings = self.limit(request), CallSettings(request.model, request.model_settings)
        settings.check(limit, self.setting)
        # A server may read the prompt once for each answer.
        return TokenCount(self.prompt(request, settings) * settings.answers, limit * settings.answers)

    def prompt(self, request: ModelRequest[Any], settings: CallSettings) -> int:
        """An upper bound of the tokens of the request. Raises `InputError` for what has no bound."""
        messages = messages_of(request)
        tools = [*request.tools, *settings.tools]
        for tool in provider_tools(tools):
            if not tool.startswith(self.provider_tools or "\n"):
                raise InputError(
                    f"the tool {tool} is run by the provider, and what it reads is not known before; leave "
                    f"it out, or accept that with provider_tools=[{tool!r}]"
                )
        price = self.prices.get(model_name(request.model))
        marked = [message.content for message in messages], tools, settings.sent
        check_cache_writes(marked, price, model_name(request.model))
        prompt = REQUEST_TOKENS + sum(
            MESSAGE_TOKENS + max(self.count(text), least) for text, least in sent_texts(messages)
        )
        schemas: list[Any] = [_schema(tool) for tool in request.tools]
        if request.response_format is not None:
            schemas.append(_format_schema(request.response_format))
        if schemas or settings.tools:
            prompt += TOOLS_TOKENS + OWN_TOOL_TOKENS * own_tools(tools)
        return prompt + sum(self.count(as_json(each)) for each in (schemas, *settings.sent) if each)


def model_name(model: BaseChatModel) -> str:
    """The name under which a chat model is traced, or the name of its class."""
    named: str | None = model._get_ls_params().get("ls_model_name")
    return named or type(model).__name__


def prices_of(prices: Prices | Catalogue) -> dict[str, Price]:
    """Prices by name. Raises `InputError` for one that is not a price."""
    if isinstance(prices, Catalogue):
        return {name: spec.price for name, spec in prices.items() if spec.price is not None}
    return {name: as_price(each) for name, each in prices.items()}


def positive(limit: Any) -> int | None:
    """The limit of new tokens that a model or a request sets; None for none."""
    return limit if isinstance(limit, int) and limit > 0 else None


def messages_of(request: ModelRequest[Any]) -> list[BaseMessage]:
    return [*filter(None, [request.system_message]), *request.messages]


def _schema(tool: Any) -> Any:
    return tool if isinstance(tool, dict) else convert_to_openai_tool(tool)


def _format_schema(response_format: Any) -> Any:
    """The schema of a structured answer, whatever method the agent uses for it."""
    spec = getattr(response_format, "schema", response_format)
    with suppress(Exception):
        return convert_to_openai_tool(spec)
    return str(spec)
