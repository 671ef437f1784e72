"""`ChatViaticum` beyond LangChain's own tests: costs, routes, refusals, and calls that end early."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, MessagesState, StateGraph
from openai_server import KEY, OpenAIServer, running_server, spec_for
from pydantic import BaseModel, ValidationError

from viaticum import BudgetExceeded, ChatViaticum, FakeRouter, InputError, ScriptedModel, Viaticum
from viaticum.agents.integrations.langchain_messages import from_langchain
from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.errors import ModelError, UnknownName

WORD = 1_000  # nano-dollars


@pytest.fixture
def scripted() -> ScriptedModel:
    return ScriptedModel("four five six")


@pytest.fixture
def chat(scripted: ScriptedModel, tmp_path: Path) -> Iterator[ChatViaticum]:
    with ChatViaticum(
        model="scripted",
        budget="0.0001",
        models={"scripted": scripted},
        folder=tmp_path,
        max_tokens=10,
        router=FakeRouter("scripted+direct"),
    ) as chat:
        yield chat
        assert chat._client().ledger.check() == []
        assert chat.left().held_nanousd == 0


def test_a_plain_chat_gives_everything_to_the_model_and_is_charged_what_it_used(
    chat: ChatViaticum, scripted: ScriptedModel
) -> None:
    message = chat.invoke(
        [SystemMessage("be brief"), HumanMessage("one"), AIMessage("two"), HumanMessage("three")]
    )
    assert message.content == "four five six"
    ((messages, generation),) = scripted.calls
    assert [(each["role"], each["content"]) for each in messages] == [
        ("system", "be brief"),
        ("user", "one"),
        ("assistant", "two"),
        ("user", "three"),
    ]
    assert generation.max_new_tokens == 10
    assert message.usage_metadata == {
        "input_tokens": 5,
        "output_tokens": 3,
        "total_tokens": 8,
        "input_token_details": {"cache_read": 0},
        "output_token_details": {"reasoning": 0},
    }
    metadata = message.response_metadata
    assert (metadata["cost_nanousd"], metadata["cost_usd"]) == (8 * WORD, "0.000008")
    assert (metadata["left_nanousd"], metadata["left_usd"]) == (92 * WORD, "0.000092")
    assert (metadata["route"], metadata["model_name"], metadata["finish_reason"]) == (
        "scripted",
        "scripted",
        "stop",
    )


def test_settings_of_the_call_win_over_those_of_the_model(
    chat: ChatViaticum, scripted: ScriptedModel
) -> None:
    assert chat.invoke("hi", stop=["five"]).content == "four "
    assert chat.invoke("hi", max_tokens=2, temperature=0.5, seed=3).content == "four five"
    generation = scripted.calls[-1][1]
    assert (generation.max_new_tokens, generation.temperature, generation.seed) == (2, 0.5, 3)
    assert chat.model_copy(update={"stop": "four"}).invoke("hi").content == ""


class Tokens(BaseCallbackHandler):
    def __init__(self) -> None:
        self.tokens: list[str] = []

    def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
        self.tokens.append(token)


async def test_callbacks_hear_every_token(chat: ChatViaticum) -> None:
    heard = Tokens()
    assert len(list(chat.stream("hi", config={"callbacks": [heard]}))) == 4
    assert heard.tokens == ["four", " five", " six", ""]
    heard = Tokens()
    async for _ in chat.astream("hi", config={"callbacks": [heard]}):
        pass
    assert heard.tokens == ["four", " five", " six", ""]


def test_the_budget_ends_a_chat_before_the_model_is_asked(
    chat: ChatViaticum, scripted: ScriptedModel
) -> None:
    for _ in range(7):
        chat.invoke("one two three four five six seven eight nine ten")
    assert chat.left().left_nanousd == 9 * WORD
    with pytest.raises(BudgetExceeded):
        chat.invoke("hi")
    assert len(scripted.calls) == 7


def test_batches_keep_to_the_budget_together(chat: ChatViaticum, scripted: ScriptedModel) -> None:
    scripted.pause = 0.005
    results = chat.batch(["hi"] * 40, return_exceptions=True)
    refused = [each for each in results if isinstance(each, BudgetExceeded)]
    answered = [each for each in results if isinstance(each, AIMessage)]
    assert len(refused) + len(answered) == 40
    assert refused
    assert chat.left().posted_nanousd == 4 * WORD * len(answered) <= 100 * WORD


def test_an_early_end_is_charged_for_what_was_written(chat: ChatViaticum) -> None:
    stream = chat.stream("one two")
    assert next(stream).content == "four"
    stream.close()  # type: ignore[attr-defined]
    assert chat.left().posted_nanousd == 3 * WORD


async def test_a_cancelled_task_is_charged_for_what_was_written(
    chat: ChatViaticum, scripted: ScriptedModel
) -> None:
    scripted.script, scripted.pause = "a b c d e f g h i j", 0.5
    begun = asyncio.Event()

    async def read() -> None:
        async for _ in chat.astream("one two"):
            begun.set()

    task = asyncio.create_task(read())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert 2 * WORD < chat.left().posted_nanousd < 12 * WORD
    assert chat.left().held_nanousd == 0


def test_a_model_that_fails_costs_nothing(chat: ChatViaticum, scripted: ScriptedModel) -> None:
    scripted.script = ModelError("it broke")
    with pytest.raises(ModelError, match="it broke"):
        chat.invoke("hi")
    assert chat.left().posted_nanousd == 0


def test_two_equal_calls_are_two_calls(chat: ChatViaticum, scripted: ScriptedModel) -> None:
    chat.invoke("hi")
    chat.invoke("hi")
    assert len(scripted.calls) == 2
    assert chat.left().posted_nanousd == 8 * WORD


# The workflow


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Viaticum]:
    models = {
        "small": ScriptedModel("no program here", name="small"),
        "large": ScriptedModel("The answer is 42.", name="large"),
    }
    router = FakeRouter("small+pot", "large+cot")
    with Viaticum("0.1", models=models, router=router, folder=tmp_path) as client:  # type: ignore[arg-type]
        yield client
        assert client.ledger.check() == []
        assert client.budget().held_nanousd == 0


def test_auto_routes_the_last_user_turn_and_shows_the_accepted_answer_alone(client: Viaticum) -> None:
    chat = ChatViaticum(client=client)
    message = chat.invoke([HumanMessage("hello"), AIMessage("hello"), HumanMessage("What is 6 * 7?")])
    assert message.content == "The answer is 42."
    metadata = message.response_metadata
    assert (metadata["answer"], metadata["route"], metadata["model_name"]) == ("42", "large+cot", "large")
    assert metadata["routes"] == ["small+pot", "large+cot"]
    assert metadata["cost_nanousd"] == client.budget().posted_nanousd > 0
    assert message.usage_metadata is not None
    chunks = list(chat.stream("What is 6 * 7?"))
    assert [chunk.content for chunk in chunks] == ["The answer is 42.", ""]
    used = chunks[-1].usage_metadata
    assert used is not None
    assert used["output_tokens"] == message.usage_metadata["output_tokens"]
    assert used["input_tokens"] == message.usage_metadata["input_tokens"] - 4, (
        "two turns before it, read by two pairs"
    )


def test_a_pair_by_name_shares_the_budget(client: Viaticum) -> None:
    chat = ChatViaticum(model="large+direct", client=client)
    message = chat.invoke("What is 6 * 7?")
    assert message.response_metadata["routes"] == ["large+direct"]
    assert client.budget().posted_nanousd == message.response_metadata["cost_nanousd"] > 0
    chat.close()
    assert client.budget().left_nanousd is not None  # the one that was given stays open


async def test_auto_runs_inside_another_graph_with_checkpoints_of_its_own(client: Viaticum) -> None:
    chat = ChatViaticum(client=client)

    async def answer(state: MessagesState) -> dict[str, Any]:
        return {"messages": [await chat.ainvoke(state["messages"])]}

    def answer_now(state: MessagesState) -> dict[str, Any]:
        return {"messages": [chat.invoke(state["messages"])]}

    for node in (answer, answer_now):
        graph = StateGraph(MessagesState)
        graph.add_node("answer", node)
        graph.add_edge(START, "answer")
        graph.add_edge("answer", END)
        app = graph.compile(checkpointer=InMemorySaver())
        config: Any = {"configurable": {"thread_id": "t"}}
        for turn in range(2):
            out = await app.ainvoke({"messages": [HumanMessage(f"What is {turn} + 1?")]}, config)
            assert out["messages"][-1].content == "The answer is 42."


def test_what_a_program_or_a_vote_said_is_shown(tmp_path: Path) -> None:
    model = ScriptedModel("```python\ndef solution():\n    return 6 * 7\n```", name="m")
    with Viaticum("0.1", models={"m": model}, router=FakeRouter("m+pot"), folder=tmp_path) as client:
        message = ChatViaticum(client=client).invoke("What is 6 * 7?")
    assert str(message.content).endswith("\n\nAnswer: 42")


# What is refused


def test_a_pair_takes_no_tools_and_auto_needs_a_model_that_does(chat: ChatViaticum) -> None:
    tools = [{"name": "f", "description": "f", "parameters": {}}]
    pair, auto = (chat.model_copy(update={"model_name": name}) for name in ("scripted+direct", "auto"))
    with pytest.raises(InputError, match=r"scripted.direct routes to strategies, which take no tools"):
        pair.bind_tools(tools)
    with pytest.raises(InputError, match="take no response_format"):
        pair.invoke("hi", response_format={"type": "json_object"})
    with pytest.raises(InputError, match="no model here can call tools; add one"):
        auto.bind_tools(tools).invoke("hi")
    with pytest.raises(InputError, match="no model here can answer in another form"):
        auto.invoke("hi", response_format={"type": "json_object"})


def test_local_models_take_no_tools(tmp_path: Path) -> None:
    with ChatViaticum(model="smollm2-135m", folder=tmp_path) as chat:
        with pytest.raises(InputError, match="smollm2-135m runs locally and takes no tools"):
            chat.bind_tools([{"name": "f", "description": "f", "parameters": {}}])
        with pytest.raises(InputError, match="takes no response_format"):
            chat.invoke("hi", response_format={"type": "json_object"})
        with pytest.raises(InputError, match="reads no tool calls"):
            chat.invoke([HumanMessage("hi"), ToolMessage("1", tool_call_id="c")])
        with pytest.raises(InputError, match="is an encoder"):
            chat.invoke("hi", model="all-minilm-l6-v2")
        with pytest.raises(UnknownName, match="smollm2-135m"):
            chat.invoke("hi", model="smollm2-136m")


def test_images_are_refused_before_anything_is_held(chat: ChatViaticum) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with pytest.raises(InputError, match="reads no images"):
        chat.invoke([HumanMessage([{"type": "text", "text": "what is it?"}, image])])  # type: ignore[list-item]
    assert [entry.kind for entry in chat._client().ledger.entries()] == ["limit"]


def test_no_user_turn_no_question(client: Viaticum) -> None:
    with pytest.raises(InputError, match="no user turn"):
        ChatViaticum(client=client).invoke([SystemMessage("be brief")])


def test_a_setting_that_does_not_exist_is_told() -> None:
    with pytest.raises(ValidationError, match="max_token"):
        ChatViaticum(max_token=3)  # type: ignore[call-arg]


def test_messages_keep_names_and_broken_tool_calls() -> None:
    broken = {"name": "f", "args": "{", "id": "c", "error": None, "type": "invalid_tool_call"}
    assert from_langchain([HumanMessage("hi", name="ann"), AIMessage("", invalid_tool_calls=[broken])]) == [
        {"role": "user", "content": "hi", "name": "ann"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{"}}],
        },
    ]


def test_an_open_client_over_postgres_is_shared(postgres: str, scripted: ScriptedModel) -> None:
    """Ledger and checkpoints are in Postgres; chats, routed answers and batches pay from one budget."""
    router = FakeRouter("scripted+direct")
    with Viaticum("0.1", store=postgres, models={"scripted": scripted}, router=router) as viaticum:
        plain, routed = (ChatViaticum(model=name, client=viaticum) for name in ("scripted", "auto"))
        assert plain.invoke("one\0two").content == "four five six"
        assert routed.invoke("what is it?").content == "four five six"
        assert [each.content for each in routed.batch(["one?", "two?", "three?"])] == ["four five six"] * 3
        assert asyncio.run(routed.ainvoke("four?")).content == "four five six"
        posts = [entry for entry in viaticum.ledger.entries() if entry.kind == "post"]
        assert (len(posts), viaticum.budget().held_nanousd) == (6, 0)
        assert viaticum.budget().posted_nanousd == sum(entry.nanousd for entry in posts)
        assert plain.left() == routed.left() == viaticum.budget()
        assert viaticum.ledger.check() == []
        plain.close()  # which closes nothing that it did not open
        assert routed.invoke("five?").content == "four five six"
        for _ in range(2):  # Postgres takes no NUL in JSON
            assert viaticum.solve("with a \0?", thread_id="t").text == "four five six"


# Remote


@pytest.fixture(scope="module")
def server() -> Iterator[OpenAIServer]:
    with running_server() as server:
        yield server


class Joke(BaseModel):
    """A joke."""

    setup: str
    punchline: str


def test_a_remote_model_through_the_door(server: OpenAIServer, tmp_path: Path) -> None:
    server.reset()
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
    with ChatViaticum(
        model="far", catalogue=Catalogue([spec]), folder=tmp_path, api_key=KEY, max_retries=0
    ) as chat:  # type: ignore[arg-type]
        message = chat.invoke("hello", logprobs=True)
        assert message.content == "you said: hello"
        assert len(message.response_metadata["logprobs"]["content"]) == 3
        for method in ("function_calling", "json_schema", "json_mode"):
            joke = chat.with_structured_output(Joke, method=method).invoke("a joke")  # type: ignore[arg-type]
            assert isinstance(joke, Joke)
        raw = chat.with_structured_output(Joke, include_raw=True).invoke("a joke")
        assert isinstance(raw["raw"], AIMessage)
        assert isinstance(raw["parsed"], Joke)
        halved = {"name": "cut", "description": "half of \ud83d", "parameters": {"type": "object"}}
        chat.bind_tools([halved]).invoke("hello")
        assert server.requests[-1]["tools"][0]["function"]["description"] == "half of \ufffd"
        server.script = ["silent"]
        with pytest.raises(ModelError, match=r"said nothing for 1\.5 s"):
            chat.model_copy(update={"timeout": 1.5}).invoke("hello")
        assert len(server.requests) == 7
        assert chat._client().ledger.check() == []
    with (
        ChatViaticum(model="far", catalogue=Catalogue([spec]), folder=tmp_path, api_key="sk-no") as chat,  # type: ignore[arg-type]
        pytest.raises(ModelError, match="does not take the key"),
    ):
        chat.invoke("hello")


def test_marks_for_the_cache_are_sent_to_remote_models_and_refused_by_others(
    server: OpenAIServer, tmp_path: Path, client: Viaticum
) -> None:
    mark = {"type": "ephemeral"}
    parts: list[str | dict[Any, Any]] = [{"type": "text", "text": "Rules.", "cache_control": mark}, "More."]
    chat = [SystemMessage(parts), HumanMessage("hi")]
    catalogue = Catalogue([spec_for(server, cache_write_price="1.25")])
    with ChatViaticum(model="far", budget="0.1", catalogue=catalogue, folder=tmp_path) as far:
        far.invoke(chat)
        assert server.requests[-1]["messages"][0]["content"] == [
            {"type": "text", "text": "Rules.", "cache_control": mark},
            {"type": "text", "text": "More."},
        ]
    for name in ("auto", client.catalogue.models()[0].name):
        with pytest.raises(InputError, match="leave cache_control out"):
            ChatViaticum(client=client, model=name).invoke(chat)
    unpriced = Catalogue([spec_for(server)])
    with (
        ChatViaticum(model="far", budget="0.1", catalogue=unpriced, folder=tmp_path / "2") as far,
        pytest.raises(InputError, match="no cache_write_price"),
    ):
        far.invoke(chat)
