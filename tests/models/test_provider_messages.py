"""What Anthropic and Ollama say when they fail, through a real LiteLLM: its words, and the right kind."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai_server import KEY, served
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from viaticum.catalogue import ModelSpec
from viaticum.errors import ProviderUnavailable, QuotaExhausted, ViaticumError
from viaticum.models.base import Generation
from viaticum.models.remote.model import RemoteModel


def fail(model: str, answer: Response, kind: type[ViaticumError], monkeypatch: pytest.MonkeyPatch) -> str:
    """The error of a call that is answered so."""

    async def respond(request: Request) -> Response:
        return answer

    monkeypatch.setenv("FAR_KEY", KEY)
    with served(Starlette(routes=[Route("/{path:path}", respond, methods=["POST"])])) as port:
        fields: dict[str, Any] = {
            "name": "far",
            "description": "Far away.",
            "kind": "remote",
            "context_length": 10_000,
            "input_price": "1",
            "output_price": "2",
            "litellm_model": model,
            "api_base": f"http://127.0.0.1:{port}",
            "api_key_env": "FAR_KEY",
            "max_retries": 0,
        }
        far = RemoteModel(ModelSpec.model_validate(fields), sleep=lambda seconds: None)
        with pytest.raises(kind) as caught:
            list(far.stream([{"role": "user", "content": "hello"}], Generation(20)))
    assert type(caught.value) is kind
    return str(caught.value)


@pytest.mark.parametrize(
    ("status", "message", "kind"),
    [
        (529, "Overloaded", ProviderUnavailable),
        (400, 'Your credit balance is too low. It\'s "empty".', QuotaExhausted),
    ],
)
def test_the_body_of_a_response_is_read(
    monkeypatch: pytest.MonkeyPatch, status: int, message: str, kind: type[ViaticumError]
) -> None:
    body = {"type": "error", "error": {"type": "some_error", "message": message}}
    found = fail("anthropic/claude-far", JSONResponse(body, status_code=status), kind, monkeypatch)
    assert found.endswith(f": {message}")
    assert "b'" not in found
    assert "{" not in found


def test_what_fails_within_an_answer_is_not_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    piece = {"model": "x", "created_at": "2026-01-01T00:00:00Z", "done": False}
    piece["message"] = {"role": "assistant", "content": "The answer"}
    lines = json.dumps(piece) + "\n" + json.dumps({"error": "llama runner process has terminated"}) + "\n"
    found = fail("ollama_chat/far", Response(lines), ProviderUnavailable, monkeypatch)
    assert "llama runner process has terminated" in found
