"""Texts to learn a token policy from: groups of texts to the same prompts, with the policy's answers drawn.

They are written through the batched decoder that serves. How long each would take is worked out from its calls by the cost model of
the decoder (`decoders.cost`), never from a clock, so that the same policy and seed give the same rollouts. To that end the runners
forget what they hold before a batch begins: what a slot happens to hold decides how calls are made up, and so the last digits.
Knows nothing of right answers or rewards.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from viaticum.decoders.cost import Calls, CostModel
from viaticum.decoders.loop import LoopGuard
from viaticum.decoders.mixed import MixedDecoder
from viaticum.decoders.request import Request, Result
from viaticum.decoders.runner import Runner
from viaticum.decoders.sequence_state import LARGE
from viaticum.decoders.text import Tokenizer
from viaticum.errors import InputError
from viaticum.routers.token.policy import Choices, Policy, Recorder, RStitchPlus


@dataclass(frozen=True, slots=True)
class Rollout:
    """One text. made: tokens of each model (small, large); asked: places at which the policy was asked, dropped: those of them
    where the large model was called. calls, latency: see `decoders.cost`; seconds, estimated. choices: what was drawn; None where the
    policy's likelier answer was taken.
    """

    result: Result
    made: tuple[int, int]
    asked: int
    dropped: int
    calls: Calls
    latency: float
    choices: Choices | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.result.trace.tokens

    @property
    def large_share(self) -> float:
        return self.made[1] / max(1, sum(self.made))


@dataclass(frozen=True, slots=True)
class RolloutWriter:
    """Writes texts with a pair whose runners serve nobody else.

    streams: texts at once whose latency is estimated; cached: tokens at the beginning of every prompt that are taken to be in the cache
    already, as a strategy's examples are. Raises `InputError` for numbers out of range.
    """

    small: Runner
    large: Runner
    tokenizer: Tokenizer
    costs: CostModel
    stop_ids: Sequence[int] = ()
    names: tuple[str, str] = ("small", "large")
    streams: int = 1
    cached: int = 0
    loop_guard: LoopGuard | None = LoopGuard()  # noqa: RUF009 (it is frozen)

    def __post_init__(self) -> None:
        if self.streams < 1 or self.cached < 0:
            raise InputError(
                f"streams must be 1 or more, cached 0 or more; got {self.streams} and {self.cached}"
            )

    def draw(
        self, policy: Policy, tau: float, requests: Sequence[Request], group: int, seeds: Sequence[int]
    ) -> list[list[Rollout]]:
        """A group of texts for each request, the policy's answers drawn. seeds: one for each request.

        Raises `ModelError` where a text fails or features are not finite.
        """
        if group < 2:
            raise InputError(f"a group has two texts or more, to be compared with each other; got {group}")
        # The first text of every group comes first, and so into the slot that holds its prompt (`_read_once`).
        dice = [derived(seed, member) for member in range(group) for seed in seeds]
        many = [
            replace(request, sampling=replace(request.sampling, seed=seed))
            for request, seed in zip([*requests] * group, dice, strict=True)
        ]
        recorder = Recorder(dice, max(request.max_new_tokens for request in requests))
        found = list(self._write(RStitchPlus(policy, tau, recorder=recorder), many))
        found = [replace(each, choices=seen) for each, seen in zip(found, recorder.read(), strict=True)]
        return [found[first :: len(requests)] for first in range(len(requests))]

    def serve(
        self, policy: Policy, tau: float, requests: Sequence[Request], threshold: float = 0.5
    ) -> list[Rollout]:
        """A text for each request, as it is served. Raises `ModelError` where one fails."""
        return list(self._write(RStitchPlus(policy, tau, threshold), requests))

    def _write(self, router: RStitchPlus, requests: Sequence[Request]) -> Iterator[Rollout]:
        repeated = [
            prompt for prompt, times in Counter(tuple(each.prompt) for each in requests).items() if times > 1
        ]
        for runner in (self.small, self.large):
            _forget(runner)
            _read_once(runner, repeated)
        decoder = MixedDecoder(
            self.large,
            self.small,
            tokenizer=self.tokenizer,
            router=router,
            stop_ids=self.stop_ids,
            names=self.names,
            loop_guard=self.loop_guard,
        )
        for request, result in zip(requests, decoder.write_all(requests), strict=True):
            if result.error is not None:
                raise result.error
            yield self._rollout(request, result)

    def _rollout(self, request: Request, result: Result) -> Rollout:
        trace = result.trace
        scores = trace.scores or (float("nan"),) * len(trace.tokens)
        asked = [score == score for score in scores]  # the policy is asked where it is no NaN
        dropped = [was and maker == LARGE for was, maker in zip(asked, trace.made_by, strict=True)]
        calls = Calls.of(
            trace.made_by, dropped, len(request.prompt), min(self.cached, len(request.prompt) - 1)
        )
        return Rollout(
            result,
            (len(trace.made_by) - sum(trace.made_by), sum(trace.made_by)),
            sum(asked),
            sum(dropped),
            calls,
            self.costs.latency(calls, self.streams),
        )


def derived(*parts: object) -> int:
    """A seed made of several things, below 2^48."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "big")


def _read_once(runner: Runner, prompts: Sequence[Sequence[int]]) -> None:
    """Let slots hold prompts that many texts begin with, which would each read them otherwise."""
    for slot, prompt in enumerate(prompts[: runner.slots]):
        runner.start(slot, prompt)
        if new := list(prompt[len(runner.held[slot]) : -1]):
            runner.read([slot], [new])


def _forget(runner: Runner) -> None:
    if len(runner.free) < runner.slots:
        raise InputError("some slots are in use; rollouts need runners that serve nobody else")
    for slot in range(runner.slots):
        runner.reset(slot)
    runner.free.sort()
