"""A large model behind vLLM or SGLang: the texts are those of the same model here, whatever the wire does.

The server is a stand-in that speaks both APIs over a tiny model (`inference_server`).
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from inference_server import InferenceServer, serving
from ports import free_port
from tiny_models import VOCABULARY, Letters, a_prompt, build, plain_logits, plain_stitch, plain_text

from viaticum.decoders import MixedDecoder, Request, Runner, Sampling, TorchRunner
from viaticum.decoders.served_check import connect
from viaticum.decoders.served_runner import ServedRunner, entropy_of
from viaticum.errors import (
    AuthenticationFailed,
    InputError,
    ModelError,
    PromptTooLong,
    ProviderTimeout,
    ProviderUnavailable,
    RateLimited,
    VocabularyMismatch,
)
from viaticum.routers.token import AlwaysLarge, EntropyRouter, TokenRouter, entropy

CASES = 25  # of each way to decode and API: 200 in all
NEW = 5
DIALECTS = pytest.mark.parametrize("dialect", ["vllm", "sglang"])


@pytest.fixture(scope="module")
def large() -> TorchRunner:
    return TorchRunner(build(seed=1), slots=32)


@contextmanager
def served(large: Runner, slots: int = 1, top: int = VOCABULARY, **server: Any) -> Iterator[ServedRunner]:
    """A runner of a server; `.server` is the server."""
    with serving(InferenceServer(large, **server)) as running:
        runner = connect(running.url, vocabulary=VOCABULARY, slots=slots, top=top, timeout=30, retries=2)
        running.requests.clear()
        runner.server = running  # type: ignore[attr-defined]
        try:
            yield runner
        finally:
            runner.close()


def server_of(runner: ServedRunner) -> InferenceServer:
    server: InferenceServer = runner.server  # type: ignore[attr-defined]
    return server


def pair(
    runner: ServedRunner, router: TokenRouter | None = None, *, small: bool = True, **settings: Any
) -> MixedDecoder:
    return MixedDecoder(
        runner,
        TorchRunner(build(seed=0), slots=runner.slots) if small else None,
        tokenizer=Letters(),
        router=router,
        **settings,
    )


@DIALECTS
def test_texts_are_those_of_the_cache_free_reference(large: TorchRunner, dialect: str) -> None:
    """Seeded cases: the LLM alone, speculative and R-Stitch, with and without drafts."""
    rng = random.Random(dialect)
    with served(large, slots=16, dialect=dialect) as runner:
        for draft in (0, 3):
            alone = pair(runner, AlwaysLarge(), small=draft > 0, draft=draft)
            prompts = [a_prompt(rng) for _ in range(CASES)]
            results = alone.generate_all([Request(prompt, max_new_tokens=NEW) for prompt in prompts])
            for prompt, result in zip(prompts, results, strict=True):
                assert list(result.trace.tokens) == plain_text(prompt, [True] * NEW)
            tau = (0.45, 0.6)[draft > 0]
            stitch = pair(runner, EntropyRouter(tau), draft=draft)
            prompts = [a_prompt(rng) for _ in range(CASES)]
            results = stitch.generate_all([Request(prompt, max_new_tokens=NEW) for prompt in prompts])
            for prompt, result in zip(prompts, results, strict=True):
                assert (list(result.trace.tokens), list(result.trace.made_by)) == plain_stitch(
                    prompt, NEW, tau
                )
        assert sorted(runner.free_slots) == list(range(16))


@DIALECTS
def test_a_text_of_the_llm_alone_takes_a_few_requests(large: TorchRunner, dialect: str) -> None:
    with served(large, dialect=dialect) as runner:
        decoder = pair(runner, small=False)
        result = decoder.generate(Request([5, 6, 7], max_new_tokens=60))
        assert list(result.trace.tokens) == plain_text([5, 6, 7], [True] * 60)
        assert len(server_of(runner).requests) <= 4
        assert runner.traffic.answers == 60
        assert runner.traffic.streamed >= 56
        per_answer = runner.traffic.per_answer()
        assert per_answer["requests"] < 0.2
        assert per_answer["bytes_up"] > 0
        assert per_answer["bytes_down"] > 0
        # The next text of the slot reads ahead as far as this one did.
        decoder.generate(Request([9, 9], max_new_tokens=60))
        assert len(server_of(runner).requests) <= 5


def test_a_stream_that_repeats_itself_is_kept_short(large: TorchRunner) -> None:
    """SGLang without --incremental-streaming-output repeats all earlier tokens in every event."""
    with served(large, dialect="sglang", incremental=False) as runner:
        decoder = pair(runner, small=False)
        result = decoder.generate(Request([5, 6, 7], max_new_tokens=70))
        assert list(result.trace.tokens) == plain_text([5, 6, 7], [True] * 70)
        assert max(body["sampling_params"]["max_new_tokens"] for body in server_of(runner).requests) <= 32


def test_the_stream_is_closed_when_the_text_ends_or_the_small_model_goes_on(large: TorchRunner) -> None:
    with served(large, pause=0.02) as runner:
        server = server_of(runner)
        runner._window[0] = 500
        pair(runner, small=False).generate(Request([1, 2, 3], max_new_tokens=3))
        assert server.hung_up.wait(60)
        for _ in range(10):
            time.sleep(0.02)  # the token at hand is still made
        generated = server.generated
        time.sleep(0.2)
        assert server.generated == generated < 50
        server.hung_up.clear()
        runner._window[0] = 500
        decoder = pair(runner, EntropyRouter(0.45))
        decoder.generate(Request([4, 2, 3], max_new_tokens=12))
        assert decoder.stats.large_tokens > 0
        assert server.hung_up.wait(60)


@DIALECTS
def test_a_stream_closed_in_the_middle_of_an_event_stays_closed(
    large: TorchRunner, dialect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoder's thread closes it while the connection's reads a token that says "goes on"."""
    in_event, go_on = threading.Event(), threading.Event()
    prompt = [1, 2, 3]
    text = [*prompt, *plain_text(prompt, [True] * 6)]
    with served(large, dialect=dialect, pause=0.02) as runner:
        runner._window[0] = 100
        read = runner.api.stream_positions

        def slowly(event: dict[str, Any], seen: int) -> Any:
            if seen == 2:
                in_event.set()
                assert go_on.wait(120)
            return read(event, seen)

        monkeypatch.setattr(runner.api, "stream_positions", slowly)
        assert int(runner.forward([0], [prompt]).tokens[0]) == text[3]
        assert in_event.wait(120)
        runner.idle(0)
        monkeypatch.setattr(runner.api, "stream_positions", read)
        go_on.set()
        runner.connection.start(asyncio.sleep(0.1)).result(120)  # the stream's task has ended
        made = []
        threading.Thread(
            target=lambda: made.extend(int(runner.forward([0], [[token]]).tokens[0]) for token in text[3:-1]),
            daemon=True,
        ).start()
        deadline = time.monotonic() + 120
        while len(made) < len(text[4:]) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert made == text[4:]


def test_tokens_that_came_and_were_not_used_are_counted(large: TorchRunner) -> None:
    with served(large) as runner:
        before = runner.traffic.received
        runner.forward([0], [[1, 2, 3]])
        deadline = time.monotonic() + 120
        while runner.traffic.received < before + 4:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        runner.reset(0)
        assert runner.traffic.wasted == 3


def test_a_stop_id_ends_the_stream_and_the_text(large: TorchRunner) -> None:
    prompt = [5, 6, 7]
    text = plain_text(prompt, [True] * 12)
    stop = text[7]
    expected = text[: text.index(stop) + 1]
    with served(large, stop_ids=(stop,)) as runner:
        decoder = pair(runner, small=False, stop_ids=[stop])
        result = decoder.generate(Request(prompt, max_new_tokens=12))
        assert list(result.trace.tokens) == expected
        assert result.finish_reason == "stop"
        # A text that goes on after a stop id, as a forced end of a thought does, is asked for anew.
        runner.reset(0)
        logits = runner.extend([0], [[*prompt, *expected, 1]])
        assert int(logits.argmax()) == int(plain_logits([*prompt, *expected, 1], seed=1).argmax())


@DIALECTS
def test_the_distribution_is_the_models(large: TorchRunner, dialect: str) -> None:
    with served(large, dialect=dialect, top=20) as runner:
        output = runner.forward([0], [[3, 1, 4, 1, 5]], [3])
        for row, length in enumerate((3, 4, 5)):
            exact = plain_logits([3, 1, 4, 1, 5][:length], seed=1).log_softmax(-1)
            top = exact.topk(20)
            known = output.logits[row] > -torch.inf
            assert known.nonzero().flatten().tolist() == sorted(top.indices.tolist())
            torch.testing.assert_close(output.logits[row, top.indices], top.values, atol=1e-5, rtol=1e-4)
            assert output.entropy is not None
            assert output.entropy[row] <= entropy(exact[None])[0] + 1e-6
        assert output.finite.all()


def test_entropy_of_a_part_is_a_lower_bound_and_exact_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        logprobs = (torch.randn(50, generator=generator) * 3).log_softmax(-1).sort(descending=True).values
        exact = float(entropy(logprobs[None]))
        bounds = [entropy_of(logprobs[:count].tolist(), 50) for count in (5, 20, 49, 50)]
        assert all(low <= high + 1e-6 for low, high in pairwise(bounds))
        assert bounds[-1] == pytest.approx(exact, abs=1e-5)
        assert bounds[0] <= exact + 1e-6
    assert entropy_of([0.0], 50) == 0


def test_sampled_texts_are_those_of_the_model_here(large: TorchRunner) -> None:
    """With all log probabilities on the wire, seeds give the same texts, with drafts and without."""
    requests = [
        Request([7, seed], max_new_tokens=8, sampling=Sampling(1.0, top_p=0.9, seed=seed))
        for seed in range(12)
    ]
    with served(large, slots=4) as runner:
        for router, draft in ((AlwaysLarge(), 0), (EntropyRouter(0.5), 0), (AlwaysLarge(), 2)):
            here = MixedDecoder(
                TorchRunner(build(seed=1), slots=4),
                TorchRunner(build(seed=0), slots=4),
                tokenizer=Letters(),
                router=router,
                draft=draft,
            )
            expected = [result.trace.tokens for result in here.generate_all(requests)]
            results = pair(runner, router, draft=draft).generate_all(requests)
            assert [result.trace.tokens for result in results] == expected


def test_what_a_server_does_not_have_is_said(large: TorchRunner) -> None:
    with served(large) as runner:
        with pytest.raises(ModelError, match="no hidden states; load it here"):
            runner.forward([0], [[1]], hidden=True)
        with pytest.raises(ModelError, match="embeddings"):
            _ = runner.embeddings


def test_texts_fill_the_context_and_not_more(large: TorchRunner) -> None:
    with served(large, context=20) as runner:
        assert runner.context == 19
        decoder = pair(runner, small=False)
        result = decoder.generate(Request([1] * 9, max_new_tokens=10))
        assert list(result.trace.tokens) == plain_text([1] * 9, [True] * 10)
        with pytest.raises(PromptTooLong):
            decoder.generate(Request([1] * 10, max_new_tokens=10))


# --- what is checked at the start ---------------------------------------------------------------------------


def check(server: InferenceServer, **values: Any) -> ServedRunner:
    settings = {"vocabulary": VOCABULARY, "top": VOCABULARY, "timeout": 60, "retries": 0}
    return connect(server.url, **(settings | values))


@pytest.mark.parametrize(
    ("server", "values", "error", "message"),
    [
        ({"key": "right"}, {}, AuthenticationFailed, "api_key_env"),
        ({"key": "right"}, {"key": "wrong"}, AuthenticationFailed, "status 401"),
        ({}, {"model": "other"}, InputError, "serves no model 'other' but big; set served_model"),
        ({}, {"probes": {"ab": [33, 35]}}, VocabularyMismatch, r"token 1 is \[34\] there and \[35\] here"),
        ({"tokenizes": False}, {"probes": {"ab": [1]}}, VocabularyMismatch, "another vocabulary"),
        ({"token_ids": False}, {}, ModelError, "no token ids"),
        ({"max_logprobs": 20}, {}, ModelError, "max-logprobs"),
    ],
)
def test_a_server_that_cannot_be_used_is_refused_at_the_start(
    large: TorchRunner, server: dict[str, Any], values: dict[str, Any], error: type, message: str
) -> None:
    with serving(InferenceServer(large, **server)) as running, pytest.raises(error, match=message):
        check(running, **values)


def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(ProviderUnavailable, match=r"http://127.0.0.1:9: .*is it running|cannot be reached"):
        connect("http://127.0.0.1:9/v1", vocabulary=VOCABULARY, retries=0)


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(
    large: TorchRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with serving(InferenceServer(large)) as running:
        check(running).close()


@DIALECTS
@pytest.mark.parametrize("tokenizes", [True, False])
def test_a_server_with_our_tokens_and_key_is_taken(large: TorchRunner, dialect: str, tokenizes: bool) -> None:
    with serving(
        InferenceServer(large, dialect=dialect, key="right", context=30, tokenizes=tokenizes)
    ) as running:
        runner = check(running, key="right", probes={"ab": [33, 34]})
        assert runner.api.name == dialect
        assert runner.context == 29
        assert runner.round_trip > 0
        runner.close()


# --- faults -------------------------------------------------------------------------------------------------


@DIALECTS
@pytest.mark.parametrize(
    "faults",
    [
        ["break"],
        ["half a line"],
        ["error event"],
        ["abort"],
        ["stall"],
        [(503, {}, "loading")],
        [(429, {"retry-after": "0.05"}, "slow down")],
        ["break", (500, {}, "EngineCore died"), "half a line"],
    ],
    ids=str,
)
def test_a_text_survives_a_fault(large: TorchRunner, dialect: str, faults: list[Any]) -> None:
    with served(large, dialect=dialect) as runner:
        runner.connection.timeout, runner._window[0] = 3.0 if "stall" in faults else 60.0, 16
        server_of(runner).script = list(faults)
        result = pair(runner, small=False).generate(Request([2, 7, 1], max_new_tokens=8))
        assert result.finish_reason == "length"
        assert list(result.trace.tokens) == plain_text([2, 7, 1], [True] * 8)
        assert runner.traffic.retries == len(faults)


@DIALECTS
def test_a_verification_that_the_server_gives_up_is_asked_for_again(large: TorchRunner, dialect: str) -> None:
    with served(large, dialect=dialect) as runner:
        server_of(runner).script = ["abort"]
        result = pair(runner, draft=3).generate(Request([2, 7, 1], max_new_tokens=8))
        assert list(result.trace.tokens) == plain_text([2, 7, 1], [True] * 8)
        assert runner.traffic.retries == 1
        server_of(runner).script = ["abort"] * 3
        with pytest.raises(ProviderUnavailable, match="gave up its answer"):
            pair(runner, draft=3).generate(Request([5, 7, 1], max_new_tokens=8))


@DIALECTS
def test_the_first_event_may_follow_a_byte_order_mark(large: TorchRunner, dialect: str) -> None:
    with served(large, dialect=dialect) as runner:
        server_of(runner).script = ["mark"]
        result = pair(runner, small=False).generate(Request([2, 7, 1], max_new_tokens=8))
        assert list(result.trace.tokens) == plain_text([2, 7, 1], [True] * 8)


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ((503, {}, "overloaded"), ProviderUnavailable, "overloaded"),
        ((429, {"retry-after": "0"}, "too many"), RateLimited, "too many"),
        ("silent", ProviderTimeout, r"within|nothing for"),
        ((401, {}, "bad key"), AuthenticationFailed, "bad key"),
        ((400, {}, "no such parameter"), ModelError, "no such parameter"),
    ],
    ids=str,
)
def test_a_text_whose_server_stays_away_ends_with_its_error(
    large: TorchRunner, fault: Any, error: type[ModelError], message: str
) -> None:
    with served(large) as runner:
        runner.connection.timeout, runner.connection.retries = 1.0 if fault == "silent" else 60.0, 1
        runner.connection._http.timeout = runner.connection.timeout
        server_of(runner).script = [fault, fault]
        decoder = pair(runner, small=False)
        with pytest.raises(error, match=f"request 0: large: .*{message}"):
            decoder.generate(Request([2, 7, 1], max_new_tokens=8))
        # The slot is free, and the next text is decoded.
        server_of(runner).script = []
        runner.connection.timeout = runner.connection._http.timeout = 60.0
        result = decoder.generate(Request([2, 7, 1], max_new_tokens=4))
        assert list(result.trace.tokens) == plain_text([2, 7, 1], [True] * 4)


def test_one_text_fails_and_the_others_go_on(large: TorchRunner) -> None:
    with served(large, slots=3) as runner:
        server_of(runner).script = ["ok", (400, {}, "refused")]
        requests = [Request([2, 7, first], max_new_tokens=8) for first in (1, 2, 3)]
        results = pair(runner, small=False).generate_all(requests)
        failed = [result for result in results if result.error is not None]
        assert len(failed) == 1
        assert "refused" in str(failed[0].error)
        for request, result in zip(requests, results, strict=True):
            if result.error is None:
                assert list(result.trace.tokens) == plain_text(request.prompt, [True] * 8)


@pytest.mark.parametrize("draft", [0, 2])
def test_a_server_that_is_killed_and_comes_back_is_not_noticed(large: TorchRunner, draft: int) -> None:
    server, port = InferenceServer(large, pause=0.01), free_port()
    with serving(server, port=port) as running:
        runner = connect(running.url, vocabulary=VOCABULARY, slots=2, top=VOCABULARY, timeout=60, retries=8)
        decoder = pair(runner, EntropyRouter(0.45) if draft else AlwaysLarge(), small=draft > 0, draft=draft)
        requests = [Request([2, 7, first], max_new_tokens=40) for first in (1, 2)]
        engine = decoder.engine()
        for request in requests:
            engine.add(request)
        for _ in range(8):
            engine.step()
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.extend(event.result for event in engine if event.result))
    thread.start()
    time.sleep(0.3)  # nobody is there
    with serving(InferenceServer(large), port=port):
        thread.join(200)
        assert not thread.is_alive()
    assert all(result.finish_reason == "length" for result in results)
    expected = {
        tuple(plain_stitch(request.prompt, 40, 0.45)[0] if draft else plain_text(request.prompt, [True] * 40))
        for request in requests
    }
    assert {result.trace.tokens for result in results} == expected
    assert runner.traffic.retries > 0
    runner.close()


def test_texts_fail_when_the_server_is_killed_for_good(large: TorchRunner) -> None:
    with serving(InferenceServer(large, pause=0.01), port=free_port()) as running:
        runner = connect(running.url, vocabulary=VOCABULARY, slots=2, timeout=60, retries=1)
        decoder = pair(runner, small=False)
        engine = decoder.engine()
        for first in (1, 2):
            engine.add(Request([2, 7, first], max_new_tokens=300))
        engine.step()
    results = [event.result for event in engine if event.result is not None]
    assert [type(result.error) for result in results] == [ProviderUnavailable] * 2
    assert all(result.trace.tokens for result in results)
    assert sorted(runner.free_slots) == [0, 1]
    runner.close()


def test_logits_that_are_not_finite_fail_the_text(
    large: TorchRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JSON has no NaN: a server sends null."""
    with served(large) as runner:
        nothing = (0, None, [(token, None) for token in range(VOCABULARY)])
        monkeypatch.setattr(server_of(runner), "token", lambda ids, top: nothing)
        with pytest.raises(ModelError, match="not finite"):
            pair(runner, small=False).generate(Request([1, 2], max_new_tokens=3))
