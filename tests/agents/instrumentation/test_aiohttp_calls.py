"""Model calls through aiohttp in a budget, which Google's SDK makes in asynchronous code."""

from __future__ import annotations

import asyncio
import json
from decimal import Decimal
from typing import Any

import aiohttp
import pytest
from forms_server import FormsServer

import viaticum

PRICES = {"small": ("1", "2")}
COST = Decimal("0.000022")  # 12 tokens read and 5 written
GEMINI: dict[str, Any] = {"contents": [{"role": "user", "parts": [{"text": "2+2?"}]}]}
CHAT: dict[str, Any] = {"model": "small", "messages": [{"role": "user", "content": "2+2?"}]}


def url_of(server: FormsServer, path: str) -> str:
    return f"{server.url}/v1beta/models/small:{path}"


async def test_a_call_of_gemini_is_held_as_google_s_sdk_makes_it(server: FormsServer) -> None:
    with viaticum.budget("1", prices=PRICES, max_tokens=300) as budget:
        async with aiohttp.ClientSession() as session:
            response = await session.request(
                method="POST",
                url=url_of(server, "generateContent"),
                headers={"content-type": "application/json"},
                data=json.dumps(GEMINI).encode(),
            )
            assert "four." in await response.text()
            stream = await session.request(
                method="POST",
                url=url_of(server, "streamGenerateContent?alt=sse"),
                headers={"content-type": "application/json"},
                data=json.dumps(GEMINI).encode(),
            )
            assert isinstance(stream, aiohttp.ClientResponse)
            lines = b"".join([data async for data in stream.content.iter_any()])
            assert b"four." in lines
    assert budget.calls == {"small": 2}
    assert budget.left().posted_usd == 2 * COST
    assert budget.left().held_nanousd == 0
    assert budget.ledger.check() == []
    assert [body["generationConfig"] for _, body in server.calls] == [{"maxOutputTokens": 300}] * 2


@pytest.mark.parametrize("stream", [False, True])
async def test_other_forms_are_held_too_and_their_bodies_stay_whole(
    server: FormsServer, stream: bool
) -> None:
    address = f"{server.url}/v1/chat/completions"
    async with aiohttp.ClientSession() as session:
        async with session.post(address, json={**CHAT, "stream": stream}) as response:
            plain = await response.read()
        with viaticum.budget("1", prices=PRICES) as budget:
            async with session.post(address, json={**CHAT, "stream": stream}) as response:
                held = await response.read()
    assert budget.left().posted_usd == COST
    assert _texts(held, stream) == _texts(plain, stream)
    assert b"usage" not in held or not stream


def _texts(body: bytes, stream: bool) -> list[str]:
    if not stream:
        return [json.loads(body)["choices"][0]["message"]["content"]]
    events = [line[6:] for line in body.decode().splitlines() if line.startswith("data: {")]
    choices = [json.loads(event)["choices"] for event in events]
    return [each[0]["delta"].get("content") or "" for each in choices if each]


@pytest.mark.parametrize(
    "read",
    [
        lambda content: content.read(),
        lambda content: _joined(content.iter_any()),
        lambda content: _joined(content.iter_chunked(7)),
        lambda content: _joined(content),
        lambda content: _joined(_chunks(content)),
        lambda content: _exactly(content),
    ],
)
async def test_a_stream_reads_as_aiohttp_s_does(server: FormsServer, read: Any) -> None:
    address = url_of(server, "streamGenerateContent?alt=sse")
    async with aiohttp.ClientSession() as session:
        plain = await (await session.post(address, json=GEMINI)).read()
        with viaticum.budget("1", prices=PRICES) as budget:
            response = await session.post(address, json=GEMINI)
            assert await read(response.content) == plain
            assert response.content.at_eof()
    assert budget.left().posted_usd == COST


async def _joined(pieces: Any) -> bytes:
    return b"".join([piece async for piece in pieces])


async def _chunks(content: Any) -> Any:
    async for data, _ in content.iter_chunks():
        yield data


async def _exactly(content: Any) -> bytes:
    data = bytearray()
    while True:
        try:
            data += await content.readexactly(5)
        except EOFError as error:
            return bytes(data + error.partial)  # type: ignore[attr-defined]


async def test_what_does_not_fit_is_not_sent(server: FormsServer) -> None:
    with viaticum.budget("0.00001", prices=PRICES) as budget:
        async with aiohttp.ClientSession() as session:
            with pytest.raises(aiohttp.ClientResponseError, match="left") as refused:
                await session.post(url_of(server, "generateContent"), json=GEMINI)
    assert refused.value.status == 402
    assert server.calls == []
    assert budget.refused == {"the budget is used up": 1}


async def test_a_call_that_fails_is_free(server: FormsServer) -> None:
    server.script = [503, 429]
    with viaticum.budget("1", prices=PRICES) as budget:
        async with aiohttp.ClientSession() as session:
            async with session.post(url_of(server, "generateContent"), json=GEMINI) as response:
                assert response.status == 503
            with pytest.raises(aiohttp.ClientResponseError):
                await session.post(url_of(server, "generateContent"), json=GEMINI, raise_for_status=True)
            for _ in range(10):
                await asyncio.sleep(0.02)  # aiohttp frees the connection once its writer has ended
            with pytest.raises(aiohttp.ClientConnectorError):
                await session.post("http://127.0.0.1:9/v1beta/models/small:generateContent", json=GEMINI)
    assert (budget.left().posted_nanousd, budget.left().held_nanousd) == (0, 0)
    assert budget.calls.total() == 3


@pytest.mark.parametrize("way", ["closed", "block"])
async def test_a_stream_that_is_left_costs_what_was_held(server: FormsServer, way: str) -> None:
    server.pause = 0.2
    address, asked = f"{server.url}/v1/chat/completions", {**CHAT, "stream": True}
    with viaticum.budget("1", prices=PRICES, max_tokens=100) as budget:
        async with aiohttp.ClientSession() as session:
            if way == "block":
                async with session.post(address, json=asked) as response:
                    await response.content.readany()
            else:
                response = await session.post(address, json=asked)
                await response.content.readany()
                response.close()
    (hold,) = budget.ledger.holds()
    assert hold.state == "posted"
    assert budget.left().posted_nanousd == hold.held_nanousd > 200_000


async def test_what_is_no_known_call_is_told_as_before(server: FormsServer) -> None:
    async with aiohttp.ClientSession() as session:
        with viaticum.budget("1", prices=PRICES) as budget:
            with pytest.raises(ConnectionError, match="aiohttp cannot be held"):
                await session.post("https://api.openai.com/v1/images/generations", json={"prompt": "x"})
            form = aiohttp.FormData({"a": "b"})
            async with session.post(f"{server.url}/v1/chat/completions", data=form):
                pass
    assert budget.calls.total() == 0
