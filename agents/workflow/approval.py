"""Approval by a person when the preferred plan does not fit in the budget: the request and the decision.

The request is plain JSON, made once and stored in the checkpoint, so that a decision means the same however
often the run is resumed. A raise sets an absolute limit, computed from the limit at the time of the request:
a decision that is carried out twice, because of a kill in between, raises the limit once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from langgraph.errors import GraphInterrupt
from langgraph.types import interrupt

from viaticum.budgets import Budget, Ledger
from viaticum.errors import BudgetExceeded, DecisionNeeded, InputError
from viaticum.money import nanousd
from viaticum.routers.query import PlanRow, Policy, choose_plan

Do = Literal["raise", "cheaper", "finish", "stop"]
FIELDS = {"do", "by", "by_nanousd", "by_tokens", "by_seconds"}


@dataclass(frozen=True, slots=True)
class Decision:
    """A person's decision.

    by: the increase of the limit in the unit that is short: nano-dollars, tokens or seconds. 0 unless `do` is
    "raise".
    """

    do: Do
    by: float = 0


def nanousd_left(lineage: Sequence[Budget]) -> int | None:
    """Nano-dollars that every scope of the lineage has left; None if none limits dollars."""
    return min((each.left_nanousd for each in lineage if each.left_nanousd is not None), default=None)


def tightest_scope(lineage: Sequence[Budget]) -> str:
    """The name of the scope with the fewest dollars left; of equal ones, the one nearest to the call."""
    limited = [each for each in reversed(lineage) if each.left_nanousd is not None]
    return min(limited, key=lambda each: each.left_nanousd or 0).name if limited else lineage[-1].name


def approval_request(
    error: BudgetExceeded,
    ledger: Ledger,
    preferred: PlanRow,
    others: Sequence[PlanRow],
    policy: Policy,
    then: str,
) -> dict[str, Any]:
    """The request to a person: the preferred plan, its forecast, what is left, and the options.

    Args:
        error: the plan did not fit because of it; names the scope, the unit, what is needed and what is left.
        preferred: the plan that the policy prefers.
        others: plans not tried yet.
        then: the node that continues once the limit is raised.
    """
    scope = ledger.budget(error.budget)
    limit = scope.limit_tokens if error.unit == "tokens" else scope.limit_nanousd
    missing = error.needed - error.left
    options: list[dict[str, Any]] = [{"do": "raise", f"by_{error.unit}": missing}]
    left = nanousd_left(ledger.lineage(error.budget))
    fitting = [row for row in others if row.plan != preferred.plan and (left is None or row.cost_p90 <= left)]
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
        "wanted": _forecast(preferred),
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


def ask_person(request: Mapping[str, Any]) -> Decision:
    """Interrupt the graph until a person decides. An invalid decision is asked again."""
    return _decision(request, interrupt(request))


def given_decision(request: Mapping[str, Any]) -> Decision | None:
    """The decision of a person who was asked in this step before it ran again; None where nobody was.

    For a step whose reason to ask is gone when it runs again, so that it would not ask any more. An invalid
    decision is asked again.
    """
    try:
        answer = interrupt(request)
    except GraphInterrupt:  # there is no answer
        return None
    return _decision(request, answer)


def _decision(request: Mapping[str, Any], answer: object) -> Decision:
    while True:
        try:
            return parse_decision(answer, request)
        except InputError as error:
            answer = interrupt({**request, "problem": str(error)})


def parse_decision(decision: object, request: Mapping[str, Any]) -> Decision:
    """Parse "raise" (by what is missing), "cheaper", "stop", or a dict {"do": ...}.

    A raise may name its amount: {"do": "raise", "by": "0.05"} in dollars, or `by_nanousd`, or `by_tokens`, or
    `by_seconds` of a run whose time is over.

    Raises:
        InputError: this is no decision, or an option that the request does not offer.
    """
    given = {"do": decision} if isinstance(decision, str) else decision
    if not isinstance(given, Mapping) or given.get("do") not in get_args(Do) or not set(given) <= FIELDS:
        raise InputError(f'not a decision: {decision!r}; say "raise", "cheaper" or "stop"')
    offered = {option["do"] for option in request["options"]}
    if given["do"] not in offered:
        raise InputError(f"nothing {given['do']} fits; decide: {' or '.join(sorted(offered))}")
    return Decision(given["do"], _amount(given, request) if given["do"] == "raise" else 0)


def _amount(decision: Mapping[str, Any], request: Mapping[str, Any]) -> float:
    names = [name for name in ("by", "by_nanousd", "by_tokens", "by_seconds") if name in decision]
    if not names:
        return cast("float", request["needed"] - request["left"])
    unit = names[0].partition("_")[2] or "nanousd"
    if len(names) > 1 or unit != request["unit"]:
        raise InputError(
            f"{request['unit']} are short; say one of by (dollars), by_nanousd, by_tokens or by_seconds"
        )
    amount = decision[names[0]]
    by = nanousd(amount) if names[0] == "by" else amount
    kinds = (int, float) if unit == "seconds" else (int,)
    if not isinstance(by, kinds) or isinstance(by, bool) or not 0 < by < math.inf:
        raise InputError(f"a limit is raised by an amount above zero, got {amount!r}")
    return by


def raise_limit(ledger: Ledger, decision: Decision, request: Mapping[str, Any]) -> None:
    """Set the limit at the time of the request plus the increase, unless it is higher already."""
    scope, limit = ledger.budget(request["budget"]), request["limit"] + int(decision.by)
    if request["unit"] == "tokens":
        ledger.set_limit(scope.name, limit_tokens=max(scope.limit_tokens or 0, limit))
    else:
        ledger.set_limit(scope.name, limit_nanousd=max(scope.limit_nanousd or 0, limit))


def decision_needed(request: Mapping[str, Any], thread_id: str = "") -> DecisionNeeded:
    """The request as an error, for callers outside a graph."""
    return DecisionNeeded(
        f"{request['why']}; decide: {' or '.join(option['do'] for option in request['options'])}",
        budget=request["budget"],
        needed=request["needed"],
        left=request["left"],
        unit=request["unit"],
        options=[option["do"] for option in request["options"]],
        thread_id=thread_id,
        question=request,
    )
