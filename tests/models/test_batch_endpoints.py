"""What a provider's batch is sent and brings back, its price, and which entries have one."""

from __future__ import annotations

import json
import time
from decimal import Decimal
from typing import Any

import pytest
from batch_provider import batch_provider

from viaticum.catalogue import ModelSpec
from viaticum.errors import InputError
from viaticum.models.base import Generation
from viaticum.models.remote.batch_api import BatchName
from viaticum.models.remote.batch_endpoints import open_batch_api
from viaticum.models.remote.batch_lines import completion_of, request_body
from viaticum.models.remote.model import RemoteModel
from viaticum.money import Price, Tier
from viaticum.types import Message, TokenCount

MESSAGES: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?"},
]


def entry(litellm_model: str, **changed: Any) -> ModelSpec:
    fields: dict[str, Any] = {
        "name": "m",
        "description": "Answers.",
        "kind": "remote",
        "litellm_model": litellm_model,
        "context_length": 100_000,
        "input_price": "2.5",
        "output_price": "10",
    }
    return ModelSpec.model_validate(fields | changed)


@pytest.mark.parametrize(
    ("name", "changed", "form"),
    [
        ("openai/gpt-4o", {}, "openai"),
        ("gpt-4o", {}, "openai"),
        ("o4-mini", {}, "openai"),
        ("anthropic/claude-sonnet-4-5", {}, "anthropic"),
        ("claude-sonnet-4-5", {}, "anthropic"),
        ("openrouter/openai/gpt-4o", {}, None),
        ("ollama/o1", {}, None),
        ("openai/gpt-4o", {"api_base": "http://10.0.0.7/v1"}, None),
        ("openai/gpt-4o", {"api_base": "http://10.0.0.7/v1", "batch_api": "openai"}, "openai"),
        ("openai/gpt-4o", {"batch_api": "none"}, None),
    ],
)
def test_which_entries_have_batches(name: str, changed: dict[str, Any], form: str | None) -> None:
    spec = entry(name, **changed)
    assert spec.batch_form == form
    if form is None:
        with pytest.raises(InputError, match="batch_api"):
            open_batch_api(spec)


def test_the_price_of_a_batch_is_rounded_up_and_has_all_rates() -> None:
    price = Price(3, 5, 1, 7, 9, (Tier(10, 11, 13, 3),), "v", 15)
    assert price.discounted(Decimal("0.5")) == Price(2, 3, 1, 4, 5, (Tier(10, 6, 7, 2),), "v", 8)
    assert price.discounted(Decimal(0)) == price
    assert entry("gpt-4o").batch_price == Price(1_250_000_000, 5_000_000_000)
    quarter = entry("gpt-4o", batch_discount="0.25").batch_price
    assert quarter == Price(1_875_000_000, 7_500_000_000)


def test_what_batches_cost_changes_no_key_of_an_answer() -> None:
    plain = entry("gpt-4o")
    assert (
        entry("gpt-4o", batch_discount="0.25", batch_hours=12, batch_api="openai").identity == plain.identity
    )
    assert "batch" not in str(plain.model_dump())


def test_a_request_is_what_a_call_would_send() -> None:
    body = request_body(RemoteModel(entry("openai/gpt-4o"), key="k"), MESSAGES, Generation(7, stop=("x",)))
    assert body["model"] == "gpt-4o"
    assert body["messages"] == MESSAGES
    assert (body["max_tokens"], body["temperature"], body["stop"]) == (7, 0.0, ["x"])
    assert "stream" not in body
    assert "stream_options" not in body


def test_a_request_of_a_reasoning_model_has_its_own_limit() -> None:
    body = request_body(RemoteModel(entry("openai/o4-mini"), key="k"), MESSAGES, Generation(7))
    assert body["max_completion_tokens"] == 7
    assert "max_tokens" not in body


def test_a_request_in_anthropics_form() -> None:
    body = request_body(RemoteModel(entry("anthropic/claude-sonnet-4-5"), key="k"), MESSAGES, Generation(7))
    assert body["max_tokens"] == 7
    assert [message["role"] for message in body["messages"]] == ["user"]
    assert "Be brief." in str(body["system"])
    assert not body.get("stream")


def test_a_result_is_the_completion_of_a_call() -> None:
    model = RemoteModel(entry("openai/gpt-4o"), key="k")
    body = {
        "id": "x",
        "object": "chat.completion",
        "created": 1,
        "model": "gpt-4o",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "It is 4"}, "finish_reason": "length"}
        ],
        "usage": {
            "prompt_tokens": 20,
            "completion_tokens": 5,
            "total_tokens": 25,
            "prompt_tokens_details": {"cached_tokens": 8},
        },
    }
    done = completion_of(model, MESSAGES, Generation(7), body)
    assert (done.text, done.finish_reason) == ("It is 4", "length")
    assert done.usage.models == {"m": TokenCount(20, 5, 8)}
    assert (done.usage.seconds, done.reported_nanousd) == (0.0, None)


@pytest.mark.parametrize("form", ["openai", "anthropic"])
def test_a_batch_is_found_among_many(form: str, tmp_path: Any) -> None:
    """Pages of the list are gone through; one of another name and the same size is not taken for it."""
    with batch_provider(pace=0.01) as server:
        base = server.url if form == "anthropic" else f"{server.url}/v1"
        spec = entry(f"{form}/m", api_base=base, batch_api=form)
        api, body = open_batch_api(spec), request_body(RemoteModel(spec), MESSAGES, Generation(7))
        names = [BatchName(f"job_{number}", 2, 0.0) for number in range(7)]
        for name in names:
            path = tmp_path / "requests.jsonl"
            lines = [api.line(f"{name.name}_{number}", body) for number in range(2)]
            path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
            api.create(path, api.upload(path), name, 24)
        time.sleep(0.1)
        found = api.find(names[1])
        assert found is not None
        assert {line.custom_id for line in api.results(found)} == {"job_1_0", "job_1_1"}
        assert api.find(BatchName("job_9", 2, 0.0)) is None
        api.close()
