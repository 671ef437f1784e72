"""Middleware for LangChain's agents: a hard budget for any chat model.

`BudgetMiddleware` reserves the worst case of every model call and settles the usage that the response
reports, sync and async, with `create_agent` of the extra `langchain`. Where a call does not fit, `on_cap`
says how the agent goes on or ends.

What tools cost, and the models that they call, is held with `hold_tools`. Leaves out what a call takes at
most (`viaticum.agents.integrations.call_bounds`), and the choice among models (`router_middleware`).
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, Literal, get_args

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langgraph.runtime import Runtime

from viaticum.agents.integrations.model_labels import ChatModelGuard
from viaticum.agents.workflow.approval import (
    Decision,
    ask_person,
    decision_needed,
    given_decision,
    raise_limit,
)
from viaticum.agents.workflow.deadlines import Deadline
from viaticum.agents.workflow.latencies import CallLatencies, Seconds
from viaticum.agents.workflow.settings import Dollars
from viaticum.agents.workflow.soft_limits import SoftLimits, SoftLimitWatch
from viaticum.budgets import Budget, Ledger
from viaticum.catalogue import Catalogue
from viaticum.checks import checked_count, checked_items, checked_seconds
from viaticum.errors import (
    BudgetClosed,
    BudgetError,
    BudgetExceeded,
    DeadlineExceeded,
    InputError,
    MissingExtra,
)
from viaticum.money import budget_nanousd
from viaticum.residency import Only, Residency
from viaticum.types import Pair, Row

try:
    from langchain.agents.middleware import AgentMiddleware, ModelRequest, ModelResponse

    from viaticum.agents.integrations.call_approval import (
        AskedRuns,
        Capped,
        approval_request,
        asked_before,
        can_interrupt,
        stopped_message,
    )
    from viaticum.agents.integrations.call_attempts import Attempts, install
    from viaticum.agents.integrations.call_bounds import CallBounds, Prices, model_name, prices_of
    from viaticum.agents.integrations.call_holds import CallHolds
    from viaticum.agents.integrations.held_calls import HeldCall, end_call, settle_call
    from viaticum.agents.integrations.last_calls import BudgetState, LastCalls, run_of
    from viaticum.agents.integrations.run_deadlines import RunDeadlines, acall_until, call_until, check_time
except ImportError:
    raise MissingExtra("langchain", "langchain") from None

MAX_TOKENS = 1024
OnCap = Literal["finish", "cheaper", "ask", "stop"]
LAST_SHARE = 0.1  # of a run's time, for its last call, until calls of its model were seen
Sync = Callable[[ModelRequest[Any]], ModelResponse[Any]]
Async = Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]


class BudgetMiddleware(AgentMiddleware[Any, Any, Any]):
    """A budget that an agent's model calls cannot exceed.

    Put it last in the list of middleware, next to the model: everything inside it counts as one call, whose
    requests are held and charged one by one (`viaticum.agents.integrations.call_attempts`).

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
        on_cap: what happens when a call does not fit, or no time is left for it. `finish`: one last cheap
            call, without tools, answers from what is there; money for it is held beside each call. `cheaper`:
            the first model of `cheaper` that fits is called instead, else the last call is made. `ask`: an
            interrupt, with the options
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
        max_seconds: that a run of the agent may take, all its steps together, from when it begins or another
            process goes on with it. What is left bounds each model call (not a tool), with time kept for the
            last one with `finish` and `cheaper`; then `on_cap` decides (`stop`: `DeadlineExceeded`).

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
        max_seconds: float | None = None,
    ) -> None:
        super().__init__()
        if on_cap not in get_args(OnCap):
            raise InputError(f"unknown on_cap {on_cap!r}; use {', '.join(get_args(OnCap))}")
        for model in checked_items("cheaper", cheaper, BaseChatModel, "a chat model"):
            model_name(model)
        self._guard = ChatModelGuard(only, labels)
        checked_count("max_tokens", max_tokens)
        if max_seconds is not None:
            checked_seconds("max_seconds", max_seconds)
        self.ledger = ledger if isinstance(ledger, Ledger) else Ledger(ledger or "memory:")
        self.budget_name = budget_name or f"agent-{uuid.uuid4().hex[:12]}"
        if budget is not None:
            self.ledger.create(self.budget_name, limit_nanousd=budget_nanousd(budget))
        else:
            self.ledger.budget(self.budget_name)  # it exists
        self._guard.residency &= self.ledger.residency(self.budget_name)
        for model in cheaper:
            self._guard.check(model_name(model), model)
        self.prices = prices_of(prices)
        self.unpriced = tuple(unpriced)
        self._holds = CallHolds(self.ledger, self.budget_name, self.prices, self.unpriced, self._guard, count)
        self.bounds = CallBounds(
            self.prices, max_tokens, max_tokens_setting, self._holds.count_text, tuple(provider_tools)
        )
        self.on_cap: OnCap = on_cap
        self.cheaper = tuple(cheaper)
        self.deadlines, self._latencies = RunDeadlines(max_seconds), CallLatencies(self.ledger)
        if soft_limits is not None:
            weakref.finalize(self, SoftLimitWatch(self.ledger, soft_limits).close)
        self._asked = AskedRuns()
        self._last = LastCalls(self.ledger, self.bounds, self._holds.reserve, self.cheaper, {})
        self._meets_attempts = install()
        self._inside_tool: Callable[[], AbstractContextManager[None]] = nullcontext
        if hold_tools:
            from viaticum.agents.instrumentation.scope import paying_from

            self._inside_tool = paying_from(
                self.ledger,
                self.budget_name,
                self.prices,
                unpriced=self.unpriced,
                count=count,
                residency=self.residency,
            )

    def left(self) -> Budget:
        """The state of the budget."""
        return self.ledger.budget(self.budget_name)

    @property
    def residency(self) -> Residency:
        """Where the data of its calls may go: its own restriction and that of its budget."""
        return self._guard.residency

    def seconds_of(self, model: BaseChatModel, row: Row | None = None) -> Seconds | None:
        """What a call of a model takes, by the newest calls in the ledger; None where none was seen.

        row: of the router, with the tokens that it expects.
        """
        tokens = (0, 0) if row is None else (row.tokens_p50, row.tokens_p90)
        return self._latencies.of(Row(Pair(model_name(model), ""), 0.0, *tokens, 0, 0))

    def deadline(self, state: Any) -> Deadline | None:
        """When the last call but one has to end: that of the run, less what is kept for its last call."""
        deadline = self.deadlines.of(state)
        if deadline is None or self.on_cap not in ("finish", "cheaper"):
            return deadline
        seen = self.seconds_of(self.cheaper[-1]) if self.cheaper else None
        kept = deadline.seconds * LAST_SHARE if seen is None else min(seen.p90, deadline.seconds / 2)
        return Deadline(deadline.seconds, deadline.until - kept)

    def before_agent(self, state: Any, runtime: Runtime[Any]) -> dict[str, Any] | None:
        if self.on_cap not in ("finish", "ask") and self.deadlines.seconds is None:
            return None
        named = {"viaticum_run": uuid.uuid4().hex}
        self.deadlines.begin(named)
        self._asked.close(run_of(named))
        return named

    async def abefore_agent(self, state: Any, runtime: Runtime[Any]) -> dict[str, Any] | None:
        return self.before_agent(state, runtime)

    def after_agent(self, state: Any, runtime: Runtime[Any]) -> dict[str, Any] | None:
        self._last.free(state)
        self.deadlines.end(state)
        self._asked.end(run_of(state))
        return None

    async def aafter_agent(self, state: Any, runtime: Runtime[Any]) -> dict[str, Any] | None:
        return self.after_agent(state, runtime)

    def _hold_or_free(self, request: ModelRequest[Any]) -> HeldCall | AIMessage:
        """`_hold`; where it ends the run, what was held for its last call is free."""
        try:
            return self._hold(request)
        except BaseException:
            self._last.free(request.state)
            raise

    def wrap_model_call(self, request: ModelRequest[Any], handler: Sync) -> ModelResponse[Any] | AIMessage:
        held = self._hold_or_free(request)
        while isinstance(held, HeldCall):
            attempts = self._holds.attempts(held)
            try:
                with attempts.inside(is_met=self._meets_attempts):
                    response = call_until(self._until(held), handler, held.request)
            except BaseException as error:
                held = self._instead(request, held, attempts, error)
            else:
                return self._settle(held, response, attempts)
        return held

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Async
    ) -> ModelResponse[Any] | AIMessage:
        held = self._hold_or_free(request)
        while isinstance(held, HeldCall):
            attempts = self._holds.attempts(held)
            try:
                with attempts.inside(is_met=self._meets_attempts):
                    response = await acall_until(self._until(held), handler, held.request)
            except BaseException as error:
                held = self._instead(request, held, attempts, error)
            else:
                return self._settle(held, response, attempts)
        return held

    def _until(self, held: HeldCall) -> Deadline | None:
        state = held.request.state
        return self.deadlines.of(state) if held.is_last else self.deadline(state)

    def _instead(
        self, request: ModelRequest[Any], held: HeldCall, attempts: Attempts, error: BaseException
    ) -> HeldCall | AIMessage:
        """End the hold of a call that failed. Its error, or what is done in its place where the time was over
        or a further attempt of its client did not fit.
        """
        attempts.end()
        if attempts.refusal is not None and isinstance(error, Exception):  # and no interrupt after it
            return self._without_attempt(request, held, attempts.refusal)
        is_late = isinstance(error, DeadlineExceeded) and self.on_cap != "stop"
        if not is_late:
            self._last.free(held.request.state)
        end_call(self.ledger, attempts, error)
        if not isinstance(error, DeadlineExceeded) or not is_late:
            raise error
        return self._stopped(request, error) if held.is_last else self._at_cap(request, error)

    def _without_attempt(
        self, request: ModelRequest[Any], held: HeldCall, error: BudgetExceeded | BudgetClosed
    ) -> HeldCall | AIMessage:
        """A further attempt does not fit; those before it are settled."""
        if self.on_cap == "stop":
            self._last.free(request.state)
            raise error
        if held.is_last or isinstance(error, BudgetClosed):
            return self._stopped(request, error)
        return self._at_cap(request, error)

    def wrap_tool_call(self, request: Any, handler: Callable[[Any], Any]) -> Any:
        """A tool that fails may end the run: what is held for its last call is freed."""
        try:
            with self._inside_tool():
                return handler(request)
        except BaseException:
            self._last.free(request.state)
            raise

    async def awrap_tool_call(self, request: Any, handler: Callable[[Any], Awaitable[Any]]) -> Any:
        try:
            with self._inside_tool():
                return await handler(request)
        except BaseException:
            self._last.free(request.state)
            raise

    # Holds

    def _hold(self, request: ModelRequest[Any]) -> HeldCall | AIMessage:
        """The hold of a call, or of the one that is made in its place; or the answer that ends the agent."""
        try:
            held = self._reserve(request)
        except BudgetClosed as error:
            if self.on_cap == "stop":
                raise
            return self._stopped(request, error)
        except (BudgetExceeded, DeadlineExceeded) as error:
            if self.on_cap == "stop":
                raise
            return self._at_cap(request, error)
        return self._heed(request, held) if self.on_cap == "ask" else held

    def _at_cap(self, request: ModelRequest[Any], error: Capped) -> HeldCall | AIMessage:
        """What is done in place of a call that does not fit, or for which no time is left."""
        if self.on_cap == "ask":
            return self._ask(request, error)
        if self.on_cap == "cheaper" and (held := self._reserve_cheaper(request)) is not None:
            return held
        return self._reserve_last(request) or self._stopped(request, error)

    def _reserve(self, request: ModelRequest[Any]) -> HeldCall:
        """Hold a call, and with on_cap "finish" the last one beside it.

        Raises:
            BudgetExceeded: it does not fit.
            DeadlineExceeded: no time is left for it.

        Where the two do not fit, but a last call is held already, that one is made instead.
        """
        key = f"agent-{uuid.uuid4().hex}"
        self._guard.check(model_name(request.model), request.model)
        check_time(self.deadline(request.state), self.seconds_of(request.model), model_name(request.model))
        limit = self.bounds.limit(request)
        self._holds.reserve(key, request.model, self.bounds.worst_case(request))
        if self.on_cap == "finish" and run_of(request.state):  # at whose end it is freed
            try:
                self._last.hold(request, limit)
            except BudgetExceeded:
                if self._last.is_held(request.state):
                    self.ledger.void(key)
                    raise
                # Nothing is held to wrap up with, so this call is worth more than none.
        self.ledger.dispatch(key)
        settings_sent = {**request.model_settings, self.bounds.setting: limit}
        return HeldCall(key, request.override(model_settings=settings_sent))

    def _reserve_cheaper(self, request: ModelRequest[Any]) -> HeldCall | None:
        for model in self.cheaper:
            with suppress(BudgetExceeded, DeadlineExceeded):
                return self._reserve(request.override(model=model))
        return None

    def _reserve_last(self, request: ModelRequest[Any]) -> HeldCall | None:
        model, deadline = self._last.model(request), self.deadlines.of(request.state)
        self._guard.check(model_name(model), model)
        return None if deadline is not None and deadline.left <= 0 else self._last.take(request)

    def _stopped(self, request: ModelRequest[Any], error: BudgetError | DeadlineExceeded) -> AIMessage:
        self._last.free(request.state)
        return stopped_message(error, self.left(), model_name(request.model))

    def _ask(self, request: ModelRequest[Any], error: Capped) -> HeldCall | AIMessage:
        """Interrupt until a person decides. The decision is carried out when the node runs again."""
        asked = self._question(request, error)
        if not can_interrupt(request):
            raise decision_needed(asked) from error
        self.deadlines.pause(request.state)
        self._asked.ask(run_of(request.state))
        decision = ask_person(asked)
        self._asked.close(run_of(request.state))
        if decision.do == "raise":
            if isinstance(error, DeadlineExceeded):
                self.deadlines.begin(request.state, decision.by)
            else:
                raise_limit(self.ledger, decision, asked)
            # Not asked again in this step, which runs from its start for each decision and would raise twice.
            with suppress(BudgetExceeded, DeadlineExceeded):
                return self._reserve(request)
        return self._decided(request, decision, error)

    def _heed(self, request: ModelRequest[Any], held: HeldCall) -> HeldCall | AIMessage:
        """Hear a person who was asked in this step, though the call that is held now needs no decision.

        So it is where another process goes on with the run, whose time begins anew, or where there is more
        money since.
        """
        run = run_of(request.state)
        if not self._asked.is_open(run) or not can_interrupt(request):
            return held
        error = asked_before(self.budget_name, self.deadlines.seconds)
        try:
            decision = given_decision(self._question(request, error))
        except BaseException:
            self.ledger.void(held.key)
            raise
        self._asked.close(run)
        if decision is None:
            return held
        if decision.do == "raise":
            if isinstance(error, DeadlineExceeded):
                self.deadlines.begin(request.state, decision.by)
            return held
        self.ledger.void(held.key)
        return self._decided(request, decision, error)

    def _question(self, request: ModelRequest[Any], error: Capped) -> dict[str, Any]:
        models = request.model, self._last.model(request), self.cheaper
        budget = self.ledger.budget(error.budget if isinstance(error, BudgetExceeded) else self.budget_name)
        return approval_request(error, budget, self.deadlines.seconds, *models)

    def _decided(self, request: ModelRequest[Any], decision: Decision, error: Capped) -> HeldCall | AIMessage:
        """The call that a person decided on, or the end of the run."""
        held = None
        if decision.do == "cheaper":
            held = self._reserve_cheaper(request)
        elif decision.do == "finish":
            held = self._reserve_last(request)
        return held or self._stopped(request, error)

    def _settle(self, held: HeldCall, response: ModelResponse[Any], attempts: Attempts) -> ModelResponse[Any]:
        deadline = self.deadline(held.request.state)
        is_late = deadline is not None and deadline.left <= 0
        return settle_call(self.ledger, self.budget_name, held, response, attempts, is_late=is_late)
