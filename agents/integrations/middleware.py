"""Middleware for LangChain's agents: a hard budget for any chat model.

`BudgetMiddleware` reserves the worst case of every model call and settles the usage that the response
reports, sync and async, with `create_agent` of the extra `langchain`. Where a call does not fit, `on_cap`
says how the agent goes on or ends.

What tools cost, and the models that they call, is held with `hold_tools`. Leaves out the choice among models
(`viaticum.agents.integrations.router_middleware`).
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, get_args

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.utils.function_calling import convert_to_openai_tool
from langgraph.runtime import Runtime

from viaticum.agents.instrumentation.call_settings import (
    OWN_TOOL_TOKENS,
    CallSettings,
    own_tools,
    provider_tools,
)
from viaticum.agents.instrumentation.sent_parts import as_json
from viaticum.agents.integrations.model_labels import ChatModelGuard
from viaticum.agents.integrations.reported_usage import reported_count
from viaticum.agents.integrations.sent_messages import sent_texts
from viaticum.agents.integrations.wrap_up import ANSWER_TOKENS, GROWTH_TOKENS, cut_to, last_prompt
from viaticum.agents.workflow.approval import ask_person, decision_needed, raise_limit
from viaticum.agents.workflow.calls import is_caller_cancelled
from viaticum.agents.workflow.settings import Dollars
from viaticum.agents.workflow.soft_limits import SoftLimits, SoftLimitWatch
from viaticum.budgets import Budget, Ledger
from viaticum.catalogue import Catalogue
from viaticum.checks import checked_count, checked_items
from viaticum.errors import (
    BudgetClosed,
    BudgetError,
    BudgetExceeded,
    HoldError,
    InputError,
    LedgerError,
    MissingExtra,
)
from viaticum.models.remote.model import MESSAGE_TOKENS, REQUEST_TOKENS, TOOLS_TOKENS
from viaticum.models.remote.prices import check_cache_writes
from viaticum.money import Price, as_price, nanousd, usd_digits
from viaticum.residency import Only
from viaticum.types import TokenCount

try:
    from langchain.agents.middleware import AgentMiddleware, AgentState, ModelRequest, ModelResponse
    from langchain.agents.middleware.types import PrivateStateAttr
except ImportError:
    raise MissingExtra("langchain", "langchain") from None

MAX_TOKENS = 1024
BYTES_COUNTED = "every byte counts as a token, which is several times too many; count takes a tokenizer"
OnCap = Literal["finish", "cheaper", "ask", "stop"]
Prices = Mapping[str, Price | tuple[Dollars, Dollars]]
Sync = Callable[[ModelRequest[Any]], ModelResponse[Any]]
Async = Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]


@dataclass(frozen=True, slots=True)
class _Held:
    """A call whose hold is dispatched: the key, and the request with the held max_tokens.

    is_last: it wraps up what is there, and no tool is called after it.
    """

    key: str
    request: ModelRequest[Any]
    is_last: bool = False


class BudgetState(AgentState[Any]):
    """An agent's state, with the name of its run."""

    viaticum_run: NotRequired[Annotated[str, PrivateStateAttr]]


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
        on_cap: what happens when a call does not fit. `finish`: one last cheap call, without tools, answers
            from what is there; money for it is held beside each call. `cheaper`: the first model of `cheaper`
            that fits is called instead, else the last call is made. `ask`: an interrupt, with the options
            raise, cheaper, finish and stop (without a checkpointer `DecisionNeeded`). `stop`:
            `BudgetExceeded`. Where not even the last call fits, a message says so and ends the agent.
        cheaper: chat models, the best first. The last one makes the last call of `finish`; without any, the
            agent's own model does.
        soft_limits: where word is given that the budget has spent a share of its limit.
        only: labels of models, one of which each model has to have that is called here, the agent's own too.
        labels: of models other than `ChatViaticum`, by the name under which they are traced.
        hold_tools: also hold the model calls that tools make, and tools with prices, as `viaticum.budget`
            does; at `prices`, else as found there. What does not fit is an error of the tool. Not for tools
            that pay by themselves, such as an agent with a middleware of its own.

    Raises:
        ModelNotAllowed: a model of `cheaper` may not be called.
        InputError: a setting is out of range.
        MissingExtra: `hold_tools` without the extra `remote`.
    """

    state_schema = BudgetState

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
        on_cap: OnCap = "finish",
        cheaper: Sequence[BaseChatModel] = (),
        soft_limits: SoftLimits | None = None,
        only: Only | None = None,
        labels: Mapping[str, Iterable[str]] | None = None,
        hold_tools: bool = False,
    ) -> None:
        super().__init__()
        if on_cap not in get_args(OnCap):
            raise InputError(f"unknown on_cap {on_cap!r}; use {', '.join(get_args(OnCap))}")
        for model in checked_items("cheaper", cheaper, BaseChatModel, "a chat model"):
            model_name(model)
        self._guard = ChatModelGuard(only, labels)
        for model in cheaper:
            self._guard.check(model_name(model), model)
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
        self.prices = prices_of(prices)
        self.unpriced = tuple(unpriced)
        self.max_tokens, self._setting = max_tokens, max_tokens_setting
        self.provider_tools = tuple(provider_tools)
        self.on_cap: OnCap = on_cap
        self.cheaper = tuple(cheaper)
        if soft_limits is not None:
            weakref.finalize(self, SoftLimitWatch(self.ledger, soft_limits).close)
        self._last_holds: dict[str, str] = {}  # by run, the key of what is held for its last call
        self._count = count or (lambda text: len(text.encode(errors="surrogatepass")))
        self._hint = "" if count else BYTES_COUNTED
        self._inside_tool: Callable[[], AbstractContextManager[None]] = nullcontext
        if hold_tools:
            from viaticum.agents.instrumentation.scope import paying_from

            self._inside_tool = paying_from(
                self.ledger, self.budget_name, self.prices, unpriced=self.unpriced, count=count
            )

    def left(self) -> Budget:
        """The state of the budget."""
        return self.ledger.budget(self.budget_name)

    def before_agent(self, state: Any, runtime: Runtime[Any]) -> dict[str, Any] | None:
        return {"viaticum_run": uuid.uuid4().hex} if self.on_cap == "finish" else None

    async def abefore_agent(self, state: Any, runtime: Runtime[Any]) -> dict[str, Any] | None:
        return self.before_agent(state, runtime)

    def after_agent(self, state: Any, runtime: Runtime[Any]) -> dict[str, Any] | None:
        self._free_last(state)
        return None

    async def aafter_agent(self, state: Any, runtime: Runtime[Any]) -> dict[str, Any] | None:
        return self.after_agent(state, runtime)

    def _hold_or_free(self, request: ModelRequest[Any]) -> _Held | AIMessage:
        """`_hold`; where it ends the run, what was held for its last call is free."""
        try:
            return self._hold(request)
        except BaseException:
            self._free_last(request.state)
            raise

    def wrap_model_call(self, request: ModelRequest[Any], handler: Sync) -> ModelResponse[Any] | AIMessage:
        held = self._hold_or_free(request)
        if isinstance(held, AIMessage):
            return held
        try:
            response = handler(held.request)
        except BaseException as error:
            self._end_hold(held, error)
            raise
        return self._settle(held, response)

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Async
    ) -> ModelResponse[Any] | AIMessage:
        held = self._hold_or_free(request)
        if isinstance(held, AIMessage):
            return held
        try:
            response = await handler(held.request)
        except BaseException as error:
            self._end_hold(held, error)
            raise
        return self._settle(held, response)

    def wrap_tool_call(self, request: Any, handler: Callable[[Any], Any]) -> Any:
        """A tool that fails may end the run: what is held for its last call is freed."""
        try:
            with self._inside_tool():
                return handler(request)
        except BaseException:
            self._free_last(request.state)
            raise

    async def awrap_tool_call(self, request: Any, handler: Callable[[Any], Awaitable[Any]]) -> Any:
        try:
            with self._inside_tool():
                return await handler(request)
        except BaseException:
            self._free_last(request.state)
            raise

    # Holds

    def _hold(self, request: ModelRequest[Any]) -> _Held | AIMessage:
        """The hold of a call, or of the one that is made in its place; or the answer that ends the agent."""
        try:
            return self._reserve(request)
        except BudgetClosed as error:
            if self.on_cap == "stop":
                raise
            return self._stopped(request, error)
        except BudgetExceeded as error:
            if self.on_cap == "stop":
                raise
            exceeded = error
        if self.on_cap == "ask":
            return self._ask(request, exceeded)
        if self.on_cap == "cheaper" and (held := self._reserve_cheaper(request)) is not None:
            return held
        return self._reserve_last(request) or self._stopped(request, exceeded)

    def _reserve(self, request: ModelRequest[Any]) -> _Held:
        """Hold a call, and with on_cap "finish" the last one beside it. Raises `BudgetExceeded`.

        Where the two do not fit, but a last call is held already, that one is made instead.
        """
        name, key = model_name(request.model), f"agent-{uuid.uuid4().hex}"
        self._guard.check(name, request.model)
        limit = self._limit(request)
        settings = CallSettings(request.model, request.model_settings)
        settings.check(limit, self._setting)
        prompt = self._prompt(request, settings)
        # A server may read the prompt once for each answer.
        self._reserve_call(key, name, TokenCount(prompt * settings.answers, limit * settings.answers))
        if self.on_cap == "finish" and _run_of(request.state):  # at whose end it is freed
            try:
                self._hold_last(request, limit)
            except BudgetExceeded:
                if _run_of(request.state) in self._last_holds:
                    self.ledger.void(key)
                    raise
                # Nothing is held to wrap up with, so this call is worth more than none.
        self.ledger.dispatch(key)
        return _Held(key, request.override(model_settings={**request.model_settings, self._setting: limit}))

    def _reserve_call(self, key: str, name: str, worst: TokenCount) -> None:
        self.ledger.reserve(
            self.budget_name,
            key,
            {name: worst},
            self.prices,
            tags={"model": name, "door": "agent"},
            unpriced=self.unpriced,
            hint=self._hint,
        )

    def _reserve_cheaper(self, request: ModelRequest[Any]) -> _Held | None:
        for model in self.cheaper:
            with suppress(BudgetExceeded):
                return self._reserve(request.override(model=model))
        return None

    # The last call

    def _hold_last(self, request: ModelRequest[Any], limit: int) -> None:
        """Hold what the last call of this run may take after this one, in place of what was held for it."""
        run, key = _run_of(request.state), f"agent-{uuid.uuid4().hex}"
        most = self._last_input(last_prompt(_messages(request))) + limit + GROWTH_TOKENS
        self._reserve_call(
            key, model_name(self._last_model(request)), TokenCount(most, min(limit, ANSWER_TOKENS))
        )
        self._free_last(request.state)
        self._last_holds[run] = key

    def _reserve_last(self, request: ModelRequest[Any]) -> _Held | None:
        """The last call, from what was held for it, or from what is left. None where nothing is."""
        model = self._last_model(request)
        text, name = last_prompt(_messages(request)), model_name(model)
        self._guard.check(name, model)
        key = self._last_holds.pop(_run_of(request.state), None)
        hold = None if key is None else self.ledger.hold(key)
        if hold is None or hold.state != "reserved":  # none, or its lease ran out
            key, hold = f"agent-{uuid.uuid4().hex}", None
            for part in (1, 2, 4, 8):
                worst = TokenCount(self._last_input(text) // part, min(self._limit(request), ANSWER_TOKENS))
                with suppress(BudgetExceeded):
                    self._reserve_call(key, name, worst)
                    hold = self.ledger.hold(key)
                    break
        if key is None or hold is None:
            return None
        held = hold.usage[name]
        text = cut_to(text, held.input_tokens - self._last_input(""), self._count)
        if not text:
            self.ledger.void(key)
            return None
        self.ledger.dispatch(key)
        last = request.override(
            model=model,
            system_message=None,
            messages=[HumanMessage(text)],
            tools=[],
            tool_choice=None,
            response_format=None,
            model_settings={self._setting: held.output_tokens},
        )
        return _Held(key, last, is_last=True)

    def _last_model(self, request: ModelRequest[Any]) -> BaseChatModel:
        return self.cheaper[-1] if self.cheaper else request.model

    def _last_input(self, text: str) -> int:
        return REQUEST_TOKENS + MESSAGE_TOKENS + self._count(text)

    def _free_last(self, state: Any) -> None:
        if (key := self._last_holds.pop(_run_of(state), None)) is not None:
            with suppress(LedgerError, HoldError):  # its lease may have run out
                self.ledger.void(key)

    def _stopped(self, request: ModelRequest[Any], error: BudgetError) -> AIMessage:
        metadata = {
            "finish_reason": "budget",
            "budget": self.budget_name,
            "left_nanousd": self.left().left_nanousd,
            "model_name": model_name(request.model),
        }
        return AIMessage(f"Stopped, the budget is used up: {error}", response_metadata=metadata)

    # A person decides

    def _ask(self, request: ModelRequest[Any], error: BudgetExceeded) -> _Held | AIMessage:
        """Interrupt until a person decides. The decision is carried out when the node runs again."""
        asked = self._approval(request, error)
        info = request.runtime.execution_info if request.runtime is not None else None
        if info is None or info.thread_id is None:
            raise decision_needed(asked) from error
        decision = ask_person(asked)
        if decision.do == "raise":
            raise_limit(self.ledger, decision, asked)
            # Not asked again in this step, which runs from its start for each decision and would raise twice.
            with suppress(BudgetExceeded):
                return self._reserve(request)
        held = None
        if decision.do == "cheaper":
            held = self._reserve_cheaper(request)
        elif decision.do == "finish":
            held = self._reserve_last(request)
        return held or self._stopped(request, error)

    def _approval(self, request: ModelRequest[Any], error: BudgetExceeded) -> dict[str, Any]:
        """What a person is asked: the call with its worst case, what is left, and the options."""
        scope = self.ledger.budget(error.budget)
        options: list[dict[str, Any]] = [{"do": "raise", f"by_{error.unit}": error.needed - error.left}]
        if self.cheaper:
            options.append({"do": "cheaper", "models": [model_name(model) for model in self.cheaper]})
        options += [{"do": "finish", "model": model_name(self._last_model(request))}, {"do": "stop"}]
        return {
            "why": str(error),
            "budget": scope.name,
            "unit": error.unit,
            "limit": scope.limit_tokens if error.unit == "tokens" else scope.limit_nanousd,
            "needed": error.needed,
            "left": error.left,
            "wanted": {"model": model_name(request.model), "cost_worst": error.needed},
            "options": options,
        }

    def _settle(self, held: _Held, response: ModelResponse[Any]) -> ModelResponse[Any]:
        """Settle the usage that the response reports; without a report, the held worst case."""
        answer = next((m for m in reversed(response.result) if isinstance(m, AIMessage)), None)
        count = None if answer is None else reported_count(answer)
        usage = None if count is None else {model_name(held.request.model): count}
        entry = self.ledger.settle(held.key, usage)
        if answer is not None:
            answer.response_metadata["viaticum"] = {
                "budget": self.budget_name,
                "cost_nanousd": entry.nanousd,
                "cost_usd": usd_digits(entry.nanousd),
                "left_nanousd": self.left().left_nanousd,
            }
            if held.is_last:
                answer.tool_calls, answer.invalid_tool_calls = [], []
                answer.response_metadata["finish_reason"] = "budget"
        return response

    def _end_hold(self, held: _Held, error: BaseException) -> None:
        """Void the hold of a failed call; settle the worst case of one that was cancelled or timed out."""
        key = held.key
        self._free_last(held.request.state)
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
        return min(filter(None, (self.limit_of(request.model), positive(asked))))

    def limit_of(self, model: BaseChatModel) -> int:
        """Maximum of new tokens of a call whose request sets none."""
        return min(self.max_tokens, positive(getattr(model, self._setting, None)) or self.max_tokens)

    def _prompt(self, request: ModelRequest[Any], settings: CallSettings) -> int:
        """An upper bound of the tokens of the request. Raises `InputError` for what has no bound."""
        messages = _messages(request)
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


def _schema(tool: Any) -> Any:
    return tool if isinstance(tool, dict) else convert_to_openai_tool(tool)


def _format_schema(response_format: Any) -> Any:
    """The schema of a structured answer, whatever method the agent uses for it."""
    spec = getattr(response_format, "schema", response_format)
    with suppress(Exception):
        return convert_to_openai_tool(spec)
    return str(spec)


def _run_of(state: Any) -> str:
    name: str = (state or {}).get("viaticum_run", "")
    return name


def _messages(request: ModelRequest[Any]) -> list[BaseMessage]:
    return [*filter(None, [request.system_message]), *request.messages]
