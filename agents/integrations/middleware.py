"""Middleware for LangChain's agents: a hard budget for any chat model, and a router to choose among several.

`BudgetMiddleware` reserves the worst case of every model call and settles the usage that the response
reports; `RouterMiddleware` chooses the model of a run, or of each call. Both work sync and async, with
`create_agent` of the extra `langchain`.

Leaves out the cost of tools, and model calls made inside tools.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.utils.function_calling import convert_to_openai_tool
from langgraph.channels.untracked_value import UntrackedValue
from langgraph.runtime import Runtime

from viaticum.agents.integrations.call_settings import (
    OWN_TOOL_TOKENS,
    CallSettings,
    own_tools,
    provider_tools,
)
from viaticum.agents.integrations.langchain_messages import query_from_langchain
from viaticum.agents.integrations.sent_messages import sent_texts
from viaticum.agents.integrations.sent_parts import as_json
from viaticum.agents.workflow.calls import is_caller_cancelled
from viaticum.agents.workflow.settings import Dollars
from viaticum.budgets import Budget, Ledger
from viaticum.catalogue import Catalogue
from viaticum.checks import checked_count, checked_type
from viaticum.errors import BudgetClosed, BudgetExceeded, InputError, LedgerError, MissingExtra
from viaticum.models.remote.model import MESSAGE_TOKENS, REQUEST_TOKENS, TOOLS_TOKENS
from viaticum.models.remote.prices import check_cache_writes
from viaticum.money import Price, format_usd, nanousd
from viaticum.routers.query import DEFAULT_POLICY, Policy, QueryRouter, as_policy, choose
from viaticum.routers.query.folders import load_router
from viaticum.routers.query.limits import limit_table
from viaticum.types import Pair, RoutingTable, Row, TokenCount

try:
    from langchain.agents.middleware import AgentMiddleware, AgentState, ModelRequest, ModelResponse
    from langchain.agents.middleware.types import PrivateStateAttr
except ImportError:
    raise MissingExtra("langchain", "langchain") from None

MAX_TOKENS = 1024
BYTES_COUNTED = "every byte counts as a token, which is several times too many; count takes a tokenizer"
ExitBehavior = Literal["end", "error"]
Prices = Mapping[str, Price | tuple[Dollars, Dollars]]
Sync = Callable[[ModelRequest[Any]], ModelResponse[Any]]
Async = Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]


class BudgetMiddleware(AgentMiddleware[Any, Any, Any]):
    """A budget that an agent's model calls cannot exceed.

    Put it last in the list of middleware, next to the model: everything inside it counts as one call.

    Args:
        budget: dollars; None for a budget that exists in the ledger.
        prices: by model name, a `Price` or dollars per million input and output tokens; or a catalogue.
        ledger: an open `Ledger`, or its address; in memory by default.
        budget_name: a budget of the ledger, created if it does not exist; None for a new name.
        unpriced: names of models that may go without a price; others are refused with `UnknownPrice`.
        max_tokens: maximum of new tokens per call, unless the model or the request sets less; sent with the
            call.
        max_tokens_setting: the name under which it is sent.
        count: an upper bound of the tokens of a text; its bytes by default.
        provider_tools: names of tools that the provider runs, such as web_search, and that may be used
            although what they read is not held; others are refused.
        exit_behavior: `end` answers in place of the model that the budget is used up, which ends the agent;
            `error` raises `BudgetExceeded`.

    Raises:
        InputError: a setting is out of range.
    """

    def __init__(
        self,
        budget: Dollars | None = None,
        *,
        prices: Prices | Catalogue,
        ledger: Ledger | str | Path | None = None,
        budget_name: str | None = None,
        unpriced: Iterable[str] = (),
        max_tokens: int = MAX_TOKENS,
        max_tokens_setting: str = "max_tokens",
        count: Callable[[str], int] | None = None,
        provider_tools: Iterable[str] = (),
        exit_behavior: ExitBehavior = "end",
    ) -> None:
        super().__init__()
        if exit_behavior not in ("end", "error"):
            raise InputError(f"unknown exit_behavior {exit_behavior!r}; use end or error")
        checked_count("max_tokens", max_tokens)
        self.ledger = ledger if isinstance(ledger, Ledger) else Ledger(ledger or "memory:")
        self.budget_name = budget_name or f"agent-{uuid.uuid4().hex[:12]}"
        if budget is not None:
            limit = nanousd(budget)
            if limit <= 0:
                raise InputError(f"a budget is above zero dollars, got {budget}")
            self.ledger.create(self.budget_name, limit_nanousd=limit)
        else:
            self.ledger.budget(self.budget_name)  # it exists
        self.prices = _prices(prices)
        self.unpriced = tuple(unpriced)
        self.max_tokens, self._setting = max_tokens, max_tokens_setting
        self.provider_tools = tuple(provider_tools)
        self.exit_behavior = exit_behavior
        self._count = count or (lambda text: len(text.encode(errors="surrogatepass")))
        self._hint = "" if count else BYTES_COUNTED

    def left(self) -> Budget:
        """The state of the budget."""
        return self.ledger.budget(self.budget_name)

    def wrap_model_call(self, request: ModelRequest[Any], handler: Sync) -> ModelResponse[Any] | AIMessage:
        held = self._reserve(request)
        if isinstance(held, AIMessage):
            return held
        key, request = held
        try:
            response = handler(request)
        except BaseException as error:
            self._end_hold(key, error)
            raise
        return self._settle(key, request, response)

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Async
    ) -> ModelResponse[Any] | AIMessage:
        held = self._reserve(request)
        if isinstance(held, AIMessage):
            return held
        key, request = held
        try:
            response = await handler(request)
        except BaseException as error:
            self._end_hold(key, error)
            raise
        return self._settle(key, request, response)

    def _reserve(self, request: ModelRequest[Any]) -> tuple[str, ModelRequest[Any]] | AIMessage:
        """The key of the hold, and the request with the held max_tokens; or the answer in its place."""
        name, key = model_name(request.model), f"agent-{uuid.uuid4().hex}"
        limit = self._limit(request)
        settings = CallSettings(request.model, request.model_settings)
        settings.check(limit, self._setting)
        prompt = self._prompt(request, settings)
        # A server may read the prompt once for each answer.
        worst = {name: TokenCount(prompt * settings.answers, limit * settings.answers)}
        try:
            self.ledger.reserve(
                self.budget_name,
                key,
                worst,
                self.prices,
                tags={"model": name, "door": "agent"},
                unpriced=self.unpriced,
                hint=self._hint,
            )
        except (BudgetExceeded, BudgetClosed) as error:
            if self.exit_behavior == "error":
                raise
            left = self.left().left_nanousd
            metadata = {
                "finish_reason": "budget",
                "budget": self.budget_name,
                "left_nanousd": left,
                "model_name": name,
            }
            return AIMessage(f"Stopped, the budget is used up: {error}", response_metadata=metadata)
        self.ledger.dispatch(key)
        return key, request.override(model_settings={**request.model_settings, self._setting: limit})

    def _settle(
        self, key: str, request: ModelRequest[Any], response: ModelResponse[Any]
    ) -> ModelResponse[Any]:
        """Settle the usage that the response reports; without a report, the held worst case."""
        answer = next((m for m in reversed(response.result) if isinstance(m, AIMessage)), None)
        count = None if answer is None else reported_count(answer)
        usage = None if count is None else {model_name(request.model): count}
        entry = self.ledger.settle(key, usage)
        if answer is not None:
            left = self.left().left_nanousd
            answer.response_metadata["viaticum"] = {
                "budget": self.budget_name,
                "cost_nanousd": entry.nanousd,
                "cost_usd": format_usd(entry.nanousd).removeprefix("$"),
                "left_nanousd": left,
            }
        return response

    def _end_hold(self, key: str, error: BaseException) -> None:
        """Void the hold of a failed call; settle the worst case of one that was cancelled or timed out."""
        with suppress(LedgerError):
            if (
                is_caller_cancelled(error)
                or isinstance(error, TimeoutError)
                or "Timeout" in type(error).__name__
            ):
                self.ledger.settle(key, None)
            else:
                self.ledger.void(key)

    def _limit(self, request: ModelRequest[Any]) -> int:
        """Maximum of new tokens: the least of the model's, the request's and the middleware's."""
        asked = request.model_settings.get(self._setting)
        return min(filter(None, (self.limit_of(request.model), _positive(asked))))

    def limit_of(self, model: BaseChatModel) -> int:
        """Maximum of new tokens of a call whose request sets none."""
        return min(self.max_tokens, _positive(getattr(model, self._setting, None)) or self.max_tokens)

    def _prompt(self, request: ModelRequest[Any], settings: CallSettings) -> int:
        """An upper bound of the tokens of the request. Raises `InputError` for what has no bound."""
        messages: list[BaseMessage] = [*filter(None, [request.system_message]), *request.messages]
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
            MESSAGE_TOKENS + max(self._count(text), least) for text, least in sent_texts(messages)
        )
        schemas: list[Any] = [_schema(tool) for tool in request.tools]
        if request.response_format is not None:
            schemas.append(_format_schema(request.response_format))
        if schemas or settings.tools:
            prompt += TOOLS_TOKENS + OWN_TOOL_TOKENS * own_tools(tools)
        return prompt + sum(self._count(as_json(each)) for each in (schemas, *settings.sent) if each)


def reported_count(answer: AIMessage) -> TokenCount | None:
    """The tokens that the provider reports with an answer; None for none, or impossible ones.

    A provider that reports none at all for a prompt, or for an answer that is there, counted nothing.
    """
    usage = answer.usage_metadata
    if usage is None:
        return None
    read, written = usage["input_tokens"], usage["output_tokens"]
    has_content = bool(answer.content or answer.tool_calls or answer.invalid_tool_calls)
    if read <= 0 or written < 0 or (has_content and written == 0):
        return None
    details: Mapping[str, Any] = usage.get("input_token_details") or {}
    cached = min(max(0, details.get("cache_read") or 0), read)
    # Anthropic's are told by how long they are kept, and then are not in the sum.
    kept = [
        value for name, value in details.items() if name == "cache_creation" or name.startswith("ephemeral_")
    ]
    cache_written = min(sum(max(0, each or 0) for each in kept), read - cached)
    reasoning = (usage.get("output_token_details") or {}).get("reasoning") or 0
    reasoning = min(max(0, reasoning), written)
    return TokenCount(read, written, cached, reasoning, cache_write_tokens=cache_written)


class RouterState(AgentState[Any]):
    """An agent's state, with the model that was chosen for the run."""

    viaticum_model: NotRequired[Annotated[str, UntrackedValue, PrivateStateAttr]]


class RouterMiddleware(AgentMiddleware[Any, Any, Any]):
    """Routes each run, or each call, to the model that a router prefers for the last user message.

    Args:
        models: chat models by the names that the router knows; a model is represented by its pair with the
            highest accuracy.
        router: a `QueryRouter`, or the folder of a fitted one.
        policy: as of `Viaticum`.
        budget: a `BudgetMiddleware`. A model whose call is likely to cost more than it has left is not
            chosen; if none fits the cheapest is tried, which that middleware then refuses.
        per: `run` (chosen once) or `call`.

    Raises:
        InputError: an argument is of another type, there is no router in the folder, or it knows none of the
            models; a router that is given as an object says so at the first question.
    """

    state_schema = RouterState

    def __init__(
        self,
        models: Mapping[str, BaseChatModel],
        router: QueryRouter | str | Path,
        *,
        policy: str | Policy = DEFAULT_POLICY,
        budget: BudgetMiddleware | None = None,
        per: Literal["run", "call"] = "run",
    ) -> None:
        super().__init__()
        if not checked_type("models", models, Mapping, "a dict of chat models by name"):
            raise InputError("no model to choose from; give at least one by name")
        for name, model in models.items():
            checked_type(f"models[{name!r}]", model, BaseChatModel, "a chat model")
        if budget is not None:
            checked_type("budget", budget, BudgetMiddleware, "a BudgetMiddleware")
        checked_type(
            "router", router, (QueryRouter, str, Path), "a QueryRouter or the folder of a fitted one"
        )
        if per not in ("run", "call"):
            raise InputError(f"unknown per {per!r}; use run or call")
        self.models, self.budget, self.per = dict(models), budget, per
        self.policy = as_policy(policy)
        self.router = router if isinstance(router, QueryRouter) else self._open(router)

    def before_agent(self, state: Any, runtime: Runtime[Any]) -> dict[str, Any] | None:
        return {"viaticum_model": self.choose(state["messages"])} if self.per == "run" else None

    async def abefore_agent(self, state: Any, runtime: Runtime[Any]) -> dict[str, Any] | None:
        return self.before_agent(state, runtime)

    def wrap_model_call(self, request: ModelRequest[Any], handler: Sync) -> ModelResponse[Any]:
        return handler(self._routed(request))

    async def awrap_model_call(self, request: ModelRequest[Any], handler: Async) -> ModelResponse[Any]:
        return await handler(self._routed(request))

    def choose(self, messages: Sequence[BaseMessage]) -> str:
        """The name of the model that the router prefers among those that fit in the budget."""
        query = query_from_langchain(messages, text_only=False)
        table = limit_table(self.router.table(query), self._limit_of)
        best: dict[str, Row] = {}
        for row in table:
            known = best.get(row.pair.model)
            if row.pair.model in self.models and (known is None or row.accuracy > known.accuracy):
                best[row.pair.model] = row
        if not best:
            raise self._unknown(row.pair for row in table)
        rows = RoutingTable(tuple(best.values()))
        try:
            return choose(
                rows, self.budget.left().left_nanousd if self.budget else None, self.policy
            ).pair.model
        except BudgetExceeded:
            return min(rows, key=lambda row: row.cost_p90).pair.model

    def _open(self, folder: str | Path) -> QueryRouter:
        fitted = load_router(folder)
        if not any(pair.model in self.models for pair in fitted.pairs):
            raise self._unknown(fitted.pairs)
        return fitted

    def _unknown(self, pairs: Iterable[Pair]) -> InputError:
        known = ", ".join(sorted({pair.model for pair in pairs})) or "none"
        return InputError(f"the router knows none of the models {', '.join(self.models)}; it knows: {known}")

    def _limit_of(self, pair: Pair) -> int | None:
        """The most output tokens of a call of the pair's model; None where it is not known."""
        model = self.models.get(pair.model)
        if model is None:
            return None
        return self.budget.limit_of(model) if self.budget else _positive(getattr(model, "max_tokens", None))

    def _routed(self, request: ModelRequest[Any]) -> ModelRequest[Any]:
        stored: Any = request.state.get("viaticum_model")
        name: str | None = stored if self.per == "run" else None
        return request.override(model=self.models[name or self.choose(request.messages)])


def model_name(model: BaseChatModel) -> str:
    """The name under which a chat model is traced, or the name of its class."""
    named: str | None = model._get_ls_params().get("ls_model_name")
    return named or type(model).__name__


def _prices(prices: Prices | Catalogue) -> dict[str, Price]:
    if isinstance(prices, Catalogue):
        return {name: spec.price for name, spec in prices.items() if spec.price is not None}
    return {
        name: each if isinstance(each, Price) else Price.per_million(*each) for name, each in prices.items()
    }


def _positive(limit: Any) -> int | None:
    return limit if isinstance(limit, int) and limit > 0 else None


def _schema(tool: Any) -> Any:
    return tool if isinstance(tool, dict) else convert_to_openai_tool(tool)


def _format_schema(response_format: Any) -> Any:
    """The schema of a structured answer, whatever method the agent uses for it."""
    spec = getattr(response_format, "schema", response_format)
    with suppress(Exception):
        return convert_to_openai_tool(spec)
    return str(spec)
