"""A router for one pair, for callers that name the pair themselves."""

from __future__ import annotations

from viaticum.routers.query.base import QueryRouter
from viaticum.types import Pair, Query, RoutingTable, Row


class SinglePairRouter(QueryRouter):
    """Routes every question to one pair.

    estimates: a router whose row of the pair is used; without it, or without such a row, every estimate is 0,
    so that the worst case of a call alone decides whether it fits in a budget.
    """

    def __init__(self, pair: Pair, estimates: QueryRouter | None = None) -> None:
        self.pair, self._estimates = pair, estimates

    def table(self, query: Query) -> RoutingTable:
        table = () if self._estimates is None else self._estimates.table(query)
        rows = [row for row in table if row.pair == self.pair]
        return RoutingTable(tuple(rows or [Row(self.pair, 0.0, 0, 0, 0, 0)]))
