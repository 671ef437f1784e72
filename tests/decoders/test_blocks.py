"""The KV cache in blocks: sharing, copies on write, what frees them, and what happens where they run out."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny_models import Letters, a_prompt, build, empty, plain_logits, tokens_of

from viaticum.decoders import MixedDecoder, Request, Result, Sampling, TorchRunner
from viaticum.decoders.blocks import BLOCK, BlockPool, OutOfBlocks
from viaticum.decoders.engine import Engine
from viaticum.decoders.graphs import GraphRunner
from viaticum.errors import InputError, ModelError, PromptTooLong
from viaticum.routers.token import AlwaysLarge, EntropyRouter, TokenRouter

pytestmark = pytest.mark.usefixtures("one_thread")


def a_runner(seed: int = 0, *, in_place: bool, **values: Any) -> TorchRunner:
    return TorchRunner(build(seed=seed), in_place=in_place, **values)


def check(runner: TorchRunner, slots: Sequence[int], new: Sequence[Sequence[int]]) -> None:
    """A call equals the model without any cache."""
    got = runner.extend(slots, new)
    for row, slot in enumerate(slots):
        expected = plain_logits(runner.cached_tokens[slot])
        torch.testing.assert_close(got[row], expected, atol=2e-4, rtol=1e-3)


# --- bookkeeping --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_place", [True, False])
def test_blocks_are_never_lost_nor_written_by_two(in_place: bool) -> None:
    """Random growth, cuts and shared prefixes, against a dictionary of what each position should be."""
    rng = random.Random(3)
    pool = BlockPool(5, 8 * BLOCK, 20, in_place=in_place)
    memory: dict[int, int] = {}  # address -> what was written there last
    texts: list[list[int]] = [[] for _ in range(5)]

    def address(slot: int, position: int) -> int:
        return int(pool.table[slot, position // BLOCK]) * BLOCK + position % BLOCK

    def write(slot: int, values: list[int]) -> None:
        start = len(texts[slot])
        missing, free = pool.missing(slot, start, start + len(values)), pool.free
        if missing > free:
            with pytest.raises(OutOfBlocks):
                pool.extend(slot, start, start + len(values))
            assert pool.free == free
            return
        if copied := pool.extend(slot, start, start + len(values)):
            memory.update(
                (copied[1] * BLOCK + i, memory.get(copied[0] * BLOCK + i, -1)) for i in range(BLOCK)
            )
        assert pool.free == free - missing
        texts[slot] += values
        memory.update((address(slot, start + i), value) for i, value in enumerate(values))

    for step in range(1500):
        slot, other = rng.sample(range(5), 2)
        act = rng.random()
        if act < 0.5 and len(texts[slot]) < 7 * BLOCK:
            write(slot, [1000 * step + i for i in range(rng.choice([1, 1, 5, BLOCK]))])
        elif act < 0.8:
            texts[slot] = texts[slot][: rng.randrange(len(texts[slot]) + 1)]
            pool.cut(slot, len(texts[slot]))
        elif texts[other]:
            length = rng.randrange(1, len(texts[other]) + 1)
            pool.cut(slot, 0)
            shared = pool.share(other, slot, length)
            assert shared == (0 if in_place else length // BLOCK * BLOCK)
            texts[slot] = texts[other][:shared]
            write(slot, texts[other][shared:length])
        for each, text in enumerate(texts):
            assert [memory[address(each, i)] for i in range(len(text))] == text
        held = {
            (each if in_place else 0, b) for each in range(5) for b in pool.table[each, : pool.count(each)]
        }
        assert len(held) + pool.free == pool.limit
    for slot in range(5):
        pool.cut(slot, 0)
    assert pool.free == pool.limit == 20


def test_a_number_of_blocks_below_one_is_refused() -> None:
    with pytest.raises(InputError, match="got 0"):
        a_runner(in_place=True, blocks=0)


# --- a runner -----------------------------------------------------------------------------------------------


def test_a_common_prefix_is_held_once_until_one_writes_there() -> None:
    runner = a_runner(in_place=False, slots=4, context=6 * BLOCK)
    prompt = [n % 90 for n in range(3 * BLOCK + 5)]
    check(runner, [0], [prompt])
    for slot in (1, 2, 3):
        runner.reuse_prefix(slot, [*prompt, slot])
        check(runner, [slot], [[slot]])
    assert runner.pool.limit - runner.pool.free == 3 + 4, "three whole blocks, and the last of each"
    runner.truncate(2, BLOCK + 3)
    check(runner, [2], [[7, 8, 9]])  # in a block that the others hold too
    check(runner, [0, 1, 3], [[1], [2], [3]])
    runner.discard(1)
    check(runner, [0, 2, 3], [[4], [5, 6], [7]])
    for slot in range(4):
        runner.reset(slot)
    assert runner.pool.free == runner.pool.limit


@pytest.mark.parametrize("in_place", [True, False])
def test_free_slots_make_room_the_longest_free_first_and_from_their_end(in_place: bool) -> None:
    runner = a_runner(in_place=in_place, slots=4, context=10 * BLOCK, blocks=10)
    texts = [[slot + 1] * (3 * BLOCK) for slot in range(3)]
    for slot in (0, 1, 2):
        check(runner, [slot], [texts[slot]])
    runner.free_slots = [1, 2]  # slots 0 and 3 are in use
    check(runner, [3], [[9] * (3 * BLOCK)])
    assert [len(held) for held in runner.cached_tokens] == [96, BLOCK, 96, 96]
    check(runner, [3], [[9] * (2 * BLOCK)])
    assert [len(held) for held in runner.cached_tokens] == [96, 0, 2 * BLOCK, 160]
    before = [list(held) for held in runner.cached_tokens]
    runner.free_slots = []
    with pytest.raises(OutOfBlocks, match="not enough memory"):
        runner.extend([0, 3], [[1] * BLOCK, [2]])
    assert runner.cached_tokens == before, "nothing was changed"
    runner.discard(0)
    check(runner, [3, 2], [[2], [3]])


def test_what_a_text_leaves_behind_reaches_no_other() -> None:
    """NaN in blocks that are used again, and behind the end of a row that is read beside a longer one."""
    model = build()
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = float("nan")
    runner = TorchRunner(model, slots=3, context=6 * BLOCK, in_place=False)
    with pytest.raises(ModelError, match="not finite"):
        runner.extend([0], [[3, 0] * BLOCK])
    check(runner, [1, 2], [[4, 5], [6] * (3 * BLOCK + 1)])
    with pytest.raises(ModelError, match=r"\[0\]"):
        runner.extend([1, 0, 2], [[7], [0] * 40, [8]])
    check(runner, [1, 2, 0], [[7], [8], [9]])


@pytest.mark.parametrize("in_place", [True, False])
def test_a_context_is_never_longer_than_the_blocks(in_place: bool) -> None:
    runner = a_runner(in_place=in_place, slots=2, context=500, blocks=3)
    assert runner.context == 3 * BLOCK
    check(runner, [0], [[1] * 96])
    with pytest.raises(PromptTooLong):
        runner.extend([0], [[1]])


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize(
    "error", [OSError(12, "Cannot allocate memory"), torch.OutOfMemoryError("no memory")]
)
def test_a_cache_that_could_not_be_allocated_is_allocated_by_the_next_call(
    in_place: bool, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, calls = a_runner(in_place=in_place, slots=2, context=100), itertools.count()
    empty_layer = runner._cache._empty

    def fail_once(like: torch.Tensor) -> torch.Tensor:
        if next(calls) == 3:  # the values of the second layer
            raise error
        return empty_layer(like)

    monkeypatch.setattr(runner._cache, "_empty", fail_once)
    with pytest.raises(ModelError, match="not enough memory"):
        runner.extend([0], [[1, 2, 3]])
    assert runner.cached_tokens[0] == []
    check(runner, [0, 1], [[1, 2, 3], [4]])
    assert len(runner._cache.keys) == len(runner._cache.values) == runner.model.config.num_hidden_layers
    assert len(runner._cache._maps) == (4 if in_place else 0)


# --- an engine whose memory runs out ------------------------------------------------------------------------


def a_decoder(
    in_place: bool, router: TokenRouter, blocks: int | None, draft: int | None = 0, slots: int = 6
) -> MixedDecoder:
    runners = [
        a_runner(seed, in_place=in_place, slots=slots, context=8 * BLOCK, blocks=blocks) for seed in (1, 0)
    ]
    return MixedDecoder(*runners, tokenizer=Letters(), router=router, draft=draft)


def long_requests(sampling: Sequence[Sampling], count: int = 8) -> list[Request]:
    """Every other one has a prompt of its own for the small model of a pair."""
    rng = random.Random(11)
    return [
        Request(
            [rng.randrange(97) for _ in range(rng.randrange(5, 70))],
            75,
            sampling[n % len(sampling)],
            small_prompt=[rng.randrange(97) for _ in range(rng.randrange(5, 100))] if n % 4 > 1 else None,
        )
        for n in range(count)
    ]


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("draft", [0, 3])
@pytest.mark.parametrize("router", [EntropyRouter(0.75), AlwaysLarge()])
def test_texts_that_do_not_fit_together_are_preempted_and_end_as_if_they_did(
    in_place: bool, draft: int, router: TokenRouter
) -> None:
    samplings = [Sampling(), Sampling(0.8, 0.9, seed=5)]
    requests = long_requests(samplings)
    expected = a_decoder(in_place, router, None, draft).generate_all(requests)
    decoder = a_decoder(in_place, router, 9, draft)
    engine, results, started = decoder.engine(), dict[int, Result](), list[int]()
    for request in requests:
        engine.add(request)
    while engine.busy:
        results |= {event.index: event.result for event in engine.step() if event.result is not None}
        started += sorted(each.index for each in engine._active if each.index not in started)
    assert engine._waiting.preemptions > 0
    assert tokens_of([results[index] for index in range(len(requests))]) == tokens_of(expected)
    assert [results[index].usage for index in range(len(requests))] == [each.usage for each in expected]
    assert {each.finish_reason for each in results.values()} == {"length"}
    assert started == sorted(started), "none overtakes another"
    assert empty(decoder)


@pytest.mark.parametrize("in_place", [True, False])
def test_the_oldest_text_is_never_preempted(in_place: bool) -> None:
    decoder = a_decoder(in_place, AlwaysLarge(), 8)
    engine = decoder.engine()
    for request in long_requests([Sampling()]):
        engine.add(request)
    while engine.busy:
        active = {each.index for each in engine._active}
        ended = {event.index for event in engine.step() if event.result is not None}
        if active:
            assert min(active) in {each.index for each in engine._active} | ended


def test_a_request_waits_until_there_is_memory_for_its_prompt() -> None:
    decoder = a_decoder(True, AlwaysLarge(), 8)
    engine = decoder.engine()
    engine.add(Request([1] * (5 * BLOCK), 20))
    engine.add(Request([2] * (4 * BLOCK), 20))
    engine.add(Request([3], 20))
    order = [event.index for event in engine if event.token is not None]
    assert order[:20] == [0] * 20, "the second does not fit, and the third does not overtake it"
    assert set(order[20:]) == {1, 2}
    assert engine._waiting.preemptions == 0


def test_a_preempted_text_can_be_aborted_and_keeps_what_it_has_written() -> None:
    decoder = a_decoder(True, AlwaysLarge(), 6)
    engine = decoder.engine()
    for seed in (1, 2):
        engine.add(Request([seed] * 40, 100))
    seen = []
    while engine.busy and not engine._waiting.preemptions:
        seen += engine.step()
    engine.abort(1)
    (result,) = [event.result for event in engine.step() if event.index == 1]
    assert result is not None
    assert result.finish_reason == "aborted"
    assert result.trace.tokens == tuple(event.token for event in seen if event.index == 1)
    assert result.usage["large"].input_tokens == 40
    assert [event.result.finish_reason for event in engine if event.result] == ["length"]
    assert empty(decoder)


def test_a_request_that_can_never_fit_is_refused() -> None:
    decoder = a_decoder(False, AlwaysLarge(), 4)
    with pytest.raises(PromptTooLong, match="context of 128, which the models and their memory allow"):
        decoder.engine().add(Request([1] * 100, 29))
    assert decoder.generate(Request([1] * 100, 28)).finish_reason == "length"


@pytest.mark.parametrize("in_place", [True, False])
def test_two_engines_share_the_memory_of_a_runner(in_place: bool) -> None:
    """One waits for what the other holds, and both end with the texts that they write alone."""
    requests = long_requests([Sampling()], 6)
    expected = tokens_of(a_decoder(in_place, AlwaysLarge(), None).generate_all(requests))
    runner = a_runner(1, in_place=in_place, slots=4, context=8 * BLOCK, blocks=9)
    decoders = [MixedDecoder(runner, tokenizer=Letters()) for _ in range(2)]
    engines: list[Engine] = [decoder.engine() for decoder in decoders]
    for number, request in enumerate(requests):
        engines[number % 2].add(request)
    found: dict[int, tuple[int, ...]] = {}
    for _ in range(2000):
        for which, engine in enumerate(engines):
            if engine.busy and (engine._active or engine.free_slots):
                for event in engine.step():
                    if event.result is not None:
                        found[2 * event.index + which] = event.result.trace.tokens
    assert [found[number] for number in range(6)] == expected
    assert sorted(runner.free_slots) == [0, 1, 2, 3]


def test_static_calls_from_few_blocks_equal_those_from_many() -> None:
    requests = long_requests([Sampling()], 5)
    expected = tokens_of(a_decoder(True, AlwaysLarge(), None).generate_all(requests))
    runner = GraphRunner(build(seed=1), slots=4, context=8 * BLOCK, blocks=8)
    decoder = MixedDecoder(runner, tokenizer=Letters())
    assert tokens_of(decoder.generate_all(requests)) == expected
    assert runner.static_calls > 50


# --- one call a step ----------------------------------------------------------------------------------------


def test_rows_of_any_lengths_are_one_call() -> None:
    """One verifies a long draft, some decode, and one reads its prompt: the weights are read once."""
    rng = random.Random(1)
    for runner in (
        GraphRunner(build(), slots=16, context=500),
        TorchRunner(build(), slots=16, context=500),
        a_runner(in_place=False, slots=16, context=500),
    ):
        for lengths in ([1] * 16, [1, 7] * 8, [18] * 16, [1, 24, 300, *[3] * 13], [40, *[1] * 15]):
            before = runner.calls
            new = [a_prompt(rng, 1) * length for length in lengths]
            output = runner.forward(list(range(16)), new, [min(length, 2) for length in lengths])
            assert runner.calls == before + 1
            assert bool(output.finite.all())
            for slot in range(16):
                runner.truncate(slot, 10)
