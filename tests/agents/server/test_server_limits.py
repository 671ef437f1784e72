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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from viaticum_server import (
    WORD,
    RunningServer,
    chat_body,
    hold_back,
    serving,
    wait_until,
    write_catalogue,
)

from viaticum.agents.server.admission import (
    ConcurrencyLimiter,
    QueueFull,
    RateLimitExceeded,
    TokenBuckets,
    fair_share,
)
from viaticum.agents.server.run import Limits
from viaticum.budgets import Ledger
from viaticum.errors import InputError


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    with serving(tmp_path, concurrency=2, queue=2, stall_timeout=10.0) as server:
        yield server
        server.assert_settled()


def request_head(length: int) -> bytes:
    """The head of a POST of JSON, for clients that control what they read and send."""
    lines = (
        "POST /v1/chat/completions HTTP/1.1",
        "host: localhost",
        "content-type: application/json",
        f"content-length: {length}",
    )
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode()


def leave_after(server: RunningServer, pieces: int, model: str, **body: Any) -> int:
    """Read so many events of a stream, then go away. Returns how many were read."""
    seen = 0
    with server.http.stream(
        "POST", "/v1/chat/completions", json=chat_body(model, stream=True, **body)
    ) as response:
        for line in response.iter_lines():
            seen += line.startswith("data: ")
            if seen >= pieces:
                break
    return seen


# --- clients that go away ---------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["slow", "slow+cot"])
def test_a_client_that_leaves_a_stream_pays_for_what_was_written(server: RunningServer, model: str) -> None:
    assert leave_after(server, 5, model) == 5
    server.assert_settled()
    (post,) = [entry for entry in server.client.ledger.entries() if entry.kind == "post"]
    written = post.usage["slow"].output_tokens
    assert 4 <= written < 200, "the model went on for nobody"
    assert post.nanousd == (post.usage["slow"].input_tokens + written) * WORD


@pytest.mark.parametrize("model", ["slow", "slow+cot"])
def test_a_client_that_does_not_wait_for_a_whole_answer(server: RunningServer, model: str) -> None:
    written: Any = server.client.model("slow")
    body = json.dumps(chat_body(model)).encode()
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as client:
        client.sendall(request_head(len(body)) + body)
        wait_until(lambda: written.calls)
    wait_until(lambda: server.service.runs == set())
    server.assert_settled()
    (post,) = [entry for entry in server.client.ledger.entries() if entry.kind == "post"]
    assert post.usage["slow"].output_tokens < 200
    assert "disconnected_clients_total 1.0" in server.http.get("/metrics").text


def test_a_client_that_leaves_the_queue_leaves_no_trace(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = hold_back(server.client.model("slow"), monkeypatch)
    with ThreadPoolExecutor(3) as clients:
        running = [clients.submit(leave_after, server, 60, "slow") for _ in range(2)]
        wait_until(lambda: server.service.limiter.running == 2)
        waiting = clients.submit(server.http.post, "/v1/chat/completions", json=chat_body("fast"), timeout=1)
        wait_until(lambda: server.service.limiter.queued == 1)
        with pytest.raises(httpx.ReadTimeout):
            waiting.result()
        wait_until(lambda: server.service.limiter.queued == 0)
        go_on.set()
        assert [each.result() for each in running] == [60, 60]
    server.assert_settled()
    assert len(server.client.ledger.holds()) == 2


def test_a_client_that_reads_nothing_is_given_up_and_holds_back_the_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written ahead of a client that does not read is bounded, and its slot is free after a while."""
    with serving(tmp_path, concurrency=1, stall_timeout=0.5) as server:
        model: Any = server.client.model("fast")
        made = 0

        def endless(messages: Any, generation: Any) -> Iterator[str]:
            nonlocal made
            while True:
                made += 1
                yield "word " * 2000

        monkeypatch.setattr(model, "stream", endless)
        body = json.dumps(chat_body(stream=True)).encode()
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.sendall(request_head(len(body)) + body)
            wait_until(lambda: made > 0)
            wait_until(lambda: server.service.limiter.running == 0)
        assert made < 2000, "20 MB written for nobody"
        server.assert_settled()


# --- slots, queue, rate, size, time -----------------------------------------------------------------------


def test_more_than_the_queue_takes_is_refused_and_the_rest_is_served(server: RunningServer) -> None:
    with ThreadPoolExecutor(12) as clients:
        got = list(clients.map(lambda _: server.ask("slow", max_tokens=60), range(12)))
    refused = [each for each in got if each.status_code == 503]
    assert {each.status_code for each in got} == {200, 503}
    assert 12 - len(refused) >= 4
    assert refused[0].headers["retry-after"] == "1"
    assert refused[0].json()["error"]["code"] == "overloaded"


def test_a_key_s_rate(tmp_path: Path) -> None:
    with serving(tmp_path, per_minute=3) as server:
        statuses = [server.ask().status_code for _ in range(5)]
        assert statuses == [200, 200, 200, 429, 429]
        refused = server.ask()
        assert 1 <= int(refused.headers["retry-after"]) <= 20
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        server.assert_settled()


def test_a_body_that_is_too_large_or_never_comes(tmp_path: Path) -> None:
    with serving(tmp_path, body_bytes=1000) as server:
        assert server.ask(messages=[{"role": "user", "content": "x" * 1000}]).status_code == 413

        def parts() -> Iterator[bytes]:
            yield from [b"x" * 600] * 3

        response = server.http.post(
            "/v1/chat/completions", content=parts(), headers={"content-type": "application/json"}
        )
        assert response.status_code == 413
        server.service.limits = replace(server.service.limits, stall_timeout=0.3)
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as client:
            client.sendall(request_head(9) + b"{")
            client.settimeout(120)
            assert b" 408 " in client.recv(4096)
        server.assert_settled()


@pytest.mark.parametrize("model", ["slow", "slow+cot"])
def test_a_request_has_its_time(tmp_path: Path, model: str) -> None:
    with serving(tmp_path, timeout=0.4) as server:
        refused = server.ask(model)
        assert (refused.status_code, refused.json()["error"]["code"]) == (504, "timeout")
        server.assert_settled()
        server.service.limits = replace(server.service.limits, timeout=2.0)  # it begins before, also if late
        last = server.ask(model, stream=True).text.split("\n\n")[-3]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        server.assert_settled()
        assert server.spent_and_held()[0] > 0


def test_limits_that_make_no_sense() -> None:
    for wrong in (
        {"concurrency": 0},
        {"queue": -1},
        {"timeout": 0},
        {"stall_timeout": float("nan")},
        {"per_minute": 0},
    ):
        with pytest.raises(InputError):
            Limits(**wrong)  # type: ignore[arg-type]


async def test_slots_are_given_in_the_order_of_asking() -> None:
    limiter = ConcurrencyLimiter(1, 3)
    await limiter.acquire()
    order: list[int] = []

    async def visit(number: int) -> None:
        await limiter.acquire()
        order.append(number)
        await asyncio.sleep(0)
        limiter.release()

    visits = [asyncio.create_task(visit(number)) for number in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFull):
        await limiter.acquire()
    visits[1].cancel()
    await asyncio.sleep(0)
    limiter.release()
    await asyncio.gather(*visits, return_exceptions=True)
    assert (order, limiter.running, limiter.queued) == ([0, 2], 0, 0)


async def test_a_slot_given_to_a_cancelled_waiter_is_passed_on() -> None:
    limiter = ConcurrencyLimiter(1, 2)
    await limiter.acquire()
    visit = asyncio.create_task(limiter.acquire())
    await asyncio.sleep(0)
    limiter.release()
    visit.cancel()
    with pytest.raises(asyncio.CancelledError):
        await visit
    assert limiter.running == 0


async def test_a_slot_freed_while_its_waiter_is_cancelled_goes_to_the_next() -> None:
    limiter = ConcurrencyLimiter(1, 2)
    await limiter.acquire()
    visits = [asyncio.create_task(limiter.acquire()) for _ in range(2)]
    await asyncio.sleep(0)
    visits[0].cancel()
    limiter.release()  # before the cancelled one runs again
    ends = await asyncio.gather(*visits, return_exceptions=True)
    assert [type(end) for end in ends] == [asyncio.CancelledError, type(None)]
    assert (limiter.running, limiter.queued) == (1, 0)


async def test_background_work_waits_for_all_others_and_leaves_a_quarter_of_the_slots() -> None:
    limiter = ConcurrencyLimiter(4, 2)
    order: list[str] = []

    async def visit(name: str, *, background: bool = False) -> None:
        await (limiter.acquire_background(name) if background else limiter.acquire(name))
        order.append(name)

    lines = [asyncio.create_task(visit(name, background=True)) for name in ("a", "a", "a", "a", "b")]
    await asyncio.sleep(0)
    assert (order, limiter.running, limiter.queued) == (["a", "a", "a"], 3, 0)
    await limiter.acquire("live")
    asked = [asyncio.create_task(visit(f"live {number}")) for number in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFull):
        await limiter.acquire("another")
    for _ in range(2):
        limiter.release("a", background=True)
    await asyncio.sleep(0)
    assert order[3:] == ["live 0", "live 1"]
    limiter.release("live")
    await asyncio.sleep(0)
    assert order[5:] == ["b"]  # it has fewer than the other key
    lines[3].cancel()
    await asyncio.gather(*lines, *asked, return_exceptions=True)
    limiter.release("live 0")
    await asyncio.sleep(0)
    assert limiter.running == 3


async def test_a_background_slot_given_to_a_cancelled_waiter_is_passed_on() -> None:
    limiter = ConcurrencyLimiter(1, 2)
    await limiter.acquire()
    visit = asyncio.create_task(limiter.acquire_background())
    await asyncio.sleep(0)
    limiter.release()
    visit.cancel()
    with pytest.raises(asyncio.CancelledError):
        await visit
    assert limiter.running == 0
    await limiter.acquire_background()


async def test_a_free_slot_goes_to_the_key_that_uses_the_fewest() -> None:
    limiter = ConcurrencyLimiter(2, 10)
    order: list[str] = []

    async def visit(name: str) -> None:
        await limiter.acquire(name)
        order.append(name)

    for _ in range(2):
        await limiter.acquire("greedy")
    visits = [asyncio.create_task(visit(name)) for name in ("greedy", "greedy", "modest", "greedy")]
    await asyncio.sleep(0)
    for _ in range(2):
        limiter.release("greedy")
        await asyncio.sleep(0)
    assert order == ["modest", "greedy"]
    for name in ("modest", "greedy", "greedy", "greedy"):
        limiter.release(name)
        await asyncio.sleep(0)
    await asyncio.gather(*visits)
    assert (limiter.running, limiter.queued) == (0, 0)


async def test_one_key_leaves_a_share_of_the_slots_and_of_the_queue() -> None:
    share = fair_share(8)
    assert share == 6
    assert (fair_share(1), fair_share(2), fair_share(3)) == (1, 1, 2)
    limiter = ConcurrencyLimiter(8, 4)
    greedy = [asyncio.create_task(limiter.acquire("greedy", share)) for _ in range(10)]
    await asyncio.sleep(0)
    assert (limiter.running, limiter.queued) == (6, 4)
    for _ in range(2):
        await limiter.acquire("modest", share)
    waiting = [asyncio.create_task(limiter.acquire("modest", share)) for _ in range(3)]
    await asyncio.wait([*greedy, *waiting], timeout=0.1)
    assert [type(each.exception()) for each in greedy if each.done() and each.exception()] == [QueueFull] * 2
    assert type(waiting[2].exception()) is QueueFull, "half of the queue each"
    limiter.release("modest")
    await waiting[0]
    assert (limiter.running, limiter.queued) == (8, 3)
    for each in (*greedy, *waiting):
        each.cancel()
    await asyncio.gather(*greedy, *waiting, return_exceptions=True)
    assert (limiter.running, limiter.queued) == (8, 0)


def test_choices_count_for_the_rate() -> None:
    now = 0.0
    buckets = TokenBuckets(lambda: now)
    buckets.consume("k", 60)
    buckets.charge("k", 69)
    with pytest.raises(RateLimitExceeded) as refused:
        buckets.consume("k", 60)
    assert refused.value.retry_after == 11
    buckets.consume("other", 60)
    now = 11.0
    buckets.consume("k", 60)


def test_a_request_of_several_choices_counts_as_several(tmp_path: Path) -> None:
    with serving(tmp_path, per_minute=3) as server:
        assert server.ask(n=3).status_code == 200
        assert server.ask().status_code == 429
        server.assert_settled()


def test_one_key_does_not_take_all_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path, concurrency=2, queue=2) as server, ThreadPoolExecutor(4) as clients:
        go_on = hold_back(server.client.model("slow"), monkeypatch)
        greedy, _ = server.keys.create("greedy")
        modest, _ = server.keys.create("modest")

        def ask(key: str, model: str) -> int:
            return server.ask(model, max_tokens=5, headers={"authorization": f"Bearer {key}"}).status_code

        calls = [clients.submit(ask, greedy, "slow") for _ in range(3)]
        wait_until(lambda: server.service.limiter.queued == 2)
        assert ask(modest, "fast") == 200
        assert not any(call.done() for call in calls)
        go_on.set()
        server.keys.revoke("modest")
        assert [call.result() for call in calls] == [200, 200, 200]
        server.assert_settled()


def test_a_rate_fills_up_again() -> None:
    now = 0.0
    buckets = TokenBuckets(lambda: now)
    for _ in range(60):
        buckets.consume("k", 60)
    with pytest.raises(RateLimitExceeded) as refused:
        buckets.consume("k", 60)
    assert refused.value.retry_after == 1
    buckets.consume("other", 60)
    now = 2.5
    buckets.consume("k", 60)
    buckets.consume("k", 60)
    with pytest.raises(RateLimitExceeded):
        buckets.consume("k", 60)


# --- the end ----------------------------------------------------------------------------------------------


def test_while_it_ends_it_refuses_and_lets_those_that_run_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tmp_path, grace=120) as server, ThreadPoolExecutor(1) as clients:
        go_on = hold_back(server.client.model("slow"), monkeypatch)
        running = clients.submit(server.ask, "slow", max_tokens=100)
        wait_until(lambda: server.service.limiter.running == 1)
        server.uvicorn.stop()
        wait_until(lambda: server.service.draining)
        refused = server.ask("fast")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert "retry-after" in refused.headers
        assert server.http.get("/health").status_code == 503
        go_on.set()
        assert running.result().status_code == 200
        server.assert_settled()


@pytest.mark.parametrize("model", ["slow", "slow+cot"])
def test_what_runs_longer_than_the_grace_period_is_cut_and_settled(tmp_path: Path, model: str) -> None:
    with serving(tmp_path, grace=0.2) as server, ThreadPoolExecutor(2) as clients:
        begun = threading.Event()

        def read() -> str:
            asked = chat_body(model, stream=True)
            with server.http.stream("POST", "/v1/chat/completions", json=asked) as response:
                parts = response.iter_text()
                first = next(parts)
                begun.set()
                return first + "".join(parts)

        written: Any = server.client.model("slow")
        stream = clients.submit(read)
        wait_until(begun.is_set)
        whole = clients.submit(server.ask, model)
        wait_until(lambda: len(written.calls) == 2)
        server.uvicorn.stop()
        assert whole.result().json()["error"]["code"] == "shutting_down"
        last = stream.result().split("\n\n")[-3]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
        server.assert_settled()
        assert server.spent_and_held()[0] > 0


def start(folder: Path, *options: str, pause: float = 0.01) -> tuple[subprocess.Popen[str], str]:
    """pause: seconds before each word of the slow model."""
    catalogue = write_catalogue(folder)
    catalogue.write_text(catalogue.read_text().replace("pause = 0.01", f"pause = {pause}"))
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
            str(catalogue),
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
    """40 clients stream, a third of them go away; SIGTERM comes in the middle of it."""
    process, url = start(tmp_path, "--concurrency", "12", "--queue", "64", "--grace", "1")

    async def visit(http: httpx.AsyncClient, number: int) -> str:
        body = chat_body("slow" if number % 2 else "slow+cot", stream=True, max_tokens=150)
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
        async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=100)) as http:
            tasks = [asyncio.create_task(visit(http, number)) for number in range(40)]
            while sum(task.done() for task in tasks) < 20:
                await asyncio.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            return await asyncio.gather(*tasks)

    ends = asyncio.run(visits())
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors, errors
    assert "left" in ends
    with Ledger(tmp_path / "ledger.db") as ledger:
        holds = ledger.holds()
        assert holds
        assert {hold.state for hold in holds} <= {"posted", "void"}
        budget = ledger.budget("serve")
        posts = [entry for entry in ledger.entries() if entry.kind == "post"]
        assert (budget.posted_nanousd, budget.held_nanousd) == (sum(post.nanousd for post in posts), 0)
        assert ledger.check() == []


def test_a_second_signal_cuts_at_once(tmp_path: Path) -> None:
    process, url = start(tmp_path, "--grace", "600", pause=0.2)  # 80 s, if it were not cut
    done = threading.Event()

    def ask() -> None:
        httpx.post(f"{url}/chat/completions", json=chat_body("slow", max_tokens=400), timeout=120)
        done.set()

    threading.Thread(target=ask, daemon=True).start()
    health = url.removesuffix("/v1") + "/health"
    wait_until(lambda: httpx.get(health, timeout=60).json()["in_flight"] == 1)
    process.send_signal(signal.SIGINT)
    wait_until(lambda: httpx.get(health, timeout=60).status_code == 503)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert done.wait(60)
    process.communicate()
