"""Scripted models with prices for examples/agent_plain.py and agent_budget.py, so that they run offline.

The models reason in text, as ReAct (arXiv 2210.03629) does: "Action: calculator: 17 * 23", or the answer.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langgraph.graph import END, MessagesState

from viaticum import Pair, Query, RoutingTable, ScriptedModel
from viaticum.catalogue import ModelSpec
from viaticum.models.base import Generation
from viaticum.routers.query import QueryRouter
from viaticum.types import Message, Row

QUESTIONS = (
    "What is 17 * 23?",
    "What is 1200 - 345?",
    "Why does a budget need a ledger?",
    "What is 64 + 46?",
)
PRICES = {
    "cheap": Decimal("0.15"),
    "expensive": Decimal(3),
}  # dollars per million tokens; a word is one token here
SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
SUM = re.compile(r"(\d+) ([-+*]) (\d+)")


def say(question: str) -> str:
    """The reply of every model here: call the calculator, report its result, or answer directly."""
    if question.startswith("Observation: "):
        return f"The answer is {question.removeprefix('Observation: ')}."
    found = SUM.search(question)
    return f"Action: calculator: {found[0]}" if found else "So that nothing is spent twice."


def act(state: MessagesState) -> dict[str, Any]:
    """Run the calculator on the model's request."""
    found = SUM.search(str(state["messages"][-1].content))
    assert found is not None
    return {"messages": [HumanMessage(f"Observation: {SIGNS[found[2]](int(found[1]), int(found[3]))}")]}


def after_thinking(state: MessagesState) -> str:
    return "act" if str(state["messages"][-1].content).startswith("Action: ") else END


class OneModel(BaseChatModel):
    """A LangChain chat model without a budget. spent: nano-dollars."""

    spent: int = 0

    @property
    def _llm_type(self) -> str:
        return "offline"

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        text = say(str(messages[-1].content))
        words = sum(len(str(message.content).split()) for message in messages) + len(text.split())
        self.spent += words * int(PRICES["expensive"] * 1000)
        return ChatResult(generations=[ChatGeneration(message=AIMessage(text))])


def script(messages: Sequence[Message], generation: Generation) -> str:
    return say(messages[-1]["content"])


MODELS = {
    name: ScriptedModel(
        script,
        spec=ModelSpec(
            name=name,
            description=f"The {name} model.",
            kind="scripted",
            context_length=4096,
            input_price=price,
            output_price=price,
        ),
    )
    for name, price in PRICES.items()
}


class WhyRouter(QueryRouter):
    """Expects the cheap model to be as accurate as the expensive one, except for questions that ask why."""

    def table(self, query: Query) -> RoutingTable:
        cheap = 0.5 if "why" in query.text.lower() else 0.9
        return RoutingTable(
            (
                Row(Pair("cheap", "chat"), cheap, 8, 16, 3_000, 6_000),
                Row(Pair("expensive", "chat"), 0.9, 8, 16, 60_000, 120_000),
            )
        )


expensive = OneModel()
router = WhyRouter()
