"""LangChain's agents within a budget, or with a routed model: fake models, real ledger."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.language_models import BaseChatModel
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver

from viaticum import BudgetExceeded, ChatViaticum, FakeRouter, InputError, ScriptedModel
from viaticum.agents.integrations.middleware import BudgetMiddleware, RouterMiddleware, model_name
from viaticum.budgets import Ledger
from viaticum.errors import UnknownPrice
from viaticum.money import Price
from viaticum.routers.query.rtr import RTRRouter

CENT = 10_000_000
ROUTER_FOLDER = Path(__file__).resolve().parents[2] / "data" / "router_v1"
PRICES = {"fake": (1, 2)}  # dollars for a million tokens, read and made


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@tool
def fail() -> str:
    """Fail."""
    raise ValueError("no")


class Fake(GenericFakeChatModel):
    """Says its messages one after the other, takes tools, and goes by a name."""

    model: str = "fake"
    settings: list[Any] = []  # noqa: RUF012
    messages: Any

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self.bind(tools=tools, **kwargs)

    def _generate(
        self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> ChatResult:
        self.settings.append(kwargs)
        message = next(self.messages)
        if isinstance(message, BaseException):
            raise message
        return ChatResult(generations=[ChatGeneration(message=message)])


def says(text: str = "done", *calls: dict[str, Any], usage: tuple[int, int] | None = (100, 50)) -> AIMessage:
    metadata = (
        None
        if usage is None
        else {"input_tokens": usage[0], "output_tokens": usage[1], "total_tokens": sum(usage)}
    )
    return AIMessage(text, tool_calls=list(calls), usage_metadata=metadata)  # type: ignore[arg-type]


def call(number: int, name: str = "add", **args: Any) -> dict[str, Any]:
    return {"name": name, "args": args, "id": f"c{number}", "type": "tool_call"}


def fake(*messages: Any, **fields: Any) -> Fake:
    return Fake(messages=iter(messages), settings=[], **fields)


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    with Ledger("memory:") as ledger:
        yield ledger
        assert ledger.check() == []
        assert all(budget.held_nanousd == 0 for budget in ledger.budgets())


async def run(agent: Any, way: str, text: str = "What is 1 + 2?", **config: Any) -> list[BaseMessage]:
    given: Any = {"messages": [HumanMessage(text)]}
    out = agent.invoke(given, **config) if way == "sync" else await agent.ainvoke(given, **config)
    messages: list[BaseMessage] = out["messages"]
    return messages


both = pytest.mark.parametrize("way", ["sync", "async"])


@both
async def test_every_call_of_an_agent_is_held_and_then_charged_what_it_used(ledger: Ledger, way: str) -> None:
    budget = BudgetMiddleware("0.01", prices=PRICES, ledger=ledger, max_tokens=200)
    model = fake(says("", call(1, a=1, b=2), call(2, a=3, b=4)), says("3 and 7"))
    messages = await run(create_agent(model, [add], middleware=[budget]), way)
    assert messages[-1].content == "3 and 7"
    assert sorted(m.content for m in messages if isinstance(m, ToolMessage)) == ["3", "7"]
    assert budget.left().posted_nanousd == 2 * (100 * 1_000 + 50 * 2_000)
    entries = ledger.entries(budget.budget_name)
    assert [entry.kind for entry in entries] == ["limit", *["reserve", "dispatch", "post"] * 2]
    assert len({entry.key for entry in entries if entry.key}) == 2
    assert [kwargs["max_tokens"] for kwargs in model.settings] == [
        200,
        200,
    ]  # what was reserved is what was sent
    reserved = [entry for entry in entries if entry.kind == "reserve"]
    assert all(entry.usage["fake"].output_tokens == 200 for entry in reserved)
    assert reserved[1].usage["fake"].input_tokens > reserved[0].usage["fake"].input_tokens > 600
    assert messages[-1].response_metadata["viaticum"]["cost_nanousd"] == 200_000


@both
@pytest.mark.parametrize("behaviour", ["end", "error"])
async def test_a_budget_that_runs_out_in_the_middle_ends_the_agent(
    ledger: Ledger, way: str, behaviour: Any
) -> None:
    budget = BudgetMiddleware("0.0025", prices=PRICES, ledger=ledger, max_tokens=500, exit_behavior=behaviour)
    model = fake(*(says("", call(n, a=n, b=n), usage=(200, 300)) for n in range(100)))
    agent = create_agent(model, [add], middleware=[budget])
    if behaviour == "error":
        with pytest.raises(BudgetExceeded):
            await run(agent, way)
    else:
        messages = await run(agent, way)
        assert isinstance(messages[-1], AIMessage)
        assert "the budget is used up" in messages[-1].text
        assert messages[-1].response_metadata["finish_reason"] == "budget"
        assert messages[-1].tool_calls == []
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
    (held,) = [entry for entry in ledger.entries(budget.budget_name) if entry.kind == "reserve"]
    assert budget.left().posted_nanousd == held.nanousd > 600_000


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
        ({"budget": 1, "exit_behavior": "stop"}, "use end or error"),
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
    from viaticum.routers.query import StaticRouter
    from viaticum.types import Pair, RoutingTable, Row

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
    from viaticum.routers.query import StaticRouter
    from viaticum.types import Pair, RoutingTable, Row

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
        ({"per": "day"}, "use run or call"),
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


async def test_our_chat_model_inside_an_agent(tmp_path: Any) -> None:
    models = {"m": ScriptedModel("The answer is 42.", name="m")}
    with ChatViaticum(budget="0.1", models=models, router=FakeRouter("m+direct"), folder=tmp_path) as chat:  # type: ignore[arg-type]
        agent = create_agent(chat, [], checkpointer=InMemorySaver())
        for _ in range(2):
            config: Any = {"config": {"configurable": {"thread_id": "t"}}}
            assert (await run(agent, "async", "What is 6 * 7?", **config))[-1].content == "The answer is 42."
        assert chat._client().ledger.check() == []
