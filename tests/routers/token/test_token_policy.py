"""R-Stitch+'s policy: it begins as R-Stitch and serves as trained; DAPO against hand calculations."""

from __future__ import annotations

import hashlib
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from tiny_models import Letters, a_decoder, build, empty, requests_of, tokens_of

from viaticum.decoders import MixedDecoder, Request, Sampling, TorchRunner
from viaticum.decoders.call_times import CallTimes
from viaticum.decoders.cost import Calls, CostModel
from viaticum.decoders.features import read_features
from viaticum.decoders.rollouts import Rollout, RolloutGenerator
from viaticum.errors import DataError, InputError, ModelError
from viaticum.routers.token import EntropyRouter, Step, entropy
from viaticum.routers.token.policy import (
    Policy,
    PolicyShape,
    Recorder,
    RStitchPlus,
    TrainedPolicy,
    log_probability,
)
from viaticum.routers.token.policy_train import (
    Batch,
    Learner,
    LearnerSettings,
    check_latency_weight,
    dapo_loss,
    group_advantages,
    reward,
)

pytestmark = pytest.mark.usefixtures("one_thread")
TAU = 0.75
SHAPE = PolicyShape(32, rank=8, width=16)
COSTS = CostModel(
    CallTimes((1, 4), (1, 9), ((0.01, 0.02), (0.016, 0.05))),
    CallTimes((1, 4), (1, 9), ((0.05, 0.09), (0.08, 0.25))),
    {"device": "cpu", "context": 0},
)


def a_policy(seed: int = 3, shape: PolicyShape = SHAPE, spread: float = 1.0) -> Policy:
    """A policy with varying decisions: a random last layer, features fitted to random texts."""
    policy = Policy(shape, seed).requires_grad_(False).eval()
    rng = random.Random(1)
    text = [rng.randrange(97) for _ in range(200)]
    seen = read_features(TorchRunner(build(seed=0)), text[:5], text[5:])
    positions = torch.arange(len(seen))
    policy.fit(seen.hidden, seen.entropy, positions)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        policy.head.weight.normal_(0, spread)
        policy.head.bias.zero_()
        odds = policy(policy.features(seen.hidden, seen.entropy, positions))
        policy.head.bias -= odds[seen.entropy > TAU].median()
    return policy


def a_writer(slots: int = 4, **values: Any) -> RolloutGenerator:
    small, large = (TorchRunner(build(seed=seed), slots=slots) for seed in (0, 100))
    return RolloutGenerator(small, large, Letters(), COSTS, **values)


def odds_of(policy: Policy, rollout: Rollout, request: Request) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and entropies at every position of a text, from an offline pass."""
    seen = read_features(TorchRunner(build(seed=0)), request.prompt, rollout.tokens)
    odds = policy(policy.features(seen.hidden, seen.entropy, torch.arange(len(seen))))
    return odds, seen.entropy


# --- it begins as R-Stitch ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 8, 64])
@pytest.mark.parametrize("slots", [1, 3])
def test_before_it_learns_it_writes_what_r_stitch_writes(rank: int, slots: int) -> None:
    policy = Policy(PolicyShape(32, rank=rank))
    requests = requests_of(7, 3, max_new_tokens=20)
    requests += [replace(each, sampling=Sampling(0.8, seed=5)) for each in requests[:2]]
    theirs = a_decoder(EntropyRouter(TAU), slots).generate_all(requests)
    ours = a_decoder(RStitchPlus(policy, TAU), slots).generate_all(requests)
    assert tokens_of(ours) == tokens_of(theirs)
    assert [each.trace.made_by for each in ours] == [each.trace.made_by for each in theirs]
    made = [by for each in ours for by in each.trace.made_by]
    assert 0.1 < sum(made) / len(made) < 0.9, "else the threshold tests nothing"


@pytest.mark.parametrize("draft", [None, 3])
def test_drafting_changes_no_greedy_text(draft: int | None) -> None:
    requests, policy = requests_of(7, 5, max_new_tokens=25), a_policy()
    texts = []
    for length in (0, draft):
        small, large = (TorchRunner(build(seed=seed), slots=2) for seed in (0, 100))
        router = RStitchPlus(policy, TAU)
        decoder = MixedDecoder(large, small, tokenizer=Letters(), router=router, draft=length)
        texts.append(tokens_of(decoder.generate_all(requests)))
    assert texts[0] == texts[1]


# --- serving ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("slots", [1, 4])
def test_the_served_decision_is_the_policys(slots: int, rank: int) -> None:
    """At every position an offline pass finds the served probability and the model that decoded."""
    policy = a_policy(shape=replace(SHAPE, rank=rank))
    writer, requests = a_writer(slots), requests_of(5, 6, max_new_tokens=25)
    asked = dropped = 0
    for request, rollout in zip(requests, writer.generate(policy, TAU, requests), strict=True):
        trace = rollout.result.trace
        odds, chances = odds_of(policy, rollout, request)
        for position, score in enumerate(trace.scores or [math.nan] * len(trace.tokens)):
            if math.isnan(score):
                continue
            asked += 1
            assert float(chances[position]) > TAU
            assert score == pytest.approx(float(torch.sigmoid(odds[position])), abs=1e-4)
            if abs(score - 0.5) > 1e-4:
                assert trace.made_by[position] == int(score > 0.5)
            dropped += score > 0.5
        for position, by in enumerate(trace.made_by):
            if by == 0 and float(chances[position]) > TAU + 1e-4:
                assert trace.scores[position] <= 0.5, "only the policy keeps an uncertain token"
    assert asked > 40
    assert 0.2 < dropped / asked < 0.8


def test_a_row_is_judged_by_itself_and_no_number_is_not_trusted() -> None:
    policy = a_policy()
    generator = torch.Generator().manual_seed(2)
    logits, hidden = 3 * torch.randn(6, 97, generator=generator), torch.randn(6, 32, generator=generator)
    step = Step(logits, entropy(logits), list(range(6)), [0, 3, 9, 27, 81, 243], logits.argmax(-1), hidden)
    router = RStitchPlus(policy, 0.1)
    together = router.score(step)
    for row in range(6):
        one = Step(
            *(each[row : row + 1] for each in (logits, step.entropy)),
            [row],
            [step.positions[row]],
            step.tokens[row : row + 1],
            hidden[row : row + 1],
        )
        torch.testing.assert_close(router.score(one), together[row : row + 1], atol=1e-5, rtol=1e-4)
        assert router.keep_small(one).tolist() == router.keep_small(step)[row : row + 1].tolist()
    damaged = replace(step, entropy=torch.full((6,), math.nan))
    assert not router.keep_small(damaged).any()
    assert not router.keep_small(replace(step, hidden=hidden * math.nan)).any()


def test_positions_count() -> None:
    policy, hidden = a_policy(), torch.randn(2, 32)[[0, 0]]
    odds = policy(policy.features(hidden, torch.tensor([0.5, 0.5]), torch.tensor([0, 200])))
    assert float((odds[0] - odds[1]).abs()) > 1e-3


# --- rollouts -----------------------------------------------------------------------------------------------


def recorded(
    temperature: float = 0.0, slots: int = 4, seed: int = 1
) -> tuple[Policy, list[Request], list[list[Rollout]]]:
    policy = a_policy()
    requests = [
        replace(each, sampling=Sampling(temperature)) for each in requests_of(5, 3, max_new_tokens=25)
    ]
    return policy, requests, a_writer(slots).sample(policy, TAU, requests, 4, [seed, seed + 1, seed + 2])


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_what_was_recorded_is_what_an_offline_pass_finds(temperature: float) -> None:
    policy, requests, groups = recorded(temperature)
    kept = dropped = 0
    for request, group in zip(requests, groups, strict=True):
        assert len(group) == 4
        assert len({each.tokens for each in group}) > 1
        for rollout in group:
            seen = rollout.decisions
            assert seen is not None
            trace = rollout.result.trace
            asked = [position for position, score in enumerate(trace.scores) if score == score]
            assert seen.positions.tolist() == asked
            assert [trace.made_by[position] for position in asked] == seen.called.int().tolist()
            odds, chances = odds_of(policy, rollout, request)
            offline = log_probability(odds[seen.positions], seen.called)
            torch.testing.assert_close(seen.logps, offline, atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(seen.entropy, chances[seen.positions], atol=1e-5, rtol=1e-4)
            again = policy(policy.features(seen.hidden, seen.entropy, seen.positions))
            torch.testing.assert_close(seen.logps, log_probability(again, seen.called), atol=1e-6, rtol=1e-5)
            assert rollout.decision_count == len(seen)
            assert rollout.dropped == int(seen.called.sum())
            assert rollout.tokens_by_model == (trace.made_by.count(0), trace.made_by.count(1))
            dropped += rollout.dropped
            kept += rollout.decision_count - rollout.dropped
    assert dropped > 10
    assert kept > 10


def test_a_seed_gives_the_same_rollouts_whatever_was_written_before() -> None:
    _, requests, groups = recorded()
    writer, policy = a_writer(4), a_policy()
    seeds = [1, 2, 3]
    for _ in range(2):
        again = writer.sample(policy, TAU, requests, 4, seeds)
        for ours, theirs in zip(again, groups, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert a.tokens == b.tokens
                assert a.latency == b.latency
                assert a.decisions is not None
                assert b.decisions is not None
                assert torch.equal(a.decisions.logps, b.decisions.logps)
    assert sorted(writer.small.free_slots) == sorted(writer.large.free_slots) == list(range(4))
    other = writer.sample(policy, TAU, requests, 4, [4, 5, 6])
    assert [each.tokens for group in other for each in group] != [
        each.tokens for group in groups for each in group
    ]


def test_draws_do_not_depend_on_company() -> None:
    """One slot or four, the same seeds give the same texts."""
    texts = [[each.tokens for group in recorded(slots=slots)[2] for each in group] for slots in (1, 4)]
    assert texts[0] == texts[1]


def test_a_group_reads_its_prompt_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the texts are the same as where each one prefills the prompt."""
    requests = [Request([first, 9, 2, 11, 8, 40, 3, 71] * 3, 12) for first in (5, 6)]
    read, texts = [], []
    for once in (True, False):
        if not once:
            monkeypatch.setattr("viaticum.decoders.catch_up.MIN_SHARED_PREFIX", 1000)
        writer = a_writer(4)
        seen: list[int] = []
        for runner in (writer.small, writer.large):
            call = runner.forward

            def counted(
                slots: Any, tokens: Any, *rest: Any, call: Any = call, seen: list[int] = seen, **more: Any
            ) -> Any:
                seen.append(sum(map(len, tokens)))
                return call(slots, tokens, *rest, **more)

            monkeypatch.setattr(runner, "forward", counted)
        groups = writer.sample(a_policy(), TAU, requests, 2, [1, 2])
        texts.append([each.tokens for group in groups for each in group])
        read.append(sum(seen))
    assert texts[0] == texts[1]
    assert read[0] <= read[1] - 2 * 23


def test_the_recorder_lets_go_of_places_where_nobody_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, groups = recorded()
    monkeypatch.setattr("viaticum.routers.token.policy.COMPACT_BYTES", 1000)
    _, _, compacted = recorded()
    for ours, theirs in zip(compacted, groups, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.decisions is not None
            assert b.decisions is not None
            for name in type(a.decisions).__slots__:
                assert torch.equal(getattr(a.decisions, name), getattr(b.decisions, name))


def test_answers_are_drawn_as_likely_as_the_policy_says() -> None:
    texts, positions = 40, 25
    recorder = Recorder(list(range(texts)), positions)
    logits = torch.zeros(texts, 9)
    odds = torch.logit(torch.tensor([0.2, 0.9] * (texts // 2)))
    for position in range(positions):
        step = Step(
            logits,
            entropy(logits),
            range(texts),
            [position] * texts,
            logits.argmax(-1),
            torch.zeros(texts, 2),
        )
        recorder.sample(step, odds, torch.full((texts,), position % 5 > 0))
    seen = recorder.read()
    assert [len(each) for each in seen] == [20] * texts
    shares = [torch.cat([each.called for each in seen[first::2]]).float().mean() for first in (0, 1)]
    assert [float(each) for each in shares] == pytest.approx([0.2, 0.9], abs=0.06)
    assert len({tuple(each.called.tolist()) for each in seen}) > 20, "each text has draws of its own"


def test_features_that_are_no_numbers_are_refused() -> None:
    recorder = Recorder([1, 2], 5)
    assert [len(each) for each in recorder.read()] == [0, 0]
    logits = torch.zeros(2, 9)
    hidden = torch.tensor([[1.0, 2.0], [math.nan, 0.0]])
    step = Step(logits, entropy(logits), [0, 1], [0, 0], logits.argmax(-1), hidden)
    recorder.sample(step, torch.zeros(2), torch.tensor([True, True]))
    with pytest.raises(ModelError, match="not finite at 1 of 2 places"):
        recorder.read()


def test_a_model_that_fails_ends_the_rollouts() -> None:
    writer = a_writer(2)
    with torch.no_grad():
        writer.large.model.model.layers[1].mlp.down_proj.weight[3] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        writer.sample(a_policy(), TAU, requests_of(5, 2), 2, [1, 2])


def test_rollouts_refuse_what_cannot_be() -> None:
    with pytest.raises(InputError, match="streams"):
        a_writer(streams=0)
    writer = a_writer(2)
    with pytest.raises(InputError, match="two texts or more"):
        writer.sample(a_policy(), TAU, requests_of(5, 1), 1, [1])
    other = Policy(PolicyShape(12))
    with pytest.raises(InputError, match="hidden states of 12 numbers, and the model has 32"):
        writer.generate(other, TAU, requests_of(5, 1, max_new_tokens=20))
    writer.small.free_slots.remove(0)
    with pytest.raises(InputError, match="in use"):
        writer.generate(a_policy(), TAU, requests_of(5, 1))


# --- latency ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_the_calls_of_a_text_are_those_that_were_made(seed: int) -> None:
    writer, request = a_writer(1), requests_of(seed, 1, max_new_tokens=30)[0]
    decoder = MixedDecoder(
        writer.large, writer.small, tokenizer=Letters(), router=RStitchPlus(a_policy(), TAU)
    )
    decoder.generate(request)
    rollout = writer.generate(a_policy(), TAU, [request])[0]
    for calls, stats in (
        (rollout.calls.small, decoder.stats.small),
        (rollout.calls.large, decoder.stats.large),
    ):
        assert len(calls) == stats.steps
        assert sum(new for new, _ in calls) == stats.tokens
    assert rollout.dropped == decoder.stats.dropped
    assert rollout.calls.tokens == len(rollout.tokens)


def test_calls_and_latency_by_hand() -> None:
    # small, small (dropped) large, large stays active, small again
    calls = Calls.from_trace([0, 1, 1, 0], [False, True, False, False], prompt=10, cached=6)
    assert calls.small == ((4, 6), (1, 10), (3, 11)) or calls.small == ((4, 6), (1, 10), (2, 11))
    assert calls.large == ((5, 6), (1, 11))
    assert calls.tokens == 4
    costs = CostModel(
        CallTimes((1,), (1, 5), ((1.0, 5.0),)), CallTimes((1,), (1, 5), ((10.0, 50.0),)), {"context": 0}
    )
    assert costs.latency(calls) == pytest.approx(sum(new for new, _ in calls.small) + 10 * 6)
    cached = replace(costs, cached=(0.5, 0.0))
    assert cached.latency(calls) == pytest.approx(
        costs.latency(calls) + 0.5 * sum(held for _, held in calls.small)
    )
    with pytest.raises(InputError, match="cached"):
        Calls.from_trace([0], [False], prompt=3, cached=3)
    with pytest.raises(InputError, match="streams"):
        costs.latency(calls, 0)


def test_more_streams_share_calls_and_wait_for_each_other() -> None:
    flat = CostModel(CallTimes((1,), (1,), ((1.0,),)), CallTimes((1,), (1,), ((10.0,),)), {"context": 0})
    half = Calls.from_trace([0, 1] * 50, [False, True] * 50, prompt=1)
    one, two, many = (flat.latency(half, streams) for streams in (1, 2, 64))
    assert one == pytest.approx(100 * 1 + 50 * 10)
    # Of two texts at least one needs the large model in three steps of four; each reads the other's prompt
    # as well.
    small, large = 2 * 1 + 100 * 0.99**0 * (1 - (1 - 0.99) ** 2), 2 * 10 + 100 * 10 * (1 - (1 - 0.49) ** 2)
    assert two == pytest.approx(small + large)
    assert many == pytest.approx(64 * 11 + 100 + 1000, rel=0.02)


def test_calling_the_large_model_costs_latency() -> None:
    writer, requests = a_writer(4), requests_of(5, 3, max_new_tokens=25)
    never, always = a_policy(), Policy(SHAPE)
    with torch.no_grad():
        never.head.weight.zero_()
        never.head.bias.fill_(-9)
    cheap, dear = (writer.generate(policy, TAU, requests) for policy in (never, always))
    assert all(each.tokens_by_model[1] == 0 and each.dropped == 0 for each in cheap)
    assert sum(each.latency for each in cheap) < sum(each.latency for each in dear)


# --- DAPO ---------------------------------------------------------------------------------------------------


def test_reward() -> None:
    assert reward(True, 20.0, 0.01) == pytest.approx(0.8)
    assert reward(False, 20.0, 0.01) == 0
    assert reward(True, 20.0, 0.0) == 1
    for weight in (-0.1, math.nan, math.inf):
        with pytest.raises(InputError, match="lambda"):
            check_latency_weight(weight)


def test_advantages_are_relative_to_the_group() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.9, 0.9, 0.9, 0.9], [0.9, 0.9, 0.9, 0.5]])
    advantages, differ = group_advantages(rewards)
    assert differ.tolist() == [True, False, True]
    assert advantages[0].tolist() == [1, -1, -1, 1]
    assert advantages[1].tolist() == [0, 0, 0, 0]
    third = math.sqrt(3)
    assert advantages[2].tolist() == pytest.approx([1 / third, 1 / third, 1 / third, -third], rel=1e-4)


def test_advantages_by_the_batch_keep_small_differences_small() -> None:
    rewards = torch.tensor([[1.0, 0.0], [0.9, 0.8], [0.5, 0.5]])
    advantages, differ = group_advantages(rewards, "batch")
    spread = math.sqrt((0.25 + 0.0025) / 2)
    assert differ.tolist() == [True, True, False]
    assert advantages.flatten().tolist() == pytest.approx(
        [0.5 / spread, -0.5 / spread, 0.05 / spread, -0.05 / spread, 0, 0], rel=1e-4
    )


def test_every_answer_of_a_text_has_the_texts_advantage() -> None:
    policy, _, groups = recorded()
    choices = [[each.decisions for each in group if each.decisions is not None] for group in groups[:2]]
    batch = Batch.of(policy, [[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.9]], choices)
    expected = [1, -1, -1, 1, *[-1 / math.sqrt(3)] * 3, math.sqrt(3)]
    lengths = [len(each) for group in choices for each in group]
    assert batch.advantages.tolist() == pytest.approx(
        [value for value, length in zip(expected, lengths, strict=True) for _ in range(length)], rel=1e-4
    )
    torch.testing.assert_close(
        log_probability(policy(batch.features), batch.called), batch.logps, atol=1e-6, rtol=1e-5
    )


def test_probabilities_of_answers() -> None:
    odds = torch.tensor([math.log(3), math.log(3), 60.0])
    logps = log_probability(odds, torch.tensor([True, False, False]))
    assert logps.tolist() == pytest.approx([math.log(0.75), math.log(0.25), -60.0])


def test_the_loss_by_hand() -> None:
    """Ratios 1.1, 1.5 (clipped to 1.28), 0.5 (clipped to 0.8); of the other sign 1.5 and 0.5, unclipped."""
    old = torch.log(torch.tensor([0.5, 0.4, 0.8, 0.4, 0.8]))
    new = torch.log(torch.tensor([0.55, 0.6, 0.4, 0.6, 0.4]))
    advantages = torch.tensor([2.0, 1.0, -1.0, -3.0, 0.5])
    expected = -(1.1 * 2 + 1.28 * 1 - 0.8 * 1 - 1.5 * 3 + 0.5 * 0.5) / 5
    assert float(dapo_loss(new, old, advantages)) == pytest.approx(expected, rel=1e-5)
    assert float(dapo_loss(new, old, advantages, of=10)) == pytest.approx(expected / 2, rel=1e-5)


def test_the_clip_is_higher_above() -> None:
    """A ratio of 1.25 has a gradient upwards (over PPO's 0.2, under 0.28); 1.3 and 0.75 have none."""
    for ratio, advantage, learns in (
        (1.25, 1.0, True),
        (1.3, 1.0, False),
        (0.85, -1.0, True),
        (0.75, -1.0, False),
        (1.3, -1.0, True),
    ):
        logp = torch.tensor([math.log(0.4 * ratio)], requires_grad=True)
        dapo_loss(logp, torch.tensor([0.4]).log(), torch.tensor([advantage])).backward()
        assert logp.grad is not None
        assert bool(logp.grad != 0) == learns, ratio


def test_every_answer_counts_the_same_however_long_its_text() -> None:
    """Token-level: a text with nine answers weighs nine times one with one; a mean of texts would not."""
    logps = torch.zeros(10, requires_grad=True)
    dapo_loss(logps, torch.zeros(10), torch.tensor([1.0] * 9 + [-1.0])).backward()
    assert logps.grad is not None
    assert logps.grad.tolist() == pytest.approx([-0.1] * 9 + [0.1])


def test_minibatches_weigh_answers_as_the_whole_batch_does() -> None:
    """The sum of the minibatches' gradients is the batch's gradient times their number."""
    seen = []
    for parts in (1, 3):
        learner = Learner(a_policy(), LearnerSettings(epochs=1, minibatches=parts, longest_gradient=1e9))
        gradients = torch.zeros(1)
        batch = Batch(
            torch.randn(10, 11, generator=torch.Generator().manual_seed(0)),
            torch.arange(10) < 4,
            torch.full((10,), -0.7),
            torch.linspace(-1, 1, 10),
        )
        learner._optimiser = torch.optim.SGD(learner.policy.parameters(), lr=0.0)  # type: ignore[assignment]

        def gather(optimiser: Any, *_: Any, total: torch.Tensor = gradients, of: Learner = learner) -> None:
            total += of.policy.head.bias.grad

        learner._optimiser.register_step_pre_hook(gather)
        learner.update(batch, 0)
        seen.append(float(gradients) / parts)
    assert seen[0] == pytest.approx(seen[1], rel=1e-4)
    assert abs(seen[0]) > 1e-4


# --- it learns ----------------------------------------------------------------------------------------------


def play(
    policy: Policy, count: int, group: int, generator: torch.Generator, scale: str = "group"
) -> tuple[torch.Tensor, Batch]:
    """Sampled texts of 8 positions and their rewards [count, group].

    At a quarter of the positions the small model's token would be wrong, which the third number of the
    hidden state tells; elsewhere calling the large model only takes time.
    """
    hidden = torch.randn(count, 1, 8, 6, generator=generator)
    needed = torch.rand(count, 1, 8, generator=generator) < 0.25
    hidden[..., 2] = torch.where(needed, 1.5, -1.5)
    hidden, needed = hidden.expand(count, group, 8, 6), needed.expand(count, group, 8)
    with torch.no_grad():
        features = policy.features(
            hidden.reshape(-1, 6),
            torch.full((count * group * 8,), 0.4),
            torch.arange(8).repeat(count * group),
        )
        odds = policy(features)
    called = torch.rand(len(odds), generator=generator) < torch.sigmoid(odds)
    calls = called.view(count, group, 8)
    rewards = ~(needed & ~calls).any(-1) * (1 - 0.08 * calls.sum(-1))
    advantages, differ = group_advantages(rewards, scale)
    rows = differ[:, None, None].expand_as(calls).reshape(-1)
    spread = advantages[..., None].expand_as(calls).reshape(-1)
    return rewards, Batch(features[rows], called[rows], log_probability(odds, called)[rows], spread[rows])


@pytest.mark.parametrize("scale", ["group", "batch"])
@pytest.mark.parametrize("seed", range(3))
def test_it_learns_where_the_large_model_is_of_no_use(seed: int, scale: str) -> None:
    policy = Policy(PolicyShape(6, rank=0, width=16), seed)
    generator = torch.Generator().manual_seed(seed)
    learner = Learner(policy, LearnerSettings(epochs=2, minibatches=2))
    means = []
    for step in range(40):
        rewards, batch = play(policy, 8, 8, generator, scale)
        means.append(float(rewards.mean()))
        learner.update(batch, step)
    before, after = sum(means[:5]) / 5, sum(means[-5:]) / 5
    assert after > before + 0.2, means


def test_a_learner_goes_on_as_if_it_had_never_stopped() -> None:
    def one_more(learner: Learner, number: int) -> None:
        learner.update(play(learner.policy, 4, 4, torch.Generator().manual_seed(number))[1], number)

    shape = PolicyShape(6, rank=0, width=16)
    whole = Learner(Policy(shape), LearnerSettings())
    for number in range(4):
        one_more(whole, number)
    half = Learner(Policy(shape), LearnerSettings())
    for number in range(2):
        one_more(half, number)
    other = Learner(Policy(shape, 9), LearnerSettings())
    other.restore(half.state())
    for number in (2, 3):
        one_more(other, number)
    for name, ours in other.state().items():
        assert torch.equal(ours, whole.state()[name]), name


@pytest.mark.parametrize(
    "values",
    [{"scale": "std"}, {"rate": 0.0}, {"low": 1.0}, {"high": 0.0}, {"epochs": 0}, {"minibatches": 0}],
)
def test_settings_that_cannot_be(values: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        LearnerSettings(**values)


# --- on disk ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values", [{"hidden": 0}, {"rank": -1}, {"width": 0}, {"start": 0.0}, {"start": 99.0}]
)
def test_shapes_that_cannot_be(values: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        PolicyShape(**{"hidden": 8, **values})


@pytest.mark.parametrize(
    ("tau", "threshold"), [(-0.1, 0.5), (1.1, 0.5), (math.nan, 0.5), (0.1, 1.5), (0.1, math.nan)]
)
def test_tau_and_threshold_out_of_range(tau: float, threshold: float) -> None:
    with pytest.raises(InputError, match="between 0 and 1"):
        RStitchPlus(Policy(SHAPE), tau, threshold)


def a_trained_policy() -> TrainedPolicy:
    facts = {
        "pair": "p",
        "tau": TAU,
        "threshold": 0.5,
        "small": {"name": "s", "sha256": "a" * 64},
        "large": {"name": "l", "sha256": "b" * 64},
    }
    return TrainedPolicy(a_policy(), facts)


def test_a_policy_comes_back_as_it_was(tmp_path: Path) -> None:
    made = a_trained_policy()
    made.save(tmp_path / "p")
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["policy.json", "policy.safetensors"]
    back = TrainedPolicy.load(tmp_path / "p")
    for name, ours in made.policy.state_dict().items():
        assert torch.equal(ours, back.policy.state_dict()[name])
    assert (back.tau, back.threshold) == (TAU, 0.5)
    back.check_weights("small", "s", "a" * 64)
    with pytest.raises(InputError, match="made for l with sha256 bbbbbbbbbbbb, and m has cccccccccccc"):
        back.check_weights("large", "m", "c" * 64)


def test_damaged_policies_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no policy in"):
        TrainedPolicy.load(tmp_path)
    a_trained_policy().save(tmp_path)
    weights, facts = tmp_path / "policy.safetensors", tmp_path / "policy.json"
    whole, metadata = weights.read_bytes(), json.loads(facts.read_text())
    weights.write_bytes(whole[:-10])
    with pytest.raises(DataError, match="cut short"):
        TrainedPolicy.load(tmp_path)

    def with_weights(tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, weights)
        facts.write_text(json.dumps(metadata | {"sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}))

    with_weights({**load_tensors(whole), "head.bias": torch.tensor([math.nan])})
    with pytest.raises(DataError, match="weights that are not finite"):
        TrainedPolicy.load(tmp_path)
    with_weights({"head.bias": torch.zeros(1)})
    with pytest.raises(DataError, match="does not fit"):
        TrainedPolicy.load(tmp_path)
    for broken in (
        "{",
        json.dumps({"format": 9}),
        json.dumps(metadata | {"shape": {}}),
        json.dumps(metadata | {"tau": 7}),
        json.dumps({name: value for name, value in metadata.items() if name != "small"}),
    ):
        facts.write_text(broken)
        with pytest.raises(DataError):
            TrainedPolicy.load(tmp_path)


def test_every_slot_is_free_after_rollouts() -> None:
    decoder = a_decoder(RStitchPlus(a_policy(), TAU), 2)
    decoder.generate_all(requests_of(2, 3))
    assert empty(decoder)
