"""The mode of a pair that changes while texts are decoded, and how it is chosen."""

from __future__ import annotations

import random

import pytest
import torch
from tiny_models import NEAR, Letters, build, empty, plain_logits, requests_of, tokens_of

from viaticum.decoders import MixedDecoder, Request, Sampling, Stats, TorchRunner
from viaticum.decoders.auto_mode import TRIAL_TOKENS, TRIALS, ModeChooser, Rates
from viaticum.decoders.call_times import CallTimes
from viaticum.decoders.cost import CostModel, measure_quickly
from viaticum.decoders.decoding_mode import LARGE_ALONE, DecodingMode, HandoffStats
from viaticum.decoders.observed_times import ObservedTimes
from viaticum.errors import InputError
from viaticum.routers.token import EntropyRouter, RandomRouter

ROUTED = DecodingMode(True)
OFTEN = Rates(HandoffStats(0.3, 0.3, 0.5), HandoffStats(0.3, 0.3, 0.5))


class Scripted(ModeChooser):
    """Takes the modes in turn, a few steps each."""

    def __init__(self, modes: list[DecodingMode], seed: int = 0) -> None:
        super().__init__(EntropyRouter(0.75))
        self._turns, self._rng, self._left = modes, random.Random(seed), 0

    def choose(self, streams: int, stats: Stats) -> DecodingMode:
        if self._left == 0:
            self.mode, self._left = self._rng.choice(self._turns), self._rng.randrange(1, 6)
        self._left -= 1
        return self.mode


def a_decoder(modes: ModeChooser | None, slots: int = 4, blocks: int | None = None) -> MixedDecoder:
    return MixedDecoder(
        TorchRunner(build(seed=1), slots=slots, blocks=blocks),
        TorchRunner(build(seed=NEAR + 1), slots=slots, blocks=blocks),
        tokenizer=Letters(),
        router=EntropyRouter(0.75),
        loop_guard=None,
        modes=modes,
    )


def times(one: float, four: float) -> CallTimes:
    """Seconds of calls of 1 and of 4 rows, whatever they read."""
    return CallTimes((1, 4), (1, 2), ((one, one), (four, four)))


@pytest.mark.parametrize("seed", range(3))
def test_a_text_goes_on_when_the_mode_changes(seed: int) -> None:
    modes = [LARGE_ALONE, DecodingMode(False, 3), ROUTED, DecodingMode(True, 2)]
    decoder = a_decoder(Scripted(modes, seed))
    makers = set()
    for request, result in zip(
        requests := requests_of(seed, 9, max_new_tokens=20), decoder.generate_all(requests), strict=True
    ):
        tokens = list(request.prompt)
        for token, maker in zip(result.trace.tokens, result.trace.made_by, strict=True):
            assert token == int(plain_logits(tokens, seed=1 if maker else NEAR + 1).argmax())
            tokens.append(token)
            makers.add(maker)
        called = {"small", "large"} if len(result.usage) == 2 else {"large"}
        assert set(result.usage) == called
    assert makers == {0, 1}
    assert empty(decoder)


def test_lossless_modes_write_what_the_large_model_writes() -> None:
    decoder = a_decoder(Scripted([LARGE_ALONE, DecodingMode(False, 1), DecodingMode(False, 4)]))
    alone = MixedDecoder(decoder.config.large, tokenizer=Letters(), loop_guard=None)
    requests = requests_of(5, 12, max_new_tokens=24)
    found = [result.trace.tokens for result in decoder.generate_all(requests)]
    assert found == [result.trace.tokens for result in alone.generate_all(requests)]
    assert decoder.stats.drafted > 0


def test_a_text_that_waits_for_memory_goes_on_in_the_mode_of_the_others() -> None:
    requests = requests_of(5, 6, max_new_tokens=70)
    modes = Scripted([LARGE_ALONE, DecodingMode(False, 1), DecodingMode(False, 4), ROUTED])
    engine, waited = a_decoder(modes, blocks=6).engine(), 0
    for request in requests:
        engine.add(request)
    while engine.busy:
        engine.step()
        for sequence in engine._waiting.sequences:
            waited += 1
            assert sequence.active_model == 1 or engine.config.router.starts_small
            assert engine.config.draft or not sequence.drafting
    assert waited > 0
    assert engine._waiting.preemptions > 0
    lossless = Scripted([LARGE_ALONE, DecodingMode(False, 1), DecodingMode(False, 4)])
    alone = MixedDecoder(a_decoder(None).config.large, tokenizer=Letters(), loop_guard=None)
    assert tokens_of(a_decoder(lossless, blocks=6).generate_all(requests)) == tokens_of(
        alone.generate_all(requests)
    )


def test_sampled_texts_keep_their_distribution_when_drafts_are_dropped() -> None:
    decoder = a_decoder(Scripted([LARGE_ALONE, DecodingMode(False, 3)]), slots=50)
    draws = 600
    sampling = [Sampling(1.0, top_k=3, seed=seed) for seed in range(draws)]
    texts = decoder.generate_all([Request([1, 2], 3, each) for each in sampling])
    logits = plain_logits([1, 2], seed=1)
    chances = torch.softmax(logits.masked_fill(logits < logits.topk(3).values[-1], -torch.inf), 0)
    for token in chances.nonzero()[:, 0].tolist():
        chance = float(chances[token])
        found = sum(text.trace.tokens[0] == token for text in texts) / draws
        assert abs(found - chance) < 4.5 * (chance * (1 - chance) / draws) ** 0.5


def test_the_mode_follows_the_number_of_texts() -> None:
    """One row of the large model costs much, four cost no more; of the small one they do."""
    modes = ModeChooser(EntropyRouter(0.75), CostModel(times(0.1, 2.0), times(1.0, 1.0), {}), rates=OFTEN)
    assert modes.choose(1, Stats()).routed
    assert modes.choose(4, Stats()) == LARGE_ALONE
    assert modes.choose(2, Stats()) in modes.expected
    assert modes.choose(1, Stats()).routed


def test_no_mode_is_taken_that_promises_less_than_the_large_model_alone() -> None:
    rng = random.Random(7)
    for _ in range(8):
        costs = CostModel(
            times(*sorted(rng.uniform(0.1, 2) for _ in range(2))),
            times(*sorted(rng.uniform(0.1, 2) for _ in range(2))),
            {},
        )
        handoff = HandoffStats(rng.random(), rng.random(), rng.random())
        modes = ModeChooser(EntropyRouter(), costs, rates=Rates(handoff, handoff))
        for streams in (1, 4, 2):
            chosen = modes.choose(streams, Stats())
            assert modes.expected[chosen] >= modes.expected[LARGE_ALONE]


def test_unknown_rates_are_learned_by_trying_and_kept() -> None:
    kept: list[Rates] = []
    modes = ModeChooser(
        EntropyRouter(0.75),
        CostModel(times(0.1, 0.1), times(1.0, 1.0), {}),
        keep=lambda _, rates: kept.append(rates),
    )
    decoder, tried = a_decoder(modes), set()
    engine = decoder.engine()
    for request in requests_of(1, 30, max_new_tokens=40):
        engine.add(request)
    while engine.busy:
        engine.step()
        tried.add(modes.mode)
    assert tried >= set(TRIALS.values())
    assert modes.rates.routed is not None
    assert modes.rates.lossless is not None
    assert decoder.stats.proposed >= TRIAL_TOKENS
    assert kept[-1] == modes.rates
    again = ModeChooser(EntropyRouter(0.75), CostModel(times(0.1, 0.1), times(1.0, 1.0), {}), rates=kept[-1])
    assert again.choose(4, Stats()) not in TRIALS.values() or again.expected


def test_a_short_run_is_no_trial() -> None:
    """The pair's calls cost the same, which only its own rates would show: a trial would be the whole run."""
    modes = ModeChooser(EntropyRouter(0.75), CostModel(times(0.5, 0.5), times(1.0, 1.0), {}))
    decoder = a_decoder(modes)
    for seed in (1, 2):
        for result in decoder.generate_all(requests_of(seed, 4, max_new_tokens=24)):
            assert set(result.trace.made_by) == {1}
    assert decoder.stats.proposed == decoder.stats.drafted == 0
    assert modes.mode == LARGE_ALONE
    assert modes.rates == Rates()


def test_trials_take_at_most_a_third_of_what_is_decoded() -> None:
    modes, tried, made = ModeChooser(EntropyRouter(0.75), CostModel(times(0.1, 0.1), times(1, 1), {})), 0, 0
    engine = a_decoder(modes).engine()
    for request in requests_of(3, 40, max_new_tokens=40):
        engine.add(request)
    while engine.busy:
        unknown = modes.rates.of(modes.mode.routed) is None and modes.mode != LARGE_ALONE
        new = sum(event.token is not None for event in engine.step())
        tried, made = tried + new * (unknown and made > 0), made + new
        assert tried <= made / 3 + 64, "what a call makes beyond the last token of a trial"
    assert tried > TRIAL_TOKENS


def test_what_cannot_pay_is_not_tried() -> None:
    modes = ModeChooser(EntropyRouter(), CostModel(times(1.0, 1.0), times(0.5, 0.5), {}))
    assert [modes.choose(streams, Stats()) for streams in (1, 4)] == [LARGE_ALONE] * 2


def test_calls_that_take_longer_than_measured_change_the_mode() -> None:
    modes = ModeChooser(EntropyRouter(), CostModel(times(0.1, 0.1), times(1.0, 1.0), {}), rates=OFTEN)
    assert modes.choose(1, Stats()).routed
    for _ in range(100):
        modes.observe(0, 1, 1, 3.0)
        modes.observe(1, 1, 1, 1.0)
        modes.choose(1, Stats())
    assert modes.mode == LARGE_ALONE


def test_observed_times_correct_measured_ones() -> None:
    seen = ObservedTimes(CostModel(times(0.1, 0.2), times(1.0, 1.5), {}))
    assert seen.corrected().large(4, 1) == 1.5
    for _ in range(200):
        seen.add(1, 1, 1, 2.0)
        seen.add(1, 1, 5000, 90.0)  # a prefill
    corrected = seen.corrected()
    assert corrected.large(1, 1) == pytest.approx(2.0, rel=0.1)
    assert corrected.large(4, 1) == pytest.approx(3.0, rel=0.1), "the model's own ratio stands in"
    assert corrected.small(1, 1) == pytest.approx(0.2, rel=0.15), "then the pair's"


def test_a_pair_is_measured_when_it_is_first_used() -> None:
    kept: list[CostModel] = []
    modes = ModeChooser(EntropyRouter(0.75), keep=lambda costs, _: kept.append(costs))
    decoder = a_decoder(modes)
    decoder.generate_all(requests_of(2, 3, max_new_tokens=4))
    assert kept[0].conditions["quick"]
    assert kept[0].large.rows == (1, 4)
    assert not modes.needs_times
    short = [TorchRunner(build(seed=seed), slots=1, context=3) for seed in (0, 1)]
    with pytest.raises(InputError, match="too short"):
        measure_quickly(*short)
    modes = ModeChooser(EntropyRouter(0.75))
    modes.prepare(*short)
    assert not modes.needs_times
    assert modes.choose(1, Stats()) == ROUTED, "what was asked for"


def test_a_router_without_runs_of_the_large_model_gets_no_drafts() -> None:
    modes = ModeChooser(RandomRouter(0.3), CostModel(times(0.1, 0.1), times(1.0, 1.0), {}), rates=OFTEN)
    modes.choose(1, Stats())
    routed = {mode for mode in modes.expected if mode.routed}
    assert ROUTED in routed
    assert (len(routed) > 1) == RandomRouter.multi_token_handoff


def test_modes_need_a_small_model() -> None:
    with pytest.raises(InputError, match="give one"):
        MixedDecoder(TorchRunner(build(seed=1)), tokenizer=Letters(), modes=ModeChooser(EntropyRouter(0.75)))
