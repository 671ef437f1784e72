"""LangChain's agents with a routed model: fake models, real ledger."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_chat import CENT, add, both, call, fake, run, says
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.tools import ToolException, tool
from langgraph.checkpoint.memory import InMemorySaver

from viaticum import FakeRouter, InputError
from viaticum.agents.integrations.middleware import BudgetMiddleware
from viaticum.agents.integrations.router_middleware import RouterMiddleware
from viaticum.budgets import Ledger
from viaticum.errors import RateLimited
from viaticum.money import Price
from viaticum.routers.query import StaticRouter
from viaticum.routers.query.rtr import RTRRouter
from viaticum.types import Pair, RoutingTable, Row

ROUTER_FOLDER = Path(__file__).resolve().parents[2] / "data" / "router_v1"


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    with Ledger("memory:") as ledger:
        yield ledger
        assert ledger.check() == []
        assert all(budget.held_nanousd == 0 for budget in ledger.budgets())


def router_for(**accuracies: float) -> FakeRouter:
    return FakeRouter({f"{name}+direct": accuracy for name, accuracy in accuracies.items()}, cost=1_000_000)


def two(**fields: Any) -> dict[str, BaseChatModel]:
    """Enough answers for every test; each says its name."""
    return {name: fake(*[says(name)] * 9, model=name, **fields) for name in ("small", "large")}


@both
@pytest.mark.parametrize("per", ["run", "call"])
async def test_the_router_chooses_the_model(way: str, per: Any) -> None:
    for router, wanted in (
        (router_for(small=0.9, large=0.5), "small"),
        (router_for(small=0.4, large=0.5), "large"),
    ):
        routed = RouterMiddleware(two(), router, per=per)
        messages = await run(create_agent(fake(says("neither")), [], middleware=[routed]), way)
        assert messages[-1].content == wanted


@both
async def test_router_and_budget_together(ledger: Ledger, way: str) -> None:
    """The better model while it fits, the cheaper one after that, and then the end."""
    table = RoutingTable(
        (
            Row(Pair("large", "direct"), 0.9, 50, 50, 4_000_000, 4_000_000),
            Row(Pair("small", "direct"), 0.5, 50, 50, 100_000, 100_000),
        )
    )
    prices = {"large": (20, 40), "small": (1, 2)}
    budget = BudgetMiddleware("0.01", prices=prices, ledger=ledger, max_tokens=60)
    routed = RouterMiddleware(two(), StaticRouter(table), budget=budget, per="call")
    agent = create_agent(fake(says("neither")), [], middleware=[routed, budget])
    answers = [(await run(agent, way))[-1].text for _ in range(9)]
    assert answers[0] == "large"
    assert "small" in answers
    assert answers.index("small") > len([a for a in answers if a == "large"]) - 1
    assert budget.left().posted_nanousd <= CENT


def test_a_model_is_chosen_by_what_its_calls_can_write() -> None:
    """A thought of 30,000 tokens is too dear, but no call writes more than its limit."""
    table = RoutingTable(
        (
            Row(Pair("large", "think"), 0.9, 20_000, 30_000, 800_000_000, 1_200_000_000),
            Row(Pair("small", "direct"), 0.5, 10, 10, 10_000, 10_000),
        )
    )
    prices = {"large": (20, 40), "small": (1, 2)}
    for limit, chosen in ((100, "large"), (5_000, "small")):
        budget = BudgetMiddleware("0.01", prices=prices, max_tokens=limit)
        routed = RouterMiddleware(two(), StaticRouter(table), budget=budget)
        assert routed.choose([HumanMessage("hi")]) == chosen
    assert RouterMiddleware(two(), StaticRouter(table)).choose([HumanMessage("hi")]) == "large"


async def test_a_run_keeps_its_model_and_the_next_run_chooses_anew() -> None:
    class ProviderRateLimiter(FakeRouter):
        def __init__(self) -> None:
            super().__init__("small+direct", "large+direct")
            self.asked: list[str] = []

        def table(self, query: Any) -> Any:
            self.asked.append(query.text)
            return router_for(
                **({"small": 0.9, "large": 0.1} if "easy" in query.text else {"small": 0.1, "large": 0.9})
            ).table(query)

    router = ProviderRateLimiter()
    models = {
        "small": fake(says("", call(1, a=1, b=2)), says("small"), model="small"),
        "large": fake(says("large"), model="large"),
    }
    agent = create_agent(
        fake(), [add], middleware=[RouterMiddleware(models, router)], checkpointer=InMemorySaver()
    )
    config: Any = {"config": {"configurable": {"thread_id": "t"}}}
    assert (await run(agent, "async", "an easy one", **config))[-1].content == "small"
    assert (await run(agent, "sync", "a hard one", **config))[-1].content == "large"
    assert router.asked == ["an easy one", "a hard one"]


@tool
def shaky(text: str) -> str:
    """Works only for "right"."""
    if text != "right":
        raise ToolException("does not work")
    return "fine"


shaky.handle_tool_error = True


def shaky_call(text: str) -> dict[str, Any]:
    return {"name": "shaky", "args": {"text": text}, "id": f"call-{text}", "type": "tool_call"}


@both
async def test_errors_of_tools_call_the_better_model_until_they_are_past(way: str) -> None:
    """Two errors escalate; the better model goes on to the end of its chain; the next run begins cheap."""
    models: dict[str, BaseChatModel] = {
        "small": fake(
            says("", shaky_call("a")), says("", shaky_call("b")), says("small again"), model="small"
        ),
        "large": fake(says("", shaky_call("right")), says("done"), model="large"),
    }
    rows = (
        Row(Pair("large", "direct"), 0.805, 50, 50, 4_000_000, 4_000_000),
        Row(Pair("small", "direct"), 0.8, 50, 50, 100_000, 100_000),
    )
    router = StaticRouter(RoutingTable(rows))
    routed = RouterMiddleware(models, router, per="step", policy="within:0.01")
    agent = create_agent(fake(), [shaky], middleware=[routed], checkpointer=InMemorySaver())
    config: Any = {"config": {"configurable": {"thread_id": "t"}}}
    messages = await run(agent, way, **config)
    chosen = [each.response_metadata["viaticum"]["model"] for each in messages if isinstance(each, AIMessage)]
    assert chosen == ["small", "small", "large", "large"]
    assert (await run(agent, way, "another one", **config))[-1].text == "small again"


@both
async def test_a_conversation_keeps_its_model_while_a_switch_costs_more_than_it_saves(
    ledger: Ledger, way: str
) -> None:
    """The last answer was by the dear model, which has a long prompt in its cache."""
    prices = {
        "small": Price(1_000_000_000, 2_000_000_000, cached_nanousd_per_million=100_000_000),
        "large": Price(2_000_000_000, 4_000_000_000, cached_nanousd_per_million=200_000_000),
    }
    budget = BudgetMiddleware("1", prices=prices, ledger=ledger, max_tokens=60)
    for read, kept in ((50_000, "large"), (50, "small")):
        routed = RouterMiddleware(
            two(), router_for(small=0.8, large=0.8), budget=budget, per="step", policy="within:0.01"
        )
        routed._lengths.append(1)  # runs of one step
        earlier = AIMessage(
            "so it is",
            usage_metadata={"input_tokens": read, "output_tokens": 5, "total_tokens": read + 5},
            response_metadata={"viaticum": {"model": "large"}},
        )
        agent = create_agent(fake(), [], middleware=[routed, budget])
        asked: Any = {"messages": [HumanMessage("is it so?"), earlier, HumanMessage("and now?")]}
        done = agent.invoke(asked) if way == "sync" else await agent.ainvoke(asked)
        assert done["messages"][-1].text == kept


def test_a_router_that_knows_none_of_the_models_says_so() -> None:
    routed = RouterMiddleware({"tiny": fake(says())}, router_for(small=0.5))
    with pytest.raises(InputError, match="knows none of the models tiny; it knows: small"):
        create_agent(fake(says()), [], middleware=[routed]).invoke({"messages": [HumanMessage("hi")]})


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"models": {}}, "no model"),
        ({"models": {"a": "b"}}, "a chat model"),
        ({"models": 5}, "a dict of chat models"),
        ({"per": "day"}, "use run, call or step"),
        ({"budget": "0.1"}, "a BudgetMiddleware"),
        ({"policy": 5}, "policy is"),
        ({"router": None}, "router is"),
        ({"router": "nowhere"}, "nowhere"),
        ({"router": ROUTER_FOLDER}, "knows none of the models small, large; it knows: big, fresh"),
    ],
)
def test_wrong_settings_of_the_router_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        RouterMiddleware(**{"models": two(), "router": router_for(small=1), **settings})


def test_a_router_is_taken_from_its_folder() -> None:
    known = RTRRouter.load(ROUTER_FOLDER).pairs[0].model
    for folder in (ROUTER_FOLDER, str(ROUTER_FOLDER)):
        routed = RouterMiddleware({known: fake(says())}, folder)
        assert isinstance(routed.router, RTRRouter)


class Gone(Exception):
    """An error of a provider's library, with the HTTP status that all of them carry."""

    def __init__(self, status: int, text: str = "no") -> None:
        super().__init__(text)
        self.status_code = status


@both
@pytest.mark.parametrize(
    "error",
    [
        Gone(429),
        Gone(503, "overloaded"),
        Gone(400, "blocked by the content management policy"),
        Gone(400, "maximum context length is 100 tokens"),
        ConnectionError("no route"),
        RateLimited("later"),
    ],
    ids=lambda error: f"{type(error).__name__}-{error}",
)
async def test_the_next_model_answers_where_one_fails(ledger: Ledger, way: str, error: Exception) -> None:
    """Each call has a hold of its own, the failed one is free, and the run stays with the second model."""
    large = fake(error, *[says("large")] * 3, model="large")
    small = fake(says("", call(1, a=1, b=2)), says("small"), model="small")
    budget = BudgetMiddleware("0.01", prices={"large": (1, 2), "small": (1, 2)}, ledger=ledger)
    routed = RouterMiddleware(
        {"small": small, "large": large}, router_for(small=0.4, large=0.9), budget=budget
    )
    agent = create_agent(fake(), [add], middleware=[routed, budget])
    assert (await run(agent, way))[-1].content == "small"
    assert (len(large.settings), len(small.settings)) == (1, 2)
    entries = ledger.entries(budget.budget_name)
    sent = {entry.key for entry in entries if entry.kind == "dispatch"}
    ends = [entry.kind for entry in entries if entry.key in sent and entry.kind in ("void", "post")]
    assert ends == ["void", "post", "post"]
    assert (await run(agent, way))[-1].content == "large", "the next run chooses anew"


async def test_the_model_of_a_call_is_chosen_anew_after_one_failed() -> None:
    large = fake(Gone(429), says("large"), model="large")
    small = fake(says("", call(1, a=1, b=2)), model="small")
    routed = RouterMiddleware({"small": small, "large": large}, router_for(small=0.4, large=0.9), per="call")
    messages = await run(create_agent(fake(), [add], middleware=[routed]), "sync")
    assert messages[-1].content == "large"


async def test_what_another_model_cannot_mend_is_raised(ledger: Ledger) -> None:
    for error in (Gone(401), Gone(400, "unknown parameter"), ValueError("a bug"), KeyError("a")):
        large, small = fake(error, model="large"), fake(says("small"), model="small")
        routed = RouterMiddleware({"small": small, "large": large}, router_for(small=0.4, large=0.9))
        with pytest.raises(type(error)):
            await run(create_agent(fake(), [], middleware=[routed]), "sync")
        assert not small.settings


async def test_with_every_model_away_the_last_error_is_raised(ledger: Ledger) -> None:
    models = {name: fake(Gone(429, name), model=name) for name in ("small", "large", "third")}
    prices = dict.fromkeys(models, (1, 2))
    budget = BudgetMiddleware("0.01", prices=prices, ledger=ledger)
    routed = RouterMiddleware(models, router_for(small=0.4, large=0.9), budget=budget)
    with pytest.raises(Gone, match="third"):
        await run(create_agent(fake(), [], middleware=[routed, budget]), "async")
    assert ledger.budget(budget.budget_name).posted_nanousd == 0


async def test_marks_of_anthropic_s_cache_reach_no_other_model(ledger: Ledger) -> None:
    """Middleware before the router sets them for the agent's own model."""

    class Marks(AgentMiddleware[Any, Any, Any]):
        def wrap_model_call(self, request: Any, handler: Any) -> Any:
            mark = {"cache_control": {"type": "ephemeral"}}
            marked = HumanMessage([{"type": "text", "text": "hi", **mark}])
            return handler(request.override(model_settings=mark, messages=[marked]))

    models = {name: fake(Gone(529), says(name), model=name) for name in ("small", "large")}
    budget = BudgetMiddleware("0.01", prices={"small": (1, 2), "large": (1, 2)}, ledger=ledger)
    routed = RouterMiddleware(dict(models), router_for(small=0.4, large=0.9))
    with pytest.raises(Gone):
        await run(create_agent(fake(), [], middleware=[Marks(), routed, budget]), "sync")
    assert [set(each) & {"cache_control"} for model in models.values() for each in model.settings] == [
        set(),
        set(),
    ]
