"""What is expected before a call, and the policies for when money runs short."""

from __future__ import annotations

from pathlib import Path

import pytest
from ledger_calls import CALL, PRICES

from viaticum.budgets import Budget, Forecast, Ledger, Option, forecast, plan
from viaticum.errors import BudgetExceeded, DecisionNeeded, InputError
from viaticum.types import TokenCount

LARGE, MIDDLE, SMALL = (
    Option("large", 0.7, 50, 100, 40),
    Option("middle", 0.6, 30, 60),
    Option("small", 0.4, 5, 9),
)
OPTIONS = [SMALL, LARGE, MIDDLE]


def scopes(*left: int, tokens: int | None = None) -> list[Budget]:
    """A lineage, the root first, with so much left in each."""
    return [Budget(f"level {n}", amount, tokens) for n, amount in enumerate(left)]


def test_the_option_worth_most_is_taken_while_it_fits() -> None:
    found = plan(scopes(1000, 100), OPTIONS)
    assert (found.option, found.is_cheaper) == (LARGE, False)
    assert "$0.00000005 expected" in found.why


def test_cheaper_takes_the_best_that_still_fits_every_scope() -> None:
    found = plan(scopes(99, 500), OPTIONS)
    assert (found.option, found.is_cheaper) == (MIDDLE, True)
    assert "'level 0' has $0.000000099 left" in found.why
    assert plan(scopes(99, 59), OPTIONS).option == SMALL
    assert plan(scopes(1000, tokens=39), OPTIONS).option == MIDDLE  # tokens run short as well
    with pytest.raises(BudgetExceeded, match="large may cost"):
        plan(scopes(8), OPTIONS)


def test_ask_pauses_for_a_decision_and_says_what_there_is() -> None:
    assert plan(scopes(100), OPTIONS, "ask").option == LARGE
    with pytest.raises(DecisionNeeded, match="go on with middle, small, raise the limit, or stop") as asked:
        plan(scopes(99), OPTIONS, "ask")
    assert (asked.value.options, asked.value.needed, asked.value.left) == (("middle", "small"), 100, 99)
    with pytest.raises(DecisionNeeded, match="decide: raise the limit") as asked:
        plan(scopes(1), OPTIONS, "ask")
    assert asked.value.options == ()


def test_stop_stops() -> None:
    with pytest.raises(BudgetExceeded) as stopped:
        plan(scopes(99), OPTIONS, "stop")
    assert not isinstance(stopped.value, DecisionNeeded)


def test_without_limits_nothing_is_short() -> None:
    assert plan([Budget("org", None, None)], OPTIONS, "stop").option == LARGE
    for wrong in (lambda: plan([], [], "stop"), lambda: plan([], OPTIONS, "sotp")):  # type: ignore[arg-type]
        with pytest.raises(InputError):
            wrong()


def test_a_forecast_is_learnt_from_the_calls_below(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.db") as ledger:
        ledger.create("org", limit_nanousd=1000)
        ledger.create("run", parent="org", limit_tokens=400)
        with pytest.raises(InputError, match="no settled call"):
            forecast(ledger, "org")
        for made in range(1, 11):  # 10 + 3, 10 + 6 ... 10 + 30 nano-dollars; 11 ... 20 tokens
            strategy = "cot" if made <= 9 else "pot"
            ledger.reserve("run", f"{made}", CALL, PRICES, tags={"strategy": strategy})
            ledger.settle(f"{made}", {"small": TokenCount(10, made)})
        # 265 nano-dollars and 155 tokens are spent: 735 and 245 are left.
        assert forecast(ledger, "run") == Forecast(10, 25, 37, 15, 19, 245 // 15, 245 // 19)
        assert forecast(ledger, "org") == Forecast(10, 25, 37, 15, 19, 735 // 25, 735 // 37)
        assert forecast(ledger, "run", {"strategy": "pot"}).cost_p50 == 40
        assert forecast(ledger, "run", last=1).past_calls == 1
        with pytest.raises(InputError, match="with strategy=cod"):
            forecast(ledger, "run", {"strategy": "cod"})
