"""Calls of Amazon Bedrock's SDK in a budget: Converse, InvokeModel and their streams, by boto3 as it is."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import closing
from decimal import Decimal
from typing import Any

import boto3
import pytest
from bedrock_server import BedrockServer, running_bedrock
from botocore.config import Config
from botocore.exceptions import ClientError, EndpointConnectionError

import viaticum
from viaticum.agents.instrumentation.bedrock import converse_count
from viaticum.agents.instrumentation.prices import CallPrices
from viaticum.agents.instrumentation.requests import ModelCall
from viaticum.types import TokenCount

PRICES = {"small": ("1", "2")}
COST = Decimal("0.000022")  # 12 tokens read and 5 written
ASK: dict[str, Any] = {"modelId": "small", "messages": [{"role": "user", "content": [{"text": "2+2?"}]}]}


@pytest.fixture(scope="module")
def running() -> Iterator[BedrockServer]:
    with running_bedrock() as server:
        yield server


@pytest.fixture
def server(running: BedrockServer) -> BedrockServer:
    running.reset()
    return running


def client_of(url: str) -> Any:
    """boto3's client, without any file or variable of this machine."""
    session = boto3.session.Session(aws_access_key_id="k", aws_secret_access_key="s", region_name="us-east-1")
    config = Config(retries={"max_attempts": 0}, connect_timeout=60, read_timeout=60)
    return session.client("bedrock-runtime", endpoint_url=url, config=config)


@pytest.fixture
def client(server: BedrockServer) -> Iterator[Any]:
    client = client_of(server.url)
    yield client
    client.close()


def claude(**fields: Any) -> dict[str, Any]:
    body = {
        "anthropic_version": "bedrock-2023-05-31",
        "max_tokens": 50,
        "messages": [{"role": "user", "content": "2+2?"}],
        **fields,
    }
    return {"modelId": "small", "body": json.dumps(body)}


def test_converse_is_held_and_costs_what_is_reported(server: BedrockServer, client: Any) -> None:
    """Also by a client that was made before the budget."""
    with viaticum.budget("1", prices=PRICES, max_tokens=300) as budget:
        done = client.converse(**ASK)
        assert done["output"]["message"]["content"] == [{"text": "It is four."}]
        events = list(client.converse_stream(**ASK)["stream"])
        assert [next(iter(event)) for event in events][-1] == "metadata"
    assert budget.calls == {"small": 2}
    assert budget.left().posted_usd == 2 * COST
    assert budget.left().held_nanousd == 0
    assert budget.ledger.check() == []
    assert [body["inferenceConfig"] for _, body in server.calls] == [{"maxTokens": 300}] * 2
    client.converse(**ASK)  # outside the budget as it was
    assert "inferenceConfig" not in server.calls[-1][1]


def test_invoke_model_in_anthropic_s_form_is_held(server: BedrockServer, client: Any) -> None:
    with viaticum.budget("1", prices=PRICES) as budget:
        done = client.invoke_model(**claude())
        assert json.loads(done["body"].read())["content"][0]["text"] == "four"
        events = list(client.invoke_model_with_response_stream(**claude())["body"])
        assert len(events) == 4
    assert budget.left().posted_usd == 2 * COST
    assert [body["max_tokens"] for _, body in server.calls] == [50, 50]


def test_a_report_of_bedrock_s_own_stands_in_for_a_model_s(server: BedrockServer, client: Any) -> None:
    server.usage = None
    with viaticum.budget("1", prices=PRICES) as budget:
        client.invoke_model(**claude())["body"].read()
    assert budget.left().posted_usd == Decimal("0.000025")


@pytest.mark.parametrize("operation", ["converse", "converse_stream", "invoke_model"])
def test_what_does_not_fit_is_not_sent(server: BedrockServer, client: Any, operation: str) -> None:
    asked = claude() if operation == "invoke_model" else ASK
    with (
        viaticum.budget("0.00001", prices=PRICES) as budget,
        pytest.raises(ClientError, match="left") as refused,
    ):
        getattr(client, operation)(**asked)
    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 402
    assert server.calls == []
    assert budget.refused == {"the budget is used up": 1}


def test_a_call_that_fails_is_free(server: BedrockServer, client: Any) -> None:
    server.script = [429, 500]
    with viaticum.budget("1", prices=PRICES) as budget:
        for _ in range(2):
            with pytest.raises(ClientError):
                client.converse(**ASK)
        with pytest.raises(EndpointConnectionError):
            client_of("http://127.0.0.1:9").converse(**ASK)
    assert (budget.left().posted_nanousd, budget.left().held_nanousd) == (0, 0)
    assert budget.calls.total() == 3


@pytest.mark.parametrize("way", ["left", "closed", "no usage"])
def test_a_stream_without_its_report_costs_what_was_held(
    server: BedrockServer, client: Any, way: str
) -> None:
    server.usage = None if way == "no usage" else server.usage
    with viaticum.budget("1", prices=PRICES, max_tokens=100) as budget:
        stream = client.converse_stream(**ASK)["stream"]
        if way == "no usage":
            list(stream)
        elif way == "left":
            for _ in stream:
                break
        stream.close()
    (hold,) = budget.ledger.holds()
    assert budget.left().posted_nanousd == hold.held_nanousd > 200_000


def test_a_stream_that_is_left_at_its_last_words_costs_what_is_reported(
    server: BedrockServer, client: Any
) -> None:
    with viaticum.budget("1", prices=PRICES, max_tokens=100) as budget:
        for event in client.converse_stream(**ASK)["stream"]:
            if "messageStop" in event:
                break
        stream = client.converse_stream(**ASK)["stream"]
        with closing(stream):
            assert any("messageStop" in event for event in stream)
    assert budget.left().posted_usd == 2 * COST


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"guardrailConfig": {"guardrailIdentifier": "g", "guardrailVersion": "1"}}, "guardrailConfig"),
        ({"performanceConfig": {"latency": "optimized"}}, "performanceConfig"),
        ({"system": [{"text": "x"}, {"cachePoint": {"type": "default"}}]}, "cache_write_price"),
        ({"additionalModelRequestFields": {"max_tokens": 9000}}, "max_tokens=9000"),
        ({"content": [{"image": {"format": "png", "source": {"bytes": b"x"}}}]}, "image_tokens"),
        ({"content": [{"document": {"format": "pdf", "name": "a", "source": {"bytes": b"x"}}}]}, "document"),
        ({"modelId": "arn:aws:bedrock:us-east-1:1:prompt/P"}, "prompt"),
    ],
)
def test_what_has_no_bound_is_refused(
    server: BedrockServer, client: Any, more: dict[str, Any], what: str
) -> None:
    content = more.pop("content", None)
    asked = {**ASK, **more} | ({"messages": [{"role": "user", "content": content}]} if content else {})
    prices = {asked["modelId"]: ("1", "2")}
    with viaticum.budget("1", prices=prices), pytest.raises(ClientError, match=what) as refused:
        client.converse(**asked)
    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 400
    assert server.calls == []


def test_an_image_is_held_by_its_bound(server: BedrockServer, client: Any) -> None:
    content = [{"text": "what?"}, {"image": {"format": "png", "source": {"bytes": b"x" * 5000}}}]
    with viaticum.budget("1", prices=PRICES, image_tokens=700) as budget:
        client.converse(modelId="small", messages=[{"role": "user", "content": content}])
    (hold,) = budget.ledger.holds()
    assert 700 < hold.usage["small"].input_tokens < 1200


def test_another_form_of_a_body_is_refused_or_told(
    server: BedrockServer, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    asked = {"modelId": "small", "body": json.dumps({"inputText": "x"})}
    for unheld, sent in (("refuse", 0), ("allow", 1)):
        with viaticum.budget("1", prices=PRICES, unheld=unheld) as budget:  # type: ignore[arg-type]
            if sent:
                client.invoke_model(**asked)
            else:
                with pytest.raises(ClientError, match="unheld='allow'"):
                    client.invoke_model(**asked)
                with pytest.raises(ClientError, match="unheld='allow'"):
                    client.invoke_model(modelId="small", body=io.BytesIO(b"{}"))
        assert len(server.calls) == sent
    assert budget.unheld == {"InvokeModel of small at 127.0.0.1": 1}
    assert "did not hold: InvokeModel of small" in caplog.text


def test_what_is_cached_counts_as_read() -> None:
    usage = {"inputTokens": 10, "outputTokens": 5, "cacheReadInputTokens": 100, "cacheWriteInputTokens": 20}
    assert converse_count(usage) == TokenCount(130, 5, 100, cache_write_tokens=20)
    for bad in (None, {}, {"inputTokens": -1, "outputTokens": 5}, {"inputTokens": 10, "outputTokens": 0}):
        assert converse_count(bad) is None
    assert converse_count({"inputTokens": 10}, has_output=False) == TokenCount(10, 0)


def test_prices_are_those_of_litellm_s_list() -> None:
    host, model = "bedrock-runtime.us-east-1.amazonaws.com", "anthropic.claude-3-5-sonnet-20240620-v1:0"
    call = ModelCall("messages", host, model, {}, 5, False)
    price = CallPrices({}, None, ()).price(call)
    assert price.input_nanousd_per_million == 3_000_000_000
