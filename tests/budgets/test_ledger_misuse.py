"""What the ledger says to wrong arguments: an error of our tree, and nothing changed."""

from __future__ import annotations

from typing import Any

import pytest

from viaticum.budgets import Ledger
from viaticum.errors import ViaticumError
from viaticum.money import Price
from viaticum.types import TokenCount

PRICES, USAGE = {"m": Price.per_million(1, 1)}, {"m": TokenCount(1, 1)}
WRONG: list[Any] = [5, -1, 0.5, float("nan"), True, "x", b"x", [5], {"a": 1}, object(), 10**400]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda each: ascii(each)[:12])
def test_wrong_arguments_are_refused(wrong: Any) -> None:
    ledger = Ledger("memory:")
    ledger.create("b", limit_nanousd=10**9)
    ledger.reserve("b", "held", USAGE, PRICES, dispatch=True)
    before = ledger.entries()
    for call in (
        lambda: ledger.create("c", limit_nanousd=5, window=wrong),
        lambda: ledger.set_limit("b", window=wrong),
        lambda: ledger.reserve("b", "k", wrong, PRICES),
        lambda: ledger.reserve("b", "k", {"m": wrong}, PRICES),
        lambda: ledger.reserve("b", "k", {"m": TokenCount(1, -1)}, PRICES),
        lambda: ledger.reserve("b", "k", USAGE, wrong),
        lambda: ledger.reserve("b", "k", USAGE, {"m": wrong}),
        lambda: ledger.reserve("b", "k", USAGE, PRICES, tags=wrong),
        lambda: ledger.reserve("b", "k", USAGE, PRICES, unpriced=wrong),
        lambda: ledger.reserve_many("b", wrong),
        lambda: ledger.reserve_many("b", [wrong]),
        lambda: ledger.settle("held", wrong),
        lambda: ledger.settle("held", USAGE, counted=wrong),
        lambda: ledger.settle_many([wrong]),
        lambda: ledger.find(wrong),
        lambda: ledger.expire_leases(wrong),
        lambda: ledger.holds("b", wrong),
        lambda: ledger.posts("b", tags=wrong),
        lambda: ledger.hold(""),
    ):
        with pytest.raises(ViaticumError):
            call()
    assert ledger.entries() == before
    assert ledger.check() == []
    if not isinstance(wrong, str):
        with pytest.raises(ViaticumError):
            Ledger(wrong)
