"""A server as the remote provider of a client: LiteLLM calls over real connections, both ledgers checked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import InternalServerError, OpenAI
from openai_server import KEY, running_server
from viaticum_server import RunningServer, serving

from viaticum import FakeRouter, Viaticum
from viaticum.agents.workflow.events import TextPiece
from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.errors import AuthenticationFailed, ContentRefused, ModelError, QuotaExhausted, RateLimited

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


@pytest.mark.parametrize(
    ("behaviour", "status", "code", "retry_after"),
    [
        ((400, {}, "rejected by our content policy"), 400, "content_policy_violation", None),
        ((401, {}, "Incorrect API key provided"), 401, "provider_key_rejected", None),
        ((402, {}, "Insufficient Balance"), 402, "provider_quota_exhausted", None),
        ((429, {}, "insufficient_quota: see your plan"), 402, "provider_quota_exhausted", None),
        ((400, {}, "Your credit balance is too low"), 402, "provider_quota_exhausted", None),
        ((429, {"retry-after": "1.2"}, "slow down"), 429, "rate_limit_exceeded", "2"),
        ((429, {}, "slow down"), 429, "rate_limit_exceeded", "5"),
        ((503, {"retry-after": "1"}, "overloaded"), 502, "model_failed", "1"),
        ((400, {}, "this is not what I take"), 400, None, None),
        ((400, {}, "maximum context length is 5 tokens"), 400, "context_length_exceeded", None),
    ],
)
def test_an_error_of_a_provider_keeps_its_meaning(
    tmp_path: Path,
    behaviour: tuple[int, dict[str, str], str],
    status: int,
    code: str | None,
    retry_after: str | None,
) -> None:
    with running_server() as far, serving(tmp_path, catalogue=Catalogue([remote("m", far.url)])) as server:
        for stream in (False, True):
            far.script = [behaviour]
            response = server.ask("far", stream=stream)
            assert (response.status_code, response.json()["error"]["code"]) == (status, code)
            assert response.headers.get("retry-after") == retry_after
            assert "www-authenticate" not in response.headers, "the caller's own key is right"
        server.assert_settled()
        assert server.spent_and_held() == (0, 0)


def test_a_call_that_may_have_cost_is_not_asked_for_again(tmp_path: Path) -> None:
    """OpenAI's client repeats what fails with 5xx; a provider that timed out may charge for each try."""
    with running_server() as far:
        entry = remote("m", far.url, timeout_seconds=2)
        with serving(tmp_path, catalogue=Catalogue([entry])) as server:
            far.script = ["silent"] * 3
            with (
                OpenAI(base_url=f"{server.url}/v1", api_key="none") as client,
                pytest.raises(InternalServerError) as failed,
            ):
                client.chat.completions.create(model="far", messages=[{"role": "user", "content": "hi"}])
            assert (failed.value.status_code, failed.value.code) == (504, "provider_timeout")
            assert len(far.requests) == 1
            server.assert_settled()


def test_a_chain_of_servers_tells_the_same_error(tmp_path: Path) -> None:
    """The provider's error, through a server here and LiteLLM, is the same error of ours."""
    with (
        running_server() as far,
        serving(tmp_path, catalogue=Catalogue([remote("m", far.url)])) as server,
        asking(tmp_path / "here", remote("far", f"{server.url}/v1")) as client,
    ):
        for behaviour, kind in (
            ((400, {}, "rejected by our content policy"), ContentRefused),
            ((401, {}, "no such key"), AuthenticationFailed),
            ((402, {}, "empty"), QuotaExhausted),
            ((429, {"retry-after": "71"}, "slow down"), RateLimited),
        ):
            far.script = [behaviour]
            with pytest.raises(kind):
                client.solve("What is 6 times 7?")
