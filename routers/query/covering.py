"""A router for all models of a catalogue: measured rows where there are any, a prior's for the rest."""

from __future__ import annotations

from collections.abc import Sequence

from viaticum.routers.query.base import QueryRouter
from viaticum.routers.query.plans import PlanRow
from viaticum.routers.query.prior import Prior, PriorModel
from viaticum.types import Query, RoutingTable, Row

STRATEGIES = ("cot", "cod", "direct")  # of models without outcomes; pot answers numbers alone


class CoveringRouter(QueryRouter):
    """The rows of a router, and a prior's for models that the router has no row of.

    Args:
        router: its rows are taken as they are.
        prior: estimates the rest.
        models: the candidates; those that the router knows are left to it.
        strategies: with which the others are asked.
    """

    def __init__(
        self,
        router: QueryRouter,
        prior: Prior,
        models: Sequence[PriorModel],
        strategies: Sequence[str] = STRATEGIES,
    ) -> None:
        self.router, self.prior = router, prior
        self.models, self.strategies = tuple(models), tuple(strategies)
        self._last: tuple[RoutingTable, Sequence[Row], RoutingTable] | None = None

    def table(self, query: Query) -> RoutingTable:
        known = self.router.table(query)
        added = self._added(query, known)
        last = self._last
        if last is not None and last[0] is known and last[1] is added:
            return last[2]
        table = RoutingTable((*known, *added))
        self._last = (known, added, table)
        return table

    def prefetch(self, queries: Sequence[Query]) -> None:
        self.router.prefetch(queries)

    def plans_for(self, query: Query) -> list[PlanRow]:
        added = {row.pair for row in self._added(query, self.router.table(query))}
        alone = super().plans_for(query)
        return [*self.router.plans_for(query), *(each for each in alone if each.plan.pairs[0] in added)]

    @property
    def has_plans(self) -> bool:
        return self.router.has_plans

    def _added(self, query: Query, known: RoutingTable) -> Sequence[Row]:
        names = {row.pair.model for row in known}
        unknown = tuple(model for model in self.models if model.name not in names)
        return self.prior.rows(query, unknown, self.strategies) if unknown else ()
