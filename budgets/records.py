"""What a ledger hands out: Budget, Hold and Entry, and how usage and prices are written as JSON text.

Plain frozen data. Leaves out where it is stored (`store`, `schema`) and what may happen to it (`ledger`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

from viaticum.errors import InputError, UnknownPrice
from viaticum.money import MAX_NANOUSD, Price
from viaticum.types import TokenCount

HoldState = Literal["reserved", "posted", "void"]
EntryKind = Literal["limit", "reserve", "post", "void"]


@dataclass(frozen=True, slots=True)
class Budget:
    """An allowance and where it stands. A limit of None sets no bound in that unit.

    What is left falls below zero only after an overrun: a call that used more than it held.
    """

    name: str
    limit_nanousd: int | None
    limit_tokens: int | None
    posted_nanousd: int = 0
    held_nanousd: int = 0
    posted_tokens: int = 0
    held_tokens: int = 0

    @property
    def left_nanousd(self) -> int | None:
        """Nano-dollars that are neither spent nor held; None where dollars are not limited."""
        if self.limit_nanousd is None:
            return None
        return self.limit_nanousd - self.posted_nanousd - self.held_nanousd

    @property
    def left_tokens(self) -> int | None:
        """Tokens that are neither spent nor held; None where tokens are not limited."""
        if self.limit_tokens is None:
            return None
        return self.limit_tokens - self.posted_tokens - self.held_tokens


@dataclass(frozen=True, slots=True)
class Hold:
    """The worst case of one call, set aside under the key of that call.

    held, usage (tokens per model) and prices stay what they were at `reserve`, whatever the state.
    result is the JSON text kept with the call, so that an interrupted caller need not pay twice.
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


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the ledger, never altered. at is UTC in ISO 8601.

    nanousd and tokens by kind: `reserve` what was held, `post` what was spent, `void` what was freed,
    `limit` the limits from then on (0 for none; key is None). overrun is the nano-dollars posted above
    what was held. usage is what the amounts were computed from; empty for `limit`.
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


def checked_name(kind: str, name: str) -> str:
    """The name itself; `InputError` where it is blank or holds characters that cannot be printed."""
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise InputError(f"not a {kind}: {name!r}; use printable characters, at least one")
    return name


def checked_limit(unit: str, limit: int | None) -> int | None:
    """The limit itself; `InputError` where it is not a positive integer of 64 bits."""
    if limit is None:
        return None
    if not _is_count(limit) or limit == 0:
        hint = "; viaticum.money.nanousd() reads dollars" if unit == "nanousd" else ""
        raise InputError(f"not a limit in {unit}: {limit!r}; give an integer above zero{hint}")
    return limit


def checked_usage(usage: Mapping[str, TokenCount]) -> dict[str, TokenCount]:
    """A copy in order of model name.

    Raises `InputError` where no model is named (usage that is missing is not usage of zero), or a
    count is negative or no integer.
    """
    if not usage:
        raise InputError("no usage: name at least one model, with its token counts")
    for model, count in usage.items():
        checked_name("model name", model)
        if not (_is_count(count.input_tokens) and _is_count(count.output_tokens)):
            raise InputError(f"not a token count for {model!r}: {count}; give integers from zero up")
    return {model: usage[model] for model in sorted(usage)}


def checked_result(result: str | None) -> str | None:
    """The text itself; `InputError` where it is not JSON."""
    if result is None:
        return None
    try:
        json.loads(result)
        result.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"a result is kept as JSON text: {error}; pass json.dumps(...)") from None
    return result


def snapshot(prices: Mapping[str, Price], usage: Mapping[str, TokenCount]) -> dict[str, Price]:
    """The prices that `usage` needs; `UnknownPrice` names the model that has none."""
    for model in usage:
        if model not in prices:
            raise UnknownPrice(f"no price for model {model!r}; give one, a price of zero if it is free")
    return {model: prices[model] for model in usage}


def amounts(usage: Mapping[str, TokenCount], prices: Mapping[str, Price]) -> tuple[int, int]:
    """Nano-dollars and tokens of `usage`, summed over its models."""
    prices = snapshot(prices, usage)
    nanousd = sum(prices[name].cost(count.input_tokens, count.output_tokens) for name, count in usage.items())
    tokens = sum(count.total for count in usage.values())
    if max(nanousd, tokens) > MAX_NANOUSD:
        raise InputError(f"usage out of range: {nanousd} nano-dollars, {tokens} tokens do not fit 64 bits")
    return nanousd, tokens


def usage_text(usage: Mapping[str, TokenCount]) -> str:
    return json.dumps({model: asdict(count) for model, count in usage.items()}, sort_keys=True)


def usage_from(text: str) -> dict[str, TokenCount]:
    return {model: TokenCount(**count) for model, count in json.loads(text).items()}


def prices_text(prices: Mapping[str, Price]) -> str:
    return json.dumps({model: asdict(price) for model, price in prices.items()}, sort_keys=True)


def prices_from(text: str) -> dict[str, Price]:
    return {model: Price(**price) for model, price in json.loads(text).items()}


def _is_count(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number <= MAX_NANOUSD
