"""The server over HTTP: response shapes, headers, costs and errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from viaticum_server import LONG_TEXT, WORD, RunningServer, chat_body, serving

from viaticum import FakeRouter


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with serving(tmp_path_factory.mktemp("home")) as server:
        yield server


@pytest.fixture(autouse=True)
def _settled(server: RunningServer) -> Iterator[None]:
    yield
    server.assert_settled()


def events_of(response: Any) -> list[Any]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


# --- answers ----------------------------------------------------------------------------------------------


def test_a_chat_is_answered_in_openais_shape_and_paid_for(server: RunningServer) -> None:
    spent = server.spent_and_held()[0]
    response = server.ask()
    assert response.status_code == 200
    completion = response.json()
    assert set(completion) == {
        "id",
        "object",
        "created",
        "model",
        "system_fingerprint",
        "choices",
        "usage",
        "viaticum",
    }
    assert completion["object"] == "chat.completion"
    assert completion["choices"] == [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": "Seven times six is forty-two. The answer is 42.",
                "refusal": None,
            },
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert completion["usage"]["prompt_tokens"] == 5
    assert completion["usage"]["total_tokens"] == 14
    assert server.spent_and_held() == (spent + 14 * WORD, 0)
    assert response.headers["x-viaticum-route"] == "fast"
    assert response.headers["x-viaticum-cost"] == str(14 * WORD)
    assert response.headers["x-viaticum-cost-usd"] == "0.000014000"
    assert int(response.headers["x-viaticum-left"]) == 10**9 - spent - 14 * WORD


def test_a_pair_goes_through_its_strategy(server: RunningServer) -> None:
    completion = server.ask("fast+cot").json()
    assert completion["viaticum"]["answer"] == "42"
    assert completion["viaticum"]["routes"] == ["fast+cot"]
    assert completion["usage"]["prompt_tokens"] > 100, "its worked examples"
    assert server.ask("mute+pot").json()["viaticum"]["answer"] is None


def test_auto_is_the_routed_workflow(server: RunningServer) -> None:
    response = server.ask("auto")
    assert response.headers["x-viaticum-route"] == "fast+cot"
    assert response.json()["viaticum"]["answer"] == "42"


def test_a_stream_has_the_same_words_and_its_cost_in_the_last_chunk(server: RunningServer) -> None:
    for model in ("fast", "fast+cot", "auto"):
        whole = server.ask(model).json()
        response = server.ask(model, stream=True, stream_options={"include_usage": True})
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-viaticum-route"] == whole["viaticum"]["route"]
        first, *middle, last, usage = events_of(response)
        assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert all(set(event["choices"][0]["delta"]) == {"content"} for event in middle)
        text = "".join(event["choices"][0]["delta"]["content"] for event in middle)
        assert text == whole["choices"][0]["message"]["content"]
        assert last["choices"][0]["finish_reason"] == "stop"
        assert last["viaticum"]["cost_nanousd"] == whole["viaticum"]["cost_nanousd"]
        assert (usage["choices"], usage["usage"]) == ([], whole["usage"])
        assert len({event["id"] for event in (first, *middle, last, usage)}) == 1


def test_a_program_s_output_ends_the_text(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.client.model("fast"), "script", "```python\nprint(6 * 7)\n```")
    completion = server.ask("fast+pot").json()
    assert completion["choices"][0]["message"]["content"].endswith("```\n\n42")
    streamed = events_of(server.ask("fast+pot", stream=True))
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in streamed)
    assert text == completion["choices"][0]["message"]["content"]


def test_a_stream_shows_a_second_try_after_an_empty_line(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.client, "router", FakeRouter("mute+pot", "fast+cot"))
    streamed = events_of(server.ask("auto", stream=True))
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in streamed)
    assert text == "I cannot tell\n\nSeven times six is forty-two. The answer is 42."
    assert streamed[-1]["viaticum"]["routes"] == ["mute+pot", "fast+cot"]
    assert server.ask("auto").json()["choices"][0]["message"]["content"].startswith("Seven")


def test_several_choices_are_several_calls(server: RunningServer) -> None:
    completion = server.ask(n=3).json()
    assert [choice["index"] for choice in completion["choices"]] == [0, 1, 2]
    assert completion["viaticum"]["cost_nanousd"] == 3 * 14 * WORD
    assert completion["usage"]["completion_tokens"] == 27
    ends = [
        event["choices"][0]["index"]
        for event in events_of(server.ask(n=2, stream=True))
        if event["choices"][0]["finish_reason"]
    ]
    assert ends == [0, 1]


def test_what_is_asked_reaches_the_model(server: RunningServer) -> None:
    completion = server.ask("slow", max_tokens=3).json()
    assert completion["choices"][0]["finish_reason"] == "length"
    assert completion["usage"]["completion_tokens"] == 3
    assert server.ask("slow", stop=["w2 ", "w9"]).json()["choices"][0]["message"]["content"] == "w0 w1 "
    assert (
        server.ask("fast+cot", stop="forty").json()["choices"][0]["message"]["content"]
        == "Seven times six is "
    )
    server.ask(seed=7, temperature=0.5, top_p=0.9, max_completion_tokens=11, n=2)
    model: Any = server.client.model("fast")
    one, two = (generation for _, generation in model.calls[-2:])
    assert (one.seed, two.seed, one.temperature, one.top_p, one.max_new_tokens) == (7, 8, 0.5, 0.9, 11)
    refused = server.ask(tools=[{"type": "function", "function": {"name": "f"}}])
    assert (refused.status_code, "tools" in refused.json()["error"]["message"]) == (400, True)


def test_messages_in_parts_and_of_developers(server: RunningServer) -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "6 times 7?"}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    server.ask(messages=messages)
    model: Any = server.client.model("fast")
    assert model.calls[-1][0] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 6 times 7?"},
    ]
    assert server.ask("fast+cot", messages=messages).status_code == 200


# --- money ------------------------------------------------------------------------------------------------


def test_a_request_s_own_budget_is_never_passed(server: RunningServer) -> None:
    refused = server.ask(budget="0.000001")
    assert refused.status_code == 402
    assert refused.json()["error"]["type"] == "insufficient_quota"
    assert refused.json()["error"]["code"] == "budget_exceeded"
    for model in ("fast+cot", "auto"):
        assert server.ask(model, budget="0.000001", stream=True).status_code == 402
    response = server.ask(budget=0.000019, max_tokens=14)
    assert response.status_code == 200
    assert response.headers["x-viaticum-left"] == str(5 * WORD)


@pytest.mark.parametrize("model", ["fast", "fast+cot"])
def test_choices_that_were_paid_for_are_given_where_the_budget_ends(
    server: RunningServer, model: str
) -> None:
    whole = server.ask(model, max_tokens=14).json()
    cost = whole["viaticum"]["cost_nanousd"]
    limit = {"budget": f"0.{cost * 2 + 14 * WORD:09}", "max_tokens": 14, "n": 5}
    completion = server.ask(model, **limit).json()
    ends = [(each["message"]["content"], each["finish_reason"]) for each in completion["choices"]]
    made = [(whole["choices"][0]["message"]["content"], "stop")]
    assert ends == made * 2 + [("", "length")] * 3
    assert completion["viaticum"]["cost_nanousd"] == 2 * cost
    assert "left" in completion["viaticum"]["reason"]
    streamed = [event["choices"][0] for event in events_of(server.ask(model, stream=True, **limit))]
    finished = {each["index"]: each["finish_reason"] for each in streamed if each["finish_reason"]}
    assert finished == {0: "stop", 1: "stop", 2: "length", 3: "length", 4: "length"}
    server.assert_settled()


def test_requests_with_a_budget_of_their_own_leave_no_scope(server: RunningServer) -> None:
    before = [budget.name for budget in server.client.ledger.budgets()]
    for number in range(5):
        assert server.ask(budget="0.000001").status_code == 402
        assert server.ask(budget=0.000019, max_tokens=14, stream=number % 2 == 0).status_code == 200
    assert [budget.name for budget in server.client.ledger.budgets()] == before
    assert server.client.ledger.check() == []


def test_over_the_server_s_budget(tmp_path: Path) -> None:
    with serving(tmp_path, budget="0.00002") as server:
        assert server.ask(max_tokens=9).status_code == 200
        refused = server.ask(max_tokens=9)
        assert (refused.status_code, refused.json()["error"]["code"]) == (402, "budget_exceeded")
        server.client.ledger.pause("serve")
        assert server.ask(max_tokens=1).json()["error"]["code"] == "budget_closed"
        server.assert_settled()


# --- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "EOF"),
        (b"{", "EOF"),
        (b"[]", "object"),
        (b"\xff\xfe", "Invalid JSON"),
        (b'{"model": "fast"}', "messages"),
        (b'{"model": "fast", "messages": []}', "messages"),
        (b'{"model": "fast", "messages": "hi"}', "messages"),
        (b'{"model": 1, "messages": [{"role": "user", "content": "hi"}]}', "model"),
        (b'{"model": "fast", "messages": [{"role": "user", "content": "\\ud800"}]}', "Invalid JSON"),
        (b"[" * 100_000, "recursion"),
        (
            b'{"model": "fast", "temperature": NaN, "messages": [{"role": "user", "content": "hi"}]}',
            "temperature",
        ),
        (b'{"model": "fast", "budget": NaN, "messages": [{"role": "user", "content": "hi"}]}', "budget"),
        (b'{"model": "fast", "budget": 1e999, "messages": [{"role": "user", "content": "hi"}]}', ""),
    ],
)
def test_a_body_that_is_none(server: RunningServer, body: bytes, message: str) -> None:
    response = server.http.post(
        "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
    )
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert message in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"temperature": 3}, 400, "temperature"),
        ({"temperature": "1"}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"n": 0}, 400, "n"),
        ({"n": 1000}, 400, "n"),
        ({"seed": 2**70}, 400, "seed"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 9000}, 400, "context"),
        ({"stop": ""}, 400, "stop"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"frequency_penalty": 2.5}, 400, "frequency_penalty"),
        ({"repetition_penalty": 0}, 400, "repetition_penalty"),
        ({"logit_bias": {"x": 5}}, 400, "logit_bias"),
        ({"logit_bias": {"1": 500}}, 400, "logit_bias"),
        ({"stream_options": {"include_usage": True}}, 400, "stream: true"),
        ({"bugdet": 1}, 400, "did you mean 'budget'?"),
        ({"budget": -1}, 400, "budget"),
        ({"budget": "many"}, 400, "dollars"),
        ({"budget": "1e99"}, 400, "range"),
        ({"model": "auto", "policy": "dearest"}, 400, "policy"),
        ({"model": "nobody"}, 404, "unknown model 'nobody'"),
        ({"model": "fast+magic"}, 404, "unknown strategy 'magic'"),
        ({"model": "nobody+cot"}, 404, "nobody"),
        ({"model": "auto", "tools": [{"type": "function"}]}, 400, "tools"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages"),
        ({"messages": [{"role": "king", "content": "hi"}]}, 400, "role"),
        ({"messages": [{"role": "user"}]}, 400, "no content"),
        ({"model": "auto", "messages": [{"role": "user", "content": " "}]}, 400, "empty"),
        ({"model": "auto", "messages": [{"role": "assistant", "content": "hi"}]}, 400, "user's question"),
    ],
)
def test_what_cannot_be_done_is_refused_and_says_why(
    server: RunningServer, body: dict[str, Any], status: int, message: str
) -> None:
    spent = server.spent_and_held()
    for stream in ({}, {"stream": True}):
        if stream and "stream_options" in body:
            continue
        response = server.ask(**{"model": "fast", **body, **stream})
        assert response.status_code == status, response.text
        assert message in response.json()["error"]["message"]
    assert server.spent_and_held() == spent


def test_only_json_is_read_so_that_no_web_page_can_ask(server: RunningServer) -> None:
    body = json.dumps(chat_body())
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        response = server.http.post("/v1/chat/completions", content=body, headers={"content-type": kind})
        assert response.status_code == 400
        assert "content-type" in response.json()["error"]["message"]
    stranger = server.http.post("/v1/chat/completions", json=chat_body(), headers={"host": "evil.example"})
    assert stranger.status_code == 401


def test_a_model_that_breaks_is_charged_for_what_it_wrote(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from viaticum.errors import ModelError

    model: Any = server.client.model("fast")
    plain = model.stream

    def breaks(messages: Any, generation: Any) -> Iterator[Any]:
        for index, piece in enumerate(plain(messages, generation)):
            if index == after:
                raise ModelError("it broke")
            yield piece

    monkeypatch.setattr(model, "stream", breaks)
    spent, after = server.spent_and_held()[0], 0
    assert server.ask().status_code == 502
    assert server.ask(stream=True).status_code == 502
    assert server.spent_and_held()[0] == spent
    after = 3
    for model_name in ("fast", "fast+cot"):
        events = events_of(server.ask(model_name, stream=True))
        assert events[-1]["error"]["message"] == "it broke"
        assert server.ask(model_name).status_code == 502
    server.assert_settled()
    assert server.spent_and_held()[0] > spent


def test_a_mistake_of_ours_is_an_error_object_without_details(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server.client.model("fast"), "stream", lambda *_: 1 / 0)
    response = server.ask()
    assert response.status_code == 500
    assert "division" not in response.text
    assert "ZeroDivisionError" in caplog.text


# --- the other routes --------------------------------------------------------------------------------------


def test_models_health_metrics(server: RunningServer) -> None:
    names = [model["id"] for model in server.http.get("/v1/models").json()["data"]]
    assert names[0] == "auto"
    assert {"fast", "fast+cot", "slow+cod"} <= set(names)
    assert server.http.get("/v1/models/fast+cot").json()["id"] == "fast+cot"
    assert server.http.get("/v1/models/nobody").status_code == 404
    assert server.http.get("/health").json() == {"status": "ok", "in_flight": 0, "queued": 0}
    server.ask("made-up-name")
    page = server.http.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    assert 'viaticum_requests_total{model="unknown",status="404"}' in page.text
    assert "made-up-name" not in page.text
    posted = server.spent_and_held()[0]
    assert f'viaticum_spent_dollars{{budget="serve"}} {posted / 1e9}' in page.text
    for name in (
        "viaticum_tokens_total",
        "viaticum_request_seconds_bucket",
        'viaticum_holds{state="dispatched"} 0.0',
        "viaticum_in_flight 0.0",
    ):
        assert name in page.text
    for response in (server.http.get("/nowhere"), server.http.put("/health")):
        assert response.status_code in (404, 405)
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_the_long_text_is_longer_than_the_capacity_of_a_channel() -> None:
    from viaticum.agents.server.channel import CAPACITY

    assert len(LONG_TEXT.split()) > 4 * CAPACITY
