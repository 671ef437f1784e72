"""What a message of `ChatViaticum` says: its metadata, and the text of a routed answer.

Leaves out the conversion of messages (`viaticum.agents.integrations.langchain_messages`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from viaticum.budgets import Budget
from viaticum.money import usd_digits
from viaticum.types import Answer


def response_metadata(
    model: str, route: str, finish_reason: str, cost: int, budget: Budget
) -> dict[str, Any]:
    left = budget.left_nanousd
    return {
        "model_name": model,
        "model_provider": "viaticum",
        "route": route,
        "finish_reason": finish_reason,
        "cost_nanousd": cost,
        "cost_usd": usd_digits(cost),
        "left_nanousd": left,
        "left_usd": None if left is None else usd_digits(left),
        "budget": budget.name,
    }


def text_with_answer(answer: Answer) -> str:
    """The text, followed by the answer if it does not contain it: a program's output, a vote."""
    if answer.value is None or answer.value in answer.text:
        return answer.text
    return f"{answer.text}\n\nAnswer: {answer.value}".lstrip()


def cut_at(text: str, stops: Sequence[str]) -> str:
    ends = [index for stop in stops if stop and (index := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))]
