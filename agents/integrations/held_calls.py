"""A model call of an agent that is held: how it ends, by a response or by an error.

Leaves out how it is reserved, and when (`viaticum.agents.integrations.middleware`).
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from langchain.agents.middleware import ModelRequest, ModelResponse
from langchain_core.messages import AIMessage

from viaticum.agents.integrations.call_attempts import Attempts
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
    ledger: Ledger,
    budget: str,
    held: HeldCall,
    response: ModelResponse[Any],
    attempts: Attempts,
    *,
    is_late: bool,
) -> ModelResponse[Any]:
    """Settle the usage that a response reports; without a report, the most that its request may cost.

    Args:
        budget: the name of the budget that pays.
        attempts: that were made of the call; those before the last one are settled by themselves.
        is_late: the time of the run is over.
    """
    attempts.end()
    answer = next((m for m in reversed(response.result) if isinstance(m, AIMessage)), None)
    cost = _settle(ledger, held, answer, attempts)
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


def _settle(ledger: Ledger, held: HeldCall, answer: AIMessage | None, attempts: Attempts) -> int:
    """Settle or void a hold; returns the nano-dollars that were posted.

    What the provider reported of the last attempt counts, where it was seen. The response may have the sum of
    several attempts, or of the pieces of a stream.
    """
    is_paid_before = attempts.are_several and attempts.is_free
    if is_paid_before or (answer is not None and is_cached(answer)):
        ledger.void(attempts.key)
        return 0
    count = None if answer is None else reported_count(answer)
    if count is None or attempts.reported is not None:
        return ledger.settle(attempts.key, attempts.usage()).nanousd
    return ledger.settle(attempts.key, {model_name(held.request.model): count}).nanousd


def end_call(ledger: Ledger, attempts: Attempts, error: BaseException) -> None:
    """End the holds of a failed call: void what is free, settle what was answered, cancelled, or lost.

    An answer that its client could not use was paid for. Without a hold yet, nothing is done.
    """
    with suppress(LedgerError, HoldError):
        if attempts.is_charged:
            ledger.settle(attempts.key, attempts.usage())
        elif (
            is_caller_cancelled(error)
            or isinstance(error, TimeoutError | DeadlineExceeded)
            or "Timeout" in type(error).__name__
        ):
            ledger.settle(attempts.key, None)
        else:
            ledger.void(attempts.key)
