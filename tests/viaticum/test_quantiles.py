"""Quantiles of amounts that were cut: Kaplan and Meier where they are visible, extrapolation where not."""

from __future__ import annotations

import numpy as np
import pytest

from viaticum.quantiles import censored_quantile

Z90 = 1.2816


def test_quantiles_of_what_was_not_cut() -> None:
    values, none = np.arange(1.0, 101.0), np.zeros(100, dtype=bool)
    assert censored_quantile(values, none, 0.9) == 90
    assert censored_quantile(values, none, 0.5) == 50
    assert censored_quantile(values[:0], none[:0], 0.5) == 0


def test_a_cut_value_counts_as_longer() -> None:
    cut = np.array([False, True, False, False])
    assert censored_quantile(np.array([1.0, 2.0, 2.0, 3.0]), cut, 0.75) == 3


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spread", [0.3, 0.5, 1.0, 1.5])
def test_a_third_is_cut_and_the_hidden_quantile_is_extrapolated(spread: float, seed: int) -> None:
    drawn = 6 + spread * np.random.default_rng(seed).standard_normal(600)
    limit = np.quantile(drawn, 2 / 3)
    cut = drawn > limit
    visible = np.minimum(drawn, limit)
    assert censored_quantile(visible, cut, 0.5) == np.sort(drawn)[299]
    assert censored_quantile(visible, cut, 0.9) == pytest.approx(6 + Z90 * spread, abs=0.3 * spread)


def test_a_weight_is_a_number_of_equal_values() -> None:
    rng = np.random.default_rng(3)
    values, cut, weights = rng.normal(size=80), rng.random(80) < 0.3, rng.integers(1, 4, 80)
    for level in (0.3, 0.5, 0.6):
        many = censored_quantile(np.repeat(values, weights), np.repeat(cut, weights), level)
        assert censored_quantile(values, cut, level, weights) == many


def test_where_all_are_cut_it_lies_above_the_cut() -> None:
    values, all_of_them = np.full(50, 7.0), np.ones(50, dtype=bool)
    assert 7 <= censored_quantile(values, all_of_them, 0.5) < censored_quantile(values, all_of_them, 0.9)


def test_a_hidden_quantile_is_above_every_cut_that_hides_it() -> None:
    """Nine short outputs and eleven that were cut far above them."""
    values = np.array([1.0] * 9 + [8.0] * 11)
    cut = values > 2
    assert censored_quantile(values, cut, 0.5) >= 8
