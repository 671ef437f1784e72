"""A router's estimates as they are under the token limits of the calls that the workflow makes."""

from __future__ import annotations

from functools import cache

from viaticum.catalogue import Catalogue
from viaticum.errors import InputError
from viaticum.generation import GenerationSettings
from viaticum.models.settings import resolve
from viaticum.routers.query import PlanRow, QueryRouter
from viaticum.routers.query.limits import Limit, by_pair, limit_plans, limit_table
from viaticum.strategies import get as get_strategy
from viaticum.types import Pair, Query, RoutingTable


def output_limit(catalogue: Catalogue, settings: GenerationSettings) -> Limit:
    """Returns the most output tokens of a call of a pair; None for one that is unknown here."""

    @cache
    def limit(pair: Pair) -> int | None:
        try:
            return resolve(catalogue, pair.model, get_strategy(pair.strategy), settings).max_new_tokens
        except InputError:
            return None

    return limit


def estimate(router: QueryRouter, query: Query, limit: Limit) -> tuple[RoutingTable, list[PlanRow]]:
    """The router's table and plans under limits."""
    table, plans = router.table(query), router.plans_for(query)
    limited = limit_table(table, limit)
    if limited is table:
        return table, plans
    return limited, limit_plans(plans, by_pair(table), by_pair(limited))
