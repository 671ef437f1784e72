"""What a server counts, for Prometheus. Money and holds are read from the ledger when someone asks, so that they are
those of the ledger, calls that were broken off among them.

Needs the `server` extra.
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
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
OPEN_STATES = ("reserved", "dispatched", "unknown")


class Metrics:
    """One registry a server, so that several in one process do not mix."""

    def __init__(self, places: ConcurrencyLimiter) -> None:
        own = self.registry = CollectorRegistry()
        self.requests = Counter(
            "viaticum_requests",
            "Requests that ended, by what was asked for and HTTP status.",
            ["model", "status"],
            registry=own,
        )
        self.tokens = Counter(
            "viaticum_tokens", "Tokens of calls that ended by themselves.", ["model", "kind"], registry=own
        )
        self.disconnected = Counter(
            "viaticum_disconnected_clients", "Clients that went away before the end.", registry=own
        )
        self.seconds = Histogram(
            "viaticum_request_seconds",
            "From the request to the end of its answer.",
            ["model"],
            buckets=SECONDS,
            registry=own,
        )
        self.first_seconds = Histogram(
            "viaticum_first_piece_seconds",
            "From the request to the first piece of its answer.",
            ["model"],
            buckets=SECONDS,
            registry=own,
        )
        Gauge("viaticum_in_flight", "Calls that run now.", registry=own).set_function(lambda: places.taken)
        Gauge("viaticum_queued", "Requests that wait for a place.", registry=own).set_function(
            lambda: places.waiting
        )
        self._spent = Gauge("viaticum_spent_dollars", "Posted to a budget.", ["budget"], registry=own)
        self._held = Gauge(
            "viaticum_held_dollars", "Held by a budget's open calls.", ["budget"], registry=own
        )
        self._left = Gauge(
            "viaticum_left_dollars",
            "Neither spent nor held, where dollars are limited.",
            ["budget"],
            registry=own,
        )
        self._holds = Gauge(
            "viaticum_holds", "Open holds, by state; of all budgets of the ledger.", ["state"], registry=own
        )

    def count_tokens(self, usage: Usage) -> None:
        for model, count in usage.models.items():
            self.tokens.labels(model, "input").inc(count.input_tokens)
            self.tokens.labels(model, "output").inc(count.output_tokens)

    def page(self, ledger: Ledger, budgets: Collection[str]) -> bytes:
        """The text that Prometheus reads. Reads the ledger: not for the event loop's thread."""
        for name in budgets:
            budget = ledger.budget(name)
            self._spent.labels(name).set(budget.posted_nanousd / NANOUSD_PER_USD)
            self._held.labels(name).set(budget.held_nanousd / NANOUSD_PER_USD)
            if budget.left_nanousd is not None:
                self._left.labels(name).set(budget.left_nanousd / NANOUSD_PER_USD)
        for state in OPEN_STATES:
            self._holds.labels(state).set(len(ledger.holds(state=state)))  # type: ignore[arg-type]
        return generate_latest(self.registry)
