"""Rollouts to train a token policy: groups of texts for the same prompts, with sampled decisions.

They are decoded by the batched decoder that serves. The latency of each is computed from its calls by the
cost model (`decoders.cost`), never from a clock, so that the same policy and seed give the same rollouts. For
the same reason the runners' slots are emptied before a batch: cached prefixes change how calls are batched,
and so the last digits. Leaves out correctness and rewards (`routers.token.policy_train`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from viaticum.decoders.cost import Calls, CostModel
from viaticum.decoders.loop import LoopGuard
from viaticum.decoders.mixed import MixedDecoder
from viaticum.decoders.request import Request, Result
from viaticum.decoders.runner import Runner
from viaticum.decoders.sequence_state import LARGE
from viaticum.decoders.text import Tokenizer
from viaticum.decoders.vocabulary import SharedVocabulary
from viaticum.errors import InputError
from viaticum.routers.token.policy import Policy, PolicyDecisions, Recorder, RStitchPlus


@dataclass(frozen=True, slots=True)
class Rollout:
    """One text.

    Args:
        result: of the decoder.
        tokens_by_model: output tokens of the small and of the large model.
        decision_count: positions at which the policy decided.
        dropped: those of them at which the large model was called.
        calls: model calls, see `decoders.cost`.
        latency: estimated seconds.
        decisions: sampled decisions; None if the more likely ones were taken.
    """

    result: Result
    tokens_by_model: tuple[int, int]
    decision_count: int
    dropped: int
    calls: Calls
    latency: float
    decisions: PolicyDecisions | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.result.trace.tokens

    @property
    def large_share(self) -> float:
        return self.tokens_by_model[1] / max(1, sum(self.tokens_by_model))


@dataclass(frozen=True, slots=True)
class RolloutGenerator:
    """Decodes rollouts with a pair whose runners serve nothing else.

    Args:
        small, large: runners of the pair.
        tokenizer: turns token ids into text.
        costs: estimates the latency.
        stop_ids: token ids that end a text.
        names: of the small and the large model in usage and traces.
        streams: texts decoded at once, for the latency estimate.
        cached: tokens at the beginning of every prompt taken as cached, as the examples of a strategy are.
        loop_guard: ends texts that loop.
        shared_vocabulary: see `DecoderConfig`.

    Raises:
        InputError: a number out of range.
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
    shared_vocabulary: SharedVocabulary | None = None

    def __post_init__(self) -> None:
        if self.streams < 1 or self.cached < 0:
            raise InputError(
                f"streams must be 1 or more, cached 0 or more; got {self.streams} and {self.cached}"
            )

    def sample(
        self, policy: Policy, tau: float, requests: Sequence[Request], group: int, seeds: Sequence[int]
    ) -> list[list[Rollout]]:
        """A group of texts for each request, with sampled decisions of the policy.

        Args:
            policy: on the small model's device.
            tau: entropy threshold above which it decides.
            requests: Q requests.
            group: texts a request, 2 or more.
            seeds: Q seeds.

        Returns:
            Q groups.

        Raises:
            InputError: `group` is below 2, or slots are in use.
            ModelError: a text failed, or features are not finite.
        """
        if group < 2:
            raise InputError(f"a group has two texts or more, to be compared with each other; got {group}")
        text_seeds = [derive_seed(seed, member) for member in range(group) for seed in seeds]
        seeded = [
            replace(request, sampling=replace(request.sampling, seed=seed))
            for request, seed in zip([*requests] * group, text_seeds, strict=True)
        ]
        recorder = Recorder(text_seeds, max(request.max_new_tokens for request in requests))
        rollouts = list(self._decode(RStitchPlus(policy, tau, recorder=recorder), seeded))
        rollouts = [
            replace(rollout, decisions=decisions)
            for rollout, decisions in zip(rollouts, recorder.read(), strict=True)
        ]
        return [rollouts[first :: len(requests)] for first in range(len(requests))]

    def generate(
        self, policy: Policy, tau: float, requests: Sequence[Request], threshold: float = 0.5
    ) -> list[Rollout]:
        """A text for each request, decoded as in serving.

        Args:
            policy: on the small model's device.
            tau: entropy threshold above which it decides.
            requests: to decode.
            threshold: probability above which the large model is called.

        Raises:
            InputError: slots are in use.
            ModelError: a text failed.
        """
        return list(self._decode(RStitchPlus(policy, tau, threshold), requests))

    def _decode(self, router: RStitchPlus, requests: Sequence[Request]) -> Iterator[Rollout]:
        for runner in (self.small, self.large):
            _clear_slots(runner)
        decoder = MixedDecoder(
            self.large,
            self.small,
            tokenizer=self.tokenizer,
            router=router,
            stop_ids=self.stop_ids,
            names=self.names,
            loop_guard=self.loop_guard,
            shared_vocabulary=self.shared_vocabulary,
        )
        for request, result in zip(requests, decoder.generate_all(requests), strict=True):
            if result.error is not None:
                raise result.error
            yield self._rollout(request, result)

    def _rollout(self, request: Request, result: Result) -> Rollout:
        trace = result.trace
        scores = trace.scores or (float("nan"),) * len(trace.tokens)
        decides = [score == score for score in scores]  # the policy decides where its score is not NaN
        dropped = [decided and maker == LARGE for decided, maker in zip(decides, trace.made_by, strict=True)]
        small, large = map(len, request.prompts)
        calls = Calls.from_trace(trace.made_by, dropped, large, min(self.cached, small - 1, large - 1), small)
        return Rollout(
            result,
            (len(trace.made_by) - sum(trace.made_by), sum(trace.made_by)),
            sum(decides),
            sum(dropped),
            calls,
            self.costs.latency(calls, self.streams),
        )


def derive_seed(*parts: object) -> int:
    """A seed below 2^48 from several values."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "big")


def _clear_slots(runner: Runner) -> None:
    if len(runner.free_slots) < runner.slots:
        raise InputError("some slots are in use; rollouts need runners that serve nobody else")
    for slot in range(runner.slots):
        runner.reset(slot)
    runner.free_slots.sort()
