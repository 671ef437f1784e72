"""How long plans take, as far as calls of their models were seen: which are quick enough for a row, and when.

Leaves out what calls took (`viaticum.agents.workflow.latencies`) and the choice among plans
(`agents.batch.planning`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from viaticum.agents.workflow.deadlines import Deadline, in_time
from viaticum.agents.workflow.latencies import REFRESH_SECONDS, CallLatencies, Seconds
from viaticum.routers.query import PlanRow
from viaticum.strategies import get as get_strategy
from viaticum.types import Pair, Row

TOKENS_A_SECOND = 30.0  # of one sequence, until real times are known


class PlanTimes:
    """Times of plans, looked up in the ledger at most every five seconds.

    Args:
        latencies: what calls took; None where that is not known.
        max_seconds: that a row may take, all its calls together; None for no limit.
    """

    def __init__(self, latencies: CallLatencies | None = None, max_seconds: float | None = None) -> None:
        self._latencies, self._max = latencies, max_seconds
        self._known: dict[Pair, Seconds | None] = {}
        self._read_at = float("-inf")
        self.version = 0  # another one where times may have changed

    def refresh(self) -> None:
        if self._latencies is not None and time.monotonic() - self._read_at >= REFRESH_SECONDS:
            self._known, self._read_at, self.version = {}, time.monotonic(), self.version + 1

    def in_time(self, plans: Sequence[PlanRow], rows: Mapping[Pair, Row]) -> list[PlanRow]:
        """The plans that are expected to end in time; where none is, the quickest one.

        rows: the router's table by pair.
        """
        if self._max is None or not plans:
            return list(plans)
        kept = in_time(plans, lambda plan: self.of_all(plan, rows), Deadline.after(self._max))
        return kept or [min(plans, key=lambda plan: self.seconds(plan.plan.pairs, rows))]

    def seconds(self, pairs: Sequence[Pair], rows: Mapping[Pair, Row]) -> float:
        """What calls of these pairs usually take, one after the other."""
        return sum(self._usual(pair, rows) for pair in pairs)

    def _usual(self, pair: Pair, rows: Mapping[Pair, Row]) -> float:
        found = self._of(pair, rows)
        if found is not None:
            return found.p50
        return rows[pair].tokens_p50 / TOKENS_A_SECOND if pair in rows else 0.0

    def of_all(self, plan: PlanRow, rows: Mapping[Pair, Row]) -> Seconds | None:
        """Of all calls of a plan; None where one is unknown."""
        total = Seconds(0.0, 0.0)
        for pair in plan.plan.pairs:
            if (found := self._of(pair, rows)) is None:
                return None
            total += found
        return total

    def _of(self, pair: Pair, rows: Mapping[Pair, Row]) -> Seconds | None:
        """Of all samples of a pair, with the tokens of the first row that asks; None where none was seen."""
        if self._latencies is None:
            return None
        if pair not in self._known:
            found = self._latencies.of(rows.get(pair, Row(pair, 0.0, 0, 0, 0, 0)))
            samples = get_strategy(pair.strategy).samples
            self._known[pair] = None if found is None else found.times(samples)
        return self._known[pair]
