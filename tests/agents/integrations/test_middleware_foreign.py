"""Cases in which other projects' agents miscounted or lost a question, tried on `BudgetMiddleware`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fake_chat import PRICES, both, fake, run, says
from langchain.agents import create_agent
from langchain.agents.middleware import ModelFallbackMiddleware, ModelRetryMiddleware
from langchain_core.caches import InMemoryCache
from langchain_core.messages import AIMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command

from viaticum.agents.integrations.middleware import BudgetMiddleware
from viaticum.agents.integrations.reported_usage import is_cached, reported_count
from viaticum.budgets import Ledger


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    with Ledger("memory:") as ledger:
        yield ledger
        assert ledger.check() == []
        assert all(budget.held_nanousd == 0 for budget in ledger.budgets())


@both
@pytest.mark.parametrize("usage", [(100, 50), None])
async def test_an_answer_from_langchain_s_cache_costs_nothing(
    ledger: Ledger, way: str, usage: tuple[int, int] | None
) -> None:
    model = fake(says("four", usage=usage), cache=InMemoryCache())
    budget = BudgetMiddleware("1", prices=PRICES, ledger=ledger, max_tokens=100)

    agent = create_agent(model, [], middleware=[budget])
    first = (await run(agent, way))[-1]
    spent = budget.left().posted_nanousd
    assert spent > 0
    second = (await run(agent, way))[-1]
    assert len(model.settings) == 1, "asked once"
    assert (first.content, second.content) == ("four", "four")
    assert budget.left().posted_nanousd == spent
    assert second.response_metadata["viaticum"]["cost_nanousd"] == 0


def test_what_is_cached_is_known_by_its_cost() -> None:
    usage: Any = {"input_tokens": 5, "output_tokens": 2, "total_tokens": 7}
    assert not is_cached(AIMessage("x", usage_metadata=usage))
    cached = AIMessage("x").model_copy(update={"usage_metadata": {"total_cost": 0}})
    assert is_cached(cached)
    assert reported_count(cached) is None


@pytest.mark.parametrize(
    "outer",
    [
        ModelRetryMiddleware(max_retries=2, initial_delay=0.0, jitter=False),
        ModelFallbackMiddleware(fake(says("by the other"), model="fake")),
    ],
    ids=["retry", "fallback"],
)
def test_a_question_passes_retries_and_fallbacks_around_it(ledger: Ledger, outer: Any) -> None:
    """They took an interrupt for an error of the model, tried again and lost the question."""
    model = fake(says("done"))
    budget = BudgetMiddleware("0.000000001", prices=PRICES, ledger=ledger, max_tokens=100, on_cap="ask")
    agent = create_agent(model, [], middleware=[outer, budget], checkpointer=InMemorySaver())
    config: Any = {"configurable": {"thread_id": "t"}}
    given: Any = {"messages": [("user", "go")]}
    asked = agent.invoke(given, config)["__interrupt__"][0].value
    assert asked["unit"] == "nanousd"
    raised: Any = Command(resume="raise")
    assert agent.invoke(raised, config)["messages"][-1].content == "done"
