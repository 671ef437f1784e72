"""Decoding modes of a small/large pair, and statistics of how a pair hands off and accepts drafts.

Inputs of the cost model (`decoders.cost`). Leaves out which modes a caller allows.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from viaticum.decoders.stats import Stats
from viaticum.errors import DataError, InputError

DRAFTS = (1, 2, 3, 4, 6, 8)  # draft lengths that are tried


@dataclass(frozen=True, slots=True)
class HandoffStats:
    """Probabilities that describe a pair of models with a token router.

    Args:
        drop: that the router drops a token of the small model.
        back: that the large model hands back after a token.
        accept: that the large model accepts the next draft token, given that it accepted those before.

    Raises:
        InputError: a value outside [0, 1].
    """

    drop: float
    back: float
    accept: float = 0.7

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 <= value <= 1:
                raise InputError(f"{name} is a chance between 0 and 1, got {value}")

    @property
    def large_share(self) -> float:
        """Expected share of tokens that the large model makes."""
        if self.drop == 0:
            return 0.0
        if self.back == 0:
            return 1.0
        large, small = 1 / self.back, (1 - self.drop) / self.drop
        return large / (large + small)

    @classmethod
    def from_stats(cls, stats: Stats) -> HandoffStats:
        """Estimate from the counters of a decoder.

        Every run of the large model begins with a dropped token. If the token after a run is dropped at once,
        a trace shows one run instead of two; therefore traces alone are not enough. Without drafts `accept`
        keeps its default.

        Raises:
            DataError: nothing was decoded.
        """
        if not stats.proposed and not stats.large_tokens:
            raise DataError("the decoder has written nothing; let it write a few texts first")
        handoff = cls(
            drop=stats.dropped / stats.proposed if stats.proposed else 1.0,
            back=min(1.0, stats.dropped / stats.large_tokens) if stats.large_tokens else 1.0,
        )
        if not stats.drafted:
            return handoff
        return replace(handoff, accept=_acceptance(stats.accepted, stats.drafted, stats.large.rows))


# About those of R-Stitch with tau 0.03 on a 0.5B and a 1.5B model.
TYPICAL = HandoffStats(drop=0.2, back=0.4, accept=0.7)


def _acceptance(accepted: int, drafted: int, passes: int) -> float:
    """The probability per token that gives `accepted` tokens of drafts of the mean length, by bisection."""
    length = max(1, round(drafted / max(1, passes)))
    expected = accepted / drafted * length
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if sum(middle**position for position in range(1, length + 1)) < expected:
            low = middle
        else:
            high = middle
    return high


@dataclass(frozen=True, slots=True)
class DecodingMode:
    """One way to decode with a pair.

    routed: a token router chooses the model of each token; else the large model decodes all of them.
    draft: tokens that the small model drafts before each pass of the large one.
    """

    routed: bool
    draft: int = 0

    def __str__(self) -> str:
        name = "routed" if self.routed else "speculative" if self.draft else "large"
        return f"{name}:{self.draft}" if self.draft else name


LARGE_ALONE = DecodingMode(routed=False)
# Modes whose output is that of the large model alone.
LOSSLESS = (LARGE_ALONE, *(DecodingMode(False, draft) for draft in DRAFTS))
ROUTED = (DecodingMode(True), *(DecodingMode(True, draft) for draft in DRAFTS[:4]))
