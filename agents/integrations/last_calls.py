"""Money for the last call of an agent's run, which is held beside each of its calls.

So that an agent whose budget is used up can still say what it has. Leaves out the text of that call
(`viaticum.agents.integrations.wrap_up`), and when it is made (`viaticum.agents.integrations.middleware`).
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, NotRequired

from langchain.agents.middleware import AgentState, ModelRequest
from langchain.agents.middleware.types import PrivateStateAttr
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import HumanMessage

from viaticum.agents.integrations.call_bounds import CallBounds, messages_of
from viaticum.agents.integrations.held_calls import HeldCall
from viaticum.agents.integrations.wrap_up import ANSWER_TOKENS, GROWTH_TOKENS, cut_to, last_prompt
from viaticum.budgets import Ledger
from viaticum.errors import BudgetExceeded, HoldError, LedgerError
from viaticum.types import TokenCount


class BudgetState(AgentState[Any]):
    """An agent's state, with the name of its run."""

    viaticum_run: NotRequired[Annotated[str, PrivateStateAttr]]


@dataclass(frozen=True)
class LastCalls:
    """The last calls of all runs of one middleware.

    Args:
        ledger: has the holds.
        bounds: of calls.
        reserve: holds a call of a model under a key. Raises `BudgetExceeded`.
        cheaper: the last one makes the last calls; without any, the agent's own model does.
    """

    ledger: Ledger
    bounds: CallBounds
    reserve: Callable[[str, BaseChatModel, TokenCount], None]
    cheaper: Sequence[BaseChatModel]
    _keys: dict[str, str]  # by run, of what is held for its last call

    def model(self, request: ModelRequest[Any]) -> BaseChatModel:
        return self.cheaper[-1] if self.cheaper else request.model

    def is_held(self, state: Any) -> bool:
        return run_of(state) in self._keys

    def hold(self, request: ModelRequest[Any], limit: int) -> None:
        """Hold what the last call of this run may take after this one, in place of what was held for it.

        limit: of the new tokens of this one.
        """
        run, key = run_of(request.state), f"agent-{uuid.uuid4().hex}"
        most = self.bounds.text(last_prompt(messages_of(request))) + limit + GROWTH_TOKENS
        self.reserve(key, self.model(request), TokenCount(most, min(limit, ANSWER_TOKENS)))
        self.free(request.state)
        self._keys[run] = key

    def take(self, request: ModelRequest[Any]) -> HeldCall | None:
        """The last call, from what was held for it, or from what is left. None where nothing is."""
        model, text = self.model(request), last_prompt(messages_of(request))
        key = self._keys.pop(run_of(request.state), None)
        hold = None if key is None else self.ledger.hold(key)
        if hold is None or hold.state != "reserved":  # none, or its lease ran out
            key, hold = f"agent-{uuid.uuid4().hex}", None
            limit = min(self.bounds.limit(request), ANSWER_TOKENS)
            for part in (1, 2, 4, 8):
                with suppress(BudgetExceeded):
                    self.reserve(key, model, TokenCount(self.bounds.text(text) // part, limit))
                    hold = self.ledger.hold(key)
                    break
        if key is None or hold is None:
            return None
        (held,) = hold.usage.values()
        text = cut_to(text, held.input_tokens - self.bounds.text(""), self.bounds.count)
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
            model_settings={self.bounds.setting: held.output_tokens},
        )
        return HeldCall(key, last, is_last=True)

    def free(self, state: Any) -> None:
        """Free what is held for the last call of a run."""
        if (key := self._keys.pop(run_of(state), None)) is not None:
            with suppress(LedgerError, HoldError):  # its lease may have run out
                self.ledger.void(key)


def run_of(state: Any) -> str:
    name: str = (state or {}).get("viaticum_run", "")
    return name
