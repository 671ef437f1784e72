"""A router for one model, one strategy or one pair, for callers that name them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from viaticum.routers.query.base import Knowledge, QueryRouter
from viaticum.routers.query.change_detection import Expectation
from viaticum.routers.query.plans import PlanRow
from viaticum.types import Pair, Query, RoutingTable, Row

DEFAULT_STRATEGY = "cot"  # of a model that the other router does not know
UNKNOWN = 0.5  # accuracy of a pair of which nothing is known


class RestrictedRouter(QueryRouter):
    """The rows of another router that are of one model, one strategy, or both.

    Where it has none, a row is made up: of a model, for `cot`, without costs and as likely right as wrong, so
    that every policy takes it; of a strategy, for every model of the other router, with the estimates of that
    model's best row.

    Args:
        model: None for all.
        strategy: None for all.
    """

    def __init__(self, router: QueryRouter, model: str | None, strategy: str | None) -> None:
        self.router, self.model, self.strategy = router, model, strategy

    def table(self, query: Query) -> RoutingTable:
        known = self.router.table(query)
        rows = tuple(row for row in known if self._is_wanted(row.pair))
        return RoutingTable(rows or tuple(self._made_up(known)))

    def prefetch(self, queries: Sequence[Query]) -> None:
        self.router.prefetch(queries)

    def plans_for(self, query: Query) -> list[PlanRow]:
        plans = self.router.plans_for(query)
        wanted = [each for each in plans if all(map(self._is_wanted, each.plan.pairs))]
        return wanted or super().plans_for(query)

    def knowledge(self) -> tuple[Knowledge, ...]:
        """Of the other router, of the models that are wanted."""
        found = []
        for each in self.router.knowledge():
            models = tuple(name for name in each.models if self.model in (None, name))
            if models or not each.models:
                found.append(replace(each, models=models))
        return tuple(found)

    def has_seen(self, query: Query) -> bool | None:
        """None where both are named: then nothing is chosen."""
        chosen = self.model is None or self.strategy is None
        return self.router.has_seen(query) if chosen else None

    def expectation(self, query: Query, row: Row) -> Expectation | None:
        return self.router.expectation(query, row)

    def frozen(self) -> QueryRouter:
        return RestrictedRouter(self.router.frozen(), self.model, self.strategy)

    @property
    def has_plans(self) -> bool:
        return self.router.has_plans

    def _is_wanted(self, pair: Pair) -> bool:
        return self.model in (None, pair.model) and self.strategy in (None, pair.strategy)

    def _made_up(self, known: RoutingTable) -> list[Row]:
        if self.model is not None:
            return [Row(Pair(self.model, self.strategy or DEFAULT_STRATEGY), UNKNOWN, 0, 0, 0, 0)]
        best: dict[str, Row] = {}
        for row in known:
            if row.pair.model not in best or row.accuracy > best[row.pair.model].accuracy:
                best[row.pair.model] = row
        return [replace(row, pair=Pair(model, self.strategy or "")) for model, row in best.items()]
