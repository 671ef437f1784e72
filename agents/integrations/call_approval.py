"""What a person is asked where an agent's call does not fit, or no time is left for it, and in which runs.

Leaves out interrupts and decisions (`viaticum.agents.workflow.approval`).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from langchain.agents.middleware import ModelRequest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage

from viaticum.agents.integrations.call_bounds import model_name
from viaticum.budgets import Budget
from viaticum.errors import BudgetError, BudgetExceeded, DeadlineExceeded

Capped = BudgetExceeded | DeadlineExceeded
MOST_RUNS = 10_000


class AskedRuns:
    """The runs of one middleware in which a person may have been asked and the decision was not carried out.

    Those that were asked here, and those that another process began, of which nothing is known.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[str, bool] = OrderedDict()
        self._lock = threading.Lock()

    def is_open(self, run: str) -> bool:
        return bool(run) and self._open.get(run, True)

    def ask(self, run: str) -> None:
        self._set(run, True)

    def close(self, run: str) -> None:
        """Nobody was asked in this run, or the decision is being carried out."""
        self._set(run, False)

    def end(self, run: str) -> None:
        with self._lock:
            self._open.pop(run, None)

    def _set(self, run: str, is_open: bool) -> None:
        with self._lock:
            self._open.pop(run, None)
            self._open[run] = is_open
            while len(self._open) > MOST_RUNS:
                self._open.popitem(last=False)


def asked_before(budget: str, seconds: float | None) -> Capped:
    """Why a person may have been asked in a step that another process began.

    Args:
        budget: that pays.
        seconds: of a whole run, about which it was if there is such a limit.
    """
    why = "a person was asked about it in this step"
    return BudgetExceeded(why, budget=budget) if seconds is None else DeadlineExceeded(why)


def approval_request(
    error: Capped,
    budget: Budget,
    seconds: float | None,
    model: BaseChatModel,
    last: BaseChatModel,
    cheaper: Sequence[BaseChatModel],
) -> dict[str, Any]:
    """The call with its worst case, what is left, and the options, as plain JSON.

    Args:
        error: why it is asked.
        budget: the scope that is short, or that pays.
        seconds: of a whole run, which "raise" gives once more where time was over.
        model: whose call it is.
        last: the model of the last call.
        cheaper: models that may be called instead.
    """
    unit: str = "seconds"
    limit: float | None = seconds
    needed: float = seconds or 0
    left: float = 0
    if isinstance(error, BudgetExceeded):
        unit, needed, left = error.unit, error.needed, error.left
        limit = budget.limit_tokens if unit == "tokens" else budget.limit_nanousd
    options: list[dict[str, Any]] = [{"do": "raise", f"by_{unit}": needed - left}]
    if cheaper:
        options.append({"do": "cheaper", "models": [model_name(each) for each in cheaper]})
    options += [{"do": "finish", "model": model_name(last)}, {"do": "stop"}]
    return {
        "why": str(error),
        "budget": budget.name,
        "unit": unit,
        "limit": limit,
        "needed": needed,
        "left": left,
        "wanted": {"model": model_name(model), "cost_worst": needed},
        "options": options,
    }


def stopped_message(error: BudgetError | DeadlineExceeded, budget: Budget, model: str) -> AIMessage:
    """The words that end a run. budget: that pays; model: whose call was not made."""
    is_late = isinstance(error, DeadlineExceeded)
    metadata = {
        "finish_reason": "deadline" if is_late else "budget",
        "budget": budget.name,
        "left_nanousd": budget.left_nanousd,
        "model_name": model,
    }
    why = "the time is over" if is_late else "the budget is used up"
    return AIMessage(f"Stopped, {why}: {error}", response_metadata=metadata)


def can_interrupt(request: ModelRequest[Any]) -> bool:
    """Whether the agent has a thread, in whose checkpoint a question can wait."""
    info = request.runtime.execution_info if request.runtime is not None else None
    return info is not None and info.thread_id is not None
