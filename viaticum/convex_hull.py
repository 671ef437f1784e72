"""Best mixtures of choices with known accuracy and cost: their upper convex hull, and the area under it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
FREE = 1e-3  # of the highest cost, where the lowest is nothing: a logarithm needs some


def hull(accuracy: Array, cost: Array) -> list[int]:
    """Corners of the best mixtures, from the cheapest choice to the most accurate: the upper convex hull."""
    corners: list[int] = []
    for n in sorted(range(len(cost)), key=lambda n: (cost[n], -accuracy[n])):
        if corners and accuracy[n] <= accuracy[corners[-1]]:
            continue
        while len(corners) > 1 and _below(corners[-2], corners[-1], n, accuracy, cost):
            corners.pop()
        if corners and cost[corners[-1]] == cost[n]:
            corners.pop()
        corners.append(n)
    return corners


def area_under_hull(accuracy: Array, cost: Array, low: float, high: float) -> float:
    """Mean accuracy of the best mixtures over the logarithm of the cost.

    Every factor of cost counts the same, where an area over the cost itself is that of the dear choices.
    Money that does not reach for the cheapest choice asks part of the questions, and the others count as
    wrong; money that is left buys nothing.

    Args:
        accuracy, cost: of choices [K].
        low, high: costs from and to which the mean is taken; `FREE` of the highest where the lowest is 0.

    Returns:
        The mean; that at `high` where both are the same.
    """
    corners = hull(np.append(accuracy, 0.0), np.append(cost, 0.0))
    x, y = np.append(cost, 0.0)[corners], np.append(accuracy, 0.0)[corners]
    low = low if low > 0 else high * FREE
    if not 0 < low < high:
        return float(np.interp(high, x, y))
    ends = np.unique(np.concatenate(([low, high], x[(x > low) & (x < high)])))
    heights = np.interp(ends, x, y)
    left, right, slopes = ends[:-1], ends[1:], np.diff(heights) / np.diff(ends)
    # A mixture is linear in cost: the integral of (a + b c) / c.
    parts = (heights[:-1] - slopes * left) * np.log(right / left) + slopes * (right - left)
    return float(parts.sum() / math.log(high / low))


def _below(one: int, middle: int, other: int, accuracy: Array, cost: Array) -> bool:
    """The middle point lies on or below the line between the two others."""
    rise = (accuracy[other] - accuracy[one]) * (cost[middle] - cost[one])
    return bool((accuracy[middle] - accuracy[one]) * (cost[other] - cost[one]) <= rise)
