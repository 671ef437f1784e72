"""The contract of a query router: a query in, a routing table out (RTR, arXiv 2505.19435)."""

from __future__ import annotations

from abc import ABC, abstractmethod

from viaticum.types import Query, RoutingTable


class QueryRouter(ABC):
    """Predicts accuracy, tokens and cost of every pair it knows. Decides nothing: see `choose`."""

    @abstractmethod
    def table(self, query: Query) -> RoutingTable:
        """A row for every pair; costs in nano-dollars, prompt included."""
