"""Routing of queries to pairs: a router predicts a table, `choose` picks from it under a budget and a policy.

The learned router, which needs the `local` extra, is in `viaticum.routers.query.rtr`.
"""

from viaticum.routers.query.base import Knowledge, QueryRouter
from viaticum.routers.query.choose import (
    DEFAULT_POLICY,
    POLICIES,
    AtPrice,
    Best,
    Cheapest,
    Fastest,
    Policy,
    Weighted,
    Within,
    as_policy,
    choose,
    choose_plan,
    parse_policy,
)
from viaticum.routers.query.plans import Plan, PlanRoute, PlanRow
from viaticum.routers.query.static import StaticRouter

__all__ = [
    "DEFAULT_POLICY",
    "POLICIES",
    "AtPrice",
    "Best",
    "Cheapest",
    "Fastest",
    "Knowledge",
    "Plan",
    "PlanRoute",
    "PlanRow",
    "Policy",
    "QueryRouter",
    "StaticRouter",
    "Weighted",
    "Within",
    "as_policy",
    "choose",
    "choose_plan",
    "parse_policy",
]
