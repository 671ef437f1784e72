"""What settled rows teach about the costs that are still expected: real over expected, and how far it scatters, by way.

A ratio is weighed by how well it is known against how far off predictions tend to be; so it is held near 1,
and near that of all ways, while few rows are known. Keeps sums alone.
"""

from __future__ import annotations

import math

import numpy as np

from viaticum.budgets.allocate import Array
from viaticum.errors import InputError

PRIOR = 0.2  # standard deviation of real over expected cost, before anything is known
PRIOR_ROWS = 4  # that cost any amount, beside those that are known: nothing is sure after the first
SCATTER_ROWS = 30  # that scatter as expected, beside those that are known
RATIOS = (0.1, 10.0)  # beyond which no ratio is believed
SCATTERS = (0.5, 10.0)
COUNT, EXPECTED, ACTUAL, EXPECTED_2, PRODUCT, ACTUAL_2, SPREAD_2 = range(7)


class Corrections:
    """Of a number of ways. ratios [W]: real over expected cost; scatters [W]: real over expected standard deviation."""

    def __init__(self, ways: int) -> None:
        self._sums = np.zeros((7, ways))
        self.ratios, self.scatters = np.ones(ways), np.ones(ways)
        self.doubt = PRIOR  # standard deviation of the ratio of all

    def learn(self, ways: Array, expected: Array, actual: Array, spread: Array | None = None) -> None:
        """Rows [R] that went these ways, with what was expected of them and what they cost."""
        if not len(ways):
            return
        squares = np.zeros(len(ways)) if spread is None else spread**2
        lines = (np.ones(len(ways)), expected, actual, expected**2, expected * actual, actual**2, squares)
        for line, amounts in enumerate(lines):
            self._sums[line] += np.bincount(ways, amounts, self._sums.shape[1])
        self._update()

    def state(self) -> list[list[float]]:
        """For JSON."""
        found: list[list[float]] = self._sums.tolist()
        return found

    def resume(self, state: object) -> None:
        """Raises `InputError` for a state that is not one of as many ways."""
        try:
            sums = np.array(state, dtype=np.float64)
        except (TypeError, ValueError):
            sums = np.zeros(0)
        if sums.shape != self._sums.shape or not np.isfinite(sums).all():
            raise InputError(
                f"what was learned has the shape {sums.shape}, not {self._sums.shape}; it belongs to another "
                f"job"
            )
        self._sums = sums
        self._update()

    def _update(self) -> None:
        whole = self._sums.sum(1)
        of_all, self.doubt = _ratio(whole, 1.0)
        scatter = _scatter(whole, of_all, 1.0)
        self.ratios[:], self.scatters[:] = of_all, scatter
        for way in np.flatnonzero(self._sums[EXPECTED] > 0):
            self.ratios[way] = _ratio(self._sums[:, way], of_all)[0]
            self.scatters[way] = _scatter(self._sums[:, way], self.ratios[way], scatter)
        np.clip(self.ratios, *RATIOS, out=self.ratios)
        np.clip(self.scatters, *SCATTERS, out=self.scatters)


def _ratio(sums: Array, toward: float) -> tuple[float, float]:
    """The ratio of some rows, and its standard deviation."""
    if sums[EXPECTED] <= 0:
        return toward, PRIOR
    seen = sums[ACTUAL] / sums[EXPECTED]
    squares = _residual(sums, seen) + PRIOR_ROWS * sums[EXPECTED_2] / sums[COUNT]
    variance = squares / sums[EXPECTED] ** 2
    return (
        float(toward + (seen - toward) * PRIOR**2 / (PRIOR**2 + variance)),
        float((PRIOR**-2 + 1 / variance) ** -0.5),
    )


def _scatter(sums: Array, ratio: float, toward: float) -> float:
    """How far costs lie from what the ratio says, over how far they were expected to."""
    if sums[SPREAD_2] <= 0:
        return toward
    seen = sums[COUNT] * _residual(sums, ratio) / (ratio**2 * sums[SPREAD_2])
    return math.sqrt((seen + SCATTER_ROWS * toward**2) / (sums[COUNT] + SCATTER_ROWS))


def _residual(sums: Array, ratio: float) -> float:
    """Sum of squares of actual - ratio * expected."""
    return max(0.0, float(sums[ACTUAL_2] - 2 * ratio * sums[PRODUCT] + ratio**2 * sums[EXPECTED_2]))
