"""Costs of outcomes after a list of prices changed: tokens stay as they were measured, dollars follow.

A row whose model has no price here, or whose tokens are not known, keeps its cost: a small/large pair above
all, since its rows do not say which model wrote which token. Cached tokens and tiers by the length of a
single prompt are not in a table: every input token costs the list price of the row's whole prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from viaticum.money import Price
from viaticum.types import Outcome


@dataclass
class Repricing:
    """Counts what was repriced while rows pass through `cost`. prices: by model.

    Attributes:
        rows: how many got a new cost, by model.
        before, after: nano-dollars of these rows, by model; a cost that was unknown counts as 0 before.
        kept: rows that keep their cost, by model.
    """

    prices: Mapping[str, Price]
    rows: dict[str, int] = field(default_factory=dict)
    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)

    def cost(self, outcome: Outcome) -> int | None:
        """The cost of a row at today's price, or the one that it has."""
        model, price = outcome.model, self.prices.get(outcome.model)
        if price is None or outcome.input_tokens is None or outcome.output_tokens is None:
            self.kept[model] = self.kept.get(model, 0) + 1
            return outcome.cost_nanousd
        milliseconds = round((outcome.seconds or 0.0) * 1000)
        cost = price.cost(outcome.input_tokens, outcome.output_tokens, milliseconds=milliseconds)
        self.rows[model] = self.rows.get(model, 0) + 1
        self.before[model] = self.before.get(model, 0) + (outcome.cost_nanousd or 0)
        self.after[model] = self.after.get(model, 0) + cost
        return cost
