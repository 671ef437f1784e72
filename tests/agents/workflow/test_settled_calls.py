"""Settled calls come in the order of reservation, and wait for open ones only while these may end."""

from __future__ import annotations

import math
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from viaticum.agents.workflow import settled_calls
from viaticum.agents.workflow.settled_calls import EXPECTED, SettledCalls
from viaticum.budgets import Ledger
from viaticum.money import Price
from viaticum.routers.query.change_detection import CALLS_TO_FALSE_ALARM, Expectation, ModelWatch
from viaticum.types import TokenCount

SIGMA = 0.5
HIGH = math.exp(1.2816 * SIGMA)
PRICE = Price(0, 10_000_000)  # 10 nano-dollars a token
TAG = Expectation(100, round(100 * HIGH), 1000, round(1000 * HIGH), 1133, "profile").text


@pytest.fixture
def ledger() -> Ledger:  # type: ignore[misc]
    with Ledger("memory:") as opened:
        opened.create("work", limit_nanousd=10**15)
        yield opened


def reserve(ledger: Ledger, key: str, model: str = "m", lease: int = 3600) -> None:
    tags = {"model": model, EXPECTED: TAG}
    worst = {model: TokenCount(1, 10_000)}
    ledger.reserve("work", key, worst, {model: PRICE}, tags=tags, lease=lease, dispatch=True)


def settle(ledger: Ledger, key: str, tokens: int = 100, model: str = "m") -> None:
    ledger.settle(key, {model: TokenCount(1, tokens)}, "{}")


def keys(calls: SettledCalls) -> list[str]:
    return [call.key for call in calls.read()]


def test_a_burst_raises_no_alarm(ledger: Ledger) -> None:
    """The shortest outputs end first; whoever counts them so sees a change that is none."""
    rng, calls = random.Random(7), SettledCalls(ledger)
    watch, naive = ModelWatch(), ModelWatch()
    tokens = {f"call-{n:03}": round(100 * math.exp(SIGMA * rng.gauss(0, 1))) for n in range(200)}
    for key in tokens:
        reserve(ledger, key)
    highest = counted = 0.0
    for number, key in enumerate(sorted(tokens, key=tokens.__getitem__)):
        settle(ledger, key, tokens[key])
        naive.add_call(Expectation.parse(TAG), tokens[key], 10 * tokens[key])  # type: ignore[arg-type]
        counted = max(counted, naive.evidence)
        if number % 10 == 9:
            for call in calls.read():
                assert call.expected is not None
                watch.add_call(call.expected, call.tokens, call.cost)
                highest = max(highest, watch.evidence)
    assert watch.count == 200
    assert highest < CALLS_TO_FALSE_ALARM / 10
    assert counted >= CALLS_TO_FALSE_ALARM


def test_calls_wait_for_those_before(ledger: Ledger) -> None:
    calls = SettledCalls(ledger)
    for key in ("a", "b", "c"):
        reserve(ledger, key)
    reserve(ledger, "other", "another")
    settle(ledger, "c")
    settle(ledger, "other", model="another")
    assert keys(calls) == ["other"], "another model does not wait"
    settle(ledger, "a")
    assert keys(calls) == ["a"]
    assert keys(calls) == []
    ledger.settle("b", {"m": TokenCount(1, 5)})  # cut off: nothing is expected of it
    assert [(call.key, call.expected is None) for call in calls.read()] == [("b", True), ("c", False)]


def test_released_calls_are_not_waited_for(ledger: Ledger) -> None:
    calls = SettledCalls(ledger)
    for key in ("a", "b"):
        reserve(ledger, key)
    settle(ledger, "b")
    assert keys(calls) == []
    ledger.void("a")
    assert keys(calls) == ["b"]


def test_lost_and_long_calls_are_not_waited_for() -> None:
    long_ago = [datetime.now(UTC) - timedelta(hours=5)]
    with Ledger("memory:", clock=lambda: long_ago[0]) as ledger:
        ledger.create("work", limit_nanousd=10**15)
        reserve(ledger, "lost")
        long_ago[0] = datetime.now(UTC)
        reserve(ledger, "at the provider for a day", lease=86_400)
        reserve(ledger, "last")
        settle(ledger, "last")
        assert keys(SettledCalls(ledger)) == ["last"]


def test_too_many_do_not_wait(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settled_calls, "MOST_WAITING", 2)
    calls = SettledCalls(ledger)
    for key in "abcd":
        reserve(ledger, key)
    for key in "dcb":
        settle(ledger, key)
    assert keys(calls) == ["b"]
    settle(ledger, "a")
    assert keys(calls) == ["a", "c", "d"]


def test_a_full_window_begins_where_it_has_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls from before its first post are in it if they were long, and not if they were short."""
    monkeypatch.setattr(settled_calls, "WINDOW", 3)
    with Ledger(tmp_path / "ledger.db") as ledger:
        ledger.create("work", limit_nanousd=10**15)
        for key in ("long", "short", "a"):
            reserve(ledger, key)
        for key in ("short", "a"):
            settle(ledger, key)
        reserve(ledger, "b")
        settle(ledger, "long")
        settle(ledger, "b")
        assert keys(SettledCalls(ledger)) == ["b"]
