"""What a person is asked where an agent's call does not fit, or no time is left for it.

Leaves out interrupts and decisions (`viaticum.agents.workflow.approval`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.language_models import BaseChatModel

from viaticum.agents.integrations.call_bounds import model_name
from viaticum.budgets import Budget
from viaticum.errors import BudgetExceeded, DeadlineExceeded

Capped = BudgetExceeded | DeadlineExceeded


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
