"""A deadline of a run, a call or a request: how much is left of it, and which ways are quick enough.

What is in flight at the deadline is ended at its next piece (of a remote model within a quarter of a second,
also while it is silent), and settled. Before that, a way whose calls took longer in nine of ten cases than
what is left is not chosen. Leaves out what calls took (`viaticum.agents.workflow.latencies`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeVar

from viaticum.agents.workflow.latencies import CallLatencies, Seconds
from viaticum.errors import DeadlineExceeded
from viaticum.routers.query import PlanRow
from viaticum.strategies import get as get_strategy
from viaticum.types import Pair, RoutingTable, Row

RowT = TypeVar("RowT")
Timed = TypeVar("Timed", Row, PlanRow)
SecondsOf = Callable[[RowT], Seconds | None]  # what a way takes; None where that is not known


@dataclass(frozen=True, slots=True)
class Deadline:
    """When something has to end.

    Attributes:
        seconds: the limit, as it was given.
        until: the end, in seconds of `time.time`.
    """

    seconds: float
    until: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """From now on."""
        return cls(seconds, time.time() + seconds)

    @property
    def left(self) -> float:
        """Seconds; 0 or less once it has passed."""
        return self.until - time.time()

    def exceeded(self, what: str) -> DeadlineExceeded:
        """The error. what: what did not end in time, and what became of it."""
        return DeadlineExceeded(f"{self.seconds:g} seconds (max_seconds) are over: {what}")

    def check(self) -> None:
        """Raises `DeadlineExceeded` where no call can begin any more."""
        if self.left <= 0:
            raise self.exceeded("no further call is made")


def first_deadline(*deadlines: Deadline | None) -> Deadline | None:
    """The one that passes first; None where there is none."""
    return min(filter(None, deadlines), key=lambda each: each.until, default=None)


def given_deadline(deadline: Deadline | None, seconds: float | None) -> Deadline | None:
    """A deadline, else one so many seconds from now; None where neither is given."""
    return Deadline.after(seconds) if deadline is None and seconds is not None else deadline


def in_time(rows: Sequence[RowT], seconds: SecondsOf[RowT], deadline: Deadline | None) -> list[RowT]:
    """The rows that are expected to end in time: in nine of ten cases, or else in half of them.

    Rows of which nothing is known stay.

    Args:
        seconds: what a row takes.
        deadline: None keeps all.
    """
    if deadline is None:
        return list(rows)
    left, known = deadline.left, [seconds(row) for row in rows]
    for quantile in ("p90", "p50"):
        kept = [
            row
            for row, each in zip(rows, known, strict=True)
            if each is None or getattr(each, quantile) <= left
        ]
        if kept:
            return kept
    return []


def too_slow(rows: Sequence[RowT], seconds: SecondsOf[RowT], deadline: Deadline) -> str:
    """Why none of these rows is begun: the quickest of them, and what is left."""
    found = min(filter(None, map(seconds, rows)), key=lambda each: each.p50)
    return (
        f"the quickest of {len(rows)} ways took {found.p50:.1f} seconds in half of the calls and "
        f"{found.p90:.1f} in nine of ten, and {max(0.0, deadline.left):.1f} are left"
    )


def with_seconds(rows: Sequence[Timed], seconds: SecondsOf[Timed]) -> list[Timed]:
    """Rows of pairs or plans; those without seconds get what earlier calls took in half of the cases."""
    found = []
    for row in rows:
        known = seconds(row) if row.seconds is None else None
        found.append(row if known is None else replace(row, seconds=round(known.p50, 3)))
    return found


def seconds_of_pair(latencies: CallLatencies, table: Callable[[], RoutingTable]) -> SecondsOf[str]:
    """A function from a pair, as model+strategy, to what all its samples are expected to take."""

    @cache
    def rows() -> dict[str, Row]:
        return {str(row.pair): row for row in table()}

    def seconds(name: str) -> Seconds | None:
        pair = Pair.parse(name)
        found = latencies.of(rows().get(name, Row(pair, 0.0, 0, 0, 0, 0)))
        return None if found is None else found.times(get_strategy(pair.strategy).samples)

    return seconds


def seconds_of_plan(of_pair: SecondsOf[str]) -> SecondsOf[PlanRow]:
    """The same of a plan, whose pairs are called one after the other; None where one is unknown."""

    def seconds(row: PlanRow) -> Seconds | None:
        total = Seconds(0.0, 0.0)
        for pair in row.plan.pairs:
            found = of_pair(str(pair))
            if found is None:
                return None
            total += found
        return total

    return seconds
