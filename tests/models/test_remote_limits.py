"""What providers say about how fast they may be asked, and that all callers of a model heed it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from openai_server import OpenAIServer, spec_for

from viaticum.agents.batch import run_batch
from viaticum.catalogue import Catalogue
from viaticum.errors import ProviderWait
from viaticum.jobs import read_rows
from viaticum.models.base import Generation
from viaticum.models.remote.model import RemoteModel
from viaticum.models.remote.rate_limits import (
    ProviderRateLimiter,
    check_wait,
    parse_duration,
    waiting_at_most,
)
from viaticum.routers.query.fake import FakeRouter


class Clock:
    def __init__(self) -> None:
        self.now, self.slept = 100.0, list[float]()

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(round(seconds, 6))
        self.now += seconds


def asks(limiter: ProviderRateLimiter, clock: Clock, times: int = 1) -> None:
    for _ in range(times):
        with limiter.acquire(clock.sleep):
            pass


def test_without_limits_in_headers_no_request_waits() -> None:
    clock = Clock()
    limiter = ProviderRateLimiter(clock)
    asks(limiter, clock, 100)
    limiter.update({"x-ratelimit-remaining-requests": "?", "x-ratelimit-reset-requests": "1s"})
    limiter.update({"x-ratelimit-remaining-requests": "0"})
    asks(limiter, clock, 100)
    assert clock.slept == []


@pytest.mark.parametrize("prefix", ["", "llm_provider-"])
def test_remaining_requests_are_counted_down_until_the_reset(prefix: str) -> None:
    clock = Clock()
    limiter = ProviderRateLimiter(clock)
    with limiter.acquire(clock.sleep), limiter.acquire(clock.sleep):
        limits = {"x-ratelimit-remaining-requests": "3", "x-ratelimit-reset-requests": "1m0s"}
        limiter.update({prefix + name: value for name, value in limits.items()})
    asks(limiter, clock, 2)  # one of three may be the other that was under way
    assert clock.slept == []
    clock.now += 10
    asks(limiter, clock)
    assert clock.slept == [50.0]
    asks(limiter, clock, 5)
    assert clock.slept == [50.0], "past the reset nothing is known"


def test_a_rejection_blocks_all_requests_for_at_most_a_minute() -> None:
    clock = Clock()
    limiter = ProviderRateLimiter(clock)
    limiter.block(3.0)
    asks(limiter, clock, 3)
    limiter.update({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "500ms"})
    asks(limiter, clock)
    limiter.block(3600)
    asks(limiter, clock)
    assert clock.slept == [3.0, 0.5, 60.0]


def test_a_call_that_may_not_wait_so_long_takes_no_request_of_the_limit() -> None:
    clock = Clock()
    limiter = ProviderRateLimiter(clock)
    with limiter.acquire(clock.sleep):
        limiter.update({"x-ratelimit-remaining-requests": "2", "x-ratelimit-reset-requests": "60s"})
    limiter.block(30.0)
    for _ in range(5):
        with (
            waiting_at_most(1.0),
            pytest.raises(ProviderWait, match="30 seconds") as error,
            limiter.acquire(lambda seconds: check_wait("far", seconds)),
        ):
            pass
        assert (error.value.seconds, error.value.is_refusal) == (30.0, False)
    clock.now += 30
    asks(limiter, clock, 2)
    assert clock.slept == []
    asks(limiter, clock)
    assert clock.slept == [30.0]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1s", 1.0),
        ("6m0s", 360.0),
        ("20ms", 0.02),
        ("1h2m3.5s", 3723.5),
        ("2", 2.0),
        ("soon", None),
        ("", None),
    ],
)
def test_durations_are_parsed(text: str, seconds: float | None) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("streams", [True, False])
def test_a_model_heeds_the_limits_in_its_responses(server: OpenAIServer, streams: bool) -> None:
    waits: list[float] = []
    model = RemoteModel(spec_for(server, streams=streams), sleep=waits.append)
    server.headers = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "7s"}
    for _ in range(2):
        model.generate([{"role": "user", "content": "hello"}], Generation(5))
    assert len(waits) == 1
    assert 6 < waits[0] <= 7


def test_one_rejection_delays_the_others(server: OpenAIServer) -> None:
    waits: list[float] = []
    model = RemoteModel(spec_for(server), sleep=waits.append)
    server.script = [(429, {"retry-after": "5"}, "slow down")]
    model.generate([{"role": "user", "content": "hello"}], Generation(5))
    assert waits == [5]
    model.generate([{"role": "user", "content": "hello"}], Generation(5))
    assert len(waits) == 2, "another caller, before the five seconds are over"
    assert 4 < waits[1] <= 5


def test_a_batch_of_a_remote_model_gets_through_a_rate_limit(server: OpenAIServer, tmp_path: Path) -> None:
    server.text = "The answer is 4."
    server.script = [
        "ok",
        (429, {"retry-after": "0.05"}, "slow down"),
        "ok",
        (503, {"retry-after": "0.01"}, "later"),
    ]
    lines = [json.dumps({"question": f"What is {n} + 2?", "kind": "number"}) for n in range(12)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    ended = run_batch(
        tmp_path / "in.jsonl",
        tmp_path / "out.jsonl",
        budget="1",
        router=FakeRouter("far+cot"),
        catalogue=Catalogue.load().with_models(spec_for(server)),
        ledger=tmp_path / "ledger.db",
        concurrency=4,
    )
    assert {(row.state, row.answer) for row in read_rows(ended.folder)} == {("answered", "4")}
    assert len(server.requests) == 14
