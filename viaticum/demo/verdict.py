"""Whether routing paid in a run: against each fixed model, and against the best mixture of the two.

Pure functions of what was measured. Leaves out measuring and printing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from viaticum.convex_hull import hull
from viaticum.money import format_usd

CHANCE = 0.05  # at a higher probability a difference may be chance


@dataclass(frozen=True)
class Score:
    """What a lane got: right or wrong by question, nano-dollars and seconds."""

    name: str
    right: Mapping[str, bool]
    cost: int
    seconds: float

    @property
    def total(self) -> int:
        return sum(self.right.values())


def mixture_right(points: Sequence[tuple[int, int]], cost: int) -> float:
    """Right answers to expect at a cost from the best mixture of fixed models, or of one and no answer.

    points: (nano-dollars, right answers) of each model on all questions.
    """
    costs = np.array([0, *(each for each, _ in points)], dtype=np.float64)
    right = np.array([0, *(each for _, each in points)], dtype=np.float64)
    corners = hull(right, costs)
    return float(np.interp(cost, costs[corners], right[corners]))


def sign_test(one: Mapping[str, bool], other: Mapping[str, bool]) -> float:
    """Probability of a split as uneven as this one, if both answer equally well (exact McNemar test)."""
    gained = sum(right and not other[name] for name, right in one.items())
    lost = sum(other[name] and not right for name, right in one.items())
    differing = gained + lost
    tail: float = sum(comb(differing, k) for k in range(min(gained, lost) + 1)) / 2**differing
    return min(1.0, 2 * tail)


def verdict(fixed: Sequence[Score], routed: Score) -> list[str]:
    """What the run showed, in sentences; the first says whether routing paid."""
    mixture = mixture_right([(each.cost, each.total) for each in fixed], routed.cost)
    paid = routed.total > mixture
    names = " and ".join(each.name for each in fixed)
    first = (
        f"Routing {'paid' if paid else 'did not pay'} in this run: {routed.total} of {len(routed.right)} "
        f"right for {format_usd(routed.cost)}; the best mixture of {names} gets {mixture:.1f} at that cost."
    )
    return [first, *_comparisons(fixed, routed)]


def _comparisons(fixed: Sequence[Score], routed: Score) -> Iterator[str]:
    chance = False
    for each in fixed:
        difference, probability = routed.total - each.total, sign_test(routed.right, each.right)
        chance |= difference != 0 and probability > CHANCE
        yield (
            f"Against {each.name}: {_signed(difference)} right (sign test: p = {probability:.2f}), "
            f"{_share(routed.cost, each.cost)} of its cost, "
            f"{_share(routed.seconds, each.seconds)} of its time."
        )
    if chance:
        yield f"{len(routed.right)} questions are few: where p is above {CHANCE}, chance alone may do that."


def _signed(count: int) -> str:
    return f"{abs(count)} {'more' if count > 0 else 'fewer'}" if count else "as many"


def _share(amount: float, base: float) -> str:
    return f"{amount / base:.0%}" if base else "an unknown part"
