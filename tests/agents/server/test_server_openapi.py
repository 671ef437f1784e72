"""The OpenAPI document is true: generated and valid requests get responses that it describes, and no 500."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, seed, settings
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from viaticum_server import RunningServer, chat_body, serving, wait_until

from viaticum.agents.anthropic_api import responses as messages
from viaticum.agents.openai_api import responses
from viaticum.agents.responses_api import responses as responses_api
from viaticum.agents.server import app
from viaticum.agents.server.openapi import openapi_document
from viaticum.errors import ModelError

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
COMPLETIONS = ("POST", "/v1/chat/completions")
schema = schemathesis.openapi.from_dict(openapi_document())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with serving(tmp_path_factory.mktemp("home"), budget="1000") as server:
        yield server


@pytest.fixture(autouse=True)
def _settled(server: RunningServer) -> Iterator[None]:
    yield
    server.assert_settled()


def make_valid(body: dict[str, object]) -> None:
    """Change three in four generated bodies so that they are valid: existing names, no conflicting fields."""
    number = len(str(body)) % 4
    if number and "model" in body:
        body["model"] = ("fast", "auto", "fast+cot")[number - 1]
        for name in (
            "logprobs",
            "top_logprobs",
            "stream_options",
            "policy",
            "tools",
            "tool_choice",
            "max_tokens",
        ):
            body.pop(name, None)
        if isinstance(body.get("budget"), str):
            body["budget"] = "0.0000001"
    for message in body["messages"] if isinstance(body.get("messages"), list) else []:
        if number and isinstance(message, dict) and message.get("content") is None:
            message["content"] = "What is 6 times 7?"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@schema.parametrize()
@seed(20_261_121)
@settings(
    max_examples=25,
    deadline=None,
    derandomize=False,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_generated_requests_get_responses_of_the_document(
    server: RunningServer, case: schemathesis.Case
) -> None:
    if case.path.endswith("completions") and isinstance(case.body, dict):
        make_valid(case.body)
    case.call_and_validate(base_url=server.url, checks=CHECKS)


# Requests that succeed: generated names of models do not exist, and few generated bodies are valid.
VALID = {
    "models": ("GET", "/v1/models", {}),
    "model": ("GET", "/v1/models/{name}", {"path_parameters": {"name": "fast+cot"}}),
    "health": ("GET", "/health", {}),
    "metrics": ("GET", "/metrics", {}),
    "files": ("GET", "/v1/files", {}),
    "batches": ("GET", "/v1/batches", {}),
    "document": ("GET", "/openapi.json", {}),
    **{
        name: (*COMPLETIONS, {"body": chat_body(**body), "media_type": "application/json"})
        for name, body in {
            "chat": {},
            "strategy": {"model": "fast+cot"},
            "auto": {"model": "auto"},
            "no answer": {"model": "mute+pot"},
            "choices": {"n": 2},
            "length": {"max_tokens": 2},
            "budget": {"budget": 0.01},
            "stream": {"stream": True},
        }.items()
    },
    **{
        name: ("POST", path, {"body": body, "media_type": "application/json"})
        for name, path, body in (
            ("message", "/v1/messages", chat_body(max_tokens=9)),
            ("message stream", "/v1/messages", chat_body("auto", stream=True)),
            ("count", "/v1/messages/count_tokens", chat_body()),
            ("response", "/v1/responses", {"model": "fast+cot", "input": "What is 6 times 7?"}),
            ("response stream", "/v1/responses", {"model": "fast", "input": "Hi", "stream": True}),
        )
    },
}


def call(server: RunningServer, name: str) -> Any:
    method, path, request = VALID[name]
    return schema[path][method].Case(**request).call_and_validate(base_url=server.url, checks=CHECKS)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", VALID)
def test_valid_requests_get_responses_of_the_document(server: RunningServer, name: str) -> None:
    assert call(server, name).status_code == 200


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "module", "function", "wrong"),
    [
        ("models", responses, "model_object", {"id": "fast", "object": "modle", "created": 0}),
        ("model", app, "model_object", {"id": "fast", "object": "model", "created": "0"}),
        ("chat", responses, "completion_usage", {"prompt_tokens": -1}),
        ("choices", responses, "_message", {"role": "assistant", "content": 5, "refusal": None}),
        ("auto", responses, "_finish_reason", "ended"),
        ("document", app, "openapi_document", []),
        ("message", messages, "message_usage", {"input_tokens": -1}),
        ("message", messages, "stop_reason", "ended"),
        ("count", app, "count_prompt", -1),
        ("response", responses_api, "response_usage", {"input_tokens": 1}),
    ],
)
def test_a_response_that_the_document_does_not_describe_is_noticed(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, name: str, module: Any, function: str, wrong: Any
) -> None:
    monkeypatch.setattr(module, function, lambda *_: wrong)
    with pytest.raises(FailureGroup):
        call(server, name)


def validator(name: str) -> jsonschema.Draft202012Validator:
    document = openapi_document()
    root = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    return jsonschema.Draft202012Validator(root)


def events_of(text: str) -> list[Any]:
    lines = [line for line in text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_events_of_a_stream_are_chunks_of_the_document(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for body in ({}, {"model": "auto"}, {"n": 2}):
        events = events_of(server.ask(**body, stream=True, stream_options={"include_usage": True}).text)
        assert len(events) > 5
        for event in events:
            validator("ChatCompletionChunk").validate(event)
    model: Any = server.client.model("fast")
    monkeypatch.setattr(model, "stream", _breaks_off)
    *chunks, failure = events_of(server.ask(stream=True).text)
    assert chunks
    validator("ErrorResponse").validate(failure)
    with pytest.raises(jsonschema.ValidationError):
        validator("ChatCompletionChunk").validate(failure)


def _breaks_off(*_: Any) -> Iterator[str]:
    yield "Seven "
    yield "times "
    raise ModelError("it broke")


def test_files_and_batches_are_those_of_the_document(server: RunningServer) -> None:
    row = {"custom_id": "a", "method": "POST", "url": COMPLETIONS[1], "body": chat_body()}
    upload = {"file": ("in.jsonl", json.dumps(row).encode())}
    http = server.http
    file = http.post("/v1/files", data={"purpose": "batch"}, files=upload).json()
    body = {"input_file_id": file["id"], "endpoint": COMPLETIONS[1], "completion_window": "24h"}
    batch = http.post("/v1/batches", json=body | {"metadata": {"k": "v"}}).json()
    validator("BatchObject").validate(batch)
    address = f"/v1/batches/{batch['id']}"
    wait_until(lambda: http.get(address).json()["status"] == "completed")
    done = http.get(address).json()
    for name, found in (
        ("FileObject", file),
        ("FileObject", http.get(f"/v1/files/{done['output_file_id']}").json()),
        ("BatchObject", done),
        ("FileList", http.get("/v1/files?limit=1").json()),
        ("BatchList", http.get("/v1/batches?limit=1").json()),
        ("ErrorResponse", http.post(f"{address}/cancel").json()),
        ("DeletedFile", http.delete(f"/v1/files/{file['id']}").json()),
    ):
        validator(name).validate(found)


def test_the_document_names_every_route(server: RunningServer) -> None:
    routes = {
        (route.path.replace(":path}", "}"), method.lower())
        for route in app.build_app(server.service).routes
        for method in route.methods  # type: ignore[attr-defined]
        if method != "HEAD"
    }
    paths = openapi_document()["paths"]
    assert {(path, method) for path, operations in paths.items() for method in operations} == routes


def test_settled_after_all_of_it(server: RunningServer) -> None:
    spent, _ = server.spent_and_held()
    for name in VALID:
        method, path, request = VALID[name]
        response = server.http.request(method, path.format(name="fast"), json=request.get("body"))
        assert response.status_code == 200
    server.assert_settled()
    assert server.spent_and_held()[0] > spent


def test_the_document_is_what_the_server_gives_and_is_well_formed(server: RunningServer) -> None:
    document = server.http.get("/openapi.json").json()
    assert document == json.loads(json.dumps(openapi_document()))
    assert document["openapi"] == "3.1.0"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, each in document["components"]["schemas"].items():
            jsonschema.Draft202012Validator.check_schema(each), name
    refs = {part.split('"')[0] for part in json.dumps(document).split("#/components/schemas/")[1:]}
    assert refs <= set(document["components"]["schemas"])
