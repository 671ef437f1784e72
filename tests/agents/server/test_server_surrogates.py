"""Halves of characters (lone surrogates), which JSON can write and UTF-8 cannot: valid where they enter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage
from openai_server import OpenAIServer, running_server, spec_for
from viaticum_server import RunningServer, serving

from viaticum.agents.integrations.chat_model import ChatViaticum
from viaticum.agents.integrations.langchain_messages import query_from_langchain
from viaticum.catalogue import Catalogue

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
PROGRAM = "```python\nimport os\nprint(['\\ud83d', 42])\n```"  # os: under bubblewrap


@pytest.fixture(scope="module")
def far() -> Iterator[OpenAIServer]:
    with running_server() as far:
        yield far


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, far: OpenAIServer) -> Iterator[RunningServer]:
    with serving(tmp_path_factory.mktemp("home"), catalogue=Catalogue([spec_for(far)])) as server:
        yield server


@pytest.fixture(autouse=True)
def _settled(server: RunningServer, far: OpenAIServer) -> Iterator[None]:
    far.reset()
    yield
    server.assert_settled()


def content(server: RunningServer, name: str, **body: Any) -> str:
    """The text of a whole answer, which is that of its stream too."""
    response = server.ask(name, **body)
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["message"]["content"]
    lines = server.ask(name, stream=True, **body).text.split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert not any("error" in event for event in events), events[-1]
    streamed = "".join(
        event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"]
    )
    assert streamed == text
    text.encode()
    return text


@pytest.mark.parametrize("name", ["far", "far+cot"])
def test_half_a_character_of_a_model_is_replaced(server: RunningServer, far: OpenAIServer, name: str) -> None:
    far.text = "half \ud83d of it. The answer is 42."
    assert content(server, name) == "half ? of it. The answer is 42.".replace("?", "\ufffd")


@pytest.mark.parametrize("name", ["far", "far+cot"])
def test_a_character_whose_halves_come_apart_is_whole(
    server: RunningServer, far: OpenAIServer, name: str
) -> None:
    far.text, far.piece = "so \ud83d\ude00 it is. The answer is 42.", 1
    assert content(server, name) == "so \U0001f600 it is. The answer is 42."
    far.text = "The answer is 42\ud83d"
    assert content(server, name) == "The answer is 42\ufffd"


def test_thoughts_and_tool_calls_are_valid_too(server: RunningServer, far: OpenAIServer) -> None:
    far.thought, far.text = "hm \ud83d\ude00 \ud800", "42"
    message = server.ask("far").json()["choices"][0]["message"]
    assert message["reasoning_content"] == "hm \U0001f600 \ufffd"
    far.reset()
    far.deltas = [
        {
            "tool_calls": [
                {"index": 0, "id": "c", "function": {"name": "weather", "arguments": '{"city": "\ud83d'}}
            ]
        },
        {"tool_calls": [{"index": 0, "function": {"arguments": '\ude00 \ud800"}'}}]},
    ]
    far.finish = "tool_calls"
    response = server.ask("far", tools=[TOOL], stream=True)
    assert '"error"' not in response.text
    response = server.ask("far", tools=[TOOL], logprobs=True)
    assert response.status_code == 200


def test_half_a_character_of_a_program_is_replaced(server: RunningServer, far: OpenAIServer) -> None:
    far.text = PROGRAM
    assert content(server, "far+pot").endswith("42]")


def test_a_text_that_the_provider_does_not_count_is_counted(server: RunningServer, far: OpenAIServer) -> None:
    far.text, far.script = "half \ud83d", ["no usage"]
    assert server.ask("far").json()["choices"][0]["message"]["content"] == "half \ufffd"
    spent = server.spent_and_held()[0]
    far.text, far.script = "half \ud83d of it, and more", ["break"]
    assert server.ask("far").status_code == 502
    server.assert_settled()
    assert server.spent_and_held()[0] > spent, "what was written is charged"


def test_half_a_character_of_a_langchain_history_is_replaced(
    server: RunningServer, far: OpenAIServer
) -> None:
    history = [HumanMessage("\ud83d hi"), AIMessage("\ud800"), HumanMessage("What? \ud83d\ude00")]
    ChatViaticum(client=server.client, model="far").invoke(history)
    sent = [message["content"] for message in far.requests[-1]["messages"]]
    assert sent == ["\ufffd hi", "\ufffd", "What? \U0001f600"]
    question = query_from_langchain(history)
    assert (question.text, question.messages[0]["content"]) == ("What? \U0001f600", "\ufffd hi")
