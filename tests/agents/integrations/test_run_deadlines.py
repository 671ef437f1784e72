"""A deadline of an agent's whole run: it bounds each call and choice, and at its end `on_cap` decides."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from fake_chat import Fake, add, both, call, fake, run, says
from langchain.agents import create_agent
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command

from viaticum import FakeRouter, InputError
from viaticum.agents.integrations.middleware import BudgetMiddleware
from viaticum.agents.integrations.router_middleware import RouterMiddleware
from viaticum.agents.integrations.run_deadlines import RunDeadlines
from viaticum.budgets import Ledger
from viaticum.errors import DeadlineExceeded, DecisionNeeded


class FakeTime:
    """Time that goes on only when a test lets it: also what the ledger notes of calls."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def utc(self) -> datetime:
        return datetime.fromtimestamp(self.now, UTC)


PRICES = {"worker": (10, 20), "small": (1, 2), "slow": (1, 2), "quick": (1, 2)}


class Slow(Fake):
    """Calls a tool for ever; a call takes `seconds`, or until `freed` is set, sync and async.

    clock: whose time it takes; None for real time.
    """

    model: str = "worker"
    seconds: float = 0.0
    freed: Any = None
    clock: Any = None
    messages: Any = ()

    def _generate(
        self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> ChatResult:
        self._wait()
        return self._result(kwargs)

    async def _agenerate(
        self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> ChatResult:
        if self.clock is not None:
            self.clock.sleep(self.seconds)
        else:
            await asyncio.sleep(self.seconds)
        return self._result(kwargs)

    def _wait(self) -> None:
        if self.freed is not None:
            self.freed.wait(self.seconds)
        else:
            (self.clock or time).sleep(self.seconds)

    def _result(self, kwargs: Any) -> ChatResult:
        self.settings.append(kwargs)
        usage: Any = {"input_tokens": 100, "output_tokens": 10, "total_tokens": 110}
        calls = [call(len(self.settings), a=1, b=2)]
        message = AIMessage(f"step {len(self.settings)}", tool_calls=calls, usage_metadata=usage)
        return ChatResult(generations=[ChatGeneration(message=message)])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    """The time of deadlines and of the ledger: tests of them need no luck."""
    found = FakeTime()
    for module in ("agents.workflow.deadlines", "agents.integrations.run_deadlines"):
        monkeypatch.setattr(f"viaticum.{module}.time", found)
    return found


@pytest.fixture
def ledger(clock: FakeTime) -> Iterator[Ledger]:
    with Ledger("memory:", clock=clock.utc) as ledger:
        yield ledger
        assert ledger.check() == []
        assert all(budget.held_nanousd == 0 for budget in ledger.budgets())


@pytest.fixture
def freed() -> Iterator[threading.Event]:
    """Set at the end, so that no thread of an abandoned call stays."""
    event = threading.Event()
    yield event
    event.set()


def middleware(ledger: Ledger, **settings: Any) -> BudgetMiddleware:
    return BudgetMiddleware("1", prices=PRICES, ledger=ledger, **{"max_tokens": 100, **settings})


@both
async def test_a_run_that_is_too_long_wraps_up_in_time(ledger: Ledger, clock: FakeTime, way: str) -> None:
    """Steps go on until a tenth of the time is left, which is the last call's."""
    worker = Slow(seconds=100.0, clock=clock, settings=[])
    small = fake(says("So far: 3"), model="small")
    budget = middleware(ledger, max_seconds=2000.0, cheaper=[small])
    messages = await run(create_agent(worker, [add], middleware=[budget]), way)
    assert len(worker.settings) > 2
    assert messages[-1].content == "So far: 3"
    assert messages[-1].response_metadata["finish_reason"] == "deadline"
    assert len(small.settings) == 1


@both
async def test_a_call_in_progress_is_left_and_charged_for_what_it_held(
    ledger: Ledger, freed: threading.Event, way: str
) -> None:
    worker, small = Slow(seconds=60, freed=freed, settings=[]), fake(says("Nothing yet"), model="small")
    budget = middleware(ledger, max_seconds=2.0, cheaper=[small])
    began = time.monotonic()
    messages = await run(create_agent(worker, [add], middleware=[budget]), way)
    assert time.monotonic() - began < 50
    assert messages[-1].content == "Nothing yet"
    posts = [entry for entry in ledger.entries(budget.budget_name) if entry.kind == "post"]
    assert [entry.note["usage"] for entry in posts] == ["missing", "reported"]
    (first, _) = (ledger.hold(str(entry.key)) for entry in posts)
    assert first is not None
    assert posts[0].nanousd == first.held_nanousd


@both
async def test_stop_raises(ledger: Ledger, freed: threading.Event, way: str) -> None:
    budget = middleware(ledger, max_seconds=0.5, on_cap="stop")
    agent = create_agent(Slow(seconds=60, freed=freed, settings=[]), [add], middleware=[budget])
    with pytest.raises(DeadlineExceeded, match="charged"):
        await run(agent, way)


async def test_a_last_call_that_is_too_slow_ends_in_words(ledger: Ledger, freed: threading.Event) -> None:
    slow = Slow(seconds=60, freed=freed, settings=[])
    budget = middleware(ledger, max_seconds=0.5)
    messages = await run(create_agent(slow, [add], middleware=[budget]), "async")
    assert str(messages[-1].content).startswith("Stopped, the time is over")
    assert messages[-1].response_metadata["finish_reason"] == "deadline"


@both
async def test_a_quicker_model_goes_on_where_the_agent_s_own_takes_too_long(
    ledger: Ledger, clock: FakeTime, way: str
) -> None:
    """By what calls of this budget took before: the worker's more than what is left."""
    worker = Slow(seconds=400.0, clock=clock, settings=[])
    quick = Slow(model="quick", seconds=20.0, clock=clock, settings=[])
    first = middleware(ledger, budget_name="agent", on_cap="stop")
    for model, calls in ((worker, 5), (quick, 5)):
        for _ in range(calls):
            key = f"k{len(list(ledger.entries('agent')))}"
            first._holds.reserve(key, model, first_count())
            ledger.dispatch(key)
            model._wait()
            ledger.settle(key, {model.model: first_count()})
    budget = BudgetMiddleware(
        prices=PRICES,
        ledger=ledger,
        budget_name="agent",
        max_tokens=100,
        max_seconds=350.0,
        on_cap="cheaper",
        cheaper=[quick],
    )
    assert budget.seconds_of(worker).p50 == pytest.approx(400.0, rel=0.5)  # type: ignore[union-attr]
    await run(create_agent(worker, [add], middleware=[budget]), way, config={"recursion_limit": 1000})
    assert worker.settings == []
    assert len(quick.settings) > 1


def first_count() -> Any:
    from viaticum.types import TokenCount

    return TokenCount(100, 10)


async def test_a_person_gives_the_run_its_time_once_more(ledger: Ledger, clock: FakeTime) -> None:
    worker = fake(says("thinking", call(1, a=1, b=2)), says("done"), model="worker")
    budget = middleware(ledger, max_seconds=200.0, on_cap="ask")
    agent = create_agent(worker, [nap(clock)], middleware=[budget], checkpointer=InMemorySaver())
    config: Any = {"configurable": {"thread_id": "t"}}
    out = agent.invoke({"messages": [("user", "go")]}, config)
    asked = out["__interrupt__"][0].value
    assert (asked["unit"], asked["options"][0]) == ("seconds", {"do": "raise", "by_seconds": 200.0})
    out = agent.invoke(Command(resume="raise"), config)
    assert out["messages"][-1].content == "done"


@pytest.mark.parametrize("answer", [{"do": "raise", "by_seconds": 200}, {"do": "raise", "by_seconds": 30}])
async def test_a_person_says_how_many_seconds(
    ledger: Ledger, clock: FakeTime, answer: dict[str, Any]
) -> None:
    worker = fake(says("thinking", call(1, a=1, b=2)), says("done"), model="worker")
    budget = middleware(ledger, max_seconds=200.0, on_cap="ask")
    agent = create_agent(worker, [nap(clock)], middleware=[budget], checkpointer=InMemorySaver())
    config: Any = {"configurable": {"thread_id": "t"}}
    agent.invoke({"messages": [("user", "go")]}, config)
    for wrong in ({"do": "raise", "by": "0.05"}, {"do": "raise", "by_seconds": -1}):
        out = agent.invoke(Command(resume=wrong), config)
        assert out["__interrupt__"][0].value["problem"]
    out = agent.invoke(Command(resume=answer), config)
    assert out["messages"][-1].content == "done"


async def test_the_time_of_a_run_stands_still_while_a_person_is_asked_about_money(
    ledger: Ledger, clock: FakeTime
) -> None:
    worker = fake(says("done"), model="worker")
    given: dict[str, Any] = {"ledger": ledger, "budget_name": "short", "max_seconds": 50.0, "on_cap": "ask"}
    budget = BudgetMiddleware("0.000000001", prices=PRICES, max_tokens=100, **given)
    agent = create_agent(worker, [], middleware=[budget], checkpointer=InMemorySaver())
    config: Any = {"configurable": {"thread_id": "t"}}
    out = agent.invoke({"messages": [("user", "go")]}, config)
    assert out["__interrupt__"][0].value["unit"] == "nanousd"
    clock.sleep(70.0)
    out = agent.invoke(Command(resume="raise"), config)
    assert out["messages"][-1].content == "done", "the decision was about money, and is carried out"
    assert (ledger.budget("short").limit_nanousd or 0) > 1


async def test_without_a_checkpointer_the_question_is_an_error(ledger: Ledger, clock: FakeTime) -> None:
    worker = fake(says("thinking", call(1, a=1, b=2)), model="worker")
    budget = middleware(ledger, max_seconds=200.0, on_cap="ask")
    with pytest.raises(DecisionNeeded, match="are over"):
        await run(create_agent(worker, [nap(clock)], middleware=[budget]), "sync")


def nap(clock: FakeTime) -> Callable[[int, int], int]:
    """A tool that takes longer than a run may."""

    def add(a: int, b: int) -> int:
        """Add two numbers, in a while."""
        clock.sleep(300.0)
        return a + b

    return add


async def test_the_router_heeds_what_is_left(ledger: Ledger, clock: FakeTime) -> None:
    """The best model took longer than a run may take, so the other one is chosen."""
    models: dict[str, BaseChatModel] = {
        "slow": fake(says(), model="slow"),
        "quick": fake(says("quick"), model="quick"),
    }
    before = middleware(ledger, budget_name="agent", on_cap="stop")
    for name, seconds in (("slow", 300.0), ("quick", 0.0)):
        for number in range(5):
            before._holds.reserve(f"{name}{number}", models[name], first_count())
            ledger.dispatch(f"{name}{number}")
            clock.sleep(seconds)
            ledger.settle(f"{name}{number}", {name: first_count()})
    budget = BudgetMiddleware(
        prices=PRICES, ledger=ledger, budget_name="agent", max_tokens=100, max_seconds=250.0, on_cap="stop"
    )
    for per in ("run", "call", "step"):
        router = FakeRouter({"slow+cot": 0.9, "quick+cot": 0.5})
        routed = RouterMiddleware(models, router, policy="best", budget=budget, per=per)  # type: ignore[arg-type]
        models["quick"].messages = iter([says("quick")])  # type: ignore[attr-defined]
        messages = await run(create_agent(models["slow"], [], middleware=[routed, budget]), "sync")
        assert messages[-1].content == "quick"


async def test_each_run_has_its_own_time(ledger: Ledger) -> None:
    worker = Slow(seconds=0.0, settings=[])
    budget = middleware(ledger, max_seconds=30.0)
    for _ in range(2):
        worker.messages = iter(())
        agent = create_agent(fake(says("done"), model="worker"), [], middleware=[budget])
        await run(agent, "sync")
    assert budget.deadlines.of({}) is not budget.deadlines.of({})
    assert not budget.deadlines._known


def test_deadlines_of_runs_that_never_ended_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("viaticum.agents.integrations.run_deadlines.MOST_RUNS", 3)
    deadlines = RunDeadlines(10.0)
    first = deadlines.of({"viaticum_run": "r0"})
    for number in range(5):
        deadlines.of({"viaticum_run": f"r{number}"})
    assert deadlines.of({"viaticum_run": "r0"}) is not first
    assert len(deadlines._known) == 3


@pytest.mark.parametrize("seconds", [0, -1, "1"])
def test_wrong_seconds_are_refused(ledger: Ledger, seconds: Any) -> None:
    with pytest.raises(InputError, match="max_seconds"):
        middleware(ledger, max_seconds=seconds)
