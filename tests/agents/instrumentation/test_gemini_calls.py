"""Calls in Gemini's own form in a budget: whole, streamed, by LiteLLM, and what has no bound."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import httpx
import pytest
from forms_server import FormsServer

import viaticum
from viaticum.agents.instrumentation.gemini import gemini_call
from viaticum.agents.instrumentation.prices import CallPrices
from viaticum.agents.instrumentation.requests import may_cost
from viaticum.agents.instrumentation.usage import UsageReader
from viaticum.errors import InputError
from viaticum.models.remote.request import load_litellm

PRICES = {"small": ("1", "2")}
COST = Decimal("0.000022")  # 12 tokens read and 5 written, thoughts included
ASK: dict[str, Any] = {"contents": [{"role": "user", "parts": [{"text": "2+2?"}]}]}


def post(server: FormsServer, body: dict[str, Any], path: str = "small:generateContent") -> httpx.Response:
    return httpx.post(f"{server.url}/v1beta/models/{path}", json=body)


@pytest.mark.parametrize(
    "path", ["small:generateContent", "small:streamGenerateContent?alt=sse", "small:streamGenerateContent"]
)
def test_a_call_is_held_and_costs_what_is_reported(server: FormsServer, path: str) -> None:
    with viaticum.budget("1", prices=PRICES, max_tokens=300) as budget:
        assert post(server, ASK, path).status_code == 200
        with (
            httpx.Client() as client,
            client.stream("POST", f"{server.url}/v1beta/models/{path}", json=ASK) as response,
        ):
            assert b"four." in b"".join(response.iter_bytes())
    assert budget.calls == {"small": 2}
    assert budget.left().posted_usd == 2 * COST
    assert budget.left().held_nanousd == 0
    assert budget.ledger.check() == []
    assert [body["generationConfig"] for _, body in server.calls] == [{"maxOutputTokens": 300}] * 2


def test_litellm_s_calls_are_held(server: FormsServer) -> None:
    with viaticum.budget("1", prices=PRICES) as budget:
        for stream in (False, True):
            done = load_litellm().completion(
                "gemini/small", [{"role": "user", "content": "2+2?"}], api_base=server.url, api_key="k",
                stream=stream, max_tokens=50,
            )  # fmt: skip
            if stream:
                list(done)
    assert budget.left().posted_usd == 2 * COST
    assert len(server.calls) == 2


def test_what_does_not_fit_is_not_sent(server: FormsServer) -> None:
    with viaticum.budget("0.0001", prices=PRICES) as budget:
        refused = post(server, ASK)
    assert refused.status_code == 402
    assert "left" in refused.json()["error"]["message"]
    assert server.calls == []
    assert budget.refused == {"the budget is used up": 1}


def test_a_stream_that_is_left_costs_what_was_held(server: FormsServer) -> None:
    with (
        viaticum.budget("1", prices=PRICES, max_tokens=1000) as budget,
        httpx.Client() as client,
        client.stream("POST", f"{server.url}/v1beta/models/small:streamGenerateContent", json=ASK),
    ):
        pass
    assert Decimal("0.002") < budget.left().posted_usd < Decimal("0.0025")


@pytest.mark.parametrize(
    ("usage", "count"),
    [
        ((12, 3, 2, 17, 0), (12, 5)),
        ((500, 120, 10, 930, 300), (800, 130)),
        ((41, 5, 0, 389, 0), (41, 348)),  # thoughts that are in the total alone
        ((41, 0, 0, 60, 0), (41, 19)),  # no number of the answer's tokens
        ((41, 0, 30, 71, 0), (41, 30)),  # the limit went into thoughts
        ((41, 0, 0, 0, 0), None),
        ((0, 5, 0, 5, 0), None),
    ],
)
def test_usage_is_read_with_thoughts_and_results_of_tools(
    usage: tuple[int, ...], count: tuple[int, int] | None
) -> None:
    names = ("prompt", "candidates", "thoughts", "total", "toolUsePrompt")
    reported = {f"{name}TokenCount": number for name, number in zip(names, usage, strict=True) if number}
    reader = UsageReader("gemini")
    reader.read(
        json.dumps(
            {"candidates": [{"content": {"parts": [{"text": "x"}]}}], "usageMetadata": reported}
        ).encode()
    )
    found = reader.count()
    assert (found and (found.input_tokens, found.output_tokens)) == count


def test_fields_in_either_case_are_read_and_kept() -> None:
    for config, name in (("generationConfig", "maxOutputTokens"), ("generation_config", "max_output_tokens")):
        body = {**ASK, config: {name: 70, "temperature": 0}}
        call = gemini_call("POST", "https://x/v1beta/models/m:generateContent", json.dumps(body).encode())
        assert call is not None
        assert call.limit == 70
        assert call.limited(60) == {**ASK, config: {"temperature": 0, "maxOutputTokens": 60}}


IMAGE = {"inlineData": {"mimeType": "image/png", "data": "A" * 100_000}}


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"contents": [{"parts": [{"inlineData": {"mimeType": "audio/wav", "data": "AA"}}]}]}, "audio/wav"),
        ({"contents": [{"parts": [{"inline_data": {"mime_type": "application/pdf", "data": "AA"}}]}]}, "pdf"),
        ({"contents": [{"parts": [{"fileData": {"fileUri": "gs://x"}}]}]}, "file_data"),
        ({"contents": {"parts": {"fileData": {"fileUri": "gs://x"}}}}, "file_data"),
        ({"systemInstruction": {"parts": [{"fileData": {"fileUri": "gs://x"}}]}}, "file_data"),
        ({"contents": [{"parts": [{"functionResponse": {"parts": [
            {"inlineData": {"mimeType": "video/mp4", "data": "AA"}}]}}]}]}, "video/mp4"),
        ({"contents": [{"parts": [{"functionResponse": {"parts": [
            {"fileData": {"fileUri": "gs://film.mp4"}}]}}]}]}, "file_data"),
        ({"generationConfig": {"maxOutputTokens": 9}, "generation_config": {"candidateCount": 8}}, "twice"),
        ({"contents": [{"parts": [IMAGE]}]}, "image_tokens"),
        ({"tools": [{"googleSearch": {}}]}, "google_search"),
        ({"tools": [{"function_declarations": [], "code_execution": {}}]}, "code_execution"),
        ({"cachedContent": "cachedContents/1"}, "cachedContents/1"),
        ({"generationConfig": {"responseModalities": ["IMAGE"]}}, "IMAGE"),
        ({"serviceTier": "priority"}, "priority"),
    ],
)  # fmt: skip
def test_what_has_no_bound_is_refused(server: FormsServer, more: dict[str, Any], why: str) -> None:
    with viaticum.budget("1", prices=PRICES) as budget:
        refused = post(server, {**ASK, **more})
    assert refused.status_code == 400
    assert why in refused.json()["error"]["message"]
    assert server.calls == []
    assert budget.left().posted_nanousd == budget.left().held_nanousd == 0


def test_answers_images_and_functions_are_held_for() -> None:
    def worst(body: dict[str, Any], **more: Any) -> Any:
        call = gemini_call("POST", "https://x/v1/models/m:generateContent", json.dumps(body).encode())
        assert call is not None
        return call.worst_case(100, lambda text: len(text), image_tokens=1000, kept={}, **more)

    plain = worst(ASK)
    twice = worst({**ASK, "generationConfig": {"candidateCount": 2}})
    assert twice.output_tokens == 200
    assert twice.input_tokens > 2 * plain.input_tokens
    image = worst({"contents": [{"parts": [IMAGE, {"text": "?"}]}]})
    assert 1000 < image.input_tokens < 1200, "its bytes are no tokens"
    beside = {"functionResponse": {"response": {**IMAGE, "text": "x" * 5_000}}}
    assert worst({"contents": [{"parts": [beside]}]}).input_tokens > 6_000, "what is beside it counts"
    schema = {"functionDeclarations": [{"name": "f", "description": "x" * 4000}]}
    assert worst({**ASK, "tools": [schema]}).input_tokens > plain.input_tokens + 4000
    with pytest.raises(InputError):
        worst({**ASK, "generationConfig": {"candidateCount": 1, "max_new_tokens": 500}})


def test_prices_of_google_s_own_server_come_from_the_list() -> None:
    url = "https://generativelanguage.googleapis.com/v1beta/models/gemini-2.5-flash:streamGenerateContent"
    call = gemini_call("POST", url, json.dumps(ASK).encode())
    assert call is not None
    assert call.streams
    assert CallPrices({}, None, ()).price(call).output_nanousd_per_million == 2_500_000_000
    assert not may_cost("POST", url.replace("streamGenerateContent", "countTokens"))
    assert may_cost("POST", url.replace("streamGenerateContent", "batchEmbedContents"))
