"""What a decoder's model calls took: counts and seconds, for cost models and benchmarks. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class CallStats:
    """Calls of one model: steps that needed it, model calls (a step may take several, a prefill does), rows
    over all steps, new tokens read, and seconds until the results were on the host."""

    steps: int = 0
    calls: int = 0
    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class Stats:
    """small, large: the calls of each model. proposed and dropped: tokens that the small model wrote with the pen,
    and those of them that the router dropped. drafted and accepted: draft tokens that the large model
    was shown, and those of them that were kept. large_tokens: tokens that the large model wrote."""

    small: CallStats = field(default_factory=CallStats)
    large: CallStats = field(default_factory=CallStats)
    proposed: int = 0
    dropped: int = 0
    drafted: int = 0
    accepted: int = 0
    large_tokens: int = 0
