"""Quantiles of amounts such as output tokens and costs, of which some are known as lower bounds only.

Output lengths are skewed, approximately log-normal, and cut at the most tokens that a call may write: a cut
output says only that it would have been longer. Array arithmetic only.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
NORMAL_P90 = 1.2816  # standard deviations of a normal distribution below which 90% lie
USUAL_SPREAD = 0.5  # standard deviation of the logarithm where the data say nothing of it
SPREAD_BOUNDS = (0.1, 2.0)
SPREAD_PRIOR = 20  # observations that `USUAL_SPREAD` is worth


def moments(p50: Array, p90: Array, most: Array | float | None = None) -> tuple[Array, Array]:
    """Mean and standard deviation of log-normal amounts with these quantiles, clipped at `most`.

    With m and s the mean and standard deviation of ln X, and z = (ln c - m) / s:
    E[min(X, c)^k] = exp(k m + k^2 s^2 / 2) N(z - k s) + c^k (1 - N(z)).

    Args:
        p50, p90: quantiles, arrays of one shape; an amount with p50 = 0 is 0.
        most: upper bound c; None for none.
    """
    p50, p90 = np.asarray(p50, dtype=np.float64), np.asarray(p90, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        middle = np.log(p50)
        width = np.maximum(np.log(p90) - middle, 0.0) / NORMAL_P90
        powers = []
        for power in (1, 2):
            moment = np.exp(power * middle + power**2 * width**2 / 2)
            if most is not None:
                z = (np.log(most) - middle) / width
                moment = moment * below(z - power * width) + np.asarray(most) ** power * (1 - below(z))
            sure = p50 if most is None else np.minimum(p50, most)
            powers.append(np.where(width > 0, moment, sure**power))
    mean, square = (np.where(p50 > 0, each, 0.0) for each in powers)
    return mean, np.sqrt(np.maximum(square - mean**2, 0.0))


def mean_and_spread(p50: Array, p90: Array, mean: Array) -> tuple[Array, Array]:
    """Mean and standard deviation of log-normal amounts with these quantiles; a known mean scales both.

    mean: NaN where it is unknown. All arrays have one shape; NaN quantiles give NaN.
    """
    usual, spread = moments(p50, p90)
    spread = np.where(np.isnan(usual), math.nan, spread)
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = np.where(~np.isnan(mean) & (usual > 0), spread * mean / usual, spread)
    return np.where(np.isnan(mean), usual, mean), scaled


def below(z: Array) -> Array:
    """The normal distribution function, to 1e-7 (Abramowitz and Stegun, 26.2.17), which numpy lacks."""
    t = 1 / (1 + 0.2316419 * np.abs(z))
    tail = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    tail *= t * (0.319381530 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))))
    return np.asarray(np.where(z > 0, 1 - tail, tail))


def censored_quantile(logs: Array, cut: Array, level: float, weights: Array | None = None) -> float:
    """The quantile of logarithms of which some are lower bounds, by Kaplan and Meier (1958).

    Where the cut ones hide the quantile, it is extrapolated along the line through the visible ones on normal
    probability paper (that is, as a log-normal amount); with few of them the slope tends to `USUAL_SPREAD`.

    Args:
        logs: logarithms of the amounts [n]; 0 for an empty array.
        cut: True where the amount would have been larger [n].
        level: above 0 and below 1.
        weights: of the amounts [n]; by default 1 each.
    """
    if len(logs) == 0:
        return 0.0
    values, shares = _kaplan_meier(logs, cut, weights)
    reached = np.flatnonzero(shares >= level - 1e-9)
    if len(reached):
        return float(values[reached[0]])
    normal = NormalDist()
    if not len(values):
        return float(logs.min()) + USUAL_SPREAD * (normal.inv_cdf(level) - normal.inv_cdf(0.01))
    step = normal.inv_cdf(level) - normal.inv_cdf(min(max(float(shares[-1]), 0.01), level))
    beyond = logs[cut & (logs >= values[-1])]  # what is left is longer than the first of these
    return max(float(values[-1]) + _tail_spread(values, shares) * step, float(beyond.min()))


def _kaplan_meier(logs: Array, cut: Array, weights: Array | None) -> tuple[Array, Array]:
    """The values that were seen whole, in rising order, and the share of all that is not above each."""
    weights = np.ones(len(logs)) if weights is None else np.asarray(weights, dtype=np.float64)
    order = np.lexsort((cut, logs))  # of equal values the whole ones come first
    values, whole, weights = logs[order], ~cut[order], weights[order]
    at_risk = np.cumsum(weights[::-1])[::-1]
    survive = np.cumprod(1 - np.where(whole, weights / np.maximum(at_risk, 1e-300), 0.0))
    return values[whole], 1 - survive[whole]


def _tail_spread(values: Array, shares: Array) -> float:
    """Standard deviation of the logarithm by the upper third of what is visible, shrunk to the usual one."""
    upper = shares >= shares[-1] * 2 / 3
    ends = np.linspace(0, upper.sum() - 1, min(int(upper.sum()), 40)).astype(int)
    z = np.array([NormalDist().inv_cdf(min(max(each, 1e-4), 1 - 1e-4)) for each in shares[upper][ends]])
    logs = values[upper][ends]
    variance = ((z - z.mean()) ** 2).sum()
    found = ((z - z.mean()) * (logs - logs.mean())).sum() / variance if variance > 1e-9 else USUAL_SPREAD
    trust = upper.sum() / (upper.sum() + SPREAD_PRIOR)
    return float(np.clip(trust * found + (1 - trust) * USUAL_SPREAD, *SPREAD_BOUNDS))


def expected_beyond(logs: Array, cut: Array, index: Array) -> Array:
    """The logarithms [n], in which a cut one is replaced by its expectation given that it is larger.

    index: what is expected of each; around it a normal distribution is assumed, by the spread of those that
    were not cut (Buckley and James 1979, with a normal residual).
    """
    if not cut.any():
        return logs
    residual = (logs - index)[~cut]
    spread = float(np.clip(residual.std(), *SPREAD_BOUNDS)) if len(residual) > 1 else USUAL_SPREAD
    z = np.clip((logs - index) / spread, -5, 5)
    hazard = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) / np.maximum(1 - below(z), 1e-7)
    return np.where(cut, np.maximum(logs, index + spread * hazard), logs)
