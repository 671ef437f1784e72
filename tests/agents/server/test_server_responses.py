"""The Responses API, asked by OpenAI's SDK, unchanged: text, streams, tools, schemas, kept conversations."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.responses import ResponseStreamEvent
from openai_server import OpenAIServer, running_server, spec_for
from pydantic import BaseModel, TypeAdapter
from viaticum_server import RunningServer, serving, write_catalogue

from viaticum.agents.responses_api.store import SECONDS_A_DAY, ResponseStore
from viaticum.catalogue import Catalogue
from viaticum.errors import InputError, LedgerError
from viaticum.models.remote.request import load_litellm

WORDS = "Seven times six is forty-two. The answer is 42."
QUESTION = "What is 6 times 7?"
WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "The weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


@pytest.fixture(scope="module")
def far() -> Iterator[OpenAIServer]:
    load_litellm()  # once, before a client waits for it
    with running_server() as far:
        yield far


@pytest.fixture(scope="module")
def server(far: OpenAIServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("responses")
    catalogue = Catalogue.load(write_catalogue(folder)).with_models(spec_for(far, image_tokens=2_000))
    with serving(folder, catalogue=catalogue, budget="10") as server:
        yield server


@pytest.fixture(autouse=True)
def anew(far: OpenAIServer, server: RunningServer) -> Iterator[None]:
    far.reset()
    yield
    server.assert_settled()


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, model: str = "fast", **body: Any) -> Any:
    return client.responses.create(**{"model": model, "input": QUESTION, **body})


def sent(far: OpenAIServer) -> Any:
    return far.requests[-1]["messages"]


@pytest.mark.parametrize("model", ["fast", "fast+cot", "auto", "far"])
def test_a_response_whole_and_as_a_stream(client: openai.OpenAI, server: RunningServer, model: str) -> None:
    before = server.spent_and_held()[0]
    response = ask(client, model)
    expected = WORDS if model != "far" else f"you said: {QUESTION}"
    assert (response.output_text, response.status, response.error) == (expected, "completed", None)
    cost = response.model_extra["viaticum"]["cost_nanousd"]
    assert server.spent_and_held()[0] - before == cost > 0
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens > 0
    with client.responses.stream(model=model, input=QUESTION) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert (final.output_text, final.usage) == (expected, response.usage)
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == expected


def events_of(client: openai.OpenAI, **body: Any) -> list[Any]:
    """The events of a stream, each of them valid by the models of the SDK."""
    events = list(client.responses.create(**{"model": "far", "input": QUESTION, "stream": True, **body}))
    for event in events:
        EVENTS.validate_python(event.to_dict())
    assert [event.sequence_number for event in events] == list(range(len(events)))
    return events


def test_the_events_of_each_item(client: openai.OpenAI, far: OpenAIServer) -> None:
    far.thought = "Let me see."
    events = events_of(client)
    names = list(dict.fromkeys(event.type.removeprefix("response.") for event in events))
    assert names == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_text.delta",
        "output_text.done",
        "completed",
    ]
    done = [event.item.to_dict() for event in events if event.type == "response.output_item.done"]
    assert done == [item.to_dict() for item in events[-1].response.output]
    assert [item["type"] for item in done] == ["reasoning", "message"]
    assert done[0]["content"][0]["text"] == "Let me see."
    assert events[-1].response.usage.output_tokens_details.reasoning_tokens > 0
    far.thought = None
    names = [event.type for event in events_of(client, tools=[WEATHER])]
    assert names == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]


def test_instructions_roles_and_images(client: openai.OpenAI, far: OpenAIServer) -> None:
    image = {"type": "input_image", "image_url": "https://example.org/cat.png", "detail": "low"}
    ask(
        client,
        "far",
        instructions="Be brief.",
        input=[
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": [{"type": "input_text", "text": "One."}]},
            {"type": "reasoning", "id": "rs_1", "summary": []},
            {
                "type": "message",
                "id": "msg_1",
                "role": "assistant",
                "status": "completed",
                "content": [{"type": "output_text", "text": "Yes.", "annotations": []}],
            },
            {"role": "user", "content": [{"type": "input_text", "text": "Who?"}, image]},
        ],
        metadata={"a": "b"},
        user="u",
        prompt_cache_key="k",
        include=["reasoning.encrypted_content"],
        truncation="disabled",
    )
    *others, last = sent(far)
    assert others == [
        {"role": "system", "content": "Be brief."},
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "One."},
        {"role": "assistant", "content": "Yes."},
    ]
    url = {"url": "https://example.org/cat.png", "detail": "low"}
    assert last["content"] == [{"type": "text", "text": "Who?"}, {"type": "image_url", "image_url": url}]


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("model", ["far", "auto"])
def test_a_loop_of_tools(client: openai.OpenAI, far: OpenAIServer, model: str, kept: bool) -> None:
    """Once with the whole conversation each time, once by the id of the last response."""
    given: list[Any] = [{"role": "user", "content": "Weather in Rome?"}]
    first = ask(client, model, input=given, tools=[WEATHER], store=kept)
    (call,) = [item for item in first.output if item.type == "function_call"]
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Weather in Rome?"})
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "18 C"}
    if kept:
        last = ask(client, model, input=[output], previous_response_id=first.id, tools=[WEATHER])
    else:
        last = ask(client, model, input=[*given, *first.output, output], tools=[WEATHER], store=False)
    assert last.output_text == "you said: Weather in Rome?"
    user, assistant, tool = sent(far)
    assert (user["content"], tool["content"]) == ("Weather in Rome?", "18 C")
    assert assistant["tool_calls"][0]["id"] == tool["tool_call_id"] == call.call_id
    function = far.requests[-1]["tools"][0]["function"]
    assert (function["parameters"], function["strict"]) == (WEATHER["parameters"], True)


def test_calls_in_a_row_and_images_of_functions(client: openai.OpenAI, far: OpenAIServer) -> None:
    def call(number: int) -> dict[str, Any]:
        return {"type": "function_call", "call_id": f"c{number}", "name": "look", "arguments": "{}"}

    image = {"type": "input_image", "image_url": "https://example.org/cat.png"}
    outputs = [
        {"type": "function_call_output", "call_id": "c1", "output": [image]},
        {"type": "function_call_output", "call_id": "c2", "output": "a dog"},
    ]
    ask(client, "far", input=[{"role": "user", "content": "Look."}, call(1), call(2), *outputs])
    _, assistant, first, second, shown = sent(far)
    assert [each["id"] for each in assistant["tool_calls"]] == ["c1", "c2"]
    assert (first["role"], second["content"]) == ("tool", "a dog")
    assert shown["content"][0]["image_url"]["url"] == "https://example.org/cat.png"


@pytest.mark.parametrize(
    ("choice", "openai_choice", "tools"),
    [
        ("required", "required", 2),
        ("none", "none", 2),
        ({"type": "function", "name": "weather"}, {"type": "function", "function": {"name": "weather"}}, 2),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "weather"}]},
            "required",
            1,
        ),
        ("auto", None, 2),
    ],
)
def test_choices_of_tools(
    client: openai.OpenAI, far: OpenAIServer, choice: Any, openai_choice: Any, tools: int
) -> None:
    other = {**WEATHER, "name": "other"}
    ask(client, "far", tools=[WEATHER, other], tool_choice=choice, parallel_tool_calls=False)
    assert far.requests[-1].get("tool_choice") == openai_choice
    assert (len(far.requests[-1]["tools"]), far.requests[-1]["parallel_tool_calls"]) == (tools, False)


def test_an_answer_by_a_schema(client: openai.OpenAI, far: OpenAIServer) -> None:
    class Sum(BaseModel):
        value: int

    parsed = client.responses.parse(model="auto", input="6 + 36", text_format=Sum)
    assert parsed.output_parsed == Sum(value=6)
    form = far.requests[-1]["response_format"]
    assert (form["type"], form["json_schema"]["strict"], form["json_schema"]["name"]) == (
        "json_schema",
        True,
        "Sum",
    )
    ask(client, "far", text={"format": {"type": "json_object"}})
    assert far.requests[-1]["response_format"] == {"type": "json_object"}


def test_conversations_go_on_by_an_id(client: openai.OpenAI, far: OpenAIServer) -> None:
    first = ask(client, "far", input="One.", instructions="Be brief.")
    second = ask(client, "far", input="Two.", previous_response_id=first.id)
    with client.responses.stream(model="far", input="Three.", previous_response_id=second.id) as stream:
        third = stream.get_final_response()
    branch = ask(client, "far", input="Other.", previous_response_id=second.id)
    ask(client, "far", input="Four.", previous_response_id=third.id)
    texts = [message["content"] for message in sent(far)]
    assert texts == [
        "One.",
        "you said: One.",
        "Two.",
        "you said: Two.",
        "Three.",
        "you said: Three.",
        "Four.",
    ]
    assert branch.previous_response_id == second.id
    kept = client.responses.retrieve(third.id)
    assert (kept.output_text, kept.created_at) == ("you said: Three.", third.created_at)
    client.responses.delete(second.id)
    with pytest.raises(openai.BadRequestError) as lost:
        ask(client, "far", input="Five.", previous_response_id=third.id)
    assert (lost.value.code, lost.value.param) == ("previous_response_not_found", "previous_response_id")
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(second.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.delete(second.id)


def test_a_response_that_is_not_to_be_kept(client: openai.OpenAI) -> None:
    response = ask(client, store=False)
    assert response.model_extra["store"] is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)
    with pytest.raises(openai.BadRequestError, match="send the whole conversation"):
        ask(client, previous_response_id=response.id)


@pytest.mark.parametrize("by_id", [False, True])
def test_an_agent_of_langchain(server: RunningServer, far: OpenAIServer, by_id: bool) -> None:
    """Its second step is the same to the model, whether it sends the conversation or the id of the first."""
    from langchain.agents import create_agent
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI

    @tool
    def weather(city: str) -> str:
        """The weather in a city."""
        return f"18 C in {city}"

    chat = ChatOpenAI(
        model="far",
        base_url=f"{server.url}/v1",
        api_key="any",  # type: ignore[arg-type]
        use_responses_api=True,
        use_previous_response_id=by_id,
        max_retries=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        agent: Any = create_agent(chat, [weather])
        ended = agent.invoke({"messages": [("user", "Rome?")]})
        pieces = list(chat.stream("Hello"))
    assert ended["messages"][-1].text == "you said: Rome?"
    assert "".join(piece.text for piece in pieces) == "you said: Hello"
    step = far.requests[-2]["messages"]
    assert [message["role"] for message in step] == ["user", "assistant", "tool"]
    assert step[-1]["content"] == "18 C in Rome?"


def test_limits_refusals_and_settings(client: openai.OpenAI, far: OpenAIServer) -> None:
    cut = ask(client, "far", max_output_tokens=3, temperature=0.5, top_p=0.9, reasoning={"effort": "low"})
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    body = far.requests[-1]
    assert (body["max_tokens"], body["temperature"], body["top_p"]) == (3, 0.5, 0.9)
    assert body["reasoning_effort"] == "low"
    events = events_of(client, max_output_tokens=3)
    assert events[-1].type == "response.incomplete"
    far.script = ["filtered"]
    assert ask(client, "far").incomplete_details.reason == "content_filter"
    found = ask(client, "far", include=["message.output_text.logprobs"], top_logprobs=2)
    assert found.output[0].content[0].logprobs[0].logprob == -0.5


def test_usage(client: openai.OpenAI, far: OpenAIServer) -> None:
    far.usage = {
        "prompt_tokens": 100,
        "completion_tokens": 10,
        "total_tokens": 110,
        "prompt_tokens_details": {"cached_tokens": 15},
        "completion_tokens_details": {"reasoning_tokens": 4},
    }
    usage = ask(client, "far").usage
    assert (usage.input_tokens, usage.input_tokens_details.cached_tokens, usage.output_tokens) == (
        100,
        15,
        10,
    )
    assert (usage.output_tokens_details.reasoning_tokens, usage.total_tokens) == (4, 110)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"tools": [{"type": "web_search"}]}, "web_search"),
        ({"tools": [{"type": "function"}]}, "without a name"),
        ({"tools": [WEATHER]}, "cannot do: tools"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "item_reference"),
        ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]}, "input_file"),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": "1"}]}, "no call 'x'"),
        ({"input": []}, "input"),
        ({"input": [{"type": "reasoning", "id": "x", "summary": []}]}, "nothing that a model reads"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"extra_body": {"conversation": "c"}}, "unknown field 'conversation'"),
        ({"tool_choice": "required"}, "goes with tools"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"service_tier": "priority"}, "service_tier"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(client: openai.OpenAI, body: Any, says: str) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            ask(client, **body, stream=stream)
        assert says in refused.value.message


def test_errors_before_and_in_a_stream(client: openai.OpenAI, far: OpenAIServer) -> None:
    with pytest.raises(openai.NotFoundError):
        ask(client, "nobody")
    with pytest.raises(openai.APIStatusError) as poor:
        ask(client, extra_body={"budget": 1e-7})
    assert (poor.value.status_code, poor.value.code) == (402, "budget_exceeded")
    far.script = ["break"] * 3
    events = events_of(client)
    assert events[-1].type == "response.failed"
    assert events[-1].response.error.code == "server_error"
    assert events[-1].response.status == "failed"


def test_keys_see_their_own_responses(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        server.client.ledger.create("other", parent="serve", limit_nanousd=10**9)
        tokens = [server.keys.create(name, scope=scope)[0] for name, scope in (("a", None), ("b", "other"))]
        one, other = (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key=token, max_retries=0) for token in tokens
        )
        with one, other:
            response = ask(one)
            assert one.responses.retrieve(response.id).id == response.id
            with pytest.raises(openai.NotFoundError):
                other.responses.retrieve(response.id)
            with pytest.raises(openai.BadRequestError, match="no response"):
                ask(other, previous_response_id=response.id)
            with pytest.raises(openai.NotFoundError):
                other.responses.delete(response.id)
            assert ask(one, previous_response_id=response.id).output_text == WORDS
        assert server.http.get(f"/v1/responses/{response.id}").status_code == 401
        server.assert_settled()


def test_the_store_forgets_and_survives_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "responses.db"
    with ResponseStore(file, days=2) as store:
        store.put("a", "s", None, [{"role": "user", "content": "One."}], {"id": "a"})
    assert file.stat().st_mode & 0o077 == 0
    with ResponseStore(file, days=2) as store:
        store.put("b", "s", "a", [{"role": "user", "content": "Two."}], {"id": "b"})
        kept = store.conversation("b", "s")
        assert kept is not None
        assert [each["content"] for each in kept[0]] == ["One.", "Two."]
        assert store.conversation("b", "t") is None
        import time

        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 3 * SECONDS_A_DAY)
        assert store.body("b", "s") is None
        store.put("c", "s", None, [], {})
        monkeypatch.undo()
        assert store.body("a", "s") is None, "it was deleted"
    with pytest.raises(InputError):
        ResponseStore(file, days=0)
    (tmp_path / "text").write_text("no database, but a text that is long enough to be read as one" * 40)
    with pytest.raises(LedgerError):
        ResponseStore(tmp_path / "text")


def test_a_conversation_stays_where_it_was_said_that_it_may_go(client: openai.OpenAI) -> None:
    first = ask(client, extra_body={"only": "local"})
    with pytest.raises(openai.BadRequestError, match="labelled local alone; say so again"):
        ask(client, "far", previous_response_id=first.id)
    second = ask(client, previous_response_id=first.id, extra_body={"only": "local"})
    with pytest.raises(openai.BadRequestError, match="say so again"):
        ask(client, previous_response_id=second.id)


def test_two_keys_of_one_budget_do_not_see_each_other_s_responses(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        one, other = (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.keys.create(name)[0], max_retries=0)
            for name in ("a", "b")
        )
        with one, other:
            response = ask(one)
            with pytest.raises(openai.NotFoundError):
                other.responses.retrieve(response.id)
            with pytest.raises(openai.BadRequestError, match="no response"):
                ask(other, previous_response_id=response.id)


def test_numbers_that_are_none_are_refused_before_a_call(
    client: openai.OpenAI, server: RunningServer
) -> None:
    before = server.spent_and_held()
    start, kind = '{"model": "fast", "input": "x", "metadata": {"x": ', {"content-type": "application/json"}
    for number in ("1e999", "NaN", "-Infinity"):
        refused = server.http.post("/v1/responses", content=f"{start}{number}}}}}", headers=kind)
        assert refused.status_code == 400, number
        assert "not finite" in refused.text
    assert server.spent_and_held() == before
    assert ask(client, input="What is NaN, and 1e999?").output_text


def test_an_answer_is_given_also_where_it_cannot_be_kept(
    client: openai.OpenAI,
    server: RunningServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*given: object, **more: object) -> None:
        raise LedgerError("the disk is full")

    monkeypatch.setattr(ResponseStore, "put", full)
    assert ask(client).output_text == WORDS
    assert "a response is not kept: the disk is full" in caplog.text
