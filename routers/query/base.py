"""The contract of a query router: a query in, a routing table out (RTR, arXiv 2505.19435)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from viaticum.routers.query.plans import Plan, PlanRow
from viaticum.types import Query, RoutingTable


class QueryRouter(ABC):
    """Predicts accuracy, tokens and cost of every pair it knows. Decides nothing: see `choose`."""

    @abstractmethod
    def table(self, query: Query) -> RoutingTable:
        """A row for every pair; costs in nano-dollars, prompt included."""

    def prefetch(self, queries: Sequence[Query]) -> None:
        """Tables and plans of all these will be asked for: a router that predicts many at once faster does so now."""
        return

    def plans_for(self, query: Query) -> list[PlanRow]:
        """A row for every plan worth considering; by default each pair alone."""
        return [
            PlanRow(Plan((row.pair,)), row.accuracy, row.cost_p50, row.cost_p90) for row in self.table(query)
        ]
