"""A router for all models of a catalogue: measured rows where there are any, a prior's for the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from viaticum.routers.query.base import Knowledge, QueryRouter
from viaticum.routers.query.plans import PlanRow
from viaticum.routers.query.prior import Prior, PriorModel
from viaticum.types import Query, RoutingTable, Row

STRATEGIES = ("cot", "cod", "direct")  # of models without outcomes; pot answers numbers alone


class CoveringRouter(QueryRouter):
    """The rows of a router, and a prior's for models that the router has no row of.

    Args:
        router: its rows are taken as they are, but for those of `measured`.
        prior: estimates the rest.
        models: the candidates; those that the router knows are left to it.
        strategies: with which the others are asked.
        measured: models of the router whose accuracies are of another kind of questions than the prior's.
            They are placed on its scale by their benchmarks, so that one scale compares all; costs stay.
    """

    def __init__(
        self,
        router: QueryRouter,
        prior: Prior,
        models: Sequence[PriorModel],
        strategies: Sequence[str] = STRATEGIES,
        measured: Sequence[PriorModel] = (),
    ) -> None:
        self.router, self.prior = router, prior
        self.models, self.strategies, self.measured = tuple(models), tuple(strategies), tuple(measured)
        self._last: tuple[RoutingTable, Sequence[Row], RoutingTable] | None = None

    def table(self, query: Query) -> RoutingTable:
        known = self.router.table(query)
        added = self._added(query, known)
        last = self._last
        if last is not None and last[0] is known and last[1] is added:
            return last[2]
        table = RoutingTable((*(self._on_scale(query, known) if added else known), *added))
        self._last = (known, added, table)
        return table

    def prefetch(self, queries: Sequence[Query]) -> None:
        self.router.prefetch(queries)

    def plans_for(self, query: Query) -> list[PlanRow]:
        """Plans of the router, those of one pair with its row here, then the added pairs alone."""
        added = {row.pair for row in self._added(query, self.router.table(query))}
        alone = {each.plan: each for each in super().plans_for(query)}
        known = [alone.get(each.plan, each) for each in self.router.plans_for(query)]
        return [*known, *(each for plan, each in alone.items() if plan.pairs[0] in added)]

    def has_seen(self, query: Query) -> bool | None:
        return self.router.has_seen(query)

    def knowledge(self) -> tuple[Knowledge, ...]:
        known = self.router.knowledge()
        names = {name for each in known for name in each.models}
        rest = tuple(sorted({model.name for model in self.models} - names))
        return (*known, Knowledge("prior", rest)) if rest else known

    @property
    def has_plans(self) -> bool:
        return self.router.has_plans

    def _on_scale(self, query: Query, known: RoutingTable) -> Iterator[Row]:
        """The known rows, those of `measured` models with the prior's accuracies."""
        names = dict.fromkeys(row.pair.strategy for row in known)
        estimates = {row.pair: row for row in self.prior.rows(query, self.measured, tuple(names))}
        for row in known:
            found = estimates.get(row.pair)
            yield (
                row
                if found is None
                else replace(
                    row,
                    accuracy=found.accuracy,
                    accuracy_low=found.accuracy_low,
                    accuracy_high=found.accuracy_high,
                    average=found.average,
                    origin=f"prior by its figures; costs {row.origin}" if row.origin else found.origin,
                )
            )

    def _added(self, query: Query, known: RoutingTable) -> Sequence[Row]:
        names = {row.pair.model for row in known}
        unknown = tuple(model for model in self.models if model.name not in names)
        return self.prior.rows(query, unknown, self.strategies) if unknown else ()
