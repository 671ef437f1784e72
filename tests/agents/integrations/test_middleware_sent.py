"""What an agent sends beside plain text is held for, by its type, or refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from langchain.agents.middleware import ModelRequest, ModelResponse
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, SystemMessage, ToolMessage

from viaticum import FakeRouter, InputError
from viaticum.agents.integrations.langchain_messages import from_langchain
from viaticum.agents.integrations.middleware import BudgetMiddleware
from viaticum.agents.integrations.router_middleware import RouterMiddleware
from viaticum.budgets import Ledger
from viaticum.money import Price

PRICES = {"fake": (1, 2)}
LONG = "x" * 5_000
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + LONG}}
DETAILS: Any = {"input_tokens": 100, "output_tokens": 50, "total_tokens": 150}


class Fake(GenericFakeChatModel):
    """A chat model with settings as integrations have them."""

    model: str = "fake"
    n: int | None = None
    service_tier: str | None = None
    model_kwargs: dict[str, Any] = {}  # noqa: RUF012
    extra_body: dict[str, Any] | None = None


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    with Ledger("memory:") as ledger:
        yield ledger
        assert ledger.check() == []
        assert all(budget.held_nanousd == 0 for budget in ledger.budgets())


def request(*messages: AnyMessage, model: Any = None, tools: Any = (), **settings: Any) -> ModelRequest[Any]:
    return ModelRequest(
        model=model or Fake(messages=iter(())),
        messages=list(messages) or [HumanMessage("hi")],
        tools=list(tools),
        model_settings=settings,
        state={"messages": []},
        runtime=None,  # type: ignore[arg-type]
    )


def yes(_: ModelRequest[Any]) -> ModelResponse[Any]:
    return ModelResponse(result=[AIMessage("yes", usage_metadata=DETAILS)])


def held(ledger: Ledger, asked: ModelRequest[Any], **settings: Any) -> tuple[int, int]:
    """Tokens that are held for a request: of the prompt, and of the answer."""
    budget = BudgetMiddleware("1", prices=PRICES, ledger=ledger, max_tokens=100, **settings)
    budget.wrap_model_call(asked, yes)
    (entry,) = [each for each in ledger.entries(budget.budget_name) if each.kind == "reserve"]
    return entry.usage["fake"].input_tokens, entry.usage["fake"].output_tokens


PARTS: list[dict[str, Any]] = [
    {"type": "thinking", "thinking": LONG, "signature": "s"},
    {"type": "thinking", "thinking": "", "signature": LONG},
    {"type": "redacted_thinking", "data": LONG},
    {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": LONG},
    {"type": "reasoning_content", "reasoning_content": {"text": LONG}},
    {"type": "refusal", "refusal": LONG},
    {"type": "output_text", "text": LONG, "annotations": []},
    {"type": "function_call", "name": "f", "arguments": LONG, "call_id": "c"},
    {"type": "server_tool_use", "id": "t", "name": "web_search", "input": {"query": LONG}},
    {"type": "web_search_call", "id": "ws", "action": {"query": LONG}},
    {"type": "web_search_tool_result", "content": [{"type": "web_search_result", "encrypted_content": LONG}]},
    {
        "type": "web_search_tool_result",
        "content": {"type": "web_search_tool_result_error", "error_code": LONG},
    },
    {"type": "code_interpreter_call", "code": LONG},
    {"type": "tool_use", "id": "t", "name": "f", "input": {"type": "image", "text": LONG}},
    {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": LONG}},
    {"type": "non_standard", "value": {"type": "thinking", "thinking": LONG}},
]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: str(part["type"]))
def test_every_part_of_a_history_is_held_for(ledger: Ledger, part: dict[str, Any]) -> None:
    history = AIMessage([{"type": "text", "text": "well"}, part])
    prompt, _ = held(ledger, request(HumanMessage("hi"), history, HumanMessage("go on")))
    assert prompt > len(LONG)


@pytest.mark.parametrize(
    "message",
    [
        AIMessage("well", additional_kwargs={"reasoning_content": LONG}),
        AIMessage("", additional_kwargs={"function_call": {"name": "f", "arguments": LONG}}),
        AIMessage("", tool_calls=[{"name": "f", "args": {"text": LONG}, "id": "c"}]),
        AIMessage("", invalid_tool_calls=[{"name": "f", "args": LONG, "id": "c", "error": None}]),
        ToolMessage(LONG, tool_call_id="c"),
        HumanMessage("hi", name=LONG),
        SystemMessage([{"type": "text", "text": LONG}]),
    ],
    ids=["reasoning_content", "function_call", "calls", "broken calls", "result", "name", "system"],
)
def test_what_stands_beside_the_content_is_held_for(ledger: Ledger, message: AnyMessage) -> None:
    assert held(ledger, request(message, HumanMessage("go on")))[0] > len(LONG)


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        (IMAGE, "image_url"),
        ({"type": "image", "source": {"type": "base64", "data": LONG}}, "image"),
        ({"type": "input_audio", "input_audio": {"data": LONG}}, "input_audio"),
        ({"type": "file", "file": {"file_id": "f"}}, "file"),
        ({"type": "document", "source": {"type": "base64", "data": LONG}}, "document"),
        ({"type": "image_generation_call", "result": LONG}, "image_generation_call"),
        ({"type": "tool_result", "tool_use_id": "t", "content": [IMAGE]}, "image_url"),
        ({"type": "non_standard", "value": IMAGE}, "image_url"),
        ({"image": {"format": "png"}}, "image"),
        ({"type": "something_new"}, "something_new"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_has_no_bound_is_refused_by_name(ledger: Ledger, part: dict[str, Any], kind: str) -> None:
    for message in (HumanMessage([part]), ToolMessage([part], tool_call_id="c"), AIMessage([part])):
        with pytest.raises(InputError, match=f"type '{kind}' cannot be budgeted"):
            held(ledger, request(HumanMessage("hi"), message))
    assert ledger.holds() == []


def test_a_thought_that_the_provider_keeps_has_the_tokens_that_it_counted(ledger: Ledger) -> None:
    kept = {"type": "reasoning", "id": "rs_1", "summary": []}
    told: Any = {"input_tokens": 10, "output_tokens": 9_000, "total_tokens": 9_010}
    assert held(ledger, request(AIMessage([kept], usage_metadata=told), HumanMessage("go on")))[0] > 9_000
    beside = AIMessage("so", additional_kwargs={"reasoning": kept}, usage_metadata=told)
    assert held(ledger, request(beside, HumanMessage("go on")))[0] > 9_000
    with pytest.raises(InputError, match="rs_1 lies with the provider"):
        held(ledger, request(AIMessage([kept]), HumanMessage("go on")))


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ({"n": 5}, {}),
        ({}, {"n": 5}),
        ({}, {"candidate_count": 5}),
        ({"model_kwargs": {"n": 5}}, {}),
        ({"extra_body": {"best_of": 5}}, {}),
        ({}, {"extra_body": {"n": 5}}),
    ],
)
def test_several_answers_are_held_for(
    ledger: Ledger, model: dict[str, Any], settings: dict[str, Any]
) -> None:
    one, _ = held(ledger, request())
    prompt, output = held(ledger, request(model=Fake(messages=iter(()), **model), **settings))
    assert (output, prompt >= 5 * one) == (500, True)


@pytest.mark.parametrize(
    ("model", "settings", "says"),
    [
        ({}, {"max_completion_tokens": 5_000}, "max_completion_tokens=5000 stands beside the max_tokens=100"),
        ({}, {"extra_body": {"max_tokens": 5_000}}, "max_tokens=5000 stands beside"),
        ({"model_kwargs": {"max_output_tokens": -1}}, {}, "max_output_tokens=-1"),
        ({"service_tier": "priority"}, {}, "service_tier='priority' changes"),
        ({}, {"service_tier": "priority"}, "service_tier='priority' changes"),
        ({}, {"speed": "fast"}, "speed='fast'"),
        ({}, {"previous_response_id": "resp_1"}, "previous_response_id"),
        ({}, {"prediction": {"type": "content", "content": "x"}}, "prediction"),
        ({}, {"modalities": ["text", "audio"]}, "audio"),
        ({}, {"tools": [{"type": "web_search"}]}, "web_search is run by the provider"),
        ({}, {"cache_control": {"type": "ephemeral"}}, "no cache_write_price"),
    ],
)
def test_settings_that_make_a_call_dearer_are_refused_by_name(
    ledger: Ledger, model: dict[str, Any], settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        held(ledger, request(model=Fake(messages=iter(()), **model), **settings))
    assert ledger.holds() == []


def test_settings_that_cost_nothing_more_pass(ledger: Ledger) -> None:
    fine = {"service_tier": "flex", "max_completion_tokens": 50, "modalities": ["text"], "max_tokens": -1}
    assert held(ledger, request(**fine))[1] == 100
    assert held(ledger, request(stop_sequences=[LONG]))[0] > len(LONG)


def test_tools_of_the_provider_are_refused_unless_they_are_named(ledger: Ledger) -> None:
    search, own = (
        {"type": "web_search_20250305", "name": "web_search"},
        {"type": "bash_20250124", "name": "bash"},
    )
    with pytest.raises(InputError, match="web_search_20250305 is run by the provider"):
        held(ledger, request(tools=[search]))
    plain, _ = held(ledger, request(tools=[{"name": "f", "input_schema": {}}]))
    assert held(ledger, request(tools=[search]), provider_tools=["web_search"])[0] > 600
    assert held(ledger, request(tools=[own]))[0] > plain + 1_000


def reported(budget: BudgetMiddleware, answer: AIMessage) -> int:
    before = budget.left().posted_nanousd
    budget.wrap_model_call(request(), lambda _: ModelResponse(result=[answer]))
    return budget.left().posted_nanousd - before


@pytest.mark.parametrize("usage", [(0, 0), (0, 50), (100, 0), (-3, 5), (5, -3)])
def test_impossible_usage_costs_what_was_held(ledger: Ledger, usage: tuple[int, int]) -> None:
    budget = BudgetMiddleware("1", prices=PRICES, ledger=ledger, max_tokens=100)
    told: Any = {"input_tokens": usage[0], "output_tokens": usage[1], "total_tokens": sum(usage)}
    assert reported(budget, AIMessage("yes", usage_metadata=told)) > 100 * 2_000
    free: Any = {"input_tokens": 100, "output_tokens": 0, "total_tokens": 100}
    assert reported(budget, AIMessage("", usage_metadata=free)) == 100 * 1_000


@pytest.mark.parametrize(
    "details",
    [
        {"cache_read": 20, "cache_creation": 40},
        {"cache_read": 20, "cache_creation": 0, "ephemeral_5m_input_tokens": 40},
        {"cache_read": 20, "ephemeral_5m_input_tokens": 10, "ephemeral_1h_input_tokens": 30},
    ],
)
def test_tokens_written_into_a_cache_have_their_rate(ledger: Ledger, details: dict[str, int]) -> None:
    price = Price(1_000_000_000, 2_000_000_000, 100_000_000, cache_write_nanousd_per_million=2_000_000_000)
    budget = BudgetMiddleware("1", prices={"fake": price}, ledger=ledger, max_tokens=100)
    told: Any = {**DETAILS, "input_token_details": details}
    assert reported(budget, AIMessage("yes", usage_metadata=told)) == 40_000 + 2_000 + 80_000 + 100_000


def test_an_hour_in_the_cache_needs_its_price(ledger: Ledger) -> None:
    hour = SystemMessage([{"type": "text", "text": "s", "cache_control": {"type": "ephemeral", "ttl": "1h"}}])
    for rate, fits in ((1_250_000_000, False), (2_000_000_000, True)):
        price = Price(1_000_000_000, 2_000_000_000, cache_write_nanousd_per_million=rate)
        budget = BudgetMiddleware("1", prices={"fake": price}, ledger=ledger, max_tokens=100)
        if fits:
            assert budget.wrap_model_call(request(hour), yes).result
        else:
            with pytest.raises(InputError, match="ttl 1h"):
                budget.wrap_model_call(request(hour), yes)


def test_the_router_refuses_no_image_since_it_only_chooses() -> None:
    models = {name: Fake(messages=iter(())) for name in ("small", "large")}
    router = RouterMiddleware(models, FakeRouter({"small+direct": 0.4, "large+direct": 0.8}))
    for content in ([IMAGE], [{"type": "text", "text": "What is this?"}, IMAGE]):
        history = [SystemMessage("s"), HumanMessage([IMAGE]), AIMessage("a cat"), HumanMessage(content)]
        assert router.choose(history) == "large"


def test_our_models_leave_out_what_is_another_model_s_and_refuse_what_has_no_bound() -> None:
    parts = [part for part in PARTS if part["type"] not in ("output_text", "refusal", "document")]
    (sent,) = from_langchain([AIMessage([{"type": "text", "text": "well"}, *parts])])
    assert sent["content"] == "well"
    (sent,) = from_langchain([AIMessage([{"type": "refusal", "refusal": "I cannot"}])])
    assert sent["content"] == "I cannot"
    with pytest.raises(InputError, match="cannot be budgeted"):
        from_langchain([AIMessage([IMAGE])])
