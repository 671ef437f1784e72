"""Parallel tool calls in the shapes that servers stream them in, through a real LiteLLM."""

from __future__ import annotations

from typing import Any

import pytest
from openai_server import OpenAIServer, spec_for

from viaticum.models.base import Generation
from viaticum.models.remote.model import RemoteModel
from viaticum.models.remote.tool_calls import ToolCalls
from viaticum.types import Completion, Message

CHAT: list[Message] = [{"role": "user", "content": "the time in Oslo and Rome"}]
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
    for name in ("time", "now")
]
OSLO, ROME = '{"place": "Oslo"}', '{"place": "Rome"}'
PROVIDERS = pytest.mark.parametrize("litellm_model", ["openai/fake", "hosted_vllm/fake"])


def delta(
    name: str | None = None, arguments: str | None = None, id: str | None = None, index: int | None = 0
) -> dict[str, Any]:
    """A piece of a call as a server sends it; what is None is left out."""
    function = {"name": name, "arguments": arguments}
    call: dict[str, Any] = {"function": {key: each for key, each in function.items() if each is not None}}
    given = {"id": id, "index": index, "type": "function" if name else None}
    return {key: each for key, each in given.items() if each is not None} | call


def ask(server: OpenAIServer, litellm_model: str = "openai/fake", **fields: Any) -> Completion:
    model = RemoteModel(spec_for(server, litellm_model=litellm_model, **fields))
    return model.generate(CHAT, Generation(50, extra={"tools": TOOLS, "tool_choice": "none"}))


def named(completion: Completion) -> list[tuple[str, str]]:
    return [(call["function"]["name"], call["function"]["arguments"]) for call in completion.tool_calls]


TWO = [("time", OSLO), ("time", ROME)]
SHAPES: dict[str, tuple[list[list[dict[str, Any]]], list[tuple[str, str]]]] = {
    "index 0, whole calls": ([[delta("time", OSLO, "a")], [delta("time", ROME, "b")]], TWO),
    "index 0, in pieces": (
        [
            [delta("time", "", "a")],
            [delta(None, OSLO[:7])],
            [delta(None, OSLO[7:])],
            [delta("time", "", "b")],
            [delta(None, ROME[:3])],
            [delta(None, ROME[3:])],
        ],
        TWO,
    ),
    "no index, one delta": ([[delta("time", OSLO, "a", None), delta("time", ROME, "b", None)]], TWO),
    "no index, two deltas": ([[delta("time", OSLO, "a", None)], [delta("time", ROME, "b", None)]], TWO),
    "no ids, index 0": ([[delta("time", OSLO)], [delta("time", ROME)]], TWO),
    "empty ids, no index": (
        [[delta("time", OSLO, "", None)], [delta("now", "", "", None)]],
        [("time", OSLO), ("now", "{}")],
    ),
    "the name in each delta": (
        [
            [delta("time", "", "a", 0)],
            [delta("time", OSLO[:5], "a", 0)],
            [delta("time", OSLO[5:], "a", 0)],
            [delta("time", ROME[:5], "b", 1)],
            [delta("time", ROME[5:], "b", 1)],
        ],
        TWO,
    ),
    "the name in each delta, no ids": (
        [[delta("time", OSLO[:5])], [delta("time", OSLO[5:])], [delta("time", ROME)]],
        TWO,
    ),
    "a new id in each delta": (
        [
            [delta("time", "", "a", 0)],
            [delta(None, OSLO[:5], "b", 0)],
            [delta(None, OSLO[5:], "c", 0)],
            [delta("time", ROME, "d", 1)],
        ],
        TWO,
    ),
    "mixed up": (
        [
            [delta("time", "", "a", 0)],
            [delta("time", "", "b", 0)],
            [delta(None, OSLO, "a", 0)],
            [delta(None, ROME, "b", 0)],
        ],
        TWO,
    ),
    "without arguments": (
        [[delta("now", None, "a", 0)], [delta("now", "", "b", 1)]],
        [("now", "{}"), ("now", "{}")],
    ),
    "one name for both": ([[delta("time", OSLO)], [delta(None, ROME)]], TWO),
    "broken arguments": ([[delta("time", '{"place": ', "a")]], [("time", '{"place": ')]),
    "null arguments": ([[delta("now", "null", "a")]], [("now", "{}")]),
    "without arguments, index 0": (
        [[delta("now", "", "a")], [delta("now", "", "b")]],
        [("now", "{}"), ("now", "{}")],
    ),
}


@PROVIDERS
@pytest.mark.parametrize("shape", SHAPES)
def test_parallel_calls_stay_apart_in_whatever_shape_they_come(
    server: OpenAIServer, shape: str, litellm_model: str
) -> None:
    deltas, expected = SHAPES[shape]
    server.deltas = [{"tool_calls": calls} for calls in deltas]
    server.finish = "tool_calls"
    completion = ask(server, litellm_model)
    assert named(completion) == expected
    ids = [call["id"] for call in completion.tool_calls]
    assert all(ids)
    assert len(set(ids)) == len(ids)


@PROVIDERS
@pytest.mark.parametrize("finish", ["stop", "tool_calls", "function_call"])
def test_a_message_with_calls_ends_with_tool_calls_whatever_the_server_says(
    server: OpenAIServer, finish: str, litellm_model: str
) -> None:
    server.deltas, server.finish = [{"tool_calls": [delta("time", OSLO, "a")]}], finish
    assert ask(server, litellm_model).finish_reason == "tool_calls"
    server.finish = "length"
    assert ask(server, litellm_model).finish_reason == "length"


@PROVIDERS
def test_the_old_function_call_is_a_tool_call(server: OpenAIServer, litellm_model: str) -> None:
    pieces = ({"name": "time", "arguments": ""}, {"arguments": OSLO[:4]}, {"arguments": OSLO[4:]})
    server.deltas, server.finish = [{"function_call": piece} for piece in pieces], "function_call"
    completion = ask(server, litellm_model)
    assert named(completion) == [("time", OSLO)]
    assert (completion.finish_reason, completion.text) == ("tool_calls", "")
    assert completion.tool_calls[0]["id"].startswith("call_")


def test_calls_of_a_whole_response_are_calls_of_their_own() -> None:
    calls = ToolCalls()
    for position in range(2):
        calls.add(position, {"function": {"name": "now", "arguments": {}}}, whole=True)
    calls.finish()
    assert [call["function"] for call in calls.to_json()] == [{"name": "now", "arguments": "{}"}] * 2
    assert len({call["id"] for call in calls.to_json()}) == 2
