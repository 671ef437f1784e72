"""The interface of a query router: a query in, a routing table out (RTR, arXiv 2505.19435)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from viaticum.routers.query.change_detection import Expectation, ModelChange
from viaticum.routers.query.plans import Plan, PlanRow
from viaticum.types import Query, RoutingTable, Row


@dataclass(frozen=True)
class Knowledge:
    """What predictions for some models rest on, as a job keeps it for its report.

    Attributes:
        kind: `fitted` (a prediction for each question, learned from outcomes), `table` (the same figures for
            every question, counted from outcomes), `prior` (estimated from public figures of other models) or
            `given` (a router of the caller's own, which does not say).
        models: names, sorted.
        datasets: questions by data set; empty where that is not known.
        questions: of which outcomes were known; 0 where that is not known.
        date: when they were measured or fitted, YYYY-MM-DD; "" where that is not known.
        about: what the questions are, in words.
        calibration_error: on questions that it was not fitted on; None where that was not measured.
    """

    kind: Literal["fitted", "table", "prior", "given"]
    models: tuple[str, ...] = ()
    datasets: dict[str, int] = field(default_factory=dict)
    questions: int = 0
    date: str = ""
    about: str = ""
    calibration_error: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"models": [*self.models]}


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
                row.seconds,
            )
            for row in self.table(query)
        ]

    def has_seen(self, query: Query) -> bool | None:
        """Whether it was fitted on this very question; None where it cannot tell."""
        return None

    def knowledge(self) -> tuple[Knowledge, ...]:
        """What its predictions rest on, models with outcomes first."""
        return (Knowledge("given"),)

    # Whether models still behave as they did where the router was fitted (`change_detection`).

    def profiles(self) -> Mapping[str, str]:
        """By model, which outcomes of it are known: another text once it was profiled again.

        Empty for a router that cannot tell its own kind of questions from others: if calls differ from what
        it expects, that says nothing about the models.
        """
        return {}

    def expectation(self, query: Query, row: Row) -> Expectation | None:
        """What is expected of a call of the row's pair; None where a call tells nothing about the model."""
        return None

    def with_changes(self, changes: Mapping[str, ModelChange]) -> QueryRouter:
        """This router, knowing that models have changed."""
        return self

    def frozen(self) -> QueryRouter:
        """The router as it is now, for a job that corrects its costs by itself."""
        return self

    @property
    def has_plans(self) -> bool:
        """Whether `plans_for` has more than the pairs of the table, each alone."""
        return type(self).plans_for is not QueryRouter.plans_for
