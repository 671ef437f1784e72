"""Decide before a call: forecast its cost, check what still fits, and what to do if the budget is short.

A forecast has two numbers: p50, the median of such calls, and p90, their 90th percentile. Policies: `cheaper`
takes the best option that still fits, `ask` raises `DecisionNeeded` with those that do, `stop` raises
`BudgetExceeded`. Knows no models and no prompts: an option is a name, its worth and its costs.

Leaves out reserving: `Ledger.reserve` holds the worst case and has the last word.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from viaticum.budgets.ledger import Ledger
from viaticum.budgets.records import Budget
from viaticum.errors import BudgetExceeded, DecisionNeeded, InputError
from viaticum.money import format_usd

WhenShort = Literal["cheaper", "ask", "stop"]


@dataclass(frozen=True, slots=True)
class Option:
    """One way to make a call. `worth` ranks options, highest first; costs in nano-dollars, tokens at p90."""

    name: str
    worth: float
    cost_p50: int
    cost_p90: int
    tokens_p90: int = 0


@dataclass(frozen=True, slots=True)
class PlanDecision:
    """The option to take, whether it differs from the wanted one, and the reason in words."""

    option: Option
    is_cheaper: bool
    why: str


@dataclass(frozen=True, slots=True)
class Forecast:
    """Cost of past calls, and how many more of them are possible; nano-dollars and tokens per call.

    calls_p50, calls_p90: further calls that fit all limits at that cost; None without limits.
    """

    past_calls: int
    cost_p50: int
    cost_p90: int
    tokens_p50: int
    tokens_p90: int
    calls_p50: int | None
    calls_p90: int | None


def plan(
    lineage: Sequence[Budget], options: Iterable[Option], when_short: WhenShort = "cheaper"
) -> PlanDecision:
    """Choose the option with the most worth, or apply the policy if its p90 does not fit every scope.

    Raises:
        BudgetExceeded: nothing fits, or the policy is `stop`.
        DecisionNeeded: the policy is `ask`.
    """
    if when_short not in get_args(WhenShort):
        raise InputError(f"unknown policy {when_short!r} for when money runs short; use cheaper, ask or stop")
    ranked = sorted(options, key=lambda option: (-option.worth, option.cost_p50))
    if not ranked:
        raise InputError("no option to plan with; give at least one")
    wanted = ranked[0]
    short = _shortage(lineage, wanted)
    if short is None:
        return PlanDecision(wanted, False, f"fits: {_costs(wanted)}")
    fitting = [option for option in ranked[1:] if _shortage(lineage, option) is None]
    if when_short == "cheaper" and fitting:
        return PlanDecision(fitting[0], True, f"{short}; {fitting[0].name} fits: {_costs(fitting[0])}")
    raise _refusal(short, wanted, fitting, when_short, lineage)


def forecast(
    ledger: Ledger, budget: str, tags: Mapping[str, str] | None = None, last: int = 1000
) -> Forecast:
    """Forecast from the newest `last` calls posted to a scope or its descendants with all these tags.

    Raises:
        InputError: there are no such calls yet.
    """
    posts = ledger.posts(budget, tags=tags, last=last)
    if not posts:
        which = f" with {', '.join(f'{name}={value}' for name, value in tags.items())}" if tags else ""
        raise InputError(
            f"budget {budget!r} has no settled call{which} to learn a forecast from; make some first"
        )
    cost, tokens = _quantiles([post.nanousd for post in posts]), _quantiles([post.tokens for post in posts])
    lineage = ledger.lineage(budget)
    return Forecast(
        len(posts),
        *cost,
        *tokens,
        _calls_left(lineage, cost[0], tokens[0]),
        _calls_left(lineage, cost[1], tokens[1]),
    )


def _quantiles(values: list[int]) -> tuple[int, int]:
    """p50 and p90, each the smallest value that so many reach: no interpolation, never too low."""
    values = sorted(values)
    count = len(values)
    return values[(count * 5 + 9) // 10 - 1], values[(count * 9 + 9) // 10 - 1]


def _calls_left(lineage: Sequence[Budget], cost: int, tokens: int) -> int | None:
    bounds = []
    for budget in lineage:
        if budget.left_nanousd is not None and cost:
            bounds.append(max(0, budget.left_nanousd) // cost)
        if budget.left_tokens is not None and tokens:
            bounds.append(max(0, budget.left_tokens) // tokens)
    return min(bounds, default=None)


def _shortage(lineage: Sequence[Budget], option: Option) -> str | None:
    """Why an option does not fit, from the scope nearest to the call that is short."""
    for budget in reversed(lineage):
        if budget.left_nanousd is not None and option.cost_p90 > budget.left_nanousd:
            return (
                f"{option.name} may cost {format_usd(option.cost_p90)} and {budget.name!r} has "
                f"{format_usd(budget.left_nanousd)} left"
            )
        if budget.left_tokens is not None and option.tokens_p90 > budget.left_tokens:
            return (
                f"{option.name} may use {option.tokens_p90} tokens and {budget.name!r} has "
                f"{budget.left_tokens} left"
            )
    return None


def _refusal(
    short: str, wanted: Option, fitting: list[Option], when_short: WhenShort, lineage: Sequence[Budget]
) -> BudgetExceeded:
    left = min((budget.left_nanousd for budget in lineage if budget.left_nanousd is not None), default=0)
    budget = lineage[-1].name if lineage else ""
    if when_short == "ask":
        cheaper = f"go on with {', '.join(option.name for option in fitting)}, " if fitting else ""
        return DecisionNeeded(
            f"{short}; decide: {cheaper}raise the limit, or stop",
            budget=budget,
            needed=wanted.cost_p90,
            left=left,
            options=[option.name for option in fitting],
        )
    return BudgetExceeded(
        f"{short}; raise the limit or allow a cheaper option",
        budget=budget,
        needed=wanted.cost_p90,
        left=left,
    )


def _costs(option: Option) -> str:
    return f"{format_usd(option.cost_p50)} expected, {format_usd(option.cost_p90)} at worst of nine in ten"
