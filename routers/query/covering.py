"""A router for all models of a catalogue: measured rows where there are any, those of a prior for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from viaticum.routers.query.base import QueryRouter
from viaticum.routers.query.plans import PlanRow
from viaticum.routers.query.prior import ORIGIN, Prior, PriorModel
from viaticum.types import Query, RoutingTable, Row

STRATEGIES = ("cot", "cod", "direct")  # of models without outcomes; pot answers numbers alone
NO_OUTCOMES = "prior only: no outcomes for these models"


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
