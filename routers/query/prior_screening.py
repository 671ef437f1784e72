"""What a prior says of pairs before outcomes are bought: their order, and which of them are hopeless.

A pair is hopeless where another one costs no more and is right more often beyond doubt, and both would still
hold if the next outcome said the opposite: what a first outcome could contradict is never left out. Models
are told apart by the public figures of their entries alone, so that without figures nothing is left out.
Leaves out the estimates (`routers.query.prior`) and pairs that outcomes beat (`routers.query.acquisition`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from viaticum.routers.query.ability import Estimates
from viaticum.routers.query.prior import AbilityPrior, PriorModel
from viaticum.types import Outcome, Pair

DOUBT = 2.5  # standard deviations by which a pair has to be worse


@dataclass(frozen=True)
class PriorScreen:
    """The pairs of a run as a prior sees them.

    Args:
        prior: of the models.
        models: what is known of them.
        pairs: those that may be asked, of these models.
        cost_p50: nano-dollars of an answer of each pair, median.
        cost_p90: 90% quantile of the same.
    """

    prior: AbilityPrior
    models: tuple[PriorModel, ...]
    pairs: tuple[Pair, ...]
    cost_p50: tuple[int, ...]
    cost_p90: tuple[int, ...]

    def estimates(self) -> Estimates:
        return self.prior.estimates(self.pairs, self.models)

    def shares(self) -> list[tuple[float, float, float]]:
        """Expected accuracy of each pair, and its 90% interval."""
        found = self.estimates()
        return list(zip(*(each.tolist() for each in (found.accuracy, *found.interval)), strict=True))

    def order(self) -> list[int]:
        """Indices of the pairs, by expected accuracy from the best on; of equal ones the cheapest first."""
        accuracy = self.estimates().accuracy.round(6).tolist()
        return sorted(range(len(self.pairs)), key=lambda each: (-accuracy[each], self.cost_p50[each]))

    def hopeless(self, outcomes: Sequence[Outcome] = ()) -> dict[int, int]:
        """Indices of the hopeless pairs, each with that of the pair which beats it by most.

        Costs are compared with a margin, the other's 90% quantile with the median, since lengths are guessed.

        Args:
            outcomes: known so far; the prior yields to them. Where the other one turns out to be right less
                often than this one was expected to be, its figures say nothing of these questions.
        """
        prior = self.prior.with_outcomes(outcomes) if outcomes else self.prior
        found = prior.estimates(self.pairs, self.models)
        expected, now = self.estimates().accuracy, found.accuracy
        beaten = {}
        for pair in range(len(self.pairs)):
            leads = {
                other: _lead(found, other, pair)
                for other in range(len(self.pairs))
                if other != pair
                and self.cost_p90[other] <= self.cost_p50[pair]
                and now[other] > expected[pair]
            }
            for other in sorted(leads, key=lambda each: -leads[each]):
                if leads[other] <= DOUBT:
                    break
                opposite = {self.pairs[pair]: True, self.pairs[other]: False}
                if _lead(prior.estimates(self.pairs, self.models, None, opposite), other, pair) > DOUBT:
                    beaten[pair] = other
                    break
        return beaten


def _lead(found: Estimates, first: int, second: int) -> float:
    """Standard deviations of the difference by which the first pair is ahead."""
    covariance = found.covariance
    variance = covariance[first, first] + covariance[second, second] - 2 * covariance[first, second]
    return float((found.mean[first] - found.mean[second]) / np.sqrt(max(variance, 1e-9)))
