"""Progress of a batch as events: plain dicts, and one line of text made from one. Leaves out printing."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from viaticum.agents.batch.output import Counts
from viaticum.budgets import Ledger
from viaticum.jobs import Preview
from viaticum.money import short_usd

EventSink = Callable[[dict[str, Any]], None]
EVERY_SECONDS = 0.5
FORECAST_SECONDS = 5.0  # between forecasts, which read the whole sample


@dataclass
class Progress:
    """Sends the figures of a job at most every 0.5 s.

    Args:
        budget: the scope that pays.
        total: rows of the job.
        each: also called each time.
    """

    tell: EventSink
    ledger: Ledger
    budget: str
    total: int
    counts: Counts
    forecast: Callable[[], Preview | None] = lambda: None
    each: Callable[[], object] = lambda: None

    def __post_init__(self) -> None:
        self._began = self._last = time.monotonic()
        self._before = self.counts.done
        self._latest_forecast: Preview | None = None
        self._forecast_at = 0.0

    def report_if_due(self) -> None:
        if time.monotonic() - self._last >= EVERY_SECONDS:
            self.now()

    def now(self, event: str = "progress", **more: Any) -> None:
        """Send an event. more: what it has beside the figures."""
        self._last = time.monotonic()
        self.each()
        self.tell({"event": event, **self.figures(), **more})

    def figures(self) -> dict[str, Any]:
        budget, seconds = self.ledger.budget(self.budget), time.monotonic() - self._began
        done = self.counts.done
        rate = (done - self._before) / seconds if seconds > 0 else 0.0
        now = time.monotonic()
        if self._latest_forecast is None or now - self._forecast_at > FORECAST_SECONDS or done == self.total:
            self._latest_forecast, self._forecast_at = self.forecast(), now
        return {
            "rows": self.total,
            "done": done,
            **asdict(self.counts),
            "spent_nanousd": budget.posted_nanousd,
            "held_nanousd": budget.held_nanousd,
            "left_nanousd": budget.left_nanousd,
            "projected_nanousd": _projected_cost(budget.limit_nanousd, self._latest_forecast),
            "rate": round(rate, 3),
            "seconds": round(seconds, 1),
            "seconds_left": round((self.total - done) / rate, 1) if rate else None,
        }


def _projected_cost(limit: int | None, expected: Preview | None) -> int | None:
    """Expected cost of the whole job.

    The forecast covers this pass; its budget is what was unspent when it started.
    """
    if expected is None:
        return None
    return expected.cost_p50 + (0 if limit is None else max(0, limit - expected.budget_nanousd))


def progress_line(event: dict[str, Any]) -> str:
    """The figures of an event as one line."""
    parts = [f"{event['done']}/{event['rows']} done"]
    parts += [f"{event[name]} {name}" for name in ("failed", "skipped", "cached") if event[name]]
    if event["graded"]:
        parts.append(f"{event['right']} of {event['graded']} right ({event['right'] / event['graded']:.1%})")
    money = f"{short_usd(event['spent_nanousd'])} spent, {short_usd(event['held_nanousd'])} held"
    if event["left_nanousd"] is not None:
        money += f", {short_usd(event['left_nanousd'])} left"
    if event["projected_nanousd"] is not None:
        money += f", {short_usd(event['projected_nanousd'])} in the end"
    parts += [money, f"{event['rate']:.3g} rows/s"]
    if event["seconds_left"] is not None and event["done"] < event["rows"]:
        parts.append(f"{_time(event['seconds_left'])} to go")
    return " · ".join(parts)


def waiting_line(batches: Sequence[dict[str, Any]]) -> str:
    """The open batches of an event as one line."""
    rows, done = (sum(batch[name] for batch in batches) for name in ("rows", "done"))
    counts = Counter(str(batch["status"]).replace("_", " ") for batch in batches)
    states = ", ".join(
        f"{count} {status}" if len(batches) > 1 else status for status, count in counts.items()
    )
    many = "batch" if len(batches) == 1 else f"{len(batches)} batches"
    return f"{done} of {rows} rows answered in {many} at the provider ({states})"


def _time(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
