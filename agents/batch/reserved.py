"""Money of a job for rows that name their model, kept from the rows that are planned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from viaticum.jobs import Preview

PRIOR_ROWS = 4  # rows after which real costs weigh as much as expected ones


class ReservedForNamedModels:
    """Money for rows that name their model, which the pacer may not spend on others.

    ahead: nano-dollars that the rows which are not settled should cost; scaled by the ratio of real to
    expected cost. one: expected cost of one row.
    """

    def __init__(self, ahead: float = 0.0, one: float = 0.0) -> None:
        self._ahead, self._prior = ahead, PRIOR_ROWS * one
        self._expected = self._cost = 0.0  # of rows that are settled
        self._first = self.nanousd

    @property
    def nanousd(self) -> float:
        ratio = (self._cost + self._prior) / (self._expected + self._prior) if self._prior else 1.0
        return self._ahead * ratio

    def settle(self, expected: Sequence[float], costs: Sequence[float]) -> None:
        self._ahead = max(0.0, self._ahead - sum(expected))
        self._expected += sum(expected)
        self._cost += sum(costs)

    def add_to(self, forecast: Preview, budget: int) -> Preview:
        """Extend a forecast of the routed rows at the remaining budget to all rows at the whole budget."""
        more = round(self._first)
        p50, p90 = (
            min(max(budget, forecast.cost_p50), cost + more)
            for cost in (forecast.cost_p50, forecast.cost_p90)
        )
        return replace(forecast, budget_nanousd=budget, cost_p50=p50, cost_p90=p90)
