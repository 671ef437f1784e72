"""What changes of models do to a router's predictions: shares of the heads, factors of tokens and costs.

Of a model that has changed, predictions keep half of the trust that they had beside the static means. Its
tokens and costs are multiplied by what they were found to be, its accuracy is shifted where answers were
known. A plan of several pairs has the mean of its pairs' shifts, and the factor of their costs together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from viaticum.routers.query.change_detection import ModelChange
from viaticum.routers.query.plans import Plan
from viaticum.types import Pair

KEPT_TRUST = 0.5


@dataclass(frozen=True)
class Adjustments:
    """For P pairs and M columns, those that were added among them.

    Args:
        kept: part of the heads' share that is left [M].
        accuracy: added [M].
        cost: factor of expected dollars [M].
        tokens: factors of the quantiles of tokens [P, 2].
        dollars: factors of the quantiles of dollars [P, 2].
    """

    kept: Tensor
    accuracy: Tensor
    cost: Tensor
    tokens: Tensor
    dollars: Tensor

    @classmethod
    def of(
        cls,
        changes: Mapping[str, ModelChange],
        pairs: Sequence[Pair],
        plans: Sequence[Plan],
        dollars: Mapping[Pair, float],
    ) -> Adjustments:
        """dollars: usual ones by pair, by which the pairs of a plan count."""
        none = ModelChange("", "", "", "longer", 0)
        of_pair = {pair: changes.get(pair.model, none) for pair in pairs}
        kept, accuracy, cost = [], [], []
        for plan in plans:
            found = [changes.get(pair.model, none) for pair in plan.pairs]
            weights = [max(dollars.get(pair, 0.0), 1e-12) for pair in plan.pairs]
            factors = sum(each.costs[2] * weight for each, weight in zip(found, weights, strict=True))
            kept.append(KEPT_TRUST if any(each is not none for each in found) else 1.0)
            accuracy.append(sum(each.accuracy for each in found) / len(found))
            cost.append(factors / sum(weights))
        return cls(
            torch.tensor(kept),
            torch.tensor(accuracy),
            torch.tensor(cost),
            torch.tensor([of_pair[pair].tokens for pair in pairs]),
            torch.tensor([of_pair[pair].costs[:2] for pair in pairs]),
        )
