"""Anthropic's messages through its own SDK, unchanged: text, tools, images, thoughts, errors, budgets."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest
from openai_server import OpenAIServer, running_server, spec_for
from viaticum_server import RunningServer, serving, write_catalogue

from viaticum.catalogue import Catalogue
from viaticum.models.remote.request import load_litellm

WORDS = "Seven times six is forty-two. The answer is 42."
USER: Any = {"role": "user", "content": "What is 6 times 7?"}
EPHEMERAL: Any = {"type": "ephemeral"}
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
IMAGE: Any = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}}
WEATHER: Any = {
    "name": "weather",
    "description": "The weather in a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


@pytest.fixture(scope="module")
def far() -> Iterator[OpenAIServer]:
    load_litellm()  # once, before a client waits for it
    with running_server() as far:
        yield far


@pytest.fixture(scope="module")
def server(far: OpenAIServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with a model behind a loopback provider, and with scripted ones."""
    folder = tmp_path_factory.mktemp("messages")
    catalogue = Catalogue.load(write_catalogue(folder)).with_models(
        spec_for(far, cache_write_price="1.25", image_tokens=2_000),
        # Its stop strings are looked for here; auto does not choose it.
        spec_for(far, name="thinker", thinking="think", default=False),
    )
    with serving(folder, catalogue=catalogue, budget="10") as server:
        yield server


@pytest.fixture(autouse=True)
def anew(far: OpenAIServer, server: RunningServer) -> Iterator[None]:
    far.reset()
    yield
    server.assert_settled()


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=0) as client:
        yield client


def ask(client: anthropic.Anthropic, model: str = "fast", **body: Any) -> anthropic.types.Message:
    message: anthropic.types.Message = client.messages.create(
        **{"model": model, "max_tokens": 100, "messages": [USER], **body}
    )
    return message


def text_of(message: anthropic.types.Message) -> str:
    (block,) = message.content
    assert block.type == "text"
    return block.text


def sent(far: OpenAIServer) -> Any:
    return far.requests[-1]["messages"]


@pytest.mark.parametrize("model", ["fast", "fast+cot", "auto", "far"])
def test_a_message_whole_and_as_a_stream(
    client: anthropic.Anthropic, server: RunningServer, model: str
) -> None:
    before = server.spent_and_held()[0]
    message = ask(client, model)
    expected = WORDS if model != "far" else "you said: What is 6 times 7?"
    assert (text_of(message), message.stop_reason, message.role) == (expected, "end_turn", "assistant")
    cost = (message.model_extra or {})["viaticum"]["cost_nanousd"]
    assert server.spent_and_held()[0] - before == cost > 0
    with client.messages.stream(model=model, max_tokens=100, messages=[USER]) as stream:
        assert "".join(stream.text_stream) == expected
        final = stream.get_final_message()
    assert (final.usage, final.stop_reason) == (message.usage, "end_turn")
    assert message.usage.input_tokens > 0 < message.usage.output_tokens
    assert message._request_id


def test_a_stream_begins_with_a_likely_prompt_and_ends_with_the_count(
    client: anthropic.Anthropic, far: OpenAIServer
) -> None:
    far.usage = {"prompt_tokens": 77, "completion_tokens": 5, "total_tokens": 82}
    for model in ("far", "auto", "fast"):
        events = list(client.messages.create(model=model, max_tokens=9, messages=[USER], stream=True))
        names = [event.type for event in events]
        assert names[:2] == ["message_start", "content_block_start"]
        assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
        assert set(names[2:-3]) == {"content_block_delta"}
        # A client shows by it how full the context is.
        assert 1 <= events[0].message.usage.input_tokens < 100
        assert model == "far" or events[0].message.usage.input_tokens > 3
    events = list(client.messages.create(model="far", max_tokens=9, messages=[USER], stream=True))
    assert events[-2].usage.input_tokens == 77
    assert events[-2].usage.output_tokens == 5


def test_the_system_prompt_and_turns_in_a_row(client: anthropic.Anthropic, far: OpenAIServer) -> None:
    ask(
        client,
        "far",
        system=[
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2"},
            {"type": "text", "text": "Be brief."},
            {"type": "text", "text": "Be kind."},
        ],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "", "cache_control": EPHEMERAL}]},
            {"role": "user", "content": "One."},
            {"role": "assistant", "content": " "},
            {"role": "user", "content": [{"type": "text", "text": "Two."}, {"type": "text", "text": "3."}]},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm", "signature": ""}]},
            {"role": "assistant", "content": "Yes."},
            {"role": "system", "content": "The user left."},
            USER,
        ],
        metadata={"user_id": "u"},
        service_tier="auto",
    )
    assert sent(far) == [
        {"role": "system", "content": "Be brief.\n\nBe kind."},
        {"role": "user", "content": "One.\n\nTwo.\n\n3."},
        {"role": "assistant", "content": "Yes."},
        {"role": "system", "content": "The user left."},
        USER,
    ]


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("model", ["far", "auto"])
def test_a_loop_of_tools(client: anthropic.Anthropic, far: OpenAIServer, model: str, streams: bool) -> None:
    def step(messages: list[Any]) -> anthropic.types.Message:
        body: Any = {"model": model, "max_tokens": 200, "messages": messages, "tools": [WEATHER]}
        if not streams:
            return client.messages.create(**body)  # type: ignore[no-any-return]
        with client.messages.stream(**body) as stream:
            return stream.get_final_message()

    messages: list[Any] = [{"role": "user", "content": "Weather in Rome?"}]
    first = step(messages)
    (call,) = [block for block in first.content if block.type == "tool_use"]
    assert (first.stop_reason, call.name, call.input) == ("tool_use", "weather", {"city": "Weather in Rome?"})
    result = {
        "type": "tool_result",
        "tool_use_id": call.id,
        "content": [{"type": "text", "text": "18 C"}],
    }
    messages += [
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [result]},
    ]
    assert text_of(step(messages)) == "you said: Weather in Rome?"
    _, assistant, tool = sent(far)
    assert assistant["tool_calls"][0]["id"] == tool["tool_call_id"] == call.id
    assert json.loads(assistant["tool_calls"][0]["function"]["arguments"]) == {"city": "Weather in Rome?"}
    assert (tool["role"], tool["content"]) == ("tool", "18 C")
    messages[-1]["content"].append({"type": "text", "text": "In words, please."})
    step(messages)
    assert [each["role"] for each in sent(far)] == ["user", "assistant", "tool", "user"]
    assert sent(far)[-1]["content"] == "In words, please."
    function = far.requests[-1]["tools"][0]["function"]
    assert function["parameters"] == WEATHER["input_schema"]
    assert function["description"] == WEATHER["description"]


def test_the_tool_runner_of_the_sdk(client: anthropic.Anthropic) -> None:
    cities: list[str] = []

    @anthropic.beta_tool
    def weather(city: str) -> str:
        """The weather in a city."""
        cities.append(city)
        return "18 C"

    runner = client.beta.messages.tool_runner(
        model="far", max_tokens=200, tools=[weather], messages=[{"role": "user", "content": "Rome?"}]
    )
    last = runner.until_done()
    assert (cities, last.content[0].text) == (["Rome?"], "you said: Rome?")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("choice", "openai"),
    [
        ({"type": "any"}, "required"),
        ({"type": "none"}, "none"),
        ({"type": "tool", "name": "weather"}, {"type": "function", "function": {"name": "weather"}}),
        ({"type": "auto"}, None),
    ],
)
def test_choices_of_tools(client: anthropic.Anthropic, far: OpenAIServer, choice: Any, openai: Any) -> None:
    choice = {**choice, "disable_parallel_tool_use": True} if choice["type"] != "none" else choice
    ask(client, "far", tools=[WEATHER], tool_choice=choice)
    assert far.requests[-1].get("tool_choice") == openai
    assert far.requests[-1].get("parallel_tool_calls") == (None if choice["type"] == "none" else False)


def test_calls_whose_arguments_are_no_object(client: anthropic.Anthropic, far: OpenAIServer) -> None:
    call = {"index": 0, "id": "c", "type": "function", "function": {"name": "weather", "arguments": "[1"}}
    far.deltas, far.finish = [{"tool_calls": [call]}], "tool_calls"
    far.text = ""
    (block,) = ask(client, "far", tools=[WEATHER], tool_choice={"type": "none"}).content
    assert block.type == "tool_use"
    assert block.input == {"arguments": "[1"}
    with client.messages.stream(
        model="far", max_tokens=100, messages=[USER], tools=[WEATHER], tool_choice={"type": "none"}
    ) as stream:
        assert stream.get_final_message().content[-1] == block


def test_images_of_users_and_of_tools(client: anthropic.Anthropic, far: OpenAIServer) -> None:
    url = {"type": "image", "source": {"type": "url", "url": "https://example.org/cat.png"}}
    ask(client, "auto", messages=[{"role": "user", "content": [{"type": "text", "text": "Who?"}, url]}])
    assert sent(far)[0]["content"][1]["image_url"]["url"] == "https://example.org/cat.png"
    use = {"type": "tool_use", "id": "t1", "name": "look", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [IMAGE]}
    chat: Any = [USER, {"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    ask(client, "far", messages=chat)
    *_, tool, user = sent(far)
    assert (tool["role"], tool["content"]) == ("tool", "")
    assert user["content"][0]["image_url"]["url"] == f"data:image/png;base64,{PIXEL}"
    with pytest.raises(anthropic.BadRequestError, match="reads no images"):
        ask(client, "fast", messages=[{"role": "user", "content": [IMAGE]}])


def test_results_that_are_errors_and_documents(client: anthropic.Anthropic, far: OpenAIServer) -> None:
    use = {"type": "tool_use", "id": "t1", "name": "look", "input": {}}
    source = {"type": "text", "media_type": "text/plain", "data": "It rains."}
    document = {"type": "document", "title": "Rain", "source": source}
    for content, expected in (
        ("no such file", "Error: no such file"),
        ("error: no such file", "error: no such file"),
        ([document], "Error: Rain\n\nIt rains."),
    ):
        result = {"type": "tool_result", "tool_use_id": "t1", "content": content, "is_error": True}
        chat: Any = [USER, {"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
        ask(client, "far", messages=chat)
        assert sent(far)[-1]["content"] == expected


def test_marks_for_the_cache_reach_a_provider_and_stop_at_others(
    client: anthropic.Anthropic, far: OpenAIServer
) -> None:
    body: Any = {
        "system": [{"type": "text", "text": "Rules.", "cache_control": EPHEMERAL}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": EPHEMERAL}]}
        ],
        "tools": [{**WEATHER, "cache_control": EPHEMERAL}],
        "tool_choice": {"type": "none"},
    }
    for model in ("far", "auto"):
        ask(client, model, **body)
        marked = {"type": "text", "text": "Rules.", "cache_control": EPHEMERAL}
        assert sent(far)[0]["content"] == [marked]
        assert sent(far)[1]["content"][0]["cache_control"] == EPHEMERAL
        hour = {"type": "ephemeral", "ttl": "1h"}  # dearer than what is held: left out
        dear = [{"type": "text", "text": "Rules.", "cache_control": hour}]
        ask(client, model, **{**body, "system": dear})
        assert "cache_control" not in json.dumps(far.requests[-1])
        ask(client, model, cache_control=EPHEMERAL, tools=[WEATHER], tool_choice={"type": "none"})
        assert sent(far)[0]["content"][0]["cache_control"] == EPHEMERAL
    for model in ("fast", "fast+cot", "auto"):
        assert text_of(ask(client, model, system=body["system"], messages=body["messages"])) == WORDS


def test_usage_of_caches_and_thoughts(
    client: anthropic.Anthropic, server: RunningServer, far: OpenAIServer
) -> None:
    far.usage = {
        "prompt_tokens": 100,
        "completion_tokens": 10,
        "total_tokens": 110,
        "prompt_tokens_details": {"cached_tokens": 15, "cache_creation_tokens": 80},
        "completion_tokens_details": {"reasoning_tokens": 4},
    }
    usage = ask(client, "far").usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.cache_creation_input_tokens) == (
        5,
        15,
        80,
    )
    assert usage.output_tokens == 10
    assert usage.output_tokens_details is not None
    assert usage.output_tokens_details.thinking_tokens == 4
    with client.messages.stream(model="far", max_tokens=100, messages=[USER]) as stream:
        final = stream.get_final_message().usage
    assert (final.input_tokens, final.cache_read_input_tokens, final.cache_creation_input_tokens) == (
        5,
        15,
        80,
    )


@pytest.mark.parametrize("thought_as", ["reasoning_content", "tags"])
def test_thoughts_are_shown_to_those_who_ask(
    client: anthropic.Anthropic, far: OpenAIServer, thought_as: str
) -> None:
    far.thought, far.thought_as = "Let me see.", thought_as
    asked: Any = {"type": "enabled", "budget_tokens": 1024}
    message = ask(client, "far", max_tokens=2000, thinking=asked)
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert message.content[0].thinking == "Let me see."  # type: ignore[union-attr]
    with client.messages.stream(model="far", max_tokens=2000, messages=[USER], thinking=asked) as stream:
        events = [event.type for event in stream]
        shown = [(block.type, getattr(block, block.type)) for block in stream.get_final_message().content]
        assert shown == [("thinking", "Let me see."), ("text", "you said: What is 6 times 7?")]
    assert events.count("message_start") == 1
    assert events.count("content_block_start") == events.count("content_block_stop") == 2
    for other in ({"type": "disabled"}, {"type": "adaptive", "display": "omitted"}, anthropic.NOT_GIVEN):
        assert text_of(ask(client, "far", max_tokens=2000, thinking=other)) == "you said: What is 6 times 7?"
    sdk_reply = client.messages.create(
        model="far",
        max_tokens=9,
        messages=[*([USER]), {"role": "assistant", "content": message.content}, USER],
    )
    assert sdk_reply.content
    assert sent(far)[1] == {"role": "assistant", "content": "you said: What is 6 times 7?"}


def test_an_answer_by_a_schema(client: anthropic.Anthropic, far: OpenAIServer) -> None:
    from pydantic import BaseModel

    class Sum(BaseModel):
        value: int

    parsed = client.messages.parse(
        model="far", max_tokens=100, messages=[{"role": "user", "content": "6 + 36"}], output_format=Sum
    )
    assert parsed.parsed_output == Sum(value=6)
    assert far.requests[-1]["response_format"]["type"] == "json_schema"


def test_settings_of_a_call(client: anthropic.Anthropic, far: OpenAIServer) -> None:
    sampling = {"temperature": 0.5, "top_p": 0.9}  # which the SDK has no parameters for any more
    message = ask(client, "far", max_tokens=3, stop_sequences=["42"], extra_body=sampling)
    assert (message.stop_reason, len(text_of(message).split())) == ("max_tokens", 3)
    body = far.requests[-1]
    assert (body["max_tokens"], body["temperature"], body["top_p"], body["stop"]) == (3, 0.5, 0.9, ["42"])
    assert text_of(ask(client, "fast", output_config={"effort": "low"})) == WORDS
    far.script = ["filtered"]
    assert ask(client, "far").stop_reason == "refusal"


@pytest.mark.parametrize(("model", "found"), [("fast", "forty"), ("thinker", "said"), ("far", None)])
def test_the_stop_sequence_that_was_found(
    client: anthropic.Anthropic, far: OpenAIServer, model: str, found: str | None
) -> None:
    """Of a remote model that does not think its provider finds it, and does not tell."""
    far.thought = "It is said." if model == "thinker" else None
    stops = ["never", "forty", "said"]
    message = ask(client, model, stop_sequences=stops)
    assert (message.stop_sequence, message.stop_reason) == (found, "stop_sequence" if found else "end_turn")
    with client.messages.stream(model=model, max_tokens=100, messages=[USER], stop_sequences=stops) as stream:
        final = stream.get_final_message()
    assert (final.stop_sequence, final.stop_reason) == (message.stop_sequence, message.stop_reason)
    assert text_of(message).endswith({"fast": "is ", "thinker": "you ", "far": "you "}[model])


def test_a_limit_above_the_context_is_cut_to_what_it_leaves(
    client: anthropic.Anthropic, far: OpenAIServer
) -> None:
    """Claude Code asks for 32,000 new tokens, whatever the model is."""
    assert text_of(ask(client, "fast", max_tokens=32_000, timeout=60)) == WORDS
    ask(client, "far", max_tokens=32_000, timeout=60)
    assert 9_000 < far.requests[-1]["max_tokens"] < 10_000


def test_what_claude_code_sends(
    client: anthropic.Anthropic, server: RunningServer, far: OpenAIServer
) -> None:
    message = client.beta.messages.create(
        model="far",
        max_tokens=32_000,
        betas=["claude-code-20250219", "interleaved-thinking-2025-05-14", "context-management-2025-06-27"],
        system=[{"type": "text", "text": "You are Claude Code.", "cache_control": EPHEMERAL}],
        messages=[{"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": EPHEMERAL}]}],
        tools=[WEATHER],
        tool_choice={"type": "none"},
        metadata={"user_id": "user_1_account__session_2"},
        thinking={"type": "adaptive"},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        extra_body={"temperature": 1},
        timeout=60,
    )
    assert "you said" in message.content[0].text  # type: ignore[union-attr]
    response = server.http.post(
        "/v1/messages?beta=true",
        json={"model": "fast", "max_tokens": 9, "messages": [USER], "stream": True},
        headers={"anthropic-version": "2023-06-01", "authorization": "Bearer none"},
    )
    assert response.status_code == 200
    assert response.text.startswith("event: message_start\n")
    assert "[DONE]" not in response.text


async def test_litellm_as_a_client(server: RunningServer) -> None:
    """As a provider of Anthropic's form, and as what passes that form on."""
    litellm = load_litellm()
    options: Any = {"max_tokens": 50, "messages": [USER], "api_base": server.url, "api_key": "any"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        message = await litellm.anthropic.messages.acreate(model="anthropic/fast", **options)
        stream = await litellm.acompletion(model="anthropic/far", stream=True, **options)
        pieces = [piece async for piece in stream]
    assert message["content"][0]["text"] == WORDS
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == "you said: What is 6 times 7?"


def test_counts_of_tokens_cost_nothing(client: anthropic.Anthropic, server: RunningServer) -> None:
    before = server.spent_and_held()
    for model in ("fast", "far", "auto", "fast+cot"):
        count = client.messages.count_tokens(model=model, messages=[USER]).input_tokens
        more = client.messages.count_tokens(
            model=model, messages=[USER], system="Be very brief. " * 300
        ).input_tokens
        assert 0 < count <= more, "of far, by the ratio of tokens to bytes that it reported before"
        assert model == "far" or (count < 60 and more > 900)
    with_tools = client.messages.count_tokens(model="auto", messages=[USER], tools=[WEATHER]).input_tokens
    assert with_tools > 0
    assert server.spent_and_held() == before
    with pytest.raises(anthropic.NotFoundError):
        client.messages.count_tokens(model="nobody", messages=[USER])
    with pytest.raises(anthropic.BadRequestError, match="no input_schema"):
        client.messages.count_tokens(model="fast", messages=[USER], tools=[{"name": "x"}])  # type: ignore[list-item]
    assert client.messages.count_tokens(model="fast", messages=[USER]).input_tokens > 0


def test_names_of_models(client: anthropic.Anthropic) -> None:
    assert "fast+cot" in [model.id for model in client.models.list()]
    assert client.models.retrieve("fast").display_name == "fast"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (
            {"messages": [{"role": "assistant", "content": "The answer is"}], "model": "auto"},
            "end with the user",
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0: no content"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": {}}]}
                ]
            },
            "no block of type tool_use",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {
                                "type": "document",
                                "source": {"type": "base64", "media_type": "application/pdf", "data": "x"},
                            }
                        ],
                    }
                ]
            },
            "source",
        ),
        ({"tools": [WEATHER]}, "cannot do: tools"),
        ({"extra_body": {"mcp_servers": [{"url": "x"}]}}, "unknown field 'mcp_servers'"),
        ({"extra_body": {"speed": "fast"}}, "speed"),
        ({"tool_choice": {"type": "any"}}, "goes with tools"),
        (
            {"extra_body": {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}},
            "clear_tool",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    client: anthropic.Anthropic, body: dict[str, Any], says: str
) -> None:
    with pytest.raises(anthropic.BadRequestError) as refused:
        ask(client, **body)
    assert says in refused.value.message
    assert refused.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index]


def test_errors_in_the_form_of_the_api(
    client: anthropic.Anthropic, server: RunningServer, far: OpenAIServer
) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        ask(client, "nobody")
    body: Any = missing.value.body
    assert (body["type"], body["error"]["type"]) == ("error", "not_found_error")
    assert body["request_id"] == missing.value.request_id != ""
    with pytest.raises(anthropic.APIStatusError) as poor:
        ask(client, "fast", extra_body={"budget": 1e-7})
    assert (poor.value.status_code, poor.value.body["error"]["type"]) == (402, "billing_error")  # type: ignore[index]
    far.script = [(429, {"retry-after": "3"}, "slow down")] * 3
    with pytest.raises(anthropic.RateLimitError):
        ask(client, "far")
    far.script = ["break"] * 3
    with pytest.raises(anthropic.APIStatusError, match="far"):
        list(client.messages.create(model="far", max_tokens=99, messages=[USER], stream=True))
    with pytest.raises(anthropic.PermissionDeniedError) as elsewhere:
        ask(client, "fast", extra_body={"only": "eu"})
    assert elsewhere.value.body["error"]["type"] == "permission_error"  # type: ignore[index]
    response = server.http.get("/v1/messages")
    assert (response.status_code, response.json()["type"]) == (405, "error")


def test_a_budget_a_key_and_a_client_that_leaves(tmp_path: Path) -> None:
    with serving(tmp_path, budget="1") as server:
        token, _ = server.keys.create("k", models=["slow"])
        with anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0) as client:
            with pytest.raises(anthropic.AuthenticationError):
                ask(client)
            with pytest.raises(anthropic.AuthenticationError):
                client.messages.count_tokens(model="fast", messages=[USER])
        with anthropic.Anthropic(base_url=server.url, api_key=token, max_retries=0) as client:
            with pytest.raises(anthropic.NotFoundError):
                ask(client, "fast")
            with client.messages.stream(model="slow", max_tokens=500, messages=[USER]) as stream:
                for _, _ in zip(range(5), stream.text_stream, strict=False):
                    pass
        server.assert_settled()
        (post,) = [entry for entry in server.client.ledger.entries() if entry.kind == "post"]
        assert 4 <= post.usage["slow"].output_tokens < 200
        assert post.nanousd > 0
