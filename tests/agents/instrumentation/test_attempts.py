"""Clients that send a call again by themselves: each attempt has a hold of its own, or is not sent."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from decimal import Decimal
from typing import Any, Literal

import aiohttp
import anthropic
import boto3
import botocore.client
import botocore.hooks
import httpx
import litellm
import openai
import pytest
from bedrock_server import BedrockServer, running_bedrock
from botocore.config import Config
from botocore.exceptions import ClientError, ReadTimeoutError
from forms_server import FormsServer
from langchain_openai import ChatOpenAI

import viaticum
from viaticum.agents.instrumentation.scope import BudgetScope

PRICES = {"small": ("1", "2")}
COST = Decimal("0.000022")  # 12 tokens read and 5 written
ASK: Any = [{"role": "user", "content": "2+2?"}]
CHAT = {"model": "small", "messages": ASK, "max_tokens": 256}
TIMEOUT = 1.0  # seconds, of the clients
# What is sent once and settled costs COST; a call that may have been charged for costs its whole hold, which
# is more than 256 tokens written and less than that and 200 tokens read.
LEAST, MOST = Decimal("0.000512"), Decimal("0.000712")


@pytest.fixture(scope="module")
def bedrock_running() -> Iterator[BedrockServer]:
    with running_bedrock() as server:
        yield server


@pytest.fixture
def bedrock(bedrock_running: BedrockServer) -> BedrockServer:
    bedrock_running.reset()
    return bedrock_running


def boto(url: str, mode: Literal["legacy", "standard", "adaptive"] = "legacy", attempts: int = 5) -> Any:
    """boto3's client with its own retries, without any file or variable of this machine."""
    session = boto3.session.Session(aws_access_key_id="k", aws_secret_access_key="s", region_name="us-east-1")
    retries: Any = {"total_max_attempts": attempts, "mode": mode}
    config = Config(retries=retries, connect_timeout=5, read_timeout=TIMEOUT)
    return session.client("bedrock-runtime", endpoint_url=url, config=config)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """botocore waits up to some seconds between two attempts."""
    monkeypatch.setattr("botocore.endpoint.time.sleep", lambda seconds: None)


def asks(operation: str) -> dict[str, Any]:
    if operation.startswith("converse"):
        messages = [{"role": "user", "content": [{"text": "2+2?"}]}]
        return {"modelId": "small", "messages": messages, "inferenceConfig": {"maxTokens": 256}}
    body = {"anthropic_version": "bedrock-2023-05-31", "max_tokens": 256, "messages": ASK}
    return {"modelId": "small", "body": json.dumps(body)}


@pytest.mark.parametrize("mode", ["legacy", "standard", "adaptive"])
@pytest.mark.parametrize(
    ("fault", "charged"), [("stall", True), ("drop", True), (429, False), (500, False), (503, False)]
)
def test_each_attempt_of_boto3_is_held_by_itself(
    bedrock: BedrockServer, mode: Any, fault: object, charged: bool
) -> None:
    """One that timed out or broke off may have been charged for, one that was refused is free."""
    bedrock.script = [fault]
    with viaticum.budget("1", prices=PRICES) as budget, closing(boto(bedrock.url, mode)) as client:
        done = client.converse(**asks("converse"))
    assert done["ResponseMetadata"]["RetryAttempts"] == 1
    check(budget, bedrock.calls, attempts=2, charged=int(charged))


@pytest.mark.parametrize(
    "operation", ["converse", "converse_stream", "invoke_model", "invoke_model_with_response_stream"]
)
def test_each_operation_of_bedrock_is_held_by_attempt(bedrock: BedrockServer, operation: str) -> None:
    bedrock.script = ["stall", 500, 429]
    with viaticum.budget("1", prices=PRICES) as budget, closing(boto(bedrock.url)) as client:
        response = getattr(client, operation)(**asks(operation))
        for name in {"stream", "body"} & set(response):
            list(response[name])
    check(budget, bedrock.calls, attempts=4, charged=1)


def test_a_retry_of_boto3_that_cannot_be_paid_is_not_sent(bedrock: BedrockServer) -> None:
    bedrock.script = ["stall"] * 5
    with (
        viaticum.budget(str(LEAST + MOST), prices=PRICES) as budget,
        closing(boto(bedrock.url)) as client,
        pytest.raises(ClientError, match="left") as refused,
    ):
        client.converse(**asks("converse"))
    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 402
    assert len(bedrock.calls) == budget.calls.total() == 1
    assert budget.refused == {"the budget is used up": 1}
    assert budget.left().held_nanousd == 0
    assert LEAST < budget.left().posted_usd < MOST


def test_attempts_that_all_time_out_are_all_charged(bedrock: BedrockServer) -> None:
    bedrock.script = ["stall"] * 3
    with (
        viaticum.budget("1", prices=PRICES) as budget,
        closing(boto(bedrock.url, attempts=3)) as client,
        pytest.raises(ReadTimeoutError),
    ):
        client.converse(**asks("converse"))
    assert len(bedrock.calls) == budget.calls.total() == 3
    assert 3 * LEAST < budget.left().posted_usd < 3 * MOST


def test_a_ctrl_c_in_an_attempt_or_between_two_holds_nothing(
    bedrock: BedrockServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def run(script: list[Any]) -> BudgetScope:
        bedrock.script = script
        with viaticum.budget("1", prices=PRICES) as budget, closing(boto(bedrock.url)) as client:
            with pytest.raises(KeyboardInterrupt):
                client.converse(**asks("converse"))
            return budget

    monkeypatch.setattr("botocore.endpoint.time.sleep", interrupt)
    between = run([500])
    assert (between.left().posted_nanousd, between.left().held_nanousd) == (0, 0)
    monkeypatch.setattr("botocore.endpoint.time.sleep", lambda seconds: None)
    attempts = iter([lambda request: None, interrupt])
    send = botocore.endpoint.Endpoint._send

    def sends(endpoint: Any, request: Any) -> Any:
        next(attempts)(request)
        return send(endpoint, request)

    monkeypatch.setattr(botocore.endpoint.Endpoint, "_send", sends)
    within = run([500])
    assert within.calls == {"small": 2}
    assert within.left().held_nanousd == 0
    assert LEAST < within.left().posted_usd < MOST


def test_outside_a_budget_attempts_are_as_they_were(bedrock: BedrockServer) -> None:
    with closing(boto(bedrock.url)) as client:
        with viaticum.budget("1", prices=PRICES) as budget:
            client.converse(**asks("converse"))
        bedrock.script = [500]
        client.converse(**asks("converse"))
    assert len(bedrock.calls) == 3
    assert budget.calls == {"small": 1}


def test_threads_that_share_a_new_client_hold_each_attempt_once(
    bedrock: BedrockServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """botocore lets each thread register that passes its check before the first one is through."""
    append = botocore.hooks._PrefixTrie.append_item

    def slowly(*args: Any, **options: Any) -> None:
        threading.Event().wait(0.05)
        append(*args, **options)

    monkeypatch.setattr(botocore.hooks._PrefixTrie, "append_item", slowly)
    with viaticum.budget("1", prices=PRICES) as budget, closing(boto(bedrock.url)) as client:
        together = threading.Barrier(4)

        def ask() -> None:
            together.wait(30)
            client.converse(**asks("converse"))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(bedrock.calls) == budget.calls.total() == 4
    assert budget.left().posted_usd == 4 * COST


class Retrying(httpx.BaseTransport):
    """Sends again what failed, as the transports for retries of other packages do."""

    def __init__(self) -> None:
        self._inner = httpx.HTTPTransport()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        for _ in range(4):
            with suppress(httpx.TransportError):
                response = self._inner.handle_request(request)
                if response.status_code not in (429, 500):
                    return response
                response.close()
        return self._inner.handle_request(request)

    def close(self) -> None:
        self._inner.close()


class RetryingAsync(httpx.AsyncHTTPTransport):
    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        for _ in range(4):
            with suppress(httpx.TransportError):
                response = await super().handle_async_request(request)
                if response.status_code not in (429, 500):
                    return response
                await response.aclose()
        return await super().handle_async_request(request)


async def retry_in_middleware(request: aiohttp.ClientRequest, handler: Any) -> aiohttp.ClientResponse:
    for _ in range(4):
        with suppress(aiohttp.ServerTimeoutError):
            response: aiohttp.ClientResponse = await handler(request)
            if response.status not in (429, 500):
                return response
            response.release()
    last: aiohttp.ClientResponse = await handler(request)
    return last


def by_openai(server: FormsServer, url: str) -> None:
    server.openai(max_retries=4, timeout=TIMEOUT).chat.completions.create(**CHAT)  # type: ignore[call-overload]


def by_openai_async(server: FormsServer, url: str) -> None:
    async def ask() -> None:
        async with openai.AsyncOpenAI(
            api_key="k", base_url=f"{url}/v1", max_retries=4, timeout=TIMEOUT
        ) as client:
            await client.chat.completions.create(**CHAT)  # type: ignore[call-overload]

    asyncio.run(ask())


def by_anthropic(server: FormsServer, url: str) -> None:
    server.anthropic(max_retries=4, timeout=TIMEOUT).messages.create(**CHAT)


def by_anthropic_async(server: FormsServer, url: str) -> None:
    async def ask() -> None:
        async with anthropic.AsyncAnthropic(
            api_key="k", base_url=url, max_retries=4, timeout=TIMEOUT
        ) as client:
            await client.messages.create(**CHAT)  # type: ignore[call-overload]

    asyncio.run(ask())


def by_litellm(server: FormsServer, url: str) -> None:
    litellm.completion(
        "openai/small",
        ASK,
        max_tokens=256,
        api_base=f"{url}/v1",
        api_key="k",
        timeout=TIMEOUT,
        max_retries=4,
    )


def by_litellm_async(server: FormsServer, url: str) -> None:
    ask = litellm.acompletion(
        "openai/small",
        ASK,
        max_tokens=256,
        api_base=f"{url}/v1",
        api_key="k",
        timeout=TIMEOUT,
        num_retries=4,
    )
    asyncio.run(ask)


def by_langchain(server: FormsServer, url: str) -> None:
    ChatOpenAI(
        model="small", base_url=f"{url}/v1", api_key="k", max_tokens=256, timeout=TIMEOUT, max_retries=4
    ).invoke("2+2?")


def by_transport(server: FormsServer, url: str) -> None:
    with httpx.Client(transport=Retrying(), timeout=TIMEOUT) as client:
        client.post(f"{url}/v1/chat/completions", json=CHAT).raise_for_status()


def by_transport_async(server: FormsServer, url: str) -> None:
    async def ask() -> None:
        async with httpx.AsyncClient(transport=RetryingAsync(), timeout=TIMEOUT) as client:
            (await client.post(f"{url}/v1/chat/completions", json=CHAT)).raise_for_status()

    asyncio.run(ask())


def by_aiohttp(server: FormsServer, url: str) -> None:
    async def ask() -> None:
        timeout = aiohttp.ClientTimeout(sock_read=TIMEOUT)
        async with (
            aiohttp.ClientSession(middlewares=(retry_in_middleware,), timeout=timeout) as session,
            session.post(f"{url}/v1/chat/completions", json=CHAT) as response,
        ):
            response.raise_for_status()
            await response.read()

    asyncio.run(ask())


CLIENTS: list[Callable[[FormsServer, str], None]] = [
    *(by_openai, by_openai_async, by_anthropic, by_anthropic_async, by_litellm, by_litellm_async),
    *(by_langchain, by_transport, by_transport_async, by_aiohttp),
]


@pytest.mark.parametrize("ask", CLIENTS, ids=lambda ask: ask.__name__)
def test_each_attempt_of_a_client_is_held_by_itself(server: FormsServer, ask: Any) -> None:
    server.script = ["stall", 429, 500]
    with viaticum.budget("1", prices=PRICES) as budget:
        ask(server, server.url)
    check(budget, server.calls, attempts=4, charged=1)


@pytest.mark.parametrize("ask", CLIENTS, ids=lambda ask: ask.__name__)
def test_a_retry_that_cannot_be_paid_is_not_sent(server: FormsServer, ask: Any) -> None:
    server.script = ["stall"] * 6
    with (
        viaticum.budget(str(LEAST + MOST), prices=PRICES) as budget,
        pytest.raises(Exception, match=r"left|402"),
    ):
        ask(server, server.url)
    assert len(server.calls) == budget.calls.total() == 1
    assert budget.left().held_nanousd == 0
    assert LEAST < budget.left().posted_usd < MOST


def check(budget: BudgetScope, sent: list[Any], *, attempts: int, charged: int) -> None:
    """One hold an attempt, and the costs of the last one and of those that may have been charged for."""
    assert len(sent) == budget.calls.total() == attempts
    assert budget.left().held_nanousd == 0
    assert COST + charged * LEAST <= budget.left().posted_usd < COST + charged * MOST + Decimal("1e-9")
    assert budget.ledger.check() == []


class Signed(httpx.Auth):
    """Fetches a token by a post of its own before each request, as OAuth does."""

    requires_response_body = True

    def __init__(self, url: str) -> None:
        self._url = url

    def auth_flow(self, request: httpx.Request) -> Any:
        token = yield httpx.Request("POST", f"{self._url}/token", json={})
        request.headers["authorization"] = f"Bearer {token.json()['id']}"
        yield request


def test_a_client_s_request_for_a_token_is_no_attempt(server: FormsServer) -> None:
    with (
        viaticum.budget("1", prices=PRICES) as budget,
        httpx.Client(auth=Signed(server.url), timeout=TIMEOUT) as client,
    ):
        client.post(f"{server.url}/v1/chat/completions", json=CHAT).raise_for_status()
    assert [path for path, _ in server.calls] == ["/token", "/v1/chat/completions"]
    assert budget.calls == {"small": 1}
    assert budget.left().posted_usd == COST


@pytest.mark.parametrize("way", ["httpx", "aiohttp"])
def test_a_call_that_is_sent_on_to_another_address_is_held_once(server: FormsServer, way: str) -> None:
    server.moved = "/v2/chat/completions"
    with viaticum.budget("1", prices=PRICES) as budget:
        if way == "aiohttp":
            by_aiohttp(server, server.url)
        else:
            with httpx.Client(follow_redirects=True, timeout=TIMEOUT) as client:
                client.post(f"{server.url}/v1/chat/completions", json=CHAT).raise_for_status()
    assert [path for path, _ in server.calls] == ["/v1/chat/completions", server.moved]
    assert budget.calls == {"small": 1}
    assert budget.left().posted_usd == COST
