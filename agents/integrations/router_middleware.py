"""Middleware for LangChain's agents: a router that chooses among chat models, and goes on where one fails.

`RouterMiddleware` chooses the model of a run, or of each call, sync and async, with `create_agent` of the
extra `langchain`. Leaves out the budget (`viaticum.agents.integrations.middleware`).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langgraph.channels.untracked_value import UntrackedValue
from langgraph.runtime import Runtime
from langgraph.types import Command

from viaticum.agents.capable import best_rows
from viaticum.agents.instrumentation.call_settings import CallSettings
from viaticum.agents.integrations.agent_steps import note_model, step_state, steps_done
from viaticum.agents.integrations.langchain_messages import query_from_langchain
from viaticum.agents.integrations.middleware import Async, BudgetMiddleware, Sync
from viaticum.agents.integrations.model_labels import ChatModelGuard
from viaticum.agents.workflow.deadlines import Deadline, in_time, with_seconds
from viaticum.agents.workflow.failover import FAILOVER
from viaticum.agents.workflow.latencies import Seconds
from viaticum.catalogue import Catalogue
from viaticum.checks import checked_type
from viaticum.errors import BudgetExceeded, InputError, MissingExtra
from viaticum.models.remote.errors import error_kind
from viaticum.money import Price
from viaticum.residency import Only
from viaticum.routers.query import DEFAULT_POLICY, Policy, QueryRouter, as_policy, choose
from viaticum.routers.query.folders import load_router
from viaticum.routers.query.steps import choose_step, remaining_steps
from viaticum.types import Pair, RoutingTable, Row

try:
    from langchain.agents.middleware import AgentMiddleware, AgentState, ModelRequest, ModelResponse
    from langchain.agents.middleware.types import ExtendedModelResponse, PrivateStateAttr

    from viaticum.agents.integrations.call_bounds import Prices, model_name, positive, prices_of
except ImportError:
    raise MissingExtra("langchain", "langchain") from None

RUNS = 200  # whose lengths are remembered
_log = logging.getLogger("viaticum")
Response = ModelResponse[Any] | ExtendedModelResponse[Any] | AIMessage


class RouterState(AgentState[Any]):
    """An agent's state, with the model that was chosen for the run."""

    viaticum_model: NotRequired[Annotated[str, UntrackedValue, PrivateStateAttr]]


class RouterMiddleware(AgentMiddleware[Any, Any, Any]):
    """Routes each run, or each step of it, to the model that a router prefers for the last user message.

    Where a model is limited or away, refuses the content or finds the prompt too long, the next one is
    called, with a hold of its own; a run stays with the one that answered.

    Args:
        models: chat models by the names that the router knows; a model is represented by its pair with the
            highest accuracy.
        router: a `QueryRouter`, or the folder of a fitted one.
        policy: as of `Viaticum`.
        budget: a `BudgetMiddleware`. A model whose call is likely to cost more than it has left is not
            chosen; if none fits the cheapest is tried, which that middleware then refuses. Of its
            `max_seconds` what is left is heeded: models that took longer are not chosen.
        per: `run` (chosen once), `call` (anew for each call, by the question alone) or `step`: a chain of
            tool calls stays on its model; a switch is priced by the cache that it loses, over the steps that
            runs of this agent took; two errors in the last three results of tools call a more accurate model,
            until they are past (`viaticum.routers.query.steps`).
        only: labels of models, one of which a model has to have to be called: "local", a region, a tag. Give
            it to `BudgetMiddleware` as well, which may call other models at the cap.
        labels: of models other than `ChatViaticum`, by their name in `models`.
        prices: with `step`, prices by the router's names of the models, or a catalogue, where no `budget` has
            them. Without any, a step costs what the router's table says, and a switch costs nothing.

    Raises:
        ModelNotAllowed: none of the models may be called.
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
        per: Literal["run", "call", "step"] = "run",
        only: Only | None = None,
        labels: Mapping[str, Iterable[str]] | None = None,
        prices: Prices | Catalogue | None = None,
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
        if per not in ("run", "call", "step"):
            raise InputError(f"unknown per {per!r}; use run, call or step")
        self._guard = ChatModelGuard(only, labels)
        if budget is not None:
            self._guard.residency &= budget.residency
        self._guard.check_some(models)
        self.models = {name: model for name, model in models.items() if self._guard.allows(name, model)}
        self.budget, self.per = budget, per
        self.policy = as_policy(policy)
        self.router = router if isinstance(router, QueryRouter) else self._open(router)
        self._lengths: deque[int] = deque(maxlen=RUNS)
        self._given_prices = {} if prices is None else prices_of(prices)

    def before_agent(self, state: Any, runtime: Runtime[Any]) -> dict[str, Any] | None:
        if self.per != "run":
            return None
        return {"viaticum_model": self.choose(state["messages"], deadline=self._deadline(state))}

    def after_agent(self, state: Any, runtime: Runtime[Any]) -> None:
        self._lengths.append(steps_done(state["messages"]))

    async def aafter_agent(self, state: Any, runtime: Runtime[Any]) -> None:
        self.after_agent(state, runtime)

    async def abefore_agent(self, state: Any, runtime: Runtime[Any]) -> dict[str, Any] | None:
        return self.before_agent(state, runtime)

    def wrap_model_call(self, request: ModelRequest[Any], handler: Sync) -> Response:
        failed: list[str] = []
        while True:
            name = self._next(request, failed)
            try:
                return self._kept(handler(self._with_model(request, name)), name, failed)
            except Exception as error:
                self._check_failover(name, error, failed)

    async def awrap_model_call(self, request: ModelRequest[Any], handler: Async) -> Response:
        failed: list[str] = []
        while True:
            name = self._next(request, failed)
            try:
                return self._kept(await handler(self._with_model(request, name)), name, failed)
            except Exception as error:
                self._check_failover(name, error, failed)

    def _with_model(self, request: ModelRequest[Any], name: str) -> ModelRequest[Any]:
        self._guard.check(name, self.models[name])  # what a chat may use can change after it was given
        CallSettings(self.models[name], request.model_settings).check_model()
        return _for_model(request, self.models[name])

    def _next(self, request: ModelRequest[Any], failed: Sequence[str]) -> str:
        """The model of the run, or the one that the router prefers for this call among those left."""
        stored: Any = request.state.get("viaticum_model")
        if self.per == "run" and stored and not failed:
            return str(stored)
        if self.per == "step":
            return self._next_step(request, failed)
        return self.choose(request.messages, without=failed, deadline=self._deadline(request.state))

    def _deadline(self, state: Any) -> Deadline | None:
        return None if self.budget is None else self.budget.deadline(state)

    def _next_step(self, request: ModelRequest[Any], failed: Sequence[str]) -> str:
        """The model of a step; where the budget has no more for any, the cheapest, which is then refused."""
        messages = request.messages
        rows = self._rows(messages, failed, self._deadline(request.state))
        if rows is None:
            return next(name for name in self.models if name not in failed)
        state = step_state(messages)
        left = self.budget.left().left_nanousd if self.budget else None
        steps = remaining_steps(self._lengths, steps_done(messages))
        try:
            choice = choose_step(rows, state, self._prices(), self.policy, left=left, steps=steps)
        except BudgetExceeded:
            return min(rows, key=lambda row: row.cost_p90).pair.model
        _log.log(
            logging.INFO if choice.switched else logging.DEBUG,
            "the next step is by %s: %s",
            choice.model,
            choice.why,
        )
        return choice.model

    def _prices(self) -> dict[str, Price]:
        """Prices by the router's names of the models, where the budget has them or they were given."""
        known = {} if self.budget is None else self.budget.prices
        found = {
            name: known.get(model_name(model), self._given_prices.get(name))
            for name, model in self.models.items()
        }
        return {name: price for name, price in found.items() if price is not None}

    def _check_failover(self, name: str, error: Exception, failed: list[str]) -> None:
        """Add a model to those that failed. Raises its error where no other one may answer."""
        failed.append(name)
        if not issubclass(error_kind(error), FAILOVER) or not set(self.models) - set(failed):
            raise error
        _log.warning("%s failed, so another model is called: %s", name, error)

    def _kept(self, response: Any, name: str, failed: Sequence[str]) -> Response:
        """The response; after a failover with the model that the run stays with."""
        if self.per == "step":
            note_model(getattr(response, "result", [response]), name)
        if not failed or self.per != "run" or isinstance(response, AIMessage):
            answered: Response = response
            return answered
        return ExtendedModelResponse(response, Command(update={"viaticum_model": name}))

    def choose(
        self,
        messages: Sequence[BaseMessage],
        without: Collection[str] = (),
        deadline: Deadline | None = None,
    ) -> str:
        """The name of the model that the router prefers among those that fit in the budget and in time.

        A model that the router does not know comes last.

        Args:
            messages: of the run.
            without: names of models that may not be chosen.
            deadline: of the call.
        """
        rows = self._rows(messages, without, deadline)
        if rows is None:
            return next(name for name in self.models if name not in without)
        try:
            return choose(
                rows, self.budget.left().left_nanousd if self.budget else None, self.policy
            ).pair.model
        except BudgetExceeded:
            return min(rows, key=lambda row: row.cost_p90).pair.model

    def _rows(
        self, messages: Sequence[BaseMessage], without: Collection[str], deadline: Deadline | None
    ) -> RoutingTable | None:
        """The best row of each model that may be chosen; None where the router knows none of those left.

        Of models that are all too slow, the quickest.
        """
        query = query_from_langchain(messages, text_only=False)
        left = [name for name in self.models if name not in without]
        best = best_rows(self.router, query, left, self._limit_of)
        if not best and without:
            return None
        if not best:
            raise self._unknown(row.pair for row in self.router.table(query))
        rows = list(best.values())
        if self.policy.reads_seconds:
            rows = with_seconds(rows, self._seconds_of)
            if not without:
                self.policy.check(rows)
        quick = in_time(rows, self._seconds_of, deadline)
        return RoutingTable(tuple(quick or [min(rows, key=self._usual_seconds)]))

    def _seconds_of(self, row: Row) -> Seconds | None:
        return None if self.budget is None else self.budget.seconds_of(self.models[row.pair.model], row)

    def _usual_seconds(self, row: Row) -> float:
        seconds = self._seconds_of(row)
        return 0.0 if seconds is None else seconds.p50

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
        if self.budget is not None:
            return self.budget.bounds.limit_of(model)
        return positive(getattr(model, "max_tokens", None))


def _for_model(request: ModelRequest[Any], model: BaseChatModel) -> ModelRequest[Any]:
    """The request with another model, without Anthropic's marks of its cache where that is not Anthropic's.

    Middleware before this one sets them for the agent's own model, and others refuse them.
    """
    if "anthropic" in model._llm_type:
        return request.override(model=model)
    system = request.system_message
    return request.override(
        model=model,
        model_settings=_without_marks(request.model_settings),
        system_message=None if system is None else _unmarked(system),
        messages=[_unmarked(message) for message in request.messages],
        tools=[_without_marks(tool) if isinstance(tool, dict) else tool for tool in request.tools],
    )


def _without_marks(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != "cache_control"}


def _unmarked(message: Any) -> Any:
    if not isinstance(message.content, list):
        return message
    parts = [_without_marks(part) if isinstance(part, dict) else part for part in message.content]
    return message if parts == message.content else message.model_copy(update={"content": parts})
