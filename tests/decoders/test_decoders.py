"""The runner and the mixed decoder against decoding without any cache, on tiny random models."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import (
    CONFIGS,
    VOCABULARY,
    Letters,
    a_decoder,
    a_prompt,
    build,
    empty,
    plain_logits,
    plain_text,
    requests_of,
    single,
    tokens_of,
)
from torch import Tensor
from transformers import PreTrainedModel

from viaticum.decoders import (
    MixedDecoder,
    Request,
    Result,
    Runner,
    RunnerOutput,
    Sampling,
    TorchRunner,
    torch_runner,
)
from viaticum.errors import InputError, ModelError, PromptTooLong
from viaticum.routers.token import AlwaysLarge, AlwaysSmall, EntropyRouter, ReplayRouter, Step, TokenRouter

pytestmark = pytest.mark.usefixtures("one_thread")

# --- the runner ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [16, 1024])
@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_ragged_calls_equal_a_forward_without_cache(
    kind: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_runner, "PREFILL_TOKENS", width)
    rng = random.Random(f"{kind}{width}")
    under_test = TorchRunner(build(kind), slots=5)
    held: list[list[int]] = [[] for _ in range(5)]
    for _ in range(40):
        slots = rng.sample(range(5), rng.randrange(1, 6))
        for slot in slots:
            if rng.random() < 0.15:
                under_test.reset(slot)
                held[slot] = []
        new = [a_prompt(rng, rng.choice([1, 1, 3, 45])) for _ in slots]
        got = under_test.extend(slots, new)
        assert got.dtype == torch.float32
        assert got.shape == (len(slots), VOCABULARY)
        for row, slot in enumerate(slots):
            held[slot] += new[row]
            torch.testing.assert_close(got[row], plain_logits(held[slot], kind), atol=2e-4, rtol=1e-3)
        assert under_test.cached_tokens == held


def test_a_sequence_starts_from_what_any_slot_holds() -> None:
    under_test = TorchRunner(build(), slots=3)
    prompt = list(range(30))
    under_test.extend([0], [prompt])
    under_test.extend([1], [prompt[:5]])
    under_test.reuse_prefix(2, [*prompt[:20], 5, 6])
    assert under_test.cached_tokens == [prompt, prompt[:5], prompt[:20]]
    got = under_test.extend([2], [[5, 6]])
    torch.testing.assert_close(got[0], plain_logits([*prompt[:20], 5, 6]), atol=2e-4, rtol=1e-3)
    under_test.reuse_prefix(1, prompt)
    assert under_test.cached_tokens[1] == prompt[:-1], "the last token is read again: its logits are wanted"
    got = under_test.extend([1], [prompt[-1:]])
    torch.testing.assert_close(got[0], plain_logits(prompt), atol=2e-4, rtol=1e-3)
    under_test.reuse_prefix(1, [90, 91])
    assert under_test.cached_tokens == [prompt, [], [*prompt[:20], 5, 6]]


def test_runner_refuses_what_does_not_fit_and_changes_nothing() -> None:
    under_test = TorchRunner(build(), slots=2, context=10)
    under_test.extend([0], [[1] * 8])
    with pytest.raises(PromptTooLong):
        under_test.extend([1, 0], [[1], [1, 2, 3]])
    with pytest.raises(InputError):
        under_test.extend([0], [[]])
    with pytest.raises(InputError):
        TorchRunner(build(), slots=0)
    assert under_test.cached_tokens == [[1] * 8, []]
    assert under_test.calls == 1


def damaged(seed: int, token: int) -> PreTrainedModel:
    """A model whose embedding of one token is NaN, so that keys and values are NaN as well."""
    model = build(seed=seed)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
        if model.config.tie_word_embeddings:
            raise AssertionError("tied weights would damage every logit")
    return model


def test_nan_leaves_other_rows_and_later_sequences_alone() -> None:
    under_test = TorchRunner(damaged(0, 96), slots=3)
    under_test.extend([2], [[4, 5]])
    with pytest.raises(ModelError, match=r"\[1\]"):
        under_test.extend([0, 1], [[1, 2, 3], [1] * 6 + [96] * 6])
    assert [len(tokens) for tokens in under_test.cached_tokens] == [3, 0, 2]
    got = under_test.extend(
        [0, 1, 2], [[7], [8], [9] * 30]
    )  # slot 1 is read with 32 keys, most of them stale
    for row, tokens in enumerate([[1, 2, 3, 7], [8], [4, 5] + [9] * 30]):
        torch.testing.assert_close(got[row], plain_logits(tokens), atol=2e-4, rtol=1e-3)


# --- which model decodes which token ------------------------------------------------------------------------


@pytest.mark.parametrize("block", range(10))
def test_replayed_traces_equal_decoding_without_cache(block: int) -> None:
    """20 traces a block, 200 in all: each alone and all in few slots."""
    rng = random.Random(block)
    requests, traces = [], []
    for _ in range(20):
        length = rng.randrange(1, 15)
        share = rng.choice([0.1, 0.5, 0.9])
        traces.append([rng.random() < share for _ in range(length)])
        requests.append(Request(a_prompt(rng), max_new_tokens=length))
    expected = [tuple(plain_text(r.prompt, t)) for r, t in zip(requests, traces, strict=True)]
    several = a_decoder(ReplayRouter(traces), slots=rng.randrange(2, 7))
    for got, tokens, large, request in zip(
        several.generate_all(requests), expected, traces, requests, strict=True
    ):
        assert got.trace.tokens == tokens
        assert list(got.trace.made_by) == [int(each) for each in large]
        assert got.usage["large"].output_tokens == sum(large) if any(large) else "large" not in got.usage
        assert got.usage["small"].input_tokens == len(request.prompt)
        assert got.text == Letters().decode(list(tokens))
        assert got.finish_reason == "length"
    assert empty(several)
    alone = a_decoder(None)
    for request, large, tokens in zip(requests, traces, expected, strict=True):
        alone.config = replace(alone.config, router=ReplayRouter([large]))
        got = alone.generate(request)
        assert got.trace.tokens == tokens
        assert list(got.trace.made_by) == [int(each) for each in large]
    assert empty(alone)


def test_events_tell_the_same_as_the_results() -> None:
    requests = requests_of(3, 7)
    decoder = a_decoder(EntropyRouter(0.75), slots=3)
    tokens: dict[int, list[int]] = {}
    names: dict[int, list[str]] = {}
    texts: dict[int, str] = {}
    results: dict[int, Result] = {}
    for event in decoder.stream(requests):
        assert event.index not in results
        assert event.token is not None
        tokens.setdefault(event.index, []).append(event.token)
        names.setdefault(event.index, []).append(event.model)
        texts[event.index] = texts.get(event.index, "") + event.text
        if event.result is not None:
            results[event.index] = event.result
    assert sorted(results) == list(range(7))
    for index, result in results.items():
        assert tuple(tokens[index]) == result.trace.tokens
        assert names[index] == [result.trace.models[model] for model in result.trace.made_by]
        assert texts[index] == result.text
    made_by = {model for result in results.values() for model in result.trace.made_by}
    assert made_by == {0, 1}  # else the threshold tests nothing


@pytest.mark.parametrize(("router", "seed", "idle"), [(AlwaysSmall(), 0, 1), (AlwaysLarge(), 1, 0)])
@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("temperature", [0, 1])
def test_one_model_alone(router: TokenRouter, seed: int, idle: int, slots: int, temperature: float) -> None:
    requests = [
        Request(request.prompt, 12, Sampling(temperature=temperature, seed=index))
        for index, request in enumerate(requests_of(5, 5))
    ]
    pair = a_decoder(router, slots)
    got = pair.generate_all(requests)
    assert tokens_of(got) == tokens_of(single(seed).generate_all(requests))
    assert pair.runners[idle].calls == 0
    assert all(set(result.usage) == {pair.config.names[seed]} for result in got) or temperature
    if not temperature:
        assert tokens_of(got) == [tuple(plain_text(r.prompt, [bool(seed)] * 12)) for r in requests]


class DropOnce(TokenRouter):
    """The SLM proposes everywhere; its token at `at` is dropped and the LLM decodes that one."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.dropped: list[int] = []

    def keep_small(self, step: Step) -> Tensor:
        keep = [position != self.at for position in step.positions]
        self.dropped += [token for token, kept in zip(step.tokens.tolist(), keep, strict=True) if not kept]
        return torch.tensor(keep)

    def hand_back(self, step: Step) -> Tensor:
        return torch.ones(len(step.positions), dtype=torch.bool)


@pytest.mark.parametrize("at", [0, 1, 5])
def test_a_dropped_token_leaves_no_mark(at: int) -> None:
    prompt = [3, 1, 4, 1, 5]
    router = DropOnce(at)
    decoder = a_decoder(router)
    small, large = decoder.runners[0], decoder.runners[1]
    made = []
    for event in decoder.stream([Request(prompt, max_new_tokens=9)]):
        made.append(event.token)
        if len(made) == at + 1 and event.result is None:
            # No model read the dropped token: both hold the prompt and the tokens kept before it.
            assert small.cached_tokens == large.cached_tokens == [prompt + made[:-1]]
    expected = plain_text(prompt, [position == at for position in range(9)])
    assert made == expected
    assert len(router.dropped) == 1
    assert router.dropped[0] == plain_text(prompt, [False] * (at + 1))[-1]


def test_a_dropped_stop_id_does_not_end_the_text() -> None:
    prompt = [3, 1, 4, 1, 5]
    proposed = plain_text(prompt, [False])[0]
    written = plain_text(prompt, [True])[0]
    assert proposed != written
    result = a_decoder(DropOnce(0), stop_ids=[proposed]).generate(Request(prompt, max_new_tokens=1))
    assert result.trace.tokens == (written,)
    assert result.finish_reason == "length"


# --- sampling -----------------------------------------------------------------------------------------------


def test_sampled_text_depends_on_the_seed_alone() -> None:
    rng = random.Random(8)
    requests = [Request(a_prompt(rng), 12, Sampling(1.0, 0.95, 40, seed)) for seed in range(6)]
    first = tokens_of(a_decoder(EntropyRouter(0.75), slots=3).generate_all(requests))
    decoder = a_decoder(EntropyRouter(0.75))
    assert tokens_of(decoder.generate_all(requests)) == first
    assert tokens_of([decoder.generate(request) for request in requests]) == first
    other = [Request(r.prompt, 12, Sampling(1.0, 0.95, 40, 99)) for r in requests]
    assert tokens_of(decoder.generate_all(other)) != first


@pytest.mark.parametrize("at", [0, 5])
def test_a_dropped_draw_leaves_no_mark_on_later_ones(at: int) -> None:
    """Where all tokens are equally likely the randomness alone decides."""
    uniform = build()
    with torch.no_grad():
        uniform.get_output_embeddings().weight.zero_()
    request = Request([7, 8], 20, Sampling(1.0, seed=3))
    alone = MixedDecoder(TorchRunner(uniform), tokenizer=Letters()).generate(request).trace.tokens
    router = DropOnce(at)
    pair = MixedDecoder(TorchRunner(uniform), TorchRunner(uniform), tokenizer=Letters(), router=router)
    tokens = pair.generate(request).trace.tokens
    assert router.dropped == [alone[at]]
    assert tokens[at] != alone[at]  # the second draw is a new one
    assert tokens[:at] + tokens[at + 1 :] == alone[:at] + alone[at + 1 :]
    assert len(set(alone)) > 10


# --- how a text ends ----------------------------------------------------------------------------------------


def test_ends_by_length_stop_id_and_stop_string() -> None:
    prompt = [2, 7, 1, 8]
    tokens = plain_text(prompt, [True] * 12)
    text = Letters().decode(tokens)
    decoder = single(1)
    full = decoder.generate(Request(prompt, 12))
    assert (full.text, full.finish_reason) == (text, "length")
    at = max(i for i in range(12) if tokens.index(tokens[i]) == i)  # the last token seen for the first time
    assert at > 1
    decoder.config = replace(decoder.config, stop_ids=frozenset([tokens[at]]))
    by_id = decoder.generate(Request(prompt, 12))
    assert (by_id.text, by_id.finish_reason) == (text[:at], "stop")
    assert by_id.trace.tokens == tuple(tokens[: at + 1])
    assert by_id.usage["large"].output_tokens == at + 1
    decoder.config = replace(decoder.config, stop_ids=frozenset())
    stop = text[at - 1 : at + 1]  # over a token border
    events = list(decoder.stream([Request(prompt, 12, stop=("never", stop))]))
    by_text = events[-1].result
    assert by_text is not None
    assert (by_text.text, by_text.finish_reason) == (text[: text.index(stop)], "stop")
    assert "".join(event.text for event in events) == by_text.text
    assert by_text.trace.tokens == tuple(tokens[: at + 1])
    one = decoder.generate(Request(prompt, 1))
    assert (one.text, one.finish_reason) == (text[:1], "length")


class Broken:
    """The last character of any text is incomplete bytes."""

    def decode(self, token_ids: list[int]) -> str:
        return Letters().decode(token_ids) + "\ufffd" if token_ids else ""


def test_text_is_streamed_to_its_last_byte() -> None:
    decoder = single(1)
    decoder.config = replace(decoder.config, tokenizer=Broken())
    events = list(decoder.stream([Request([2, 7, 1, 8], 3)]))
    assert events[-1].result is not None
    assert "".join(event.text for event in events) == events[-1].result.text
    assert events[-1].result.text.endswith("\ufffd")


def test_a_stop_string_in_the_last_bytes_is_a_stop() -> None:
    decoder = single(1)
    first = Letters().decode(plain_text([2, 7, 1, 8], [True]))
    decoder.config = replace(decoder.config, tokenizer=Broken())
    result = decoder.generate(Request([2, 7, 1, 8], 1, stop=(first,)))
    assert (result.text, result.finish_reason) == ("", "stop")


# --- errors and clean slots ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values", [{"prompt": []}, {"prompt": [1], "max_new_tokens": 0}, {"prompt": [1], "stop": ("",)}]
)
def test_requests_out_of_range(values: dict[str, list[int]]) -> None:
    with pytest.raises(InputError):
        Request(**values)  # type: ignore[arg-type]


def test_too_long_a_prompt_is_refused_before_anything_is_computed() -> None:
    decoder = a_decoder(EntropyRouter(), context=20)
    with pytest.raises(PromptTooLong):
        decoder.generate_all([Request([1], 5), Request([1] * 16, 5)])
    assert [each.calls for each in decoder.runners.values()] == [0, 0]
    assert len(decoder.generate(Request([1] * 15, 5)).trace.tokens) == 5


def test_a_pair_needs_two_models() -> None:
    with pytest.raises(InputError, match="small"):
        MixedDecoder(TorchRunner(build()), tokenizer=Letters(), router=EntropyRouter())


def test_nan_ends_one_text_and_no_other() -> None:
    good = [Request([1, 2, 3], 4), Request([4], 4), Request([9] * 30, 4)]
    expected = tokens_of(single(1, 3).generate_all(good))
    bad = next(i for i in range(10, VOCABULARY) if not any(i in tokens for tokens in expected))
    decoder = MixedDecoder(TorchRunner(damaged(1, bad), slots=3), tokenizer=Letters())
    for _ in range(2):
        results = decoder.generate_all([good[0], Request([bad] * 20, 4), Request([bad] * 9, 4), good[2]])
        assert [result.finish_reason for result in results] == ["length", "error", "error", "length"]
        assert tokens_of(results) == [expected[0], (), (), expected[2]]
        assert results[1].usage["large"].output_tokens == 0
        assert str(results[2].error).startswith(
            "request 2: the logits of large are not finite after 9 tokens"
        )
        assert empty(decoder)
        with pytest.raises(ModelError, match="not finite"):
            decoder.generate(Request([bad], 4))
        assert empty(decoder)
        assert tokens_of(decoder.generate_all(good)) == expected


def test_closing_a_stream_frees_every_slot() -> None:
    requests = requests_of(4, 6, max_new_tokens=20)
    fresh = tokens_of(a_decoder(EntropyRouter(0.75), slots=3).generate_all(requests))
    decoder = a_decoder(EntropyRouter(0.75), slots=3)
    for events in (1, 2, 7, 50):
        stream = decoder.stream(requests_of(events, 5, max_new_tokens=20))
        for _ in range(events):
            next(stream)
        assert not empty(decoder)
        stream.close()  # type: ignore[attr-defined]
        assert empty(decoder)
        assert tokens_of(decoder.generate_all(requests)) == fresh


@pytest.mark.parametrize("slots", [1, 3])
def test_a_shared_prefix_changes_nothing(slots: int) -> None:
    rng = random.Random(11)
    prefix = [rng.randrange(VOCABULARY) for _ in range(24)]
    prompts = [prefix, *(prefix + a_prompt(rng) for _ in range(6))]
    requests = [Request(prompt, 8) for prompt in prompts]
    traces = [[rng.random() < 0.5 for _ in range(8)] for _ in prompts]
    decoder = a_decoder(ReplayRouter(traces), slots)
    expected = [tuple(plain_text(prompt, large)) for prompt, large in zip(prompts, traces, strict=True)]
    assert tokens_of(decoder.generate_all(requests)) == expected
    assert empty(decoder)


def tokens_read(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each call of the runner reads from now on."""
    original, read = runner.forward, list[int]()

    def counted(
        slots: Sequence[int], tokens: Sequence[Sequence[int]], *args: Any, **kwargs: Any
    ) -> RunnerOutput:
        read.append(sum(map(len, tokens)))
        return original(slots, tokens, *args, **kwargs)

    monkeypatch.setattr(runner, "forward", counted)
    return read


def test_what_a_slot_still_holds_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [number % VOCABULARY for number in range(40)]
    requests = [Request([*examples, 50 + n, 3], max_new_tokens=6) for n in range(6)]
    decoder = a_decoder(EntropyRouter(0.75), slots=2)
    read = tokens_read(decoder.runners[1], monkeypatch)
    for request in requests:
        assert (
            decoder.generate(request).trace.tokens
            == a_decoder(EntropyRouter(0.75)).generate(request).trace.tokens
        )
    assert sum(read) < 2 * len(examples) + 6 * 8


def test_decoders_that_share_a_runner_keep_out_of_each_others_slots() -> None:
    small, large = TorchRunner(build(seed=0), slots=2), TorchRunner(build(seed=1), slots=2)
    pair = MixedDecoder(large, small, tokenizer=Letters(), router=EntropyRouter(0.75))
    alone = MixedDecoder(large, tokenizer=Letters())
    first, second = requests_of(11, 2)
    expected = [
        a_decoder(EntropyRouter(0.75)).generate(first).trace.tokens,
        single(1).generate(second).trace.tokens,
    ]
    begun = pair.stream([first])
    tokens = [next(begun).token]
    assert alone.generate(second).trace.tokens == expected[1]
    begun_too = alone.stream([second])
    next(begun_too)
    with pytest.raises(ModelError, match="in use"):
        alone.generate(second)
    begun_too.close()
    tokens += [event.token for event in begun]
    assert tuple(tokens) == expected[0]
    assert empty(pair)


@pytest.mark.parametrize("slots", [6, 12])
def test_prefixes_of_several_kinds_of_prompts_are_read_once_each(
    slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three strategies' examples in one admission, and prompts that have nothing in common with others.

    All begin alike, as the prompts of one chat template do. A second round reads no prefix again.
    """
    rng = random.Random(13)
    template = [rng.randrange(VOCABULARY) for _ in range(20)]
    kinds = [template + [rng.randrange(VOCABULARY) for _ in range(length)] for length in (60, 45, 30)]
    decoder = MixedDecoder(TorchRunner(build(), slots=slots), tokenizer=Letters())
    read = tokens_read(decoder.runners[1], monkeypatch)
    for prefixes in (20 + 60 + 45 + 30, 0):
        read.clear()
        prompts = [[*kinds[n % 3], *(rng.randrange(VOCABULARY) for _ in range(3))] for n in range(5)]
        prompts.append([rng.randrange(VOCABULARY) for _ in range(7)])
        results = decoder.generate_all([Request(prompt, 4) for prompt in prompts])
        alone = [
            MixedDecoder(TorchRunner(build()), tokenizer=Letters()).generate(Request(each, 4))
            for each in prompts
        ]
        assert tokens_of(results) == tokens_of(alone)
        assert sum(read) <= prefixes + 5 * 3 + 7 + 6 * 4


def test_a_few_tokens_in_common_do_not_cost_another_prompt_its_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(17)
    template = [rng.randrange(VOCABULARY) for _ in range(5)]
    kinds = [template + [rng.randrange(VOCABULARY) for _ in range(40)] for _ in range(3)]
    decoder = MixedDecoder(TorchRunner(build(), slots=3), tokenizer=Letters())
    for kind in kinds:
        decoder.generate(Request([*kind, 1, 2], 3))
    read = tokens_read(decoder.runners[1], monkeypatch)
    for kind in kinds:
        decoder.generate(Request([*kind, 3, 4], 3))
    assert sum(read) <= 3 * (2 + 3), "each of the three prompts was still held"
