"""Which pair answers a query: a router makes the table, `choose` picks from it under a budget and a policy."""

from viaticum.routers.query.base import QueryRouter
from viaticum.routers.query.choose import Best, Cheapest, Policy, Weighted, choose, parse_policy
from viaticum.routers.query.static import StaticRouter

__all__ = ["Best", "Cheapest", "Policy", "QueryRouter", "StaticRouter", "Weighted", "choose", "parse_policy"]
