"""Simulate the steps of `Engine` with measured call times and hand-off probabilities instead of models.

Gives the throughput to expect of a decoding mode. Leaves out quality, prompts and memory.
"""

from __future__ import annotations

import random

from viaticum.decoders.call_times import CallTimes
from viaticum.decoders.decoding_mode import DecodingMode, HandoffStats
from viaticum.decoders.speculate import BatchWaitPolicy

SIMULATED_TOKENS = 4_000


class _SimulatedSequence:
    """A sequence: its active model, its draft, and the tokens that each model has not read."""

    def __init__(self, large: bool) -> None:
        self.large = large  # whether the large model is active
        self.unread_small = self.unread_large = 1
        self.draft = self.draft_target = 0
        self.goes_on = False  # whether the large model wrote the last token and nothing was drafted since

    @property
    def drafting(self) -> bool:
        return self.large and self.draft < self.draft_target


class Simulation:
    """The steps of an engine over simulated time, seeded by mode and streams.

    Args:
        small, large: call times of the models.
        padded: whether calls have static shapes (CUDA), so that rows are padded to the longest.
        mode: how the pair decodes.
        handoff: how often it hands off and accepts drafts.
        streams: sequences decoded at once.
        batch: rows that the large model waits for.
        tokens: tokens to simulate.
        round_trip: seconds that a call of the large model takes less if all rows go on where it wrote itself.
    """

    def __init__(
        self,
        small: CallTimes,
        large: CallTimes,
        padded: bool,
        mode: DecodingMode,
        handoff: HandoffStats,
        streams: int,
        batch: int,
        tokens: int = SIMULATED_TOKENS,
        round_trip: float = 0.0,
    ) -> None:
        self._small, self._large, self._padded = small, large, padded
        self._mode, self._handoff = mode, handoff
        self._batch_wait = BatchWaitPolicy(batch, mode.draft)
        self._rng = random.Random(f"{mode}{streams}")
        self._sequences = [_SimulatedSequence(not mode.routed) for _ in range(streams)]
        for sequence in self._sequences:
            self._plan_draft(sequence)
        self._seconds, self._tokens, self._wanted = 0.0, 0, tokens
        self._round_trip = round_trip

    def tokens_per_second(self) -> float:
        """Tokens per simulated second, all streams together."""
        while self._tokens < self._wanted:
            self._run_small()
            self._run_large()
        return self._tokens / self._seconds

    def _call_seconds(self, times: CallTimes, lengths: list[int]) -> float:
        """Seconds of one call with `lengths` new tokens of each row."""
        return times(len(lengths), max(lengths) if self._padded else sum(lengths) / len(lengths))

    def _happens(self, probability: float) -> bool:
        return self._rng.random() < probability

    def _plan_draft(self, sequence: _SimulatedSequence) -> None:
        drafts = sequence.large and self._mode.draft
        sequence.draft_target = max(self._mode.draft, sequence.draft) if drafts else 0

    def _run_small(self) -> None:
        sequences = [each for each in self._sequences if not each.large or each.drafting]
        if not sequences:
            return
        self._seconds += self._call_seconds(self._small, [each.unread_small for each in sequences])
        for sequence in sequences:
            if sequence.large:
                sequence.draft += 1
                sequence.unread_small = 1  # the draft token itself
            elif self._happens(self._handoff.drop):
                sequence.large = True
                # The dropped token is a draft token at no cost.
                sequence.draft = sequence.unread_small = int(self._mode.draft > 0)
                self._plan_draft(sequence)
            else:
                sequence.unread_small = 1
                sequence.unread_large += 1
                self._tokens += 1

    def _run_large(self) -> None:
        ready = [each for each in self._sequences if each.large and not each.drafting]
        drafting = any(each.drafting for each in self._sequences)
        small_active = any(not each.large for each in self._sequences)
        if not self._batch_wait.should_run(len(ready), drafting, small_active):
            return
        seconds = self._call_seconds(self._large, [each.unread_large + each.draft for each in ready])
        if all(each.goes_on and not each.draft for each in ready):
            seconds = max(0.0, seconds - self._round_trip)
        self._seconds += seconds
        for sequence in ready:
            read = max(sequence.draft - 1, 0)  # the small model has not read its last draft token
            made, accepted, back = self._verify(sequence.draft)
            self._tokens += made
            behind = 0 if sequence.draft else sequence.unread_small
            sequence.unread_small = max(1, behind + made - min(accepted, read))
            sequence.goes_on = not back and not sequence.draft
            sequence.unread_large, sequence.draft = 1, 0
            sequence.large = not back
            self._plan_draft(sequence)

    def _verify(self, draft: int) -> tuple[int, int, bool]:
        """Tokens that a pass over a draft makes, how many of them were drafted, and whether it hands back."""
        made = accepted = 0
        for position in range(draft + 1):
            made += 1
            accepts = position < draft and self._happens(self._handoff.accept)
            accepted += accepts
            if self._mode.routed and self._happens(self._handoff.back):
                return made, accepted, True
            if not accepts:
                break
        return made, accepted, False
