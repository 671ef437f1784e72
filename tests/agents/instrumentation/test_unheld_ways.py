"""Ways to a provider that are not held, and settings that cost more than tokens: told, or refused by name."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.error import URLError

import aiohttp
import anthropic
import httpx2
import openai
import pytest
import requests
import websockets.asyncio.client
import websockets.sync.client
import websockets.sync.server
from forms_server import FormsServer

import viaticum
from viaticum.agents.instrumentation.prices import CallPrices
from viaticum.agents.instrumentation.requests import ModelCall
from viaticum.errors import UnknownPrice
from viaticum.models.remote.prices import has_fee, list_entry

PRICES = {"small": ("1", "2")}
ASK: Any = [{"role": "user", "content": "2+2?"}]
CHAT = {"model": "small", "messages": ASK, "max_tokens": 50}


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's loopback is a known provider."""
    monkeypatch.setattr("viaticum.agents.instrumentation.requests.PROVIDER_HOSTS", re.compile(r"^127\."))


@pytest.fixture(scope="module")
def socket_url() -> Iterator[str]:
    """A WebSocket that answers each message with itself."""

    def answer(connection: Any) -> None:
        for message in connection:
            connection.send(message)

    with websockets.sync.server.serve(answer, "127.0.0.1", 0) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"ws://127.0.0.1:{listening.socket.getsockname()[1]}/v1/realtime"
        listening.shutdown()
        thread.join()


def by_websockets(url: str) -> None:
    with websockets.sync.client.connect(url) as connection:
        connection.send("x")
        assert connection.recv() == "x"


def by_async_websockets(url: str) -> None:
    async def talk() -> None:
        async with websockets.asyncio.client.connect(url) as connection:
            await connection.send("x")
            assert await connection.recv() == "x"

    asyncio.run(talk())


def by_aiohttp(url: str) -> None:
    async def talk() -> None:
        async with aiohttp.ClientSession() as session, session.ws_connect(url) as connection:
            await connection.send_str("x")
            assert (await connection.receive()).data == "x"

    asyncio.run(talk())


def by_httpx2(url: str) -> None:
    """As its WebSocket client opens one, which needs a package that is not here."""
    headers = {"upgrade": "websocket", "connection": "upgrade"}
    response = httpx2.get(url.replace("ws://", "http://"), headers=headers)
    if "viaticum" in response.text:
        raise ValueError(response.text)


def by_openai(url: str) -> None:
    with openai.OpenAI(api_key="k", websocket_base_url=url.removesuffix("/realtime")) as client:
        client.realtime.connect(model="small").enter().close()


@pytest.mark.filterwarnings("ignore:connect.. must be used as a context manager:DeprecationWarning")
@pytest.mark.usefixtures("provider")
@pytest.mark.parametrize(
    "talk",
    [by_websockets, by_async_websockets, by_aiohttp, by_httpx2, by_openai],
    ids=lambda talk: talk.__name__,
)
def test_a_websocket_to_a_provider_is_refused_or_told(socket_url: str, talk: Any) -> None:
    with viaticum.budget("1", prices=PRICES) as budget, pytest.raises(Exception, match=r"viaticum|400"):
        talk(socket_url)
    assert [name.split()[0] for name in budget.refused] == ["WebSocket"]
    assert budget.unheld == {}
    with viaticum.budget("1", prices=PRICES, unheld="allow") as budget:
        talk(socket_url)
    assert [(name.split()[0], number) for name, number in budget.unheld.items()] == [("WebSocket", 1)]
    talk(socket_url)


@pytest.mark.usefixtures("provider")
def test_python_s_own_client_is_refused_or_told_once(server: FormsServer) -> None:
    def ask() -> Any:
        request = urllib.request.Request(
            f"{server.url}/v1/chat/completions",
            json.dumps(CHAT).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=20) as response:
            return json.load(response)

    with viaticum.budget("1", prices=PRICES) as budget, pytest.raises(URLError, match="viaticum"):
        ask()
    assert server.calls == []
    with viaticum.budget("1", prices=PRICES, unheld="allow") as budget:
        assert ask()["choices"]
        requests.post(f"{server.url}/v1/chat/completions", json=CHAT, timeout=20)
    assert sorted((name.rsplit(" ", 1)[1], number) for name, number in budget.unheld.items()) == [
        ("http.client", 1),
        ("urllib3", 1),
    ]


@pytest.mark.usefixtures("provider")
def test_an_address_in_a_query_hides_no_provider(server: FormsServer) -> None:
    url = f"{server.url}/v1/chat/completions?from=https://example.com"
    with viaticum.budget("1", prices=PRICES) as budget:
        with pytest.raises(URLError, match="viaticum"):
            urllib.request.urlopen(url, b"{}", timeout=20)
        with pytest.raises(requests.ConnectionError, match="viaticum"):
            requests.post(url, json=CHAT, timeout=20)
    assert server.calls == []
    assert budget.refused.total() == 2


@pytest.mark.parametrize(
    "more",
    [
        {"plugins": [{"id": "web"}]},
        {"models": ["small", "a-dearer-one"]},
        {"search_parameters": {"mode": "on"}},
        {"data_sources": [{"type": "azure_search"}]},
        {"mcp_servers": [{"type": "url", "url": "https://example.com", "name": "x"}]},
        {"web_search_options": {}},
    ],
    ids=lambda more: next(iter(more)),
)
def test_what_a_provider_reads_or_calls_by_itself_is_refused_by_name(
    server: FormsServer, more: dict[str, Any]
) -> None:
    (name,) = more
    if not more[name]:
        more = {name: {"search_context_size": "high"}}
    with viaticum.budget("1", prices=PRICES) as budget:
        with pytest.raises(openai.APIStatusError, match=name):
            server.openai().chat.completions.create(**CHAT, extra_body=more)  # type: ignore[call-overload]
        with pytest.raises(anthropic.APIStatusError, match=name):
            server.anthropic().messages.create(**CHAT, extra_body=more)  # type: ignore[call-overload]
    assert server.calls == []
    assert budget.refused.total() == 2


@pytest.mark.parametrize(
    ("host", "model"),
    [
        ("api.perplexity.ai", "sonar"),
        ("api.openai.com", "gpt-4o-search-preview"),
        ("api.openai.com", "gpt-5-search-api"),
    ],
)
def test_a_model_with_a_fee_for_its_searches_has_no_listed_price(host: str, model: str) -> None:
    call = ModelCall("chat", host, model, CHAT, 50, False)
    with pytest.raises(UnknownPrice, match="give one"):
        CallPrices({}, None, ()).price(call)
    assert CallPrices({model: viaticum_price()}, None, ()).price(call) == viaticum_price()


def viaticum_price() -> Any:
    from viaticum.money import Price

    return Price.per_million(1, 2)


@pytest.mark.parametrize(
    "model", ["gpt-4o", "gemini/gemini-2.5-pro", "claude-sonnet-4-5", "perplexity/openai/gpt-5.5"]
)
def test_a_model_that_may_search_where_it_is_asked_to_keeps_its_price(model: str) -> None:
    assert list_entry(model)
    assert not has_fee(model, list_entry(model))


def test_a_stream_that_an_async_caller_breaks_off_is_settled_with_its_loop(server: FormsServer) -> None:
    """Nobody closes it: the loop does, at its end."""

    async def ask() -> None:
        client = openai.AsyncOpenAI(api_key="k", base_url=f"{server.url}/v1")
        async for _ in await client.chat.completions.create(**CHAT, stream=True):  # type: ignore[call-overload]
            break
        await client.close()

    with viaticum.budget("1", prices=PRICES) as budget:
        asyncio.run(ask())
    assert budget.left().held_nanousd == 0
    assert budget.left().posted_nanousd > 100_000  # of 50 tokens that may have been written


def test_tools_that_run_side_by_side_stop_at_the_cap() -> None:
    """A check before each call, and a count after it, would let all of them pass."""
    began: list[int] = []

    @viaticum.priced("0.01")
    async def look_up(number: int) -> int:
        began.append(number)
        await asyncio.sleep(0.05)
        return number

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*map(look_up, range(8)), return_exceptions=True)

    with viaticum.budget("0.025") as budget:
        results = asyncio.run(all_of_them())
    assert len(began) == 2
    assert sum(isinstance(each, viaticum.BudgetExceeded) for each in results) == 6
    assert budget.left().posted_nanousd == 20_000_000
