"""A server as the remote provider of a client: LiteLLM calls over real connections, both ledgers checked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from openai_server import KEY, running_server
from viaticum_server import RunningServer, serving

from viaticum import FakeRouter, Viaticum
from viaticum.agents.workflow.events import TextPiece
from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.errors import ModelError

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def remote(name: str, url: str, **fields: object) -> ModelSpec:
    return ModelSpec.model_validate(
        {
            "name": "far",
            "description": "Lives elsewhere.",
            "kind": "remote",
            "litellm_model": f"openai/{name}",
            "api_base": url,
            "context_length": 8192,
            "input_price": 1,
            "output_price": 1,
            "max_retries": 0,
            **fields,
        }
    )


@pytest.fixture
def provider(tmp_path: Path) -> Iterator[RunningServer]:
    (tmp_path / "provider").mkdir()
    with serving(tmp_path / "provider") as server:
        yield server


def asking(folder: Path, spec: ModelSpec, budget: str = "1") -> Viaticum:
    return Viaticum(budget, catalogue=Catalogue([spec]), router=FakeRouter("far+cot"), folder=folder)


@pytest.mark.parametrize("name", ["fast", "auto"])
def test_both_sides_post_the_same_call(tmp_path: Path, provider: RunningServer, name: str) -> None:
    """`far+cot` here becomes a chat of `fast` there, or goes through a second workflow: `auto`."""
    with asking(tmp_path, remote(name, f"{provider.url}/v1")) as client:
        events = list(client.stream("What is 6 times 7?", kind="number"))
        answer = events[-1]
        assert answer.value == "42"  # type: ignore[union-attr]
        assert "".join(each.text for each in events if isinstance(each, TextPiece)) == answer.text  # type: ignore[union-attr]
        assert client.ledger.check() == []
        provider.assert_settled()
        spent, provider_spent = client.budget().posted_nanousd, provider.spent_and_held()[0]
        assert spent == provider_spent > 0, "prices are the same on both sides"


def test_the_provider_s_budget_is_no_budget_of_ours(tmp_path: Path) -> None:
    with (
        serving(tmp_path, budget="0.000001") as provider,
        asking(tmp_path / "here", remote("fast", f"{provider.url}/v1")) as client,
    ):
        with pytest.raises(ModelError):
            client.solve("What is 6 times 7?")
        budget = client.budget()
        assert (budget.posted_nanousd, budget.held_nanousd) == (0, 0)
        assert client.ledger.check() == []


def test_tools_and_logprobs_pass_through_the_server(tmp_path: Path) -> None:
    with running_server() as far, serving(tmp_path, catalogue=Catalogue([remote("m", far.url)])) as server:
        choice = server.ask("far", tools=[TOOL], tool_choice="required").json()["choices"][0]
        (call,) = choice["message"]["tool_calls"]
        assert (choice["finish_reason"], call["function"]["name"]) == ("tool_calls", "weather")
        choice = server.ask("far", logprobs=True, top_logprobs=2).json()["choices"][0]
        assert choice["logprobs"]["content"][0]["logprob"] <= 0
        assert far.requests[-1]["top_logprobs"] == 2
        refused = server.ask("far+cot", logprobs=True)
        assert (refused.status_code, "logprobs" in refused.json()["error"]["message"]) == (400, True)
        server.assert_settled()


def test_a_provider_that_fails_is_a_bad_gateway(tmp_path: Path) -> None:
    with running_server() as far, serving(tmp_path, catalogue=Catalogue([remote("m", far.url)])) as server:
        far.script = [(500, {}, "it broke")]
        response = server.ask("far")
        assert (response.status_code, response.json()["error"]["code"]) == (502, "model_failed")
        assert KEY not in response.text
        server.assert_settled()
        assert server.spent_and_held() == (0, 0)
