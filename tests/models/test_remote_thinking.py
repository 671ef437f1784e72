"""How providers are told a thinking budget or an effort, as arguments of LiteLLM."""

from __future__ import annotations

from typing import Any

import pytest

from viaticum.catalogue import ModelSpec
from viaticum.models.base import Generation
from viaticum.models.remote.model import RemoteModel
from viaticum.models.remote.thinking import thinking_parameters, with_thinking

CLAUDE, GEMINI, ROUTED = "anthropic/claude-sonnet-4-5", "gemini/gemini-2.5-flash", "openrouter/qwen/qwq-32b"


def told(
    model: str, budget: int | None = None, effort: str | None = None, total: int = 9000
) -> dict[str, Any]:
    generation = Generation(total, thinking_budget=budget, reasoning_effort=effort)
    return thinking_parameters(model, generation, own_server=False)


@pytest.mark.parametrize(
    ("model", "budget", "expected"),
    [
        (GEMINI, 512, {"thinking": {"type": "enabled", "budget_tokens": 512}}),
        (GEMINI, 0, {"thinking": {"type": "enabled", "budget_tokens": 0}}),
        (CLAUDE, 0, {"thinking": {"type": "disabled"}}),
        (ROUTED, 2048, {"extra_body": {"reasoning": {"max_tokens": 2048}}}),
        (ROUTED, 0, {"extra_body": {"reasoning": {"enabled": False}}}),
        ("openai/o3", 512, {"reasoning_effort": "low"}),
        ("openai/o3", 2048, {"reasoning_effort": "medium"}),
        ("openai/o3", 8192, {"reasoning_effort": "high"}),
        ("openai/o3", 0, {"reasoning_effort": "low"}),
        ("openai/gpt-5-mini", 0, {"reasoning_effort": "minimal"}),
        ("openai/gpt-5.1", 0, {"reasoning_effort": "none"}),
        ("openai/o3", None, {}),
        (CLAUDE, None, {}),
    ],
)
def test_a_budget_by_provider(model: str, budget: int | None, expected: dict[str, Any]) -> None:
    assert told(model, budget) == expected


@pytest.mark.parametrize(
    ("budget", "total", "tokens"),
    [(512, 9000, 1024), (8192, 9000, 8192), (8192, 4000, 3999), (512, 1000, None)],
)
def test_anthropic_gets_a_budget_it_takes(budget: int, total: int, tokens: int | None) -> None:
    """At least 1024 and below max_tokens; without sampling settings, which it refuses beside a thought."""
    parameters = told(CLAUDE, budget, total=total)
    if tokens is None:
        assert parameters == {"thinking": {"type": "disabled"}}
    else:
        assert parameters["thinking"] == {"type": "enabled", "budget_tokens": tokens}
        request = with_thinking(
            {"model": CLAUDE, "temperature": 0.0, "seed": 1},
            Generation(total, thinking_budget=budget),
            ["thinking"],
            own_server=False,
        )
        assert request == {"model": CLAUDE, "seed": 1, "thinking": parameters["thinking"]}


def test_an_effort_wins_over_a_budget() -> None:
    assert told("openai/o3", 512, "high") == {"reasoning_effort": "high"}
    unset = {"temperature": None, "top_p": None, "top_k": None}  # Claude refuses them beside a thought
    assert told(CLAUDE, 512, "high") == {"reasoning_effort": "high", **unset}


def test_a_model_that_takes_no_such_parameter_gets_none() -> None:
    request = {"model": "openai/gpt-4o"}
    budget, effort = Generation(900, thinking_budget=512), Generation(900, reasoning_effort="low")
    assert with_thinking(request, budget, ["temperature"], own_server=False) == request
    assert with_thinking(request, effort, [], own_server=False) == {**request, "reasoning_effort": "low"}


def test_what_the_user_says_in_the_extra_body_stays() -> None:
    request = {"model": ROUTED, "extra_body": {"reasoning": {"exclude": True}, "provider": {"sort": "price"}}}
    body = with_thinking(request, Generation(9000, thinking_budget=700), [], own_server=False)["extra_body"]
    assert body == {"reasoning": {"max_tokens": 700, "exclude": True}, "provider": {"sort": "price"}}


@pytest.mark.parametrize("budget", [None, 0, 512])
def test_an_own_server_is_told_to_leave_out_the_thought_alone(budget: int | None) -> None:
    spec = ModelSpec(
        name="own",
        description="A server.",
        kind="remote",
        litellm_model="openai/qwen3",
        api_base="http://127.0.0.1:1/v1",
        context_length=9000,
    )
    request = RemoteModel(spec).request([], Generation(900, thinking_budget=budget))
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    assert request.get("extra_body") == (off if budget == 0 else None)
    assert not {"thinking", "reasoning_effort"} & set(request)


CALL: dict[str, Any] = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CHAIN: list[Any] = [
    {"role": "user", "content": "Look."},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "1", "tool_call_id": "c"},
]


@pytest.mark.parametrize("settings", [{"thinking_budget": 2048}, {"reasoning_effort": "low"}])
def test_claude_is_asked_for_no_thought_in_a_chain_of_tool_calls(settings: dict[str, Any]) -> None:
    """It wants the signed thought before the calls back, and no thought is sent again."""

    def sent(model: str, messages: list[Any]) -> dict[str, Any]:
        request = {"model": model, "messages": messages, "temperature": 0.5}
        supported = ["thinking", "reasoning_effort"]
        return with_thinking(request, Generation(9000, **settings), supported, own_server=False)

    thinks = {"thinking", "reasoning_effort"}
    ended = [*CHAIN, {"role": "assistant", "content": "One."}, {"role": "user", "content": "And?"}]
    for messages in (CHAIN[:1], ended):
        assert thinks & sent(CLAUDE, messages).keys()
    for messages in (CHAIN, [*CHAIN, {"role": "user", "content": "Go on."}]):
        assert sent(CLAUDE, messages) == {"model": CLAUDE, "messages": messages, "temperature": 0.5}
        assert thinks & sent("openai/o3", messages).keys()
