"""The limit of one request: as hard as that of a scope, and gone with the request; on every store."""

from __future__ import annotations

import threading

import pytest
from ledger_calls import CALL, PRICES, USED

from viaticum.budgets import Hold, Ledger
from viaticum.errors import BudgetError, BudgetExceeded, InputError, UnknownName
from viaticum.types import TokenCount


def test_requests_with_a_budget_of_their_own_leave_no_scope(ledger: Ledger) -> None:
    ledger.create("serve", limit_nanousd=10**6)
    for number in range(30):
        name = f"serve/{number}"
        with ledger.request_limit(name, parent="serve", limit_nanousd=100 if number % 3 else 50):
            if number % 3 == 0:  # the call may cost 70
                with pytest.raises(BudgetExceeded) as refused:
                    ledger.reserve(name, f"call/{number}", CALL, PRICES)
                assert (refused.value.budget, refused.value.left, refused.value.needed) == (name, 50, 70)
            else:
                ledger.reserve(name, f"call/{number}", CALL, PRICES, dispatch=True)
                ledger.settle(f"call/{number}", USED)
                assert ledger.budget(name).posted_nanousd == 25
                assert [budget.left_nanousd for budget in ledger.lineage(name)][-1] == 75
        with pytest.raises(UnknownName):
            ledger.budget(name)
    assert [budget.name for budget in ledger.budgets()] == ["serve"]
    assert ledger.budget("serve").posted_nanousd == 20 * 25
    assert {hold.budget for hold in ledger.holds()} == {"serve"}


def test_what_a_request_holds_and_spent_counts_until_its_end(ledger: Ledger) -> None:
    ledger.create("serve", limit_nanousd=10**6)
    with ledger.request_limit("request", parent="serve", limit_nanousd=150):
        ledger.reserve("request", "a", CALL, PRICES)
        ledger.reserve("request", "b", CALL, PRICES)
        assert ledger.reserve("request", "b", CALL, PRICES).key == "b"  # the same call again
        with pytest.raises(BudgetExceeded, match=r"'request' has \$0.00000001 left"):
            ledger.reserve("request", "c", CALL, PRICES)
        ledger.void("a")
        ledger.settle("b", {"small": TokenCount(10, 100)})  # 310, more than it held
        ledger.settle("b", {"small": TokenCount(10, 100)})  # once more, and counted once
        assert ledger.budget("request").left_nanousd == -160
        with pytest.raises(BudgetExceeded):
            ledger.reserve("request", "c", {"small": TokenCount(1, 0)}, PRICES)
        ledger.reserve("serve", "d", CALL, PRICES)  # other requests go on
        ledger.settle_many([])


def test_the_limits_above_hold_as_well(ledger: Ledger) -> None:
    ledger.create("serve", limit_nanousd=100)
    with ledger.request_limit("request", parent="serve", limit_nanousd=10**6):
        ledger.reserve("request", "a", CALL, PRICES)
        with pytest.raises(BudgetExceeded) as refused:
            ledger.reserve("request", "b", CALL, PRICES)
        assert refused.value.budget == "serve"
        ledger.settle("a", USED)
        assert ledger.budget("request").posted_nanousd == 25


def test_threads_of_one_request_never_pass_its_limit(ledger: Ledger) -> None:
    ledger.create("serve", limit_nanousd=10**6)
    held: list[Hold] = []
    refused: list[BudgetExceeded] = []

    def work(thread: int) -> None:
        for number in range(5):
            try:
                held.append(ledger.reserve("request", f"{thread}/{number}", CALL, PRICES))
            except BudgetExceeded as error:
                refused.append(error)

    with ledger.request_limit("request", parent="serve", limit_nanousd=500):
        threads = [threading.Thread(target=work, args=(each,)) for each in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(held), len(refused)) == (7, 33)  # 7 times 70 of 500


def test_wrong_limits_are_refused(ledger: Ledger) -> None:
    ledger.create("serve", limit_nanousd=100)
    for name, limit in (("", 5), ("request", 0), ("request", -1), ("request", None)):
        with pytest.raises(InputError), ledger.request_limit(name, parent="serve", limit_nanousd=limit):  # type: ignore[arg-type]
            raise AssertionError("it was opened")
    with ledger.request_limit("request", parent="nothing", limit_nanousd=1000):
        with pytest.raises(UnknownName, match="nothing"):
            ledger.reserve("request", "a", CALL, PRICES)
        with (
            pytest.raises(BudgetError, match="has a limit already"),
            ledger.request_limit("request", parent="serve", limit_nanousd=5),
        ):
            raise AssertionError("it was opened")
