"""Whole agents under `viaticum.budget`, none of them changed: every call that reached the provider was held.

Counted at the provider against the ledger: as many calls as posts, the same models, the same sum, 0 over.
"""

from __future__ import annotations

import asyncio
import json
import operator
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from decimal import Decimal
from functools import partial
from typing import Annotated, Any, NotRequired, TypedDict

import httpx
import openai
import pytest
from forms_server import FormsServer
from langchain.agents import create_agent
from langchain_core.messages import AnyMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import InjectedToolCallId, tool
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph, add_messages
from langgraph.prebuilt import InjectedState, ToolNode
from langgraph.types import Command

import viaticum
from viaticum.agents.instrumentation.scope import BudgetScope, paying_from
from viaticum.agents.integrations.middleware import BudgetMiddleware
from viaticum.budgets import Ledger
from viaticum.errors import InputError

PRICES = {"planner": ("1", "2"), "worker": ("1", "2"), "critic": ("1", "2")}
COST = Decimal("0.000022")  # 12 tokens read and 5 written


def check_held(server: FormsServer, budget: BudgetScope | BudgetMiddleware) -> int:
    """Every call at the provider is one post of the budget, and nothing else is; returns how many."""
    ledger, name = budget.ledger, budget.name if isinstance(budget, BudgetScope) else budget.budget_name
    assert ledger.check() == []
    state = ledger.budget(name)
    posts = [entry for entry in ledger.entries(name) if entry.kind == "post"]
    models = Counter(model for entry in posts for model in entry.usage or {})
    assert models == Counter(body["model"] for _, body in server.calls)
    assert len(posts) == len(server.calls)
    assert state.posted_usd == len(posts) * COST
    assert state.held_nanousd == 0
    assert state.limit_nanousd is None or state.posted_nanousd <= state.limit_nanousd
    return len(posts)


def model_of(server: FormsServer, name: str, **more: Any) -> ChatOpenAI:
    return ChatOpenAI(model=name, base_url=f"{server.url}/v1", api_key="k", max_tokens=64, **more)  # type: ignore[arg-type, call-arg]


def calls(*wanted: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """A message of a provider that calls tools."""
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": f"c{n}", "type": "function", "function": {"name": name, "arguments": json.dumps(given)}}
            for n, (name, given) in enumerate(wanted)
        ],
    }


def says(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def adding(body: dict[str, Any]) -> dict[str, Any]:
    """Calls `add` twice, then answers."""
    results = [each for each in body["messages"] if each["role"] == "tool"]
    return says("It is four.") if len(results) >= 2 else calls(("add", {"a": 2, "b": len(results)}))


Way = Callable[[Callable[..., Any], Any], Any]


def invoke(make: Callable[..., Any], given: Any) -> Any:
    return make().invoke(given)


def ainvoke(make: Callable[..., Any], given: Any) -> Any:
    async def run() -> Any:
        async with httpx.AsyncClient() as http:  # LangChain's own is kept from one event loop to the next
            return await make(http_async_client=http).ainvoke(given)

    return asyncio.run(run())


def stream(make: Callable[..., Any], given: Any) -> Any:
    list(make().stream(given, stream_mode="messages"))
    return None


@pytest.mark.parametrize("way", [invoke, ainvoke, stream])
def test_an_unchanged_agent_with_tools(server: FormsServer, way: Way) -> None:
    server.reply = adding
    with viaticum.budget("1", prices=PRICES) as budget:
        done = way(
            lambda **more: create_agent(model_of(server, "worker", **more), [add]),
            {"messages": [HumanMessage("2+2?")]},
        )
    assert done is None or done["messages"][-1].text == "It is four."
    assert check_held(server, budget) == 3
    assert budget.refused == budget.unheld == {}


# A graph in the manner of deepagents: a planner with a list of tasks, files, and sub-agents that are tools.


class DeepState(TypedDict):
    messages: Annotated[list[AnyMessage], add_messages]
    todos: NotRequired[list[str]]
    files: Annotated[dict[str, str], operator.or_]


def deep_agent(server: FormsServer, **more: Any) -> Any:
    """planner <-> tools; `task` runs a sub-agent of its own model, `review` asks Anthropic's SDK."""
    sub_agents = {"worker": create_agent(model_of(server, "worker"), [add], system_prompt="You work.")}

    @tool
    def write_todos(todos: list[str], call_id: Annotated[str, InjectedToolCallId]) -> Command[Any]:
        """Write the list of tasks."""
        return Command(update={"todos": todos, "messages": [ToolMessage("written", tool_call_id=call_id)]})

    @tool
    def task(who: str, what: str, call_id: Annotated[str, InjectedToolCallId]) -> Command[Any]:
        """Have a sub-agent do a task; it writes its report into a file."""
        done = sub_agents[who].invoke({"messages": [HumanMessage(what)]})["messages"][-1].text
        return Command(
            update={"files": {f"{what}.md": done}, "messages": [ToolMessage(done, tool_call_id=call_id)]}
        )

    @tool
    def review(file: str, files: Annotated[dict[str, str], InjectedState("files")]) -> str:
        """Have a critic read a file."""
        done = server.anthropic().messages.create(
            model="critic", messages=[{"role": "user", "content": files[file]}], max_tokens=64
        )
        return done.content[0].text  # type: ignore[union-attr]

    tools = [write_todos, task, review]
    planner = model_of(server, "planner", **more).bind_tools(tools)

    def plan(state: DeepState) -> dict[str, Any]:
        return {"messages": [planner.invoke([SystemMessage("You plan."), *state["messages"]])]}

    async def aplan(state: DeepState) -> dict[str, Any]:
        return {"messages": [await planner.ainvoke([SystemMessage("You plan."), *state["messages"]])]}

    def after(state: DeepState) -> str:
        return "tools" if state["messages"][-1].tool_calls else END  # type: ignore[union-attr]

    builder = StateGraph(DeepState)
    builder.add_node("plan", RunnableLambda(plan, aplan))
    builder.add_node("tools", ToolNode(tools))
    builder.add_edge(START, "plan")
    builder.add_conditional_edges("plan", after)
    builder.add_edge("tools", "plan")
    return builder.compile()


def deep_reply(body: dict[str, Any]) -> dict[str, Any]:
    """The planner writes a list, sends out two workers at once, has both reports read, and answers."""
    if body["model"] == "worker":
        return adding(body)
    step = sum(each["role"] == "assistant" for each in body["messages"])
    return [
        calls(("write_todos", {"todos": ["one", "two"]})),
        calls(*(("task", {"who": "worker", "what": what}) for what in ("one", "two"))),
        calls(*(("review", {"file": f"{what}.md"}) for what in ("one", "two"))),
        says("All done."),
    ][step]


@pytest.mark.parametrize("way", [invoke, ainvoke, stream])
def test_a_graph_with_planner_sub_agents_and_files(server: FormsServer, way: Way) -> None:
    server.reply = deep_reply
    with viaticum.budget("1", prices=PRICES) as budget:
        done = way(partial(deep_agent, server), {"messages": [HumanMessage("Do it.")], "files": {}})
    if done is not None:
        assert done["messages"][-1].text == "All done."
        assert done["files"] == {"one.md": "It is four.", "two.md": "It is four."}
        assert done["todos"] == ["one", "two"]
    assert budget.calls == {"planner": 4, "worker": 6, "critic": 2}
    assert check_held(server, budget) == 12


@pytest.mark.parametrize("limit", ["0.0006", "0.001", "0.0015", "0.002"])
def test_such_a_graph_ends_at_its_cap_and_never_over(server: FormsServer, limit: str) -> None:
    server.reply = deep_reply
    with viaticum.budget(limit, prices=PRICES) as budget, suppress(Exception):
        deep_agent(server).invoke({"messages": [HumanMessage("Do it.")], "files": {}})
    assert check_held(server, budget) < 12
    assert budget.refused["the budget is used up"] >= 1
    assert budget.left().posted_usd <= Decimal(limit)


def test_sub_agents_have_budgets_of_their_own_inside(server: FormsServer) -> None:
    """A budget in a tool stops that sub-agent, and the run goes on in the outer one."""
    server.reply = adding
    worker = create_agent(model_of(server, "worker"), [add])
    stopped = []

    @tool
    def task(what: str) -> str:
        """Have a worker do a task."""
        with viaticum.budget("0.0004") as inner:
            try:
                worker.invoke({"messages": [HumanMessage(what)]})
            except openai.APIStatusError as error:
                stopped.append(error.status_code)
        return f"{inner.left().posted_usd} spent"

    agent = create_agent(model_of(server, "planner"), [task])
    server.reply = lambda body: (
        adding(body)
        if body["model"] == "worker"
        else says("Done.") if body["messages"][-1]["role"] == "tool" else calls(("task", {"what": "x" * 40}))
    )  # fmt: skip
    with viaticum.budget("1", prices=PRICES) as outer:
        assert agent.invoke({"messages": [HumanMessage("Go.")]})["messages"][-1].text == "Done."
    assert stopped == [402]
    assert outer.left().posted_usd == len(server.calls) * COST
    assert outer.ledger.check() == []


@pytest.mark.parametrize("limit", ["1", "0.003"])
def test_a_crew_of_three_threads_under_one_budget(server: FormsServer, limit: str) -> None:
    server.reply = adding
    agents = {name: create_agent(model_of(server, name), [add]) for name in ("planner", "worker", "critic")}
    barrier, ended = threading.Barrier(3), Counter[str]()

    def work(name: str) -> None:
        barrier.wait(60)
        for number in range(5):
            try:
                agents[name].invoke({"messages": [HumanMessage(f"2+{number}?")]})
                ended["answered"] += 1
            except openai.APIStatusError as error:
                ended[f"status {error.status_code}"] += 1

    with viaticum.budget(limit, prices=PRICES) as budget:
        threads = [threading.Thread(target=work, args=(name,)) for name in agents]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert ended.total() == 15
    made = check_held(server, budget)
    assert budget.calls.total() == made
    if limit == "1":
        assert made == 15 * 3
        assert ended == {"answered": 15}
    else:
        assert made < 15 * 3
        assert budget.refused == {"the budget is used up": ended["status 402"]}


@pytest.mark.parametrize("way", [invoke, ainvoke])
def test_the_middleware_holds_what_tools_call(server: FormsServer, way: Way) -> None:
    """The agent's own calls are held by the middleware, those of its tools where they are sent: each once."""
    worker = create_agent(model_of(server, "worker"), [add])

    @viaticum.priced("0.01")
    def search(text: str) -> str:
        return "found"

    @tool
    def task(what: str) -> str:
        """Have a worker do a task, on a thread of its own, and search."""
        done: list[str] = []
        thread = threading.Thread(
            target=lambda: done.append(worker.invoke({"messages": [HumanMessage(what)]})["messages"][-1].text)
        )
        thread.start()
        thread.join()
        return done[0] + search(what)

    server.reply = lambda body: (
        adding(body)
        if body["model"] == "worker"
        else says("Done.")
        if body["messages"][-1]["role"] == "tool"
        else calls(("task", {"what": "a"}), ("task", {"what": "b"}))
    )
    with Ledger("memory:") as ledger:
        budget = BudgetMiddleware("1", prices=PRICES, ledger=ledger, max_tokens=64, hold_tools=True)
        done = way(
            lambda **more: create_agent(model_of(server, "planner", **more), [task], middleware=[budget]),
            {"messages": [HumanMessage("Go.")]},
        )
        assert done["messages"][-1].text == "Done."
        assert len(server.calls) == 2 + 2 * 3
        state = budget.left()
        assert state.posted_usd == len(server.calls) * COST + 2 * Decimal("0.01")
        assert state.held_nanousd == 0
        assert ledger.check() == []


@pytest.mark.parametrize(
    ("outer_limit", "inner_limit", "words"),
    [("1", "1", 1), ("0.006", "1", 1), ("1", "0.006", 1), ("1", "0.003", 5000), ("0.003", "1", 5000)],
)
def test_a_budget_around_the_agent_holds_what_its_tools_call_too(
    server: FormsServer, outer_limit: str, inner_limit: str, words: int
) -> None:
    """Each call is in both budgets, with a limit that both can pay for; or in none."""

    @viaticum.priced("0.0001")
    def search() -> str:
        return "found"

    @tool
    def task(what: str) -> str:
        """Ask a model without a limit, then search."""
        model = ChatOpenAI(model="worker", base_url=f"{server.url}/v1", api_key="k")  # type: ignore[arg-type]
        try:
            return str(model.invoke(what * words).text) + search()
        except openai.APIStatusError as error:
            return f"status {error.status_code}"

    server.reply = lambda body: (
        says("It is four.")
        if body["model"] == "worker" or body["messages"][-1]["role"] == "tool"
        else calls(("task", {"what": "a"}))
    )
    own = BudgetMiddleware(inner_limit, prices=PRICES, max_tokens=64, hold_tools=True, on_cap="stop")
    agent = create_agent(model_of(server, "planner"), [task], middleware=[own])
    with viaticum.budget(outer_limit, prices=PRICES) as outer:
        messages = agent.invoke({"messages": [HumanMessage("Go.")]})["messages"]
    fits = words == 1
    assert messages[2].text == ("It is four.found" if fits else "status 402")
    assert len(server.calls) == 2 + fits
    assert own.left().posted_usd == len(server.calls) * COST + fits * Decimal("0.0001")
    assert outer.left().posted_usd == own.left().posted_usd
    assert outer.left().held_nanousd == own.left().held_nanousd == 0
    assert outer.ledger.check() == own.ledger.check() == []
    if "0.006" in (outer_limit, inner_limit):
        assert 256 <= server.calls[1][1]["max_tokens"] < 4096


def test_without_it_what_tools_call_is_not_held(server: FormsServer) -> None:
    @tool
    def task(what: str) -> str:
        """Ask a model."""
        return str(model_of(server, "worker").invoke(what).text)

    server.reply = lambda body: (
        says("It is four.")
        if body["model"] == "worker" or body["messages"][-1]["role"] == "tool"
        else calls(("task", {"what": "a"}))
    )
    budget = BudgetMiddleware("1", prices=PRICES, max_tokens=64)
    create_agent(model_of(server, "planner"), [task], middleware=[budget]).invoke(
        {"messages": [HumanMessage("Go.")]}
    )
    assert len(server.calls) == 3
    assert budget.left().posted_usd == 2 * COST


def test_a_tool_s_call_that_does_not_fit_is_an_error_of_the_tool(server: FormsServer) -> None:
    @tool
    def task(what: str) -> str:
        """Ask a model much."""
        try:
            model_of(server, "worker").invoke("x" * 5000)
        except openai.APIStatusError as error:
            return f"status {error.status_code}"
        return "done"

    server.reply = lambda body: (
        says("Done.") if body["messages"][-1]["role"] == "tool" else calls(("task", {"what": "a"}))
    )
    budget = BudgetMiddleware("0.003", prices=PRICES, max_tokens=64, hold_tools=True)
    agent = create_agent(model_of(server, "planner"), [task], middleware=[budget])
    messages = agent.invoke({"messages": [HumanMessage("Go.")]})["messages"]
    assert [each.text for each in messages if isinstance(each, ToolMessage)] == ["status 402"]
    assert check_held(server, budget) == 2


def test_what_tools_call_goes_no_further_than_the_agent(server: FormsServer) -> None:
    worker = create_agent(model_of(server, "worker"), [add])

    @tool
    def task(what: str) -> str:
        """Have a worker do a task."""
        try:
            return str(worker.invoke({"messages": [HumanMessage(what)]})["messages"][-1].text)
        except openai.APIStatusError as error:
            return f"status {error.status_code}"

    server.reply = lambda body: (
        says("Done.") if body["messages"][-1]["role"] == "tool" else calls(("task", {"what": "a"}))
    )
    labels = {"planner": {"eu"}}
    given: dict[str, Any] = {"prices": PRICES, "max_tokens": 64, "hold_tools": True}
    budget = BudgetMiddleware("1", only="eu", labels=labels, **given)
    agent = create_agent(model_of(server, "planner"), [task], middleware=[budget])
    messages = agent.invoke({"messages": [HumanMessage("Go.")]})["messages"]
    assert [each.text for each in messages if isinstance(each, ToolMessage)] == ["status 403"]
    assert {body["model"] for _, body in server.calls} == {"planner"}


def test_a_budget_is_charged_once_and_never_left_out() -> None:
    """A budget in the lineage of another is paid through it; what two pay for has no third beside them."""
    with Ledger("memory:") as ledger:
        ledger.create("agent", limit_nanousd=10**9)
        priced, inside = viaticum.priced("0.4")(lambda: None), paying_from(ledger, "agent", {})
        with viaticum.budget("1") as outer:
            with inside(), inside():
                priced()
            with inside(), pytest.raises(InputError, match="open it outside"):
                viaticum.budget("0.9")
            assert outer.left().posted_nanousd == 4 * 10**8
        assert ledger.budget("agent").posted_nanousd == 4 * 10**8
        with inside(), viaticum.budget("0.5", name="kid"), inside():
            priced()
        assert ledger.budget("kid").posted_nanousd == 4 * 10**8
        assert ledger.budget("agent").posted_nanousd == 8 * 10**8
        assert ledger.check() == []


def test_three_ledgers_pay_once_for_what_a_scope_below_one_of_them_pays() -> None:
    ledgers = [Ledger("memory:") for _ in range(3)]
    for each in ledgers:
        each.create("agent", limit_nanousd=10**9)
    ledgers[0].create("kid", limit_nanousd=10**9, parent="agent")
    inside = [paying_from(each, "agent", {}) for each in ledgers]
    priced = viaticum.priced("0.1")(lambda: None)
    with inside[0](), inside[1](), inside[2](), paying_from(ledgers[0], "kid", {})():
        priced()
    posted = [each.budget("agent").posted_nanousd for each in ledgers]
    assert posted == [10**8] * 3
    assert ledgers[0].budget("kid").posted_nanousd == 10**8
    for each in ledgers:
        each.close()
