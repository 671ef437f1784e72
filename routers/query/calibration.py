"""Calibration on out-of-fold predictions: costs, and the error of probabilities.

Knows tensors of predictions and outcomes only; `fit` makes them. The probabilities themselves are calibrated
by `heads.CalibratedMixture`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from viaticum.routers.query.plans import COST_WEIGHTS

PRIOR_QUESTIONS = 20  # questions that a cost ratio of 1 is worth
SMALL_SAVING = 0.2  # of a column's expected dollars for one question
CHUNK = 2**22  # comparisons at a time


def calibration_error(probabilities: Tensor, correct: Tensor, bins: int = 15) -> float:
    """Expected calibration error: mean distance of confidence from accuracy over bins of equal width.

    probabilities, correct: [N, M]; NaN outcomes are left out.
    """
    known = ~correct.isnan()
    confidence, outcome = probabilities[known].double(), correct[known].double()
    index = (confidence * bins).long().clamp_max(bins - 1)
    sums = torch.zeros(bins, dtype=torch.float64).index_add(0, index, confidence - outcome)
    return float(sums.abs().sum() / max(1, len(confidence)))


def cost_ratios(probabilities: Tensor, expected: Tensor, cost: Tensor) -> Tensor:
    """Actual over expected cost of what is chosen at each of `COST_WEIGHTS`, on out-of-fold predictions [W].

    A mean cost depends on the most expensive questions, so that the ratio is shrunk towards 1 by
    `PRIOR_QUESTIONS`. It is 1 where what is chosen is free. A question of which no cost is known, as in live
    runs, says nothing. probabilities, expected, cost: [Q, M]; cost NaN where unknown.
    """
    asked = ~cost.isnan().all(1)
    probabilities, expected, cost = probabilities[asked], expected[asked], cost[asked]
    ratios = []
    for weight in COST_WEIGHTS:
        utility = (probabilities - weight * expected).masked_fill(cost.isnan(), float("-inf"))
        chosen = utility.argmax(1)[:, None]
        actual_sum, expected_sum = cost.gather(1, chosen).sum(), expected.gather(1, chosen).sum()
        prior = PRIOR_QUESTIONS * expected_sum / max(1, len(cost))
        ratios.append((actual_sum + prior) / (expected_sum + prior))
    return torch.stack(ratios).nan_to_num(nan=1.0)


def without_small_savings(accuracy: Tensor, cost: Tensor, usual: Tensor) -> Tensor:
    """Expected dollars, in which no column saves a little that usually costs more [N, M].

    A column that costs more than another on most questions looks cheaper on some, where costs are known
    to a fifth at best. If it is not more accurate there either, what is chosen for that saving loses
    accuracy and saves nothing. Such a column is expected to cost as much as the other one, unless it saves
    more than `SMALL_SAVING` of that.

    Args:
        accuracy, cost: as expected of each question [N, M].
        usual: mean dollars of the columns over known questions [M].
    """
    usually_cheaper = usual[:, None] < usual
    parts = []
    rows = max(1, CHUNK // len(usual) ** 2)
    for right, dollars in zip(torch.split(accuracy, rows), torch.split(cost, rows), strict=True):
        other = dollars[:, :, None]
        loses = usually_cheaper & (right[:, :, None] >= right[:, None])
        loses &= dollars[:, None] > (1 - SMALL_SAVING) * other
        parts.append(torch.maximum(dollars, torch.where(loses, other, 0.0).amax(1)))
    return torch.cat(parts)
