"""A model call of an agent that is held: how it ends, by a response or by an error.

Leaves out how it is reserved, and when (`viaticum.agents.integrations.middleware`).
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from langchain.agents.middleware import ModelRequest, ModelResponse
from langchain_core.messages import AIMessage

from viaticum.agents.integrations.call_bounds import model_name
from viaticum.agents.integrations.reported_usage import is_cached, reported_count
from viaticum.agents.workflow.call_streams import is_caller_cancelled
from viaticum.budgets import Ledger
from viaticum.errors import DeadlineExceeded, HoldError, LedgerError
from viaticum.money import usd_digits


@dataclass(frozen=True, slots=True)
class HeldCall:
    """A call whose hold is dispatched: the key, and the request with the held max_tokens.

    is_last: it wraps up what is there, and no tool is called after it.
    """

    key: str
    request: ModelRequest[Any]
    is_last: bool = False


def settle_call(
    ledger: Ledger, budget: str, held: HeldCall, response: ModelResponse[Any], *, is_late: bool
) -> ModelResponse[Any]:
    """Settle the usage that a response reports; without a report, the held worst case.

    Args:
        budget: the name of the budget that pays.
        is_late: the time of the run is over.
    """
    answer = next((m for m in reversed(response.result) if isinstance(m, AIMessage)), None)
    cost = _settle(ledger, held, answer)
    if answer is not None:
        answer.response_metadata["viaticum"] = {
            "budget": budget,
            "cost_nanousd": cost,
            "cost_usd": usd_digits(cost),
            "left_nanousd": ledger.budget(budget).left_nanousd,
        }
        if held.is_last:
            answer.tool_calls, answer.invalid_tool_calls = [], []
            answer.response_metadata["finish_reason"] = "deadline" if is_late else "budget"
    return response


def _settle(ledger: Ledger, held: HeldCall, answer: AIMessage | None) -> int:
    """Settle or void a hold; returns the nano-dollars that were posted."""
    if answer is not None and is_cached(answer):
        ledger.void(held.key)
        return 0
    count = None if answer is None else reported_count(answer)
    usage = None if count is None else {model_name(held.request.model): count}
    return ledger.settle(held.key, usage).nanousd


def end_call(ledger: Ledger, held: HeldCall, error: BaseException, *, is_lost: bool = False) -> None:
    """Void the hold of a failed call; settle the worst case of one that was cancelled, timed out or lost.

    is_lost: it was seen to be sent, and no answer came. Without a hold yet, nothing is done.
    """
    with suppress(LedgerError, HoldError):
        if (
            is_lost
            or is_caller_cancelled(error)
            or isinstance(error, TimeoutError | DeadlineExceeded)
            or "Timeout" in type(error).__name__
        ):
            ledger.settle(held.key, None)
        else:
            ledger.void(held.key)
