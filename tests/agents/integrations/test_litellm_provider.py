"""Our router and models as a provider of LiteLLM, asked through LiteLLM itself."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from openai_server import running_server

from viaticum import ChatViaticum, FakeRouter, InputError, ScriptedModel
from viaticum.agents.integrations.litellm_provider import handler, register
from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.errors import (
    AuthenticationFailed,
    BudgetClosed,
    ContentRefused,
    ModelError,
    ProviderTimeout,
    ProviderUnavailable,
    RateLimited,
)
from viaticum.models.remote.request import load_litellm

litellm = load_litellm()
ASKED: list[dict[str, Any]] = [{"role": "user", "content": "What is 6 * 7?"}]
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}


@pytest.fixture
def model() -> ScriptedModel:
    return ScriptedModel("The answer is 42.", name="m")


@pytest.fixture
def ours(model: ScriptedModel, tmp_path: Path) -> Iterator[Any]:
    made = register(budget="0.001", models={"m": model}, router=FakeRouter("m+direct"), folder=tmp_path)
    yield made
    assert made.chat._client().ledger.check() == []
    assert made.chat.left().held_nanousd == 0
    made.close()


async def ask(way: str, **given: Any) -> tuple[str, dict[str, Any], Any]:
    """Text, metadata and usage, sync or async, streamed or whole."""
    given = {"messages": ASKED, **given}
    if way in ("completion", "acompletion"):
        response = litellm.completion(**given) if way == "completion" else await litellm.acompletion(**given)
        message = response.choices[0].message
        assert response._hidden_params["response_cost"] > 0
        return message.content, message.provider_specific_fields["viaticum"], response.usage
    given |= {"stream": True, "stream_options": {"include_usage": True}}
    chunks = (
        list(litellm.completion(**given))
        if way == "streaming"
        else [c async for c in await litellm.acompletion(**given)]
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    fields = [getattr(c.choices[0].delta, "provider_specific_fields", None) for c in chunks]
    return text, next(filter(None, fields))["viaticum"], chunks[-1].usage


WAYS = pytest.mark.parametrize("way", ["completion", "acompletion", "streaming", "astreaming"])


@WAYS
@pytest.mark.parametrize("name", ["auto", "m", "m+cot"])
async def test_an_answer_its_usage_and_its_cost(ours: Any, model: ScriptedModel, way: str, name: str) -> None:
    text, metadata, usage = await ask(
        way, model=f"viaticum/{name}", **({"max_tokens": 50} if name == "m" else {})
    )
    assert text == "The answer is 42."
    assert metadata["cost_nanousd"] == ours.chat.left().posted_nanousd == 1_000 * (usage.prompt_tokens + 4)
    assert usage.completion_tokens == 4
    assert metadata["left_nanousd"] == 1_000_000 - metadata["cost_nanousd"]
    if name == "m":
        assert model.calls[0][1].max_new_tokens == 50


@WAYS
async def test_a_budget_that_is_used_up_is_litellms_error(ours: Any, model: ScriptedModel, way: str) -> None:
    with pytest.raises(litellm.RateLimitError, match="left, the call may cost") as caught:
        await ask(way, model="viaticum/m", max_tokens=2_000)
    assert caught.value.rate_limit_type == "budget"
    assert model.calls == []


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({"model": "viaticum/nobody"}, litellm.NotFoundError),
        ({"model": "viaticum/m", "max_tokens": 100_000}, litellm.ContextWindowExceededError),
        ({"model": "viaticum/auto", "tools": [TOOL], "_skip_mcp_handler": True}, litellm.BadRequestError),
        (
            {
                "model": "viaticum/m",
                "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            },
            litellm.BadRequestError,
        ),
    ],
)
def test_what_cannot_be_is_litellms_error(ours: Any, given: dict[str, Any], kind: type[Exception]) -> None:
    with pytest.raises(kind) as caught:
        litellm.completion(**{"messages": ASKED, **given})
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RateLimited("later"), litellm.RateLimitError),
        (AuthenticationFailed("who"), litellm.AuthenticationError),
        (ContentRefused("no"), litellm.ContentPolicyViolationError),
        (ProviderTimeout("slow"), litellm.Timeout),
        (ProviderUnavailable("gone"), litellm.ServiceUnavailableError),
        (BudgetClosed("closed"), litellm.PermissionDeniedError),
        (ModelError("NaN"), litellm.InternalServerError),
    ],
)
@pytest.mark.parametrize("way", ["completion", "streaming"])
async def test_errors_of_models_are_litellms(
    ours: Any, model: ScriptedModel, error: Exception, kind: type[Exception], way: str
) -> None:
    model.script = error
    with pytest.raises(kind, match=str(error)):
        await ask(way, model="viaticum/m", max_tokens=10)


def test_registering_again_replaces_and_other_names_stand_beside(ours: Any, tmp_path: Path) -> None:
    with ChatViaticum(
        budget="0.001", models={"m": ScriptedModel("Another.", name="m")}, folder=tmp_path / "other"
    ) as chat:  # type: ignore[arg-type]
        register(chat, provider="other")
        asked: Any = {"messages": ASKED, "max_tokens": 10}
        assert litellm.completion(model="other/m", **asked).choices[0].message.content == "Another."
        assert (
            litellm.completion(model="viaticum/m", **asked).choices[0].message.content == "The answer is 42."
        )
        register(chat)
        assert litellm.completion(model="viaticum/m", **asked).choices[0].message.content == "Another."
    assert [item["provider"] for item in litellm.custom_provider_map].count("viaticum") == 1


def test_a_chat_or_settings_not_both(ours: Any) -> None:
    with pytest.raises(InputError, match="not both: budget"):
        handler(ours.chat, budget=1)


def test_a_remote_models_tool_calls_pass_through(tmp_path: Path) -> None:
    with running_server() as server:
        spec = ModelSpec(
            name="far",
            description="Far away.",
            kind="remote",
            context_length=10_000,
            input_price=Decimal(1),
            output_price=Decimal(2),
            litellm_model="openai/far",
            api_base=server.url,
        )
        made = register(budget="0.01", catalogue=Catalogue([spec]), folder=tmp_path)
        asked: Any = {"model": "viaticum/far", "messages": ASKED, "tools": [TOOL], "_skip_mcp_handler": True}
        whole = litellm.completion(**asked).choices[0]
        streamed = litellm.stream_chunk_builder(list(litellm.completion(stream=True, **asked))).choices[0]
        for choice in (whole, streamed):
            assert choice.finish_reason == "tool_calls"
            (call,) = choice.message.tool_calls
            assert (call.function.name, call.function.arguments) == ("add", '{"a": 6}')
        made.close()


async def test_anthropic_s_form_through_litellm(ours: Any) -> None:
    message = await litellm.anthropic.messages.acreate(
        model="viaticum/m", max_tokens=50, messages=[{"role": "user", "content": "What is 6 * 7?"}]
    )
    assert (message["content"][0]["text"], message["stop_reason"]) == ("The answer is 42.", "end_turn")
    assert message["usage"]["output_tokens"] == 4
    assert ours.chat.left().posted_nanousd > 0
