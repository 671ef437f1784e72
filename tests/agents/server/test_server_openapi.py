"""The OpenAPI document is true: what schemathesis makes of it gets answers that the document names, and no mistake of ours."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, seed, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from viaticum_server import RunningServer, serving

from viaticum.agents.openai_api.openapi import openapi_document

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
schema = schemathesis.openapi.from_dict(openapi_document())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with serving(tmp_path_factory.mktemp("home"), budget="1000") as server:
        yield server


def tame(body: dict[str, object]) -> None:
    """Of what is made up at random nearly all would be refused by one field or another: three in four get names that are
    there, and lose what is refused together with others."""
    dice = len(str(body)) % 4
    if dice and "model" in body:
        body["model"] = ("fast", "auto", "fast+cot")[dice - 1]
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
        if dice and isinstance(message, dict) and message.get("content") is None:
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
def test_what_is_made_from_the_document_is_answered_as_it_says(
    server: RunningServer, case: schemathesis.Case
) -> None:
    if case.path.endswith("completions") and isinstance(case.body, dict):
        tame(case.body)
    case.call_and_validate(base_url=server.url, checks=CHECKS)


def test_settled_after_all_of_it(server: RunningServer) -> None:
    server.assert_settled()


def test_the_document_is_what_the_server_gives_and_is_well_formed(server: RunningServer) -> None:
    told = server.http.get("/openapi.json").json()
    assert told == json.loads(json.dumps(openapi_document()))
    assert told["openapi"] == "3.1.0"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, each in told["components"]["schemas"].items():
            jsonschema.Draft202012Validator.check_schema(each), name
    refs = {part.split('"')[0] for part in json.dumps(told).split("#/components/schemas/")[1:]}
    assert refs <= set(told["components"]["schemas"])
