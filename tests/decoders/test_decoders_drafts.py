"""Drafts that the large model verifies: the same text and distribution as without, and their cost."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from tiny_models import (
    NEAR,
    VOCABULARY,
    Letters,
    a_prompt,
    build,
    empty,
    plain_logits,
    plain_stitch,
    plain_text,
    requests_of,
    single,
    tokens_of,
)
from transformers import Qwen2Config, Qwen2ForCausalLM

from viaticum.decoders import MixedDecoder, Request, Sampling, TorchRunner
from viaticum.decoders.sampling import distributions, sample, uniform
from viaticum.decoders.speculate import MAX_DRAFT, DraftLength, draft_speedups, verify
from viaticum.errors import InputError
from viaticum.routers.token import AlwaysLarge, DivergenceRouter, EntropyRouter, ReplayRouter, Step, entropy

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = NEAR + 1  # the large model, disturbed: most of its drafts are accepted


def pair(kind: str = "qwen2", slots: int = 1, **values: Any) -> MixedDecoder:
    large, small = TorchRunner(build(kind, 1), slots=slots), TorchRunner(build(kind, SMALL), slots=slots)
    return MixedDecoder(large, small, **{"tokenizer": Letters(), "draft_cost": 0.1, **values})


# --- greedy: the same tokens of the same models -------------------------------------------------------------


def settings(rng: random.Random) -> dict[str, Any]:
    return {
        "slots": rng.randrange(1, 7),
        "draft": rng.choice([1, 2, 3, 5, 20, None]),
        "llm_batch": rng.choice([1, 1, 2, 4]),
    }


@pytest.mark.parametrize("block", range(4))
@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma2"])
def test_drafts_change_no_greedy_text(kind: str, block: int) -> None:
    """25 texts a block, 300 in all: speculation, R-Stitch and recorded traces against uncached decoding."""
    rng = random.Random(f"{kind}{block}")
    length = rng.randrange(8, 14)
    requests = [Request(a_prompt(rng), length) for _ in range(8)]

    alone = pair(kind, **settings(rng))
    got = alone.generate_all(requests)
    assert tokens_of(got) == [tuple(plain_text(r.prompt, [True] * length, kind)) for r in requests]
    assert all(result.trace.made_by == (1,) * length for result in got)
    assert 0 < alone.stats.accepted < alone.stats.drafted, "else the models are too near or too far"

    tau = rng.choice([0.7, 0.74, 0.77])
    stitch = pair(kind, router=EntropyRouter(tau), **settings(rng))
    got = stitch.generate_all(requests)
    for request, result in zip(requests, got, strict=True):
        tokens, made_by = plain_stitch(request.prompt, length, tau, kind, SMALL)
        assert (list(result.trace.tokens), list(result.trace.made_by)) == (tokens, made_by)
    assert {model for result in got for model in result.trace.made_by} == {0, 1}
    assert stitch.stats.drafted > 0

    traces = [[rng.random() < 0.6 for _ in range(length)] for _ in range(9)]
    replayed = pair(kind, router=ReplayRouter(traces), **settings(rng))
    requests = [Request(a_prompt(rng), length) for _ in traces]
    for request, trace, result in zip(requests, traces, replayed.generate_all(requests), strict=True):
        assert result.trace.tokens == tuple(plain_text(request.prompt, trace, kind, SMALL))
        assert list(result.trace.made_by) == [int(large) for large in trace]
    assert empty(alone)
    assert empty(stitch)
    assert empty(replayed)


@pytest.mark.parametrize("tau", [0.0, 0.7, 0.75, 1.0])
def test_r_stitch_with_drafts_tells_what_it_tells_without(tau: float) -> None:
    requests = requests_of(21, 12, max_new_tokens=30)
    without = pair(slots=4, router=EntropyRouter(tau))
    expected = without.generate_all(requests)
    for draft in (1, 4, None):
        got = pair(slots=4, router=EntropyRouter(tau), draft=draft).generate_all(requests)
        for ours, theirs in zip(got, expected, strict=True):
            assert ours.trace.tokens == theirs.trace.tokens
            assert ours.trace.made_by == theirs.trace.made_by
            assert ours.trace.entropies == pytest.approx(theirs.trace.entropies, abs=1e-4)
            assert (ours.text, ours.usage, ours.finish_reason) == (
                theirs.text,
                theirs.usage,
                theirs.finish_reason,
            )


@pytest.mark.parametrize("draft", [1, 4, None])
def test_a_text_ends_inside_a_draft(draft: int | None) -> None:
    """By stop id, by stop string over two tokens of a draft, by length; nothing is appended after it."""
    prompt = [2, 7, 1, 8]
    tokens = plain_text(prompt, [True] * 20)
    text = Letters().decode(tokens)
    for at in range(2, 20):
        if tokens.index(tokens[at]) == at:
            decoder = pair(draft=draft, stop_ids=[tokens[at]])
            result = decoder.generate(Request(prompt, 20))
            assert (result.trace.tokens, result.finish_reason) == (tuple(tokens[: at + 1]), "stop")
            stop = text[at - 1 : at + 1]
            result = pair(draft=draft).generate(Request(prompt, 20, stop=(stop,)))
            assert (result.text, result.finish_reason) == (text[: text.index(stop)], "stop")
        result = pair(draft=draft).generate(Request(prompt, at))
        assert (result.trace.tokens, result.finish_reason) == (tuple(tokens[:at]), "length")


# --- calls and draft lengths --------------------------------------------------------------------------------


def test_a_model_that_drafts_for_itself_is_always_right() -> None:
    runners = TorchRunner(build(seed=1), slots=2), TorchRunner(build(seed=1), slots=2)
    decoder = MixedDecoder(*runners, tokenizer=Letters(), draft=4)
    requests = [Request([1, 2, 3], 20), Request([4, 5], 20)]
    results = decoder.generate_all(requests)
    assert tokens_of(results) == tokens_of(single(1).generate_all(requests))
    stats = decoder.stats
    assert stats.large.steps == 4  # five tokens a pass
    assert (stats.drafted, stats.accepted) == (32, 32)
    assert (stats.proposed, stats.dropped) == (0, 0)
    assert stats.large.rows == 8
    assert stats.small.steps == 16
    assert stats.large.tokens == 5 + 2 * 19
    assert stats.large.seconds > 0
    for result in results:
        assert result.trace.accepted == (True, True, True, True, False) * 4
        assert result.usage["large"].output_tokens == 20, "a verified draft is made by the large model"
        assert (result.usage["small"].input_tokens, result.usage["small"].output_tokens) == (
            result.usage["large"].input_tokens,
            0,
        )


def test_the_token_that_the_router_drops_is_the_first_draft() -> None:
    """With draft length 1 nothing else is drafted, so the small model is called no more than without."""
    requests = requests_of(22, 6, max_new_tokens=30)
    without = pair(router=EntropyRouter(0.75))
    with_it = pair(router=EntropyRouter(0.75), draft=1)
    assert tokens_of(without.generate_all(requests)) == tokens_of(with_it.generate_all(requests))
    assert 0 < with_it.stats.accepted < with_it.stats.drafted
    assert with_it.stats.large.steps < without.stats.large.steps


def test_the_small_model_forgets_what_was_not_accepted() -> None:
    """The small model's slot keeps the prefix common to both; the next draft does not start over."""
    decoder = pair(draft=4)
    small, large = decoder.runners[0], decoder.runners[1]
    request = Request(list(range(30)), 40)
    text = [*request.prompt, *single(1).generate(request).trace.tokens]
    for event in decoder.stream([request]):
        if event.result is None:
            assert small.cached_tokens[0] == text[: len(small.cached_tokens[0])]
            assert large.cached_tokens[0] == text[: len(large.cached_tokens[0])]
    stats = decoder.stats
    assert stats.small.tokens <= 30 + stats.small.rows + stats.large.rows
    assert stats.large.tokens <= 30 + stats.large.rows + stats.drafted
    assert stats.accepted < stats.drafted


def test_how_much_is_drafted_follows_the_acceptance() -> None:
    length = DraftLength(None, cost=0.1)
    first = length.choose(0, 50)
    for _ in range(40):
        length.update(drafted=4, made=5)
    assert length.acceptance > 0.95
    assert first < length.choose(0, 50) <= MAX_DRAFT
    for _ in range(40):
        length.update(drafted=4, made=1)
    assert length.acceptance < 0.1
    assert length.choose(0, 50) == 0
    assert length.choose(1, 50) == 1, "a token in hand costs nothing"
    assert 1 in [length.choose(0, 50) for _ in range(20)], "now and then it looks again"
    assert DraftLength(3, 0.1).choose(0, 50) == 3
    assert DraftLength(3, 0.1).choose(1, 2) == 2
    # Leviathan et al., theorem 3.8, but for the cost of verifying: (1 - a^(k+1)) / ((1 - a)(ck + 1)).
    assert draft_speedups(3, 0.5, 0, 0.2)[3] == pytest.approx((1 - 0.5**4) / 0.5 / (1 + 3 * 0.2 + 3 * 0.02))


def test_a_router_that_always_hands_back_drafts_nothing_more() -> None:
    decoder = pair(router=EveryThird(), draft=5)
    requests = requests_of(23, 5)
    got = decoder.generate_all(requests)
    for request, result in zip(requests, got, strict=True):
        tokens = list(request.prompt)
        for token, model, score in zip(
            result.trace.tokens, result.trace.made_by, result.trace.scores, strict=True
        ):
            proposed = int(plain_logits(tokens, seed=SMALL).argmax())
            assert model == int(proposed % 3 == 0)
            assert score == (1.0 if model else 0.25)
            assert token == (int(plain_logits(tokens, seed=1).argmax()) if model else proposed)
            tokens.append(token)
    assert 0 < decoder.stats.drafted <= decoder.stats.dropped  # the last position needs no draft
    assert decoder.stats.small.rows == decoder.stats.proposed


class EveryThird(DivergenceRouter):
    """Tokens that 3 divides diverge. Reads the same inputs as a learned router."""

    def score(self, step: Step) -> torch.Tensor:
        assert step.hidden is not None
        assert step.hidden.shape == (len(step.requests), 32)
        assert step.top_logits(10).shape == (len(step.requests), 10)
        assert torch.equal(step.top_logits(1)[:, 0], step.logits.max(-1).values)
        return torch.where(step.tokens % 3 == 0, 1.0, 0.25)


def test_a_token_that_was_judged_is_no_draft_of_sampled_text() -> None:
    decoder = pair(router=EveryThird(), draft=5)
    decoder.generate_all([Request([3, 4], 20, Sampling(1.0, seed=seed)) for seed in range(4)])
    assert decoder.stats.dropped > 0
    assert decoder.stats.drafted == 0


@pytest.mark.parametrize(
    "values", [{"draft": -1}, {"llm_batch": 0}, {"draft_cost": 0}, {"draft_cost": float("nan")}]
)
def test_settings_out_of_range(values: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        pair(**values)


def test_a_draft_needs_a_small_model() -> None:
    with pytest.raises(InputError, match="small"):
        MixedDecoder(TorchRunner(build()), tokenizer=Letters(), draft=None)


# --- damaged models -----------------------------------------------------------------------------------------


def test_a_draft_that_damages_the_large_model_leaves_no_mark() -> None:
    """The small model always drafts token 0, where the large one has NaN logits; it would not accept it."""
    large, small = build(seed=1), build(seed=0)
    with torch.no_grad():
        large.get_input_embeddings().weight[0] = float("nan")
        small.get_output_embeddings().weight.zero_()
    prompts = [p for p in ([n, n + 1] for n in range(1, 40)) if 0 not in plain_text(p, [True] * 12)][:5]
    assert len(prompts) == 5
    decoder = MixedDecoder(
        TorchRunner(large, slots=2), TorchRunner(small, slots=2), tokenizer=Letters(), draft=2
    )
    results = decoder.generate_all([Request(prompt, 12) for prompt in prompts])
    assert tokens_of(results) == [tuple(plain_text(prompt, [True] * 12)) for prompt in prompts]
    assert decoder.stats.small.rows == 10  # one draft a text
    assert decoder.stats.drafted == 0


def test_a_small_model_that_cannot_draft_is_not_asked_again() -> None:
    small = build(seed=0)
    with torch.no_grad():
        small.get_output_embeddings().weight[5] = float("nan")
    decoder = MixedDecoder(TorchRunner(build(seed=1)), TorchRunner(small), tokenizer=Letters(), draft=3)
    result = decoder.generate(Request([1, 2, 3], 12))
    assert result.trace.tokens == tuple(plain_text([1, 2, 3], [True] * 12))
    assert decoder.stats.small.steps == 1


# --- sampled: the same distribution -------------------------------------------------------------------------


def chi_square(counts: Counter[Any], expected: dict[Any, float], draws: int) -> tuple[float, float]:
    """The statistic and its 99.99% quantile (Wilson and Hilferty); rare cells are pooled."""
    assert sum(expected.values()) == pytest.approx(1, abs=1e-4)
    assert set(counts) <= {cell for cell, p in expected.items() if p > 0}, "what has no probability was drawn"
    often = {cell: p * draws for cell, p in expected.items() if p * draws >= 10}
    rest = draws - sum(often.values())
    got = [counts[cell] for cell in often] + [draws - sum(counts[cell] for cell in often)]
    wanted = [*often.values(), rest]
    if rest < 10:
        got[-2:], wanted[-2:] = [got[-2] + got[-1]], [wanted[-2] + rest]
    statistic = sum((g - w) ** 2 / w for g, w in zip(got, wanted, strict=True))
    degrees = len(wanted) - 1
    spread = 2 / (9 * degrees)
    return statistic, degrees * (1 - spread + 3.719 * math.sqrt(spread)) ** 3


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0),
        Sampling(0.6),
        Sampling(1.5, top_k=4),
        Sampling(1.0, top_p=0.7),
        Sampling(1.3, top_p=0.9, top_k=6),
    ],
)
def test_verified_tokens_follow_the_large_model(sampling: Sampling) -> None:
    """20,000 draws over 11 tokens: drafted from one distribution, verified against another."""
    draws = 20_000
    generator = torch.Generator().manual_seed(6)
    small, large = torch.randn(2, 11, generator=generator).mul(1.2)
    samplings = [sampling] * draws
    drafts, guesses = sample(small.expand(draws, 11), samplings, [uniform(1, n, 0) for n in range(draws)])
    numbers = [(uniform(1, n, 2), uniform(1, n, 3)) for n in range(draws)]
    tokens, accepted = verify(large.expand(draws, 11), samplings, drafts.tolist(), guesses, numbers)
    p = distributions(large[None], [sampling])[0]
    q = distributions(small[None], [sampling])[0]
    statistic, limit = chi_square(Counter(tokens.tolist()), dict(enumerate(p.tolist())), draws)
    assert statistic < limit
    assert torch.equal(tokens[accepted], drafts[accepted])
    # The share that is accepted is 1 - TV(p, q): Leviathan et al., corollary 3.6.
    assert float(accepted.float().mean()) == pytest.approx(float(torch.minimum(p, q).sum()), abs=0.015)


WORDS = 6


def tiny(seed: int) -> Qwen2ForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=WORDS,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.4,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
        return Qwen2ForCausalLM(config).eval()


def exact(prompt: list[int], length: int, sampling: Sampling, tau: float) -> dict[tuple[int, ...], float]:
    """Every text's probability by R-Stitch's definition, from uncached forwards; tau below 0: LLM alone."""
    models = tiny(0), tiny(1)

    @cache
    @torch.inference_mode()
    def after(model: int, tokens: tuple[int, ...]) -> tuple[list[float], bool]:
        logits = (
            models[model](input_ids=torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[:, -1].float()
        )
        return distributions(logits, [sampling])[0].tolist(), float(entropy(logits)) <= tau

    texts: dict[tuple[int, ...], float] = {}
    for text in itertools.product(range(WORDS), repeat=length):
        probability, active_model = 1.0, 0
        for at, token in enumerate(text):
            active_model = active_model if active_model == 0 and after(0, text[:at])[1] else 1
            shares, sure = after(active_model, text[:at])
            probability *= shares[token]
            active_model = 0 if sure else 1
        texts[text] = probability
    return texts


@pytest.mark.parametrize(("tau", "draft"), [(-1.0, 2), (0.75, None)])
def test_sampled_texts_have_their_exact_probability(tau: float, draft: int | None) -> None:
    """Over 20,000 tokens, in texts of three, with and without R-Stitch, against all 216 probabilities."""
    draws, prompt = 7_000, [3, 1]
    sampling = Sampling(1.1, top_p=0.95, top_k=5)
    decoder = MixedDecoder(
        TorchRunner(tiny(1), slots=40, context=8),
        TorchRunner(tiny(0), slots=40, context=8),
        tokenizer=Letters(),
        router=AlwaysLarge() if tau < 0 else EntropyRouter(tau),
        draft=draft,
        draft_cost=0.1,
        loop_guard=None,
    )
    requests = [Request(prompt, 3, Sampling(1.1, 0.95, 5, seed)) for seed in range(draws)]
    counts = Counter(tokens_of(decoder.generate_all(requests)))
    expected = exact(prompt, 3, sampling, tau)
    statistic, limit = chi_square(counts, expected, draws)
    assert statistic < limit
    for at in range(3):  # fewer cells see a smaller slant
        seen: Counter[int] = Counter()
        shares = dict.fromkeys(range(WORDS), 0.0)
        for text, probability in expected.items():
            shares[text[at]] += probability
            seen[text[at]] += counts[text]
        statistic, limit = chi_square(+seen, shares, draws)
        assert statistic < limit
    assert 0.2 < decoder.stats.accepted / decoder.stats.drafted < 0.95
    assert decoder.stats.drafted > 0.2 * draws


@pytest.mark.parametrize("draft", [0, 3, None])
@pytest.mark.parametrize("router", [AlwaysLarge(), EntropyRouter(0.75)])
def test_a_seed_gives_one_text_in_any_company(draft: int | None, router: EntropyRouter) -> None:
    rng = random.Random(8)
    requests = [Request(a_prompt(rng), 16, Sampling(1.0, 0.95, 40, seed)) for seed in range(8)]
    expected = tokens_of([pair(draft=draft, router=router).generate(request) for request in requests])
    assert len(set(expected)) == 8
    for slots, llm_batch in ((3, 1), (8, 3), (5, 8)):
        decoder = pair(draft=draft, router=router, slots=slots, llm_batch=llm_batch)
        assert tokens_of(decoder.generate_all(requests)) == expected
    greedy = [Request(a_prompt(rng), 30) for _ in range(4)]
    mixed = [request for both in zip(requests[:4], greedy, strict=True) for request in both]
    assert tokens_of(pair(draft=draft, router=router, slots=8).generate_all(mixed))[::2] == expected[:4]


def test_the_vocabulary_of_the_tests_is_one_that_text_can_show() -> None:
    assert len(set(Letters().decode(list(range(VOCABULARY))))) == VOCABULARY


def rows(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor([list(values)])


def test_a_draft_is_never_taken_where_the_large_model_has_no_probability() -> None:
    sampling = Sampling(1.0)
    large, small = rows([0.0, 1.0, 0.0]).log(), rows([1.0, 0.0, 0.0])[0]
    tokens, accepted = verify(large, [sampling], [0], {0: small}, [(0.0, 0.5)])
    assert (tokens.tolist(), accepted.tolist()) == ([1], [False])
    same = rows([0.25, 0.25, 0.5])
    tokens, accepted = verify(same.log(), [sampling], [2], {0: same[0]}, [(1 - 2**-24, 0.99)])
    assert accepted.tolist() == [True]
