"""Mean and standard deviation of an amount known by two quantiles, such as the cost of an answer.

Answer lengths are skewed, approximately log-normal, and cut at the most tokens that a call may write. Array
arithmetic only.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
NORMAL_P90 = 1.2816  # standard deviations of a normal distribution below which 90% lie


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


def below(z: Array) -> Array:
    """The normal distribution function, to 1e-7 (Abramowitz and Stegun, 26.2.17), which numpy lacks."""
    t = 1 / (1 + 0.2316419 * np.abs(z))
    tail = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    tail *= t * (0.319381530 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))))
    return np.asarray(np.where(z > 0, 1 - tail, tail))
