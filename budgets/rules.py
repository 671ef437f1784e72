"""The rules: each function allows a step, or raises (or returns) the error that explains the refusal.

Reads rows and writes none. Leaves out performing the step: see `postings`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

from viaticum.budgets.records import Budget, Entry, Hold, checked_limit, checked_name
from viaticum.budgets.serialization import prices_text, usage_text
from viaticum.budgets.store import Rows, Scope
from viaticum.errors import BudgetClosed, BudgetError, BudgetExceeded, HoldError, InputError, UnknownName
from viaticum.money import MAX_NANOUSD, Price, format_usd
from viaticum.types import TokenCount


def get_lineage(rows: Rows, name: str) -> list[Scope]:
    """The scope and its ancestors, root first; raises `UnknownName` with the nearest name."""
    found = rows.lineage(checked_name("budget name", name))
    if not found:
        raise UnknownName("budget", name, [scope.name for scope in rows.scopes()])
    return found


def get_hold(rows: Rows, key: str) -> Hold:
    found = rows.hold(checked_name("hold key", key))
    if found is None:
        raise HoldError(f"no hold with key {key!r}; reserve it first")
    return found


def budget_at(rows: Rows, scope: Scope, moment: datetime) -> Budget:
    """The scope as a caller sees it at a time: with a window, the spending in that window."""
    posted = (scope.posted_nanousd, scope.posted_tokens)
    if scope.window is not None:
        posted = rows.posted_since(scope.name, scope.window.since(moment))
    return Budget(
        scope.name,
        scope.limit_nanousd,
        scope.limit_tokens,
        posted[0],
        scope.held_nanousd,
        posted[1],
        scope.held_tokens,
        scope.parent,
        scope.window,
        scope.state,
        scope.posted_nanousd - posted[0],
        scope.posted_tokens - posted[1],
        scope.only,
    )


def checked_limits(
    nanousd: int | None, tokens: int | None, *, needed: bool = True
) -> tuple[int | None, int | None]:
    if needed and nanousd is None and tokens is None:
        raise InputError("no limit given; give limit_nanousd, limit_tokens or both")
    return checked_limit("nanousd", nanousd), checked_limit("tokens", tokens)


def require_same_terms(found: Budget, wanted: Budget) -> Budget:
    """Return the existing budget if it has the wanted terms; raises `BudgetError` otherwise."""
    if (found.limit_nanousd, found.limit_tokens) != (wanted.limit_nanousd, wanted.limit_tokens):
        raise BudgetError(
            f"budget {found.name!r} exists with a limit of {_limits(found)}, not {_limits(wanted)}; "
            "change it with set_limit() or take another name"
        )
    if found.parent != wanted.parent:
        raise BudgetError(
            f"budget {found.name!r} exists with the parent {found.parent!r}, not {wanted.parent!r}; "
            "a scope keeps its place: take another name"
        )
    if found.only != wanted.only:
        raise BudgetError(
            f"budget {found.name!r} exists for models labelled {' or '.join(found.only) or 'anyhow'}, not "
            f"{' or '.join(wanted.only) or 'anyhow'}; where its data may go stays as it is: take another name"
        )
    if found.window != wanted.window:
        raise BudgetError(
            f"budget {found.name!r} exists with the window {found.window or 'none'}, not "
            f"{wanted.window or 'none'}; "
            "change it with set_limit() or take another name"
        )
    return found


def refuse_limit_below_use(old: Budget, new: Budget) -> None:
    """Check only limits that change: an overrun in dollars must not block a new limit in tokens."""
    other_window = old.window != new.window
    short_of_dollars = (other_window or new.limit_nanousd != old.limit_nanousd) and (
        new.left_nanousd or 0
    ) < 0
    short_of_tokens = (other_window or new.limit_tokens != old.limit_tokens) and (new.left_tokens or 0) < 0
    if short_of_dollars or short_of_tokens:
        raise BudgetError(
            f"budget {old.name!r} has {format_usd(new.posted_nanousd + new.held_nanousd)} and "
            f"{new.posted_tokens + new.held_tokens} tokens spent or held, above the new limit of "
            f"{_limits(new)}; "
            "give a limit at or above that"
        )


def refuse_closed(lineage: Sequence[Scope]) -> None:
    for scope in lineage:
        if scope.state != "open":
            what_to_do = "resume it" if scope.state == "paused" else "take another budget"
            raise BudgetClosed(f"budget {scope.name!r} is {scope.state}; {what_to_do} to make calls")


def shortfall(
    rows: Rows, lineage: Sequence[Scope], moment: datetime, needed: tuple[int, int]
) -> BudgetExceeded | None:
    """Why a call does not fit, from the scope nearest to it that is short; None if it fits all scopes."""
    for scope in reversed(lineage):
        nanousd, tokens = _amounts_left(rows, scope, moment)
        if needed[0] > nanousd:
            short = f"{format_usd(nanousd)} left{_per(scope)}, the call may cost {format_usd(needed[0])}"
            return _exceeded(short, scope, needed[0], nanousd, "nanousd")
        if needed[1] > tokens:
            short = f"{tokens} tokens left{_per(scope)}, the call may use {needed[1]}"
            return _exceeded(short, scope, needed[1], tokens, "tokens")
    return None


def _amounts_left(rows: Rows, scope: Scope, moment: datetime) -> tuple[int, int]:
    """Amounts left in both units. All-time spending is bounded by 64 bits, with or without limits."""
    posted = (scope.posted_nanousd, scope.posted_tokens)
    nanousd = MAX_NANOUSD - posted[0] - scope.held_nanousd
    tokens = MAX_NANOUSD - posted[1] - scope.held_tokens
    if scope.window is not None:
        posted = rows.posted_since(scope.name, scope.window.since(moment))
    if scope.limit_nanousd is not None:
        nanousd = min(nanousd, scope.limit_nanousd - posted[0] - scope.held_nanousd)
    if scope.limit_tokens is not None:
        tokens = min(tokens, scope.limit_tokens - posted[1] - scope.held_tokens)
    return nanousd, tokens


def require_same_call(found: Hold, wanted: Hold) -> Hold:
    """Return the existing hold if it was reserved for the same call; raises `HoldError` otherwise."""
    for what, held, asked in (
        ("budget", found.budget, wanted.budget),
        ("usage", usage_text(found.usage), usage_text(wanted.usage)),
        ("prices", prices_text(found.prices), prices_text(wanted.prices)),
        ("parameters of hash", found.parameters[:12] or "none", wanted.parameters[:12] or "none"),
    ):
        if held != asked:
            raise HoldError(
                f"the key {found.key!r} holds {what} {held}, not {asked}; use a new key for a new call"
            )
    return found


def require_same_usage(entry: Entry | None, key: str, usage: Mapping[str, TokenCount]) -> Entry:
    """Return the entry that posted a call if it has this usage; raises `HoldError` otherwise."""
    if entry is None:
        raise HoldError(f"the hold {key!r} has ended without an entry: the ledger was altered; run check()")
    if entry.usage != usage:
        raise HoldError(
            f"the hold {key!r} is posted with usage {usage_text(entry.usage)}, not {usage_text(usage)}; "
            "a call is settled once"
        )
    return entry


def refuse_ended(hold: Hold, doing: str) -> None:
    if hold.state == "void":
        raise HoldError(f"the hold {hold.key!r} is void and cannot be {doing}; reserve under a new key")
    if hold.state == "expired":
        raise HoldError(
            f"the hold {hold.key!r} expired before it was dispatched and cannot be {doing}; reserve under a "
            f"new key"
        )


def refuse_other_result(hold: Hold, result: str) -> None:
    if hold.result is not None and hold.result != result:
        raise HoldError(f"the hold {hold.key!r} already keeps another result; read it with hold()")


def _exceeded(short: str, scope: Scope, needed: int, left: int, unit: str) -> BudgetExceeded:
    return BudgetExceeded(
        f"budget {scope.name!r} has {short}", budget=scope.name, needed=needed, left=left, unit=unit
    )


def explained(error: BudgetExceeded, wanted: Hold, hint: str) -> BudgetExceeded:
    """The refusal with the parts of the worst case, so that one sees which of them is too large.

    hint: of the caller, on how it counted the tokens; "" for none.
    """
    parts = "; ".join(_part(model, count, wanted.prices[model]) for model, count in wanted.usage.items())
    advice = "raise the limit, allow fewer new tokens (max_tokens) or choose a cheaper model"
    message = f"{error}: {parts}; {hint}{'; ' if hint else ''}{advice}"
    return BudgetExceeded(message, budget=error.budget, needed=error.needed, left=error.left, unit=error.unit)


def _part(model: str, count: TokenCount, price: Price) -> str:
    read, written = price.worst_cost(count.input_tokens, 0), price.worst_cost(0, count.output_tokens)
    return (
        f"{model} {format_usd(read)} for a prompt of up to {count.input_tokens} tokens, "
        f"{format_usd(written)} for up to {count.output_tokens} new ones"
    )


def _per(scope: Scope) -> str:
    return f" (per {scope.window})" if scope.window else ""


def _limits(budget: Budget) -> str:
    dollars = None if budget.limit_nanousd is None else format_usd(budget.limit_nanousd)
    tokens = None if budget.limit_tokens is None else f"{budget.limit_tokens} tokens"
    return " and ".join(limit for limit in (dollars, tokens) if limit) or "none of its own"
