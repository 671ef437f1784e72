"""Cases in which other projects' cost tracking and instrumentation failed, tried on `viaticum.budget`."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from decimal import Decimal
from typing import Any

import openai
import pytest
from forms_server import FormsServer
from langchain.agents import create_agent
from langchain_openai import ChatOpenAI

import viaticum
from viaticum.agents.instrumentation.prices import CallPrices
from viaticum.agents.instrumentation.requests import ModelCall, may_cost, model_call
from viaticum.agents.instrumentation.usage import UsageReader
from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.models.remote.request import load_litellm

PRICES = {"small": ("1", "2")}
COST = Decimal("0.000022")
ASK: Any = [{"role": "user", "content": "2+2?"}]


def test_a_raw_response_that_streams_keeps_its_interface(server: FormsServer) -> None:
    with viaticum.budget("1", prices=PRICES) as budget:
        raw = server.openai().chat.completions.with_raw_response.create(
            model="small", messages=ASK, stream=True
        )
        assert raw.headers["content-type"].startswith("text/event-stream")
        assert "".join(chunk.choices[0].delta.content or "" for chunk in raw.parse()) == "It is four."
    assert budget.left().posted_usd == COST


def test_an_async_streamed_response_is_settled_after_its_parse(server: FormsServer) -> None:
    async def ask() -> str:
        async with openai.AsyncOpenAI(api_key="k", base_url=f"{server.url}/v1") as asking:
            create = asking.responses.with_streaming_response.create
            async with create(model="small", input="2+2?", stream=True) as response:
                events = await response.parse()
                return "".join(
                    [each.delta async for each in events if each.type == "response.output_text.delta"]
                )

    with viaticum.budget("1", prices=PRICES) as budget:
        assert asyncio.run(ask()) == "It is four."
    assert budget.left().posted_usd == COST


def test_a_task_that_is_cancelled_in_its_call_costs_what_was_held(server: FormsServer) -> None:
    server.pause = 5

    async def ask() -> None:
        async with openai.AsyncOpenAI(api_key="k", base_url=f"{server.url}/v1", max_retries=0) as asking:
            stream = await asking.chat.completions.create(
                model="small", messages=ASK, stream=True, max_tokens=1000
            )
            async for _ in stream:
                pass

    async def leave() -> None:
        call = asyncio.create_task(ask())
        while not server.calls and not call.done():
            await asyncio.sleep(0.02)
        call.cancel()
        with suppress(asyncio.CancelledError):
            await call

    with viaticum.budget("1", prices=PRICES) as budget:
        asyncio.run(leave())
    assert Decimal("0.002") < budget.left().posted_usd < Decimal("0.0025")
    assert budget.left().held_nanousd == 0


def test_many_threads_at_once_never_exceed_what_is_left(server: FormsServer) -> None:
    barrier, answered = threading.Barrier(8), []

    def ask() -> None:
        asking = server.openai(max_retries=0)
        barrier.wait(60)
        with suppress(openai.APIStatusError):
            asking.chat.completions.create(model="small", messages=ASK, max_tokens=256)
            answered.append(1)

    with viaticum.budget("0.0015", prices=PRICES) as budget:
        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(server.calls) == len(answered) >= 1
    assert budget.left().posted_usd == len(answered) * COST <= Decimal("0.0015")
    assert budget.ledger.check() == []


def test_a_free_model_is_answered_at_the_cap(server: FormsServer) -> None:
    with viaticum.budget("0.000001", prices=PRICES, unpriced=["free"]):
        with pytest.raises(openai.APIStatusError):
            server.openai().chat.completions.create(model="small", messages=ASK)
        server.openai().chat.completions.create(model="free", messages=ASK)
    assert [body["model"] for _, body in server.calls] == ["free"]


def test_a_stream_of_litellm_is_held(server: FormsServer) -> None:
    with viaticum.budget("1", prices=PRICES) as budget:
        pieces = load_litellm().completion(
            "openai/small", ASK, api_base=f"{server.url}/v1", api_key="k", stream=True
        )
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == "It is four."
    assert budget.left().posted_usd == COST


def test_an_unchanged_agent_of_langchain_is_held(server: FormsServer) -> None:
    model = ChatOpenAI(model="small", base_url=f"{server.url}/v1", api_key="k")  # type: ignore[arg-type]
    agent = create_agent(model, [])
    with viaticum.budget("1", prices=PRICES) as budget:
        agent.invoke({"messages": [{"role": "user", "content": "2+2?"}]})
        asyncio.run(agent.ainvoke({"messages": [{"role": "user", "content": "2+2?"}]}))
        list(agent.stream({"messages": [{"role": "user", "content": "2+2?"}]}, stream_mode="messages"))
    assert budget.calls == {"small": 3}
    assert budget.left().posted_usd == 3 * COST


def test_events_are_read_however_they_are_cut_and_ended() -> None:
    events = (
        b'data: {"choices": [{"delta": {"content": "\xc3\xa9"}}], "usage": null}\r\n\r\n'
        b": still there\n\n"
        b'data: {"object": "chunk", "usage": {"prompt_tokens": 3, "completion_tokens": 1}}\n\n'
        b"data: [DONE]"
    )
    for size in (1, 2, 7, len(events)):
        reader = UsageReader("chat", hides_usage=True)
        passed = b"".join(reader.feed(events[at : at + size]) for at in range(0, len(events), size))
        passed += reader.finish()
        count = reader.count()
        assert count is not None
        assert (count.input_tokens, count.output_tokens) == (3, 1)
        assert b"usage" in passed
        assert b"prompt_tokens" not in passed
        assert passed.endswith(b"data: [DONE]")


@pytest.mark.parametrize(
    ("url", "costs"),
    [
        ("https://api.openai.com/v1/batches", True),
        ("https://api.openai.com/v1/images/generations", True),
        ("https://api.openai.com/v1/audio/speech", True),
        ("https://api.openai.com/v1/containers", True),
        ("https://api.openai.com/v1/responses/compact", True),
        ("https://api.openai.com/v1/threads/t/runs", True),
        ("https://api.openai.com/v1/moderations", False),
        ("https://api.openai.com/v1/files", False),
        ("https://api.openai.com/v1/responses/resp_1/cancel", False),
        ("https://api.anthropic.com/v1/messages/count_tokens", False),
        ("https://api.anthropic.com/v1/messages/batches", True),
        ("https://bedrock-runtime.us-east-1.amazonaws.com/model/x/converse", True),
        ("https://generativelanguage.googleapis.com/v1beta/models/g:generateContent", True),
        ("https://me.openai.azure.com/openai/deployments/x/images/generations", True),
        ("https://api.github.com/graphql", False),
        ("https://notopenai.com/v1/batches", False),
    ],
)
def test_posts_that_may_cost_are_known_by_their_host(url: str, costs: bool) -> None:
    assert model_call("POST", url, b'{"model": "x"}') is None
    assert may_cost("POST", url) is costs


def test_azures_deployment_is_its_model() -> None:
    url = "https://me.openai.azure.com/openai/deployments/gpt-4o/chat/completions?api-version=1"
    call = model_call("POST", url, b'{"messages": []}')
    assert call is not None
    assert (call.model, call.host, call.limit_name) == (
        "gpt-4o",
        "me.openai.azure.com",
        "max_completion_tokens",
    )


@pytest.mark.parametrize(
    ("entry", "host", "labels"),
    [
        ({"litellm_model": "bedrock/nova"}, "bedrock-runtime.eu-central-1.amazonaws.com", {"eu"}),
        ({"litellm_model": "bedrock/nova"}, "bedrock-runtime-fips.us-east-1.amazonaws.com", set()),
        ({"litellm_model": "openai/nova"}, "api.openai.com", {"eu"}),
        ({"litellm_model": "openai/nova"}, "eu.api.openai.com", {"eu"}),
        ({"litellm_model": "openai/nova"}, "us.api.openai.com", set()),
        ({"litellm_model": "azure/nova"}, "somewhere.openai.azure.com", set()),
        (
            {"litellm_model": "azure/nova", "api_base": "https://somewhere.openai.azure.com"},
            "somewhere.openai.azure.com",
            {"eu"},
        ),
    ],
)
def test_a_region_is_that_of_the_host(entry: dict[str, str], host: str, labels: set[str]) -> None:
    shared = {"description": "x", "kind": "remote", "context_length": 1000, "region": "eu"}
    spec = ModelSpec.model_validate({"name": "nova", "input_price": 1, "output_price": 1, **shared, **entry})
    prices = CallPrices({}, Catalogue([spec]), ())
    assert prices.labels(ModelCall("chat", host, "nova", {}, None, False)) == labels
