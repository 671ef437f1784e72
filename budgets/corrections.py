"""Correct expected costs by what settled rows really cost: their ratio and scatter, by option.

Each ratio (real over expected cost) is shrunk by its own uncertainty against the usual error of predictions,
so that with few rows it stays near 1 and near the ratio of all options. Stores only sums.
"""

from __future__ import annotations

import math

import numpy as np

from viaticum.budgets.allocate import Array
from viaticum.errors import InputError

PRIOR = 0.2  # standard deviation of real over expected cost before any observation
PRIOR_ROWS = 4  # pseudo-observations of arbitrary cost, so that one row does not make the ratio certain
SCATTER_ROWS = 30  # pseudo-observations that scatter as expected
RATIO_BOUNDS = (0.1, 10.0)
SCATTER_BOUNDS = (0.5, 10.0)
COUNT, EXPECTED, ACTUAL, EXPECTED_2, PRODUCT, ACTUAL_2, SPREAD_2 = range(7)


class Corrections:
    """Corrections of K options.

    Attributes:
        ratios: real over expected cost [K].
        scatters: real over expected standard deviation [K].
        ratio_deviation: standard deviation of the ratio of all options.
    """

    def __init__(self, options: int) -> None:
        self._sums = np.zeros((7, options))
        self.ratios, self.scatters = np.ones(options), np.ones(options)
        self.ratio_deviation = PRIOR

    def update(self, options: Array, expected: Array, actual: Array, spread: Array | None = None) -> None:
        """Add R rows: their options, expected and actual costs, and expected standard deviations [R]."""
        if not len(options):
            return
        squares = np.zeros(len(options)) if spread is None else spread**2
        lines = (np.ones(len(options)), expected, actual, expected**2, expected * actual, actual**2, squares)
        for line, amounts in enumerate(lines):
            self._sums[line] += np.bincount(options, amounts, self._sums.shape[1])
        self._recompute()

    def state(self) -> list[list[float]]:
        """The sums, for JSON."""
        found: list[list[float]] = self._sums.tolist()
        return found

    def resume(self, state: object) -> None:
        """Restore the sums; raises `InputError` for a state of another number of options."""
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
        self._recompute()

    def _recompute(self) -> None:
        whole = self._sums.sum(1)
        of_all, self.ratio_deviation = _ratio(whole, 1.0)
        scatter = _scatter(whole, of_all, 1.0)
        self.ratios[:], self.scatters[:] = of_all, scatter
        for option in np.flatnonzero(self._sums[EXPECTED] > 0):
            self.ratios[option] = _ratio(self._sums[:, option], of_all)[0]
            self.scatters[option] = _scatter(self._sums[:, option], self.ratios[option], scatter)
        np.clip(self.ratios, *RATIO_BOUNDS, out=self.ratios)
        np.clip(self.scatters, *SCATTER_BOUNDS, out=self.scatters)


def _ratio(sums: Array, toward: float) -> tuple[float, float]:
    """The shrunk ratio of some rows, and its standard deviation."""
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
    """Deviation of the costs from the ratio, over the expected deviation."""
    if sums[SPREAD_2] <= 0:
        return toward
    seen = sums[COUNT] * _residual(sums, ratio) / (ratio**2 * sums[SPREAD_2])
    return math.sqrt((seen + SCATTER_ROWS * toward**2) / (sums[COUNT] + SCATTER_ROWS))


def _residual(sums: Array, ratio: float) -> float:
    """Sum of squares of actual - ratio * expected."""
    return max(0.0, float(sums[ACTUAL_2] - 2 * ratio * sums[PRODUCT] + ratio**2 * sums[EXPECTED_2]))
