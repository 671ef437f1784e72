"""How a batch stands, as events: plain dicts for machines, and one line of them for people."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from viaticum.agents.batch.output import Counts
from viaticum.budgets import Ledger
from viaticum.jobs import Preview
from viaticum.money import NANOUSD_PER_USD

EventSink = Callable[[dict[str, Any]], None]
EVERY_SECONDS = 0.5
FORECAST_SECONDS = 5.0  # it looks at the whole sample


@dataclass
class Progress:
    """Tells how a job stands, at most so often. total: rows of the job; budget: the scope that pays."""

    tell: EventSink
    ledger: Ledger
    budget: str
    total: int
    counts: Counts
    forecast: Callable[[], Preview | None] = lambda: None

    def __post_init__(self) -> None:
        self._began = self._last = time.monotonic()
        self._before = self.counts.done
        self._foretold: Preview | None = None
        self._foretold_at = 0.0

    def maybe(self) -> None:
        if time.monotonic() - self._last >= EVERY_SECONDS:
            self.now()

    def now(self, event: str = "progress") -> None:
        self._last = time.monotonic()
        self.tell({"event": event, **self.figures()})

    def figures(self) -> dict[str, Any]:
        budget, seconds = self.ledger.budget(self.budget), time.monotonic() - self._began
        done = self.counts.done
        rate = (done - self._before) / seconds if seconds > 0 else 0.0
        now = time.monotonic()
        if self._foretold is None or now - self._foretold_at > FORECAST_SECONDS or done == self.total:
            self._foretold, self._foretold_at = self.forecast(), now
        return {
            "rows": self.total,
            "done": done,
            **asdict(self.counts),
            "spent_nanousd": budget.posted_nanousd,
            "held_nanousd": budget.held_nanousd,
            "left_nanousd": budget.left_nanousd,
            "projected_nanousd": _in_the_end(budget.limit_nanousd, self._foretold),
            "rate": round(rate, 3),
            "seconds": round(seconds, 1),
            "seconds_left": round((self.total - done) / rate, 1) if rate else None,
        }


def _in_the_end(limit: int | None, expected: Preview | None) -> int | None:
    """What the job comes to. A forecast is of this pass alone, whose budget is what was unspent when it began."""
    if expected is None:
        return None
    return expected.cost_p50 + (0 if limit is None else max(0, limit - expected.budget_nanousd))


def line_of(told: dict[str, Any]) -> str:
    """Figures as one line."""
    parts = [f"{told['done']}/{told['rows']} done"]
    parts += [f"{told[name]} {name}" for name in ("failed", "skipped", "cached") if told[name]]
    if told["graded"]:
        parts.append(f"{told['right']} of {told['graded']} right ({told['right'] / told['graded']:.1%})")
    money = f"{_usd(told['spent_nanousd'])} spent, {_usd(told['held_nanousd'])} held"
    if told["left_nanousd"] is not None:
        money += f", {_usd(told['left_nanousd'])} left"
    if told["projected_nanousd"] is not None:
        money += f", {_usd(told['projected_nanousd'])} in the end"
    parts += [money, f"{told['rate']:.3g} rows/s"]
    if told["seconds_left"] is not None and told["done"] < told["rows"]:
        parts.append(f"{_time(told['seconds_left'])} to go")
    return " · ".join(parts)


def _usd(amount: int) -> str:
    return f"${amount / NANOUSD_PER_USD:.4g}"


def _time(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
