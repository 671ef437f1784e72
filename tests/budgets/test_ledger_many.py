"""Many calls in one transaction: what they leave is what one call after the other leaves, on every store."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
from ledger_calls import CALL, PRICES, USED, Clock

from viaticum.budgets import Claim, Entry, Hold, Ledger, Settlement, Window, sqlite
from viaticum.budgets.sql import SqlRows
from viaticum.budgets.write_buffer import WriteBuffer
from viaticum.errors import (
    BudgetClosed,
    BudgetExceeded,
    HoldError,
    InputError,
    LedgerError,
    UnknownName,
    UnknownPrice,
    ViaticumError,
)
from viaticum.types import TokenCount


def claim(key: str, **changes: Any) -> Claim:
    return Claim(**{"key": key, "usage": CALL, "prices": PRICES, **changes})


def scopes(ledger: Ledger) -> None:
    """org (200) > run with a window > a and b: two of three calls fit org."""
    ledger.create("org", limit_nanousd=200)
    ledger.create("run", parent="org", limit_tokens=10_000, window=Window("hour"))
    ledger.create("a", parent="run")
    ledger.create("b", parent="run")


def told(outcome: Hold | Entry | ViaticumError) -> Any:
    return (type(outcome), str(outcome)) if isinstance(outcome, ViaticumError) else outcome


def attempt(step: Callable[[], Any]) -> Any:
    try:
        return step()
    except ViaticumError as error:
        return told(error)


CLAIMS = [
    claim("1", tags={"strategy": "cot"}, parameters="abc"),
    claim("1", tags={"strategy": "cot"}, parameters="abc"),  # again
    claim("1", usage={"small": TokenCount(1, 1)}),  # another call
    claim("2"),
    claim("3"),  # does not fit
    claim("4", usage={"small": TokenCount(1, 1)}),  # fits beside it
    claim("5", usage={"nobody": TokenCount(1, 1)}),
    claim("6", usage={}),
    claim("\n"),
]
SETTLEMENTS = [
    Settlement("1", USED, '"text"'),
    Settlement("1", USED, '"text"'),
    Settlement("1", CALL),  # settled otherwise
    Settlement("4", None),
    Settlement("2", {"large": TokenCount(1, 1)}),  # the hold does not name it
    Settlement("2", USED, "no JSON"),
    Settlement("2", {"small": TokenCount(20, 40)}),  # more than it held
    Settlement("void", USED),
    Settlement("none", USED),
]


def buffer() -> set[int]:
    """By type alone: `isinstance` would wake lazy objects of other libraries."""
    return {id(each) for each in gc.get_objects() if type(each) is WriteBuffer}


def test_a_chunk_leaves_nothing_to_the_collector_of_cycles(ledger: Ledger) -> None:
    scopes(ledger)
    gc.disable()
    try:
        before = buffer()  # what other tests have left
        ledger.reserve_many("a", [claim("1"), claim("2")])
        ledger.settle_many([Settlement("1", USED), Settlement("2", USED)])
        assert buffer() == before
    finally:
        gc.enable()


@pytest.mark.parametrize("dispatch", [False, True])
def test_the_same_as_one_after_the_other(ledger: Ledger, dispatch: bool) -> None:
    with Ledger("memory:", clock=Clock()) as single:
        for each in (ledger, single):
            scopes(each)
            each.reserve("a", "void", {"small": TokenCount(1, 0)}, PRICES)
            each.void("void")
        many = ledger.reserve_many("a", CLAIMS, dispatch=dispatch)
        one = [
            attempt(
                lambda each=each: single.reserve(  # type: ignore[misc]
                    "a", each.key, each.usage, each.prices, tags=each.tags, dispatch=dispatch
                )
            )
            for each in CLAIMS
        ]
        kinds = [type(each) for each in many]
        assert kinds == [
            Hold,
            Hold,
            HoldError,
            Hold,
            BudgetExceeded,
            Hold,
            UnknownPrice,
            InputError,
            InputError,
        ]
        # The hash of the parameters is given in one form and made in the other.
        assert [_plain(told(each)) for each in many] == [_plain(each) for each in one]
        ended = ledger.settle_many(SETTLEMENTS)
        ones = [
            attempt(lambda each=each: single.settle(each.key, each.usage, each.result))
            for each in SETTLEMENTS
        ]  # type: ignore[misc]
        assert [type(each) for each in ended] == [
            Entry,
            Entry,
            HoldError,
            Entry,
            UnknownPrice,
            InputError,
            Entry,
            HoldError,
            HoldError,
        ]
        assert [_plain(told(each)) for each in ended] == [_plain(each) for each in ones]
        assert ledger.budgets() == single.budgets()
        assert [each.kind for each in ledger.entries()] == [each.kind for each in single.entries()]
        assert ledger.find(["1", "2", "?"]) == {
            key: hold for key in ("1", "2") if (hold := ledger.hold(key)) is not None
        }


def _plain(outcome: Any) -> Any:
    """Without the hashes of a chain whose parameters differ."""
    from dataclasses import replace

    if isinstance(outcome, Hold):
        return replace(outcome, parameters="")
    return replace(outcome, hash="", id=0) if isinstance(outcome, Entry) else outcome


def test_the_chain_is_the_same_to_the_last_hash(ledger: Ledger) -> None:
    claims = [claim(str(number), usage={"small": TokenCount(number, 1)}) for number in range(1, 5)]
    with Ledger("memory:", clock=Clock()) as single:
        for each in (ledger, single):
            scopes(each)
        ledger.reserve_many("b", claims, dispatch=True)
        for each in claims:
            single.reserve("b", each.key, each.usage, each.prices, dispatch=True)
        entries = ledger.settle_many([Settlement(each.key, each.usage, '"x"') for each in claims])
        for each in claims:
            single.settle(each.key, each.usage, '"x"')
        assert ledger.chain_heads() == single.chain_heads()
        assert ledger.entries() == single.entries(), "ids too"
        assert entries == [each for each in single.entries() if each.kind == "post"]


def test_windows_count_what_is_gathered(ledger: Ledger) -> None:
    ledger.create("hourly", limit_nanousd=150, window=Window("hour"))
    first, second, third = ledger.reserve_many("hourly", [claim("1"), claim("2"), claim("3")])
    assert isinstance(third, BudgetExceeded)
    assert (third.needed, third.left) == (70, 10)
    ledger.settle_many([Settlement("1", USED), Settlement("2", USED)])
    assert ledger.budget("hourly").posted_nanousd == 50
    assert not isinstance(first, ViaticumError)
    assert not isinstance(second, ViaticumError)


def test_what_a_crashed_caller_left_is_freed_once(ledger: Ledger, clock: Clock) -> None:
    ledger.create("b", limit_nanousd=150)
    ledger.reserve_many("b", [claim("old 1"), claim("old 2")], lease=10)
    clock.wait(seconds=11)
    outcomes = ledger.reserve_many("b", [claim("1"), claim("2"), claim("3"), claim("4")])
    assert [type(each) for each in outcomes] == [Hold, Hold, BudgetExceeded, BudgetExceeded]
    assert [each.key for each in ledger.entries() if each.kind == "expire"] == ["old 1", "old 2"]


def test_calls_of_several_budgets_are_settled_together(ledger: Ledger) -> None:
    for name in ("x", "y"):
        ledger.create(name, limit_nanousd=100)
        ledger.reserve_many(name, [claim(name)])
    entries = ledger.settle_many([Settlement("y", USED), Settlement("x", USED)])
    assert [each.budget for each in entries if isinstance(each, Entry)] == ["y", "x"]
    assert [budget.posted_nanousd for budget in ledger.budgets()] == [25, 25]


def test_what_concerns_all_is_raised_and_a_closed_budget_is_not(ledger: Ledger) -> None:
    scopes(ledger)
    with pytest.raises(UnknownName):
        ledger.reserve_many("nobody", [claim("1")])
    assert ledger.reserve_many("a", []) == []
    assert ledger.settle_many([]) == []
    assert ledger.find([]) == {}
    ledger.reserve_many("a", [claim("1")])
    ledger.pause("run")
    held, refused = ledger.reserve_many("a", [claim("1"), claim("2")])
    assert isinstance(held, Hold)
    assert isinstance(refused, BudgetClosed)


def test_more_keys_than_a_statement_takes(ledger: Ledger) -> None:
    ledger.create("b", limit_nanousd=10**9)
    claims = [claim(str(number)) for number in range(1100)]
    ledger.reserve_many("b", claims, dispatch=True)
    entries = ledger.settle_many([Settlement(each.key, USED) for each in claims])
    assert {each.kind for each in entries if isinstance(each, Entry)} == {"post"}
    assert len({each.id for each in entries if isinstance(each, Entry)}) == 1100
    assert ledger.budget("b").posted_nanousd == 25 * 1100


def test_a_write_that_fails_leaves_nothing(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with Ledger(tmp_path / "ledger.db") as ledger:
        ledger.create("b", limit_nanousd=10**9)
        ledger.reserve_many("b", [claim("1")], dispatch=True)

        def breaks(rows: SqlRows, *args: Any) -> None:
            raise sqlite.sqlite3.OperationalError("disk I/O error")

        with monkeypatch.context() as patched:
            patched.setattr(SqlRows, "add_to_totals", breaks)
            with pytest.raises(LedgerError):
                ledger.reserve_many("b", [claim("2")])
            with pytest.raises(LedgerError):
                ledger.settle_many([Settlement("1", USED)])
        assert ledger.check() == []
        assert [hold.state for hold in ledger.holds()] == ["dispatched"]
