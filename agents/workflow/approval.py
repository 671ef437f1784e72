"""When what the policy wants does not fit: what is asked of a person, and what they may decide.

The question is plain JSON, made once and kept in the checkpoint, so that a decision means the same however often the
run is taken up again. A raise is an absolute new limit, counted from the limit at the time of asking: a decision that is
carried out twice, because a kill came between, raises once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from viaticum.budgets import Budget, Ledger
from viaticum.errors import BudgetExceeded, DecisionNeeded, InputError
from viaticum.money import nanousd
from viaticum.routers.query import PlanRow, Policy, choose_plan

Do = Literal["raise", "cheaper", "stop"]
FIELDS = {"do", "by", "by_nanousd", "by_tokens"}


@dataclass(frozen=True, slots=True)
class Decision:
    """by: how much more, in the unit that is short (nano-dollars or tokens); 0 unless `do` is "raise"."""

    do: Do
    by: int = 0


def left_of(lineage: Sequence[Budget]) -> int | None:
    """Nano-dollars left in all these scopes; None where none limits dollars."""
    return min((each.left_nanousd for each in lineage if each.left_nanousd is not None), default=None)


def tightest(lineage: Sequence[Budget]) -> str:
    """The scope with the fewest dollars left, of equals the one nearest to the call."""
    limited = [each for each in reversed(lineage) if each.left_nanousd is not None]
    return min(limited, key=lambda each: each.left_nanousd or 0).name if limited else lineage[-1].name


def shortage(
    error: BudgetExceeded,
    ledger: Ledger,
    wanted: PlanRow,
    others: Sequence[PlanRow],
    policy: Policy,
    then: str,
) -> dict[str, Any]:
    """The question to a person: what is wanted, its forecast, what is left, and the options.

    others: ways that were not tried yet. then: the node that goes on once the limit is raised.
    """
    scope = ledger.budget(error.budget)
    limit = scope.limit_tokens if error.unit == "tokens" else scope.limit_nanousd
    missing = error.needed - error.left
    options: list[dict[str, Any]] = [{"do": "raise", f"by_{error.unit}": missing}]
    left = left_of(ledger.lineage(error.budget))
    fitting = [row for row in others if row.plan != wanted.plan and (left is None or row.cost_p90 <= left)]
    if fitting:
        row = choose_plan(fitting, left, policy).row
        options.append({"do": "cheaper", **_forecast(row)})
    options.append({"do": "stop"})
    return {
        "why": str(error),
        "budget": scope.name,
        "unit": error.unit,
        "limit": limit,
        "needed": error.needed,
        "left": error.left,
        "wanted": _forecast(wanted),
        "options": options,
        "then": then,
    }


def _forecast(row: PlanRow) -> dict[str, Any]:
    return {
        "way": str(row.plan),
        "accuracy": row.accuracy,
        "cost_p50": row.cost_p50,
        "cost_p90": row.cost_p90,
    }


def decided(decision: object, short: Mapping[str, Any]) -> Decision:
    """What a person said: "raise" (by what is missing), "cheaper", "stop", or a dict {"do": ...}.

    A raise may say by how much: {"do": "raise", "by": "0.05"} in dollars, or `by_nanousd`, or `by_tokens`. Raises
    `InputError` for anything else, or an option that was not given.
    """
    said = {"do": decision} if isinstance(decision, str) else decision
    if not isinstance(said, Mapping) or said.get("do") not in get_args(Do) or not set(said) <= FIELDS:
        raise InputError(f'not a decision: {decision!r}; say "raise", "cheaper" or "stop"')
    offered = {option["do"] for option in short["options"]}
    if said["do"] not in offered:
        raise InputError(f"nothing {said['do']} fits; decide: {' or '.join(sorted(offered))}")
    return Decision(said["do"], _amount(said, short) if said["do"] == "raise" else 0)


def _amount(said: Mapping[str, Any], short: Mapping[str, Any]) -> int:
    given = [name for name in ("by", "by_nanousd", "by_tokens") if name in said]
    if not given:
        return int(short["needed"] - short["left"])
    unit = "tokens" if given[0] == "by_tokens" else "nanousd"
    if len(given) > 1 or unit != short["unit"]:
        raise InputError(f"{short['unit']} are short; say one of by (dollars), by_nanousd or by_tokens")
    amount = said[given[0]]
    by = nanousd(amount) if given[0] == "by" else amount
    if not isinstance(by, int) or isinstance(by, bool) or by <= 0:
        raise InputError(f"a limit is raised by an amount above zero, got {amount!r}")
    return by


def raise_limit(ledger: Ledger, decision: Decision, short: Mapping[str, Any]) -> None:
    """The limit at the time of asking and so much more, unless it is above that by now."""
    scope, wanted = ledger.budget(short["budget"]), short["limit"] + decision.by
    if short["unit"] == "tokens":
        ledger.set_limit(scope.name, limit_tokens=max(scope.limit_tokens or 0, wanted))
    else:
        ledger.set_limit(scope.name, limit_nanousd=max(scope.limit_nanousd or 0, wanted))


def decision_needed(short: Mapping[str, Any], thread_id: str = "") -> DecisionNeeded:
    """The question as an error, for callers that are no graph."""
    return DecisionNeeded(
        f"{short['why']}; decide: {' or '.join(option['do'] for option in short['options'])}",
        budget=short["budget"],
        needed=short["needed"],
        left=short["left"],
        unit=short["unit"],
        options=[option["do"] for option in short["options"]],
        thread_id=thread_id,
        question=short,
    )
