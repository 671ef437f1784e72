"""Remote models through a real LiteLLM, against a real server on a loopback port."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openai_server import KEY, OpenAIServer, spec_for

from viaticum import Viaticum
from viaticum.agents.workflow.calls import Calls, SettledCall
from viaticum.budgets import Ledger
from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.errors import (
    AuthenticationFailed,
    ContentRefused,
    HoldError,
    InputError,
    ModelError,
    PromptTooLong,
    ProviderTimeout,
    ProviderUnavailable,
    RateLimited,
    UnknownPrice,
    ViaticumError,
)
from viaticum.models.base import Generation
from viaticum.models.remote.errors import translate_error
from viaticum.models.remote.model import RemoteModel
from viaticum.models.remote.prices import with_litellm_price, with_litellm_prices
from viaticum.routers.query.fake import FakeRouter
from viaticum.types import Completion, Message, ThinkingDelta, TokenCount

CHAT: list[Message] = [{"role": "user", "content": "hello big world"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string"}, "days": {"type": "integer"}},
        },
    },
}


def model_for(server: OpenAIServer, **fields: Any) -> tuple[RemoteModel, list[float]]:
    """The model, and the waits that it would have made."""
    waits: list[float] = []
    return RemoteModel(spec_for(server, **fields), sleep=waits.append), waits


def ask(model: RemoteModel, chat: Sequence[Message] = CHAT, **settings: Any) -> tuple[list[str], Completion]:
    *pieces, completion = model.stream(chat, Generation(50, **settings))
    assert isinstance(completion, Completion)
    return [piece for piece in pieces if isinstance(piece, str) and piece], completion


# LiteLLM's two ways to make a call: through OpenAI's client, and through its own.
PROVIDERS = pytest.mark.parametrize("litellm_model", ["openai/fake", "hosted_vllm/fake"])


@PROVIDERS
def test_a_streamed_answer_its_usage_and_what_was_asked(server: OpenAIServer, litellm_model: str) -> None:
    model, _ = model_for(server, litellm_model=litellm_model)
    pieces, completion = ask(model, seed=7)
    assert pieces == ["you ", "said: ", "hello ", "big ", "world"]
    assert (completion.text, completion.finish_reason) == ("you said: hello big world", "stop")
    assert completion.usage.models == {"far": TokenCount(3, 5)}
    assert completion.warnings == ()
    (asked,) = server.requests
    assert asked["max_tokens"] == 50  # what was reserved
    assert (asked["model"], asked["temperature"], asked["seed"]) == ("fake", 0.0, 7)
    assert asked["stream_options"] == {"include_usage": True}


def test_a_model_that_does_not_stream_answers_whole(server: OpenAIServer) -> None:
    model, _ = model_for(server, streams=False)
    pieces, completion = ask(model)
    assert pieces == ["you said: hello big world"]
    assert completion.usage.models == {"far": TokenCount(3, 5)}
    assert "stream" not in server.requests[0] or server.requests[0]["stream"] is False


def test_stop_and_length_end_it(server: OpenAIServer) -> None:
    model, _ = model_for(server)
    assert ask(model, stop=("big",))[1].text == "you said: hello "
    completion = model.generate(CHAT, Generation(2))
    assert (completion.text, completion.finish_reason) == ("you said: ", "length")


@pytest.mark.parametrize("streams", [True, False])
def test_unsupported_parameters_are_left_out(server: OpenAIServer, streams: bool) -> None:
    model, _ = model_for(server, omit=("temperature", "seed"), streams=streams)
    ask(model)
    assert not {"temperature", "seed", "top_p", "top_k"} & set(server.requests[0])


@pytest.mark.parametrize("streams", [True, False])
def test_usage_that_is_missing_is_counted_and_never_zero(
    server: OpenAIServer, streams: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = model_for(server, streams=streams)
    server.script = ["no usage"]
    with caplog.at_level(logging.WARNING, "viaticum"):
        completion = ask(model)[1]
    worst = model.worst_case(CHAT, 50)["far"]
    used = completion.usage.models["far"]
    assert used == TokenCount(worst.input_tokens, len("you said: hello big world"))
    assert "gave no usage" in completion.warnings[0]
    assert "gave no usage" in caplog.text
    server.text, server.script = "x" * 200, ["no usage"]
    assert ask(model)[1].usage.models["far"].output_tokens == 50  # no more than was asked for


@pytest.mark.parametrize(
    "litellm_model", ["openai/fake", "deepinfra/fake", "mistral/fake", "hosted_vllm/fake"]
)
def test_an_account_at_openai_is_told_to_nobody_else(
    server: OpenAIServer, litellm_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENAI_ORGANIZATION", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "secret")
    ask(model_for(server, litellm_model=litellm_model)[0])
    (headers,) = server.received_headers
    assert "secret" not in headers.values()
    assert headers["authorization"] in (f"Bearer {KEY}", "Bearer none")


ZEROS = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}


@PROVIDERS
@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize(
    "usage",
    [
        {},
        ZEROS,
        {"prompt_tokens": -3, "completion_tokens": -5, "total_tokens": -8},
        {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3},
        {"prompt_tokens": 3, "completion_tokens": -200, "total_tokens": -197},
        {"prompt_tokens": 0, "completion_tokens": 5, "total_tokens": 5},
        {"prompt_tokens": None, "completion_tokens": None, "total_tokens": None},
    ],
)
def test_impossible_usage_is_counted(
    server: OpenAIServer, ledger: Ledger, usage: dict[str, Any], streams: bool, litellm_model: str
) -> None:
    model, _ = model_for(server, streams=streams, litellm_model=litellm_model)
    server.usages = [usage]
    *_, paid = calls_of(ledger, model).stream("b", "k", "far", CHAT, Generation(50))
    assert isinstance(paid, SettledCall)
    worst = model.worst_case(CHAT, 50)["far"]
    assert paid.entry.usage["far"] == TokenCount(worst.input_tokens, len("you said: hello big world"))
    assert ledger.budget("b").posted_nanousd == 1_000 * worst.input_tokens + 2_000 * 25


@PROVIDERS
@pytest.mark.parametrize(
    "usages",
    [
        [{"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}, ZEROS],
        [{"prompt_tokens": 3, "completion_tokens": 0}, {"prompt_tokens": 0, "completion_tokens": 5}],
        [{"prompt_tokens": 3, "completion_tokens": n, "total_tokens": 3 + n} for n in range(6)],
        [{"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}, {}],
    ],
    ids=["zeros at the end", "prompt and output apart", "growing", "empty at the end"],
)
def test_usage_in_several_chunks_is_read_once(
    server: OpenAIServer, usages: list[dict[str, Any]], litellm_model: str
) -> None:
    model, _ = model_for(server, litellm_model=litellm_model)
    server.usages = usages
    completion = ask(model)[1]
    assert completion.usage.models == {"far": TokenCount(3, 5)}
    assert completion.warnings == ()


@pytest.mark.parametrize("streams", [True, False])
def test_reported_zeros_of_an_empty_answer_stay_and_details_count(
    server: OpenAIServer, streams: bool
) -> None:
    model, _ = model_for(server, streams=streams)
    server.text, server.usage = "", {"completion_tokens": 0, "total_tokens": 3}
    assert ask(model)[1].usage.models == {"far": TokenCount(3, 0)}
    server.text = "seven words"
    server.usage = {
        "prompt_tokens": 100,
        "completion_tokens": 40,
        "total_tokens": 140,
        "prompt_tokens_details": {"cached_tokens": 60},
        "completion_tokens_details": {"reasoning_tokens": 30},
    }
    assert ask(model)[1].usage.models == {"far": TokenCount(100, 40, 60, 30)}
    server.usage["prompt_tokens_details"] = {"cached_tokens": 60, "cache_creation_tokens": 50}
    written = TokenCount(100, 40, 60, 30, cache_write_tokens=40)  # no more than there are
    assert ask(model)[1].usage.models == {"far": written}
    server.usage["prompt_tokens_details"] = {"cached_tokens": 60}
    server.usage["total_tokens"] = 170  # thoughts beside the answer
    assert ask(model)[1].usage.models == {"far": TokenCount(100, 70, 60, 30)}


@PROVIDERS
@pytest.mark.parametrize(
    ("script", "waited"),
    [
        ([(429, {"retry-after": "3"}, "slow down")], [(3, 3)]),
        ([(429, {"retry-after-ms": "250"}, "slow down")], [(0.25, 0.25)]),
        ([(429, {}, "slow down"), (500, {}, "oops")], [(0.25, 0.5), (0.5, 1)]),
        ([(503, {"retry-after": "0"}, "later")], [(0, 0)]),
        (["drop"], [(0.25, 0.5)]),
        (["break at once"], [(0.25, 0.5)]),
    ],
)
def test_transient_errors_are_retried(
    server: OpenAIServer, script: list[Any], waited: list[tuple[float, float]], litellm_model: str
) -> None:
    model, waits = model_for(server, litellm_model=litellm_model)
    server.script = list(script)
    pieces, completion = ask(model)
    assert "".join(pieces) == completion.text == "you said: hello big world"
    assert completion.usage.models == {"far": TokenCount(3, 5)}  # the failed tries are not charged
    assert len(server.requests) == len(script) + 1  # LiteLLM and the OpenAI client made none of their own
    assert len(waits) == len(waited)
    assert all(least <= wait <= most for wait, (least, most) in zip(waits, waited, strict=True))


def test_a_retry_after_date_is_waited_for(server: OpenAIServer) -> None:
    from email.utils import formatdate

    model, waits = model_for(server)
    server.script = [(503, {"retry-after": formatdate(time.time() + 20, usegmt=True)}, "later")]
    ask(model)
    assert 15 <= waits[0] <= 20


@pytest.mark.parametrize(
    ("behaviour", "kind", "says", "tries"),
    [
        ((429, {"retry-after": "300"}, "slow down"), RateLimited, "try later: slow down", 1),
        ((500, {}, "oops"), ProviderUnavailable, "far cannot be reached or failed", 3),
        ((401, {}, "bad key"), AuthenticationFailed, "does not take the key", 1),
        ((403, {}, "not for you"), AuthenticationFailed, "does not take the key", 1),
        ((400, {}, "maximum context length is 10 tokens"), PromptTooLong, "finds the prompt too long", 1),
        ((400, {}, "rejected by our content policy"), ContentRefused, "refuses to answer", 1),
        ((400, {}, "Invalid parameter foo"), InputError, "litellm_model, api_base and omit", 1),
        ((404, {}, "no such model"), InputError, "litellm_model, api_base and omit", 1),
        ("silent", ProviderTimeout, "said nothing for 1.5 s; raise timeout_seconds", 1),
        ("break", ProviderUnavailable, "far cannot be reached or failed", 1),
        ("end early", ProviderUnavailable, "broke off", 1),
    ],
)
def test_errors_are_translated_and_say_what_to_do(
    server: OpenAIServer, behaviour: Any, kind: type[ViaticumError], says: str, tries: int
) -> None:
    model, _ = model_for(server, timeout_seconds=1.5 if behaviour == "silent" else 60)
    server.script = [behaviour] * 5
    with pytest.raises(kind, match=says) as caught:
        ask(model)
    assert type(caught.value) is kind
    assert "far" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(server.requests) == tries
    if isinstance(caught.value, RateLimited):
        assert caught.value.retry_after == 300


def test_an_unreachable_server_is_unavailable() -> None:
    nowhere = OpenAIServer(port=1)
    model, waits = model_for(nowhere, max_retries=1)
    with pytest.raises(ProviderUnavailable, match="far cannot be reached"):
        ask(model)
    assert len(waits) == 1


def test_keys_come_from_their_variable_and_stay_out_of_messages(
    server: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = model_for(server, api_key_env="FAR_KEY")
    monkeypatch.delenv("FAR_KEY", raising=False)
    with pytest.raises(AuthenticationFailed, match="put it into the variable FAR_KEY"):
        ask(model)
    assert server.requests == []
    monkeypatch.setenv("FAR_KEY", KEY)
    assert ask(model)[1].text
    monkeypatch.setenv("FAR_KEY", "sk-wrong-and-secret")
    with pytest.raises(AuthenticationFailed, match="the key in FAR_KEY") as caught:
        ask(model)
    assert "sk-wrong" not in str(caught.value)


def test_the_users_key_for_openai_goes_to_no_other_server(
    server: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-user")
    model, _ = model_for(server)
    assert ask(model)[1].text  # the server takes "none" and its own key only


@pytest.mark.parametrize("streams", [True, False])
def test_tool_calls_come_back_whole(server: OpenAIServer, streams: bool) -> None:
    model, _ = model_for(server, streams=streams)
    chat: list[Message] = [{"role": "user", "content": "weather in Österreich for 3 days"}]
    pieces, completion = ask(model, chat, extra={"tools": [TOOL], "tool_choice": "auto"})
    assert (pieces, completion.text, completion.finish_reason) == ([], "", "tool_calls")
    assert completion.tool_calls == (
        {
            "id": "call_1",
            "type": "function",
            "function": {
                "name": "weather",
                "arguments": '{"place": "weather in Österreich for 3 days", "days": 3}',
            },
        },
    )


def test_tools_and_schemas_are_part_of_the_worst_case(server: OpenAIServer) -> None:
    model, _ = model_for(server)
    plain = model.worst_case_of(CHAT, Generation(50))["far"].input_tokens
    with_tools = model.worst_case_of(CHAT, Generation(50, extra={"tools": [TOOL]}))["far"].input_tokens
    assert with_tools > plain + 500


def test_logprobs_come_back(server: OpenAIServer) -> None:
    model, _ = model_for(server)
    completion = ask(model, extra={"logprobs": True})[1]
    assert [token["token"] for token in completion.logprobs] == ["you ", "said: ", "hello ", "big ", "world"]


def test_filtered_content_is_a_refusal(server: OpenAIServer) -> None:
    model, _ = model_for(server)
    server.script = ["filtered"]
    assert ask(model)[1].finish_reason == "refused"


@pytest.mark.parametrize("name", ["n", "max_tokens", "api_key"])
def test_an_extra_that_would_change_the_cost_is_refused(server: OpenAIServer, name: str) -> None:
    with pytest.raises(InputError, match=f"not asked for {name}"):
        ask(model_for(server)[0], extra={name: 2})
    assert server.requests == []


def test_a_tier_that_may_cost_more_is_refused(server: OpenAIServer) -> None:
    for tier in ("priority", 2):
        with pytest.raises(InputError, match=f"service_tier {tier!r} may cost more"):
            ask(model_for(server)[0], extra={"service_tier": tier})
    assert server.requests == []
    ask(model_for(server)[0], extra={"service_tier": "flex"})
    assert server.requests[-1]["service_tier"] == "flex"


@PROVIDERS
def test_closing_the_stream_closes_the_connection(server: OpenAIServer, litellm_model: str) -> None:
    model, _ = model_for(server, litellm_model=litellm_model)
    server.pause, server.text = 0.02, " ".join("abcdefghij" * 20)
    stream = model.stream(CHAT, Generation(500))
    assert next(stream) == "a "
    assert not server.hung_up.is_set()
    stream.close()
    assert server.hung_up.wait(120)


def test_many_threads_share_one_model(server: OpenAIServer) -> None:
    model, _ = model_for(server)
    chats: list[list[Message]] = [[{"role": "user", "content": f"number {n}"}] for n in range(24)]
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda chat: model.generate(chat, Generation(50)).text, chats))
    assert texts == [f"you said: number {n}" for n in range(24)]


# Tokens and prices


@pytest.mark.parametrize(
    "name", ["openai/gpt-4o-mini", "gpt-4.1", "anthropic/claude-sonnet-4-5", "openai/unheard-of"]
)
@pytest.mark.parametrize("text", ["", "hello big world", "üñï 漢字 " * 50, "x" * 20_000, "9 " * 9_000])
def test_a_worst_case_is_an_upper_bound(name: str, text: str) -> None:
    import litellm

    spec = ModelSpec.model_validate(
        {
            "name": "far",
            "description": "x",
            "kind": "remote",
            "context_length": 200_000,
            "litellm_model": name,
        }
    )
    chat: list[Message] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
    counted = RemoteModel(spec).worst_case(chat, 10)["far"].input_tokens
    exact = sum(len(litellm.encode(model="gpt-4o", text=message["content"])) + 4 for message in chat)
    assert counted >= exact
    if "gpt" in name:
        assert counted <= 1.06 * exact + 110


def test_a_prompt_past_a_known_context_is_refused_before_it_is_sent() -> None:
    spec = ModelSpec.model_validate(
        {
            "name": "far",
            "description": "x",
            "kind": "remote",
            "context_length": 1_000,
            "litellm_model": "gpt-4o",
        }
    )
    with pytest.raises(PromptTooLong, match="do not fit the context of far"):
        RemoteModel(spec).worst_case([{"role": "user", "content": "word " * 1_000}], 100)


def test_litellms_prices_are_taken_only_where_they_are_asked_for(server: OpenAIServer) -> None:
    fields: dict[str, Any] = {
        "input_price": None,
        "output_price": None,
        "litellm_model": "gemini/gemini-2.5-pro",
    }
    silent = Catalogue([spec_for(server, **fields)])
    with pytest.raises(UnknownPrice, match="far has no price"):
        with_litellm_prices(silent).prices(["far"])
    asking = Catalogue([spec_for(server, **fields, price_version="litellm")])
    price = with_litellm_prices(asking).prices(["far"])["far"]
    assert price.version == "litellm"
    assert (price.input_nanousd_per_million, price.output_nanousd_per_million) == (
        1_250_000_000,
        10_000_000_000,
    )
    (tier,) = price.tiers
    assert (tier.above_tokens, tier.input_nanousd_per_million) == (200_000, 2_500_000_000)
    with pytest.raises(UnknownPrice, match="no price for 'openai/unheard-of'"):
        with_litellm_price(
            spec_for(server, **{**fields, "litellm_model": "openai/unheard-of"}, price_version="litellm")
        )


def test_a_cost_that_differs_by_more_than_a_hundredth_warns(
    server: OpenAIServer, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = model_for(server)
    ours = (3 * 1 + 5 * 2) / 1e6
    server.usage = {"cost": ours * 1.009}
    assert ask(model)[1].warnings == ()
    server.usage = {"cost": ours * 1.02}
    completion = ask(model)[1]
    assert completion.reported_nanousd == 13_260
    assert "cost $0.00001326, the catalogue's prices say $0.000013" in completion.warnings[0]
    assert "far: the provider says" in caplog.text


def test_an_own_server_is_not_checked_against_the_list_of_another(server: OpenAIServer) -> None:
    model, _ = model_for(server, litellm_model="openai/gpt-4o")
    completion = ask(model)[1]
    assert (completion.reported_nanousd, completion.warnings) == (None, ())


# The ledger


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    with Ledger("memory:") as ledger:
        ledger.create("b", limit_nanousd=10_000_000)
        yield ledger
        assert ledger.check() == []


def calls_of(ledger: Ledger, model: RemoteModel) -> Calls:
    return Calls(Catalogue([model.spec]), ledger, {model.name: model}.__getitem__)


def test_failed_tries_are_charged_once_together(server: OpenAIServer, ledger: Ledger) -> None:
    model, _ = model_for(server)
    server.script = [(500, {}, "oops"), "break at once"]
    *_, paid = calls_of(ledger, model).stream("b", "k", "far", CHAT, Generation(50))
    assert isinstance(paid, SettledCall)
    assert paid.entry.nanousd == 13_000
    assert ledger.budget("b").posted_nanousd == 13_000


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        ((500, {}, "oops"), None),
        ("silent", 0),
        ("break", len("you said: ")),
        ("end early", len("you said: ")),
    ],
)
def test_what_a_failure_costs(
    server: OpenAIServer, ledger: Ledger, behaviour: Any, words: int | None
) -> None:
    """Nothing where the provider reported a failure, the prompt where it was silent, else the text so far."""
    model, _ = model_for(server, max_retries=0, timeout_seconds=1.5 if behaviour == "silent" else 60)
    server.script = [behaviour]
    with pytest.raises(ModelError):
        list(calls_of(ledger, model).stream("b", "k", "far", CHAT, Generation(50)))
    prompt = model.worst_case(CHAT, 0)["far"].input_tokens
    expected = 0 if words is None else 1_000 * prompt + 2_000 * words
    standing = ledger.budget("b")
    assert (standing.posted_nanousd, standing.held_nanousd) == (expected, 0)


def test_an_early_end_never_posts_more_than_was_held(server: OpenAIServer, ledger: Ledger) -> None:
    model, _ = model_for(server)
    server.text = "abcdefghij " * 10
    events = calls_of(ledger, model).stream("b", "k", "far", CHAT, Generation(12))
    for _ in range(8):
        next(events)
    events.close()  # type: ignore[attr-defined]
    (posted,) = [entry for entry in ledger.entries("b") if entry.kind == "post"]
    assert posted.usage["far"].output_tokens == 12
    assert posted.overrun == 0


def test_reasoning_and_tool_calls_of_an_early_end_are_charged(server: OpenAIServer, ledger: Ledger) -> None:
    model, _ = model_for(server)
    server.thought = "let me think"
    events = calls_of(ledger, model).stream("b", "k", "far", CHAT, Generation(50))
    assert [next(events) for _ in range(4)][1:] == [
        ThinkingDelta(" me"),
        ThinkingDelta(" think"),
        "you ",
    ]
    events.close()  # type: ignore[attr-defined]
    (posted,) = [entry for entry in ledger.entries("b") if entry.kind == "post"]
    most = len("let me thinkyou said: hello big world")  # what had arrived by then is charged too
    assert len("let me thinkyou ") <= posted.usage["far"].output_tokens <= most


def test_tools_come_back_from_the_ledger_as_they_were(server: OpenAIServer, ledger: Ledger) -> None:
    calls = calls_of(ledger, model_for(server)[0])
    generation = Generation(50, extra={"tools": [TOOL]})
    first, again = (list(calls.stream("b", "k", "far", CHAT, generation))[-1] for _ in range(2))
    assert isinstance(first, SettledCall)
    assert isinstance(again, SettledCall)
    assert again.completion == first.completion
    assert len(server.requests) == 1
    with pytest.raises(HoldError):
        list(calls.stream("b", "k", "far", CHAT, Generation(50)))


# The catalogue and the client


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"api_base": "ftp://x"}, "api_base"),
        ({"api_key_env": "sk-123"}, "api_key_env"),
        ({"timeout_seconds": 0}, "timeout_seconds"),
        ({"max_retries": -1}, "max_retries"),
        ({"omit": ["stop"]}, "omit"),
    ],
)
def test_wrong_settings_are_refused(server: OpenAIServer, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        spec_for(server, **fields)


def test_settings_of_remote_models_are_for_remote_models() -> None:
    with pytest.raises(ValueError, match="a scripted entry takes no api_base"):
        ModelSpec.model_validate(
            {
                "name": "s",
                "description": "x",
                "kind": "scripted",
                "context_length": 10,
                "api_base": "http://x",
            }
        )


def test_the_client_asks_a_remote_model(server: OpenAIServer, tmp_path: Any) -> None:
    server.text = "The answer is 42."
    file = tmp_path / "catalogue.toml"
    file.write_text(
        '[models.far]\ndescription = "Far away."\nkind = "remote"\ncontext_length = 10000\ninput_price = 1\n'
        f'output_price = 2\nlitellm_model = "openai/fake"\napi_base = "{server.url}"\n'
    )
    router = FakeRouter("far+direct")
    with Viaticum("0.01", catalogue=file, router=router, folder=tmp_path) as client:
        answer = client.solve("What is six times seven?")
        assert (answer.value, answer.routes[0].pair.model) == ("42", "far")
        assert client.ledger.check() == []
        assert client.budget().posted_nanousd == answer.cost > 0


def test_a_missing_key_is_reported_before_anything_is_held(
    server: OpenAIServer, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FAR_KEY", raising=False)
    catalogue = Catalogue([spec_for(server, api_key_env="FAR_KEY")])
    with Viaticum("0.01", catalogue=catalogue, router=FakeRouter("far+direct"), folder=tmp_path) as client:
        with pytest.raises(AuthenticationFailed, match="FAR_KEY"):
            client.solve("What is six times seven?")
        assert [entry.kind for entry in client.ledger.entries(client.budget_name)] == ["limit"]


def test_litellm_is_loaded_late_and_off_the_network() -> None:
    program = (
        "import sys, socket\n"
        "def refuse(*args, **kwargs): raise AssertionError('network')\n"
        "socket.socket.connect = refuse; socket.getaddrinfo = refuse\n"
        "from viaticum.agents import client\n"
        "from viaticum.models.remote import request\n"
        "assert 'litellm' not in sys.modules\n"
        "litellm = request.load_litellm()\n"
        "import os; assert os.environ['LITELLM_LOCAL_MODEL_COST_MAP'] == 'True'\n"
        "assert litellm.model_cost['gpt-4o-mini']\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LITELLM")}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr


def test_no_thread_of_ours_is_left(server: OpenAIServer) -> None:
    before = threading.active_count()
    ask(model_for(server)[0])
    deadline = time.time() + 120
    while threading.active_count() > before + 2 and time.time() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= before + 2  # LiteLLM keeps one or two for its logging


@pytest.mark.parametrize("text", ["b'x', 1", "b'unclosed", "b'away'", "b'{}'"])
def test_any_text_of_an_error_is_told(server: OpenAIServer, text: str) -> None:
    told = str(translate_error(RuntimeError(text), spec_for(server)))
    assert told
    assert ("away" in told) == ("away" in text)
