"""Whether a line that a budget refused would fit once running calls have settled, of whoever they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from viaticum.budgets import Ledger
from viaticum.budgets.records import Budget
from viaticum.errors import BudgetExceeded

LIVE: tuple[Literal["reserved", "dispatched"], ...] = ("reserved", "dispatched")


def may_fit(ledger: Ledger, scope: str, refusal: BudgetExceeded) -> bool:
    """Whether a call fits the scope and those above it without what calls that have not ended hold there.

    Args:
        scope: the budget that pays.
        refusal: of the call; one by a budget of the request's own stays.
    """
    lineage, budgets = ledger.lineage(scope), ledger.budgets()
    if refusal.budget not in {each.name for each in lineage}:
        return False
    return all(refusal.needed <= _most_left(ledger, each, budgets, refusal.unit) for each in lineage)


def _most_left(ledger: Ledger, budget: Budget, budgets: Sequence[Budget], unit: str) -> float:
    """What is left of a budget with live holds given back; infinite where it has no limit."""
    left = budget.left_nanousd if unit == "nanousd" else budget.left_tokens
    if left is None:
        return float("inf")
    live = [
        hold
        for each in _within(budget.name, budgets)
        if each.held_nanousd or each.held_tokens
        for state in LIVE
        for hold in ledger.holds(each.name, state)
    ]
    return left + sum(hold.held_nanousd if unit == "nanousd" else hold.held_tokens for hold in live)


def _within(name: str, budgets: Sequence[Budget]) -> Iterator[Budget]:
    """A budget and all below it."""
    names = {name}
    while found := {each.name for each in budgets if each.parent in names} - names:
        names |= found
    return (each for each in budgets if each.name in names)
