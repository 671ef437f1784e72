"""The records of a ledger (Budget, Hold, Entry), their validation, and what usage costs at prices.

Frozen data without behaviour. Leaves out their JSON text (`serialization`), storage (`store`, `schema`) and
the rules for changes (`rules`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from decimal import Decimal
from typing import Any, Literal, get_args

from viaticum.budgets.serialization import json_text
from viaticum.budgets.windows import Window
from viaticum.checks import checked_type, shown
from viaticum.errors import InputError, UnknownPrice
from viaticum.money import MAX_NANOUSD, Price, as_usd
from viaticum.types import TokenCount

BudgetState = Literal["open", "paused", "closed"]
HoldState = Literal["reserved", "dispatched", "posted", "void", "expired", "unknown"]
EntryKind = Literal[
    "limit",
    "pause",
    "resume",
    "close",
    "clock",
    "reserve",
    "dispatch",
    "result",
    "post",
    "void",
    "expire",
    "unknown",
]
# Holds in these states count against the limits.
HELD_STATES: tuple[HoldState, ...] = ("reserved", "dispatched", "unknown")
MAX_LEASE = 366 * 86_400
_COUNTS = [each.name for each in fields(TokenCount)]
TERMINAL_KINDS: tuple[EntryKind, ...] = ("post", "void", "expire")


@dataclass(frozen=True, slots=True)
class Budget:
    """The limits of one scope and its current totals. A limit of None means no bound in that unit.

    Only an overrun (a call that used more than its hold) takes `left_*` below zero.

    Attributes:
        parent: name of the scope above, whose limits apply as well; None for a root.
        window: time window of the limits. With one, `posted_*` is the spending in the current window and
            `earlier_*` the spending before it; without one, `posted_*` is all spending.
        only: labels, one of which a model of its calls has to have; those of scopes above apply as well.
    """

    name: str
    limit_nanousd: int | None
    limit_tokens: int | None
    posted_nanousd: int = 0
    held_nanousd: int = 0
    posted_tokens: int = 0
    held_tokens: int = 0
    parent: str | None = None
    window: Window | None = None
    state: BudgetState = "open"
    earlier_nanousd: int = 0
    earlier_tokens: int = 0
    only: tuple[str, ...] = ()

    @property
    def left_nanousd(self) -> int | None:
        """Nano-dollars neither spent nor held; None without a dollar limit."""
        if self.limit_nanousd is None:
            return None
        return self.limit_nanousd - self.posted_nanousd - self.held_nanousd

    @property
    def left_usd(self) -> Decimal | None:
        """Dollars neither spent nor held, exactly; None without a dollar limit."""
        return None if self.left_nanousd is None else as_usd(self.left_nanousd)

    @property
    def posted_usd(self) -> Decimal:
        """Dollars spent, exactly."""
        return as_usd(self.posted_nanousd)

    @property
    def left_tokens(self) -> int | None:
        """Tokens neither spent nor held; None without a token limit."""
        if self.limit_tokens is None:
            return None
        return self.limit_tokens - self.posted_tokens - self.held_tokens


@dataclass(frozen=True, slots=True)
class Hold:
    """The reserved worst case of one call, identified by the idempotency key of that call.

    States: reserved -> dispatched -> posted | void | expired | unknown. An unknown hold (sent, outcome never
    reported) stays charged until it is posted or voided. The held amounts, usage and prices never change.

    Attributes:
        usage: reserved tokens per model.
        prices: price per model at the time of `reserve`.
        parameters: SHA-256 of the caller's parameters, "" without any.
        tags: labels of the call.
        lease: seconds that the hold may stay in its current state.
        until: end of the lease, UTC in ISO 8601.
        result: JSON text stored with the call, so that an interrupted caller need not pay twice.
    """

    key: str
    budget: str
    state: HoldState
    held_nanousd: int
    held_tokens: int
    usage: Mapping[str, TokenCount]
    prices: Mapping[str, Price]
    created: str
    result: str | None = None
    parameters: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    lease: int = 0
    until: str = ""

    def with_state(self, state: HoldState, until: str) -> Hold:
        """Copy with another state and lease end; takes a third of the time of `dataclasses.replace`."""
        return Hold(
            self.key,
            self.budget,
            state,
            self.held_nanousd,
            self.held_tokens,
            self.usage,
            self.prices,
            self.created,
            self.result,
            self.parameters,
            self.tags,
            self.lease,
            until,
        )

    def with_result(self, result: str | None) -> Hold:
        return Hold(
            self.key,
            self.budget,
            self.state,
            self.held_nanousd,
            self.held_tokens,
            self.usage,
            self.prices,
            self.created,
            result,
            self.parameters,
            self.tags,
            self.lease,
            self.until,
        )

    def with_times(self, created: str, until: str) -> Hold:
        """Copy with its creation time and lease end."""
        return Hold(
            self.key,
            self.budget,
            self.state,
            self.held_nanousd,
            self.held_tokens,
            self.usage,
            self.prices,
            created,
            self.result,
            self.parameters,
            self.tags,
            self.lease,
            until,
        )


@dataclass(frozen=True, slots=True)
class Entry:
    """One immutable line of the ledger.

    Attributes:
        id: row id, assigned by the store.
        key: key of the hold; None for entries about the scope itself.
        nanousd, tokens: by kind, `reserve` the amount held, `post` the amount spent, `void` and `expire` the
            amount released, `unknown` the amount that stays charged, `limit` the limits from then on (0 for
            none); else 0.
        overrun: nano-dollars posted above the amount held.
        at: UTC in ISO 8601.
        usage, prices: what the amounts were computed from.
        note: further details: costs by model, tags, hashes of parameters and result, window, parent, reason,
            for `clock` the time `was` that the chain had reached.
        root, number, hash: position in the hash chain of the root scope.
    """

    id: int
    budget: str
    key: str | None
    kind: EntryKind
    nanousd: int
    tokens: int
    overrun: int
    at: str
    usage: Mapping[str, TokenCount] = field(default_factory=dict)
    prices: Mapping[str, Price] = field(default_factory=dict)
    note: Mapping[str, Any] = field(default_factory=dict)
    root: str = ""
    number: int = 0
    hash: str = ""

    @property
    def cost_usd(self) -> Decimal:
        """The amount in dollars, exactly."""
        return as_usd(self.nanousd)

    def with_id(self, id: int) -> Entry:
        return Entry(
            id,
            self.budget,
            self.key,
            self.kind,
            self.nanousd,
            self.tokens,
            self.overrun,
            self.at,
            self.usage,
            self.prices,
            self.note,
            self.root,
            self.number,
            self.hash,
        )


def checked_name(kind: str, name: str) -> str:
    """Return the name; raises `InputError` if it is blank or not printable."""
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise InputError(f"not a {kind}: {shown(name)}; use printable characters, at least one")
    return name


def checked_limit(unit: str, limit: int | None) -> int | None:
    """Return the limit; raises `InputError` if it is not a positive 64-bit integer."""
    if limit is None:
        return None
    if not _is_count(limit) or limit == 0:
        hint = "; viaticum.money.nanousd() reads dollars" if unit == "nanousd" else ""
        raise InputError(f"not a limit in {unit}: {shown(limit)}; give an integer above zero{hint}")
    return limit


def checked_usage(usage: Mapping[str, TokenCount]) -> dict[str, TokenCount]:
    """Return a copy sorted by model name.

    Raises:
        InputError: no model is named (missing usage is not zero usage), or a count is negative or not an
            integer.
    """
    if not usage:
        raise InputError("no usage: name at least one model, with its token counts")
    for model, count in checked_type("usage", usage, Mapping, "a dict of token counts by model").items():
        checked_name("model name", model)
        checked_type(f"the usage of {model!r}", count, TokenCount, "a TokenCount")
        if not all(_is_count(getattr(count, name)) for name in _COUNTS):
            raise InputError(f"not a token count for {model!r}: {count}; give integers from zero up")
        cached = count.cached_input_tokens + count.cache_write_tokens
        if cached > count.input_tokens or count.reasoning_tokens > count.output_tokens:
            raise InputError(
                f"not a token count for {model!r}: {count}; cached tokens, read and written, are among the "
                "input tokens, "
                "reasoning tokens among the output tokens"
            )
    return {model: usage[model] for model in sorted(usage)}


def checked_result(result: str | None) -> str | None:
    """Return the text; raises `InputError` if it is not JSON."""
    if result is None:
        return None
    try:
        json.loads(result)
        result.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"a result is kept as JSON text: {error}; pass json.dumps(...)") from None
    return result


def checked_window(window: Window | None) -> Window | None:
    """Return the window; raises `InputError` if it is none."""
    return None if window is None else checked_type("window", window, Window, "a Window")


def checked_state(state: HoldState | None) -> HoldState | None:
    """Return the state; raises `InputError` if it is none of a hold."""
    if state is not None and state not in get_args(HoldState):
        raise InputError(f"unknown state {shown(state)}; known: {', '.join(get_args(HoldState))}")
    return state


def checked_lease(seconds: int) -> int:
    if not _is_count(seconds) or not 0 < seconds <= MAX_LEASE:
        raise InputError(f"not a lease: {seconds!r}; give whole seconds, from 1 to {MAX_LEASE}")
    return seconds


def checked_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Return a copy sorted by name; raises `InputError` if a name or value is not printable."""
    for name, value in checked_type("tags", tags, Mapping, "a dict of texts").items():
        checked_name("tag", name)
        checked_name(f"value of tag {name!r}", value)
    return dict(sorted(tags.items()))


PRICE_WANTED = "a Price, which Price.per_million() makes of dollars"
UNPRICED = Price(0, 0, version="unpriced")


def snapshot(
    prices: Mapping[str, Price], usage: Mapping[str, TokenCount], unpriced: tuple[str, ...] = ()
) -> dict[str, Price]:
    """Return the prices of all models in `usage`.

    Raises:
        UnknownPrice: a model has no price and is not in `unpriced`.
    """
    checked_type("prices", prices, Mapping, "a dict of prices by model")
    for model in usage:
        if model in prices:
            checked_type(f"the price of {model!r}", prices[model], Price, PRICE_WANTED)
        elif model not in unpriced:
            raise UnknownPrice(
                f"no price for model {model!r}; give one, a price of zero if it is free, "
                f"or allow it by name: unpriced=({model!r},)"
            )
    return {model: prices.get(model, UNPRICED) for model in usage}


def costs(usage: Mapping[str, TokenCount], prices: Mapping[str, Price]) -> dict[str, int]:
    """Return the cost of `usage` in nano-dollars, by model."""
    prices = snapshot(prices, usage)
    return {
        name: prices[name].cost(
            count.input_tokens,
            count.output_tokens,
            cached_input_tokens=count.cached_input_tokens,
            reasoning_tokens=count.reasoning_tokens,
            milliseconds=count.milliseconds,
            cache_write_tokens=count.cache_write_tokens,
        )
        for name, count in usage.items()
    }


def worst_costs(usage: Mapping[str, TokenCount], prices: Mapping[str, Price]) -> dict[str, int]:
    """Return the upper bound of the cost in nano-dollars, by model: any caching, reasoning and price tier."""
    prices = snapshot(prices, usage)
    return {
        name: prices[name].worst_cost(count.input_tokens, count.output_tokens, count.milliseconds)
        for name, count in usage.items()
    }


def amounts(usage: Mapping[str, TokenCount], by_model: Mapping[str, int]) -> tuple[int, int]:
    """Return nano-dollars and tokens summed over the models; raises `InputError` if they exceed 64 bits."""
    nanousd, tokens = sum(by_model.values()), sum(count.total for count in usage.values())
    if max(nanousd, tokens) > MAX_NANOUSD:
        raise InputError(f"usage out of range: {nanousd} nano-dollars, {tokens} tokens do not fit 64 bits")
    return nanousd, tokens


def elementwise_max(one: Mapping[str, TokenCount], other: Mapping[str, TokenCount]) -> dict[str, TokenCount]:
    """Return the maximum of each token count, model by model."""
    both = {}
    for model in sorted({*one, *other}):
        pair = asdict(one.get(model, TokenCount())), asdict(other.get(model, TokenCount()))
        both[model] = TokenCount(**{name: max(pair[0][name], pair[1][name]) for name in pair[0]})
    return both


def digest(value: Any) -> str:
    """SHA-256 of a value as JSON with sorted keys; raises `InputError` if it is not JSON-serialisable."""
    try:
        return hashlib.sha256(json_text(value).encode()).hexdigest()
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"parameters are JSON values: {error}") from None


def _is_count(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number <= MAX_NANOUSD
