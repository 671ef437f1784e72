"""Large bodies that are wrong: refused after the first mistakes, beside the event loop."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from viaticum_server import RunningServer, serving, wait_until

from viaticum.agents.openai_api import chat
from viaticum.agents.openai_api.errors import APIError
from viaticum.agents.openai_api.parsing import MAX_FIELDS
from viaticum.agents.openai_api.requests import ChatRequest, parse_request

MANY = b"1," * 50_000 + b"1"
FIELDS = b",".join(b'"x%d": 1' % number for number in range(20_000))
MESSAGE = b'{"role": "user", "content": "hi"}'


def body(fields: bytes = b"", messages: bytes = MESSAGE) -> bytes:
    return b'{"model": "fast", "messages": [' + messages + b"]" + fields + b"}"


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (body(messages=MANY), "messages.0"),
        (body(messages=b'{"role": "user", "content": [' + MANY + b"]}"), "messages.0.content"),
        (body(messages=b'{"role": "assistant", "tool_calls": [' + MANY + b"]}"), "messages.0.tool_calls.0"),
        (body(b', "stop": [' + MANY + b"]"), "stop"),
        (body(b', "tools": [' + MANY + b"]"), "tools.0"),
        (body(messages=b'{"role": "user", "content": [1, 1, 1]},' * 4000 + MESSAGE), "messages.0.content"),
    ],
)
def test_a_list_is_validated_up_to_its_first_wrong_element(wrong: bytes, field: str) -> None:
    with pytest.raises(ValidationError) as found:
        ChatRequest.model_validate_json(wrong)
    assert found.value.error_count() < 10
    with pytest.raises(APIError) as refused:
        parse_request(wrong)
    assert str(refused.value).startswith(field)


@pytest.mark.parametrize(
    "fields",
    [
        b"," + FIELDS,
        b', "logit_bias": {' + FIELDS + b"}",
        b', "metadata": {' + FIELDS + b"}",
        b', "tools": [{"type": "function", "function": {' + FIELDS + b"}}]",
    ],
)
def test_an_object_of_many_fields_is_refused_before_they_are_looked_at(fields: bytes) -> None:
    with pytest.raises(APIError, match=f"20.* fields; give at most {MAX_FIELDS}"):
        parse_request(body(fields))


@pytest.mark.parametrize(
    "fields",
    [
        b', "' + b"ab" * 50_000 + b'": 1',
        b', "logit_bias": {"' + b"9" * 100_000 + b'": 1}',
        b', "budget": "' + b"9" * 100_000 + b'"',
    ],
)
def test_an_error_does_not_repeat_the_whole_body(server: RunningServer, fields: bytes) -> None:
    headers = {"content-type": "application/json"}
    response = server.http.post("/v1/chat/completions", content=body(fields), headers=headers)
    assert response.status_code == 400
    assert len(response.content) < 5_000


def test_many_colons_are_no_many_fields() -> None:
    text = b": " * 100_000
    assert parse_request(body(messages=b'{"role": "user", "content": "' + text + b'"}')).messages
    with pytest.raises(APIError, match="Invalid JSON"):
        parse_request(body(messages=b'{"role": "user", "content": "' + text + b'"'))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    with serving(tmp_path) as server:
        yield server
        server.assert_settled()


def test_other_clients_are_served_while_a_body_is_validated(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsing, may_end = threading.Event(), threading.Event()

    def slow(content: bytes) -> Any:
        parsing.set()
        assert may_end.wait(120)
        return parse_request(content)

    monkeypatch.setattr(chat, "parse_request", slow)
    with ThreadPoolExecutor(1) as clients:
        asked = clients.submit(server.ask)
        wait_until(parsing.is_set)
        assert server.http.get("/health", timeout=60).status_code == 200
        may_end.set()
        assert asked.result().status_code == 200
