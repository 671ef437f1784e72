"""Tools and forms of an answer through `auto`: routed among the models that can, one charge a call."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from openai import OpenAI
from openai_server import OpenAIServer, running_server, spec_for
from pydantic import BaseModel
from viaticum_server import serving

from viaticum import BudgetExceeded, ChatViaticum, InputError, Viaticum
from viaticum.agents.cancellation import CancellationToken
from viaticum.agents.capable import models_in_order
from viaticum.agents.completions import CompletionFinished, CompletionRequest, complete
from viaticum.agents.integrations.litellm_provider import register
from viaticum.catalogue import Catalogue
from viaticum.errors import AuthenticationFailed, ProviderUnavailable, RateLimited
from viaticum.generation import GenerationSettings
from viaticum.models.remote.request import load_litellm
from viaticum.routers.query import StaticRouter
from viaticum.types import Message, Pair, RoutingTable, Row

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}
SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "sum",
        "schema": {"type": "object", "properties": {"total": {"type": "integer"}}, "required": ["total"]},
    },
}
ASKED: list[Message] = [{"role": "user", "content": "What is 6 + 7?"}]
# Two rows of a model: its best one stands for it.
TABLE = RoutingTable(
    (
        Row(Pair("best", "cot"), 0.9, 100, 100, 3_000_000, 3_000_000),
        Row(Pair("best", "direct"), 0.3, 100, 100, 1_000_000, 1_000_000),
        Row(Pair("good", "cot"), 0.7, 100, 100, 1_000_000, 1_000_000),
        Row(Pair("words", "cot"), 0.95, 100, 100, 1_000, 1_000),
        Row(Pair("smollm2-135m", "cot"), 0.99, 100, 100, 1, 1),
    )
)


@pytest.fixture(scope="module")
def running() -> Iterator[OpenAIServer]:
    with running_server() as server:
        yield server


@pytest.fixture
def provider(running: OpenAIServer) -> OpenAIServer:
    running.reset()
    return running


def catalogue(server: OpenAIServer, **more: Any) -> Catalogue:
    """`words` can do neither, `plain` is unknown to the router, `hidden` is asked by its name alone."""
    fields: dict[str, dict[str, Any]] = {
        "best": {"input_price": "10", "output_price": "20"},
        "good": {"tools": True},
        "words": {"tools": False, "json_schema": False},
        "plain": {},
        "hidden": {"default": False},
        **more,
    }
    entries = [
        spec_for(server, name=name, litellm_model=f"openai/{name}", **{"max_retries": 0, **each})
        for name, each in fields.items()
    ]
    return Catalogue.load().with_models(*entries)


@pytest.fixture
def client(provider: OpenAIServer, tmp_path: Path) -> Iterator[Viaticum]:
    with Viaticum(
        "1", catalogue=catalogue(provider), router=StaticRouter(TABLE), policy="best", folder=tmp_path
    ) as client:
        yield client
        assert client.ledger.check() == []
        assert client.budget().held_nanousd == 0


def ask(client: Viaticum, *, messages: list[Message] = ASKED, **fields: Any) -> CompletionFinished:
    fields = {"key": f"k{len(list(client.ledger.entries()))}", "extra": {"tools": [TOOL]}, **fields}
    request = CompletionRequest("auto", messages, fields.pop("scope", client.budget_name), **fields)
    *_, last = complete(client, request, CancellationToken())
    assert isinstance(last, CompletionFinished)
    return last


def posts(client: Viaticum) -> list[tuple[str, int]]:
    entries = client.ledger.entries(client.budget_name)
    return [(entry.note["tags"]["model"], entry.nanousd) for entry in entries if entry.kind == "post"]


# Who is asked


def test_tools_go_to_the_best_model_that_can(client: Viaticum, provider: OpenAIServer) -> None:
    done = ask(client)
    assert done.routes == ("best",)
    assert done.finish_reason == "tool_calls"
    assert json.loads(done.tool_calls[0]["function"]["arguments"]) == {"a": 6}
    assert posts(client) == [("best", done.cost)]
    assert provider.requests[0]["model"] == "best"


def test_a_schema_and_a_json_mode_go_to_models_that_have_them(
    client: Viaticum, provider: OpenAIServer
) -> None:
    assert json.loads(ask(client, extra={"response_format": SCHEMA}).text) == {"total": 6}
    assert ask(client, extra={"response_format": {"type": "json_object"}}).routes == ("words",)
    assert [body["model"] for body in provider.requests] == ["best", "words"]


def test_the_policy_and_what_is_left_choose(client: Viaticum) -> None:
    from viaticum.routers.query import parse_policy

    assert ask(client, policy=parse_policy("cheapest:0.6")).routes == ("good",)
    client.ledger.create("small", limit_nanousd=2_200_000, parent=client.budget_name)
    done = ask(client, scope="small", settings=GenerationSettings.of(max_new_tokens=50))
    assert done.routes == ("good",)
    client.ledger.create("tiny", limit_nanousd=1_000, parent=client.budget_name)
    with pytest.raises(BudgetExceeded):
        ask(client, scope="tiny")
    assert client.budget().held_nanousd == 0


def test_models_that_the_router_does_not_know_come_last(client: Viaticum) -> None:
    order = models_in_order(client, ASKED, {"tools": [TOOL]}, scope=client.budget_name)
    assert list(order) == ["best", "good", "plain"]


def test_a_loop_of_tools_stays_with_its_model(client: Viaticum, provider: OpenAIServer) -> None:
    call = ask(client).tool_calls[0]
    chat: list[Any] = [
        *ASKED,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "13", "tool_call_id": call["id"]},
    ]
    for extra in ({"tools": [TOOL]}, {}):  # also where the last call gives no tools
        done = ask(client, messages=chat, extra=extra)
        assert (done.routes, done.finish_reason) == (("best",), "stop")
    assert provider.requests[-1]["messages"][-1]["content"] == "13"


def test_without_a_model_that_can_the_error_says_what_to_add(
    provider: OpenAIServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_KEY", raising=False)
    only = Catalogue([spec_for(provider, name="words", tools=False)])
    with Viaticum("1", catalogue=only, router=StaticRouter(TABLE), folder=tmp_path / "1") as client:
        with pytest.raises(InputError, match=r"no model here can call tools; add one .* models add"):
            ask(client)
        assert provider.requests == []
    keyless = Catalogue([spec_for(provider, name="good", api_key_env="NO_KEY")])
    with (
        Viaticum("1", catalogue=keyless, router=StaticRouter(TABLE), folder=tmp_path / "2") as client,
        pytest.raises(AuthenticationFailed, match="NO_KEY"),
    ):
        ask(client)


def test_other_parameters_and_pairs_are_refused_as_before(client: Viaticum) -> None:
    with pytest.raises(InputError, match="auto answers in words; it cannot do: logprobs"):
        ask(client, extra={"logprobs": True})
    request = CompletionRequest("good+cot", ASKED, client.budget_name, "k", extra={"tools": [TOOL]})
    with pytest.raises(InputError, match="cannot do: tools"):
        list(complete(client, request, CancellationToken()))
    with pytest.raises(InputError, match="no user turn"):
        ask(client, messages=[{"role": "system", "content": "Be brief"}])


def test_an_effort_goes_to_models_that_think_alone(client: Viaticum, provider: OpenAIServer) -> None:
    ask(client, settings=GenerationSettings.of(reasoning_effort="low"))
    assert "reasoning_effort" not in provider.requests[-1]


# Failover


@pytest.mark.parametrize("streamed", [True, False])
def test_the_next_model_that_can_answers_where_one_fails(
    client: Viaticum, provider: OpenAIServer, streamed: bool
) -> None:
    provider.script = [(429, {}, "slow down"), (400, {}, "maximum context length is 5")]
    done = ask(client, is_streamed=streamed)
    assert done.routes == ("plain",)
    assert [body["model"] for body in provider.requests] == ["best", "good", "plain"]
    assert posts(client) == [("plain", done.cost)]


def test_with_all_of_them_away_the_first_error_is_raised(client: Viaticum, provider: OpenAIServer) -> None:
    provider.script = [(429, {}, "slow down"), (503, {}, "away"), (503, {}, "away")]
    with pytest.raises(RateLimited):
        ask(client)
    assert posts(client) == []


def test_a_text_that_was_shown_is_final(client: Viaticum, provider: OpenAIServer) -> None:
    messages: list[Any] = [*ASKED, {"role": "tool", "content": "13", "tool_call_id": "c"}]
    provider.text = "It is thirteen, I think."
    for streamed in (True, False):
        provider.script = ["break"]
        if streamed:
            with pytest.raises(ProviderUnavailable):
                ask(client, messages=messages)
        else:
            done = ask(client, messages=messages, is_streamed=False)
            assert (done.routes, done.text) == (("good",), "It is thirteen, I think.")
    assert [name for name, _ in posts(client)] == ["best", "best", "good"]


# The interfaces


def test_the_sdk_of_openai_works_unchanged(provider: OpenAIServer, tmp_path: Path) -> None:
    with (
        serving(tmp_path, catalogue=catalogue(provider), router=StaticRouter(TABLE)) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="none") as sdk,
    ):
        chat: Any = {"model": "auto", "messages": list(ASKED), "tools": [TOOL]}
        whole = sdk.chat.completions.create(**chat)
        assert whole.choices[0].finish_reason == "tool_calls"
        name = server.ask("auto", tools=[TOOL]).headers["x-viaticum-route"]
        assert name == "best"
        pieces = [
            delta
            for chunk in sdk.chat.completions.create(**chat, stream=True)
            for choice in chunk.choices
            for delta in choice.delta.tool_calls or ()
        ]
        assert pieces[0].function.name == "add"
        assert json.loads("".join(each.function.arguments or "" for each in pieces)) == {"a": 6}
        form = sdk.chat.completions.create(model="auto", messages=ASKED, response_format=SCHEMA)  # type: ignore[call-overload]
        assert json.loads(form.choices[0].message.content) == {"total": 6}
        server.assert_settled()


@tool
def add(a: int) -> int:
    """Adds seven."""
    return a + 7


@pytest.mark.parametrize("way", ["sync", "async"])
async def test_an_agent_on_auto(client: Viaticum, provider: OpenAIServer, way: str) -> None:
    provider.text = "It is 13."
    agent = create_agent(ChatViaticum(model="auto", client=client), [add])
    start: Any = {"messages": [HumanMessage("What is 6 + 7?")]}
    out = agent.invoke(start) if way == "sync" else await agent.ainvoke(start)
    kinds = [type(message) for message in out["messages"]]
    assert kinds == [HumanMessage, AIMessage, ToolMessage, AIMessage]
    assert out["messages"][2].content == "13"
    assert out["messages"][3].content == "It is 13."
    assert out["messages"][3].response_metadata["route"] == "best"
    assert [name for name, _ in posts(client)] == ["best", "best"]


class Sum(BaseModel):
    total: int


def test_structured_output_and_failover_of_the_chat_model(client: Viaticum, provider: OpenAIServer) -> None:
    chat = ChatViaticum(model="auto", client=client)
    methods: Any = ("function_calling", "json_schema")
    for method in methods:
        provider.script = [(503, {}, "away")]
        assert chat.with_structured_output(Sum, method=method).invoke("6 + 7?") == Sum(total=6)
        assert [body["model"] for body in provider.requests[-2:]] == ["best", "good"]
    provider.script, provider.text = ["break"], "It is thirteen, I think."
    history = [HumanMessage("hi"), ToolMessage("13", tool_call_id="c")]
    assert chat.invoke(history).content == "It is thirteen, I think."
    provider.script = ["break"]
    with pytest.raises(ProviderUnavailable):
        list(chat.stream(history))


async def test_the_provider_of_litellm(client: Viaticum) -> None:
    litellm = load_litellm()
    register(ChatViaticum(model="auto", client=client))
    given: Any = {"model": "viaticum/auto", "messages": ASKED, "tools": [TOOL], "_skip_mcp_handler": True}
    for response in (litellm.completion(**given), await litellm.acompletion(**given)):
        (call,) = response.choices[0].message.tool_calls
        assert json.loads(call.function.arguments) == {"a": 6}
        assert response.choices[0].message.provider_specific_fields["viaticum"]["route"] == "best"


def test_an_entry_may_say_that_it_takes_no_schema(client: Viaticum) -> None:
    request = CompletionRequest("words", ASKED, client.budget_name, "k", extra={"response_format": SCHEMA})
    with pytest.raises(InputError, match="words answers by no JSON schema"):
        list(complete(client, request, CancellationToken()))


# Images


def picture(text: str = "What is it?", **detail: str) -> list[Any]:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 4000, **detail}}
    return [{"role": "user", "content": [{"type": "text", "text": text}, image]}]


SEEING = {
    "best": {"image_tokens": 1500, "input_price": "10", "output_price": "20"},
    "good": {"vision": False},
}


def test_an_image_is_held_by_the_bound_of_the_entry(provider: OpenAIServer, tmp_path: Path) -> None:
    entries = catalogue(provider, **SEEING)
    with serving(tmp_path, catalogue=entries, router=StaticRouter(TABLE)) as server:
        response = server.ask("auto", messages=picture(detail="low"), max_tokens=10)
        assert response.headers["x-viaticum-route"] == "best"
        sent = provider.requests[-1]["messages"][0]["content"]
        assert sent == picture(detail="low")[0]["content"]
        (held,) = [entry for entry in server.client.ledger.entries("serve") if entry.kind == "reserve"]
        assert 1500 < held.usage["best"].input_tokens < 2000, "not the bytes of the image"
        for name, problem in (
            ("good", "reads no images, as its entry"),
            ("plain", "states no image_tokens"),
            ("best+cot", "reads no images"),
            ("smollm2-135m", "reads no images"),
        ):
            refused = server.ask(name, messages=picture())
            assert refused.status_code in (400, 404), refused.text
            assert refused.status_code == 404 or problem in refused.text
        assert len(provider.requests) == 1
        server.assert_settled()


def test_without_a_bound_auto_takes_no_image(client: Viaticum) -> None:
    image = {"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}}
    messages: list[Any] = [{"role": "user", "content": "", "parts": [image]}]
    with pytest.raises(InputError, match=r"no model here can read images, and says in its entry"):
        ask(client, messages=messages, extra={})


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}},
        {"type": "image_url", "image_url": "data:image/png;base64,QUJD"},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "QUJD"}},
        {"type": "image", "base64": "QUJD", "mime_type": "image/png"},
        {"type": "image", "source_type": "base64", "data": "QUJD", "mime_type": "image/png"},
    ],
)
def test_images_of_langchain_in_all_their_forms(
    provider: OpenAIServer, tmp_path: Path, part: dict[str, Any]
) -> None:
    chat = ChatViaticum(
        model="auto",
        budget="1",
        catalogue=catalogue(provider, **SEEING),
        router=StaticRouter(TABLE),
        folder=tmp_path,
    )
    with chat:
        chat.invoke([HumanMessage([{"type": "text", "text": "What is it?"}, part])])
        assert provider.requests[-1]["messages"][0]["content"] == [
            {"type": "text", "text": "What is it?"},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}},
        ]
        chat.invoke([HumanMessage([part])])
        with pytest.raises(InputError, match="cannot be budgeted"):
            chat.invoke([HumanMessage([{"type": "image", "file_id": "f"}])])


def test_a_batch_reads_images_by_name_alone(provider: OpenAIServer, tmp_path: Path) -> None:
    from viaticum.agents.batch import run_batch
    from viaticum.jobs import read_rows

    rows = [
        {
            "custom_id": name,
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": name, "messages": picture()},
        }
        for name in ("best", "auto", "plain")
    ]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = run_batch(
        source,
        tmp_path / "out.jsonl",
        budget="1",
        catalogue=catalogue(provider, **SEEING),
        router=StaticRouter(TABLE),
        ledger=tmp_path / "ledger.db",
        skip_bad=True,
    )
    states = {row.id: (row.state, row.reason) for row in read_rows(ended.folder)}
    assert states["best"][0] == "answered"
    assert len(provider.requests) == 1
    assert "reads no images" in " ".join(reason for _, reason in states.values())
    assert "states no image_tokens" in states["plain"][1]
