"""The interface of a query router: a query in, a routing table out (RTR, arXiv 2505.19435)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from viaticum.routers.query.plans import Plan, PlanRow
from viaticum.types import Query, RoutingTable


class QueryRouter(ABC):
    """Predicts accuracy, tokens and cost of every pair it knows. The choice among them is `choose`'s."""

    @abstractmethod
    def table(self, query: Query) -> RoutingTable:
        """A row for every pair; costs in nano-dollars, prompt included."""

    def prefetch(self, queries: Sequence[Query]) -> None:
        """Announce queries that will be routed, so that a router can predict them in one batch."""
        return

    def plans_for(self, query: Query) -> list[PlanRow]:
        """A row for every plan worth considering; by default each pair alone."""
        return [
            PlanRow(
                Plan((row.pair,)),
                row.accuracy,
                row.cost_p50,
                row.cost_p90,
                row.cost_mean,
                row.average,
                row.origin,
            )
            for row in self.table(query)
        ]

    def has_seen(self, query: Query) -> bool | None:
        """Whether it was fitted on this very question; None where it cannot tell."""
        return None

    @property
    def has_plans(self) -> bool:
        """Whether `plans_for` has more than the pairs of the table, each alone."""
        return type(self).plans_for is not QueryRouter.plans_for
