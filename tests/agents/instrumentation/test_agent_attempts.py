"""The attempts that a chat model's own client makes of one call of an agent: each is held, or not sent."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import httpx
import openai
import pytest
from forms_server import FormsServer
from interrupts import interrupted
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware, ModelRequest
from langchain_openai import ChatOpenAI

import viaticum
from viaticum.agents.instrumentation.requests import ModelCall
from viaticum.agents.instrumentation.scope import BudgetScope
from viaticum.agents.integrations.call_attempts import Attempts, install
from viaticum.agents.integrations.held_calls import HeldCall, end_call
from viaticum.agents.integrations.middleware import BudgetMiddleware, OnCap
from viaticum.budgets import Ledger
from viaticum.errors import BudgetExceeded, DeadlineExceeded, LedgerError
from viaticum.money import Price
from viaticum.types import TokenCount

TIMEOUT = 3.0  # seconds, of the client; each lost attempt takes them
ASK: Any = {"messages": [{"role": "user", "content": "2+2?"}]}
PRICES = {"small": ("1", "2")}
LIMIT = 256  # new tokens of a call


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK waits up to some seconds between two attempts."""
    monkeypatch.setattr("openai._base_client.BaseClient._calculate_retry_timeout", lambda *_: 0.0)


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    with Ledger("memory:") as ledger:
        yield ledger
        assert ledger.check() == []


def agent_of(server: FormsServer, budget: BudgetMiddleware, **settings: Any) -> Any:
    given: dict[str, Any] = {"max_retries": 3, "timeout": TIMEOUT, "stream_usage": True, **settings}
    model = ChatOpenAI(model="small", base_url=f"{server.url}/v1", api_key="k", **given)  # type: ignore[arg-type]
    return create_agent(model, middleware=[budget])


async def ask_async(server: FormsServer, budget: BudgetMiddleware) -> None:
    async with httpx.AsyncClient(timeout=TIMEOUT) as http:
        await agent_of(server, budget, http_async_client=http).ainvoke(ASK)


def middleware(ledger: Ledger, limit: str = "1", on_cap: OnCap = "stop") -> BudgetMiddleware:
    return BudgetMiddleware(
        limit, prices=PRICES, ledger=ledger, budget_name="b", max_tokens=LIMIT, on_cap=on_cap
    )


def states(ledger: Ledger) -> list[tuple[str, bool]]:
    """The state of each hold, and whether all of it was charged."""
    found = []
    for hold in ledger.holds():
        posts = [entry for entry in ledger.entries(key=hold.key) if entry.kind == "post"]
        found.append((hold.state, [post.nanousd for post in posts] == [hold.held_nanousd]))
    return found


LOST, ANSWERED, FREE = ("posted", True), ("posted", False), ("void", False)


@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ([], [ANSWERED]),
        (["stall"], [LOST, ANSWERED]),
        (["drop"], [LOST, ANSWERED]),
        ([503, 429], [ANSWERED]),
        (["stall", 503, "drop"], [LOST, LOST, ANSWERED]),
    ],
)
def test_each_attempt_that_may_have_been_charged_is_held(
    server: FormsServer, ledger: Ledger, way: str, script: list[Any], expected: list[Any]
) -> None:
    server.script = list(script)
    budget = middleware(ledger)
    if way == "sync":
        agent_of(server, budget).invoke(ASK)
    else:
        asyncio.run(ask_async(server, budget))
    assert len(server.calls) == len(script) + 1
    assert states(ledger) == expected


@pytest.mark.parametrize(
    ("script", "expected"), [([], [ANSWERED]), (["stall"], [LOST, ANSWERED]), ([503], [ANSWERED])]
)
def test_streams_are_held_by_attempt(
    server: FormsServer, ledger: Ledger, script: list[Any], expected: list[Any]
) -> None:
    server.script = list(script)
    list(agent_of(server, middleware(ledger)).stream(ASK, stream_mode="messages"))
    assert len(server.calls) == len(script) + 1
    assert states(ledger) == expected


def test_a_stream_that_breaks_is_charged(server: FormsServer, ledger: Ledger) -> None:
    server.script = ["drop"]
    with pytest.raises(httpx.RemoteProtocolError):
        list(agent_of(server, middleware(ledger)).stream(ASK, stream_mode="messages"))
    assert states(ledger) == [LOST]


def test_attempts_that_are_all_lost_are_all_charged(server: FormsServer, ledger: Ledger) -> None:
    server.script = ["drop", "stall", "drop"]
    with pytest.raises(openai.APIConnectionError):
        agent_of(server, middleware(ledger), max_retries=2).invoke(ASK)
    assert states(ledger) == [LOST] * 3


def test_attempts_that_are_all_refused_cost_nothing(server: FormsServer, ledger: Ledger) -> None:
    server.script = [503] * 3
    with pytest.raises(openai.InternalServerError):
        agent_of(server, middleware(ledger), max_retries=2).invoke(ASK)
    assert states(ledger) == [FREE]


@pytest.mark.parametrize("on_cap", ["stop", "finish"])
def test_an_attempt_that_cannot_be_paid_is_not_sent(
    server: FormsServer, ledger: Ledger, on_cap: OnCap
) -> None:
    server.script = ["stall"] * 3
    agent = agent_of(server, middleware(ledger, "0.0009", on_cap))  # one call is held at 0.0006
    if on_cap == "stop":
        with pytest.raises(BudgetExceeded, match="left"):
            agent.invoke(ASK)
    else:
        assert "budget" in agent.invoke(ASK)["messages"][-1].text
    assert len(server.calls) == 1
    assert states(ledger) == [LOST]
    assert ledger.budget("b").held_nanousd == 0


class Spending(AgentMiddleware[Any, Any, Any]):
    """Makes the model's calls in a budget of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.budgets: list[BudgetScope] = []

    def wrap_model_call(self, request: Any, handler: Any) -> Any:
        with viaticum.budget("1", prices=PRICES) as budget:
            self.budgets.append(budget)
            return handler(request)


@pytest.mark.parametrize("is_inside", [True, False])
def test_a_budget_may_be_opened_around_an_attempt(
    server: FormsServer, ledger: Ledger, is_inside: bool
) -> None:
    spending = Spending()
    model = ChatOpenAI(model="small", base_url=f"{server.url}/v1", api_key="k")  # type: ignore[arg-type]
    agent = create_agent(model, middleware=[middleware(ledger), spending])
    with viaticum.budget("2", prices=PRICES) if is_inside else nullcontext():
        agent.invoke(ASK)
    assert spending.budgets[0].left().posted_nanousd > 0
    assert states(ledger) == [ANSWERED]


def test_a_budget_around_an_agent_holds_its_attempts_too(server: FormsServer, ledger: Ledger) -> None:
    server.script = ["stall"]
    with viaticum.budget("2", prices=PRICES) as around:
        agent_of(server, middleware(ledger)).invoke(ASK)
    assert states(ledger) == [LOST, ANSWERED]
    assert around.calls.total() == 2
    assert around.left().held_nanousd == 0


def test_a_call_that_was_left_at_its_deadline_is_not_sent_again(server: FormsServer, ledger: Ledger) -> None:
    server.script = ["stall"] * 4
    budget = BudgetMiddleware(
        "1", prices=PRICES, ledger=ledger, budget_name="b", max_tokens=LIMIT, on_cap="stop", max_seconds=0.5
    )
    with pytest.raises(DeadlineExceeded):
        agent_of(server, budget).invoke(ASK)
    for thread in threading.enumerate():
        if thread.name == "viaticum-agent-call":
            thread.join(60.0)
            assert not thread.is_alive()
    assert len(server.calls) <= 1
    assert states(ledger) == [LOST]
    assert ledger.budget("b").held_nanousd == 0


class Interrupted(AgentMiddleware[Any, Any, Any]):
    """Ctrl-C after an attempt that was not sent."""

    def wrap_model_call(self, request: Any, handler: Any) -> Any:
        try:
            return handler(request)
        except openai.APIStatusError:
            raise KeyboardInterrupt from None


def test_an_interrupt_after_an_attempt_that_does_not_fit_ends_the_agent(
    server: FormsServer, ledger: Ledger
) -> None:
    server.script = ["stall"] * 3
    model = ChatOpenAI(
        model="small",
        base_url=f"{server.url}/v1",
        api_key="k",  # type: ignore[arg-type]
        max_retries=3,
        timeout=TIMEOUT,
    )
    agent = create_agent(model, middleware=[middleware(ledger, "0.0009", "finish"), Interrupted()])
    with pytest.raises(KeyboardInterrupt):
        agent.invoke(ASK)
    assert states(ledger) == [LOST]
    assert ledger.budget("b").held_nanousd == 0


def test_an_interrupt_at_any_step_of_a_further_attempt_leaves_no_hold() -> None:
    call = ModelCall("openai", "127.0.0.1", "small", {}, LIMIT, False)
    for at in itertools.count(1):
        with Ledger("memory:") as ledger:
            ledger.create("b", limit_nanousd=10**9)
            reserve = partial(
                ledger.reserve,
                "b",
                usage={"small": TokenCount(input_tokens=10, output_tokens=LIMIT)},
                prices={"small": Price.per_million("1", "2")},
            )
            reserve(key="first", dispatch=True)
            attempts = Attempts(ledger, "first", lambda key, reserve=reserve: reserve(key=key))  # type: ignore[misc]
            attempts.is_lost = True
            with interrupted(at) as interrupt:
                try:
                    attempts.reserve(call)
                except KeyboardInterrupt as error:
                    held = HeldCall(attempts.key, cast("ModelRequest[Any]", None))
                    end_call(ledger, held, error, is_lost=attempts.is_lost)
            if not interrupt.where:
                assert [hold.state for hold in ledger.holds()] == ["posted", "dispatched"]
                break
            assert ledger.budget("b").held_nanousd == 0, interrupt.where
            assert states(ledger)[0] == LOST, interrupt.where
            assert ledger.check() == [], interrupt.where
    assert at > 20


def test_a_further_attempt_whose_hold_fails_is_not_sent_unheld(ledger: Ledger) -> None:
    """A client that tries once more after an error of the ledger is asked for a hold again."""
    ledger.create("b", limit_nanousd=10**9)
    call, asked = ModelCall("openai", "127.0.0.1", "small", {}, LIMIT, False), list[str]()
    usage, prices = {"small": TokenCount(10, LIMIT)}, {"small": Price.per_million("1", "2")}
    ledger.reserve("b", "first", usage, prices, dispatch=True)

    def reserve(key: str) -> None:
        asked.append(key)
        if len(asked) == 1:
            raise LedgerError("the disk is full")
        ledger.reserve("b", key, usage, prices)

    attempts = Attempts(ledger, "first", reserve)
    attempts.is_lost = True
    with pytest.raises(LedgerError):
        attempts.reserve(call)
    attempts.reserve(call)
    assert [hold.state for hold in ledger.holds()] == ["posted", "dispatched"]
    ledger.void(attempts.key)


def test_a_call_without_a_limit_that_the_budget_around_refuses_is_not_sent(
    server: FormsServer, ledger: Ledger
) -> None:
    attempts = Attempts(ledger, "k", lambda key: None)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="k")
    with (
        viaticum.budget("0.000001", prices=PRICES, unheld="allow"),
        attempts.inside(is_met=install()),
        pytest.raises(openai.APIStatusError, match="budget"),
    ):
        client.chat.completions.create(model="small", messages=ASK["messages"])
    assert server.calls == []
