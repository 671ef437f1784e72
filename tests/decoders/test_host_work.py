"""What a step costs the host: reads from the device, and work that must not grow with the text."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, SupportsIndex

import pytest
import torch
from host_reads import HostReads, no_host_reads
from tiny_models import Letters, build
from torch import Tensor

from viaticum.decoders import MixedDecoder, Request, Sampling, TorchRunner
from viaticum.routers.token import AlwaysLarge, DivergenceRouter, EntropyRouter, Step, TokenRouter

pytestmark = pytest.mark.usefixtures("one_thread")


def a_pair(router: TokenRouter, draft: int | None = 0) -> MixedDecoder:
    runners = [TorchRunner(build(seed=seed), slots=3) for seed in (1, 0)]
    return MixedDecoder(*runners, tokenizer=Letters(), router=router, draft=draft)


# --- reads from the device ----------------------------------------------------------------------------------


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    "read",
    [
        lambda each: each[0].item(),
        lambda each: bool(each[0]),
        lambda each: 1 if (each > 0).all() else 0,
        lambda each: int(each[1]),
        lambda each: torch.full((2,), each[0]),
        lambda each: each[each > 1],
        lambda each: torch.where(each > 1),
        lambda each: torch.equal(each, each),
    ],
)
def test_every_way_to_wait_for_a_number_is_seen(read: Callable[[Tensor], Any], inference: bool) -> None:
    with torch.inference_mode(inference):
        numbers = torch.tensor([1.0, 2.0])
        with HostReads() as seen:
            read(numbers)
            assert len(seen.reads) == 1
            torch.where(numbers > 1, numbers, 0.0).sum()
            numbers.tolist()
    assert len(seen.reads) == 1
    assert seen.copies == ["tolist"]


class Peeking(DivergenceRouter):
    """Waits for the device twice a step, as a rule of plain Python over tensors does."""

    def score(self, step: Step) -> Tensor:
        flat = step.entropy.max() > 0.5
        return step.entropy * float(step.entropy.mean()) if flat else step.entropy * step.entropy[0].item()


def test_a_router_that_reads_the_device_twice_a_step_is_caught() -> None:
    engine = a_pair(Peeking(1.0)).engine()
    engine.add(Request([1, 2, 3], 6))
    engine.step()
    with HostReads() as seen:
        engine.step()
    assert len(seen.reads) == 2


@pytest.mark.parametrize("draft", [0, 2])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(0.8, 0.9, 12, seed=3, min_p=0.01),
        Sampling(1.0, 0.95, seed=4, repetition_penalty=1.1, frequency_penalty=0.2),
    ],
)
def test_a_step_reads_once_a_call_however_tokens_are_drawn(sampling: Sampling, draft: int) -> None:
    decoder = a_pair(EntropyRouter(0.75), draft)
    engine = decoder.engine()
    for first in range(3):
        engine.add(Request([first, 2, 3], 14, sampling))
    engine.step()
    while engine.busy:
        steps = [calls.steps for calls in (decoder.stats.small, decoder.stats.large)]
        with no_host_reads() as seen:
            engine.step()
        calls = sum((decoder.stats.small.steps, decoder.stats.large.steps)) - sum(steps)
        assert seen.copies.count("tolist") == calls
        assert set(seen.copies) <= {"tolist", "numpy"}  # numpy: of the host's own numbers


# --- work by the length of the text -------------------------------------------------------------------------


class Counting(list[int]):
    """A list that counts the items that its readers touch."""

    touched = 0

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        Counting.touched += len(found) if isinstance(index, slice) else 1
        return found

    def __iter__(self) -> Iterator[int]:
        Counting.touched += len(self)
        return super().__iter__()

    def __add__(self, other: Any) -> Any:
        Counting.touched += len(self)
        return super().__add__(other)

    def __eq__(self, other: object) -> bool:
        Counting.touched += len(self)
        return super().__eq__(other)

    __hash__ = None  # type: ignore[assignment]

    def __contains__(self, item: object) -> bool:
        Counting.touched += len(self)
        return super().__contains__(item)

    def copy(self) -> list[int]:
        Counting.touched += len(self)
        return super().copy()

    def count(self, item: Any) -> int:
        Counting.touched += len(self)
        return super().count(item)

    def index(self, item: Any, *limits: SupportsIndex) -> int:
        Counting.touched += len(self)
        return super().index(item, *limits)


class CountingLetters(Letters):
    """A tokenizer that counts the tokens that it turns into text."""

    decoded = 0

    def decode(self, token_ids: list[int]) -> str:
        self.decoded += len(token_ids)
        return super().decode(token_ids)


@pytest.mark.parametrize("router", [AlwaysLarge(), EntropyRouter(0.75)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_step_touches_as_many_tokens_of_a_long_text_as_of_a_short_one(
    router: TokenRouter, temperature: float
) -> None:
    def touched(length: int) -> list[int]:
        """Tokens that ten steps touch in lists and in the tokenizer, with three texts of `length`."""
        rng = random.Random(5)
        decoder, letters = a_pair(router, 2), CountingLetters()
        decoder.config = replace(decoder.config, tokenizer=letters, loop_guard=None)
        engine = decoder.engine()
        for seed in range(3):
            prompt = [rng.randrange(97) for _ in range(length)]
            sampling = Sampling(temperature, repetition_penalty=1.2, seed=seed)
            engine.add(Request(prompt, 200, sampling, stop=("never",)))
        engine.step()
        while any(len(sequence.prefilled) < 2 for sequence in engine._active):
            engine.step()
        for sequence in engine._active:
            for name in ("tokens", "made_by", "entropies", "accepted", "scores"):
                setattr(sequence, name, Counting(getattr(sequence, name)))
        for runner in decoder.runners.values():
            runner.cached_tokens = [Counting(held) for held in runner.cached_tokens]
        before, letters.decoded = Counting.touched, 0
        for _ in range(10):
            engine.step()
        return [Counting.touched - before, letters.decoded]

    for short, long in zip(touched(20), touched(1500), strict=True):
        assert long <= short + 200, "a few tokens a step and text, whatever its length"
