"""What a provider is sent for settings that were given: to a call, a strategy, an entry, the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai_server import OpenAIServer, running_server, spec_for
from typer.testing import CliRunner
from viaticum_server import serving

from viaticum import FakeRouter, Viaticum
from viaticum.agents.batch.run import run_batch
from viaticum.catalogue import Catalogue
from viaticum.cli import app
from viaticum.generation import GenerationSettings
from viaticum.models.base import Generation
from viaticum.models.remote.model import RemoteModel

QUESTION = "What is 2 + 2?"
SETTINGS: dict[str, Any] = {
    "max_new_tokens": 77,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.05,
    "system": "Be brief.",
    "chat_template_kwargs": {"enable_thinking": False},
    "extra_body": {"top_a": 0.1},
}
KEYWORDS = {"max_tokens" if name == "max_new_tokens" else name: value for name, value in SETTINGS.items()}


def assert_sent(body: dict[str, Any]) -> None:
    assert body["max_tokens"] == 77
    assert (body["temperature"], body["top_p"], body["top_k"]) == (0.5, 0.9, 40)
    assert (body["min_p"], body["top_a"]) == (0.05, 0.1)  # fields of their own, as vLLM takes them
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert body["messages"][0]["role"] == "system"
    assert body["messages"][0]["content"].startswith("Be brief.")


@pytest.mark.parametrize("way", ["entry", "call", "command", "batch", "server"])
def test_settings_reach_the_provider(server: OpenAIServer, tmp_path: Path, way: str) -> None:
    server.text = "The answer is 4."
    settings = GenerationSettings(**SETTINGS)
    entry = {"generation": settings} if way in ("entry", "batch", "server") else {}
    spec = spec_for(server, litellm_model="hosted_vllm/fake", **entry)
    catalogue, router = Catalogue([spec]), FakeRouter("far+cot")
    if way == "command":
        file = tmp_path / "catalogue.toml"
        file.write_text(
            '[models.far]\nkind = "remote"\ndescription = "d"\ncontext_length = 8192\ninput_price = 1\n'
            f'output_price = 1\nlitellm_model = "hosted_vllm/fake"\napi_base = "{server.url}"\n'
        )
        options = [
            *("--max-tokens", "77", "--temperature", "0.5", "--top-p", "0.9", "--top-k", "40"),
            *("--min-p", "0.05", "--system", "Be brief.", "--extra-body", '{"top_a": 0.1}'),
            *("--chat-template-kwargs", '{"enable_thinking": false}'),
        ]
        names = ["--model", "far", "--strategy", "cot", "--catalogue", str(file), "--budget", "1"]
        ran = CliRunner().invoke(app, ["solve", QUESTION, *names, *options])
        assert ran.exit_code == 0, ran.output
    elif way == "batch":
        rows = tmp_path / "rows.jsonl"
        rows.write_text(json.dumps({"id": "a", "question": QUESTION}) + "\n")
        run_batch(rows, tmp_path / "out.jsonl", budget="1", catalogue=catalogue, router=router)
    elif way == "server":
        with serving(tmp_path, catalogue=catalogue) as running:
            assert running.ask("far+cot").status_code == 200
    else:
        with Viaticum("1", catalogue=catalogue, router=router, folder=tmp_path) as client:
            client.solve(QUESTION, **(KEYWORDS if way == "call" else {}))
    assert_sent(server.requests[-1])


def test_a_call_wins_over_the_entry_and_mappings_are_joined(server: OpenAIServer, tmp_path: Path) -> None:
    spec = spec_for(server, litellm_model="hosted_vllm/fake", generation=GenerationSettings(**SETTINGS))
    client = Viaticum("1", catalogue=Catalogue([spec]), router=FakeRouter("far+cot"), folder=tmp_path)
    with client:
        client.solve(QUESTION, temperature=0.0, extra_body={"top_b": 2})
    body = server.requests[-1]
    assert (body["temperature"], body["top_k"], body["top_a"], body["top_b"]) == (0.0, 40, 0.1, 2)


def test_a_thinking_budget_reaches_an_api_of_another_form(server: OpenAIServer) -> None:
    """Anthropic's: a thinking table below max_tokens, and no sampling settings beside it."""
    entry = spec_for(server).model_dump() | {
        "litellm_model": "anthropic/claude-sonnet-4-5",
        "api_base": server.url.removesuffix("/v1"),
        "max_retries": 0,
    }
    model = RemoteModel(type(spec_for(server)).model_validate(entry), key="k")
    request = model.request(
        [{"role": "user", "content": QUESTION}], Generation(4000, temperature=0.5, thinking_budget=2048)
    )
    with pytest.raises(Exception, match="far"):
        model.generate(
            [{"role": "user", "content": QUESTION}], Generation(4000, temperature=0.5, thinking_budget=2048)
        )
    body = server.foreign[-1]
    assert (body["max_tokens"], body["thinking"]) == (4000, request["thinking"])
    assert request["thinking"] == {"type": "enabled", "budget_tokens": 2048}
    assert "temperature" not in body


@pytest.mark.parametrize("text", ["one\n\ntwo", "one"])
def test_stops_go_to_the_provider_or_are_cut_here(text: str) -> None:
    with running_server() as server:
        server.text = text
        plain = RemoteModel(spec_for(server))
        assert plain.generate([], Generation(50, stop=("\n\n",))).text == "one"
        assert server.requests[-1]["stop"] == ["\n\n"]
        thinks = RemoteModel(spec_for(server, thinking=True))
        server.thought = "a\n\nb"
        assert thinks.generate([], Generation(50, stop=("\n\n",))).text == "one"
        assert "stop" not in server.requests[-1], "the provider would stop inside the thought"
