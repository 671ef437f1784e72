"""Requests that start and end during decoding: threads, aborts, failures, memory, the batch wait policy."""

from __future__ import annotations

import gc
import random
import threading
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import (
    NEAR,
    VOCABULARY,
    Letters,
    a_decoder,
    a_prompt,
    build,
    empty,
    plain_text,
    requests_of,
    single,
    tokens_of,
)
from torch import Tensor
from transformers import PreTrainedModel

from viaticum.catalogue import Catalogue
from viaticum.decoders import Engine, Event, MixedDecoder, Request, Result, Sampling, TorchRunner
from viaticum.errors import InputError, ModelError, PromptTooLong
from viaticum.models.base import Generation
from viaticum.models.local import LocalModels
from viaticum.routers.token import AlwaysSmall, EntropyRouter, ReplayRouter
from viaticum.types import Completion, Message

pytestmark = pytest.mark.usefixtures("one_thread")


def results_of(events: Sequence[Event]) -> dict[int, Result]:
    ended = [event for event in events if event.result is not None]
    assert len({event.index for event in ended}) == len(ended), "a text ends once"
    return {event.index: event.result for event in ended if event.result is not None}


def run(engine: Engine) -> list[Event]:
    events: list[Event] = []
    while engine.busy:
        events += engine.step()
    return events


# --- requests that start and end ----------------------------------------------------------------------------


def test_texts_that_join_later_are_written_as_if_alone() -> None:
    requests = requests_of(31, 9)
    expected = tokens_of([a_decoder(EntropyRouter(0.75)).generate(request) for request in requests])
    decoder = a_decoder(EntropyRouter(0.75), slots=3)
    engine = decoder.engine()
    assert not engine.busy
    assert engine.step() == []
    events: list[Event] = []
    for number, request in enumerate(requests):
        assert engine.add(request) == number
        for _ in range(number % 4):
            events += engine.step()
    events += run(engine)
    results = results_of(events)
    assert tokens_of([results[number] for number in range(9)]) == expected
    for number in range(9):
        mine = [event for event in events if event.index == number]
        assert tuple(event.token for event in mine) == expected[number]
        assert "".join(event.text for event in mine) == results[number].text
    assert empty(decoder)


def test_an_aborted_text_ends_with_what_it_has_and_the_others_go_on() -> None:
    requests = requests_of(32, 4, max_new_tokens=20)
    expected = tokens_of(single(1, 2).generate_all(requests))
    decoder = single(1, 2)
    engine = decoder.engine()
    for request in requests:
        engine.add(request)
    events = [event for _ in range(5) for event in engine.step()]
    engine.abort(0)  # is being written
    engine.abort(3)  # waits for a slot
    engine.abort(99)  # is nobody
    events += run(engine)
    results = results_of(events)
    assert [results[n].finish_reason for n in range(4)] == ["aborted", "length", "length", "aborted"]
    assert [results[n].trace.tokens for n in range(4)] == [expected[0][:5], expected[1], expected[2], ()]
    assert results[0].text == Letters().decode(list(expected[0][:5]))
    assert results[0].usage["large"].output_tokens == 5
    assert results[3].usage == {}
    last = next(event for event in events if event.index == 0 and event.result is not None)
    assert (last.token, last.model) == (None, "")
    engine.abort(1)
    assert engine.step() == [], "what has ended stays as it ended"
    assert empty(decoder)


def test_closing_an_engine_forgets_everything() -> None:
    decoder = a_decoder(EntropyRouter(0.75), slots=2)
    engine = decoder.engine()
    for request in requests_of(33, 5):
        engine.add(request)
    engine.step()
    engine.close()
    assert not engine.busy
    assert engine.step() == []
    assert empty(decoder)


def test_other_threads_add_and_abort_while_one_steps() -> None:
    """Four threads, 40 texts each; every text ends once, aborted or as it would have ended alone."""
    requests = [requests_of(40 + thread, 40, max_new_tokens=10) for thread in range(4)]
    decoder = single(1, 6)
    expected = [tokens_of(single(1, 6).generate_all(mine)) for mine in requests]
    engine = decoder.engine()
    numbers: list[dict[int, int]] = [{} for _ in requests]
    aborted: set[int] = set()

    def serve(thread: int) -> None:
        rng = random.Random(thread)
        for index, request in enumerate(requests[thread]):
            number = engine.add(request)
            numbers[thread][number] = index
            if rng.random() < 0.3:
                aborted.add(number)
                engine.abort(number)

    threads = [threading.Thread(target=serve, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    events: list[Event] = []
    assert engine.wait(120)
    while engine.busy or any(thread.is_alive() for thread in threads):
        events += engine.step()
    results = results_of(events)
    assert sorted(results) == list(range(160))
    for mine, texts in zip(numbers, expected, strict=True):
        for number, index in mine.items():
            tokens = results[number].trace.tokens
            if results[number].finish_reason == "aborted":
                assert number in aborted
                assert tokens == texts[index][: len(tokens)]
            else:
                assert tokens == texts[index]
    assert {result.finish_reason for result in results.values()} == {"aborted", "length"}
    assert empty(decoder)
    assert not engine.wait(0.01)


def test_soak() -> None:
    """500 texts at 8 streams with drafts, stop strings and aborts: no slot is lost, memory does not grow."""
    rng = random.Random(9)
    runners = [TorchRunner(build(seed=seed), slots=8, context=128) for seed in (1, NEAR + 1)]
    decoder = MixedDecoder(
        *runners,
        tokenizer=Letters(),
        router=EntropyRouter(0.75),
        draft=None,
        draft_cost=0.2,
        llm_batch=2,
        stop_ids=[5],
    )
    engine = decoder.engine()
    results: dict[int, Result] = {}
    traced: list[int] = []
    tracemalloc.start(1)
    for block in range(5):
        for _ in range(100):
            stop = tuple(chr(0x41 + rng.randrange(VOCABULARY)) for _ in range(rng.randrange(3)))
            sampling = Sampling(rng.choice([0, 1.0]), 0.95, 40, rng.randrange(1000))
            engine.add(Request(a_prompt(rng), rng.randrange(1, 16), sampling, stop))
        while engine.busy:
            ended = results_of(engine.step())
            assert not set(ended) & set(results)
            results |= {n: Result("", r.finish_reason, r.trace, {}, 0.0) for n, r in ended.items()}
            if rng.random() < 0.1:
                engine.abort(100 * block + rng.randrange(100))
            held = 8 - len(decoder.runners[1].free_slots)
            assert held == len(engine._active) <= 8
        assert empty(decoder)
        gc.collect()
        kept = sum(len(result.trace.tokens) for result in results.values())
        traced.append(tracemalloc.get_traced_memory()[0] - 200 * kept)
    tracemalloc.stop()
    assert sorted(results) == list(range(500))
    assert {result.finish_reason for result in results.values()} == {"stop", "length", "aborted"}
    assert max(traced[1:]) - traced[0] < 100_000, traced
    assert decoder.stats.accepted > 0


# --- waiting for the large model ----------------------------------------------------------------------------


@pytest.mark.parametrize("draft", [0, 2])
def test_the_large_model_waits_for_rows(draft: int) -> None:
    rng = random.Random(5)
    traces = [[rng.random() < 0.3 for _ in range(20)] for _ in range(8)]
    requests = [Request(a_prompt(rng), 20) for _ in traces]
    expected = [tuple(plain_text(r.prompt, t)) for r, t in zip(requests, traces, strict=True)]
    steps = []
    for llm_batch in (1, 4, 8):
        runners = [TorchRunner(build(seed=seed), slots=8) for seed in (1, 0)]
        decoder = MixedDecoder(
            *runners, tokenizer=Letters(), router=ReplayRouter(traces), draft=draft, llm_batch=llm_batch
        )
        assert tokens_of(decoder.generate_all(requests)) == expected
        assert decoder.stats.large.rows >= decoder.stats.large.steps
        steps.append(decoder.stats.large.steps)
    assert steps[0] > steps[1] > steps[2]


def test_one_text_does_not_wait_for_others_that_never_come() -> None:
    runners = [TorchRunner(build(seed=seed), slots=8) for seed in (1, 0)]
    decoder = MixedDecoder(*runners, tokenizer=Letters(), router=EntropyRouter(0.75), llm_batch=8)
    request = requests_of(34, 1)[0]
    assert (
        decoder.generate(request).trace.tokens
        == a_decoder(EntropyRouter(0.75)).generate(request).trace.tokens
    )
    assert decoder.stats.large.steps > 0


# --- loops --------------------------------------------------------------------------------------------------


def repeating() -> PreTrainedModel:
    """A model that always decodes token 0."""
    model = build()
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    return model


@pytest.mark.parametrize("draft", [0, 5])
def test_a_loop_ends_a_text(draft: int) -> None:
    pair = TorchRunner(repeating()), TorchRunner(repeating()) if draft else None
    decoder = MixedDecoder(*pair, tokenizer=Letters(), draft=draft)
    result = decoder.generate(Request([1, 2], 400))
    assert (result.finish_reason, len(result.trace.tokens)) == ("loop", 256)
    assert result.text == "A" * 256
    decoder.config = replace(decoder.config, loop_guard=None)
    result = decoder.generate(Request([1, 2], 400))
    assert (result.finish_reason, len(result.trace.tokens)) == ("length", 400)
    assert empty(decoder)


# --- failures -----------------------------------------------------------------------------------------------


def test_a_failed_allocation_in_the_middle_of_a_model_costs_one_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """The activations of a long prompt do not fit; the other sequences stay intact."""
    good = requests_of(36, 3, max_new_tokens=10)
    expected = tokens_of(single(1).generate_all(good))
    decoder = single(1, 3)
    layer = decoder.runners[1].model.model.layers[1]
    forward = layer.forward

    def short_of_memory(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if hidden.shape[0] * hidden.shape[1] > 200:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nAnd more lines.")
        return forward(hidden, *args, **kwargs)

    monkeypatch.setattr(layer, "forward", short_of_memory)
    results = decoder.generate_all([good[0], Request([3] * 300, 5), *good[1:]])
    assert [result.finish_reason for result in results] == ["length", "error", "length", "length"]
    assert tokens_of([results[0], *results[2:]]) == expected
    assert "CUDA out of memory" in str(results[1].error)
    assert "And more" not in str(results[1].error)
    assert empty(decoder)


def test_other_errors_are_not_taken_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = single(1)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(decoder.runners[1].model.model.layers[0].mlp, "forward", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        decoder.generate(Request([1, 2], 5))
    monkeypatch.undo()
    assert empty(decoder)
    assert decoder.generate(Request([1, 2], 5)).finish_reason == "length"


def test_an_error_before_the_first_layer_is_no_attention_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose layers have read their slots before: what fails now is something else."""
    decoder = single(1)
    assert decoder.generate(Request([1, 2], 5)).finish_reason == "length"

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(decoder.runners[1].model.get_input_embeddings(), "forward", broken)
    with pytest.raises(RuntimeError, match="illegal memory access") as failed:
        decoder.generate(Request([3, 4], 5))
    assert "attention" not in str(failed.value)


@pytest.mark.parametrize("model", [0, 1])
def test_damaged_weights_of_either_model_end_the_texts_that_need_it(model: int) -> None:
    damaged = build(seed=model)
    with torch.no_grad():
        damaged.get_output_embeddings().weight[7] = float("nan")
    runners = [TorchRunner(damaged if seed == model else build(seed=seed), slots=2) for seed in (1, 0)]
    decoder = MixedDecoder(
        *runners, tokenizer=Letters(), router=ReplayRouter([[False] * 6, [True] * 6]), names=("fast", "slow")
    )
    results = decoder.generate_all([Request([1, 2], 6), Request([3, 4], 6)])
    assert results[model].finish_reason == "error"
    assert results[1 - model].finish_reason == ("error" if model == 0 else "length")
    assert f"logits of {decoder.config.names[model]} are not finite" in str(results[model].error)
    assert empty(decoder)


def test_a_failed_call_of_a_local_model_raises_and_its_neighbours_are_given_first(
    tiny_catalogue: Catalogue,
) -> None:
    """So that the caller can release the cost reserved for the call."""
    pool = LocalModels(tiny_catalogue, slots=2)
    model = pool.model("tiny-large")
    chats: list[list[Message]] = [
        [{"role": "user", "content": text}] for text in ("one", "tw\N{BULLET}", "one")
    ]
    odd = next(iter(set(model.prompt(chats[1])) - set(model.prompt(chats[0]))))
    with torch.no_grad():
        pool.runner("tiny-large").model.get_input_embeddings().weight[odd] = float("nan")
    generation = Generation(max_new_tokens=3)
    with pytest.raises(ModelError, match="not finite"):
        model.generate(chats[1], generation)
    given: dict[int, Completion] = {}

    def take_all() -> None:
        for index, completion in model.generate_all(chats, generation):
            given[index] = completion

    with pytest.raises(ModelError, match="request 1"):
        take_all()
    assert sorted(given) == [0, 2]
    assert given[0].text == given[2].text == model.generate(chats[0], generation).text


# --- invalid requests ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": []}, "empty"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"stop": "END"}, "stop"),
        ({"stop": ["END"]}, "stop"),
        ({"stop": ("END", 3)}, "stop"),
        ({"stop": ("",)}, "stop"),
        ({"stop": None}, "stop"),
    ],
)
def test_a_request_that_makes_no_sense(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Request(**{"prompt": [1, 2], **values})


def test_a_request_that_does_not_fit_is_refused_when_it_is_added() -> None:
    engine = a_decoder(AlwaysSmall(), context=20).engine()
    with pytest.raises(PromptTooLong, match="20"):
        engine.add(Request([1] * 16, 5))
    for token in (-1, VOCABULARY):
        with pytest.raises(InputError, match=f"token {token};"):
            engine.add(Request([1, token, 2], 5))
    assert not engine.busy
    assert engine.add(Request([1] * 15, 5)) == 0
    assert [event.result.finish_reason for event in run(engine) if event.result] == ["length"]
