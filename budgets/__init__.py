"""Budgets whose limits hold: a ledger that reserves the worst case before a call and posts the cost after it.

Knows no model catalogue and no prompts.
"""

from viaticum.budgets.ledger import Ledger
from viaticum.budgets.ledger_reader import default_path
from viaticum.budgets.planner import Forecast, Option, PlanDecision, forecast, plan
from viaticum.budgets.records import Budget, Entry, EntryKind, Hold, HoldState
from viaticum.budgets.windows import Window
from viaticum.budgets.write_buffer import Claim, Settlement

__all__ = [
    "Budget",
    "Claim",
    "Entry",
    "EntryKind",
    "Forecast",
    "Hold",
    "HoldState",
    "Ledger",
    "Option",
    "PlanDecision",
    "Settlement",
    "Window",
    "default_path",
    "forecast",
    "plan",
]
