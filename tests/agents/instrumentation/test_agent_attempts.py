"""The attempts that a chat model's own client makes of one call of an agent: each is held, or not sent."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any

import httpx
import openai
import pytest
from forms_server import FormsServer
from interrupts import interrupted
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware
from langchain_openai import ChatOpenAI

import viaticum
from viaticum.agents.instrumentation.requests import ModelCall
from viaticum.agents.instrumentation.scope import BudgetScope
from viaticum.agents.integrations.call_attempts import Attempts, install
from viaticum.agents.integrations.held_calls import end_call
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
    """The state of each hold, and whether as many new tokens as it allowed were charged."""
    found = []
    for hold in ledger.holds():
        posts = [entry for entry in ledger.entries(key=hold.key) if entry.kind == "post"]
        assert all(post.nanousd <= hold.held_nanousd for post in posts)
        found.append((hold.state, [post.usage["small"].output_tokens for post in posts] == [LIMIT]))
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


class AskingTwice(AgentMiddleware[Any, Any, Any]):
    """Makes requests of its own beside the model's call: a guard before it, or the call again.

    before: body of a request that it sends first. tries: how often it asks the model. at_once: together.
    """

    def __init__(
        self,
        server: FormsServer,
        before: dict[str, Any] | None = None,
        tries: int = 1,
        *,
        at_once: bool = False,
    ) -> None:
        super().__init__()
        self.server, self.before, self.tries, self.at_once = server, before, tries, at_once

    def wrap_model_call(self, request: Any, handler: Any) -> Any:
        if self.before is not None:
            self.server.openai(max_retries=0).chat.completions.create(**self.before)
        if self.at_once:
            context = [contextvars.copy_context() for _ in range(self.tries)]
            with ThreadPoolExecutor(self.tries) as pool:
                return list(pool.map(lambda each: each.run(handler, request), context))[-1]
        return [handler(request) for _ in range(self.tries)][-1]


def asked(server: FormsServer, ledger: Ledger, asking: AskingTwice, limit: str = "1") -> Any:
    model = ChatOpenAI(model="small", base_url=f"{server.url}/v1", api_key="k", max_retries=0)  # type: ignore[arg-type]
    agent = create_agent(model, middleware=[middleware(ledger, limit), asking])
    return agent.invoke({"messages": [{"role": "user", "content": "2+2? " * 200}]})


def posts(ledger: Ledger) -> list[TokenCount]:
    return [entry.usage["small"] for entry in ledger.entries() if entry.kind == "post"]


REPORTED = TokenCount(12, 5, 4)
GUARD: dict[str, Any] = {
    "model": "small",
    "max_tokens": 4,
    "messages": [{"role": "user", "content": "Is that allowed?"}],
}


@pytest.mark.parametrize("at_once", [False, True])
def test_each_answer_inside_a_held_call_is_charged_as_reported(
    server: FormsServer, ledger: Ledger, at_once: bool
) -> None:
    """A middleware that asks again, since it could not use an answer, pays for that one too."""
    asked(server, ledger, AskingTwice(server, tries=3, at_once=at_once))
    assert len(server.calls) == 3
    assert posts(ledger) == [REPORTED] * 3
    assert ledger.budget("b").held_nanousd == 0


def test_answers_without_usage_are_charged_at_the_most_of_their_own_requests(
    server: FormsServer, ledger: Ledger
) -> None:
    """A small request before a large one is not charged as much as that one may cost."""
    server.written = 0  # tokens that it reports of a text: no report
    asked(server, ledger, AskingTwice(server, GUARD))
    assert len(server.calls) == 2
    guard, call = posts(ledger)
    assert guard.output_tokens == 4
    assert 16 < guard.input_tokens < 400
    assert call.output_tokens == LIMIT
    assert call.input_tokens > 1000
    assert states(ledger) == [("posted", False), LOST]


def test_a_request_inside_a_held_call_is_held_at_what_it_may_cost_itself(
    server: FormsServer, ledger: Ledger
) -> None:
    """One that is larger than the held call is held as large."""
    larger = {
        "model": "small",
        "max_tokens": 4 * LIMIT,
        "messages": [{"role": "user", "content": "2+2? " * 900}],
    }
    asking = AskingTwice(server, tries=2)
    asking.wrap_model_call = lambda request, handler: [  # type: ignore[method-assign]
        handler(request),
        server.openai(max_retries=0).chat.completions.create(**larger),  # type: ignore[call-overload]
    ][0]
    server.written = 0
    asked(server, ledger, asking)
    first, second = posts(ledger)
    assert first.output_tokens == LIMIT
    assert second.output_tokens == 4 * LIMIT
    assert second.input_tokens > 4500
    assert all(entry.overrun == 0 for entry in ledger.entries())


def test_an_answer_that_its_client_cannot_use_is_paid(server: FormsServer, ledger: Ledger) -> None:
    class Failing(AgentMiddleware[Any, Any, Any]):
        def wrap_model_call(self, request: Any, handler: Any) -> Any:
            handler(request)
            raise ValueError("not the form that was asked for")

    model = ChatOpenAI(model="small", base_url=f"{server.url}/v1", api_key="k")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="form"):
        create_agent(model, middleware=[middleware(ledger), Failing()]).invoke(ASK)
    assert posts(ledger) == [REPORTED]
    assert ledger.budget("b").held_nanousd == 0


def test_a_second_request_that_does_not_fit_is_not_sent_after_an_answer(
    server: FormsServer, ledger: Ledger
) -> None:
    with pytest.raises(BudgetExceeded, match="left"):
        asked(server, ledger, AskingTwice(server, tries=400), "0.004")
    assert len(server.calls) > 2
    assert posts(ledger) == [REPORTED] * len(server.calls)
    assert ledger.budget("b").held_nanousd == 0


class Summed(ChatOpenAI):
    """Counts the tokens of each piece of a stream again, as some integrations do."""

    def _generate(self, *args: Any, **settings: Any) -> Any:
        result = super()._generate(*args, **settings)
        usage = result.generations[0].message.usage_metadata
        usage["input_tokens"], usage["output_tokens"] = 3 * usage["input_tokens"], 3 * usage["output_tokens"]
        return result


def test_what_the_provider_reports_counts_and_not_what_an_integration_makes_of_it(
    server: FormsServer, ledger: Ledger
) -> None:
    model = Summed(model="small", base_url=f"{server.url}/v1", api_key="k")  # type: ignore[arg-type]
    create_agent(model, middleware=[middleware(ledger)]).invoke(ASK)
    assert posts(ledger) == [REPORTED]


def test_a_stream_whose_report_an_integration_does_not_pass_on_costs_what_is_reported(
    server: FormsServer, ledger: Ledger
) -> None:
    agent = agent_of(server, middleware(ledger), stream_usage=False, streaming=True)
    assert agent.invoke(ASK)["messages"][-1].usage_metadata is None
    assert posts(ledger) == [REPORTED]


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
    call = ModelCall("chat", "127.0.0.1", "small", {}, LIMIT, False)
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
            attempts = Attempts(ledger, "first", lambda key, _, reserve=reserve: reserve(key=key), len)  # type: ignore[misc]
            attempts.reserve(call).settle(None)
            with interrupted(at) as interrupt:
                try:
                    attempts.reserve(call)
                except KeyboardInterrupt as error:
                    attempts.end()
                    end_call(ledger, attempts, error)
            if not interrupt.where:
                assert [hold.state for hold in ledger.holds()] == ["posted", "dispatched"]
                break
            assert ledger.budget("b").held_nanousd == 0, interrupt.where
            assert states(ledger)[0] == LOST, interrupt.where
            assert ledger.check() == [], interrupt.where
    assert at > 20


def test_an_attempt_after_a_refused_one_is_settled_where_it_fails(ledger: Ledger) -> None:
    """A client may try a smaller request after one that did not fit."""
    ledger.create("b", limit_nanousd=10**9)
    call, usage = ModelCall("chat", "127.0.0.1", "small", {}, LIMIT, False), {"small": TokenCount(10, LIMIT)}
    prices, asked = {"small": Price.per_million("1", "2")}, list[str]()
    ledger.reserve("b", "first", usage, prices, dispatch=True)

    def reserve(key: str, _: TokenCount | None) -> None:
        asked.append(key)
        if len(asked) == 1:
            raise BudgetExceeded("it does not fit")
        ledger.reserve("b", key, usage, prices)

    attempts = Attempts(ledger, "first", reserve, len)
    attempts.reserve(call).settle(None)
    with pytest.raises(BudgetExceeded):
        attempts.reserve(call)
    assert attempts.refusal is not None
    attempts.reserve(call)
    assert attempts.refusal is None
    attempts.end()
    end_call(ledger, attempts, RuntimeError())
    assert [hold.state for hold in ledger.holds()] == ["posted", "posted"]


def test_a_request_beside_a_refused_one_is_settled_once(ledger: Ledger) -> None:
    """Two at once, of which the second does not fit: the first is the newest, whose report is awaited."""
    ledger.create("b", limit_nanousd=10**9)
    call, usage = ModelCall("chat", "127.0.0.1", "small", {}, LIMIT, False), {"small": TokenCount(10, LIMIT)}
    ledger.reserve("b", "first", usage, {"small": Price.per_million("1", "2")}, dispatch=True)

    def refuse(key: str, _: TokenCount | None) -> None:
        raise BudgetExceeded("it does not fit")

    attempts = Attempts(ledger, "first", refuse, len)
    attempts.reserve(call)
    with pytest.raises(BudgetExceeded):
        attempts.reserve(call)
    attempts.end()
    assert [hold.state for hold in ledger.holds()] == ["dispatched"]
    assert attempts.key == "first"


def test_a_further_attempt_whose_hold_fails_is_not_sent_unheld(ledger: Ledger) -> None:
    """A client that tries once more after an error of the ledger is asked for a hold again."""
    ledger.create("b", limit_nanousd=10**9)
    call, asked = ModelCall("chat", "127.0.0.1", "small", {}, LIMIT, False), list[str]()
    usage, prices = {"small": TokenCount(10, LIMIT)}, {"small": Price.per_million("1", "2")}
    ledger.reserve("b", "first", usage, prices, dispatch=True)

    def reserve(key: str, _: TokenCount | None) -> None:
        asked.append(key)
        if len(asked) == 1:
            raise LedgerError("the disk is full")
        ledger.reserve("b", key, usage, prices)

    attempts = Attempts(ledger, "first", reserve, len)
    attempts.reserve(call).settle(None)
    with pytest.raises(LedgerError):
        attempts.reserve(call)
    attempts.reserve(call)
    assert [hold.state for hold in ledger.holds()] == ["posted", "dispatched"]
    ledger.void(attempts.key)


def test_a_call_without_a_limit_that_the_budget_around_refuses_is_not_sent(
    server: FormsServer, ledger: Ledger
) -> None:
    attempts = Attempts(ledger, "k", lambda key, most: None, len)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="k")
    with (
        viaticum.budget("0.000001", prices=PRICES, unheld="allow"),
        attempts.inside(is_met=install()),
        pytest.raises(openai.APIStatusError, match="budget"),
    ):
        client.chat.completions.create(model="small", messages=ASK["messages"])
    assert server.calls == []
