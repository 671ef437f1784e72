"""Routing of queries to pairs: a router predicts a table, `choose` picks from it under a budget and a policy.

The learned router, which needs the `local` extra, is in `viaticum.routers.query.rtr`.
"""

from viaticum.routers.query.base import QueryRouter
from viaticum.routers.query.choose import (
    AtPrice,
    Best,
    Cheapest,
    Policy,
    Weighted,
    as_policy,
    choose,
    choose_plan,
    parse_policy,
)
from viaticum.routers.query.plans import Plan, PlanRoute, PlanRow
from viaticum.routers.query.static import StaticRouter

__all__ = [
    "AtPrice",
    "Best",
    "Cheapest",
    "Plan",
    "PlanRoute",
    "PlanRow",
    "Policy",
    "QueryRouter",
    "StaticRouter",
    "Weighted",
    "as_policy",
    "choose",
    "choose_plan",
    "parse_policy",
]
