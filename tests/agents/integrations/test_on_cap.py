"""What an agent does when a call does not fit in its budget: finish, take a cheaper model, ask, or stop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fake_chat import Fake, add, both, call, fake, run, says
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command

from viaticum import BudgetExceeded
from viaticum.agents.integrations.middleware import BudgetMiddleware
from viaticum.agents.integrations.wrap_up import CUT, INSTRUCTION, cut_to, last_prompt
from viaticum.budgets import Ledger
from viaticum.errors import DecisionNeeded

PRICES = {"worker": (10, 20), "small": (1, 2)}


class Worker(Fake):
    """Calls a tool for ever; reads a token a byte, writes its limit. seen: what it was given."""

    model: str = "worker"
    seen: list[Any] = []  # noqa: RUF012
    messages: Any = ()

    def _generate(
        self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> ChatResult:
        self.seen.append((messages, kwargs))
        read, written = sum(len(str(each.text)) for each in messages) + 1, kwargs["max_tokens"]
        usage: Any = {"input_tokens": read, "output_tokens": written, "total_tokens": read + written}
        calls = [call(len(self.seen), a=1, b=2)]  # even where it may not
        message = AIMessage(f"step {len(self.seen)}", tool_calls=calls, usage_metadata=usage)  # type: ignore[arg-type]
        return ChatResult(generations=[ChatGeneration(message=message)])


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    with Ledger("memory:") as ledger:
        yield ledger
        assert ledger.check() == []
        assert all(budget.held_nanousd == 0 for budget in ledger.budgets())
        for budget in ledger.budgets():
            assert budget.posted_nanousd <= (budget.limit_nanousd or 0)


def middleware(ledger: Ledger, budget: str = "0.2", **settings: Any) -> BudgetMiddleware:
    return BudgetMiddleware(budget, prices=PRICES, ledger=ledger, **{"max_tokens": 100, **settings})


@both
async def test_one_last_call_wraps_up_what_is_there(ledger: Ledger, way: str) -> None:
    worker = Worker(seen=[])
    budget = middleware(ledger)
    messages = await run(create_agent(worker, [add], middleware=[budget], system_prompt="Be brief"), way)
    *_, before, last = worker.seen
    assert len(worker.seen) > 3
    assert len(before[0]) > 3
    prompt = last[0][0].text
    assert len(last[0]) == 1
    assert prompt.startswith("System: Be brief\n\nUser: What is 1 + 2?")
    assert 'Assistant called add({"a": 1, "b": 2})\n\nTool add: 3' in prompt
    assert prompt.endswith(INSTRUCTION)
    assert not last[1].get("tools")
    answer = messages[-1]
    assert isinstance(answer, AIMessage)
    assert (answer.content, answer.tool_calls) == (f"step {len(worker.seen)}", [])
    assert answer.response_metadata["finish_reason"] == "budget"
    posts = [entry for entry in ledger.entries(budget.budget_name) if entry.kind == "post"]
    assert len(posts) == len(worker.seen)


async def test_the_last_call_goes_to_the_cheapest_model(ledger: Ledger) -> None:
    worker, small = Worker(seen=[]), fake(says("So far: 3"), model="small")
    budget = middleware(ledger, cheaper=[small])
    messages = await run(create_agent(worker, [add], middleware=[budget]), "sync")
    assert messages[-1].content == "So far: 3"
    assert len(small.settings) == 1


async def test_a_long_result_is_cut_to_what_is_held(ledger: Ledger) -> None:
    @tool
    def search(query: str) -> str:
        """Search."""
        return "x" * 30_000

    asks = fake(says("", call(1, "search", query="all")), says("the end"), model="small")
    budget = middleware(ledger, "0.01")
    messages = await run(create_agent(asks, [search], middleware=[budget]), "sync")
    assert messages[-1].content == "the end"
    assert budget.left().posted_nanousd <= 10_000_000


async def test_an_agent_that_cannot_pay_for_a_call_is_told(ledger: Ledger) -> None:
    worker = Worker(seen=[])
    messages = await run(create_agent(worker, [add], middleware=[middleware(ledger, "0.000001")]), "sync")
    assert "the budget is used up" in str(messages[-1].text)
    assert worker.seen == []


async def test_every_run_holds_its_own_last_call(ledger: Ledger) -> None:
    budget = middleware(ledger, "1")
    agent = create_agent(fake(*[says()] * 4, model="small"), [add], middleware=[budget])
    for way in ("sync", "async", "sync"):
        assert (await run(agent, way))[-1].content == "done"
        assert budget.left().held_nanousd == 0
    broken = create_agent(fake(ValueError("no"), model="small"), [add], middleware=[budget])
    with pytest.raises(ValueError, match="no"):
        await run(broken, "sync")


@both
async def test_cheaper_models_go_on_where_the_agent_s_own_does_not_fit(ledger: Ledger, way: str) -> None:
    worker = Worker(seen=[])
    small = fake(*(says("", call(n, a=n, b=n)) for n in range(2)), says("by the small one"), model="small")
    budget = middleware(ledger, on_cap="cheaper", cheaper=[small])
    messages = await run(create_agent(worker, [add], middleware=[budget]), way)
    assert messages[-1].content == "by the small one"
    assert len(worker.seen) > 1
    assert [bool(each.get("tools")) for each in small.settings] == [True] * 3


@both
@pytest.mark.parametrize("decision", ["raise", "cheaper", "finish", "stop"])
async def test_a_person_decides(ledger: Ledger, way: str, decision: str) -> None:
    worker = Worker(seen=[])
    small = fake(*[says("by the small one")] * 2, model="small")
    budget = middleware(ledger, "0.06", on_cap="ask", cheaper=[small])
    agent = create_agent(worker, [add], middleware=[budget], checkpointer=InMemorySaver())
    config: Any = {"configurable": {"thread_id": "t"}}
    start: Any = {"messages": [HumanMessage("What is 1 + 2?")]}
    asked = agent.invoke(start, config)["__interrupt__"][0].value
    made = len(worker.seen)
    assert made > 0
    assert [option["do"] for option in asked["options"]] == ["raise", "cheaper", "finish", "stop"]
    assert asked["needed"] > asked["left"]
    assert asked["wanted"] == {"model": "worker", "cost_worst": asked["needed"]}
    go: Any = Command(resume=decision)
    out = agent.invoke(go, config) if way == "sync" else await agent.ainvoke(go, config)
    if decision == "raise":
        assert len(worker.seen) == made + 1
        assert "__interrupt__" in out, "it asks again at the next call"
        assert budget.left().limit_nanousd == 60_000_000 + asked["needed"] - asked["left"]
    else:
        assert len(worker.seen) == made
        wanted = "the budget is used up" if decision == "stop" else "by the small one"
        assert wanted in out["messages"][-1].text
        assert len(small.settings) == (decision != "stop")


async def test_a_wrong_decision_is_asked_again(ledger: Ledger) -> None:
    budget = middleware(ledger, "0.001", on_cap="ask")
    agent = create_agent(Worker(seen=[]), [add], middleware=[budget], checkpointer=InMemorySaver())
    config: Any = {"configurable": {"thread_id": "t"}}
    start: Any = {"messages": [HumanMessage("hi")]}
    assert "__interrupt__" in agent.invoke(start, config)
    again: Any = agent.invoke(Command(resume="cheaper"), config)
    assert "nothing cheaper fits" in again["__interrupt__"][0].value["problem"]
    assert "used up" in agent.invoke(Command(resume="stop"), config)["messages"][-1].text


async def test_without_a_checkpointer_the_question_is_an_error(ledger: Ledger) -> None:
    budget = middleware(ledger, "0.001", on_cap="ask")
    with pytest.raises(DecisionNeeded, match="decide: raise or finish or stop") as caught:
        await run(create_agent(Worker(seen=[]), [add], middleware=[budget]), "sync")
    assert isinstance(caught.value, BudgetExceeded)


def test_a_prompt_is_cut_in_its_middle() -> None:
    messages = [SystemMessage("S"), HumanMessage("the task"), ToolMessage("y" * 5000, tool_call_id="1")]
    whole = last_prompt(messages)
    for most in (1000, 400, 300):
        cut = cut_to(whole, most, len)
        assert len(cut) <= most
        assert CUT in cut
        assert cut.startswith("System: S\n\nUser: the task"[: most - len(INSTRUCTION) - len(CUT) - 20])
        assert cut.endswith(INSTRUCTION)
    assert cut_to(whole, 9000, len) == whole
    assert cut_to(whole, len(INSTRUCTION), len) == INSTRUCTION
    assert cut_to(whole, 5, len) == ""
