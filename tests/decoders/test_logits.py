"""Penalties, biases and log-probabilities, against plain loops over models without a cache."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from tiny_models import NEAR, VOCABULARY, Letters, a_prompt, build, plain_logits
from transformers import RepetitionPenaltyLogitsProcessor

from viaticum.decoders import MixedDecoder, Request, Sampling, TorchRunner
from viaticum.decoders.logits import LogitAdjuster, adjust
from viaticum.errors import InputError
from viaticum.routers.token import AlwaysLarge, EntropyRouter, TokenRouter, entropy

TAU = 0.75
PENALTIES = Sampling(frequency_penalty=0.9, presence_penalty=-0.4, repetition_penalty=1.3)


def by_hand(logits: torch.Tensor, sampling: Sampling, prompt: list[int], output: list[int]) -> torch.Tensor:
    """One row [V], a token at a time."""
    values = logits.clone()
    for token, bias in sampling.logit_bias:
        values[token] += -torch.inf if bias == -100 else bias
    if sampling.repetition_penalty != 1:
        processor = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
        values = processor(torch.tensor([[*prompt, *output]]), values[None])[0]
    for token in set(output):
        values[token] -= sampling.frequency_penalty * output.count(token) + sampling.presence_penalty
    return values


def a_decoder(router: TokenRouter, draft: int = 0, slots: int = 1) -> MixedDecoder:
    return MixedDecoder(
        TorchRunner(build(seed=1), slots=slots),
        TorchRunner(build(seed=NEAR + 1), slots=slots),
        tokenizer=Letters(),
        router=router,
        draft=draft,
        loop_guard=None,
    )


def test_rows_are_adjusted_as_by_hand() -> None:
    rng = random.Random(1)
    torch.manual_seed(1)
    rows, expected = [], []
    logits = 3 * torch.randn(40, VOCABULARY)
    for row in range(40):
        sampling = Sampling(
            frequency_penalty=rng.choice([0, 0.7, -1]),
            presence_penalty=rng.choice([0, 1.1]),
            repetition_penalty=rng.choice([1, 1.2, 0.8]),
            logit_bias=rng.choice([(), ((3, 4.0), (9, -100.0))]),
        )
        prompt, output, ahead = ([rng.randrange(12) for _ in range(rng.randrange(1, 9))] for _ in range(3))
        adjuster = LogitAdjuster(sampling, len(prompt)) if sampling.adjusts_logits else None
        if adjuster is not None:  # counted in two parts
            adjust(logits[:1], [(adjuster, [*prompt, *output[:2]], [])])
        rows.append((adjuster, [*prompt, *output], ahead))
        expected.append(by_hand(logits[row], sampling, prompt, [*output, *ahead]))
    assert torch.allclose(adjust(logits, rows), torch.stack(expected), atol=1e-5)
    assert adjust(logits, [(None, [1], [])] * 40) is logits


@pytest.mark.parametrize("draft", [0, 4])
def test_greedy_texts_are_those_of_a_plain_loop(draft: int) -> None:
    rng = random.Random(draft)
    decoder = a_decoder(AlwaysLarge(), draft, slots=3)
    samplings = [
        replace(PENALTIES, logit_bias=((rng.randrange(VOCABULARY), 2.0),)),
        Sampling(presence_penalty=2, logit_bias=((rng.randrange(VOCABULARY), -100.0),)),
        Sampling(),
    ]
    requests = [Request(a_prompt(rng), max_new_tokens=16, sampling=each) for each in samplings]
    for request, result in zip(requests, decoder.generate_all(requests), strict=True):
        prompt, output = list(request.prompt), []
        for _ in range(16):
            logits = plain_logits([*prompt, *output], seed=1)
            output.append(int(by_hand(logits, request.sampling, prompt, output).argmax()))
        assert list(result.trace.tokens) == output
    if draft:
        assert decoder.stats.accepted > 0


def test_the_router_sees_the_models_own_logits() -> None:
    decoder = a_decoder(EntropyRouter(TAU), draft=2)
    request = Request([5, 6, 7], max_new_tokens=20, sampling=PENALTIES)
    trace = decoder.generate(request).trace
    tokens = [5, 6, 7]
    for token, maker, shown in zip(trace.tokens, trace.made_by, trace.entropies, strict=True):
        logits = plain_logits(tokens, seed=1 if maker else NEAR + 1)
        assert shown == pytest.approx(float(entropy(logits[None])), abs=1e-4)
        assert token == int(by_hand(logits, PENALTIES, [5, 6, 7], tokens[3:]).argmax())
        tokens.append(token)
    assert 0 < sum(trace.made_by) < 20


@pytest.mark.parametrize("draft", [0, 3])
def test_sampled_texts_keep_their_distribution(draft: int) -> None:
    """Of the second token: the first one's count has to reach both models' distributions."""
    sampling = Sampling(1.0, top_k=3, frequency_penalty=1.5, repetition_penalty=1.2)
    decoder = a_decoder(AlwaysLarge(), draft, slots=100)
    draws = 700
    requests = [Request([1, 2], 3, replace(sampling, seed=n)) for n in range(draws)]
    pairs = [result.trace.tokens[:2] for result in decoder.generate_all(requests)]
    first = torch.softmax(_top(by_hand(plain_logits([1, 2], seed=1), sampling, [1, 2], [])), 0)
    for token in first.nonzero()[:, 0].tolist():
        logits = by_hand(plain_logits([1, 2, token], seed=1), sampling, [1, 2], [token])
        second = torch.softmax(_top(logits), 0)
        for following in second.nonzero()[:, 0].tolist():
            chance = float(first[token] * second[following])
            found = pairs.count((token, following)) / draws
            assert abs(found - chance) < 4.5 * (chance * (1 - chance) / draws) ** 0.5 + 1e-3


def _top(logits: torch.Tensor) -> torch.Tensor:
    return logits.masked_fill(logits < logits.topk(3).values[-1], -torch.inf)


def test_biases_ban_and_force() -> None:
    decoder = a_decoder(AlwaysLarge(), draft=2)

    def tokens(*biases: tuple[int, float], temperature: float = 0) -> set[int]:
        request = Request([1, 2, 3], 24, Sampling(temperature, logit_bias=biases, seed=3))
        return set(decoder.generate(request).trace.tokens)

    plain = tokens()
    assert not tokens(*((token, -100.0) for token in plain)) & plain
    assert tokens((11, 100.0)) == {11}
    assert tokens((11, 100.0), (12, 100.0), (13, 99.0), temperature=1.5) == {11, 12}


@pytest.mark.parametrize("router", [AlwaysLarge(), EntropyRouter(TAU)])
def test_logprobs_are_those_of_the_model_that_made_the_token(router: TokenRouter) -> None:
    decoder = a_decoder(router, draft=2, slots=2)
    sampling = Sampling(0.8, seed=4, frequency_penalty=0.5)
    wanted, unwanted, bare = decoder.generate_all(
        [Request([5, 6], 15, sampling, logprobs=3), Request([5, 6], 15), Request([7], 4, logprobs=0)]
    )
    assert (unwanted.logprobs, len(bare.logprobs), bare.logprobs[0].top) == ((), 4, ())
    tokens = [5, 6]
    for token, maker, found in zip(wanted.trace.tokens, wanted.trace.made_by, wanted.logprobs, strict=True):
        logprobs = plain_logits(tokens, seed=1 if maker else NEAR + 1).log_softmax(0)
        assert found.token == token
        assert found.logprob == pytest.approx(float(logprobs[token]), abs=1e-4)
        best = logprobs.topk(3)
        assert [each for each, _ in found.top] == best.indices.tolist()
        assert [value for _, value in found.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        tokens.append(token)


@pytest.mark.parametrize(
    "wrong",
    [
        {"frequency_penalty": 2.5},
        {"presence_penalty": float("nan")},
        {"repetition_penalty": 0},
        {"logit_bias": ((1, 101.0),)},
    ],
)
def test_values_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]


def test_requests_that_cannot_be_computed() -> None:
    decoder = a_decoder(AlwaysLarge())
    with pytest.raises(InputError, match="from 0 to 96"):
        decoder.check(Request([1], sampling=Sampling(logit_bias=((VOCABULARY, 1.0),))))
    biases = tuple((token, -100.0) for token in range(VOCABULARY))
    with pytest.raises(InputError, match="bans every token"):
        decoder.check(Request([1], sampling=Sampling(logit_bias=biases)))
    with pytest.raises(InputError, match="logprobs"):
        Request([1], logprobs=21)
