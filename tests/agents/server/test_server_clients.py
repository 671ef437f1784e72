"""The clients that people use, unchanged, over the loopback: openai, LangChain and LiteLLM."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from viaticum_server import RunningServer, serving

WORDS = "Seven times six is forty-two. The answer is 42."
CHAT: Any = [{"role": "user", "content": "What is 6 times 7?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with serving(tmp_path_factory.mktemp("home")) as server:
        yield server
        server.assert_settled()


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_openai(client: openai.OpenAI) -> None:
    for model in ("fast", "fast+cot", "auto"):
        completion = client.chat.completions.create(model=model, messages=CHAT, temperature=0, seed=1, n=1)
        assert completion.choices[0].message.content == WORDS
        assert completion.usage is not None
        assert completion.usage.completion_tokens == 9
        pieces = list(
            client.chat.completions.create(
                model=model, messages=CHAT, stream=True, stream_options={"include_usage": True}
            )
        )
        assert "".join(each.choices[0].delta.content or "" for each in pieces if each.choices) == WORDS
        assert pieces[-1].usage == completion.usage
        cost = (pieces[-1].model_extra or {})["viaticum"]["cost_nanousd"]
        assert cost == (completion.model_extra or {})["viaticum"]["cost_nanousd"] > 0
    assert "fast+cot" in [model.id for model in client.models.list()]
    assert client.models.retrieve("fast+cot").id == "fast+cot"


def test_openai_options_headers_and_errors(server: RunningServer, client: openai.OpenAI) -> None:
    raw = client.with_options(timeout=30).chat.completions.with_raw_response.create(
        model="auto", messages=CHAT, extra_body={"budget": "0.01", "policy": "cheapest:0.5"}
    )
    assert raw.headers["x-viaticum-route"] == "fast+cot"
    with pytest.raises(openai.NotFoundError, match="unknown model"):
        client.chat.completions.create(model="nobody", messages=CHAT)
    with pytest.raises(openai.BadRequestError, match="logprobs"):
        client.chat.completions.create(model="fast", messages=CHAT, logprobs=True)
    with pytest.raises(openai.APIStatusError) as poor:
        client.chat.completions.create(model="fast", messages=CHAT, extra_body={"budget": 1e-7})
    assert (poor.value.status_code, poor.value.type, poor.value.code) == (
        402,
        "insufficient_quota",
        "budget_exceeded",
    )
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.2).chat.completions.create(model="slow", messages=CHAT)
    with client.chat.completions.create(model="slow", messages=CHAT, stream=True) as stream:
        next(iter(stream))
    server.assert_settled()


async def test_openai_async(server: RunningServer) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        completion = await client.chat.completions.create(model="auto", messages=CHAT)
        assert completion.choices[0].message.content == WORDS
        pieces = await client.chat.completions.create(model="fast", messages=CHAT, stream=True)
        assert "".join([each.choices[0].delta.content or "" async for each in pieces]) == WORDS
        async with client.chat.completions.stream(model="fast", messages=CHAT) as stream:
            final = await stream.get_final_completion()
        assert final.choices[0].message.content == WORDS


def test_langchain(server: RunningServer) -> None:
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(
        model="auto", base_url=f"{server.url}/v1", api_key="any", stream_usage=True, max_retries=0
    )  # type: ignore[arg-type]
    message = chat.invoke("What is 6 times 7?")
    assert message.content == WORDS
    assert message.usage_metadata is not None
    assert message.usage_metadata["output_tokens"] == 9
    pieces = list(chat.stream([("system", "Be brief."), ("user", "What is 6 times 7?")]))
    assert "".join(str(piece.content) for piece in pieces) == WORDS
    assert [each.content for each in chat.batch(["one?", "two?"])] == [WORDS, WORDS]


def test_litellm(server: RunningServer) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import litellm

        options: dict[str, Any] = {
            "api_base": f"{server.url}/v1",
            "api_key": "any",
            "messages": CHAT,
            "max_retries": 0,
        }
        completion: Any = litellm.completion(model="openai/auto", **options)
        assert completion.choices[0].message.content == WORDS
        pieces: Any = litellm.completion(model="openai/fast+cot", stream=True, **options)
        assert "".join(each.choices[0].delta.content or "" for each in pieces) == WORDS
        with pytest.raises(litellm.NotFoundError):
            litellm.completion(model="openai/nobody", **options)
