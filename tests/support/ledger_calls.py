"""Shared by the ledger tests: two models with prices, a call, its usage, and a settable clock."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from viaticum.money import Price
from viaticum.types import TokenCount

MILLION = 1_000_000
# One nano-dollar a token read, three a token made; ten times that for the large one.
PRICES = {"small": Price(MILLION, 3 * MILLION), "large": Price(10 * MILLION, 30 * MILLION)}
CALL = {"small": TokenCount(10, 20)}  # 70 nano-dollars, 30 tokens
USED = {"small": TokenCount(10, 5)}  # 25 nano-dollars, 15 tokens


class Clock:
    """Time that passes when a test says so."""

    def __init__(self, text: str = "2026-03-10T12:00:00") -> None:
        self.moment = datetime.fromisoformat(text).replace(tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.moment

    def set(self, text: str) -> None:
        self.moment = datetime.fromisoformat(text).replace(tzinfo=UTC)

    def wait(self, **span: float) -> None:
        self.moment += timedelta(**span)
