"""Prometheus metrics of a server.

Money and holds are read from the ledger at each scrape, so that they equal the ledger's, cancelled calls
included. Needs the `server` extra.
"""

from __future__ import annotations

from collections.abc import Collection

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from viaticum.agents.server.admission import ConcurrencyLimiter
from viaticum.budgets import Ledger
from viaticum.money import NANOUSD_PER_USD
from viaticum.types import Usage

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)  # seconds
OPEN_STATES = ("reserved", "dispatched", "unknown")


class Metrics:
    """The metrics of one server, in a registry of its own, so that servers in one process do not mix."""

    def __init__(self, limiter: ConcurrencyLimiter) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "viaticum_requests",
            "Requests that ended, by requested model and HTTP status.",
            ["model", "status"],
            registry=registry,
        )
        self.tokens = Counter(
            "viaticum_tokens",
            "Tokens of calls that were not cancelled.",
            ["model", "kind"],
            registry=registry,
        )
        self.disconnected = Counter(
            "viaticum_disconnected_clients",
            "Clients that disconnected before the end of their response.",
            registry=registry,
        )
        self.seconds = Histogram(
            "viaticum_request_seconds",
            "Seconds from the request to the end of its response.",
            ["model"],
            buckets=BUCKETS,
            registry=registry,
        )
        self.first_seconds = Histogram(
            "viaticum_first_piece_seconds",
            "Seconds from the request to the first piece of its response.",
            ["model"],
            buckets=BUCKETS,
            registry=registry,
        )
        running = Gauge("viaticum_in_flight", "Calls that run.", registry=registry)
        running.set_function(lambda: limiter.running)
        queued = Gauge("viaticum_queued", "Requests that wait for a free slot.", registry=registry)
        queued.set_function(lambda: limiter.queued)
        self._overrun = Gauge(
            "viaticum_overrun_dollars",
            "Dollars that calls of this process cost above what was held for them.",
            registry=registry,
        )
        self._holds = Gauge(
            "viaticum_holds", "Open holds of all budgets of the ledger.", ["state"], registry=registry
        )

    def count_tokens(self, usage: Usage) -> None:
        for model, count in usage.models.items():
            self.tokens.labels(model, "input").inc(count.input_tokens)
            self.tokens.labels(model, "output").inc(count.output_tokens)

    def render(self, ledger: Ledger) -> bytes:
        """What this process does, in Prometheus' text format. Reads the ledger, as `render_budgets` does."""
        self._overrun.set(sum(ledger.overruns.values()) / NANOUSD_PER_USD)
        for state in OPEN_STATES:
            self._holds.labels(state).set(len(ledger.holds(state=state)))  # type: ignore[arg-type]
        return generate_latest(self.registry)

    def render_budgets(self, ledger: Ledger, budgets: Collection[str]) -> bytes:
        """The dollars of these budgets, in Prometheus' text format. Not for the event loop's thread."""
        registry = CollectorRegistry()
        spent = Gauge("viaticum_spent_dollars", "Dollars posted to a budget.", ["budget"], registry=registry)
        held = Gauge(
            "viaticum_held_dollars", "Dollars held by open calls of a budget.", ["budget"], registry=registry
        )
        left = Gauge(
            "viaticum_left_dollars",
            "Dollars of a budget that are neither posted nor held, where they are limited.",
            ["budget"],
            registry=registry,
        )
        for name in budgets:
            budget = ledger.budget(name)
            spent.labels(name).set(budget.posted_nanousd / NANOUSD_PER_USD)
            held.labels(name).set(budget.held_nanousd / NANOUSD_PER_USD)
            if budget.left_nanousd is not None:
                left.labels(name).set(budget.left_nanousd / NANOUSD_PER_USD)
        return generate_latest(registry)
