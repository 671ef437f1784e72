"""Counters of a decoder's model calls, for cost models and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class CallStats:
    """Calls of one model.

    steps: engine steps that needed the model. calls: model calls (a step may take several, as a prefill
    does). rows: sequences, summed over steps. tokens: new tokens read. seconds: until the results were on the
    host.
    """

    steps: int = 0
    calls: int = 0
    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def add_step(self, rows: int, seconds: float) -> None:
        """Count one engine step. What the runner counts is `calls` and `tokens`."""
        self.steps += 1
        self.rows += rows
        self.seconds += seconds


@dataclass(slots=True)
class Stats:
    """Counters of a decoder.

    small, large: calls of each model. proposed: tokens that the small model decoded while active. dropped:
    those that the router dropped. drafted: draft tokens that the large model verified. accepted: those that
    were kept. large_tokens: tokens that the large model made, accepted draft tokens included.
    """

    small: CallStats = field(default_factory=CallStats)
    large: CallStats = field(default_factory=CallStats)
    proposed: int = 0
    dropped: int = 0
    drafted: int = 0
    accepted: int = 0
    large_tokens: int = 0
