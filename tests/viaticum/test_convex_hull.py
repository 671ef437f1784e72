"""The area under the hull of best mixtures over the logarithm of the cost, against integrals by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from viaticum.convex_hull import area_under_hull, hull


def by_sums(accuracy: np.ndarray, cost: np.ndarray, low: float, high: float) -> float:
    """The same by many small steps, from the hull through (0, 0)."""
    corners = hull(np.append(accuracy, 0.0), np.append(cost, 0.0))
    x, y = np.append(cost, 0.0)[corners], np.append(accuracy, 0.0)[corners]
    middles = np.exp(
        np.linspace(math.log(low), math.log(high), 200_001)[:-1] + math.log(high / low) / 400_000
    )
    return float(np.interp(middles, x, y).mean())


def test_one_choice_is_its_accuracy_once_there_is_money_for_it() -> None:
    one = np.array([0.8]), np.array([1.0])
    assert area_under_hull(*one, 1.0, 100.0) == pytest.approx(0.8)
    # Below its cost a mixture with skipped questions: 0.8 c, whose mean over log c is 0.8 (1 - 0.1) / log 10.
    assert area_under_hull(*one, 0.1, 1.0) == pytest.approx(0.8 * 0.9 / math.log(10))


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_integral(seed: int) -> None:
    rng = np.random.default_rng(seed)
    accuracy, cost = rng.random(12), np.exp(3 * rng.standard_normal(12))
    low, high = float(cost.min()), float(cost.max())
    assert area_under_hull(accuracy, cost, low, high) == pytest.approx(
        by_sums(accuracy, cost, low, high), abs=1e-4
    )
    assert area_under_hull(accuracy, cost, 3 * low, high / 2) == pytest.approx(
        by_sums(accuracy, cost, 3 * low, high / 2), abs=1e-4
    )


def test_every_factor_of_cost_counts_the_same() -> None:
    """A gain between 1 and 10 is worth as much as one between 10 and 100."""
    cheap = area_under_hull(np.array([0.5, 0.5]), np.array([1.0, 10.0]), 1.0, 100.0)
    early = area_under_hull(np.array([0.5, 0.7]), np.array([1.0, 1.0 + 1e-9]), 1.0, 10.0)
    late = area_under_hull(np.array([0.5, 0.7]), np.array([10.0, 10.0 + 1e-9]), 10.0, 100.0)
    assert cheap == pytest.approx(0.5)
    assert early == pytest.approx(late, abs=1e-6)


def test_choices_that_no_mixture_needs_change_nothing() -> None:
    accuracy, cost = np.array([0.4, 0.8]), np.array([1.0, 10.0])
    worse = np.append(accuracy, [0.39, 0.5]), np.append(cost, [2.0, 9.0])
    assert area_under_hull(*worse, 1.0, 10.0) == area_under_hull(accuracy, cost, 1.0, 10.0)


def test_free_choices_and_ranges_of_nothing() -> None:
    free = np.array([0.6, 0.9]), np.array([0.0, 1.0])
    assert area_under_hull(*free, 0.0, 1.0) == pytest.approx(by_sums(*free, 1e-3, 1.0), abs=1e-4)
    assert area_under_hull(*free, 0.0, 0.0) == pytest.approx(0.6)
    assert area_under_hull(*free, 1.0, 1.0) == pytest.approx(0.9)
