"""Legal requests in the shapes that clients send them: nothing in them is dropped without a word."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai_server import OpenAIServer, running_server, spec_for
from viaticum_server import RunningServer, chat_body, serving, write_catalogue

from viaticum.catalogue import Catalogue
from viaticum.models.remote.request import load_litellm

USER = {"role": "user", "content": "What is 6 times 7?"}
EPHEMERAL = {"type": "ephemeral"}
IMAGE = {"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}}


@pytest.fixture(scope="module")
def far() -> Iterator[OpenAIServer]:
    load_litellm()  # once, before a client waits for it
    with running_server() as far:
        yield far


@pytest.fixture(scope="module")
def server(far: OpenAIServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with a model behind a loopback provider, and with scripted ones."""
    folder = tmp_path_factory.mktemp("forms")
    catalogue = Catalogue.load(write_catalogue(folder))
    catalogue = catalogue.with_models(spec_for(far, cache_write_price="1.25"))
    with serving(folder, catalogue=catalogue) as server:
        yield server


@pytest.fixture(autouse=True)
def anew(far: OpenAIServer) -> None:
    far.reset()


def answered(server: RunningServer, model: str = "fast", **body: Any) -> dict[str, Any]:
    response = server.ask(model, **body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def refused(server: RunningServer, model: str = "fast", **body: Any) -> str:
    """The message, the same for a stream."""
    spent, messages = server.spent_and_held(), []
    for stream in ({}, {"stream": True}):
        response = server.ask(model, **body, **stream)
        assert response.status_code == 400, response.text
        messages.append(response.json()["error"]["message"])
    assert server.spent_and_held() == spent
    assert messages[0] == messages[1]
    return str(messages[0])


# What says nothing, or only what is the default


@pytest.mark.parametrize("model", ["fast", "fast+cot", "auto", "far"])
@pytest.mark.parametrize(
    "body",
    [
        dict.fromkeys(("audio", "functions", "function_call", "prediction", "anything")),
        dict.fromkeys(("stop", "n", "tools", "tool_choice", "response_format", "seed", "stream")),
        {"stream": True, "stream_options": {"include_usage": None, "other": None}},
        {"modalities": ["text"]},
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": True},
        {"response_format": {"type": "text"}, "service_tier": "auto", "verbosity": "medium"},
        {"service_tier": "default"},
        {"top_k": -1},
        {"user": "u", "metadata": {"a": "b"}, "store": False, "safety_identifier": "s"},
    ],
    ids=["unknown nulls", "nulls", "null options", "text", "no tools", "defaults", "tier", "top_k", "beside"],
)
def test_what_asks_for_nothing_is_taken_by_every_model(
    server: RunningServer, model: str, body: dict[str, Any]
) -> None:
    response = server.ask(model, **body)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("turn", "text"),
    [
        ({"role": "assistant", "content": "42", "tool_calls": []}, "42"),
        ({"role": "assistant", "content": None, "refusal": "I cannot"}, "I cannot"),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "I cannot"}]}, "I cannot"),
        ({"role": "assistant", "content": None}, ""),
        ({"role": "assistant", "content": None, "tool_calls": []}, ""),
        (
            {"role": "assistant", "content": "42", "audio": None, "annotations": []},
            "42",
        ),
        ({"role": "assistant", "content": "42", "refusal": None, "reasoning_content": "6 * 7"}, "42"),
        ({"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]}, ""),
    ],
)
def test_turns_of_an_assistant_as_clients_send_them_back(
    server: RunningServer, far: OpenAIServer, turn: dict[str, Any], text: str
) -> None:
    chat = [USER, turn, USER]
    for model in ("fast", "auto"):
        answered(server, model, messages=chat)
    answered(server, "far", messages=chat)
    assert far.requests[-1]["messages"][1] == {"role": "assistant", "content": text}


def test_function_calls_of_before_are_tool_calls(server: RunningServer, far: OpenAIServer) -> None:
    asked = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    answered(server, "far", messages=[USER, asked, {"role": "function", "name": "f", "content": "42"}, USER])
    call, result = far.requests[-1]["messages"][1:3]
    assert call["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
    assert (result["role"], result["tool_call_id"]) == ("tool", call["tool_calls"][0]["id"])
    assert "no message before it calls" in refused(
        server, "far", messages=[USER, {"role": "function", "name": "f", "content": "42"}]
    )


# What changes the answer goes to the model, or is refused by name


def test_settings_reach_a_remote_model(server: RunningServer, far: OpenAIServer) -> None:
    settings = {
        "frequency_penalty": 0.5,
        "presence_penalty": -0.5,
        "logit_bias": {"5": 3},
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "top_p": 0.5,
        "seed": 3,
        "reasoning_effort": "low",
    }
    answered(server, "far", **settings)
    sent = far.requests[-1]
    assert {name: sent[name] for name in settings} == settings


def test_tiers_that_cost_no_more_are_sent_and_others_are_refused(
    server: RunningServer, far: OpenAIServer
) -> None:
    answered(server, "far", service_tier="flex")
    assert far.requests[-1]["service_tier"] == "flex"
    for tier in ("priority", "scale"):
        assert "service_tier" in refused(server, "far", service_tier=tier)
    for model in ("fast", "fast+cot", "auto"):
        assert "service_tier" in refused(server, model, service_tier="flex")


def test_an_effort_is_refused_by_a_model_that_does_not_think(server: RunningServer) -> None:
    for model in ("fast", "fast+cot"):
        assert "does not think" in refused(server, model, reasoning_effort="low")
        answered(server, model, reasoning_effort="none")


def test_marks_for_the_cache_are_sent_and_others_refuse_them(
    server: RunningServer, far: OpenAIServer
) -> None:
    parts = [
        {"type": "text", "text": "Rules. ", "cache_control": EPHEMERAL},
        {"type": "text", "text": "More."},
    ]
    chat = [{"role": "system", "content": parts}, {**USER, "cache_control": EPHEMERAL}]
    answered(server, "far", messages=chat)
    system, user = far.requests[-1]["messages"]
    assert system == {"role": "system", "content": parts}
    assert user["content"] == [{"type": "text", "text": USER["content"], "cache_control": EPHEMERAL}]
    for model in ("fast", "fast+cot", "auto"):
        assert "cache_control" in refused(server, model, messages=chat)
    hour = [{"role": "user", "content": "hi", "cache_control": {"type": "ephemeral", "ttl": "1h"}}]
    assert "ttl 1h" in refused(server, "far", messages=hour)


def test_tokens_written_into_the_cache_are_told_and_charged(server: RunningServer, far: OpenAIServer) -> None:
    far.usage = {
        "prompt_tokens": 100,
        "completion_tokens": 10,
        "total_tokens": 110,
        "prompt_tokens_details": {"cached_tokens": 0, "cache_creation_tokens": 80},
    }
    before = server.spent_and_held()[0]
    answer = answered(server, "far", messages=[{**USER, "cache_control": EPHEMERAL}])
    assert answer["usage"]["prompt_tokens_details"]["cache_creation_tokens"] == 80
    assert server.spent_and_held()[0] - before == 20 * 1_000 + 80 * 1_250 + 10 * 2_000


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (
            {"messages": [{"role": "system", "content": [IMAGE]}]},
            "only a user's message has images",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "'input_audio' is not"),
        ({"messages": [{**USER, "audio": {"id": "a"}}]}, "messages.0.audio"),
        ({"modalities": ["text", "audio"]}, "modalities.1"),
        ({"audio": {"voice": "v"}}, "unknown field 'audio'"),
        ({"functions": [{"name": "f"}]}, "unknown field 'functions'"),
        ({"stream_options": {"other": 1}, "stream": True}, "unknown field 'other'"),
        ({"tool_choice": "required"}, "tool_choice goes with tools"),
        ({"verbosity": "low"}, "verbosity"),
        ({"messages": [{"role": "user", "content": [{"type": "refusal", "refusal": "no"}]}]}, "send text"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    server: RunningServer, body: dict[str, Any], says: str
) -> None:
    given = {key: value for key, value in body.items() if key != "stream"}
    response = server.ask("fast", **body)
    assert response.status_code == 400
    assert says in response.json()["error"]["message"]
    if "stream" not in body:
        assert says in refused(server, **given)


# Around the body


@pytest.mark.parametrize(
    ("encoding", "compress"), [("gzip", gzip.compress), ("x-gzip", gzip.compress), ("deflate", zlib.compress)]
)
def test_a_compressed_body_is_read(server: RunningServer, encoding: str, compress: Any) -> None:
    body = compress(json.dumps(chat_body()).encode())
    headers = {"content-type": "application/json", "content-encoding": encoding}
    assert server.http.post("/v1/chat/completions", content=body, headers=headers).status_code == 200
    for wrong, status, says in (
        (body[:-5], 400, "cut off"),
        (b"no gzip", 400, f"not {encoding}"),
        (compress(b" " * (1 << 27)), 413, "larger than"),
    ):
        response = server.http.post("/v1/chat/completions", content=wrong, headers=headers)
        assert (response.status_code, says in response.text) == (status, True)
    response = server.http.post(
        "/v1/chat/completions", content=body, headers={**headers, "content-encoding": "br"}
    )
    assert (response.status_code, "'br'" in response.text) == (415, True)


def test_every_response_has_a_request_id(server: RunningServer) -> None:
    for path in ("/health", "/v1/models", "/nowhere", "/openapi.json"):
        assert server.http.get(path).headers["x-request-id"].startswith("req_")
    assert server.ask(temperature=9).headers["x-request-id"].startswith("req_")
    given = {"x-request-id": "trace-1.a:b"}
    assert server.ask(headers=given).headers["x-request-id"] == "trace-1.a:b"
    assert server.ask(stream=True, headers=given).headers["x-request-id"] == "trace-1.a:b"
    assert server.ask(headers={"x-request-id": "no spaces"}).headers["x-request-id"].startswith("req_")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        answer = client.chat.completions.create(model="fast", messages=[USER])  # type: ignore[list-item]
    assert answer._request_id


def test_keys_in_the_headers_of_other_clients(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        token, _ = server.keys.create("k")
        for headers, status in (
            ({"api-key": token}, 200),
            ({"x-api-key": token}, 200),
            ({"authorization": f"Bearer {token}", "x-api-key": "none"}, 200),
            ({"authorization": "Basic eDp5", "x-api-key": token}, 200),
            ({"x-api-key": "wrong"}, 401),
            ({"authorization": "Bearer wrong", "x-api-key": token}, 401),
        ):
            assert server.ask(headers=headers).status_code == status
        azure = openai.AzureOpenAI(
            base_url=f"{server.url}/v1", api_key=token, api_version="v1", max_retries=0
        )
        with azure as client:
            assert client.models.list().data


def test_a_stream_has_comments_while_a_model_is_silent(tmp_path: Path) -> None:
    with (
        running_server() as far,
        serving(tmp_path, catalogue=Catalogue([spec_for(far, max_retries=0)]), keep_alive=0.1) as server,
    ):
        far.pause = 0.25
        body = chat_body("far", stream=True)
        with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = [line for line in response.iter_lines() if line]
        assert lines.count(": keep-alive") >= 2
        assert lines[-1] == "data: [DONE]"
        messages: Any = [USER]
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client,
            client.chat.completions.stream(model="far", messages=messages) as stream,
        ):
            text = stream.get_final_completion().choices[0].message.content
        assert text == "you said: What is 6 times 7?"
        server.assert_settled()
