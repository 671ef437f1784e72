"""What a message of `ChatViaticum` says: its metadata, and the text of a routed answer.

Leaves out the conversion of messages (`viaticum.agents.integrations.langchain_messages`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from viaticum.agents.workflow.calls import SettledCall
from viaticum.budgets import Budget
from viaticum.money import usd_digits
from viaticum.types import Answer


def call_metadata(model: str, call: SettledCall, budget: Budget) -> dict[str, Any]:
    """Of a plain chat. budget: after it."""
    done = call.completion
    found = _metadata(model, model, done.finish_reason, call.entry.nanousd, budget)
    if done.logprobs:
        found["logprobs"] = {"content": list(done.logprobs)}
    if done.warnings:
        found["warnings"] = list(done.warnings)
    return found


def answer_metadata(name: str, answer: Answer, budget: Budget) -> dict[str, Any]:
    """Of an answer of the workflow. name: of the chat, for an answer that no pair was asked for."""
    last = answer.routes[-1] if answer.routes else None
    model, pair = (name, name) if last is None else (last.pair.model, str(last.pair))
    found = _metadata(model, pair, answer.finish_reason, answer.cost, budget)
    found |= {"answer": answer.value, "routes": [str(route.pair) for route in answer.routes]}
    return found if last is None else {**found, "why": last.why}


def _metadata(model: str, route: str, finish_reason: str, cost: int, budget: Budget) -> dict[str, Any]:
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
