"""Calibration on out-of-fold predictions: token quantiles, costs, and the error of probabilities.

Knows tensors of predictions and outcomes only; `fit` makes them. The probabilities themselves are calibrated
by `heads.CalibratedMixture`.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from viaticum.routers.query.heads import QUANTILES
from viaticum.routers.query.outcome_matrix import MIN_QUESTIONS
from viaticum.routers.query.plans import COST_WEIGHTS

FALLBACK_SPREAD = 0.5  # standard deviation of log tokens where truncation hides the quantile
PRIOR_QUESTIONS = 20  # questions that a cost ratio of 1 is worth


def calibration_error(probabilities: Tensor, correct: Tensor, bins: int = 15) -> float:
    """Expected calibration error: mean distance of confidence from accuracy over bins of equal width.

    probabilities, correct: [N, M]; NaN outcomes are left out.
    """
    known = ~correct.isnan()
    confidence, outcome = probabilities[known].double(), correct[known].double()
    index = (confidence * bins).long().clamp_max(bins - 1)
    sums = torch.zeros(bins, dtype=torch.float64).index_add(0, index, confidence - outcome)
    return float(sums.abs().sum() / max(1, len(confidence)))


def token_offsets(predicted: Tensor, log_tokens: Tensor, truncated: Tensor) -> Tensor:
    """What to add to predicted log tokens so that 50% and 90% of unseen answers are no longer [P, 2].

    Split conformal prediction (Vovk et al. 2005) per pair; a pair with few answers gets the offsets over all
    pairs. Of a truncated answer only a lower bound is known: quantiles are those of Kaplan and Meier (1958).

    Args:
        predicted: out-of-fold quantiles [Q, P, 2].
        log_tokens: [Q, P]; NaN where unknown.
        truncated: answers cut at the token limit [Q, P].
    """
    residual = log_tokens[..., None] - predicted  # [Q, P, 2]
    known = ~log_tokens.isnan()
    overall = [
        censored_quantile(residual[..., n][known], truncated[known], level)
        for n, level in enumerate(QUANTILES)
    ]
    offsets = torch.tensor(overall).repeat(residual.shape[1], 1)
    for pair in range(residual.shape[1]):
        own = known[:, pair]
        if int(own.sum()) >= MIN_QUESTIONS:
            for n, level in enumerate(QUANTILES):
                offsets[pair, n] = censored_quantile(residual[own, pair, n], truncated[own, pair], level)
    return offsets.clamp(-5, 5)


def censored_quantile(values: Tensor, censored: Tensor, level: float) -> float:
    """The Kaplan-Meier quantile of values [n]; censored ones are lower bounds.

    Where censoring hides the quantile it is extrapolated from the last visible one, with a normal
    distribution of standard deviation `FALLBACK_SPREAD`. 0 for no values.
    """
    if len(values) == 0:
        return 0.0
    from scipy.stats import CensoredData, ecdf

    array, mask = values.numpy(), censored.numpy()
    cdf = ecdf(CensoredData.right_censored(array, mask)).cdf
    reached = np.flatnonzero(cdf.probabilities >= level - 1e-9)
    if len(reached):
        return float(cdf.quantiles[reached[0]])
    visible, last = (0.0, array.min()) if mask.all() else (float(cdf.probabilities[-1]), array[~mask].max())
    normal = NormalDist(sigma=FALLBACK_SPREAD)
    return float(last) + normal.inv_cdf(level) - normal.inv_cdf(max(visible, 0.01))


def cost_ratios(probabilities: Tensor, expected: Tensor, cost: Tensor) -> Tensor:
    """Actual over expected cost of what is chosen at each of `COST_WEIGHTS`, on out-of-fold predictions [W].

    A mean cost depends on the most expensive questions, so that the ratio is shrunk towards 1 by
    `PRIOR_QUESTIONS`. probabilities, expected, cost: [Q, M]; cost NaN where unknown.
    """
    ratios = []
    for weight in COST_WEIGHTS:
        utility = (probabilities - weight * expected).masked_fill(cost.isnan(), float("-inf"))
        chosen = utility.argmax(1)[:, None]
        actual_sum = cost.gather(1, chosen).nan_to_num(0.0).sum()
        expected_sum = expected.gather(1, chosen).sum()
        prior = PRIOR_QUESTIONS * expected_sum / len(cost)
        ratios.append((actual_sum + prior) / (expected_sum + prior))
    return torch.stack(ratios)
