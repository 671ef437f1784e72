"""LangChain's agents within a budget, or with a routed model: fake models, real ledger."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from fake_chat import CENT, PRICES, Fake, add, both, call, fail, fake, run, says
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.outputs import ChatResult
from langgraph.checkpoint.memory import InMemorySaver

from viaticum import BudgetExceeded, ChatViaticum, FakeRouter, InputError, ScriptedModel
from viaticum.agents.integrations.call_bounds import model_name
from viaticum.agents.integrations.middleware import BudgetMiddleware
from viaticum.budgets import Ledger
from viaticum.errors import UnknownPrice
from viaticum.money import Price


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    with Ledger("memory:") as ledger:
        yield ledger
        assert ledger.check() == []
        assert all(budget.held_nanousd == 0 for budget in ledger.budgets())


@both
async def test_every_call_of_an_agent_is_held_and_then_charged_what_it_used(ledger: Ledger, way: str) -> None:
    budget = BudgetMiddleware("0.01", prices=PRICES, ledger=ledger, max_tokens=200)
    model = fake(says("", call(1, a=1, b=2), call(2, a=3, b=4)), says("3 and 7"))
    messages = await run(create_agent(model, [add], middleware=[budget]), way)
    assert messages[-1].content == "3 and 7"
    assert sorted(m.content for m in messages if isinstance(m, ToolMessage)) == ["3", "7"]
    assert budget.left().posted_nanousd == 2 * (100 * 1_000 + 50 * 2_000)
    entries = ledger.entries(budget.budget_name)
    posted = {entry.key for entry in entries if entry.kind == "post"}
    assert len(posted) == 2
    last = [entry.kind for entry in entries if entry.key not in posted]
    assert last == ["limit", "reserve", "reserve", "void", "void"], "money for a last call, at each call"
    entries = [entry for entry in entries if entry.key in posted]
    assert [entry.kind for entry in entries] == ["reserve", "dispatch", "post"] * 2
    assert [kwargs["max_tokens"] for kwargs in model.settings] == [
        200,
        200,
    ]  # what was reserved is what was sent
    reserved = [entry for entry in entries if entry.kind == "reserve"]
    assert all(entry.usage["fake"].output_tokens == 200 for entry in reserved)
    assert reserved[1].usage["fake"].input_tokens > reserved[0].usage["fake"].input_tokens > 600
    assert messages[-1].response_metadata["viaticum"]["cost_nanousd"] == 200_000


@both
async def test_a_budget_that_runs_out_in_the_middle_raises(ledger: Ledger, way: str) -> None:
    budget = BudgetMiddleware("0.0025", prices=PRICES, ledger=ledger, max_tokens=500, on_cap="stop")
    model = fake(*(says("", call(n, a=n, b=n), usage=(200, 300)) for n in range(100)))
    with pytest.raises(BudgetExceeded):
        await run(create_agent(model, [add], middleware=[budget]), way)
    assert len(model.settings) >= 1
    assert budget.left().posted_nanousd == len(model.settings) * 800_000 <= 2_500_000


@both
async def test_a_model_without_a_price_is_refused_unless_it_is_allowed_by_name(
    ledger: Ledger, way: str
) -> None:
    budget = BudgetMiddleware("0.01", prices={"other": Price.per_million(1, 1)}, ledger=ledger)
    model = fake(says())
    with pytest.raises(UnknownPrice, match="fake"):
        await run(create_agent(model, [], middleware=[budget]), way)
    assert model.settings == []
    allowed = BudgetMiddleware("0.01", prices={}, ledger=ledger, unpriced=["fake"])
    assert (await run(create_agent(model, [], middleware=[allowed]), way))[-1].content == "done"
    assert (allowed.left().posted_nanousd, allowed.left().posted_tokens) == (0, 150)


@both
async def test_a_call_that_fails_is_free_and_one_that_times_out_is_not(ledger: Ledger, way: str) -> None:
    budget = BudgetMiddleware("0.01", prices=PRICES, ledger=ledger)
    with pytest.raises(ValueError, match="it broke"):
        await run(create_agent(fake(ValueError("it broke")), [], middleware=[budget]), way)
    assert budget.left().posted_nanousd == 0
    with pytest.raises(TimeoutError):
        await run(create_agent(fake(TimeoutError("slow")), [], middleware=[budget]), way)
    assert budget.left().posted_nanousd > 1024 * 2_000


@both
async def test_usage_that_is_missing_costs_what_was_held(ledger: Ledger, way: str) -> None:
    budget = BudgetMiddleware("0.01", prices=PRICES, ledger=ledger, max_tokens=300)
    await run(create_agent(fake(says(usage=None)), [], middleware=[budget]), way)
    held = [entry.nanousd for entry in ledger.entries(budget.budget_name) if entry.kind == "reserve"]
    assert budget.left().posted_nanousd == held[0] > 600_000


async def test_a_cancelled_call_costs_what_was_held(ledger: Ledger) -> None:
    class Slow(Fake):
        async def _agenerate(self, *args: Any, **kwargs: Any) -> ChatResult:
            await asyncio.sleep(60)
            raise AssertionError

    budget = BudgetMiddleware("0.01", prices=PRICES, ledger=ledger)
    model = Slow(messages=iter(()), settings=[])
    task = asyncio.create_task(run(create_agent(model, [], middleware=[budget]), "async"))
    while budget.left().held_nanousd == 0:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert budget.left().posted_nanousd > 0


@both
async def test_a_tool_that_fails_leaves_the_ledger_whole(ledger: Ledger, way: str) -> None:
    budget = BudgetMiddleware("0.01", prices=PRICES, ledger=ledger)
    agent = create_agent(fake(says("", call(1, "fail"))), [fail], middleware=[budget])
    with pytest.raises(ValueError, match="no"):
        await run(agent, way)
    assert budget.left().posted_nanousd == 200_000


async def test_many_agents_share_one_budget(ledger: Ledger) -> None:
    budget = BudgetMiddleware("0.003", prices=PRICES, ledger=ledger, max_tokens=200)

    async def one() -> str:
        return (await run(create_agent(fake(says(usage=(100, 100))), [], middleware=[budget]), "async"))[
            -1
        ].text

    texts = await asyncio.gather(*(one() for _ in range(20)))
    answered = texts.count("done")
    assert 0 < answered < 20
    assert budget.left().posted_nanousd == answered * 300_000 <= 3_000_000


@both
async def test_structured_answers(ledger: Ledger, way: str) -> None:
    from langchain.agents.structured_output import ToolStrategy
    from pydantic import BaseModel

    class Sum(BaseModel):
        """A sum."""

        value: int

    budget = BudgetMiddleware("0.01", prices=PRICES, ledger=ledger)
    model = fake(says("", call(1, "Sum", value=3)))
    agent = create_agent(model, [], middleware=[budget], response_format=ToolStrategy(Sum))
    given: Any = {"messages": [HumanMessage("1 + 2")]}
    out = agent.invoke(given) if way == "sync" else await agent.ainvoke(given)
    assert out["structured_response"] == Sum(value=3)
    assert budget.left().posted_nanousd == 200_000


def test_wrong_settings_are_refused(ledger: Ledger) -> None:
    for settings, text in [
        ({"budget": 0}, "above zero"),
        ({"budget": 1, "on_cap": "end"}, "use finish, cheaper, ask, stop"),
        ({"budget": 1, "cheaper": "gpt"}, "cheaper"),
        ({"budget": 1, "max_tokens": 0}, "max_tokens is at least 1"),
        ({"budget_name": "nobody"}, "nobody"),
    ]:
        with pytest.raises(InputError, match=text):
            BudgetMiddleware(prices=PRICES, ledger=ledger, **settings)  # type: ignore[arg-type]


def test_an_existing_budget_is_used(ledger: Ledger) -> None:
    ledger.create("team", limit_nanousd=CENT)
    budget = BudgetMiddleware(prices=PRICES, ledger=ledger, budget_name="team")
    create_agent(fake(says()), [], middleware=[budget]).invoke({"messages": [HumanMessage("hi")]})
    assert ledger.budget("team").posted_nanousd == 200_000


def test_names_of_models() -> None:
    assert model_name(fake(says())) == "fake"
    assert model_name(ChatViaticum(model="x")) == "x"
    assert model_name(GenericFakeChatModel(messages=iter([]))) == "GenericFakeChatModel"


# The router


async def test_our_chat_model_inside_an_agent(tmp_path: Any) -> None:
    models = {"m": ScriptedModel("The answer is 42.", name="m")}
    with ChatViaticum(budget="0.1", models=models, router=FakeRouter("m+direct"), folder=tmp_path) as chat:  # type: ignore[arg-type]
        agent = create_agent(chat, [], checkpointer=InMemorySaver())
        for _ in range(2):
            config: Any = {"config": {"configurable": {"thread_id": "t"}}}
            assert (await run(agent, "async", "What is 6 * 7?", **config))[-1].content == "The answer is 42."
        assert chat._client().ledger.check() == []


@both
async def test_settings_that_name_another_model_are_refused(ledger: Ledger, way: str) -> None:
    """LangChain sends them with the call, which would be held at the price of the first."""

    class Other(AgentMiddleware):
        def wrap_model_call(self, request: Any, handler: Any) -> Any:
            return handler(request.override(model_settings={"model": "dear"}))

        async def awrap_model_call(self, request: Any, handler: Any) -> Any:
            return await handler(request.override(model_settings={"model": "dear"}))

    budget = BudgetMiddleware("0.01", prices=PRICES, ledger=ledger, max_tokens=200)
    model = fake(says("never"))
    with pytest.raises(InputError, match="model='dear' in the settings of a call names another model"):
        await run(create_agent(model, [], middleware=[Other(), budget]), way)
    assert not model.settings
