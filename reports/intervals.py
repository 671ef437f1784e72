"""Uncertainty of numbers: Wilson's interval for shares, a bootstrap over questions for means and differences.

Every interval is one of 95%. Draws are seeded, so that reports of one run agree. Leaves out runs and drawing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from viaticum.outcomes import accuracy_interval

Array = np.ndarray[Any, Any]
DRAWS = 2_000
GROUPS = 2_000  # more questions than that are drawn in so many groups, which were put together by lot
_CHUNK = 4_000_000
SEED = 0


@dataclass(frozen=True, slots=True)
class Share:
    """count of `of`, as a fraction, with Wilson's 95% interval."""

    count: int
    of: int
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with the 95% interval of a percentile bootstrap over `of` questions."""

    value: float
    low: float
    high: float
    of: int


def share(count: int, of: int) -> Share | None:
    """None where nothing was counted."""
    return Share(count, of, count / of, *accuracy_interval(count, of)) if of else None


def mean(values: Array, seed: int = SEED) -> Estimate | None:
    """Mean of values [Q], one a question, with its interval; of paired differences, the paired interval.

    Returns None for no question.
    """
    if not len(values):
        return None
    groups = grouped(values, seed)
    means = np.concatenate([weights @ groups for weights in resamples(len(groups), seed)])
    return estimate(float(values.mean()), means, len(values))


def grouped(values: Array, seed: int = SEED) -> Array:
    """Means of `GROUPS` random groups of questions, values [Q, ...], to bootstrap their mean."""
    if len(values) <= GROUPS:
        return values
    order = np.random.default_rng(seed).permutation(len(values))
    begins = np.linspace(0, len(values), GROUPS, endpoint=False).astype(np.int64)
    sizes = np.diff(np.append(begins, len(values))).reshape(-1, *(1,) * (values.ndim - 1))
    return np.asarray(np.add.reduceat(values[order], begins, axis=0) / sizes)


def estimate(value: float, drawn: Array, of: int) -> Estimate:
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Estimate(value, float(low), float(high), of)


def resamples(of: int, seed: int = SEED) -> Iterator[Array]:
    """Weights of the questions in each draw, each summing to 1: chunks of [draws, of]."""
    rng = np.random.default_rng(seed)
    left = DRAWS
    while left:
        draws = min(left, max(1, _CHUNK // of))
        picked = rng.integers(0, of, (draws, of))
        picked += np.arange(draws)[:, None] * of
        counts = np.bincount(picked.ravel(), minlength=draws * of)
        yield counts.reshape(draws, of) / of
        left -= draws
