"""How much a server takes on, clients that go away or read slowly, and how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from viaticum_server import WORD, Here, asked, serving, until, write_catalogue

from viaticum.agents.server.admission import ConcurrencyLimiter, QueueFull, RateLimitExceeded, TokenBuckets
from viaticum.agents.server.run import Limits
from viaticum.budgets import Ledger
from viaticum.errors import InputError


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Here]:
    with serving(tmp_path, concurrency=2, queue=2, patience=1.0) as here:
        yield here
        here.settled()


def leave_after(here: Here, pieces: int, model: str, **body: Any) -> int:
    """Read so many events of a stream, then go away. Returns how many were read."""
    seen = 0
    with here.http.stream("POST", "/v1/chat/completions", json=asked(model, stream=True, **body)) as response:
        for line in response.iter_lines():
            seen += line.startswith("data: ")
            if seen >= pieces:
                break
    return seen


# --- clients that go away -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["slow", "slow+cot"])
def test_a_client_that_leaves_a_stream_pays_for_what_was_written(here: Here, model: str) -> None:
    assert leave_after(here, 5, model) == 5
    here.settled()
    (post,) = [entry for entry in here.client.ledger.entries() if entry.kind == "post"]
    written = post.usage["slow"].output_tokens
    assert 4 <= written < 200, "the model went on for nobody"
    assert post.nanousd == (post.usage["slow"].input_tokens + written) * WORD


@pytest.mark.parametrize("model", ["slow", "slow+cot"])
def test_a_client_that_does_not_wait_for_a_whole_answer(here: Here, model: str) -> None:
    with pytest.raises(httpx.ReadTimeout):
        here.http.post("/v1/chat/completions", json=asked(model), timeout=0.3)
    until(lambda: here.service.runs == set())
    here.settled()
    (post,) = [entry for entry in here.client.ledger.entries() if entry.kind == "post"]
    assert post.usage["slow"].output_tokens < 200
    assert "disconnected_clients_total 1.0" in here.http.get("/metrics").text


def test_a_client_that_leaves_the_queue_leaves_no_trace(here: Here) -> None:
    with ThreadPoolExecutor(3) as clients:
        running = [clients.submit(leave_after, here, 60, "slow") for _ in range(2)]
        until(lambda: here.service.places.taken == 2)
        with pytest.raises(httpx.ReadTimeout):
            here.http.post("/v1/chat/completions", json=asked("fast"), timeout=0.1)
        until(lambda: here.service.places.waiting == 0)
        assert [each.result() for each in running] == [60, 60]
    here.settled()
    assert len(here.client.ledger.holds()) == 2


def test_a_client_that_reads_nothing_is_given_up_and_holds_back_the_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written ahead of a client that does not read is bounded, and its place is free after a while."""
    with serving(tmp_path, concurrency=1, patience=0.5) as here:
        model: Any = here.client.model("fast")
        made = 0

        def endless(messages: Any, generation: Any) -> Iterator[str]:
            nonlocal made
            while True:
                made += 1
                yield "word " * 2000

        monkeypatch.setattr(model, "stream", endless)
        body = json.dumps(asked(stream=True)).encode()
        with socket.create_connection(("127.0.0.1", int(here.url.rpartition(":")[2]))) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            until(lambda: here.service.places.taken == 1)
            until(lambda: here.service.places.taken == 0, 20)
        assert made < 2000, "20 MB written for nobody"
        here.settled()


# --- places, queue, rate, size, time --------------------------------------------------------------------------


def test_more_than_the_queue_takes_is_refused_and_the_rest_is_served(here: Here) -> None:
    with ThreadPoolExecutor(12) as clients:
        got = list(clients.map(lambda _: here.ask("slow", max_tokens=60), range(12)))
    refused = [each for each in got if each.status_code == 503]
    assert {each.status_code for each in got} == {200, 503}
    assert 12 - len(refused) >= 4
    assert refused[0].headers["retry-after"] == "1"
    assert refused[0].json()["error"]["code"] == "overloaded"


def test_a_key_s_rate(tmp_path: Path) -> None:
    with serving(tmp_path, per_minute=3) as here:
        statuses = [here.ask().status_code for _ in range(5)]
        assert statuses == [200, 200, 200, 429, 429]
        refused = here.ask()
        assert 1 <= int(refused.headers["retry-after"]) <= 20
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        here.settled()


def test_a_body_that_is_too_large_or_never_comes(tmp_path: Path) -> None:
    with serving(tmp_path, body_bytes=1000, patience=0.3) as here:
        assert here.ask(messages=[{"role": "user", "content": "x" * 1000}]).status_code == 413

        def parts() -> Iterator[bytes]:
            yield from [b"x" * 600] * 3

        told = here.http.post(
            "/v1/chat/completions", content=parts(), headers={"content-type": "application/json"}
        )
        assert told.status_code == 413
        with socket.create_connection(("127.0.0.1", int(here.url.rpartition(":")[2]))) as client:
            client.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{"
            )
            client.settimeout(20)
            assert b" 408 " in client.recv(4096)
        here.settled()


@pytest.mark.parametrize("model", ["slow", "slow+cot"])
def test_a_request_has_its_time(tmp_path: Path, model: str) -> None:
    with serving(tmp_path, timeout=0.4) as here:
        refused = here.ask(model)
        assert (refused.status_code, refused.json()["error"]["code"]) == (504, "timeout")
        here.settled()
        last = here.ask(model, stream=True).text.split("\n\n")[-3]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        here.settled()
        assert here.standing()[0] > 0


def test_limits_that_make_no_sense() -> None:
    for wrong in (
        {"concurrency": 0},
        {"queue": -1},
        {"timeout": 0},
        {"patience": float("nan")},
        {"per_minute": 0},
    ):
        with pytest.raises(InputError):
            Limits(**wrong)  # type: ignore[arg-type]


async def test_places_are_given_in_the_order_of_asking() -> None:
    places = ConcurrencyLimiter(1, 3)
    await places.take()
    order: list[int] = []

    async def visit(number: int) -> None:
        await places.take()
        order.append(number)
        await asyncio.sleep(0)
        places.give()

    visits = [asyncio.create_task(visit(number)) for number in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFull):
        await places.take()
    visits[1].cancel()
    await asyncio.sleep(0)
    places.give()
    await asyncio.gather(*visits, return_exceptions=True)
    assert (order, places.taken, places.waiting) == ([0, 2], 0, 0)


async def test_a_place_given_to_one_who_just_left_is_passed_on() -> None:
    places = ConcurrencyLimiter(1, 2)
    await places.take()
    visit = asyncio.create_task(places.take())
    await asyncio.sleep(0)
    places.give()
    visit.cancel()
    with pytest.raises(asyncio.CancelledError):
        await visit
    assert places.taken == 0


def test_a_rate_fills_up_again() -> None:
    now = 0.0
    rates = TokenBuckets(lambda: now)
    for _ in range(60):
        rates.spend("k", 60)
    with pytest.raises(RateLimitExceeded) as refused:
        rates.spend("k", 60)
    assert refused.value.retry_after == 1
    rates.spend("other", 60)
    now = 2.5
    rates.spend("k", 60)
    rates.spend("k", 60)
    with pytest.raises(RateLimitExceeded):
        rates.spend("k", 60)


# --- the end --------------------------------------------------------------------------------------------------


def test_while_it_ends_it_refuses_and_lets_those_that_run_end(tmp_path: Path) -> None:
    with serving(tmp_path, grace=20) as here, ThreadPoolExecutor(1) as clients:
        running = clients.submit(here.ask, "slow", max_tokens=100)
        until(lambda: here.service.places.taken == 1)
        here.server.stop()
        until(lambda: here.service.draining)
        refused = here.ask("fast")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert "retry-after" in refused.headers
        assert here.http.get("/health").status_code == 503
        assert running.result().status_code == 200
        here.settled()


@pytest.mark.parametrize("model", ["slow", "slow+cot"])
def test_what_runs_longer_than_the_grace_period_is_cut_and_settled(tmp_path: Path, model: str) -> None:
    with serving(tmp_path, grace=0.2) as here, ThreadPoolExecutor(2) as clients:
        whole = clients.submit(here.ask, model)
        stream = clients.submit(here.ask, model, stream=True)
        until(lambda: here.service.places.taken == 2)
        time.sleep(0.3)
        here.server.stop()
        assert whole.result().json()["error"]["code"] == "shutting_down"
        last = stream.result().text.split("\n\n")[-3]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
        here.settled()
        assert here.standing()[0] > 0


def start(folder: Path, *options: str) -> tuple[subprocess.Popen[str], str]:
    write_catalogue(folder)
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from viaticum.cli import main; main()",
            "serve",
            "--port",
            "0",
            "--json",
            "--folder",
            str(folder),
            "--catalogue",
            str(folder / "catalogue.toml"),
            *options,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate()[1]
    return process, json.loads(line)["url"]


def test_sigterm_under_load_loses_no_settlement(tmp_path: Path) -> None:
    """40 clients stream, a third of them go away; the process is told to end in the middle of it."""
    process, url = start(tmp_path, "--concurrency", "12", "--queue", "64", "--grace", "1")

    async def visit(http: httpx.AsyncClient, number: int) -> str:
        body = asked("slow" if number % 2 else "slow+cot", stream=True, max_tokens=150)
        seen = 0
        try:
            async with http.stream("POST", f"{url}/chat/completions", json=body) as response:
                async for line in response.aiter_lines():
                    seen += line.startswith("data: ")
                    if number % 3 == 0 and seen > 10:
                        return "left"
                return "served" if response.status_code == 200 else str(response.status_code)
        except httpx.HTTPError as error:
            return type(error).__name__

    async def visits() -> list[str]:
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=100)) as http:
            tasks = [asyncio.create_task(visit(http, number)) for number in range(40)]
            await asyncio.sleep(2.5)
            process.send_signal(signal.SIGTERM)
            return await asyncio.gather(*tasks)

    told = asyncio.run(visits())
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors, errors
    assert "left" in told
    with Ledger(tmp_path / "ledger.db") as ledger:
        holds = ledger.holds()
        assert holds
        assert {hold.state for hold in holds} <= {"posted", "void"}
        budget = ledger.budget("serve")
        posts = [entry for entry in ledger.entries() if entry.kind == "post"]
        assert (budget.posted_nanousd, budget.held_nanousd) == (sum(post.nanousd for post in posts), 0)
        assert ledger.check() == []


def test_a_second_signal_cuts_at_once(tmp_path: Path) -> None:
    process, url = start(tmp_path, "--grace", "600")
    done = threading.Event()

    def ask() -> None:
        httpx.post(f"{url}/chat/completions", json=asked("slow", max_tokens=400), timeout=60)
        done.set()

    threading.Thread(target=ask, daemon=True).start()
    health = url.removesuffix("/v1") + "/health"
    until(lambda: httpx.get(health).json()["in_flight"] == 1)
    process.send_signal(signal.SIGINT)
    until(lambda: httpx.get(health).status_code == 503)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert done.wait(10)
    process.communicate()
